"""CUDA C++ of the operator, written for the taps of one layer's angles.

Every angle becomes a *program*: a tile of outputs (``tiles.py``) whose pixels, taps and sums are spelled out, so that all
offsets are constants and all sums stay in registers. A kernel holds the programs of all angles of a layer; each block
reads from a table which program it runs and on which channels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from oriented1d import geometry
from oriented1d.operator.cuda.tiles import Tile, Uses, is_steep, make_tile


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a block of threads works on.

    Attributes:
        tiles: its tiles (strips).
        along: how many of them follow each other along a line (strips).
        channels: its channels at most (strips).
        region: side of its square of outputs (planes); 0 for strips.
        whole: no image is larger than a region (planes).
        stages: images in shared memory at a time: one is worked on while the others arrive (planes).
        resident: blocks that a processor has registers for.
    """

    tiles: int = 0
    along: int = 0
    channels: int = 0
    region: int = 0
    whole: bool = True
    stages: int = 1
    resident: int = 2


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Sizes of images, numbers of channels and of images are arguments of the kernel.

    Attributes:
        kind: ``"gather"`` (forward; grad-input at stride 1 too), ``"adjoint"`` (grad-input) or ``"weight"``.
        channels_last: memory format.
        dtype: ``"float"``, ``"bf16"`` or ``"half"``.
        vector: neighbouring channels that a thread works on (channels_last only).
        kernel_size, stride: of the layer.
        angles: the distinct angles of the layer, radians.
        length: outputs of a tile.
        block: what a block works on.
        phase_rows: of an adjoint, the rows of the stride's grid of phases that it computes: ``i`` stands for the rows
            ``i``, ``i + stride``, ... of the images. None given are all.
        square: the kernel has two dimensions, ``kernel_size`` by ``kernel_size`` (``mma.py`` only).
        wide: weights and bias are float32, and rounded to the dtype, which has 16 bits, as they are read. A weight
            gradient reads none, and keeps False.
    """

    kind: str
    channels_last: bool
    dtype: str
    vector: int
    kernel_size: int
    stride: int
    angles: tuple[float, ...]
    length: int
    block: Blocks
    phase_rows: tuple[int, ...] = ()
    square: bool = False
    wide: bool = False

    @property
    def text(self) -> str:
        """The CUDA C++."""
        return source(self)

    @property
    def functions(self) -> dict[str, str]:
        """Its kernels: what they are called here, and in the source and in a profile."""
        return functions(self.kind)


def functions(kind: str) -> dict[str, str]:
    """The kernels of a source, and their names in it."""
    run = {"run": f"oriented_{kind}"}
    return run | {"reduce": "oriented_reduce"} if kind == "weight" else run


@dataclasses.dataclass(frozen=True)
class Program:
    """One angle (and, for the adjoint, one phase of the stride grid) of a kernel."""

    phase: tuple[int, int]
    tile: Tile
    taps: tuple[tuple[int, int], ...]  # (dy, dx) of the distinct taps, on the input grid
    fold: tuple[tuple[int, ...], ...]  # for each of them, the taps of the kernel that fall on it


@functools.lru_cache(maxsize=256)
def programs(spec: Spec) -> tuple[Program, ...]:
    result = []
    for angle in spec.angles:
        reach, s = (spec.kernel_size - 1) // 2, spec.stride
        if spec.square:
            offsets = np.argwhere(np.ones((spec.kernel_size, spec.kernel_size))) - reach
        else:
            offsets = geometry.kernel_taps(angle, spec.kernel_size)
        for phase in itertools.product(spec.phase_rows or range(s), range(s)) if spec.kind == "adjoint" else [(0, 0)]:
            classes: dict[tuple[int, int], list[int]] = {}
            for t, (dy, dx) in enumerate(offsets.tolist()):
                if spec.kind != "adjoint":
                    classes.setdefault((dy, dx), []).append(t)
                elif (phase[0] - dy) % s == 0 and (phase[1] - dx) % s == 0:
                    classes.setdefault(((phase[0] - dy) // s, (phase[1] - dx) // s), []).append(t)
            taps = np.array(list(classes), dtype=np.int32).reshape(-1, 2)
            step = 1 if spec.kind == "adjoint" else s
            tile = make_tile(angle, taps, step, _length(spec, is_steep(angle), taps, step))
            result.append(Program(phase, tile, tuple(classes), tuple(map(tuple, classes.values()))))
    return tuple(result)


def _length(spec: Spec, steep: bool, taps: np.ndarray, step: int) -> int:
    """Outputs of a tile: in large regions, so many that eight warps are enough for the lines and the space between."""
    if spec.block.region != 56:
        return spec.length
    across = int(np.abs(taps[:, 1 if steep else 0]).max(initial=0))
    lines = 56 + -(-across * (1 if spec.block.whole else 2) // step)
    return next(length for length in (14, 19, 28) if -(-56 // length) * lines <= 256 or length == 28)


_PRELUDE = r"""
typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ float bf16_low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float bf16_high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u16 to_bf16(float f) {
    u32 u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ u32 to_bf16x2(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
    u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r;
#else
    return (u32)to_bf16(lo) | ((u32)to_bf16(hi) << 16);
#endif
}
__device__ __forceinline__ float from_half(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ u16 to_half(float f) { u16 v; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f)); return v; }
// An address in shared memory, as instructions take it.
__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// The bits lo..hi-1 of 32, for any integers.
__device__ __forceinline__ u32 bits(int lo, int hi) {
    lo = max(lo, 0); hi = min(hi, 32);
    return hi <= lo ? 0u : (0xffffffffu >> (32 - (hi - lo))) << lo;
}
"""

_TYPES = {
    "float": r"""
typedef float T;
__device__ __forceinline__ float to_float(T v) { return v; }
__device__ __forceinline__ T from_float(float v) { return v; }
""",
    "bf16": r"""
typedef u16 T;
__device__ __forceinline__ float to_float(T v) { return bf16_low(v); }
__device__ __forceinline__ T from_float(float v) { return (u16)to_bf16x2(v, 0.f); }
""",
    "half": r"""
