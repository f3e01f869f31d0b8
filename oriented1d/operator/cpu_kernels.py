"""The loops of the CPU backend, compiled by numba when they are first called and kept on disk.

Work is cut into units: one image, one band of rows, and one *block*: a channel, or in channels_last images up to
``LANES`` neighbouring channels of one direction. What a unit reads is first packed into a buffer of the accumulation
type with zeros around it, so that the inner loops test no bounds and know one type; it stays in the cache. The output
is then made in *tiles* of eight vectors that are held in registers:

    one channel         eight rows of ``LANES`` pixels; the lanes of a vector are pixels, all with the same weight
    several channels    eight pixels of one row; the lanes of a vector are channels

and in both cases ``tile[u] += weights[k] * packed[at + offsets[k] + u * step]`` for each tap ``k`` that touches the
image from somewhere in the tile. Taps lie on a line, so those are neighbours in the list of taps.

An image read with stride s is packed as *phases*, ``phase(i, j)[p, q] = image[p*s + i, q*s + j]``. On the coarse grid
of ``(p, q)`` every tap is a shift within one phase, whichever way it goes: the forward pass reads from up to s*s phases
and writes one image, grad-input reads one image and writes up to s*s phases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

# Elements in a vector, and vectors in a tile: the sums of a tile fit the registers.
LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
VECTORS = 8

_config: Any = numba.config
MAX_THREADS: int = _config.NUMBA_NUM_THREADS
COMPILES = not _config.DISABLE_JIT  # as it is without NUMBA_DISABLE_JIT=1

# Low precision arrives as integers of the same bits, because numba has neither type on the CPU.
BFLOAT16, FLOAT16 = types.uint16, types.int16

intrinsic: Any = numba_intrinsic  # its types know nothing of the first argument that it adds

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ALIGN = {_I16: 2, ir.FloatType(): 4, ir.DoubleType(): 8, _I64: 8}


def _jit(**options: bool) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, **options}
        try:
            return njit(cache=True, **settings)(function)
        except (RuntimeError, OSError):  # no folder to keep compiled code in: compile in every process
            return njit(**settings)(function)

    return decorate


# Nothing is allocated in the loops, so that arrays need no reference counts: threads would fight over them.
_loops = _jit(_nrt=False)
_part = _jit(_nrt=False, no_cpython_wrapper=True)
_inline = _jit(_nrt=False, no_cpython_wrapper=True, forceinline=True)


# Vectors: what numba cannot say in Python, written as LLVM instructions ---------------------------------------------


def _pointer(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    return cgutils.create_struct_proxy(signature.args[index])(context, builder, args[index]).data


def _load(builder: Any, pointer: Any, lanes: int) -> Any:
    element = pointer.type.pointee
    if lanes > 1:
        pointer = builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())
    value = builder.load(pointer)
    value.align = _ALIGN[element]
    return value


def _store(builder: Any, value: Any, pointer: Any) -> None:
    align = _ALIGN[pointer.type.pointee]
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _convert(builder: Any, value: Any, source: Any, target: Any) -> Any:
    """``value``, one element or a vector, from the numba type ``source`` to ``target``; rounds to nearest, even."""
    if source == target:
        return value
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    f32, i32, i16 = (ir.VectorType(scalar, count) if count else scalar for scalar in (ir.FloatType(), _I32, _I16))

    def bits(number: int) -> Any:
        return ir.Constant(i32, [number] * count if count else number)

    if source == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(value, i32), bits(16)), f32)
    if source == FLOAT16:  # not LLVM's own conversion: on processors without one it calls a library that may be missing
        pattern = builder.zext(value, i32)
        magnitude = builder.shl(builder.and_(pattern, bits(0x7FFF)), bits(13))
        scaled = builder.fmul(builder.bitcast(magnitude, f32), builder.bitcast(bits(0x77800000), f32))  # 2 ** 112
        special = builder.icmp_unsigned(">=", magnitude, bits(0x7C00 << 13))
        magnitude = builder.select(special, builder.or_(magnitude, bits(0x7F800000)), builder.bitcast(scaled, i32))
        sign = builder.shl(builder.and_(pattern, bits(0x8000)), bits(16))
        return builder.bitcast(builder.or_(sign, magnitude), f32)
    pattern = builder.bitcast(value, i32)
    is_nan = builder.fcmp_unordered("uno", value, value)
    if target == BFLOAT16:
        odd = builder.and_(builder.lshr(pattern, bits(16)), bits(1))
        rounded = builder.lshr(builder.add(builder.add(pattern, odd), bits(0x7FFF)), bits(16))
        return builder.trunc(builder.select(is_nan, bits(0x7FC0), rounded), i16)
    magnitude = builder.and_(pattern, bits(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, bits(13)), bits(1))
    rebased = builder.sub(builder.add(builder.add(magnitude, odd), bits(0xFFF)), bits(112 << 23))
    normal = builder.lshr(rebased, bits(13))
    # Below 2 ** -14 the result has a fixed point: adding 0.5 leaves it in the last bits, rounded.
    shifted = builder.fadd(builder.bitcast(magnitude, f32), builder.bitcast(bits(0x3F000000), f32))
    subnormal = builder.sub(builder.bitcast(shifted, i32), bits(0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", magnitude, bits(113 << 23)), subnormal, normal)
    half = builder.select(builder.icmp_unsigned(">=", magnitude, bits(143 << 23)), bits(0x7C00), half)
    half = builder.select(is_nan, bits(0x7E00), half)
    sign = builder.lshr(builder.and_(pattern, bits(0x80000000)), bits(16))
    return builder.trunc(builder.or_(sign, half), i16)


def _loop(builder: Any, first: Any, last: Any, before: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> Any:
    """Emit ``for k in range(first, last): values = body(k, values)``; returns the values after it."""
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    values = [builder.phi(value.type) for value in before]
    after = body(k, values)
    following = builder.add(k, ir.Constant(_I64, 1))
    for phi, start, end in zip([k, *values], [first, *before], [following, *after], strict=True):
        phi.add_incoming(start, entry)
        phi.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, done)
    builder.position_at_end(done)
    results = [builder.phi(value.type) for value in before]
    for phi, start, end in zip(results, before, after, strict=True):
        phi.add_incoming(start, entry)
        phi.add_incoming(end, loop)
    return results


def _copier(lanes: int) -> Any:
    @intrinsic
    def copy(typing_context, source, i, target, j):
        def emit(context, builder, signature, args):
            source, target = (_pointer(context, builder, signature, args, index) for index in (0, 2))
            value = _load(builder, builder.gep(source, [args[1]]), lanes)
            value = _convert(builder, value, signature.args[0].dtype, signature.args[2].dtype)
            _store(builder, value, builder.gep(target, [args[3]]))
            return context.get_dummy_value()

        return types.void(source, types.int64, target, types.int64), emit

    return copy


# copy(source, i, target, j): target[j] = source[i] and as many after them as it says, converted
_copy_lanes, _copy_8, _copy_4, _copy_2, _copy_1 = (_copier(n) for n in (LANES, 8, 4, 2, 1))


@intrinsic
def _tile(context, packed, at, step, offsets, weights, first, last, start, output):
    """One tile: ``output[u,l] = start[l] + sum_k weights[k,l] * packed[at+offsets[k]+u*step+l]``, k in first..last."""

    def emit(context, builder, signature, args):
        packed, offsets, weights, start, output = (
            _pointer(context, builder, signature, args, index) for index in (0, 3, 4, 7, 8)
        )
        at, step, first, last = args[1], args[2], args[5], args[6]
        steps = [builder.mul(step, ir.Constant(_I64, u)) for u in range(VECTORS)]
        packed = builder.gep(packed, [at])

        def tap(k, sums):
            weight = _load(builder, builder.gep(weights, [builder.mul(k, ir.Constant(_I64, LANES))]), LANES)
            here = builder.gep(packed, [_load(builder, builder.gep(offsets, [k]), 1)])
            return [
                _multiply_add(builder, weight, _load(builder, builder.gep(here, [by]), LANES), total)
                for by, total in zip(steps, sums, strict=True)
            ]

        sums = _loop(builder, first, last, [_load(builder, start, LANES)] * VECTORS, tap)
        for u, total in enumerate(sums):
            _store(builder, total, builder.gep(output, [ir.Constant(_I64, u * LANES)]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(packed, i64, i64, offsets, weights, i64, i64, start, output), emit


@intrinsic
def _tile_dots(typing_context, packed, at, step, offsets, first, last, grad, sums):
    """Products with one tile: ``sums[k,l] += sum_u grad[u,l] * packed[at+offsets[k]+u*step+l]``, k in first..last."""

    def emit(context, builder, signature, args):
        packed, offsets, grad, sums = (_pointer(context, builder, signature, args, index) for index in (0, 3, 6, 7))
        at, step, first, last = args[1], args[2], args[4], args[5]
        steps = [builder.mul(step, ir.Constant(_I64, u)) for u in range(VECTORS)]
        grads = [_load(builder, builder.gep(grad, [ir.Constant(_I64, u * LANES)]), LANES) for u in range(VECTORS)]
        packed = builder.gep(packed, [at])

        def tap(k, _):
            here = builder.gep(packed, [_load(builder, builder.gep(offsets, [k]), 1)])
            place = builder.gep(sums, [builder.mul(k, ir.Constant(_I64, LANES))])
            # Two chains of additions: the processor works on both at once.
            chains = [_load(builder, place, LANES), ir.Constant(grads[0].type, [0.0] * LANES)]
            for u, (by, value) in enumerate(zip(steps, grads, strict=True)):
                x = _load(builder, builder.gep(here, [by]), LANES)
                chains[u % 2] = _multiply_add(builder, value, x, chains[u % 2])
            _store(builder, builder.fadd(*chains), place)
            return []

        _loop(builder, first, last, [], tap)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(packed, i64, i64, offsets, i64, i64, grad, sums), emit


@intrinsic
def _sum_lanes(typing_context, array):
    """Sum of the first ``LANES`` elements, in pairs."""

    def emit(context, builder, signature, args):
        total, count = _load(builder, _pointer(context, builder, signature, args, 0), LANES), LANES
        while count > 1:
            count //= 2
            halves = [
                builder.shuffle_vector(
                    total, total, ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
                )
                for start in (0, count)
            ]
            total = builder.fadd(*halves)
        return builder.extract_element(total, ir.Constant(_I32, 0))

    return array.dtype(array), emit


@intrinsic
def _prefetch(typing_context, array, i):
    """Ask for the cache line of an element that will be written soon."""

    def emit(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        place = builder.gep(_pointer(context, builder, signature, args, 0), [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        numbers = (ir.Constant(_I32, number) for number in (1, 3, 1))  # to write, to the first level, data
        builder.call(function, [builder.bitcast(place, byte), *numbers])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


# Units ---------------------------------------------------------------------------------------------------------------


@_inline
def _copy_pixels(source, i, source_step, target, j, target_step, pixels, channels):
    """Copy ``channels`` neighbouring elements of each of a row of pixels, converted."""
    if channels == 1 and source_step == 1 and target_step == 1:
        pixels, channels = 1, pixels
    while channels >= LANES:
        for q in range(pixels):
            _copy_lanes(source, i + q * source_step, target, j + q * target_step)
        i, j, channels = i + LANES, j + LANES, channels - LANES
    if channels & 8:
        for q in range(pixels):
            _copy_8(source, i + q * source_step, target, j + q * target_step)
        i, j = i + 8, j + 8
    if channels & 4:
        for q in range(pixels):
            _copy_4(source, i + q * source_step, target, j + q * target_step)
        i, j = i + 4, j + 4
    if channels & 2:
        for q in range(pixels):
            _copy_2(source, i + q * source_step, target, j + q * target_step)
        i, j = i + 2, j + 2
    if channels & 1:
        for q in range(pixels):
            _copy_1(source, i + q * source_step, target, j + q * target_step)


class Images(NamedTuple):
    """``(N, C, H, W)`` images as the loops see them: flat memory, the size, and the strides in elements."""

    data: np.ndarray
    height: int
    width: int
    image_stride: int
    channel_stride: int
    row_stride: int
    column_stride: int


class Plan(NamedTuple):
    """What the loops need to know of a layer and an image size; arrays are int64, their rows padded to one length.

    Attributes:
        source_step, target_step: step of the pixels that are read and written, seen from the coarse grid.
        lanes: neighbouring channels in a vector, 1 or ``LANES``.
        bands, band_rows: images are worked on in bands of rows of the grid.
        low: the first packed row of a band, seen from the band's first.
        margin: columns of zeros between the rows of a packed image; a tile never needs more.
        pitch, plane: elements of a packed row and of a packed phase.
        blocks: ``(blocks, 3)``: first channel, number of channels, direction.
        runs: ``(directions, 3)``: number of target phases, lowest and highest row shift.
        positions: ``(directions, K)``: which of the distinct taps each of the K taps is.
        phases: ``(phases, 2)``: row and column where each source phase starts.
        needed: bool ``(directions, phases)``: whether a direction reads it.
        targets: ``(directions, targets, 2)``: row and column where a target phase starts.
        offsets: ``(directions, K)``: from an element of a tile, in the packed image, to what each distinct tap reads.
        tiles: ``(directions, bands, targets, tiles, 4)``: row in its band, column, and the range of taps that it needs.
    """

    source_step: int
    target_step: int
    lanes: int
    bands: int
    band_rows: int
    low: int
    margin: int
    pitch: int
    plane: int
    blocks: np.ndarray
    runs: np.ndarray
    positions: np.ndarray
    phases: np.ndarray
    needed: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    tiles: np.ndarray


@_loops
def fold_weights(weight, residual, plan, folded):
    """Weights ``(C, K)`` as ``(blocks, K, LANES)``: coinciding taps added up, one lane per channel or all alike."""
    blocks, positions = plan.blocks, plan.positions
    folded[:] = 0
    for b in range(len(blocks)):
        channel, channels, run = blocks[b, 0], blocks[b, 1], blocks[b, 2]
        for t in range(weight.shape[1]):
            place = folded[b, positions[run, t]]
            if channels == 1:
                for lane in range(LANES):
                    place[lane] += weight[channel, t]
            else:
                for lane in range(channels):
                    place[lane] += weight[channel + lane, t]
        if residual:
            place = folded[b, positions[run, weight.shape[1] // 2]]
            for lane in range(LANES):
                place[lane] += 1


@_inline
def _phase_size(size, phase, step):
    """Rows or columns of the phase that starts at row or column ``phase``."""
    return (size - phase + step - 1) // step


@_inline
def _unit(unit, plan):
    """Block, band and image of a unit: neighbouring units share an image."""
    blocks = len(plan.blocks)
    return unit % blocks, unit // blocks % plan.bands, unit // blocks // plan.bands


@_part
def _pack(source, image, band, block, plan, packed):
    """Copy what a block reads in one band; zeros stay outside the image."""
    step, start, phases, needed = plan.source_step, band * plan.band_rows, plan.phases, plan.needed
    channel, channels, run = block[0], block[1], block[2]
    first, last = start + plan.runs[run, 1], start + plan.band_rows + plan.runs[run, 2]
    for phase in range(len(phases)):
        if needed[run, phase]:
            i, j = phases[phase, 0], phases[phase, 1]
            width = _phase_size(source.width, j, step)
            for r in range(max(first, 0), min(last, _phase_size(source.height, i, step))):
                at = image * source.image_stride + channel * source.channel_stride
                at += (r * step + i) * source.row_stride + j * source.column_stride
                to = phase * plan.plane + (r - start - plan.low) * plan.pitch + plan.margin * plan.lanes
                _copy_pixels(source.data, at, step * source.column_stride, packed, to, plan.lanes, width, channels)


@_loops
def gather(source, weights, bias, result, plan, first, last, workspace):
    """Units ``first..last`` of the forward pass or of grad-input: every output pixel gathers what its taps read."""
    output, start = workspace[: VECTORS * LANES], workspace[VECTORS * LANES : (VECTORS + 1) * LANES]
    packed = workspace[(VECTORS + 1) * LANES :]
    start[:] = 0
    packed[:] = 0
    packed_band = 0
    tile_rows, tile_columns, step = (VECTORS, LANES, plan.pitch) if plan.lanes == 1 else (1, VECTORS, LANES)
    row_stride, column_stride = plan.target_step * result.row_stride, plan.target_step * result.column_stride
    for unit in range(first, last):
        b, band, image = _unit(unit, plan)
        block = plan.blocks[b]
        channel, channels, run = block[0], block[1], block[2]
        if packed_band != band:  # other rows lie outside the image now
            packed_band = band
            packed[:] = 0
        _pack(source, image, band, block, plan, packed)
        if bias.size:
            for lane in range(LANES):
                start[lane] = bias[channel + min(lane, channels - 1)]
        for target in range(plan.runs[run, 0]):
            i, j = plan.targets[run, target, 0], plan.targets[run, target, 1]
            height = _phase_size(result.height, i, plan.target_step) - band * plan.band_rows
            width = _phase_size(result.width, j, plan.target_step)
            origin = image * result.image_stride + channel * result.channel_stride
            origin += i * result.row_stride + j * result.column_stride + band * plan.band_rows * row_stride
            tiles = plan.tiles[run, band, target]
            for t in range(len(tiles)):
                p, q, first_tap, last_tap = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3]
                rows, pixels = min(tile_rows, height - p), min(tile_columns, width - q)
                if rows > 0:
                    at, to = p * plan.pitch + q * plan.lanes, origin + p * row_stride + q * column_stride
                    if plan.lanes > 1:  # both ends of what is written: channels rarely start where cache lines do
                        for u in range(pixels):
                            _prefetch(result.data, to + u * column_stride)
                            _prefetch(result.data, to + u * column_stride + channels - 1)
                    _tile(packed, at, step, plan.offsets[run], weights[b], first_tap, last_tap, start, output)
                    for u in range(rows):
                        row = to + u * row_stride
                        _copy_pixels(output, u * LANES, plan.lanes, result.data, row, column_stride, pixels, channels)


@_loops
def weight_gradient(grad, source, partial, plan, first, last, workspace):
    """Units ``first..last`` of grad-weight: each fills its own part of ``partial (images * bands, C, K)``."""
    kernel_size = partial.shape[2]
    grads = workspace[: VECTORS * LANES]
    sums = workspace[VECTORS * LANES : (VECTORS + kernel_size) * LANES].reshape(kernel_size, LANES)
    packed = workspace[(VECTORS + kernel_size) * LANES :]
    tile_rows, tile_columns, step = (VECTORS, LANES, plan.pitch) if plan.lanes == 1 else (1, VECTORS, LANES)
    grads[:] = 0
    packed[:] = 0
    packed_band = 0
    for unit in range(first, last):
        b, band, image = _unit(unit, plan)
        block = plan.blocks[b]
        channel, channels, run = block[0], block[1], block[2]
        if packed_band != band:
            packed_band = band
            packed[:] = 0
        _pack(source, image, band, block, plan, packed)
        origin = image * grad.image_stride + channel * grad.channel_stride + band * plan.band_rows * grad.row_stride
        height = grad.height - band * plan.band_rows
        sums[:] = 0
        tiles = plan.tiles[run, band, 0]
        for t in range(len(tiles)):
            p, q, first_tap, last_tap = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3]
            rows, pixels = min(tile_rows, height - p), min(tile_columns, grad.width - q)
            if rows > 0:
                if rows < tile_rows or pixels < tile_columns:
                    grads[:] = 0
                at, row = p * plan.pitch + q * plan.lanes, origin + p * grad.row_stride + q * grad.column_stride
                for u in range(rows):
                    _copy_pixels(grad.data, row, grad.column_stride, grads, u * LANES, plan.lanes, pixels, channels)
                    row += grad.row_stride
                _tile_dots(packed, at, step, plan.offsets[run], first_tap, last_tap, grads, sums)
        for tap in range(kernel_size):
            lanes = sums[plan.positions[run, tap]]
            if plan.lanes == 1:
                partial[image * plan.bands + band, channel, tap] = _sum_lanes(lanes)
            else:
                for lane in range(channels):
                    partial[image * plan.bands + band, channel + lane, tap] = lanes[lane]


def set_threads(count: int) -> None:
    """How many threads the parallel loops use that are called from this Python thread."""
    numba.set_num_threads(count)


@_jit(parallel=True)
def gather_parallel(source, weights, bias, result, plan, units, workspaces):
    threads = len(workspaces)
    for thread in prange(threads):
        first, last = units * thread // threads, units * (thread + 1) // threads
        gather(source, weights, bias, result, plan, first, last, workspaces[thread])


@_jit(parallel=True)
def weight_gradient_parallel(grad, source, partial, plan, units, workspaces):
    threads = len(workspaces)
    for thread in prange(threads):
        first, last = units * thread // threads, units * (thread + 1) // threads
        weight_gradient(grad, source, partial, plan, first, last, workspaces[thread])
