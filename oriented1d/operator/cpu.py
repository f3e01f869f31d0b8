"""The operator on the CPU, compiled by numba: the default there. The loops are in ``cpu_kernels``.

This module prepares what they need: integer tables of the taps (kept for each layer), flat views of the tensors, and
the threads.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from oriented1d.geometry import LayerTaps
from oriented1d.operator import layout, portable

if TYPE_CHECKING:
    from oriented1d.operator import cpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Elements of a packed image: bigger ones are worked on in bands, so that each part stays in the second level cache.
_BAND_ELEMENTS = 1 << 16
# Fewer multiply-adds than this are not worth waking other threads for.
_SERIAL_WORK = 1 << 18
# A channels_last direction with fewer channels than this leaves too many lanes of its vectors idle.
_MIN_CHANNELS = 3


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("oriented1d.operator.cpu_kernels")


@functools.cache
def available() -> bool:
    """Whether numba can be imported and compiles."""
    try:
        return _kernels().COMPILES
    except ImportError:
        return False


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, taps: LayerTaps, stride: int, residual: bool) -> Tensor:
    """As :func:`oriented1d.operator.portable.forward`."""
    n, c, height, width = input.shape
    shape = (n, c, -(-height // stride), -(-width // stride))
    is_channels_last = layout.channels_last(input)
    output = torch.empty(shape, dtype=input.dtype, memory_format=layout.memory_format(is_channels_last))
    plan = _plan(taps, stride, False, is_channels_last, *shape[2:])
    _gather(input, weight, bias, output, plan, residual)
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
    """As :func:`oriented1d.operator.portable.grad_input`."""
    shape = (*grad_output.shape[:2], height, width)
    result = torch.empty(shape, dtype=grad_output.dtype, memory_format=layout.memory_format(channels_last))
    if stride > 1:
        result.zero_()  # pixels that no tap reads
    plan = _plan(taps, stride, True, channels_last, *grad_output.shape[2:])
    _gather(grad_output, weight, None, result, plan, residual)
    return result


def grad_weight(
    grad_output: Tensor, input: Tensor, taps: LayerTaps, stride: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`oriented1d.operator.portable.grad_weight`. The order of its sums depends on the shape only."""
    sum_dtype = torch.promote_types(input.dtype, torch.float32)
    bias = grad_output.sum((0, 2, 3), dtype=sum_dtype) if with_bias else grad_output.new_empty(0)
    n, c, height, width = grad_output.shape
    plan = _plan(taps, stride, False, layout.channels_last(input), height, width)
    partial = torch.empty((n * plan.bands, c, taps.kernel_size), dtype=sum_dtype)
    arguments = (_images(grad_output, plan.lanes), _images(input, plan.lanes), partial.numpy(), plan)
    _run("weight_gradient", arguments, n, grad_output.numel() * taps.kernel_size, sum_dtype)
    weight = partial.sum(0)
    if not weight.isfinite().all():
        # The zeros around the images turn Inf and NaN of other pixels into NaN: find what they really reach.
        return portable.grad_weight(grad_output, input, taps, stride, with_bias)
    return weight.to(input.dtype), bias.to(input.dtype)


def _gather(
    source: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, plan: cpu_kernels.Plan, residual: bool
) -> None:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weights = torch.empty((len(plan.blocks), weight.shape[1], _kernels().LANES), dtype=dtype).numpy()
    _kernels().fold_weights(weight.detach().to(dtype).contiguous().numpy(), residual, plan, weights)
    start = torch.empty(0, dtype=dtype) if bias is None else bias.detach().to(dtype).contiguous()
    arguments = (_images(source, plan.lanes), weights, start.numpy(), _images(result, plan.lanes), plan)
    _run("gather", arguments, source.shape[0], min(source.numel(), result.numel()) * weight.shape[1], dtype)