typedef u16 T;
__device__ __forceinline__ float to_float(T v) { return from_half(v); }
__device__ __forceinline__ T from_float(float v) { return to_half(v); }
""",
}

_WIDE = r"""
// A parameter is float32, and counts as what it is in the dtype of the images.
__device__ __forceinline__ float to_float(float v) { return to_float(from_float(v)); }
"""


def types(dtype: str, wide: bool) -> str:
    """The type ``T`` of the numbers of images, and what converts them; with ``wide`` also what reads parameters."""
    return _TYPES[dtype] + (_WIDE if wide else "")


def gather_arguments(wide: bool) -> str:
    """The first arguments of the convolution and its adjoint."""
    p = parameter(wide)
    return f"const T* __restrict__ x, T* __restrict__ y, const {p}* __restrict__ w, const {p}* __restrict__ bias,"


def parameter(wide: bool) -> str:
    """The type of weights and bias."""
    return "float" if wide else "T"


_VECTOR = {
    ("bf16", 2): r"""
__device__ __forceinline__ F load(const T* p) { const u32 v = *(const u32*)p; return {bf16_low(v), bf16_high(v)}; }
__device__ __forceinline__ void store(T* p, F v) { *(u32*)p = to_bf16x2(v.x, v.y); }
""",
    ("half", 2): r"""
