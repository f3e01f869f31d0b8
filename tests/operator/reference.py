"""The definition of the operator, written out pixel by pixel in float64 numpy. Shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def taps(angle: float, kernel_size: int) -> list[tuple[int, int]]:
    """``(dy, dx)`` by the definition, in float32, for angles whose products are not close to integers by accident."""
    angle = np.float32(angle)
    r = kernel_size // 2
    sin, cos = np.float32(np.sin(np.float64(angle))), np.float32(np.cos(np.float64(angle)))
    return [(int(np.float32(-sin * np.float32(t))), int(np.float32(cos * np.float32(t)))) for t in range(-r, r + 1)]


def oriented_conv1d(
    x: Tensor, w: Tensor, angles: Tensor, b: Tensor | None = None, stride: int = 1, residual: bool = False
) -> Tensor:
    """Float64 result of the formula for any input dtype; ``angles`` is ``(C,)``."""
    images = x.detach().to("cpu", torch.float64).numpy()
    weights = w.detach().to("cpu", torch.float64).reshape(w.shape[0], -1).numpy()
    n, c, height, width = images.shape
    out = np.zeros((n, c, -(-height // stride), -(-width // stride)))
    for channel in range(c):
        for p in range(out.shape[2]):
            for q in range(out.shape[3]):
                for (dy, dx), value in zip(
                    taps(float(angles[channel]), weights.shape[1]), weights[channel], strict=True
                ):
                    i, j = p * stride + dy, q * stride + dx
                    if 0 <= i < height and 0 <= j < width:
                        out[:, channel, p, q] += value * images[:, channel, i, j]
                if residual:
                    out[:, channel, p, q] += images[:, channel, p * stride, q * stride]
        if b is not None:
            out[:, channel] += b[channel].item()
    return torch.from_numpy(out)


def inside_nan(shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool, device: str = "cpu") -> Tensor:
    """Random images inside a field of NaN, channels_last or contiguous; the latter at an odd address."""
    n, c, h, w = shape
    field = torch.full(((n + 2) * c * h * w + 1,), math.nan, dtype=dtype, device=device)
    if last:
        view = field[:-1].view(n + 2, h, w, c)[1:-1].permute(0, 3, 1, 2)
    else:
        view = field[1:].view(n + 2, c, h, w)[1:-1]
    return view.copy_(torch.randn(shape))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|``; NaN or a wrong shape is infinite."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.detach().to("cpu", torch.float64)
    error = (actual.detach().to("cpu", torch.float64) - expected).norm() / expected.norm().clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()


def kernels(call: Callable[[], object]) -> list[str]:
    """What runs on a GPU in a call that has been made before."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.events() or ()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in events if event.device_type == on_device and not event.is_user_annotation]
