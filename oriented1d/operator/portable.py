"""The operator in plain PyTorch: any device, any dtype, no compilation. The reference for every other backend.

One tap after the other: shift the image, multiply, add. Windows of the tensors stand in for padding, so nothing is
copied but the accumulator of one direction; low precision accumulates in float32.

All backends have these three functions. ``weight`` is ``(C, K)``; images are ``(N, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oriented1d.geometry import DirectionTaps, LayerTaps
from oriented1d.operator.layout import channels_last, memory_format


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, taps: LayerTaps, stride: int, residual: bool) -> Tensor:
    """``y[n,c,p,q] = b[c] + sum_t w[c,t] x[n,c,p*stride+dy(t),q*stride+dx(t)]``, zero outside the image."""
    n, c, height, width = input.shape
    shape = (n, c, -(-height // stride), -(-width // stride))
    output = _empty(shape, input, channels_last(input))
    for run in taps.runs:
        total = _accumulator(output, run)
        total.zero_() if bias is None else total.copy_(bias[run.start : run.stop, None, None].expand_as(total))
        x, w = input[:, run.start : run.stop], _tap_weights(weight, run, taps.centre, residual, total.dtype)
        for tap, (here, there) in _windows(run, shape[2:], (height, width), stride):
            total[here].addcmul_(x[there].to(total.dtype), w[tap])
        output[:, run.start : run.stop] = total
    return output


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    taps: LayerTaps,
    height: int,
    width: int,
    stride: int,
    residual: bool,
    channels_last: bool,
) -> Tensor:
    """The adjoint of :func:`forward` in ``input``: every window is read and written the other way round."""
    n, c = grad_output.shape[:2]
    result = _empty((n, c, height, width), grad_output, channels_last)
    for run in taps.runs:
        total = _accumulator(result, run).zero_()
        g = grad_output[:, run.start : run.stop]
        w = _tap_weights(weight, run, taps.centre, residual, total.dtype)
        for tap, (here, there) in _windows(run, grad_output.shape[2:], (height, width), stride):
            total[there].addcmul_(g[here].to(total.dtype), w[tap])
        result[:, run.start : run.stop] = total
    return result


def grad_weight(
    grad_output: Tensor, input: Tensor, taps: LayerTaps, stride: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients ``(C, K)`` of the weight and ``(C,)`` of the bias (no elements unless ``with_bias``)."""
    dtype = _sum_dtype(input.dtype)
    result = torch.zeros(input.shape[1], taps.kernel_size, dtype=dtype, device=input.device)
    for run in taps.runs:
        channels = slice(run.start, run.stop)
        x, g = input[:, channels], grad_output[:, channels]
        for tap, (here, there) in _windows(run, grad_output.shape[2:], input.shape[2:], stride):
            result[channels, tap] = (g[here].to(dtype) * x[there].to(dtype)).sum((0, 2, 3))
    bias = grad_output.sum((0, 2, 3), dtype=dtype) if with_bias else result.new_empty(0)
    return result.to(input.dtype), bias.to(input.dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty(shape: tuple[int, ...], like: Tensor, is_channels_last: bool) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(is_channels_last))


def _accumulator(output: Tensor, run: DirectionTaps) -> Tensor:
    part = output[:, run.start : run.stop]
    return part if part.dtype == _sum_dtype(part.dtype) else torch.empty_like(part, dtype=torch.float32)


def _tap_weights(weight: Tensor, run: DirectionTaps, centre: int, residual: bool, dtype: torch.dtype) -> Tensor:
    """Weights of one direction as ``(K, c, 1, 1)``; the identity is one more on the centre tap."""
    w = weight[run.start : run.stop].to(dtype, copy=True).t()
    if residual:
        w[centre] += 1
    return w[..., None, None]


_Window = tuple[slice, slice, slice, slice]


def _windows(
    run: DirectionTaps, out_size: tuple[int, ...], in_size: tuple[int, ...], stride: int
) -> Iterator[tuple[int, tuple[_Window, _Window]]]:
    """For each tap that touches the image, the output pixels that it contributes to and the input pixels it reads."""
    for tap, offset in enumerate(run.offsets.tolist()):
        here, there = [slice(None)] * 2, [slice(None)] * 2
        for shift, n_out, n_in in zip(offset, out_size, in_size, strict=True):
            first = max(0, -(shift // stride))  # the smallest p with p * stride + shift >= 0
            last = min(n_out - 1, (n_in - 1 - shift) // stride)
            if first > last:
                break
            here.append(slice(first, last + 1))
            there.append(slice(first * stride + shift, last * stride + shift + 1, stride))
        else:
            yield tap, (tuple(here), tuple(there))  # type: ignore[misc]