__device__ __forceinline__ F load(const T* p) {
    const u32 v = *(const u32*)p; return {from_half((u16)v), from_half((u16)(v >> 16))};
}
__device__ __forceinline__ void store(T* p, F v) { *(u32*)p = (u32)to_half(v.x) | ((u32)to_half(v.y) << 16); }
""",
}

_ONE = r"""
#define V 1
struct F { float x; };
__device__ __forceinline__ F load(const T* p) { return {to_float(*p)}; }
__device__ __forceinline__ void store(T* p, F v) { *p = from_float(v.x); }
__device__ __forceinline__ F zero() { return {0.f}; }
__device__ __forceinline__ void write(float* p, F v) { p[0] = v.x; }
__device__ __forceinline__ void fma(F& a, F b, F c) { a.x = fmaf(b.x, c.x, a.x); }
__device__ __forceinline__ void add(F& a, F b) { a.x += b.x; }
"""

_TWO = r"""
#define V 2
struct F { float x, y; };
__device__ __forceinline__ F zero() { return {0.f, 0.f}; }
__device__ __forceinline__ void write(float* p, F v) { p[0] = v.x; p[1] = v.y; }
__device__ __forceinline__ void fma(F& a, F b, F c) { a.x = fmaf(b.x, c.x, a.x); a.y = fmaf(b.y, c.y, a.y); }
__device__ __forceinline__ void add(F& a, F b) { a.x += b.x; a.y += b.y; }
"""


_ASYNC = r"""
// Start copying `bytes` (4, 8 or 16) to shared memory; it has arrived after the next `arrived()` of its group.
template <int bytes> __device__ __forceinline__ void start_copy(T* to, const T* from) {
#if __CUDA_ARCH__ >= 800
    const u32 address = shared(to);
    if (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(address), "l"(from), "n"(bytes) : "memory");
#else
    for (int i = 0; i < bytes / (int)sizeof(T); ++i) to[i] = from[i];
#endif
}
__device__ __forceinline__ void end_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int later> __device__ __forceinline__ void arrived() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(later) : "memory");
#endif
}
"""

# A block does its list of segments, one after the other: images n0 to n1 - 1 of some channels.
_SEGMENTS = r"""
    const int C = (int)C_, hi = (int)hi_, wi = (int)wi_, ho = (int)ho_, wo = (int)wo_;
    for (int segment = first[blockIdx.x], end = first[blockIdx.x + 1]; segment < end; ++segment) {
    const int4 what = work[2 * segment], when = work[2 * segment + 1];
    const int program = what.x, c0 = what.y, count = what.z, group = what.w, n0 = when.x, n1 = when.y;
"""


def source(spec: Spec) -> str:
    parts = [_PRELUDE, types(spec.dtype, spec.wide), _ASYNC, f"#define K {spec.kernel_size}\n"]
    if not spec.block.region:
        parts.append(_ONE if spec.vector == 1 else _TWO + _VECTOR[spec.dtype, spec.vector])
        parts.append(_channels_last(spec))
    else:
        parts.append(_planar(spec))
    return "\n".join(parts)


# channels_last -------------------------------------------------------------------------------------------------------
# A block owns a strip: GROUP lines that follow the kernel's direction, each of `across tiles` tiles. Its input goes to
# shared memory, where the lines lie straight, so that every pixel of a tile has a constant offset; what lies outside the
# image is zero there. While one image is worked on, the strip of the next is on its way (cp.async).


@dataclasses.dataclass(frozen=True)
class Strip:
    """Shared memory of a program, in pixels."""

    first_line: int  # of the input, relative to the first line of outputs
    lines: int
    left: int  # pixels before the first output's
    pitch: int  # odd, so that neighbouring lines start in different banks
    shift: tuple[int, int]  # smallest and largest drift inside the strip
    groups: int  # lines of outputs

    @property
    def size(self) -> int:
        return self.lines * self.pitch


def strip(spec: Spec, program: Program) -> Strip:
    tile = program.tile
    s = 1 if spec.kind == "adjoint" else spec.stride
    reach = spec.length * spec.block.along
    us = [u for u, _, _ in tile.pixels] or [0]
    lines = [v - _in_drift(spec, tile, u) for u, v, _ in tile.pixels] or [0]
    group = spec.block.tiles // spec.block.along
    left = max(0, -min(us))
    right = max(0, max(us) - (spec.length - 1) * s)
    drifts = [tile.drift(u) for u in range(reach)]
    return Strip(
        min(lines),
        (group - 1) * s + max(lines) - min(lines) + 1,
        left,
        (left + (reach - 1) * s + 1 + right) | 1,
        (min(drifts), max(drifts)),
        group,
    )


def _in_drift(spec: Spec, tile: Tile, u: int) -> int:
    """The drift on the input grid: the same line, in input pixels."""
    s = 1 if spec.kind == "adjoint" else spec.stride
    return (u * tile.advance + tile.phase * s) // tile.length


@functools.lru_cache(maxsize=256)
def _strips(spec: Spec) -> tuple[tuple[Strip, bool], ...]:
    """The strip of each program, and whether it is steep."""
    return tuple((strip(spec, program), program.tile.steep) for program in programs(spec))


def strips(spec: Spec, height: int, width: int) -> list[int]:
    """Number of strips of each program that cover outputs of ``height`` x ``width``."""
    reach, numbers = spec.length * spec.block.along, []
    for shape, steep in _strips(spec):
        us, vs = (height, width) if steep else (width, height)
        numbers.append(-(-us // reach) * -(-(vs + shape.shift[1] - shape.shift[0]) // shape.groups))
    return numbers


def strip_bytes(spec: Spec) -> int:
    """Shared memory of a block."""
    size = 2 if spec.dtype != "float" else 4
    pixels = 0
    for shape, _ in _strips(spec):
        grads = shape.groups * ((spec.length * spec.block.along) | 1) if spec.kind == "weight" else 0
        pixels = max(pixels, shape.size + grads)
    extra = 4 * spec.block.channels * spec.kernel_size if spec.kind != "weight" else 0
    return max(
        2 * pixels * spec.block.channels * size + 4 * pixels + extra, 8 * 4 * spec.block.tiles * spec.block.channels
    )


_COPY = r"""
// Where the pixels of a strip come from. Line l, column k is the pixel at u = u0 + k,
// v = v0 + l + floor((k * advance + phase) / length); -1 if that lies outside the image.
template <int lines, int columns, int advance, int phase, int length>
__device__ __noinline__ void list_strip(int* offsets, int u0, int v0, int us, int vs, int u_step, int v_step) {
    for (int i = threadIdx.x; i < lines * columns; i += blockDim.x) {
        const int l = i / columns, k = i - l * columns;
        constexpr int lift = 4096;  // keeps the dividend positive
        const int drift = advance == 0 ? 0 : (k * advance + phase + lift * length) / length - lift;
        const int u = u0 + k, v = v0 + l + drift;
        offsets[i] = (u32)u < (u32)us && (u32)v < (u32)vs ? u * u_step + v * v_step : -1;
    }
}
template <int bytes> __device__ __forceinline__ void copy_parts(T* to, const T* from, const int* offsets, int pixels, int count) {
    constexpr int each = bytes / (int)sizeof(T);
    const int parts = count / each;
    if (parts == 2 || parts == 4) {
        const int shift = parts == 2 ? 1 : 2;
        const int part = (threadIdx.x & (parts - 1)) * each;
        from += part;
        to += part;
        #pragma unroll 4
        for (int i = threadIdx.x; i < pixels << shift; i += blockDim.x) {
            const int offset = offsets[i >> shift];
            if (offset >= 0) start_copy<bytes>(to + (i >> shift) * CHANNELS, from + offset);
        }
        return;
    }
    for (int i = threadIdx.x; i < pixels * parts; i += blockDim.x) {
        const int pixel = i / parts, part = (i - pixel * parts) * each;
        if (offsets[pixel] >= 0) start_copy<bytes>(to + pixel * CHANNELS + part, from + offsets[pixel] + part);
    }
}
// Start copying a strip; `granule` is the largest copy that all addresses are aligned to, 0 for none.
__device__ __noinline__ void copy_strip(int granule, T* to, const T* from, const int* offsets, int pixels, int count) {
    if (granule == 16) copy_parts<16>(to, from, offsets, pixels, count);
    else if (granule == 8) copy_parts<8>(to, from, offsets, pixels, count);
    else if (granule == 4) copy_parts<4>(to, from, offsets, pixels, count);
    else
        for (int i = threadIdx.x; i < pixels * count; i += blockDim.x) {
            const int pixel = i / count, part = i - pixel * count;
            if (offsets[pixel] >= 0) to[pixel * CHANNELS + part] = from[offsets[pixel] + part];
        }
}
"""


def _channels_last(spec: Spec) -> str:
    weight = spec.kind == "weight"
    so = spec.stride if spec.kind == "adjoint" else 1
    si = 1 if spec.kind == "adjoint" else spec.stride
    length, reach = spec.length, spec.length * spec.block.along
    centre = (spec.kernel_size - 1) // 2
    most = max(len(program.fold) for program in programs(spec))
    pixels = max(strip(spec, program).size for program in programs(spec))
    grads = max(strip(spec, program).groups * (reach | 1) for program in programs(spec)) if weight else 0
    cases = []
    for number, program in enumerate(programs(spec)):
        tile, shape = program.tile, strip(spec, program)
        phase_u, phase_v = program.phase if tile.steep else program.phase[::-1]
        size = ("hi", "wi", "ho", "wo") if tile.steep else ("wi", "hi", "wo", "ho")  # us, vs in and out
        steps = ("wi * C", "C", "wo * C", "C") if tile.steep else ("C", "wi * C", "C", "wo * C")
        low, high = shape.shift
        # Column 0 of the strip lies `left` input pixels before the segment: the drift there counts from that column.
        base_drift = _in_drift(spec, tile, -shape.left)
        in_phase = tile.phase * si - shape.left * tile.advance - base_drift * length
        out = [f"case {number}: {{"]
        out += [
            f"const int us = ({size[2]} - {phase_u} + {so - 1}) / {so}, vs = ({size[3]} - {phase_v} + {so - 1}) / {so};",
            f"const int segments = (us + {reach - 1}) / {reach}, strips = (vs + {high - low + shape.groups - 1}) / {shape.groups};",
            "if (group >= segments * strips) break;",
            f"const int u0 = group % segments * {reach}, l0 = group / segments * {shape.groups} - {high};",
            f"const int line = slot % {shape.groups}, j = slot / {shape.groups};",
            f"int u = u0 + j * {length}, v = l0 + line + j * {tile.advance};",
            # Outputs of this thread: u .. u + length - 1, v + drift.
            f"const int first = {min(v for _, v in tile.outputs)}, last = {max(v for _, v in tile.outputs)};",
            f"const bool active = j < {spec.block.along} && u < us && v + last >= 0 && v + first < vs;",
            f"const int offset = ((line * {si} - {shape.first_line}) * {shape.pitch} + j * {length * si} + {shape.left})"
            " * CHANNELS + lane * V;",
            f"list_strip<{shape.lines}, {shape.pitch}, {tile.advance}, {in_phase}, {length}>(offsets, u0 * {si}"
            f" - {shape.left}, l0 * {si} + {shape.first_line + base_drift}, {size[0]}, {size[1]}, {steps[0]}, {steps[1]});",
        ]
        if weight:
            out.append(
                f"list_strip<{shape.groups}, {reach | 1}, {tile.advance}, {tile.phase}, {length}>(offsets + {pixels},"
                f" u0, l0, min({size[2]}, u0 + {reach}), {size[3]}, {steps[2]}, {steps[3]});"
            )
        out.append("__syncthreads();")
        if weight:
            out += [f"F s{d} = zero();" for d in range(len(program.fold))] + ["F sb = zero();"]
        else:
            for d, taps in enumerate(program.fold):
                identity = " + identity" if centre in taps else ""
                parts = [
                    " + ".join(f"ws[(lane * V + {v}) * K + {t}]" for t in taps) + identity for v in range(spec.vector)
                ]
                out.append(f"const F w{d} = {{{', '.join(parts)}}};")

        def fetch(n: str, buffer: str, shape: Strip = shape) -> list[str]:
            lines = [
                f"copy_strip(granule, strips_at({buffer}), x + (i64)({n}) * hi * wi * C + c0, offsets, {shape.size}, count);"
            ]
            if weight:
                lines.append(
                    f"copy_strip(granule, strips_at({buffer}) + {pixels} * CHANNELS, g + (i64)({n}) * ho * wo * C + c0,"
                    f" offsets + {pixels}, {shape.groups * (reach | 1)}, count);"
                )
            return [*lines, "end_group();"]

        out += fetch("n0", "0")
        out += ["#pragma unroll 1", "for (int n = n0; n < n1; ++n) {", "const int now = (n - n0) & 1;"]
        # One barrier: the strip of this image has arrived, and nobody reads that of the image before any more.
        out += ["arrived<0>();", "__syncthreads();", "if (n + 1 < n1) {", *fetch("n + 1", "now ^ 1"), "}"]
        out += ["if (active) {", "const T* const pixel = strips_at(now) + offset;"]
        if weight:
            out.append(
                f"const T* const gs = strips_at(now) + ({pixels} + line * {reach | 1} + j * {length}) * CHANNELS + lane * V;"
            )
            out += [f"const F g{i} = load(gs + {i} * CHANNELS); add(sb, g{i});" for i in range(length)]
            use = "fma(s{d}, g{i}, v);"
        else:
            out += [f"F a{i} = start;" for i in range(length)]
            use = "fma(a{i}, w{d}, v);"
        for pu, pv, pairs in tile.pixels:
            at = (pv - _in_drift(spec, tile, pu)) * shape.pitch + pu
            uses = " ".join(use.replace("v)", "p)").format(i=i, d=d) for i, d in pairs)
            out.append(f"{{ const F p = load(pixel + {at} * CHANNELS); {uses} }}")
        if not weight:
            out += [
                'asm volatile("" : "+r"(u), "+r"(v));',
                f"T* const yb = y + (i64)n * ho * wo * C + ((i64)(v * {so} + {phase_v}) * ({steps[3]})"
                f" + (i64)(u * {so} + {phase_u}) * ({steps[2]})) + c;",
                f"const int du = {so} * ({steps[2]}), dv = {so} * ({steps[3]});",
            ]
            for i, (_, across) in enumerate(tile.outputs):
                out.append(
                    f"if (u + {i} < us && (u32)(v + {across}) < (u32)vs) store(yb + {i} * du + {across} * dv, a{i});"
                )
        out += ["}", "}"]
        if weight:
            names = [f"s{d}" for d in range(len(program.fold))] + ["sb"]
            for first in range(0, len(names), 8):
                part = names[first : first + 8]
                out.append("__syncthreads();")
                out += [
                    f"if (slot < {spec.block.tiles}) write(red + ({j} * {spec.block.tiles} + slot) * count + lane * V, {name});"
                    for j, name in enumerate(part)
                ]
                out.append("__syncthreads();")
                out.append(
                    f"for (int i = threadIdx.x; i < {len(part)} * count; i += blockDim.x) {{"
                    " const int j = i / count, ch = i - j * count; float total = 0.f;"
                    f" for (int s = 0; s < {spec.block.tiles}; ++s) total += red[(j * {spec.block.tiles} + s) * count + ch];"
                    f" const int d = {first} + j;"
                    f" partial[((i64)part * C + c0 + ch) * {most + 1} + (d == {len(program.fold)} ? {most} : d)] = total; }}"
                )
        out.append("break; }")
        cases.append("\n".join(out))
    body = "\n".join(cases)
    if weight:
        head, tail = "const T* __restrict__ x, const T* __restrict__ g, float* __restrict__ partial,", ""
        setup = "const int part = when.z;\n    float* const red = (float*)memory;"
    else:
        head = gather_arguments(spec.wide)
        tail = ", i64 reverse, i64 identity_"
        second = "start.y = to_float(bias[c + 1]);" if spec.vector == 2 else ""
        setup = f"""const float identity = (float)identity_;
    float* const ws = (float*)(offsets + {pixels});
    for (int i = threadIdx.x; i < count * K; i += blockDim.x) {{
        const int channel = i / K, tap = i - channel * K;
        ws[channel * K + (reverse ? K - 1 - tap : tap)] = to_float(w[(i64)c0 * K + i]);
    }}
    F start = zero();
    if (bias) {{ start.x = to_float(bias[c]); {second} }}"""
    return f"""
#define CHANNELS {spec.block.channels}
{_COPY}
extern "C" __global__ void __launch_bounds__({spec.block.tiles * spec.block.channels // spec.vector}, {spec.block.resident}) oriented_{spec.kind}(
    {head}
    const int* __restrict__ first, const int4* __restrict__ work, i64 C_, i64 hi_, i64 wi_, i64 ho_, i64 wo_,
    i64 granule_{tail})
{{
    extern __shared__ __align__(16) unsigned char memory[];
    {_SEGMENTS}
    const int granule = (int)granule_;
    const int lanes = count / V, lane = threadIdx.x % lanes, slot = threadIdx.x / lanes;
    const int c = c0 + lane * V;
    int* const offsets = (int*)(memory + {2 * (pixels + grads)} * CHANNELS * sizeof(T));
    #define strips_at(i) ((T*)memory + (i) * {(pixels + grads)} * CHANNELS)
    for (int i = threadIdx.x; i < {2 * (pixels + grads)} * CHANNELS * (int)sizeof(T) / 4; i += blockDim.x) ((int*)memory)[i] = 0;
    {setup}
    __syncthreads();
    switch (program) {{
{body}
    }}
    __syncthreads();
    }}
}}
{reduce(spec, 4, "row[3]") if weight else ""}
"""


def reduce(spec: Spec, columns: int = 3, parts: str = "parts") -> str:
    """Second stage of the weight gradient: sum the blocks' parts in a fixed order and hand each sum to its taps.

    ``columns`` is the width of the table, and ``parts`` an expression of the number of parts that a row's channels have.
    """
    most = max(len(program.fold) for program in programs(spec))
    folds = []
    for program in programs(spec):
        of_tap = {t: d for d, taps in enumerate(program.fold) for t in taps}
        folds.append("{" + ", ".join(str(of_tap[t]) for t in range(spec.kernel_size)) + f", {most}}}")
    return f"""
