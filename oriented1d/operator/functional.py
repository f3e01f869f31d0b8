"""``oriented_conv1d``, the function users call: it checks its arguments, reads the angles and calls the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oriented1d import geometry
from oriented1d.operator import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def oriented_conv1d(
    input: Tensor,
    weight: Tensor,
    angles: Tensor | Sequence[float] | geometry.Directions | str,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    residual: bool = False,
) -> Tensor:
    """Depthwise 1D convolution of each channel along its own angle.

    ``y[n,c,p,q] = bias[c] + sum_t weight[c,t+r] * x[n,c,p*stride+dy(t),q*stride+dx(t)]`` for ``t = -r..r`` with
    ``r = (K-1)/2``, ``dy(t) = trunc(-sin(angle) * t)`` and ``dx(t) = trunc(cos(angle) * t)``, and zero outside the
    image. At angle 0 this is ``F.conv2d(x, weight.view(C, 1, 1, K), bias, stride, padding=(0, r), groups=C)``.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 or float64; any strides.
        weight: ``(C, K)`` or ``(C, 1, 1, K)``, K odd; dtype and device of ``input``.
        angles: ``(C,)`` radians, counter-clockwise from the horizontal. They are read on the host and get no gradient.
            A tensor of another device costs a synchronisation when it is new or has changed. Or what they were read
            as: :class:`oriented1d.geometry.Directions`, or the text of it. Inside ``torch.compile`` and
            ``torch.export`` a tensor is read when the graph runs, directions and text are constants of the graph, and a
            sequence of numbers breaks it.
        bias: ``(C,)`` or None.
        stride: step of the output grid in pixels, both ways; the grid starts at pixel (0, 0).
        residual: add the input at the output's pixels (the centre tap counts ``weight + 1``).

    Returns:
        ``(N, C, ceil(H / stride), ceil(W / stride))`` with the dtype and memory format (contiguous or channels_last)
        of ``input``. Under autocast the dtype is the autocast one. Differentiable to any order in input, weight, bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Source: "Convolutional Networks with Oriented 1D Kernels" (ICCV 2023), section 3.
    """
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        name, value = ("weight", weight) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    size, kernel = input.shape, weight.shape
    if len(size) != 4:
        raise ValueError(f"input: expected shape (N, C, H, W), got {tuple(size)}")
    _, channels, height, width = size
    if not (len(kernel) == 2 or (len(kernel) == 4 and kernel[1] == 1 and kernel[2] == 1)):
        raise ValueError(f"weight: expected shape (C, K) or (C, 1, 1, K), got {tuple(kernel)}")
    if kernel[0] != channels:
        raise ValueError(f"weight: expected {channels} channels, those of the input, got {kernel[0]}")
    if kernel[-1] % 2 == 0:
        raise ValueError(f"weight: expected an odd kernel size K, got {kernel[-1]}")
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"input: expected at least one channel and one pixel, got shape {tuple(size)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
    if isinstance(stride, bool) or not isinstance(stride, int | torch.SymInt):
        raise TypeError(f"stride: expected an int, got {type(stride).__name__}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    if not isinstance(residual, bool):
        raise TypeError(f"residual: expected a bool, got {type(residual).__name__}")
    device = input.device
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of the input, {device}, got {tensor.device}")
        if tensor.dtype != input.dtype and not (library.is_autocast(device.type) and tensor.dtype in DTYPES):
            raise TypeError(f"{name}: expected the dtype of the input, {input.dtype}, got {tensor.dtype}")

    if isinstance(angles, Tensor) and torch.compiler.is_compiling():
        if angles.shape != (channels,):
            raise ValueError(f"angles: expected shape ({channels},), got {tuple(angles.shape)}")
        return library._conv(input, weight, bias, angles, "", stride, residual)
    if isinstance(angles, str):
        # Nothing but the text reaches a compiled graph, and is all that its guards look at.
        if torch.compiler.is_compiling():
            return library._conv(input, weight, bias, None, angles, stride, residual)
        layer = geometry.parse(angles)
    else:
        layer = angles if isinstance(angles, geometry.Directions) else geometry.directions(angles)
    if layer.channels != channels:
        raise ValueError(f"angles: expected one for each of the {channels} channels, got {layer.channels}")
    return library.conv(input, weight, bias, layer, stride, residual)
