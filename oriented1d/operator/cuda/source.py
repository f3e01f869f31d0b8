"""CUDA C++ of the operator, written for the taps of one layer's angles.

Every angle becomes a *program*: a tile of outputs (``tiles.py``) whose pixels, taps and sums are spelled out, so that all
offsets are constants and all sums stay in registers. A kernel holds the programs of all angles of a layer; each block
reads from a table which program it runs and on which channels.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from oriented1d import geometry
from oriented1d.operator.cuda.tiles import Tile, Uses, make_tile


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a block of threads works on.

    Attributes:
        tiles: its tiles (channels_last).
        along: how many of them follow each other along a line (channels_last).
        channels: its channels at most (channels_last).
        region: side of its square of outputs (contiguous).
        whole: no image is larger than a region (contiguous).
        resident: blocks that a processor has registers for.
    """

    tiles: int = 0
    along: int = 0
    channels: int = 0
    region: int = 0
    whole: bool = True
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

    @property
    def text(self) -> str:
        """The CUDA C++."""
        return source(self)

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of its kernels."""
        return ("run", "reduce") if self.kind == "weight" else ("run",)


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
        offsets = geometry.kernel_taps(angle, spec.kernel_size)
        s = spec.stride
        for phase in np.ndindex(s, s) if spec.kind == "adjoint" else [(0, 0)]:
            classes: dict[tuple[int, int], list[int]] = {}
            for t, (dy, dx) in enumerate(offsets.tolist()):
                if spec.kind != "adjoint":
                    classes.setdefault((dy, dx), []).append(t)
                elif (phase[0] - dy) % s == 0 and (phase[1] - dx) % s == 0:
                    classes.setdefault(((phase[0] - dy) // s, (phase[1] - dx) // s), []).append(t)
            taps = np.array(list(classes), dtype=np.int32).reshape(-1, 2)
            tile = make_tile(angle, taps, 1 if spec.kind == "adjoint" else s, spec.length)
            result.append(Program(phase, tile, tuple(classes), tuple(map(tuple, classes.values()))))
    return tuple(result)


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


def source(spec: Spec) -> str:
    parts = [_PRELUDE, _TYPES[spec.dtype], f"#define K {spec.kernel_size}\n"]
    if spec.channels_last:
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


def strips(spec: Spec, program: Program, height: int, width: int) -> int:
    """Number of strips that cover outputs of ``height`` x ``width``."""
    shape, reach = strip(spec, program), spec.length * spec.block.along
    us, vs = (height, width) if program.tile.steep else (width, height)
    return -(-us // reach) * -(-(vs + shape.shift[1] - shape.shift[0]) // shape.groups)


def strip_bytes(spec: Spec) -> int:
    """Shared memory of a block."""
    size = 2 if spec.dtype != "float" else 4
    pixels = 0
    for program in programs(spec):
        shape = strip(spec, program)
        grads = shape.groups * ((spec.length * spec.block.along) | 1) if spec.kind == "weight" else 0
        pixels = max(pixels, shape.size + grads)
    extra = 4 * spec.block.channels * spec.kernel_size if spec.kind != "weight" else 0
    return max(
        2 * pixels * spec.block.channels * size + 4 * pixels + extra, 8 * 4 * spec.block.tiles * spec.block.channels
    )


_COPY = r"""
// Start copying `bytes` (4, 8 or 16) to shared memory; it has arrived after the next `arrived()` of its group.
template <int bytes> __device__ __forceinline__ void start_copy(T* to, const T* from) {
#if __CUDA_ARCH__ >= 800
    const u32 address = (u32)__cvta_generic_to_shared(to);
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
        setup = (
            "const int part = blockIdx.y * groups + group;\n"
            "    float* const red = (float*)memory;\n"
            # Blocks without work leave zeros to the second stage.
            f"    for (int i = threadIdx.x; i < count * {most + 1}; i += blockDim.x)\n"
            f"        partial[((i64)part * C + c0 + i / {most + 1}) * {most + 1} + i % {most + 1}] = 0.f;"
        )
    else:
        head = "const T* __restrict__ x, T* __restrict__ y, const T* __restrict__ w, const T* __restrict__ bias,"
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
extern "C" __global__ void __launch_bounds__({spec.block.tiles * spec.block.channels // spec.vector}, {spec.block.resident}) run(
    {head}
    const int* __restrict__ table, i64 rows, i64 per, i64 N_, i64 C_, i64 hi_, i64 wi_, i64 ho_, i64 wo_, i64 images,
    i64 granule_{tail})
{{
    extern __shared__ __align__(16) unsigned char memory[];
    const int C = (int)C_, hi = (int)hi_, wi = (int)wi_, ho = (int)ho_, wo = (int)wo_, granule = (int)granule_;
    // Blocks that run at the same time should share their code, and the lines of memory that they read parts of.
    const int groups = gridDim.x / (u32)rows, block = blockIdx.x / (u32)(per * groups), rest = blockIdx.x % (u32)(per * groups);
    const int entry = block * (int)per + rest % (u32)per, group = rest / (u32)per;
    const int program = table[3 * entry], c0 = table[3 * entry + 1], count = table[3 * entry + 2];
    if (count == 0) return;
    const int lanes = count / V, lane = threadIdx.x % lanes, slot = threadIdx.x / lanes;
    const int c = c0 + lane * V;
    const int n0 = blockIdx.y * (int)images, n1 = min(n0 + (int)images, (int)N_);
    int* const offsets = (int*)(memory + {2 * (pixels + grads)} * CHANNELS * sizeof(T));
    #define strips_at(i) ((T*)memory + (i) * {(pixels + grads)} * CHANNELS)
    for (int i = threadIdx.x; i < {2 * (pixels + grads)} * CHANNELS * (int)sizeof(T) / 4; i += blockDim.x) ((int*)memory)[i] = 0;
    {setup}
    __syncthreads();
    switch (program) {{
{body}
    }}
}}
{reduce(spec) if weight else ""}
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
extern "C" __global__ void reduce(
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


# contiguous (NCHW) ---------------------------------------------------------------------------------------------------
# A block owns a region of the planes of a few neighbouring channels. The input lies in shared memory as float, with a
# margin of zeros. While one image is worked on, the numbers of the next are on their way to registers.


@dataclasses.dataclass(frozen=True)
class Plane:
    """Shared memory of one plane of a program, in numbers."""

    outputs: tuple[tuple[int, int], ...]  # (y, x) of the tile
    pixels: tuple[tuple[int, int, Uses], ...]  # (y, x, uses)
    across: tuple[int, int]  # origins of tiles across: from the first to before the last
    top: int  # row of the input's first row, relative to the region's first pixel
    left: int  # zeros before a row, which also end the row before
    pitch: int
    size: int
    out_top: int
    out_left: int
    out_pitch: int
    out_size: int
    tiles: int
    halo: tuple[int, int]  # rows and columns that the taps reach beyond a region


def plane(spec: Spec, program: Program) -> Plane:
    tile, m, length = program.tile, spec.block.region, spec.length
    s = 1 if spec.kind == "adjoint" else spec.stride
    outputs = tuple((u, v) if tile.steep else (v, u) for u, v in tile.outputs)
    pixels = tuple(sorted((u, v, uses) if tile.steep else (v, u, uses) for u, v, uses in tile.pixels))
    drifts = [v for _, v in tile.outputs]
    across = (-max(drifts), m - min(drifts))
    ys = [y for y, _, _ in pixels] or [0]
    xs = [x for _, x, _ in pixels] or [0]
    y_range = (0, m - length) if tile.steep else (across[0], across[1] - 1)
    x_range = (across[0], across[1] - 1) if tile.steep else (0, m - length)
    halo_y = max(abs(dy) for dy, _ in program.taps) if len(program.taps) else 0
    halo_x = max(abs(dx) for _, dx in program.taps) if len(program.taps) else 0
    top = min(-halo_y, y_range[0] * s + min(ys))
    bottom = max(m * s - 1 + halo_y, y_range[1] * s + max(ys))
    left = max(halo_x, -(x_range[0] * s + min(xs)), x_range[1] * s + max(xs) - (m * s - 1))
    # A region inside a larger image has pixels of it on both sides, so rows cannot share their margins.
    pitch = (m * s + (left if spec.block.whole else 2 * left)) | 1
    margin = (-across[0], across[1] - m)
    out_top, out_left = (0, max(margin)) if tile.steep else (max(margin), 0)
    if spec.kind != "weight":
        out_top = out_left = 0
    out_pitch = (m + 2 * out_left) | 1
    return Plane(
        outputs,
        pixels,
        across,
        top,
        left,
        pitch,
        (bottom - top + 1) * pitch + 2 * left,
        out_top,
        out_left,
        out_pitch,
        (m + 2 * out_top) * out_pitch,
        m // length * (across[1] - across[0]),
        (halo_y, halo_x),
    )


@functools.lru_cache(maxsize=256)
def planar_layout(spec: Spec) -> tuple[int, int, int]:
    """Planes of a block, threads of a block, bytes of shared memory."""
    planes = [plane(spec, program) for program in programs(spec)]
    tiles = max(p.tiles for p in planes)
    floats = max(p.size + p.out_size for p in planes)
    number = max(1, min(256 // tiles, 65536 // (4 * floats)))
    threads = -(-number * tiles // 32) * 32
    floats *= number
    if spec.block.whole and spec.stride == 1:  # and the positions, of two bytes
        floats += number * spec.block.region**2
    if spec.kind == "weight":
        floats = max(floats, 8 * threads)
    return number, threads, 4 * floats


_PLANES = r"""
// i / d and the remainder, for i * d < 2**32.
struct Divide {
    u32 d, magic;
    __device__ __forceinline__ explicit Divide(int by) : d(max(by, 1)), magic(by <= 1 ? 0u : 0xffffffffu / (u32)by + 1u) {}
    __device__ __forceinline__ int operator()(int i) const { return magic ? (int)__umulhi((u32)i, magic) : i; }
};
// What a block reads of its planes: `planes` of them, `rows` x `cols` numbers of each.
struct Part {
    int planes, rows, cols, total;
    Divide by_plane, by_row;
    __device__ __forceinline__ Part(int planes, int rows, int cols)
        : planes(planes), rows(rows), cols(cols), total(planes * rows * cols), by_plane(rows * cols), by_row(cols) {}
    __device__ __forceinline__ int at(int i, int plane_step, int row_step) const {
        const int plane = by_plane(i), rest = i - plane * rows * cols, row = by_row(rest);
        return plane * plane_step + row * row_step + rest - row * cols;
    }
};
// The index of a thread, hidden from the compiler: what follows from it is the same for all images, and worked out ahead
// of the loop over images it would take too many registers.
__device__ __forceinline__ int thread() { int t = threadIdx.x; asm volatile("" : "+r"(t)); return t; }
// Whole planes on their way to shared memory, `numbers` in each thread. They lie behind each other.
template <int numbers, int threads> struct Batch {
    T values[numbers];
    __device__ __forceinline__ void fetch(const T* __restrict__ from, const Part& part) {
        const int t = thread();
        #pragma unroll
        for (int k = 0; k < numbers; ++k)
            if (t + k * threads < part.total) values[k] = __ldg(from + t + k * threads);
    }
    __device__ __forceinline__ void put(float* to, const u16* positions, const Part& part) const {
        const int t = thread();
        #pragma unroll
        for (int k = 0; k < numbers; ++k)
            if (t + k * threads < part.total) to[positions[t + k * threads]] = to_float(values[k]);
    }
};
// Where numbers that lie behind each other in an image lie in shared memory.
template <int threads>
__device__ __noinline__ void list(u16* positions, int plane_step, int row_step, Part part) {
    for (int i = threadIdx.x; i < part.total; i += threads) positions[i] = (u16)part.at(i, plane_step, row_step);
}
// Whole planes of outputs back to the image.
template <int numbers, int threads>
__device__ __forceinline__ void give(T* __restrict__ to, const float* from, const u16* positions, const Part& part) {
    const int t = thread();
    #pragma unroll
    for (int k = 0; k < numbers; ++k)
        if (t + k * threads < part.total) to[t + k * threads] = from_float(from[positions[t + k * threads]]);
}
// The same in one go, for parts of planes.
template <int threads>
__device__ __noinline__ void copy(float* to, int plane_to, int row_to, const T* __restrict__ from, int plane_from, int row_from, Part part)
{
    #pragma unroll 4
    for (int i = threadIdx.x; i < part.total; i += threads)
        to[part.at(i, plane_to, row_to)] = to_float(__ldg(from + part.at(i, plane_from, row_from)));
}
// Copy planes of shared memory to an image, along its rows.
template <int threads>
__device__ __noinline__ void drain(T* __restrict__ to, int plane_to, int row_to, int step, const float* from,
                                   int plane_from, int row_from, Part part)
{
    #pragma unroll 4
    for (int i = threadIdx.x; i < part.total; i += threads) {
        const int plane = part.by_plane(i), rest = i - plane * part.rows * part.cols, row = part.by_row(rest);
        const int col = rest - row * part.cols;
        to[plane * plane_to + row * row_to + col * step] = from_float(from[plane * plane_from + row * row_from + col]);
    }
}
"""


def _planar(spec: Spec) -> str:
    number, threads, _ = planar_layout(spec)
    weight = spec.kind == "weight"
    so = spec.stride if spec.kind == "adjoint" else 1
    si = 1 if spec.kind == "adjoint" else spec.stride
    m, length = spec.block.region, spec.length
    centre = (spec.kernel_size - 1) // 2
    most = max(len(program.fold) for program in programs(spec))
    cases = []
    for index, program in enumerate(programs(spec)):
        p, tile, (a, b) = plane(spec, program), program.tile, program.phase
        span = p.across[1] - p.across[0]
        halo_y, halo_x = (0, 0) if spec.block.whole else p.halo
        # Numbers of the next image that each thread holds; strided input is too much for that.
        numbers = -(-number * m * m // threads) if spec.block.whole and si == so == 1 else 0
        out = [f"case {index}: {{"]
        out += [
            f"const int oh = (ho - {a} + {so - 1}) / {so}, ow = (wo - {b} + {so - 1}) / {so};",
            "if (ry >= oh || rx >= ow) break;",
            f"const int rows_out = min({m}, oh - ry), cols_out = min({m}, ow - rx);",
            f"const int tile = threadIdx.x % {p.tiles}, plane = threadIdx.x / {p.tiles};",
            "const bool active = plane < count;",
            f"const int along = tile / {span} * {length}, across = tile % {span} + {p.across[0]};",
            "const int y0 = along, x0 = across;" if tile.steep else "const int y0 = across, x0 = along;",
            f"float* const input = smem; float* const output = smem + {number * p.size};",
            f"u16* const positions = (u16*)(smem + {number * (p.size + p.out_size)});",
            f"for (int i = threadIdx.x; i < {number * (p.size + p.out_size)}; i += {threads}) smem[i] = 0.f;",
            # The part of the image that the region reads.
            f"const int top = max(0, ry * {si} - {halo_y}), left = max(0, rx * {si} - {halo_x});",
            f"const int rows_in = min(hi, (ry + {m}) * {si} + {halo_y}) - top;",
            f"const int cols_in = min(wi, (rx + {m}) * {si} + {halo_x}) - left;",
            f"float* const corner = input + (top - ry * {si} - {p.top}) * {p.pitch} + left - rx * {si} + {p.left};",
            f"const float* const pixel = input + plane * {p.size} + (y0 * {si} - {p.top}) * {p.pitch}"
            f" + x0 * {si} + {p.left};",
            f"float* const mine = output + plane * {p.out_size} + (y0 + {p.out_top}) * {p.out_pitch} + x0 + {p.out_left};",
            "const Part in(count, rows_in, cols_in), mid(count, rows_out, cols_out);",
        ]
        source_x = "x + ((i64){0} * C + c0) * hi * wi + (i64)top * wi + left"
        source_g = "g + ((i64){0} * C + c0) * ho * wo + (i64)ry * wo + rx"
        to_x = f"corner, {p.size}, {p.pitch}"
        to_g = f"output + {p.out_top * p.out_pitch + p.out_left}, {p.out_size}, {p.out_pitch}"
        fetch, put = [], []

        if numbers:
            out.append(f"Batch<{numbers}, {threads}> next;")
            fetch.append(f"next.fetch({source_x}, in);")
            put.append("next.put(corner, positions, in);")
            out.append(f"list<{threads}>(positions, {p.size}, {p.pitch}, in);")
            if weight or not tile.steep:
                out.append(f"list<{threads}>(positions + {number * m * m}, {p.out_size}, {p.out_pitch}, mid);")
            if weight:
                out.append(f"Batch<{numbers}, {threads}> next_g;")
                fetch.append(f"next_g.fetch({source_g}, mid);")
                corner_g = f"output + {p.out_top * p.out_pitch + p.out_left}"
                put.append(f"next_g.put({corner_g}, positions + {number * m * m}, mid);")
        else:
            put.append(f"copy<{threads}>({to_x}, {source_x}, hi * wi, wi, in);")
            if weight:
                put.append(f"copy<{threads}>({to_g}, {source_g}, ho * wo, wo, mid);")
        if weight:
            out += [f"float s{d} = 0.f;" for d in range(len(program.fold))] + ["float sb = 0.f;"]
        else:
            out += ["const T* const wc = w + (i64)(c0 + min(plane, count - 1)) * K;"]
            for d, taps in enumerate(program.fold):
                total = " + ".join(f"to_float(wc[reverse ? {spec.kernel_size - 1 - t} : {t}])" for t in taps)
                out.append(f"const float w{d} = {total}{' + identity' if centre in taps else ''};")
            out.append("const float start = bias ? to_float(bias[c0 + min(plane, count - 1)]) : 0.f;")
        out += [line.format("n0") for line in fetch]
        out += ["__syncthreads();", "#pragma unroll 1", "for (int n = n0; n < n1; ++n) {"]
        out += [*(line.format("n") for line in put), "__syncthreads();"]
        if fetch:
            out += ["if (n + 1 < n1) {", *(line.format("(n + 1)") for line in fetch), "}"]
        out.append("if (active) {")
        if weight:
            for i, (y, x) in enumerate(p.outputs):
                out.append(f"const float g{i} = mine[{y * p.out_pitch + x}]; sb += g{i};")
            use = "s{d} = fmaf(g{i}, v, s{d});"
        else:
            out += [f"float a{i} = start;" for i in range(length)]
            use = "a{i} = fmaf(w{d}, v, a{i});"
        for y, x, pairs in p.pixels:
            uses = " ".join(use.format(i=i, d=d) for i, d in pairs)
            out.append(f"{{ const float v = pixel[{y * p.pitch + x}]; {uses} }}")
        if not weight and tile.steep:
            out.append(
                f"T* const yb = y + ((i64)n * C + c0 + plane) * ho * wo"
                f" + (i64)((ry + y0) * {so} + {a}) * wo + (rx + x0) * {so} + {b};"
            )
            for i, (oy, ox) in enumerate(p.outputs):
                out.append(
                    f"if (y0 + {oy} < rows_out && (u32)(x0 + {ox}) < (u32)cols_out)"
                    f" yb[{oy * so} * wo + {ox * so}] = from_float(a{i});"
                )
        elif not weight:
            for i, (oy, ox) in enumerate(p.outputs):
                out.append(f"if ((u32)(y0 + {oy}) < {m}u) mine[{oy * p.out_pitch + ox}] = a{i};")
        out += ["}", "__syncthreads();"]
        if not weight and not tile.steep:
            # The outputs lie in rows of the tiles; they leave along the rows of the image.
            if numbers:
                give = f"give<{numbers}, {threads}>(y + ((i64)n * C + c0) * ho * wo, output, positions + {number * m * m}, mid);"
            else:
                give = (
                    f"drain<{threads}>(y + ((i64)n * C + c0) * ho * wo + (i64)(ry * {so} + {a}) * wo + rx * {so} + {b},"
                    f" ho * wo, wo * {so}, {so}, output, {p.out_size}, {p.out_pitch}, mid);"
                )
            out.append(give)
        out.append("}")
        if weight:
            names = [f"s{d}" for d in range(len(program.fold))] + ["sb"]
            for first in range(0, len(names), 8):
                part = names[first : first + 8]
                out.append("__syncthreads();")
                out += [f"smem[{j * threads} + threadIdx.x] = {name};" for j, name in enumerate(part)]
                out.append("__syncthreads();")
                out.append(
                    f"for (int i = threadIdx.x / 32; i < {len(part)} * count; i += {threads // 32}) {{"
                    f" const int j = i / count, ch = i % count; float total = 0.f;"
                    f" for (int k = threadIdx.x % 32; k < {p.tiles}; k += 32)"
                    f" total += smem[j * {threads} + ch * {p.tiles} + k];"
                    " for (int k = 16; k; k /= 2) total += __shfl_down_sync(0xffffffffu, total, k);"
                    f" const int d = {first} + j;"
                    f" if (threadIdx.x % 32 == 0) partial[((i64)part * C + c0 + ch) * {most + 1}"
                    f" + (d == {len(program.fold)} ? {most} : d)] = total; }}"
                )
        out.append("break; }")
        cases.append("\n".join(out))
    body = "\n".join(cases)
    if weight:
        head, tail = "const T* __restrict__ x, const T* __restrict__ g, float* __restrict__ partial,", ""
        setup = "const int part = blockIdx.y * regions + region;"
    else:
        head = "const T* __restrict__ x, T* __restrict__ y, const T* __restrict__ w, const T* __restrict__ bias,"
        tail = ", i64 reverse, i64 identity_"
        setup = "const float identity = (float)identity_;"
    return f"""
{_PLANES}
extern "C" __global__ void __launch_bounds__({threads}, {spec.block.resident}) run(
    {head}
    const int* __restrict__ table, i64 rows, i64 per, i64 N_, i64 C_, i64 hi_, i64 wi_, i64 ho_, i64 wo_, i64 images,
    i64 granule{tail})
{{
    extern __shared__ float smem[];
    const int C = (int)C_, hi = (int)hi_, wi = (int)wi_, ho = (int)ho_, wo = (int)wo_;
    const int regions = gridDim.x / (u32)rows, block = blockIdx.x / (u32)(per * regions), rest = blockIdx.x % (u32)(per * regions);
    const int entry = block * (int)per + rest % (u32)per, region = rest / (u32)per;
    const int program = table[3 * entry], c0 = table[3 * entry + 1], count = table[3 * entry + 2];
    if (count == 0) return;
    const int regions_x = ((wo + {so - 1}) / {so} + {m - 1}) / {m};
    const int ry = region / regions_x * {m}, rx = region % regions_x * {m};
    const int n0 = blockIdx.y * (int)images, n1 = min(n0 + (int)images, (int)N_);
    {setup}
    switch (program) {{
{body}
    }}
}}
{reduce(spec) if weight else ""}
"""