__constant__ unsigned char fold[{len(folds)}][{spec.kernel_size + 1}] = {{ {", ".join(folds)} }};
extern "C" __global__ void oriented_reduce(
    const float* __restrict__ partial, T* __restrict__ gw, T* __restrict__ gb, const int* __restrict__ table,
    i64 C, i64 parts)
{{
    const int* const row = table + {columns} * blockIdx.x;
    const int program = row[0], c0 = row[1], count = row[2], all = (int)({parts});
    if (all < 0) return;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < count * (K + 1); i += gridDim.y * blockDim.x) {{
        const int c = c0 + i / (K + 1), t = i % (K + 1);
        const float* p = partial + (i64)c * {most + 1} + fold[program][t];
        float total = 0.f;
        #pragma unroll 8
        for (int s = 0; s < all; ++s) total += p[(i64)s * C * {most + 1}];
        if (t < K) gw[(i64)c * K + t] = from_float(total);
        else if (gb) gb[c] = from_float(total);
    }}
}}
"""


# contiguous (NCHW), and small images in channels_last -----------------------------------------------------------------
# A block owns a region of the planes of a few channels. In shared memory every plane is a frame of lines that follow the
# kernel's direction: there all taps of all outputs of a line lie in that line and the few next to it, at constant
# offsets. While one image is worked on, the next is on its way (cp.async).


@dataclasses.dataclass(frozen=True)
class Frame:
    """Shared memory of one plane of a program, in numbers.

    The pixel ``(u, v)`` of a region lies in line ``(v - drift(u)) % lines``, at ``u``: lines that leave the region on
    one side go on with the pixels that enter it on the other. As many lines as the taps reach across lie free between
    the two, so that nothing is mistaken for a neighbour.
    """

    pixels: tuple[tuple[int, int, Uses], ...]  # (line, u, uses) of a tile
    lines: int  # of outputs
    lanes: int  # threads for them; some may have nothing to do
    pairs: bool  # whether numbers are taken two at a time
    left: int  # zeros before the first number of a line, which also end the line before
    pitch: int
    size: int
    out_left: int
    out_pitch: int
    out_size: int
    tiles: int
    reach: tuple[int, int]  # rows and columns that the taps reach beyond a region


def frame(spec: Spec, program: Program) -> Frame:
    tile, m, length = program.tile, spec.block.region, program.tile.length
    s = 1 if spec.kind == "adjoint" else spec.stride
    along = -(-m // length)
    reach_y = max((abs(dy) for dy, _ in program.taps), default=0)
    reach_x = max((abs(dx) for _, dx in program.taps), default=0)
    reach_u, reach_v = (reach_y, reach_x) if tile.steep else (reach_x, reach_y)
    pixels = [(v - _in_drift(spec, tile, u), u, uses) for u, v, uses in tile.pixels]
    if spec.block.whole:  # pixels beside the image are zeros to every tile
        pixels = [p for p in pixels if -(along - 1) * length * s <= p[1] < m * s]
    us = [u for _, u, _ in pixels] or [0]
    beside = max((abs(line) for line, _, _ in pixels), default=0)
    left = max(0, -min(us))
    right = max(0, max(us) + (along - 1) * length * s - (m * s - 1))
    if spec.block.whole:
        drifts = [_in_drift(spec, tile, u) for u in range(m * s)]
        lines = m + -(-min(reach_v, max(drifts) - min(drifts) + beside) // s)
        left += left % 2
        least = m * s + max(left, right)
    else:
        lines = m - (-2 * reach_v // s)
        left = max(left, reach_u)
        left += left % 2
        least = left + m * s + max(right, reach_u)
    pairs = along == 1 or (beside == 0 and length % 2 == 0)
    # Warps that do not cross from one tile of a line to the next meet in fewer banks.
    lanes = -(-lines // 32) * 32 if not pairs and -(-lines // 32) * 32 * along <= 256 else lines
    pitch = _pitch(tile, m * s, tile.phase * s, lines * s, least, pairs)
    size = lines * s * pitch
    if spec.channels_last:  # neighbouring channels four banks apart
        size += (4 - size) % 32
    out = (left, pitch, size) if s == 1 else (0, m + 2 + m % 2, lines * (m + 2 + m % 2))
    return Frame(
        tuple(sorted(pixels, key=lambda p: p[:2])), lines, lanes, pairs, left, pitch, size, *out, lanes * along,
        (reach_y, reach_x),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _pitch(tile: Tile, side: int, phase: int, lines: int, least: int, pairs: bool) -> int:
    """The pitch, ``least`` or a little more, with which neighbouring pixels of an image meet in few banks.

    Numbers at the same place of neighbouring lines lie in different banks if it is odd, and pairs of them if it is two
    more than a multiple of four.
    """
    y, x = np.divmod(np.arange(16 * 32), side)
    u, v = (y, x) if tile.steep else (x, y)
    line = (v - (u * tile.advance + phase) // tile.length) % lines
    best, fewest = least, None
    step, first = (4, least + (2 - least) % 4) if pairs else (2, least + 1 - least % 2)
    for pitch in range(first, first + 4 * step, step):
        banks = ((line * pitch + u) % 32).reshape(16, 32)
        waves = sum(int(np.bincount(row).max()) for row in banks)
        if fewest is None or waves < fewest:
            best, fewest = pitch, waves
    return best


def listed(spec: Spec) -> bool:
    """Whether the places of an image's numbers in shared memory are listed by ``places``."""
    return spec.block.whole and spec.stride == 1


