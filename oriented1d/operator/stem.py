"""The first half of the stem, without the images in between: pointwise, oriented, LayerNorm over channels, GELU.

The pointwise and the oriented layer are linear, so the pair is one dense convolution of the image with few weights. For
an RGB image and 64 channels that saves the reading and writing of 21 times the image, in both directions of training.
There is a kernel for CUDA in bfloat16 (:func:`supported` says when); everything else runs the layers one after another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oriented1d import geometry
from oriented1d.operator import library, portable

_library = torch.library.Library("oriented1d", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "oriented_stem(Tensor image, Tensor projection, Tensor? offset, Tensor weight, Tensor? bias, Tensor norm_weight,"
    " Tensor norm_bias, float eps, str directions, int stride, ScalarType dtype, bool keep)"
    " -> (Tensor, Tensor)",
    tags=_tags,
)
_library.define(
    "oriented_stem_backward(Tensor grad_output, Tensor conv, Tensor image, Tensor norm_weight, Tensor norm_bias,"
    " float eps, str directions, int kernel_size, int stride) -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)
_forward = torch.ops.oriented1d.oriented_stem.default
_gradients = torch.ops.oriented1d.oriented_stem_backward.default


def supported(image: Tensor, weight: Tensor, directions: str, stride: int) -> bool:
    """Whether :func:`oriented_stem` has a kernel for images ``(N, I, H, W)`` like this one, under the autocast in
    force."""
    return image.is_cuda and _has_kernel(
        image.device,
        image.dtype,
        library.computed_dtype(image),
        image.shape[1],
        directions,
        weight.shape[-1],
        stride,
    )


@torch.compiler.assume_constant_result
def _has_kernel(
    device: torch.device,
    image: torch.dtype,
    dtype: torch.dtype,
    channels: int,
    directions: str,
    kernel_size: int,
    stride: int,
) -> bool:
    from oriented1d.operator.cuda import stem

    return stem.unsupported(device, dtype, image, channels, _taps(directions, kernel_size), stride) is None


def oriented_stem(
    image: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    directions: str,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    stride: int,
) -> Tensor:
    """``gelu(layer_norm(oriented_conv1d(projection @ image + offset)))``, in one pass.

    Args:
        image: ``(N, I, H, W)``, any strides.
        projection: ``(C, I)`` and ``offset`` ``(C,)`` or None: the pointwise layer.
        weight: ``(C, K)`` or ``(C, 1, 1, K)`` and ``bias`` ``(C,)`` or None: the oriented layer.
        directions: the text of its angles (:class:`oriented1d.geometry.Directions`).
        norm_weight, norm_bias, eps: LayerNorm over the ``C`` channels of a pixel.
        stride: of the output grid, pixels.

    Returns:
        ``(N, C, ceil(H / stride), ceil(W / stride))`` in channels_last; of the dtype of ``image``, or autocast's.
        Products of the weights of the two layers, and what LayerNorm reads, are rounded to that dtype; sums are
        float32. Differentiable once.
    """
    tensors = image, projection, offset, weight, bias, norm_weight, norm_bias
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward(*tensors, eps, directions, stride, library.computed_dtype(image), keep)[0]


def _taps(directions: str, kernel_size: int) -> geometry.LayerTaps:
    return geometry.layer_taps(geometry.parse(directions), kernel_size)


def _norm_gelu(conv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = conv.permute(0, 2, 3, 1).to(torch.promote_types(conv.dtype, torch.float32))
    x = F.gelu(F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps))
    return x.permute(0, 3, 1, 2)


def _norm_gelu_backward(
    grad_output: Tensor, conv: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the images before LayerNorm, and of its weight and bias."""
    sums = torch.promote_types(conv.dtype, torch.float32)
    g, x = (t.permute(0, 2, 3, 1).to(sums) for t in (grad_output, conv))
    w, b = weight.to(sums), bias.to(sums)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    x = (x - mean) * scale
    u = x * w + b
    g = g * (0.5 * (1 + torch.erf(u * 0.5**0.5)) + u * torch.exp(-0.5 * u * u) * (0.5 / torch.pi) ** 0.5)
    of_weight, of_bias = (g * x).sum((0, 1, 2)), g.sum((0, 1, 2))
    g = g * w
    g = scale * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    return g.permute(0, 3, 1, 2), of_weight, of_bias


@torch.library.impl(_library, "oriented_stem", "CUDA")
def _cuda_forward(
    image, projection, offset, weight, bias, norm_weight, norm_bias, eps, directions, stride, dtype, keep
):
    from oriented1d.operator.cuda import stem

    taps = _taps(directions, weight.shape[-1])
    parameters = projection, offset, weight, bias, norm_weight, norm_bias
    return stem.forward(image, parameters, eps, taps, stride, dtype, keep)


