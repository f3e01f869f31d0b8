"""The operators as PyTorch knows them: schema, shapes, autograd, autocast, FLOPs, and the choice of a backend.

Three operators are registered under ``torch.ops.oriented1d``, one for each direction of the convolution. Each is linear
in its tensors, and the derivative of each is made of the other two, so derivatives of any order exist:

    oriented_conv1d(x, w)              -> y     derivatives: grad_input, grad_weight
    oriented_conv1d_grad_input(g, w)   -> x     derivatives: oriented_conv1d, grad_weight
    oriented_conv1d_grad_weight(g, x)  -> w, b  derivatives: oriented_conv1d, grad_input

Angles reach them in one of two ways: as the text of :class:`oriented1d.geometry.Directions`, a constant of a compiled
or exported graph, or as the tensor ``theta``, which is read on the host when the operator runs.

Beside images of 16 bits, weight and bias may be float32 (:func:`parameters`): an autocast call casts its images only.

A call takes one of two roads. PyTorch's dispatcher is open to everything, but takes several times as long on the host
as the launch of a kernel. Where only autograd and autocast would act on the way (:func:`_is_plain`), :func:`conv` and,
in its backward pass, :func:`grad_input` and :func:`grad_weight` call the backend themselves. All else is the same on
both roads: :func:`_run_conv` and its like choose the backend, and :func:`_gradients` makes the derivatives.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _has_storage,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import profiler
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from oriented1d import geometry
from oriented1d.operator import cpu, portable
from oriented1d.operator.layout import channels_last, memory_format

_ANGLES = "Tensor? theta, str directions"

_library = torch.library.Library("oriented1d", "DEF")
for _schema in (
    f"oriented_conv1d(Tensor input, Tensor weight, Tensor? bias, {_ANGLES}, int stride, bool residual) -> Tensor",
    f"oriented_conv1d_grad_input(Tensor grad_output, Tensor weight, {_ANGLES}, SymInt height, SymInt width, int stride,"
    " bool residual, bool channels_last) -> Tensor",
    f"oriented_conv1d_grad_weight(Tensor grad_output, Tensor input, {_ANGLES}, int kernel_size, int stride,"
    " bool with_bias) -> (Tensor, Tensor)",
):
    # Exact strides: the output's memory format follows the input's, so a compiler must not change that.
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

_ops = torch.ops.oriented1d
_conv = _ops.oriented_conv1d.default
_grad_input = _ops.oriented_conv1d_grad_input.default
_grad_weight = _ops.oriented_conv1d_grad_weight.default


LOW_PRECISION = (torch.bfloat16, torch.float16)


# Backends ------------------------------------------------------------------------------------------------------------

_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operator on one backend inside a ``with`` block, on every thread: for tests and measurements.

    Args:
        name: ``"portable"`` (plain PyTorch), ``"cpu"`` (numba) or ``"cuda"``.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: (from the operator) the backend cannot run the tensors it is given.
    """
    global _forced
    if name not in ("portable", "cpu", "cuda"):
        raise ValueError(f"name: expected 'portable', 'cpu' or 'cuda', got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend_for(tensor: Tensor, taps: geometry.LayerTaps, stride: int) -> ModuleType:
    """The module that runs a layer on tensors like this one."""
    if _forced == "portable":
        return portable
    reason = None
    if tensor.is_cpu:
        if tensor.dtype in cpu.DTYPES and cpu.available():
            return cpu
    elif tensor.is_cuda:
        from oriented1d.operator import cuda

        reason = cuda.unsupported(tensor, taps, stride)
        if reason is None:
            return cuda
    if _forced is not None:
        raise RuntimeError(
            f"backend {_forced!r} cannot run {tensor.dtype} on {tensor.device}: {reason or 'wrong device'}"
        )
    if reason is not None and tensor.dtype != torch.float64:
        _warn_once(reason)
    return portable


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"oriented1d: no CUDA kernels for {reason}: using plain PyTorch, which is slower", stacklevel=2)


def _run_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: geometry.Directions,
    stride: int,
    residual: bool,
    recorded: bool = False,
) -> Tensor:
    taps = geometry.layer_taps(layer, weight.shape[-1])
    _check_channels(input, taps.channels)
    backend = backend_for(input, taps, stride)
    weight, bias = parameters(input, weight, bias, wide=_rounds(backend))
    if recorded and input.is_cuda and backend is not portable:
        backend.expect_gradients(input, weight, taps, stride)
    return backend.forward(input, _matrix(weight), bias, taps, stride, residual)


