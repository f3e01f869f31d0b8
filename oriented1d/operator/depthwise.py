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
    force: channels_last ones in 16 bits, on a GPU with tensor cores."""
    if not input.is_cuda or input.dim() != 4 or not input.is_contiguous(memory_format=torch.channels_last):
        return False
    if input.is_contiguous():  # both formats describe it: PyTorch's output would be contiguous
        return False
    return _has_kernel(input.device, library.computed_dtype(input), weight.shape[0], weight.shape[-1])


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
    """
    return _conv(input, weight, bias)


def _runs(input: Tensor, weight: Tensor) -> bool:
    # What a compiled graph was made for may not be what it is given.
    some = 0 < input.numel() < 2**31
    return some and _has_kernel(input.device, input.dtype, weight.shape[0], weight.shape[-1])


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(input, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


@torch.library.impl(_library, "depthwise_conv2d", "CompositeExplicitAutograd")
def _impl_conv(input, weight, bias):
    kernel = input.is_cuda and _runs(input, weight)
    weight, bias = library.parameters(input, weight, bias, wide=kernel)
    if kernel:
        from oriented1d.operator import cuda

        return cuda.depthwise(input, weight, bias, False)
    return _reference(input, weight, bias).contiguous(memory_format=torch.channels_last)


@torch.library.impl(_library, "depthwise_conv2d_grad_input", "CompositeExplicitAutograd")
def _impl_grad_input(grad_output, weight):
    kernel = grad_output.is_cuda and _runs(grad_output, weight)
    weight, _ = library.parameters(grad_output, weight, None, wide=kernel)
    if kernel:
        from oriented1d.operator import cuda

        return cuda.depthwise(grad_output, weight, None, True)
    return _reference(grad_output, weight.flip(2, 3), None).contiguous(memory_format=torch.channels_last)


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
    of_input = None if again or not needed[0] else _grad_input(grad_output, weight)
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

for _device_type, _key in library.AUTOCAST.items():
    _library.impl("depthwise_conv2d", functools.partial(library.in_low_precision, _conv, _device_type), _key)


def _flops(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # As torch.utils.flop_counter counts convolutions: two for each multiply-add, borders as if they were inside.
    return 2 * torch.Size(out_shape).numel() * weight_shape[-1] ** 2


register_flop_formula([torch.ops.oriented1d.depthwise_conv2d, torch.ops.oriented1d.depthwise_conv2d_grad_input])(_flops)