@torch.library.impl(_library, "oriented_stem_backward", "CUDA")
def _cuda_backward(grad_output, conv, image, norm_weight, norm_bias, eps, directions, kernel_size, stride):
    from oriented1d.operator.cuda import stem

    taps = _taps(directions, kernel_size)
    return stem.backward(grad_output, conv, image, norm_weight, norm_bias, eps, taps, stride)


# The reference, for the CPU.


@torch.library.impl(_library, "oriented_stem", "CPU")
def _cpu_forward(image, projection, offset, weight, bias, norm_weight, norm_bias, eps, directions, stride, dtype, keep):
    x = torch.einsum("ci,nihw->nchw", projection, image.to(projection.dtype))
    x = x if offset is None else x + offset[:, None, None]
    y = portable.forward(x, weight.flatten(1), bias, _taps(directions, weight.shape[-1]), stride, False)
    y = y.to(dtype, memory_format=torch.channels_last)
    z = _norm_gelu(y, norm_weight, norm_bias, eps).to(dtype, memory_format=torch.channels_last)
    return z, y if keep else y.new_empty(0)


@torch.library.impl(_library, "oriented_stem_backward", "CPU")
def _cpu_backward(grad_output, conv, image, norm_weight, norm_bias, eps, directions, kernel_size, stride):
    taps = _taps(directions, kernel_size)
    g, of_weight, of_bias = _norm_gelu_backward(grad_output, conv, norm_weight, norm_bias, eps)
    channels = torch.cat([image, torch.ones_like(image[:, :1])], 1).to(g.dtype).split(1, 1)
    parts = [portable.grad_weight(g, x.expand(-1, taps.channels, -1, -1), taps, stride, False)[0] for x in channels]
    return torch.stack(parts, -1), of_weight, of_bias


@torch.library.register_fake("oriented1d::oriented_stem", lib=_library)
def _fake_forward(
    image, projection, offset, weight, bias, norm_weight, norm_bias, eps, directions, stride, dtype, keep
):
    n, _, height, width = image.shape
    shape = (n, weight.shape[0], (height + stride - 1) // stride, (width + stride - 1) // stride)
    z = torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)
    return z, torch.empty_like(z) if keep else z.new_empty(0)


@torch.library.register_fake("oriented1d::oriented_stem_backward", lib=_library)
def _fake_backward(grad_output, conv, image, norm_weight, norm_bias, eps, directions, kernel_size, stride):
    c = grad_output.shape[1]
    sums = torch.promote_types(conv.dtype, torch.float32)
    shapes = (c, kernel_size, image.shape[1] + 1), (c,), (c,)
    return tuple(torch.empty(shape, dtype=sums, device=image.device) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (
        image,
        projection,
        offset,
        weight,
        bias,
        norm_weight,
        norm_bias,
        ctx.eps,
        ctx.directions,
        ctx.stride,
        _,
        _,
    ) = inputs
    ctx.save_for_backward(image, projection, offset, weight, norm_weight, norm_bias, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """The products of the two layers' weights have gradients ``sums``, from which those of each layer follow."""
    image, projection, offset, weight, norm_weight, norm_bias, conv = ctx.saved_tensors
    k = weight.shape[-1]
    norm = norm_weight, norm_bias, ctx.eps
    of_image = of_offset = of_bias = None
    if ctx.needs_input_grad[0]:
        g = _norm_gelu_backward(grad_output, conv, *norm)[0].to(grad_output.dtype)
        how = ctx.directions, *image.shape[2:], ctx.stride, False, True
        g = torch.ops.oriented1d.oriented_conv1d_grad_input(g, weight.to(g.dtype), None, *how)
        of_image = torch.einsum("ci,nchw->nihw", projection.to(g.dtype), g).to(image.dtype)
    how = *norm, ctx.directions, k, ctx.stride
    sums, of_norm_weight, of_norm_bias = _gradients(grad_output, conv, image, *how)
    w, p = weight.reshape(-1, k, 1).to(sums.dtype), projection.to(sums.dtype)
    pair = torch.cat([p, torch.zeros_like(p[:, :1]) if offset is None else offset.to(sums.dtype)[:, None]], 1)
    of_pair = (sums * w).sum(1)
    of_projection = of_pair[:, :-1].to(projection.dtype)
    of_weight = (sums * pair[:, None]).sum(2).reshape(weight.shape).to(weight.dtype)
    if offset is not None:
        of_offset = of_pair[:, -1].to(offset.dtype)
    if ctx.bias_dtype is not None:  # the centre tap never leaves the image
        of_bias = sums[:, k // 2, -1].to(ctx.bias_dtype)
    of_norm = of_norm_weight.to(norm_weight.dtype), of_norm_bias.to(norm_bias.dtype)
    return of_image, of_projection, of_offset, of_weight, of_bias, *of_norm, *([None] * 5)


torch.library.register_autograd("oriented1d::oriented_stem", _backward, setup_context=_save, lib=_library)