def _images(tensor: Tensor, lanes: int) -> cpu_kernels.Images:
    tensor = tensor.detach()
    if lanes > 1 and tensor.stride(1) != 1:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype == torch.float16:
        tensor = tensor.view(torch.int16)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,)).numpy()
    return _kernels().Images(flat, *tensor.shape[2:], *tensor.stride())


@functools.lru_cache(maxsize=256)
def _plan(
    layer: LayerTaps, stride: int, reverse: bool, channels_last: bool, grid_h: int, grid_w: int
) -> cpu_kernels.Plan:
    """Plan of the forward pass (from phases to the output) or, ``reverse``, of grad-input (from it to phases)."""
    kernels = _kernels()
    lanes = kernels.LANES if channels_last and layer.channels >= _MIN_CHANNELS * len(layer.runs) else 1
    every_phase = np.mod(np.concatenate([run.distinct for run in layer.runs]), stride)
    phases = np.zeros((1, 2), np.int64) if reverse else np.unique(every_phase, axis=0).astype(np.int64)
    needed = np.zeros((len(layer.runs), len(phases)), np.bool_)
    blocks, runs, positions, shifts, sources, targets = [], [], [], [], [], []
    for index, run in enumerate(layer.runs):
        shift, phase = np.divmod(run.distinct.astype(np.int64), stride)
        # Along the line, by falling rows; taps of one target phase together.
        order = np.arange(len(shift)) if (shift[0, 0] >= shift[-1, 0]) != reverse else np.arange(len(shift))[::-1]
        if reverse:
            shift = -shift
            source = np.zeros(len(shift), np.int64)
            written, which = np.unique(phase, axis=0, return_inverse=True)
            order = order[np.argsort(which[order], kind="stable")]
            last = np.cumsum(np.bincount(which))
            targets.append(np.column_stack([written, last - np.bincount(which), last]))
        else:
            source = (phase[:, None] == phases).all(2).argmax(1)
            targets.append(np.array([[0, 0, 0, len(shift)]]))
        needed[index, source] = True
        runs.append((len(targets[-1]), shift[:, 0].min(), shift[:, 0].max()))
        shifts.append(shift[order])
        sources.append(source[order])
        positions.append(np.argsort(order)[run.fold])
        for start in range(run.start, run.stop, lanes):
            # The last block of a direction is moved back over its neighbour if that makes it whole: what both of them
            # compute is the same twice.
            first = max(run.start, min(start, run.stop - lanes))
            blocks.append((first, min(lanes, run.stop - first), index))

    # Bands of at least a kernel's height, so that the rows above and below them do not outweigh them.
    tile_h, tile_w = (kernels.VECTORS, kernels.LANES) if lanes == 1 else (1, kernels.VECTORS)
    band_rows = max(layer.kernel_size, _BAND_ELEMENTS // (grid_w * lanes))
    band_rows = -(-grid_h // -(-grid_h // band_rows))
    band_rows = -(-band_rows // tile_h) * tile_h
    bands = -(-grid_h // band_rows)
    low, high = min(run[1] for run in runs), max(run[2] for run in runs)
    if bands == 1:  # a tile reads at most this far outside the image; its other taps touch nothing
        low, high = max(low, 1 - tile_h), min(high, grid_h - band_rows + tile_h - 1)
    margin = min(max(abs(shift[:, 1]).max() for shift in shifts), tile_w - 1)
    pitch = (grid_w + margin) * lanes
    plane = (band_rows + high - low) * pitch + (2 * margin + tile_w) * lanes
    target_phases = _padded(targets)
    offsets = [
        source * plane + (shift[:, 0] - low) * pitch + (shift[:, 1] + margin) * lanes
        for shift, source in zip(shifts, sources, strict=True)
    ]

    # Column by column: most rows that a tile reads are those of the tile before, still in the fastest cache.
    rows, columns = np.arange(0, bands * band_rows, tile_h), np.arange(0, grid_w, tile_w)
    tiles = np.zeros((len(runs), bands, target_phases.shape[1], len(columns), band_rows // tile_h, 4), np.int64)
    tiles[..., 0] = rows[: band_rows // tile_h]
    tiles[..., 1] = columns[:, None]
    for index, (shift, ranges) in enumerate(zip(shifts, targets, strict=True)):
        for target, (first, last) in enumerate(ranges[:, 2:]):
            top, bottom = _touching(rows, tile_h, shift[first:last, 0], grid_h)
            left, right = _touching(columns, tile_w, shift[first:last, 1], grid_w)
            top, bottom = top.reshape(bands, 1, -1), bottom.reshape(bands, 1, -1)
            tiles[index, :, target, ..., 2] = first + np.maximum(top, left[:, None])
            tiles[index, :, target, ..., 3] = first + np.minimum(bottom, right[:, None])

    steps = (1, stride) if reverse else (stride, 1)
    return kernels.Plan(
        *map(int, (*steps, lanes, bands, band_rows, low, margin, pitch, plane)),
        blocks=np.array(blocks, np.int64),
        runs=np.array(runs, np.int64),
        positions=_padded(positions),
        phases=phases,
        needed=needed,
        targets=np.ascontiguousarray(target_phases[..., :2]),
        offsets=_padded(offsets),
        tiles=tiles.reshape(len(runs), bands, target_phases.shape[1], -1, 4),
    )


def _touching(starts: np.ndarray, length: int, shifts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For tiles of ``length`` pixels: the range of taps that reach one of an image's ``size`` pixels from there."""
    touching = (starts[:, None] + shifts < size) & (starts[:, None] + shifts > -length)
    first = touching.argmax(1)
    return first, np.where(touching.any(1), len(shifts) - touching[:, ::-1].argmax(1), first)


def _padded(parts: list[np.ndarray]) -> np.ndarray:
    result = np.zeros((len(parts), max(map(len, parts)), *parts[0].shape[1:]), np.int64)
    for row, part in zip(result, parts, strict=True):
        row[: len(part)] = part
    return result


# Threads -------------------------------------------------------------------------------------------------------------

# Of numba's threading layers only some allow calls from several threads at once, and each call uses all cores anyway.
_one_at_a_time = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _run(name: str, arguments: tuple[Any, ...], images: int, work: int, dtype: torch.dtype) -> None:
    """Run all units of a kernel, on as many threads as PyTorch uses. ``work``: multiply-adds."""
    kernels, plan = _kernels(), arguments[-1]
    threads = min(torch.get_num_threads(), kernels.MAX_THREADS)
    # OpenMP's threads do not survive a fork: a child that waits for them would wait for ever.
    serial = threads == 1 or work < _SERIAL_WORK or _forked
    units = images * plan.bands * len(plan.blocks)
    elements = len(plan.phases) * plan.plane + kernels.LANES * (kernels.VECTORS + 1 + plan.positions.shape[1])
    workspaces = _workspaces(1 if serial else threads, -(-elements // 16) * 16, dtype)
    if serial:
        getattr(kernels, name)(*arguments, 0, units, workspaces[0])
        return
    with _one_at_a_time:
        torch_threads = torch.get_num_threads()
        kernels.set_threads(threads)  # the first call starts numba's threads, which changes OpenMP's number
        if torch.get_num_threads() != torch_threads:
            torch.set_num_threads(torch_threads)
        getattr(kernels, f"{name}_parallel")(*arguments, units, workspaces)


_kept = threading.local()


def _workspaces(threads: int, elements: int, dtype: torch.dtype) -> np.ndarray:
    """Memory for the loops, kept for the next call: fresh pages cost more than the work that is done in them."""
    size = threads * elements * dtype.itemsize
    if getattr(_kept, "memory", None) is None or _kept.memory.numel() < size:
        _kept.memory = torch.empty(size, dtype=torch.uint8)  # PyTorch's memory starts on a cache line
    return _kept.memory[:size].view(dtype).view(threads, elements).numpy()