def places(spec: Spec, height: int, width: int) -> np.ndarray:
    """Where the numbers of an image lie in the frames of each program, in bytes: uint16.

    For each program the numbers of all planes of a block, in the order of memory (one plane in channels_last).
    """
    parts = []
    for number, program in zip(planar_layout(spec)[0], programs(spec), strict=True):
        f, tile = frame(spec, program), program.tile
        y, x = np.divmod(np.arange(height * width), width)
        u, v = (y, x) if tile.steep else (x, y)
        at = f.left + (v - (u * tile.advance + tile.phase) // tile.length) % f.lines * f.pitch + u
        planes = 1 if spec.channels_last else number
        parts.append((4 * (np.arange(planes)[:, None] * f.size + at)).ravel())
        assert 4 * (f.left + number * f.size) < 2**16
    return np.concatenate(parts).astype(np.uint16)


@functools.lru_cache(maxsize=256)
def planar_layout(spec: Spec) -> tuple[tuple[int, ...], int, int]:
    """Planes of a block for each program, threads of a block, bytes of shared memory."""
    frames = [frame(spec, program) for program in programs(spec)]
    if spec.channels_last:
        numbers = [max(8, 256 // f.tiles // 8 * 8) for f in frames]
    else:
        # Eight warps, two for each scheduler of a processor, as long as their frames leave place for two blocks.
        many = spec.block.region == 28 and spec.kernel_size > 15 and spec.kind != "weight"
        target = 256 if spec.block.region > 28 or many else 128
        numbers = [max(1, min(target // f.tiles, 16000 // f.size)) for f in frames]
    threads = -(-max(number * f.tiles for number, f in zip(numbers, frames, strict=True)) // 32) * 32
    floats = max(_floats(spec, f, number) for number, f in zip(numbers, frames, strict=True))
    if spec.kind == "weight":
        floats = max(floats, 8 * threads)
    return tuple(numbers), threads, 4 * floats


def _sizes(f: Frame, number: int) -> tuple[int, int]:
    """Numbers of a block's frames of the input and of the outputs (or their gradients): multiples of four."""
    return -(-(f.left + number * f.size) // 4) * 4, -(-(f.out_left + number * f.out_size) // 4) * 4


def _floats(spec: Spec, f: Frame, number: int) -> int:
    inputs, outputs = _sizes(f, number)
    return spec.block.stages * inputs + (spec.block.stages if spec.kind == "weight" else 1) * outputs


def costs(spec: Spec) -> list[float]:
    """For each program, roughly the instructions of a block for one image and one region; strips are all alike."""
    if not spec.block.region:
        return [1.0] * len(programs(spec))
    numbers, threads, _ = planar_layout(spec)
    result = []
    for number, program in zip(numbers, programs(spec), strict=True):
        f = frame(spec, program)
        uses = sum(len(uses) for _, _, uses in f.pixels) + 0.6 * len(f.pixels)
        moves = 8 * number * spec.block.region**2 / threads + 40
        result.append(-(-number * f.tiles // 32) * uses + threads // 32 * moves)
    return result


_PLANES = r"""
extern __shared__ __align__(16) float smem[];
// Addresses are those of shared memory, in bytes. The plain road of 16 bits, and of old processors, counts from smem.
__device__ __forceinline__ u32 start() { return sizeof(T) == 4 ? shared(smem) : 0u; }
__device__ __forceinline__ float& at(u32 address) { return *(float*)((char*)smem + (address - start())); }
// Bring a number; it is there after `arrived()`.
__device__ __forceinline__ void bring(u32 to, const T* from, bool there = true) {
#if __CUDA_ARCH__ >= 800
    if (sizeof(T) == 4) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], 4; }"
            :: "r"(to), "l"(from), "r"((int)there) : "memory");
        return;
    }
#endif
    if (there) at(to) = to_float(__ldg(from));
}
// Take a number away. (It is loaded in any case: else its register would have to keep what it held before.)
__device__ __forceinline__ void take(T* to, u32 from, bool there = true) {
    if (sizeof(T) == 4)
        asm volatile("{ .reg .pred p; .reg .f32 v; setp.ne.b32 p, %2, 0; ld.shared.f32 v, [%1]; @p st.global.f32 [%0], v; }"
            :: "l"(to), "r"(from), "r"((int)there) : "memory");
    else if (there) *to = from_float(at(from));
}
// The numbers of an image that a thread brings and takes away: where they lie in memory and in shared memory.
template <int numbers> struct Places {
    u32 pairs[(numbers + 1) / 2];
    int mine, offset, hop;
    // `planes` channels lie behind each other: thread t has the numbers t, t + threads ...
    __device__ __forceinline__ void behind(const u16* list, int threads, int all) {
        offset = threadIdx.x; hop = threads;
        read(list, threadIdx.x, threads, all, 0);
    }
    // `count` channels lie next to each other: a thread keeps to one of them.
    __device__ __forceinline__ void beside(const u16* list, int threads, int pixels, int count, int C, u32 plane) {
        const int channel = threadIdx.x % count, pixel = threadIdx.x / count, stride = threads / count;
        offset = pixel * C + channel; hop = stride * C;
        read(list, pixel, stride, pixel < stride ? pixels : 0, channel * plane);
    }
    __device__ __forceinline__ void read(const u16* list, int first, int stride, int all, u32 more) {
        mine = first < all ? (all - first - 1) / stride + 1 : 0;
        #pragma unroll
        for (int k = 0; k < (numbers + 1) / 2; ++k)
            pairs[k] = (2 * k < mine ? list[first + 2 * k * stride] + more : 0)
                | (2 * k + 1 < mine ? list[first + (2 * k + 1) * stride] + more : 0) << 16;
    }
    __device__ __forceinline__ u32 place(int k) const {  // not worked out ahead, for want of registers
        u32 half; asm volatile("prmt.b32 %0, %1, 0, %2;" : "=r"(half) : "r"(pairs[k / 2]), "r"(k % 2 ? 0x4432 : 0x4410)); return half;
    }
    __device__ __forceinline__ void fill(u32 frame, const T* __restrict__ from, bool come) const {
        const int coming = come ? mine : 0;
        #pragma unroll
        for (int k = 0; k < numbers; ++k) bring(frame + place(k), from + offset + k * hop, k < coming);
    }
    __device__ __forceinline__ void drain(T* __restrict__ to, u32 frame) const {
        #pragma unroll
        for (int k = 0; k < numbers; ++k) take(to + offset + k * hop, frame + place(k), k < mine);
    }
};
// Numbers of 16 bits, which have to be converted, wait in registers, two in each.
template <int numbers> struct Batch {
    u32 pairs[(numbers + 1) / 2];
    __device__ __forceinline__ void fetch(const Places<numbers>& places, const T* __restrict__ from) {
        from += places.offset;
        #pragma unroll
        for (int k = 0; k < numbers; k += 2) {
            const u32 low = k < places.mine ? (u32)__ldg(from + k * places.hop) : 0u;
            const u32 high = k + 1 < places.mine ? (u32)__ldg(from + (k + 1) * places.hop) : 0u;
            pairs[k / 2] = low | high << 16;
        }
    }
    __device__ __forceinline__ void put(const Places<numbers>& places, u32 frame) const {
        #pragma unroll
        for (int k = 0; k < numbers; ++k)
            if (k < places.mine) at(frame + places.place(k)) = to_float((T)(pairs[k / 2] >> k % 2 * 16));
    }
};
// Where the pixel (y, x) of a region lies in a frame.
template <bool steep, int advance, int phase, int length, int lines, int pitch>
__device__ __forceinline__ int place(int y, int x) {
    constexpr int lift = 4096;  // keeps the dividends positive
    const int u = steep ? y : x, v = steep ? x : y;
    const int drift = advance == 0 ? 0 : (int)((u32)(u * advance + phase + lift * length) / length) - lift;
    return (int)((u32)(v - drift + 64 * lines) % lines) * pitch + u;
}
// Every pixel of a part of an image, `lanes` columns at a time.
template <int threads, int lanes, class Act>
__device__ __forceinline__ void walk(int planes, int rows, int cols, const Act& act) {
    for (int p = 0; p < planes; ++p)
        for (int x = threadIdx.x % lanes; x < cols; x += lanes)
            #pragma unroll 4
            for (int y = threadIdx.x / lanes; y < rows; y += threads / lanes) act(p, y, x);
}
"""


def _pairs(numbers: list[int]) -> list[tuple[int, bool]]:
    """Ascending numbers, taken two at a time where an even one and the next are among them."""
    there, result = set(numbers), []
    for u in numbers:
        if u % 2 == 0 and u + 1 in there:
            result.append((u, True))
        elif u % 2 == 0 or u - 1 not in there:
            result.append((u, False))
    return result


def _planar(spec: Spec) -> str:
    numbers, threads, shared = planar_layout(spec)
    weight = spec.kind == "weight"
    so = spec.stride if spec.kind == "adjoint" else 1
    si = 1 if spec.kind == "adjoint" else spec.stride
    m, stages = spec.block.region, spec.block.stages
    centre = (spec.kernel_size - 1) // 2
    most = max(len(program.fold) for program in programs(spec))
    cases = []
    for index, program in enumerate(programs(spec)):
        f, tile, (a, b), number = frame(spec, program), program.tile, program.phase, numbers[index]
        length = tile.length
        # Shared memory: frames of the input, one for each stage; then one of the outputs, or one of gradients each.
        in_size, out_size = _sizes(f, number)
        outputs = stages * in_size
        zeros = outputs + stages * out_size if weight else outputs
        rows = sorted({line for line, _, _ in f.pixels}) or [0]
        out = [f"case {index}: {{"]
        out += [
            f"const int oh = (ho - {a} + {so - 1}) / {so}, ow = (wo - {b} + {so - 1}) / {so};",
            "if (ry >= oh || rx >= ow) break;",
            f"const int tile = threadIdx.x % {f.tiles}, plane = threadIdx.x / {f.tiles};",
            f"const int line = tile % {f.lanes}, start = tile / {f.lanes} * {length};",
            # Only the places of pixels are ever written again.
            f"for (int i = threadIdx.x; i < {zeros // 4}; i += {threads})"
            " ((float4*)smem)[i] = make_float4(0.f, 0.f, 0.f, 0.f);",
            f"const int mine = {outputs + f.out_left} + plane * {f.out_size} + line * {f.out_pitch} + start;",
        ]
        for i, row in enumerate(rows):
            shift = row % (f.lines * si)
            out.append(
                f"const int at{i} = {f.left} + plane * {f.size} + (line * {si} + {shift}) % {f.lines * si} * {f.pitch}"
                f" + start * {si};"
            )
        # How an image comes to shared memory, and what is begun once it is there.
        fill: list[str] = []
        after: list[str] = []
        if listed(spec):
            each = -(-m * m // (threads // number)) if spec.channels_last else -(-number * m * m // threads)
            out.append(f"Places<{each}> places;")
            if spec.channels_last:
                out.append(f"places.beside(list + {index} * hi * wi, {threads}, hi * wi, count, C, {4 * f.size});")
                corner = "c0"
            else:
                out.append(f"places.behind(list + {sum(numbers[:index])} * hi * wi, {threads}, count * hi * wi);")
                corner = "(i64)c0 * hi * wi"
            tensors = [("x", f"x + (i64)NEXT * C * hi * wi + {corner}", "address", in_size)]
            if weight:
                there = f"address + {4 * outputs}"
                tensors.append(("g", f"g + (i64)NEXT * C * ho * wo + {corner}", there, out_size))
            for name, origin, frames, size in tensors:
                if stages > 1:
                    fill.append(f"places.fill({frames} + in * {4 * size}, {origin.replace('NEXT', 'next')}, come);")
                else:
                    out += [f"Batch<{each}> {name}_; {name}_.fetch(places, {origin.replace('NEXT', 'n0')});"]
                    fill.append(f"{name}_.put(places, {frames});")
                    after.append(f"if (n + 1 < n1) {name}_.fetch(places, {origin.replace('NEXT', '(n + 1)')});")
            drain = f"places.drain(y + (i64)n * C * ho * wo + {corner}, address + {4 * outputs});"
        else:
            reach_y, reach_x = (0, 0) if spec.block.whole else f.reach
            lanes = next(size for size in (8, 16, 32) if size >= m * si or size == 32)
            steep = "true" if tile.steep else "false"
            in_place = f"place<{steep}, {tile.advance}, {tile.phase * si}, {length}, {f.lines * si}, {f.pitch}>"
            out_place = f"place<{steep}, {tile.advance}, {tile.phase}, {length}, {f.lines}, {f.out_pitch}>"
            out += [
                f"const int top = max(0, ry * {si} - {reach_y}), left = max(0, rx * {si} - {reach_x});",
                f"const int rows_in = min(hi, (ry + {m}) * {si} + {reach_y}) - top;",
                f"const int cols_in = min(wi, (rx + {m}) * {si} + {reach_x}) - left;",
                f"const int rows_out = min({m}, oh - ry), cols_out = min({m}, ow - rx);",
            ]
            fill = [
                "if (come) { const T* const from = x + (((i64)next * C + c0) * hi + top) * wi + left;",
                f"const u32 frame = address + 4 * (in * {in_size} + {f.left});",
                f"walk<{threads}, {lanes}>(count, rows_in, cols_in, [&](int p, int y, int x) {{",
                f"bring(frame + 4 * (p * {f.size} + {in_place}(y + top - ry * {si}, x + left - rx * {si})),",
                "from + (p * hi + y) * wi + x); }); }",
            ]
            out_at = f"frame + 4 * (p * {f.out_size} + {out_place}(y, x))"
            if weight:
                fill += [
                    "if (come) { const T* const from = g + (((i64)next * C + c0) * ho + ry) * wo + rx;",
                    f"const u32 frame = address + 4 * ({outputs + f.out_left} + in * {out_size});",
                    f"walk<{threads}, {lanes}>(count, rows_out, cols_out, [&](int p, int y, int x) {{",
                    f"bring({out_at}, from + (p * ho + y) * wo + x); }}); }}",
                ]
            drain = (
                f"{{ T* const to = y + (((i64)n * C + c0) * ho + ry * {so} + {a}) * wo + rx * {so} + {b};"
                f" const u32 frame = address + {4 * (outputs + f.out_left)};"
                f" walk<{threads}, {lanes}>(count, rows_out, cols_out, [&](int p, int y, int x) {{"
                f" take(to + (p * ho + y * {so}) * wo + x * {so}, {out_at}); }}); }}"
            )
        if weight:
            out += [f"float s{d} = 0.f;" for d in range(len(program.fold))] + ["float sb = 0.f;"]
        else:
            out.append("const int c = c0 + min(plane, count - 1); int step = reverse ? -1 : 1;")
            # Hidden from the compiler, which would keep the offsets of all taps from one segment to the next.
            out.append(
                f'asm volatile("" : "+r"(step)); const {parameter(spec.wide)}* const wc = w + (i64)c * K'
                " + (reverse ? K - 1 : 0);"
            )
            for d, taps in enumerate(program.fold):
                total = " + ".join(f"to_float(wc[{t} * step])" for t in taps)
                out.append(f"const float w{d} = {total}{' + identity' if centre in taps else ''};")
            out.append("const float first_sum = bias ? to_float(bias[c]) : 0.f;")
        ahead = stages - 1
        out += ["int in = 0;", "#pragma unroll 1", f"for (int n = n0 - {ahead}; n < n1; ++n) {{"]
        if stages > 1:
            out.append(f"arrived<{stages - 2}>();")
        out += ["__syncthreads();", f"const int next = n + {ahead};", "const bool come = next < n1;"]
        out += [*fill, "end_group();", f"in = in == {ahead} ? 0 : in + 1;"]
        if stages > 1:
            out.append("if (n < n0) continue;")
        else:
            out += ["arrived<0>();", "__syncthreads();", *after]
        out += [f"if (plane < count && line < {f.lines}) {{", f"const float* const frame = smem + in * {in_size};"]
        out.append(f"float* const other = smem + mine{f' + in * {out_size}' if weight else ''};")
        pairs = _pairs if f.pairs else lambda numbers: [(u, False) for u in numbers]
        if weight:
            for i, double in pairs(list(range(length))):
                if double:
                    out.append(f"const float2 g{i}_ = *(const float2*)(other + {i});")
                    out.append(f"const float g{i} = g{i}_.x, g{i + 1} = g{i}_.y;")
                else:
                    out.append(f"const float g{i} = other[{i}];")
            out += [f"sb += g{i};" for i in range(length)]
            use = "s{d} = fmaf(g{i}, {v}, s{d});"
        else:
            out += [f"float a{i} = first_sum;" for i in range(length)]
            use = "a{i} = fmaf(w{d}, {v}, a{i});"
        for r, row in enumerate(rows):
            uses = {u: pairs for line, u, pairs in f.pixels if line == row}
            for u, double in pairs(sorted(uses)):
                one = " ".join(use.format(i=i, d=d, v="v.x" if double else "v") for i, d in uses[u])
                if double:
                    two = " ".join(use.format(i=i, d=d, v="v.y") for i, d in uses[u + 1])
                    out.append(f"{{ const float2 v = *(const float2*)(frame + at{r} + {u}); {one} {two} }}")
                else:
                    out.append(f"{{ const float v = frame[at{r} + {u}]; {one} }}")
        if not weight:
            for i, double in pairs(list(range(length))):
                if double:
                    out.append(f"*(float2*)(other + {i}) = make_float2(a{i}, a{i + 1});")
                else:
                    out.append(f"other[{i}] = a{i};")
        out.append("}")
        if not weight:
            out += ["__syncthreads();", drain]
        out.append("}")
        if weight:
            names = [f"s{d}" for d in range(len(program.fold))] + ["sb"]
            each = shared // 4 // threads
            lanes = next(size for size in (32, 16, 8, 4) if f.tiles >= 8 * size or size == 4)
            for first in range(0, len(names), each):
                part = names[first : first + each]
                out.append("__syncthreads();")
                out += [f"smem[{j * threads} + threadIdx.x] = {name};" for j, name in enumerate(part)]
                out.append("__syncthreads();")
                out.append(
                    f"for (int base = 0; base < {len(part)} * count; base += {threads // lanes}) {{"
                    f" const int i = base + threadIdx.x / {lanes}, j = i / count, ch = i % count; float total = 0.f;"
                    f" if (j < {len(part)}) for (int k = threadIdx.x % {lanes}; k < {f.tiles}; k += {lanes})"
                    f" total += smem[j * {threads} + ch * {f.tiles} + k];"
                    f" for (int k = {lanes // 2}; k; k /= 2) total += __shfl_down_sync(0xffffffffu, total, k, {lanes});"
                    f" const int d = {first} + j;"
                    f" if (j < {len(part)} && threadIdx.x % {lanes} == 0) partial[((i64)part * C + c0 + ch) * {most + 1}"
                    f" + (d == {len(program.fold)} ? {most} : d)] = total; }}"
                )
        out.append("break; }")
        cases.append("\n".join(out))
    body = "\n".join(cases)
    if weight:
        head, tail = "const T* __restrict__ x, const T* __restrict__ g, float* __restrict__ partial,", ""
        setup = "const int part = when.z;"
    else:
        head = gather_arguments(spec.wide)
        tail = ", i64 reverse, i64 identity_"
        setup = "const float identity = (float)identity_;"
    return f"""
{_PLANES}
extern "C" __global__ void __launch_bounds__({threads}, {spec.block.resident}) oriented_{spec.kind}(
    {head}
    const int* __restrict__ first, const int4* __restrict__ work, i64 C_, i64 hi_, i64 wi_, i64 ho_, i64 wo_,
    const u16* __restrict__ list{tail})
{{
    const u32 address = start();
    {_SEGMENTS}
    const int regions_x = ((wo + {so - 1}) / {so} + {m - 1}) / {m};
    const int ry = group / regions_x * {m}, rx = group % regions_x * {m};
    {setup}
    switch (program) {{
{body}
    }}
    __syncthreads();
    }}
}}
{reduce(spec, 4, "row[3]") if weight else ""}
"""