def _run_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    layer: geometry.Directions,
    height: int,
    width: int,
    stride: int,
    residual: bool,
    channels_last: bool,
) -> Tensor:
    taps = geometry.layer_taps(layer, weight.shape[-1])
    _check_channels(grad_output, taps.channels)
    backend = backend_for(grad_output, taps, stride)
    weight, _ = parameters(grad_output, weight, None, wide=_rounds(backend))
    return backend.grad_input(grad_output, _matrix(weight), taps, height, width, stride, residual, channels_last)


def _run_grad_weight(
    grad_output: Tensor, input: Tensor, layer: geometry.Directions, kernel_size: int, stride: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    taps = geometry.layer_taps(layer, kernel_size)
    _check_channels(grad_output, taps.channels)
    if input.dtype != grad_output.dtype:
        raise _wrong_dtype("input", input, grad_output)
    return backend_for(input, taps, stride).grad_weight(grad_output, input, taps, stride, with_bias)


# What a traced or autocast call can only know once it runs.


def _check_channels(images: Tensor, channels: int) -> None:
    if channels != images.shape[1]:
        raise ValueError(f"angles: expected one for each of the {images.shape[1]} channels, got {channels}")


def _wrong_dtype(name: str, tensor: Tensor, images: Tensor) -> TypeError:
    return TypeError(f"{name}: expected the dtype of the images, {images.dtype}, got {tensor.dtype}")


def _rounds(backend: ModuleType) -> bool:
    """Whether a backend rounds float32 parameters to the dtype of the images itself, as CUDA kernels do."""
    return backend is not portable and backend is not cpu


def parameters(images: Tensor, weight: Tensor, bias: Tensor | None, wide: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in one dtype: that of the images or, with ``wide``, float32 where the weight is.

    Raises:
        TypeError: one has neither the dtype of the images, nor is it float32 beside images of 16 bits.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == images.dtype:
            continue
        if tensor.dtype != torch.float32 or images.dtype not in LOW_PRECISION:
            raise _wrong_dtype(name, tensor, images)
    dtype = weight.dtype if wide else images.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return weight, bias


def _matrix(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 2 else weight.reshape(weight.shape[0], -1)


# What the dispatcher runs --------------------------------------------------------------------------------------------


def _layer(theta: Tensor | None, directions: str) -> geometry.Directions:
    return geometry.parse(directions) if theta is None else geometry.directions(theta)


@torch.library.impl(_library, "oriented_conv1d", "CompositeExplicitAutograd")
def _impl_conv(input, weight, bias, theta, directions, stride, residual):
    return _run_conv(input, weight, bias, _layer(theta, directions), stride, residual)


@torch.library.impl(_library, "oriented_conv1d_grad_input", "CompositeExplicitAutograd")
def _impl_grad_input(grad_output, weight, theta, directions, *rest):
    return _run_grad_input(grad_output, weight, _layer(theta, directions), *rest)


@torch.library.impl(_library, "oriented_conv1d_grad_weight", "CompositeExplicitAutograd")
def _impl_grad_weight(grad_output, input, theta, directions, *rest):
    return _run_grad_weight(grad_output, input, _layer(theta, directions), *rest)


# Shapes and strides --------------------------------------------------------------------------------------------------


@torch.library.register_fake("oriented1d::oriented_conv1d", lib=_library)
def _fake_conv(input, weight, bias, theta, directions, stride, residual):
    n, c, height, width = input.shape
    if theta is None:
        _check_channels(input, geometry.parse(directions).channels)
    shape = (n, c, (height + stride - 1) // stride, (width + stride - 1) // stride)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(channels_last(input)))


@torch.library.register_fake("oriented1d::oriented_conv1d_grad_input", lib=_library)
def _fake_grad_input(grad_output, weight, theta, directions, height, width, stride, residual, channels_last):
    shape = (grad_output.shape[0], grad_output.shape[1], height, width)
    return torch.empty(
        shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(channels_last)
    )


@torch.library.register_fake("oriented1d::oriented_conv1d_grad_weight", lib=_library)
def _fake_grad_weight(grad_output, input, theta, directions, kernel_size, stride, with_bias):
    c = input.shape[1]
    return input.new_empty(c, kernel_size), input.new_empty(c if with_bias else 0)


# Autograd ------------------------------------------------------------------------------------------------------------


def _keep(
    ctx: Any,
    input: Tensor,
    weight: Tensor,
    theta: Tensor | None,
    layer: geometry.Directions,
    stride: int,
    residual: bool,
) -> None:
    input_needed, weight_needed = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if weight_needed else None, weight if input_needed else None, theta)
    ctx.input_shape, ctx.channels_last, ctx.weight_shape = input.shape, channels_last(input), weight.shape
    ctx.layer, ctx.stride, ctx.residual = layer, stride, residual


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of input, weight and bias, on either road."""
    input, weight, theta = ctx.saved_tensors
    input_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
    of_input = of_weight = of_bias = None
    if input_needed:
        size = ctx.input_shape[2:]
        how = ctx.stride, ctx.residual, ctx.channels_last
        of_input = grad_input(grad_output, weight, theta, ctx.layer, *size, *how)
    if weight_needed:
        kernel_size = ctx.weight_shape[-1]
        of_weight, of_bias = grad_weight(grad_output, input, theta, ctx.layer, kernel_size, ctx.stride, bias_needed)
        if len(ctx.weight_shape) != 2:
            of_weight = of_weight.reshape(ctx.weight_shape)
    elif bias_needed:
        of_bias = grad_output.sum((0, 2, 3))
    return of_input, of_weight, of_bias if bias_needed else None


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, theta, directions, stride, residual = inputs
    _keep(ctx, input, weight, theta, geometry.parse(directions), stride, residual)


def _conv_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad_output), *([None] * 4)


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, theta, ctx.directions, _, _, ctx.stride, ctx.residual, _ = inputs
    ctx.save_for_backward(grad_output, weight, theta)


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight, theta = ctx.saved_tensors
    layer = (theta, ctx.directions)
    of_grad_output = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad_output = _conv(grad, weight, None, *layer, ctx.stride, ctx.residual)
    if ctx.needs_input_grad[1]:
        of_weight = _grad_weight(grad_output, grad, *layer, weight.shape[-1], ctx.stride, False)[0]
        of_weight = of_weight.reshape(weight.shape)
    return of_grad_output, of_weight, *([None] * 7)


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_output, input, theta, ctx.directions, _, ctx.stride, ctx.with_bias = inputs
    ctx.save_for_backward(grad_output, input, theta)


def _grad_weight_backward(ctx: Any, grad_w: Tensor, grad_b: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input, theta = ctx.saved_tensors
    layer = (theta, ctx.directions)
    of_grad_output = of_input = None
    if ctx.needs_input_grad[0]:
        of_grad_output = _conv(input, grad_w, grad_b if ctx.with_bias else None, *layer, ctx.stride, False)
    if ctx.needs_input_grad[1]:
        size = input.shape[2:]
        of_input = _grad_input(grad_output, grad_w, *layer, *size, ctx.stride, False, channels_last(input))
    return of_grad_output, of_input, *([None] * 5)


for _name, _backward, _save in (
    ("oriented_conv1d", _conv_backward, _save_conv),
    ("oriented_conv1d_grad_input", _grad_input_backward, _save_grad_input),
    ("oriented_conv1d_grad_weight", _grad_weight_backward, _save_grad_weight),
):
    torch.library.register_autograd(f"oriented1d::{_name}", _backward, setup_context=_save, lib=_library)


# Autocast ------------------------------------------------------------------------------------------------------------


def is_autocast(device_type: str) -> bool:
    """Whether autocast is in force on devices of a type, which may have none."""
    # torch.amp.is_autocast_available would break the graph of torch.compile.
    return device_type in AUTOCAST and torch.is_autocast_enabled(device_type)


def computed_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a convolution of ``input`` is computed in: its own, or autocast's."""
    device_type = input.device.type
    return torch.get_autocast_dtype(device_type) if is_autocast(device_type) else input.dtype


def in_low_precision(
    call: Callable[..., Tensor], device_type: str, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    """Compute in the low precision that is in force, as convolutions do (sums are float32 in every backend).

    Parameters in float32 stay as they are: the operator rounds them.
    """
    dtype = torch.get_autocast_dtype(device_type)
    kept = (torch.float64, torch.float32) if dtype in LOW_PRECISION else (torch.float64,)

    def low(tensor: Tensor | None, kept: tuple[torch.dtype, ...]) -> Tensor | None:
        if tensor is None or tensor.device.type != device_type or tensor.dtype in kept:
            return tensor
        return tensor.to(dtype)

    with torch.autocast(device_type, enabled=False):
        return call(low(input, (torch.float64,)), low(weight, kept), low(bias, kept), *rest)


AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}
"""Types of devices that have autocast here, and its dispatch key."""

for _device_type, _key in AUTOCAST.items():
    _library.impl("oriented_conv1d", functools.partial(in_low_precision, _conv, _device_type), _key)


# Calls ---------------------------------------------------------------------------------------------------------------


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing with a call on these tensors but autograd's and autocast's part.

    That is: no compiler, tracer, mode, transform or profiler has to see the operator, and the tensors are no subclass's
    and are what their memory says.
    """
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or profiler._is_profiler_enabled
    ):
        return False
    for tensor in tensors:
        if tensor is not None and not (
            (type(tensor) is Tensor or type(tensor) is Parameter)
            and (tensor.is_cpu or tensor.is_cuda)
            and _has_storage(tensor)
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
        ):
            return False
    return True


def _is_recorded(first: Tensor, second: Tensor, third: Tensor | None = None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and (
        first.requires_grad or second.requires_grad or (third is not None and third.requires_grad)
    )


class _Conv(torch.autograd.Function):
    """Autograd's part of a call that does not go through the dispatcher."""

    @staticmethod
    def forward(ctx, input, weight, bias, layer, stride, residual):
        _keep(ctx, input, weight, None, layer, stride, residual)
        return _run_conv(input, weight, bias, layer, stride, residual, recorded=True)

    @staticmethod
    def backward(ctx, grad_output):
        return *_gradients(ctx, grad_output), None, None, None


# Function.apply takes half as long again, for the sake of the transforms of torch.func: a plain call has none.
_record_conv = super(torch.autograd.Function, _Conv).apply


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, layer: geometry.Directions, stride: int, residual: bool
) -> Tensor:
    """The convolution, on the shorter road where that is open."""
    if not _is_plain(input, weight, bias):
        return _conv(input, weight, bias, None, layer.text, stride, residual)
    device_type = "cuda" if input.is_cuda else "cpu"
    if torch.is_autocast_enabled(device_type):
        return in_low_precision(conv, device_type, input, weight, bias, layer, stride, residual)
    if _is_recorded(input, weight, bias):
        return _record_conv(input, weight, bias, layer, stride, residual)
    return _run_conv(input, weight, bias, layer, stride, residual)


def grad_input(
    grad_output: Tensor, weight: Tensor, theta: Tensor | None, layer: geometry.Directions, *how: Any
) -> Tensor:
    """Gradient of the input. With ``theta``, or to be differentiated again, it is the dispatcher's."""
    if theta is None and _is_plain(grad_output, weight) and not _is_recorded(grad_output, weight):
        return _run_grad_input(grad_output, weight, layer, *how)
    return _grad_input(grad_output, weight, theta, layer.text, *how)


def grad_weight(
    grad_output: Tensor, input: Tensor, theta: Tensor | None, layer: geometry.Directions, *how: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias. With ``theta``, or to be differentiated again, they are the dispatcher's."""
    if theta is None and _is_plain(grad_output, input) and not _is_recorded(grad_output, input):
        return _run_grad_weight(grad_output, input, layer, *how)
    return _grad_weight(grad_output, input, theta, layer.text, *how)


# FLOPs ---------------------------------------------------------------------------------------------------------------
# As torch.utils.flop_counter counts convolutions: two for each multiply-add, borders as if they were inside.


def _flops(image_shape: torch.Size, kernel_size: int) -> int:
    return 2 * image_shape.numel() * kernel_size


@register_flop_formula(_ops.oriented_conv1d)
def _conv_flops(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(torch.Size(out_shape), weight_shape[-1])


@register_flop_formula(_ops.oriented_conv1d_grad_input)
def _grad_input_flops(grad_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(torch.Size(grad_shape), weight_shape[-1])


@register_flop_formula(_ops.oriented_conv1d_grad_weight)
def _grad_weight_flops(grad_shape, input_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(torch.Size(grad_shape), out_shape[0][-1])
