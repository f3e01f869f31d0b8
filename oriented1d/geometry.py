"""From angles to integer taps. The only place of the package that rounds.

With ``r = (K - 1) / 2``, an oriented 1D kernel of odd size ``K`` at angle ``theta`` reads, for ``t = -r..r``, the pixel
that lies

    dy(t) = trunc(-sin(theta) * t)        dx(t) = trunc(cos(theta) * t)

rows and columns from the output pixel (rows grow downwards, so an angle of 90 degrees points up). The products are
float32 and are truncated towards zero; one that is an integer but for rounding (0.5 * 14 at 30 degrees) counts as that
integer. Everything is computed on the host, once for each set of angles; the operator's backends only see integers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Relative to |t|: sine and cosine are float32, so their products are off by up to |t| * 6e-8.
_SNAP = 1e-6


def kernel_taps(angle: float, kernel_size: int) -> np.ndarray:
    """Pixel offsets of one oriented kernel.

    Args:
        angle: radians; rounded to float32 first.
        kernel_size: odd number of taps ``K``.

    Returns:
        int32 array ``(K, 2)`` of ``(dy, dx)`` in pixels, from ``t = -r`` to ``t = r``.

    Source: the paper's section 3 and the kernels of the original implementation.
    """
    theta = float(np.float32(angle))
    t = np.arange(kernel_size, dtype=np.float64) - (kernel_size - 1) // 2
    # sin and cos in float64, rounded to float32: correctly rounded on every platform, and exactly 1 at 90 degrees.
    direction = np.array([np.float32(-math.sin(theta)), np.float32(math.cos(theta))], dtype=np.float32)
    product = (t[:, None].astype(np.float32) * direction).astype(np.float64)
    nearest = np.rint(product)
    is_integer = np.abs(product - nearest) <= _SNAP * np.maximum(1.0, np.abs(t[:, None]))
    return np.where(is_integer, nearest, np.trunc(product)).astype(np.int32)


def layer_angles(channels: int, num_directions: int = 8, layer_offset: float = 0.0) -> Tensor:
    """Angles of a layer whose channels are shared out evenly over ``num_directions`` directions.

    Channel ``c`` has direction ``n = (N * (c + 1) - 1) // C`` and the angle ``pi * ((n / N + layer_offset) mod 1)``, so
    the channels of one direction are neighbours (the paper's section 3.3, in the original's order of channels).

    Args:
        channels: number of channels ``C``.
        num_directions: number of directions ``N``.
        layer_offset: rotation of the whole layer, in half turns (0.5 is 90 degrees).

    Returns:
        float32 tensor ``(C,)`` in radians, in ``[0, pi)``.
    """
    n = (num_directions * (np.arange(channels) + 1) - 1) // channels
    return torch.from_numpy((np.pi * np.mod(n / num_directions + layer_offset, 1.0)).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Directions:
    """Angles of consecutive channels, run-length encoded.

    Attributes:
        angles: one angle a run, radians (exact float32 values).
        counts: number of channels of each run; they add up to the channels of the layer.
        channels: number of channels of the layer.
        text: the same as one word a run, ``"12@0.0 12@1.5707963705062866"``, which :func:`parse` reads: a constant of
            compiled and exported graphs.
    """

    angles: tuple[float, ...]
    counts: tuple[int, ...]
    channels: int = dataclasses.field(init=False, repr=False, compare=False)
    text: str = dataclasses.field(init=False, repr=False, compare=False)
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept: every call of a layer looks its taps up, and a layer may have as many runs as channels.
        words = [f"{count}@{float(angle)!r}" for angle, count in zip(self.angles, self.counts, strict=True)]
        object.__setattr__(self, "channels", sum(self.counts))
        object.__setattr__(self, "text", " ".join(words))
        object.__setattr__(self, "_hash", hash((self.angles, self.counts)))

    def __hash__(self) -> int:
        return self._hash

    def per_channel(self) -> Tensor:
        """The angles as a float32 tensor ``(C,)`` on the CPU."""
        return torch.from_numpy(np.repeat(np.array(self.angles, np.float32), self.counts))


_WORD = re.compile(r"([1-9][0-9]*)@(-?[0-9.]+(?:e[+-]?[0-9]+)?)")


@torch.compiler.assume_constant_result
def parse(text: str) -> Directions:
    """The directions with this ``text``. Cached, and a constant of graphs that are traced.

    Raises:
        ValueError: it is not the text of directions.
    """
    return _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Directions:
    angles, counts = [], []
    for word in text.split():
        match = _WORD.fullmatch(word)
        if match is None or not math.isfinite(angle := float(match[2])):
            raise ValueError(f"angles: expected words such as 12@0.5 (channels, radians), got {word!r}")
        counts.append(int(match[1]))
        angles.append(angle)
    return Directions(tuple(angles), tuple(counts))


@functools.lru_cache(maxsize=1024)
def _encode(buffer: bytes) -> Directions:
    values = np.frombuffer(buffer, dtype=np.float32)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"angles: expected finite radians, got {values[bad]} for channel {bad}")
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.zeros(0, int)
    counts = np.diff(np.concatenate([starts, [len(values)]]))
    return Directions(tuple(values[starts].tolist()), tuple(counts.tolist()))


# Reading a tensor of another device stops the host until that device is done, and is impossible while a CUDA graph is
# captured: remember what each tensor held, by its identity and version.
_on_device: dict[int, tuple[weakref.ref[Tensor], int, Directions]] = {}


def directions(angles: Tensor | Sequence[float]) -> Directions:
    """Read ``angles`` on the host and run-length encode them.

    Args:
        angles: ``(C,)`` radians, a floating point tensor of any device or a sequence of numbers. A tensor that is not
            on the CPU is copied to the host when it is first seen and after each change in place.

    Raises:
        TypeError: ``angles`` holds no real numbers.
        ValueError: ``angles`` has not one dimension, or is not finite everywhere.
    """
    if not isinstance(angles, Tensor):
        try:
            values = np.asarray(angles, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"angles: expected a tensor or a sequence of real numbers, got {angles!r}") from error
        if values.ndim != 1:
            raise ValueError(f"angles: expected shape (C,), got {values.shape}")
        return _encode(values.tobytes())
    if not angles.is_floating_point():
        raise TypeError(f"angles: expected a floating point tensor of radians, got {angles.dtype}")
    if angles.dim() != 1:
        raise ValueError(f"angles: expected shape (C,), got {tuple(angles.shape)}")
    if angles.device.type == "cpu":
        return _encode(angles.detach().to(torch.float32).numpy().tobytes())
    # Inference tensors have no version: they cannot be told from a changed one, so they are read each time.
    version = -1 if angles.is_inference() else angles._version
    known = _on_device.get(id(angles))
    if known is not None and known[0]() is angles and known[1] == version != -1:
        return known[2]
    if angles.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "angles: a CUDA tensor not seen before cannot be read while a CUDA graph is captured; "
            "call once before the capture, or pass angles on the CPU"
        )
    encoded = _encode(angles.detach().to("cpu", torch.float32).numpy().tobytes())
    key = id(angles)
    _on_device[key] = (weakref.ref(angles, lambda _: _on_device.pop(key, None)), version, encoded)
    return encoded


@dataclasses.dataclass(frozen=True, eq=False)
class DirectionTaps:
    """Taps of the channels ``start..stop`` of a layer, which share one angle.

    Attributes:
        angle: radians.
        start, stop: the channels.
        offsets: int32 ``(K, 2)``, ``(dy, dx)`` of each tap.
        distinct: int32 ``(D, 2)``, the offsets without repetition, in the order of their first tap: truncation makes
            taps coincide (31 taps are 21 pixels at 45 degrees).
        fold: int32 ``(K,)``, the row of ``distinct`` that each tap is.
    """

    angle: float
    start: int
    stop: int
    offsets: np.ndarray
    distinct: np.ndarray
    fold: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTaps:
    """Taps of all channels of a layer. Build it with :func:`layer_taps`, which keeps one object for each layer."""

    kernel_size: int
    directions: Directions
    runs: tuple[DirectionTaps, ...]

    @property
    def channels(self) -> int:
        return self.directions.channels

    @property
    def centre(self) -> int:
        return (self.kernel_size - 1) // 2


@functools.lru_cache(maxsize=1024)
def layer_taps(layer: Directions, kernel_size: int) -> LayerTaps:
    """Integer taps of a layer with the given directions and odd ``kernel_size``. Cached."""
    runs = []
    start = 0
    for angle, count in zip(layer.angles, layer.counts, strict=True):
        offsets = kernel_taps(angle, kernel_size)
        first: dict[tuple[int, int], int] = {}
        fold = np.array([first.setdefault((int(dy), int(dx)), len(first)) for dy, dx in offsets], dtype=np.int32)
        distinct = np.array(list(first), dtype=np.int32).reshape(-1, 2)
        runs.append(DirectionTaps(angle, start, start + count, offsets, distinct, fold))
        start += count
    return LayerTaps(kernel_size, layer, tuple(runs))
