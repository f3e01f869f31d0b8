"""A pointwise layer followed by an oriented one, without the images between them.

Both are linear, so the pair is one dense convolution of the image with few weights. For an RGB image and 64 channels
that saves the reading and writing of 21 times the image, in both directions of training. There is a kernel for CUDA in
bfloat16; everything else runs the two layers one after another (:func:`fused` says which).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oriented1d import geometry
from oriented1d.operator import library, portable

_PAIR = "Tensor projection, Tensor? offset, Tensor weight, Tensor? bias"

_library = torch.library.Library("oriented1d", "FRAGMENT")
_library.define(
    f"pointwise_oriented_conv1d(Tensor image, {_PAIR}, float[] angles, int[] counts, int stride, ScalarType dtype)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "pointwise_oriented_conv1d_correlation(Tensor grad_output, Tensor image, float[] angles, int[] counts,"
    " int kernel_size, int stride) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_forward = torch.ops.oriented1d.pointwise_oriented_conv1d.default
_correlation = torch.ops.oriented1d.pointwise_oriented_conv1d_correlation.default


@torch.compiler.assume_constant_result
def _has_kernel(
    device: torch.device, image: torch.dtype, dtype: torch.dtype, channels: int, layer: geometry.Directions,
    kernel_size: int, stride: int,
) -> bool:  # fmt: skip
    from oriented1d.operator.cuda import pointwise

    taps = geometry.layer_taps(layer, kernel_size)
    return pointwise.unsupported(device, dtype, image, channels, taps, stride) is None


def fused(image: Tensor, weight: Tensor, layer: geometry.Directions, stride: int) -> bool:
    """Whether :func:`pointwise_oriented_conv1d` has a kernel for these layers and images ``(N, I, H, W)``."""
    if not image.is_cuda or image.dim() != 4:
        return False
    return _has_kernel(image.device, image.dtype, _dtype(image), image.shape[1], layer, weight.shape[-1], stride)


def _dtype(image: Tensor) -> torch.dtype:
    device_type = image.device.type
    if device_type in library.AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return image.dtype


def pointwise_oriented_conv1d(
    image: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    layer: geometry.Directions,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
) -> Tensor:
    """``oriented_conv1d`` of ``projection @ image + offset``, in one pass.

    Args:
        image: ``(N, I, H, W)``, any strides.
        projection: ``(C, I)`` and ``offset`` ``(C,)`` or None: the pointwise layer.
        weight: ``(C, K)`` or ``(C, 1, 1, K)`` and ``bias`` ``(C,)`` or None: the oriented layer.
        layer: its angles.
        stride: of the output grid, pixels.

    Returns:
        ``(N, C, ceil(H / stride), ceil(W / stride))`` in channels_last; of the dtype of ``image``, or autocast's.
        Products of the two weights are rounded to that dtype; sums are float32. Differentiable once.
    """
    return _forward(image, projection, offset, weight, bias, layer.angles, layer.counts, stride, _dtype(image))


def _taps(angles: list[float], counts: list[int], kernel_size: int) -> geometry.LayerTaps:
    return geometry.layer_taps(geometry.Directions(tuple(angles), tuple(counts)), kernel_size)


@torch.library.impl(_library, "pointwise_oriented_conv1d", "CUDA")
def _cuda_forward(image, projection, offset, weight, bias, angles, counts, stride, dtype):
    from oriented1d.operator.cuda import pointwise

    taps = _taps(angles, counts, weight.shape[-1])
    return pointwise.forward(image, projection, offset, weight.flatten(1), bias, taps, stride, dtype)


@torch.library.impl(_library, "pointwise_oriented_conv1d_correlation", "CUDA")
def _cuda_correlation(grad_output, image, angles, counts, kernel_size, stride):
    from oriented1d.operator.cuda import pointwise

    return pointwise.correlation(grad_output, image, _taps(angles, counts, kernel_size), stride)


# The reference: on the CPU.


@torch.library.impl(_library, "pointwise_oriented_conv1d", "CPU")
def _cpu_forward(image, projection, offset, weight, bias, angles, counts, stride, dtype):
    x = torch.einsum("ci,nihw->nchw", projection, image.to(projection.dtype))
    x = x if offset is None else x + offset[:, None, None]
    y = portable.forward(x, weight.flatten(1), bias, _taps(angles, counts, weight.shape[-1]), stride, False)
    return y.to(dtype, memory_format=torch.channels_last)


@torch.library.impl(_library, "pointwise_oriented_conv1d_correlation", "CPU")
def _cpu_correlation(grad_output, image, angles, counts, kernel_size, stride):
    taps = _taps(angles, counts, kernel_size)
    sums = torch.promote_types(grad_output.dtype, torch.float32)
    ones = torch.ones_like(image[:, :1])
    parts = [
        portable.grad_weight(
            grad_output.to(sums), channel.to(sums).expand(-1, taps.channels, -1, -1), taps, stride, False
        )
        for channel in torch.cat([image, ones], 1).split(1, 1)
    ]
    return torch.stack([part for part, _ in parts], -1)


@torch.library.register_fake("oriented1d::pointwise_oriented_conv1d", lib=_library)
def _fake_forward(image, projection, offset, weight, bias, angles, counts, stride, dtype):
    n, _, height, width = image.shape
    shape = (n, weight.shape[0], (height + stride - 1) // stride, (width + stride - 1) // stride)
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)


@torch.library.register_fake("oriented1d::pointwise_oriented_conv1d_correlation", lib=_library)
def _fake_correlation(grad_output, image, angles, counts, kernel_size, stride):
    shape = (grad_output.shape[1], kernel_size, image.shape[1] + 1)
    sums = torch.promote_types(grad_output.dtype, torch.float32)
    return torch.empty(shape, dtype=sums, device=image.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, projection, offset, weight, bias, ctx.angles, ctx.counts, ctx.stride, _ = inputs
    ctx.save_for_backward(image, projection, offset, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    image, projection, offset, weight = ctx.saved_tensors
    kernel_size = weight.shape[-1]
    of_image = of_projection = of_offset = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        how = *image.shape[2:], ctx.stride, False, False
        between = torch.ops.oriented1d.oriented_conv1d_grad_input(
            grad_output, weight.to(grad_output.dtype), None, ctx.angles, ctx.counts, *how
        )
        of_image = torch.einsum("ci,nchw->nihw", projection.to(between.dtype), between).to(image.dtype)
    if any(ctx.needs_input_grad[1:5]):
        sums = _correlation(grad_output, image, ctx.angles, ctx.counts, kernel_size, ctx.stride)
        w = weight.reshape(-1, kernel_size, 1).to(sums.dtype)
        p = projection.to(sums.dtype)
        pair = torch.cat([p, torch.zeros_like(p[:, :1]) if offset is None else offset.to(sums.dtype)[:, None]], 1)
        of_pair = (sums * w).sum(1)
        of_projection = of_pair[:, :-1].to(projection.dtype)
        of_offset = None if offset is None else of_pair[:, -1].to(offset.dtype)
        of_weight = (sums * pair[:, None]).sum(2).reshape(weight.shape).to(weight.dtype)
        if ctx.bias_dtype is not None:  # the centre tap never leaves the image
            of_bias = sums[:, kernel_size // 2, -1].to(ctx.bias_dtype)
    return of_image, of_projection, of_offset, of_weight, of_bias, None, None, None, None


torch.library.register_autograd("oriented1d::pointwise_oriented_conv1d", _backward, setup_context=_save, lib=_library)
