"""Depthwise convolution with 2D kernels, for the 7x7 layers of the ``2d`` and ``2dpp`` networks.

The tensor core kernels of the oriented layers (``cuda/mma.py``) take any set of taps that lies in few rows, so also a
7x7 kernel: this module runs them where there is one (:func:`supported`) as ``torch.ops.oriented1d.depthwise_conv2d``.
Gradients of weights are PyTorch's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from oriented1d.operator import library
from oriented1d.operator.layout import only_channels_last

_library = torch.library.Library("oriented1d", "FRAGMENT")
for _schema in (
    "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    "depthwise_conv2d_grad_input(Tensor grad_output, Tensor weight) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
_conv = torch.ops.oriented1d.depthwise_conv2d.default
_grad_input = torch.ops.oriented1d.depthwise_conv2d_grad_input.default


def supported(input: Tensor, weight: Tensor) -> bool:
    """Whether :func:`depthwise_conv2d` has a kernel for images ``(N, C, H, W)`` like this one, under the autocast in
    force: channels_last ones in 16 bits, on a GPU of compute capability 8.0 and up. What PyTorch would refuse, or
    transform (``torch.func``, forward-mode derivatives), is left to it."""
    if not input.is_cuda or not _fits(input, weight):
        return False
    return _has_kernel(input.device, library.computed_dtype(input), weight.shape[0], weight.shape[-1])


def _fits(input: Tensor, weight: Tensor) -> bool:
    if not torch.compiler.is_compiling() and (
        library._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    if input.dim() != 4 or input.shape[1] != weight.shape[0] or input.device != weight.device:
        return False
    if input.dtype != weight.dtype and not library.is_autocast(input.device.type):
        return False
    return only_channels_last(input)


@torch.compiler.assume_constant_result
def _has_kernel(device: torch.device, dtype: torch.dtype, channels: int, kernel_size: int) -> bool:
    from oriented1d.operator import cuda

    return cuda.depthwise_unsupported(device, dtype, channels, kernel_size) is None


def depthwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.conv2d(input, weight, bias, padding=K // 2, groups=C)``.

    Args:
        input: ``(N, C, H, W)`` in channels_last.
        weight: ``(C, 1, K, K)``, K odd; of the dtype of ``input``, or float32 beside 16 bits.
        bias: ``(C,)`` or None; as ``weight``.

    Returns:
        ``(N, C, H, W)`` in channels_last, in the dtype of ``input`` or autocast's; sums are float32.

    Raises:
        TypeError, ValueError: a dtype, shape or device is another.
    """
    if not library._is_plain(input, weight, bias):
        return _conv(input, weight, bias)
    # Past the dispatcher, as in `library`.
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        return library.in_low_precision(depthwise_conv2d, device_type, input, weight, bias)
    if library._is_recorded(input, weight, bias):
        return _record(input, weight, bias)
    return _impl_conv(input, weight, bias)


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(input.device.type, enabled=False):
        y = F.conv2d(input, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return y.contiguous(memory_format=torch.channels_last)


def _kernel(images: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernel runs on these, which a compiled graph may be given though it was made for others."""
    channels, k = images.shape[1], weight.shape[-1]
    if weight.shape != (channels, 1, k, k) or k % 2 == 0:
        raise ValueError(f"weight: expected shape ({channels}, 1, K, K) with K odd, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name}: expected the device of the images, {images.device}, got {tensor.device}")
    if not images.is_cuda:
        return False
    from oriented1d.operator import cuda

    return cuda.depthwise_fits(images.shape, k) and _has_kernel(images.device, images.dtype, channels, k)


@torch.library.impl(_library, "depthwise_conv2d", "CompositeExplicitAutograd")
def _impl_conv(input, weight, bias):
    kernel = _kernel(input, weight, bias)
    weight, bias = library.parameters(input, weight, bias, wide=kernel)
    if not kernel:
        return _reference(input, weight, bias)
    from oriented1d.operator import cuda

    return cuda.depthwise(input, weight, bias, False)


@torch.library.impl(_library, "depthwise_conv2d_grad_input", "CompositeExplicitAutograd")
def _impl_grad_input(grad_output, weight):
    kernel = _kernel(grad_output, weight, None)
    weight, _ = library.parameters(grad_output, weight, None, wide=kernel)
    if not kernel:
        return _reference(grad_output, weight.flip(2, 3), None)
    from oriented1d.operator import cuda

    return cuda.depthwise(grad_output, weight, None, True)


@torch.library.register_fake("oriented1d::depthwise_conv2d", lib=_library)
def _fake_conv(input, weight, bias):
    return torch.empty_like(input, memory_format=torch.channels_last)


@torch.library.register_fake("oriented1d::depthwise_conv2d_grad_input", lib=_library)
def _fake_grad_input(grad_output, weight):
    return torch.empty_like(grad_output, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias = inputs
    ctx.save_for_backward(input, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad)
    # What is to be differentiated again is PyTorch's, which is differentiable to any order.
    again = torch.is_grad_enabled()
    of_input = None
    if needed[0] and not again:
        plain = library._is_plain(grad_output, weight)
        of_input = (_impl_grad_input if plain else _grad_input)(grad_output, weight)
    channels, pad = weight.shape[0], weight.shape[-1] // 2
    mask = [needed[0] and again, needed[1], needed[2] and ctx.has_bias]
    others: Any = None, None, None
    if any(mask):
        if weight.dtype != input.dtype:
            # Only the gradient of the input depends on its values.
            weight = weight.to(input.dtype) if mask[0] else torch.empty_like(weight, dtype=input.dtype)
        how = [1, 1], [pad, pad], [1, 1], False, [0, 0], channels
        others = torch.ops.aten.convolution_backward(grad_output, input, weight, [channels], *how, mask)
    return others[0] if again else of_input, others[1], others[2]


torch.library.register_autograd("oriented1d::depthwise_conv2d", _backward, setup_context=_save, lib=_library)


class _Recorded(torch.autograd.Function):
    """Autograd's part of a call that does not go through the dispatcher."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        _save(ctx, (input, weight, bias), input)
        return _impl_conv(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        return _backward(ctx, grad_output)


_record = super(torch.autograd.Function, _Recorded).apply  # see `library._record_conv`

for _device_type, _key in library.AUTOCAST.items():
    _library.impl("depthwise_conv2d", functools.partial(library.in_low_precision, _conv, _device_type), _key)


def _flops(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # As torch.utils.flop_counter counts convolutions: two for each multiply-add, borders as if they were inside.
    return 2 * torch.Size(out_shape).numel() * weight_shape[-1] ** 2


register_flop_formula([torch.ops.oriented1d.depthwise_conv2d, torch.ops.oriented1d.depthwise_conv2d_grad_input])(_flops)
