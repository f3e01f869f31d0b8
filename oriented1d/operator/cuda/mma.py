"""CUDA C++ of the operator for 16-bit numbers, on tensor cores.

Along the line of a kernel, a depthwise convolution is the product of a banded (Toeplitz) matrix of weights and a matrix
whose columns are lines of the image. So shared memory holds each channel *sheared*, in a frame: its row ``h``, column
``k`` is the pixel at ``u = k``, ``v = h + drift(k)``, where ``u`` runs along the kernel's line (as in ``tiles.py``) and
``drift`` follows it in whole pixels. There the taps of any angle lie in rows that differ by ``e``, one or two at most,
and sixteen outputs along a line are a few products of 16 x 16 matrices. The weight gradient is the product of the frames
of gradients and images.

A warp owns a channel, or half of its lines, and keeps its matrices in registers; a block owns up to sixteen channels of
one angle. It streams through the frames of all its images, which lie below each other with enough rows between them that no tap reaches from
one into the next, a few rows a step: while one step is computed, the pixels of another are on their way.

The two layouts differ in how pixels travel between images and shared memory. In channels_last a thread carries several
channels of a pixel at once. In contiguous images it carries a fixed pixel of a step's frames for one channel after the
other, each a plane from the one before; threads are placed so that neighbours carry neighbours of an image's row.

A matrix product reads all of its 16 columns, so what is not finite in an image also reaches outputs of the same line, up
to 15 pixels beyond the taps.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Iterator

from oriented1d.operator.cuda import source

WARPS = 16  # of a block
_SPAN = 16  # contiguous, steep: neighbouring lanes that carry neighbouring lines, that is pixels of one row
_STEPS = 4  # of input that shared memory holds: the one before, the one computed, the one after, the one arriving


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Sizes of images, numbers of channels and of images are arguments of the kernel.

    Attributes:
        kind: ``"gather"`` (forward; grad-input at stride 1 too), ``"adjoint"`` (grad-input) or ``"weight"``.
        dtype: ``"bf16"`` or ``"half"``.
        vector: channels that are loaded at once; 8 or 4.
        kernel_size, stride: of the layer.
        angles: the distinct angles of the layer, radians.
        tiles: a step's tiles of 16 outputs along the line.
        groups: a step's groups of 8 lines.
        whole: no image is longer than a step's tiles.
        last: the images are channels_last; else contiguous.
        team: warps that share the lines of a channel.
        full: all blocks have ``channels`` channels.
        phase_rows: of an adjoint, as in ``source.Spec``.
        square, wide: as in ``source.Spec``.
    """

    kind: str
    dtype: str
    vector: int
    kernel_size: int
    stride: int
    angles: tuple[float, ...]
    tiles: int
    groups: int
    whole: bool
    last: bool = True
    team: int = 1
    full: bool = False
    phase_rows: tuple[int, ...] = ()
    square: bool = False
    wide: bool = False

    @property
    def weights(self) -> int:
        """Of a channel."""
        return self.kernel_size ** (2 if self.square else 1)

    @property
    def channels(self) -> int:
        """Channels of a block; of channels_last 16: 32 bytes, the least that is read from memory."""
        return WARPS // self.team

    @property
    def carried(self) -> int:
        """Contiguous: pixels of a step that a thread carries to the frames."""
        columns = 16 * self.tiles + (0 if self.whole else 2 * self.halo)
        return -(-8 * self.groups * columns // (32 * WARPS)) * self.channels

    @property
    def spread(self) -> int:
        """Distance in output pixels between neighbouring outputs of a program."""
        return self.stride if self.kind == "adjoint" else 1

    @property
    def reach(self) -> int:
        """Input pixels that a tap can be away from its output."""
        reach = (self.kernel_size - 1) // 2
        return -(-reach // self.stride) + 1 if self.kind == "adjoint" else reach

    @property
    def halo(self) -> int:
        return -(-self.reach // 8) * 8

    @property
    def pitch(self) -> int:
        """Columns of a frame's row; an odd multiple of 8, so that eight rows fill all banks."""
        # An image that fits leaves zeros behind it, which are the halos of two rows.
        wide = 16 * self.tiles + (self.reach if self.whole else 2 * self.halo)
        return -(-wide // 8) * 8 | 8

    @property
    def plane_bytes(self) -> int:
        return -(-(_STEPS * 8 * self.groups * self.pitch + 2 * self.halo + 64) * 2 // 128) * 128

    @property
    def stage_words(self) -> int:
        """Words of a channel's outputs of a step."""
        return self.groups * (self.tiles * 64 + (0 if self.last else _SKEW)) + 2

    @property
    def shared_bytes(self) -> int:
        frames = self.channels * self.plane_bytes + 128
        if self.kind == "weight":
            return max(2 * frames, WARPS * _CHUNK * 512)
        return frames + 2 * self.channels * self.stage_words * 4

    @property
    def text(self) -> str:
        return _source(self)

    @property
    def functions(self) -> dict[str, str]:
        return {"run": "depthwise_conv2d"} if self.square else source.functions(self.kind)


_START = 4.0  # microseconds that a block needs before its first step
_CHUNK = 8  # blocks of sums that a warp hands over at once
_MOST_REGISTERS = 80  # for sums and the pixels on their way
_SKEW = 8  # words between the outputs of a step's groups, which lanes along the lines read together


@dataclasses.dataclass(frozen=True)
class Band:
    """The banded matrices of a program.

    Row ``h``, column ``k`` of a frame is the pixel at ``u = k``, ``v = h + drift(k)``.

    Attributes:
        steep: ``u`` runs down the columns of the image rather than along its rows.
        advance, phase: the drift, ``(u * advance + phase) >> 4``.
        blocks: ``(e, k // 8)`` of the blocks of 8 columns that outputs read, ``e`` rows from their own.
        uses: for each distinct tap and each of the 16 outputs, the block and the column in it.
        across: ``(along, across)`` in ascending order: of the taps that are ``along`` pixels away along the line or
            nearer, the farthest reaches ``across`` pixels across it.
    """

    steep: bool
    advance: int
    phase: int
    blocks: tuple[tuple[int, int], ...]
    uses: tuple[tuple[tuple[int, int], ...], ...]
    across: tuple[tuple[int, int], ...]

    def gap(self, size: int) -> int:
        """Lines that must lie between images of ``size`` pixels along the line, so that no tap reaches from one into
        another: taps that are farther away than that find nothing in any image."""
        return max((across for along, across in self.across if along < size), default=0)


@functools.lru_cache(maxsize=1024)
def make_band(angle: float, taps: tuple[tuple[int, int], ...]) -> Band:
    """The matrices with the fewest blocks for the distinct ``taps`` ``(dy, dx)`` of a kernel."""
    sine, cosine = math.sin(angle), math.cos(angle)
    steep = abs(sine) > abs(cosine) * 0.999
    slope = -cosine / sine if steep else -sine / cosine
    offsets = [(dy, dx) if steep else (dx, dy) for dy, dx in taps]
    best: tuple[list[list[tuple[int, int, int]]], set[tuple[int, int]], int, int] | None = None
    for advance in sorted({math.floor(16 * slope), math.ceil(16 * slope)}):
        for phase in range(16):

            def drift(u: int, advance: int = advance, phase: int = phase) -> int:
                return (u * advance + phase) >> 4

            uses = [
                [(drift(i) + dv - drift(i + du), (i + du) >> 3, (i + du) & 7) for i in range(16)] for du, dv in offsets
            ]
            touched = {(e, k) for mine in uses for e, k, _ in mine}
            if best is None or len(touched) < len(best[1]):
                best = uses, touched, advance, phase
    assert best is not None
    uses, touched, advance, phase = best
    blocks = tuple(sorted(touched))
    number = {block: index for index, block in enumerate(blocks)}
    across: list[tuple[int, int]] = []
    for along, far in sorted((abs(du), abs(dv)) for du, dv in offsets):
        if far > (across[-1][1] if across else 0):
            across.append((along, far))
    return Band(
        steep,
        advance,
        phase,
        blocks,
        tuple(tuple((number[e, k], column) for e, k, column in mine) for mine in uses),
        tuple(across),
    )


def _plain(spec: Spec) -> source.Spec:
    layer = spec.kernel_size, spec.stride, spec.angles
    return source.Spec(spec.kind, True, spec.dtype, 1, *layer, 7, source.Blocks(), spec.phase_rows, spec.square)


@functools.lru_cache(maxsize=256)
def programs(spec: Spec) -> tuple[tuple[source.Program, Band], ...]:
    plain = source.programs(_plain(spec))
    phases = len(plain) // len(spec.angles)
    return tuple(
        (program, make_band(spec.angles[index // phases], program.taps)) for index, program in enumerate(plain)
    )


def products(spec: Spec, program: source.Program, band: Band) -> list[tuple[tuple[int, bool], tuple[int, bool]]]:
    """Pairs of blocks that one instruction multiplies; each a number of ``band.blocks``, and whether it holds the
    rounding errors of the weights: sums of weights, and ``weight + 1``, need more than 16 bits."""
    centre = -1 if spec.square else (spec.kernel_size - 1) // 2
    rounded = {
        block
        for taps, uses in zip(program.fold, band.uses, strict=True)
        if len(taps) > 1 or centre in taps
        for block, _ in uses
    }
    halves = [(block, False) for block in range(len(band.blocks))] + [(block, True) for block in sorted(rounded)]
    if len(halves) % 2:
        halves.append((-1, False))  # nothing
    return list(zip(halves[::2], halves[1::2], strict=True))


def _table(spec: Spec, program: source.Program, band: Band) -> list[int]:
    """For each product, lane and half-register of the left matrix: the weight there. Rounding errors follow the weights
    and a zero."""
    count = len(program.fold)
    weight_at = {(block, i, column): d for d, uses in enumerate(band.uses) for i, (block, column) in enumerate(uses)}
    table = []
    for pair in products(spec, program, band):
        for lane in range(32):
            for register in range(4):
                block, error = pair[register // 2]
                for half in range(2):
                    row, column = lane // 4 + 8 * (register % 2), 2 * (lane % 4) + half
                    d = weight_at.get((block, row, column))
                    table.append(count if d is None else d + (count + 1 if error else 0))
    return table


@dataclasses.dataclass(frozen=True)
class Shares:
    """The blocks of a launch.

    Attributes:
        rows: ``(program, first channel, channels, split, splits)`` of each block of a strip, in the order of their start.
        strips: of the images, along the line.
        by_image: split ``i`` has the images ``i``, ``i + splits``, ...; else one part of the lines of all images.
    """

    rows: tuple[tuple[int, int, int, int, int], ...]
    strips: int
    by_image: bool


def share(
    spec: Spec,
    groups: list[tuple[int, int, int]],
    images: int,
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    image_bytes: int,
    processors: int,
) -> Shares:
    """Split the steps of ``groups`` ``(program, first channel, channels)`` so that the processors finish early.

    Where groups are made of whole 32-byte sectors (or planes), their lines are split so that all blocks take about the same time.
    Other groups share sectors: memory then does less if all groups work on the same images at the same time.
    """
    strips = -(-max(outputs) // (16 * spec.tiles))
    apart = not spec.last or all(start % 16 == 0 and count % 16 == 0 for _, start, count in groups)
    bands = [band for _, band in programs(spec)]

    @functools.cache
    def cost(program: int, images: int) -> tuple[float, int]:
        # Microseconds of a step on one H200, by its blocks of 8 columns; and the number of steps.
        band = bands[program]
        across, along = (1, 0) if band.steep else (0, 1)
        gap = band.gap(max(inputs[along], outputs[along]))
        lines = images * (max(inputs[across], outputs[across]) + gap)
        steps = -(-(lines + abs(min(outputs[along], 16 * spec.tiles) * band.advance) // 16) // (8 * spec.groups))
        base, slope = (1.1, 0.08) if spec.kind == "weight" else (1.2, 0.03)
        return steps * (base + slope * len(band.blocks)) * spec.groups * spec.tiles / (4 * spec.team), steps

    def makespan(blocks: list[float], limit: float) -> float:
        # When the last one ends; `limit` if that is not earlier.
        longest = max(blocks, default=-_START) + _START
        if len(blocks) <= processors:
            return longest
        if longest >= limit or sum(blocks) + _START * len(blocks) >= limit * processors:
            return limit
        free = sorted(block + _START for block in blocks[:processors])
        for block in blocks[processors:]:
            heapq.heapreplace(free, free[0] + block + _START)
        return max(free)

    shortest, best, by_image = math.inf, list[tuple[int, int, int, int, int]](), False
    if not apart:
        # `image_bytes` times the splits is a step in 32 bits.
        for splits in range(1, min(images, 64, (2**32 - 1) // image_bytes) + 1):
            rows = [(*group, split, splits) for split in range(splits) for group in groups]
            times = [cost(row[0], -(-(images - row[3]) // splits))[0] for row in rows]
            time = makespan([time for time in times for _ in range(strips)], shortest)
            if time < shortest:
                shortest, best, by_image = time, rows, True
    members: dict[int, list[int]] = {}  # groups of each program, which take as long as each other
    for index, (program, _, _) in enumerate(groups):
        members.setdefault(program, []).append(index)

    def longest_first() -> Iterator[int]:
        # Groups that get one block more, those whose blocks take longest first.
        heap = [(-cost(program, images)[0], program, 1) for program in members]
        heapq.heapify(heap)
        while heap:
            _, program, number = heapq.heappop(heap)
            time, steps = cost(program, images)
            if number < steps // 2:
                yield from members[program]
                heapq.heappush(heap, (-time / (number + 1), program, number + 1))

    all_of = [cost(program, images)[0] for program, _, _ in groups]
    twice = 1 if apart else 2  # sectors that are read and written more than once
    parts, more = [1] * len(groups), longest_first()
    for waves in (1, 2, 3, 4):
        if twice * (sum(all_of) * strips / processors + _START * (waves - 1)) >= shortest:
            break  # more blocks cannot help
        for index in itertools.islice(more, max(0, -(-processors * waves // strips) - sum(parts))):
            parts[index] += 1
        each = [time / part for time, part in zip(all_of, parts, strict=True)]
        order = sorted(range(len(groups)), key=lambda index: -each[index])
        blocks = [each[index] for index in order for _ in range(parts[index] * strips)]
        time = twice * makespan(blocks, shortest / twice)
        if time < shortest:
            best = [(*groups[index], split, parts[index]) for index in order for split in range(parts[index])]
            shortest, by_image = time, False
    return Shares(tuple(best), strips, by_image)


def choose(
    kind: str,
    dtype: str,
    vector: int,
    kernel_size: int,
    stride: int,
    angles: tuple[float, ...],
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    memory: int,
    last: bool = True,
    phase_rows: tuple[int, ...] = (),
    square: bool = False,
    wide: bool = False,
) -> Spec | None:
    """The kernel for images of these sizes (of one program's outputs); None where another one is better.

    That is so for strides (other than in grad-input, whose phases have none), for kernels whose matrices need more
    registers or ``memory`` than there are, for few channels at a time, and for contiguous images of the sizes that
    ``source.py`` does best. ``vector`` matters in channels_last only.
    """
    longest = max(outputs)
    if (stride > 1 and kind != "adjoint") or (last and vector < 4):
        return None
    if not last and (
        (kind == "gather" and (longest <= 14 or 32 < longest <= 56))
        or (kind == "weight" and longest <= 14 and kernel_size > 15)
    ):
        return None
    tiles = 1 if longest <= 16 else 2 if longest <= 32 else 4
    # Contiguous: with more lines a step, more pixels of an image's row arrive together.
    team = 2 if not last and (tiles == 4 or kind == "weight") else 1
    groups = min(4 // tiles * team, 4)
    whole = max(longest, *inputs) <= 16 * tiles
    common = kind, dtype, vector if last else 1, kernel_size, stride, angles
    spec = Spec(*common, tiles, groups, whole, last, team, phase_rows=phase_rows, square=square, wide=wide)
    while spec.shared_bytes > memory and (spec.groups > team or spec.tiles > 1):
        if spec.groups > team:
            spec = dataclasses.replace(spec, groups=spec.groups // 2)
        else:
            spec = dataclasses.replace(spec, tiles=spec.tiles // 2, whole=False)
    if spec.shared_bytes > memory:
        return None
    return spec if _in_registers(spec) else None


@functools.lru_cache(maxsize=4096)
def _in_registers(spec: Spec) -> bool:
    """Whether there are registers for the matrices of a kernel."""
    if spec.kind == "weight":
        return all(len(band.blocks) <= 20 for _, band in programs(spec))
    return all(len(products(spec, *both)) <= 18 for both in programs(spec))


_HEAD = r"""
typedef unsigned long long u64;
#define THREADS (32 * CHANNELS * TEAM)
#define LINES (8 * GROUPS)
#define RING (4 * LINES)

// One side of the operator: the images as u and v see them. Steps are in bytes; a step of the block moves `dn` images and
// `dv` lines on.
struct Side {
    u32 image, v_step;
    i64 u_step;
    int us, vs, period, N, dn, dv;
    __device__ __forceinline__ Side(u32 image, i64 u_step, u32 v_step, int us, int vs, int period, int N)
        : image(image), v_step(v_step), u_step(u_step), us(us), vs(vs), period(period), N(N), dn(LINES / period), dv(LINES % period) {}
};
// Where a pixel of a frame lies: image n, v across.
struct Spot {
    int v, n;
    __device__ __forceinline__ void set(int at, const Side& side) {
        n = at / side.period; v = at - n * side.period;
        if (v < 0) { v += side.period; --n; }
    }
    __device__ __forceinline__ void move(const Side& side) {
        v += side.dv; n += side.dn;
        if (v >= side.period) { v -= side.period; ++n; }
    }
    __device__ __forceinline__ bool inside(const Side& side) const { return (u32)v < (u32)side.vs && (u32)n < (u32)side.N; }
    __device__ __forceinline__ i64 offset(const Side& side) const { return (i64)((u64)(u32)n * side.image + (u64)(u32)v * side.v_step); }
};
#define NOWHERE (-(1 << 30))
#define DRIFT(u, advance, phase) (((u) * (advance) + (phase)) >> 4)
"""

_CARRY = r"""
#define PAIRS (WHOLE ? 8 * TILES : 8 * TILES + HALO)

// VECTOR channels of a pixel.
#define W (VECTOR / 2)
struct Words { u32 w[W]; };
__device__ __forceinline__ Words fetch(const char* p, bool there) {
    Words r;
    #pragma unroll
    for (int j = 0; j < W; ++j) r.w[j] = 0;
#if VECTOR == 8
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(r.w[0]), "+r"(r.w[1]), "+r"(r.w[2]), "+r"(r.w[3]) : "l"(p), "r"((u32)there));
#else
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
        : "+r"(r.w[0]), "+r"(r.w[1]) : "l"(p), "r"((u32)there));
#endif
    return r;
}
__device__ __forceinline__ void write(char* p, const Words& r, bool there) {
#if VECTOR == 8
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%4], {%0, %1, %2, %3};}"
        :: "r"(r.w[0]), "r"(r.w[1]), "r"(r.w[2]), "r"(r.w[3]), "l"(p), "r"((u32)there) : "memory");
#else
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.u32 [%2], {%0, %1};}"
        :: "r"(r.w[0]), "r"(r.w[1]), "l"(p), "r"((u32)there) : "memory");
#endif
}

// The pixels that a thread carries from the images to the frames of a step: pairs that follow each other along the line,
// VECTOR channels of each.
struct Carrier {
    static constexpr int each = (LINES * PAIRS + 32 * VECTOR - 1) / (32 * VECTOR);
    struct Load { Words a[each], b[each]; };
    Spot a[each], b[each];
    const char* from[each];
    int to[each];  // bytes; -1 where this thread has nothing to do

    // `first`: the frame's row of the first step.
    __device__ __forceinline__ void init(const T* x, const Side& side, int c0, int count, int u0, int first, int advance, int phase) {
        const int parts = count / VECTOR;
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            const int p = threadIdx.x + i * blockDim.x, part = p % parts, rest = p / parts, row = rest / PAIRS;
            const int column = 2 * (rest % PAIRS) - (WHOLE ? 0 : HALO), k = u0 + column;
            a[i].set(first + row + DRIFT(k, advance, phase), side);
            b[i].set(first + row + DRIFT(k + 1, advance, phase), side);
            if ((u32)k >= (u32)side.us || row >= LINES) a[i].n = NOWHERE;
            if ((u32)(k + 1) >= (u32)side.us || row >= LINES) b[i].n = NOWHERE;
            from[i] = (const char*)(x + c0 + part * VECTOR) + k * side.u_step;
            to[i] = row < LINES ? part * VECTOR * PLANE + (part & 1) * 64 + (row * PITCH + column + HALO) * 2 : -1;
        }
    }
    // Start to load, `other` bytes from where the images are.
    __device__ __forceinline__ void load(Load& l, const Side& side, i64 other) const {
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            l.a[i] = fetch(from[i] + other + a[i].offset(side), a[i].inside(side));
            l.b[i] = fetch(from[i] + other + side.u_step + b[i].offset(side), b[i].inside(side));
        }
    }
    __device__ __forceinline__ void move(const Side& side) {
        #pragma unroll
        for (int i = 0; i < each; ++i) { a[i].move(side); b[i].move(side); }
    }
    __device__ __forceinline__ void put(const Load& l, unsigned char* frames, int step) const {
        frames += (step & 3) * (LINES * PITCH * 2);
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            if (to[i] < 0) continue;
            #pragma unroll
            for (int j = 0; j < W; ++j) {
                *(u32*)(frames + to[i] + 2 * j * PLANE) = __byte_perm(l.a[i].w[j], l.b[i].w[j], 0x5410);
                *(u32*)(frames + to[i] + (2 * j + 1) * PLANE) = __byte_perm(l.a[i].w[j], l.b[i].w[j], 0x7632);
            }
        }
    }
};
"""

_GIVE = r"""
// The outputs that a thread takes to the image: pairs of lines, VECTOR channels of each.
struct Giver {
    static constexpr int each = (GROUPS * TILES * 2 + VECTOR - 1) / VECTOR;
    Spot a[each];
    char* to[each];
    int from[each];
    __device__ __forceinline__ void init(T* y, const Side& side, int c0, int count, int u0, int first, int advance, int phase) {
        const int parts = count / VECTOR;
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            const int p = threadIdx.x + i * blockDim.x, part = p % parts, rest = p / parts;
            const int pair = rest & 3, u = (rest >> 2) % (16 * TILES), group = (rest >> 2) / (16 * TILES);
            a[i].set(first + group * 8 + pair * 2 + DRIFT(u0 + u, advance, phase), side);
            if (group >= GROUPS || u0 + u >= side.us) a[i].n = NOWHERE;
            to[i] = (char*)(y + c0 + part * VECTOR) + (u0 + u) * side.u_step;
            from[i] = group < GROUPS ? part * VECTOR * STAGE + (group * 16 * TILES + u) * 4 + pair : 0;
        }
    }
    __device__ __forceinline__ void give(const u32* stage, const Side& side) {
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            u32 w[VECTOR];
            #pragma unroll
            for (int j = 0; j < VECTOR; ++j) w[j] = stage[from[i] + j * STAGE];
            Words va, vb;
            #pragma unroll
            for (int j = 0; j < W; ++j) {
                va.w[j] = __byte_perm(w[2 * j], w[2 * j + 1], 0x5410);
                vb.w[j] = __byte_perm(w[2 * j], w[2 * j + 1], 0x7632);
            }
            Spot b = {a[i].v + 1, a[i].n};
            if (b.v == side.period) { b.v = 0; ++b.n; }
            write(to[i] + a[i].offset(side), va, a[i].inside(side));
            write(to[i] + b.offset(side), vb, b.inside(side));
            a[i].move(side);
        }
    }
};
"""

# The same for contiguous images: a thread has fixed positions, and the pixels there of all channels of the block, which
# lie a plane apart.
_CARRY_PLANES = r"""
#define COLUMNS (WHOLE ? 16 * TILES : 16 * TILES + 2 * HALO)

__device__ __forceinline__ u32 fetch(const char* p, bool there) {
    u32 r = 0;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}" : "+r"(r) : "l"(p), "r"((u32)there));
    return r;
}
__device__ __forceinline__ void write(char* p, u16 r, bool there) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u16 [%0], %1;}" :: "l"(p), "h"(r), "r"((u32)there) : "memory");
}

// Position `p` of a step's rows of `columns`, so that neighbours lie next to each other in the image too. Where u runs
// down the image, these are neighbouring rows of the frame; else columns, in the rows where v is the same but for
// multiples of LINES.
struct Place {
    int row, column;
    __device__ __forceinline__ Place(int p, int columns, int u, bool steep, int advance, int phase) {
        if (steep) {
            row = p % SPAN + p / (SPAN * columns) * SPAN; column = p / SPAN % columns;
        } else {
            column = p % columns;
            row = (p / columns - DRIFT(u + column, advance, phase)) & (LINES - 1);
        }
    }
};
// A line of all images; divisions by their period as multiplications, right for 31 bits.
struct Lines {
    u32 line, magic, shift;
    __device__ __forceinline__ void set(int first, const Side& side) {
        line = first;
        shift = 31 - __clz(side.period - 1);
        magic = (u32)((1ull << (32 + shift)) / (u32)side.period + 1);
    }
};
// A pixel that moves from step to step: its line relative to theirs, and where it is in that line, in bytes.
struct Pixel {
    u32 at, along;
    __device__ __forceinline__ void set(
        const Place& place, const Side& side, u32 channels, int u, int advance, int phase, bool there) {
        const int k = u + place.column;
        at = there && (u32)k < (u32)side.us ? place.row + DRIFT(k, advance, phase) : 1 << 30;
        along = channels + (u32)k * (u32)side.u_step;
    }
    // Bytes from the first image; whether it lies in one.
    __device__ __forceinline__ u64 find(const Lines& lines, const Side& side, bool& inside) const {
        // Lines before the first image are those far behind the last.
        const u32 line = lines.line + at, image = __umulhi(line, lines.magic) >> lines.shift, v = line - image * side.period;
        inside = v < (u32)side.vs && image < (u32)side.N;
        return (u64)image * side.image + (v * side.v_step + along);
    }
};

struct Carrier {
    static constexpr int all = LINES * COLUMNS, each = (all + THREADS - 1) / THREADS;
    struct Load { u32 w[each][CHANNELS]; };
    const char* from;
    u32 plane;  // bytes
    int count, to[each];
    Lines lines;
    Pixel pixels[each];

    __device__ __forceinline__ void init(
        const T* x, const Side& side, u32 plane_, int c0, int count_, int u0, int first, bool steep, int advance, int phase) {
        lines.set(first, side);
        from = (const char*)x;
        plane = plane_; count = count_;
        u0 -= WHOLE ? 0 : HALO;
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            const int p = threadIdx.x + i * THREADS;
            const Place place(p, COLUMNS, u0, steep, advance, phase);
            pixels[i].set(place, side, c0 * plane_, u0, advance, phase, all % THREADS == 0 || p < all);
            to[i] = (place.row * PITCH + place.column + (WHOLE ? HALO : 0)) * 2;
        }
    }
    // Start to load, `other` bytes from where the images are.
    __device__ __forceinline__ void load(Load& l, const Side& side, i64 other) const {
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            bool inside;
            const char* const p = from + other + pixels[i].find(lines, side, inside);
            const int there = inside ? count : 0;
            #pragma unroll
            for (int j = 0; j < CHANNELS; ++j) l.w[i][j] = fetch(p + (u64)plane * j, j < there);
        }
    }
    __device__ __forceinline__ void move(const Side& side) { lines.line += LINES; }
    __device__ __forceinline__ void put(const Load& l, unsigned char* frames, int step) const {
        frames += (step & 3) * (LINES * PITCH * 2);
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            if (all % THREADS && threadIdx.x + i * THREADS >= all) continue;
            #pragma unroll
            for (int j = 0; j < CHANNELS; ++j) *(u16*)(frames + to[i] + j * PLANE) = (u16)l.w[i][j];
        }
    }
};
"""

# A word of a stage is a pair of lines, the four pairs of an output next to each other. Their order changes every eight
# outputs, so that lanes along the line read from different banks.
_GIVE_PLANES = r"""
struct Giver {
    static constexpr int all = LINES * 16 * TILES, each = (all + THREADS - 1) / THREADS;
    char* to;
    u32 plane;
    int count, from[each];
    Lines lines;
    Pixel pixels[each];
    __device__ __forceinline__ void init(
        T* y, const Side& side, u32 plane_, int c0, int count_, int u0, int first, bool steep, int advance, int phase) {
        lines.set(first, side);
        to = (char*)y;
        plane = plane_; count = count_;
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            const int p = threadIdx.x + i * THREADS;
            const Place place(p, 16 * TILES, u0, steep, advance, phase);
            pixels[i].set(place, side, c0 * plane_, u0, advance, phase, all % THREADS == 0 || p < all);
            const int group = place.row / 8, line = place.row % 8, u = place.column;
            from[i] = all % THREADS && p >= all ? 0 : 2 * (group * (64 * TILES + (steep ? SKEW : 0)) + u * 4 + (line / 2 ^ (u / 8 & 3))) + line % 2;
        }
    }
    __device__ __forceinline__ void give(const u32* stage, const Side& side) {
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            u16 w[CHANNELS];
            #pragma unroll
            for (int j = 0; j < CHANNELS; ++j) w[j] = ((const u16*)stage)[from[i] + 2 * j * STAGE];
            bool inside;
            char* const p = to + pixels[i].find(lines, side, inside);
            const int there = inside ? count : 0;
            #pragma unroll
            for (int j = 0; j < CHANNELS; ++j) write(p + (u64)plane * j, w[j], j < there);
        }
        lines.line += LINES;
    }
};
"""

_PRODUCTS = r"""
#define LDSM(t, address, r0, r1, r2, r3) \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" t ".shared.b16 {%0,%1,%2,%3}, [%4];" \
        : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(address) : "memory")
#define MMA16_FIRST(c, start, a, b0, b1) \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_T "." MMA_T ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};" \
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start))
#define MMA16(c, a, b0, b1) \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_T "." MMA_T ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#define MMA8(c, a0, a1, b) \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." MMA_T "." MMA_T ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b))
"""


def _loads(spec: Spec, band: Band, trans: str) -> list[list[str]]:
    """For each tile of a step, the loads of the blocks that it is the first to need: four neighbours at once."""
    lowest = {e: min(k for f, k in band.blocks if f == e) for e, _ in band.blocks}
    loaded: set[tuple[int, int]] = set()
    result = []
    for tile in range(spec.tiles):
        lines = []
        for e, k in band.blocks:
            first = lowest[e] + (k + 2 * tile - lowest[e]) // 4 * 4
            if (e, first) in loaded:
                continue
            loaded.add((e, first))
            names = ", ".join(_fragment(e, first + i) for i in range(4))
            lines.append(f'u32 {names}; LDSM("{trans}", row{e + _LIFT} + {16 * first}, {names});')
        result.append(lines)
    return result


_LIFT = 64  # makes names of numbers that can be negative


def _fragment(e: int, k: int) -> str:
    return f"f{e + _LIFT}_{k + _LIFT}"


def _geometry(spec: Spec, program: source.Program, band: Band) -> list[str]:
    """What a program knows of its images, and the steps of this block."""
    phase_u, phase_v = program.phase if band.steep else program.phase[::-1]
    so = spec.spread
    us_in, vs_in, us_out, vs_out = ("hi", "wi", "ho", "wo") if band.steep else ("wi", "hi", "wo", "ho")
    x, wi, wo = ("C", "wi * C", "wo * C") if spec.last else ("1", "wi", "wo")  # steps of a column and of rows
    u_in, v_in, u_out, v_out = (wi, x, wo, x) if band.steep else (x, wi, x, wo)
    reach, drift = 16 * spec.tiles, f"{band.advance}, {band.phase}"
    start = "first" if spec.last else "begin"
    gap = "0" if spec.last else "1"
    for along, far in band.across:
        gap = f"longest > {along} ? {far} : {gap}"
    return [
        f"const int us = ({us_out} - {phase_u} + {so - 1}) / {so}, vs = ({vs_out} - {phase_v} + {so - 1}) / {so};",
        f"const int u0 = strip * {reach};",
        "if (u0 >= us || vs <= 0) break;",
        # Images lie so many lines apart that no tap reaches from one into another (`Band.gap`).
        f"const int longest = max({us_in}, us), lines = max({vs_in}, vs) + ({gap});",
        f"const Side out(2u * jump * ho * wo * C, {so} * {u_out} * 2ll, {so} * {v_out} * 2u, us, vs, lines, N);",
        # Where both sides are the same, the compiler should know.
        "const Side& in = out;"
        if spec.stride == 1
        else f"const Side in(2u * jump * hi * wi * C, {u_in} * 2ll, {v_in} * 2u, {us_in}, {vs_in}, lines, N);",
        f"const i64 corner = {phase_u} * {u_out} + {phase_v} * {v_out};",
        f"const int low = DRIFT(u0, {drift}), high = DRIFT(min(u0 + {reach}, us) - 1, {drift});",
        f"const int {start} = -max(low, high), last = (N - 1) * lines + vs - 1 - min(low, high);",
        f"const int all = (last - {start}) / LINES + 1, each = (all + splits - 1) / splits;",
        "const int t0 = by_image ? 0 : split * each, t1 = by_image ? all : min(t0 + each, all);"
        if spec.last
        else "const int first = begin + split * each * LINES, t0 = 0, t1 = min(each, all - split * each);",
    ]


def _rows(spec: Spec, band: Band) -> list[str]:
    """The addresses of the eight rows of a group, for each distance ``e``."""
    return ["const int row = q * LINES + 8 * j + (lane & 7);"] + [
        f"const u32 row{e + _LIFT} = frame + ((row + ({e})) & (RING - 1)) * {2 * spec.pitch};"
        for e in sorted({e for e, _ in band.blocks})
    ]


def _carried(spec: Spec, band: Band, side: str, first: str) -> str:
    """How to set up what carries between images and shared memory."""
    drift = f"{band.advance}, {band.phase}"
    if spec.last:
        return f"{side}, c0, count, u0, {first}, {drift}"
    size = "2u * hi * wi" if side == "in" and spec.stride > 1 else "2u * ho * wo"
    return f"{side}, {size}, c0, count, u0, {first}, {str(band.steep).lower()}, {drift}"


def _each_group(spec: Spec) -> list[str]:
    """The loop of a warp over the groups of lines that it computes."""
    mine = spec.groups // spec.team
    return [
        "#pragma unroll" if mine <= 2 else "#pragma unroll 1",
        f"for (int i = 0; i < {mine}; ++i) {{ const int j = member + i * TEAM;",
    ]


def _gather(spec: Spec, number: int, program: source.Program, band: Band) -> tuple[list[str], list[str]]:
    """Tables and statements of a program of the convolution."""
    centre = (spec.kernel_size - 1) // 2
    pairs, count = products(spec, program, band), len(program.fold)
    # Taps that coincide follow each other: first, how many, whether the centre is among them.
    fold = [f"{{{taps[0]}, {len(taps)}, {int(centre in taps)}}}" for taps in program.fold] or ["{0}"]
    places = _table(spec, program, band) or [0]
    tables = [
        f"__device__ const __align__(4) unsigned char fold{number}[{len(fold)}][4] = {{{', '.join(fold)}}};",
        f"__device__ const __align__(8) unsigned char place{number}[{len(places)}] ="
        f" {{{', '.join(map(str, places))}}};",
    ]
    lane, skew = (" + lane", 0) if spec.last else ("", _SKEW if band.steep else 0)
    out = [
        "if (t0 >= t1) break;",
        "Carrier carrier;",
        f"carrier.init(x, {_carried(spec, band, 'in', 'first + (t0 - 1) * LINES')});",
        # The folded weights of this channel, in 16 bits and what that leaves.
        f"u16* const folded = (u16*)stages + warp * {2 * count + 2};",
        "if (channel < count) {",
        f"const {source.parameter(spec.wide)}* const mine = w + (i64)(c0 + channel) * K;",
        f"for (int d = lane; d < {count}; d += 32) {{",
        f"const uchar4 f = *(const uchar4*)fold{number}[d];",
        "float total = f.z ? identity : 0.f;",
        "for (int t = f.x; t < f.x + f.y; ++t) total += to_float(mine[reverse ? K - 1 - t : t]);",
        f"folded[d] = from_float(total); folded[d + {count + 1}] = from_float(total - to_float(folded[d]));",
        "}",
        f"if (lane == 0) folded[{count}] = folded[{2 * count + 1}] = 0;",
        "}",
        "__syncwarp();",
        "const float start = bias && channel < count ? to_float(bias[c0 + channel]) : 0.f;",
        # Three steps of input before the first is computed, a fourth on its way.
        "Carrier::Load next;",
        "{ Carrier::Load l[3];",
        *(f"carrier.load(l[{q}], in, 0); carrier.move(in);" for q in range(3)),
        *(f"carrier.put(l[{q}], frames, {q});" for q in range(3)),
        "}",
        f"u32 m[{max(1, len(pairs))}][4];",
        "#pragma unroll",
        f"for (int p = 0; p < {len(pairs)}; ++p) {{",
        f"const uint2 at = *(const uint2*)(place{number} + (p * 32 + lane) * 8);",
        "m[p][0] = folded[at.x & 255] | (u32)folded[at.x >> 8 & 255] << 16;",
        "m[p][1] = folded[at.x >> 16 & 255] | (u32)folded[at.x >> 24] << 16;",
        "m[p][2] = folded[at.y & 255] | (u32)folded[at.y >> 8 & 255] << 16;",
        "m[p][3] = folded[at.y >> 16 & 255] | (u32)folded[at.y >> 24] << 16;",
        "}",
        "Giver giver;",
        f"giver.init(y + corner, {_carried(spec, band, 'out', 'first + t0 * LINES')});",
        "__syncthreads();",  # the stages held the folded weights
        "carrier.load(next, in, 0);",
        "carrier.move(in);",
        "__syncthreads();",
        "#pragma unroll 1",
        "for (int t = t0; t < t1; ++t) {",
        "const int q = t - t0 + 1;",
        "carrier.put(next, frames, q + 2);",
        "if (t + 1 < t1) { carrier.load(next, in, 0); carrier.move(in); }",
        "if (channel < count) {",
        *_each_group(spec),
        *_rows(spec, band),
        f"u32* const to = stages + ((t & 1) * CHANNELS + channel) * STAGE + j * {skew + 64 * spec.tiles}{lane};",
    ]
    loads = _loads(spec, band, "")
    out += loads[0]
    for tile in range(spec.tiles):
        c = f"c{tile}"
        out.append(f"float {c}[4];" if pairs else f"float {c}[4] = {{start, start, start, start}};")
        for p, blocks in enumerate(pairs):
            right = [_fragment(band.blocks[b][0], band.blocks[b][1] + 2 * tile) if b >= 0 else "0u" for b, _ in blocks]
            out.append(f"MMA16{f'_FIRST({c}, start' if p == 0 else f'({c}'}, m[{p}], {right[0]}, {right[1]});")
        # What the next tile reads is on its way before the sums of this one are waited for.
        out += loads[tile + 1] if tile + 1 < spec.tiles else []
        for i in range(2):
            at = f"{64 * tile + 32 * i}" + ("" if spec.last else f" + (lane ^ {(2 * tile + i) & 3})")
            out.append(f"to[{at}] = to_pair({c}[{2 * i}], {c}[{2 * i + 1}]);")
    out += ["} }", "__syncthreads();", "giver.give(stages + (t & 1) * CHANNELS * STAGE, out);", "}"]
    return tables, out


def _weight(spec: Spec, number: int, program: source.Program, band: Band, most: int) -> tuple[list[str], list[str]]:
    """Tables and statements of a program of the weight gradient."""
    taps = len(program.fold)
    where = [block * 128 + i * 8 + column for uses in band.uses for i, (block, column) in enumerate(uses)]
    # Where registers do not hold the pixels of both on their way, gradients take their turn in the middle of a step.
    turns = not spec.last and 4 * len(band.blocks) + 2 * spec.carried > _MOST_REGISTERS
    turn = "carrier.put(next, grad_frames, q + 2); if (t + 1 < t1) carrier.load(next, in, 0);"
    tables = [f"__device__ const u16 where{number}[{len(where)}] = {{{', '.join(map(str, where))}}};"]
    out = [
        f"float sums[{len(band.blocks)}][4] = {{}}, ones[4] = {{}};",
        "if (t0 < t1) {",
        "const i64 gradients = (const char*)g - (const char*)x;",
        "Carrier carrier;",
        f"carrier.init(x, {_carried(spec, band, 'in', 'first + (t0 - 1) * LINES')});",
        # Three steps of input and two of gradients before the first is computed, another of each on its way.
        "Carrier::Load next, next_g;",
        "{ Carrier::Load l[3], m[2];",
        "carrier.load(l[0], in, 0); carrier.move(in);",
        *(f"carrier.load(l[{q}], in, 0); carrier.load(m[{q - 1}], in, gradients); carrier.move(in);" for q in (1, 2)),
        *(f"carrier.put(l[{q}], frames, {q});" for q in range(3)),
        *(f"carrier.put(m[{q - 1}], grad_frames, {q});" for q in (1, 2)),
        "}",
        f"carrier.load(next, in, 0); {'' if turns else 'carrier.load(next_g, in, gradients); carrier.move(in);'}",
        "__syncthreads();",
        "#pragma unroll 1",
        "for (int t = t0; t < t1; ++t) {",
        "const int q = t - t0 + 1;",
        "carrier.put(next, frames, q + 2);",
    ]
    if turns:
        out.append("carrier.load(next, in, gradients); carrier.move(in);")
    else:
        out += [
            "carrier.put(next_g, grad_frames, q + 2);",
            "if (t + 1 < t1) { carrier.load(next, in, 0); carrier.load(next_g, in, gradients); carrier.move(in); }",
        ]
    mine = spec.groups // spec.team
    out += [
        "if (channel < count) {",
        *_each_group(spec),
        *([f"if (i == {mine // 2}) {{ {turn} }}"] if turns and mine > 1 else []),
        *_rows(spec, band),
        f"const u32 row_g = grad_frame + (row & (RING - 1)) * {2 * spec.pitch};",
    ]

    def grads(tile: int) -> str:
        names = ", ".join(f"g{tile}_{i}" for i in range(4))
        return f'u32 {names}; LDSM(".trans", row_g + {32 * tile}, {names});'

    left = [f"g{t - t % 2}_{t % 2 * 2}, g{t - t % 2}_{t % 2 * 2 + 1}" for t in range(spec.tiles)]
    ones = [f"MMA8(ones, {g}, ONES);" for g in left]
    if spec.last:
        for tile, loads in enumerate(_loads(spec, band, ".trans")):
            out += loads
            if tile % 2 == 0:
                out.append(grads(tile))
            out += [
                f"MMA8(sums[{b}], {left[tile]}, {_fragment(e, k + 2 * tile)});" for b, (e, k) in enumerate(band.blocks)
            ]
            out.append(ones[tile])
    else:
        # Two tiles at a time, by columns of the frame: few of its matrices are kept.
        at = {block: b for b, block in enumerate(band.blocks)}
        for start in range(0, spec.tiles, 4):
            tiles = range(start, min(start + 4, spec.tiles))
            out += ["{", *(grads(t) for t in tiles if t % 2 == 0), *(ones[tile] for tile in tiles)]
            for i, e in enumerate(es := sorted({e for e, _ in band.blocks})):
                if turns and mine == 1 and i == len(es) // 2:
                    out.append(turn)
                ks = [k + 2 * tile for f, k in band.blocks if f == e for tile in tiles]
                for first in range(min(ks), max(ks) + 1, 4):
                    names = ", ".join(_fragment(e, first + i) for i in range(4))
                    out.append(f'u32 {names}; LDSM(".trans", row{e + _LIFT} + {16 * first}, {names});')
                    for k, tile in itertools.product(range(first, first + 4), tiles):
                        if (e, k - 2 * tile) in at:
                            out.append(f"MMA8(sums[{at[e, k - 2 * tile]}], {left[tile]}, {_fragment(e, k)});")
            out.append("}")
    out += [
        "} }",
        *(["else {", turn, "}"] if turns else []),
        "__syncthreads();",
        "} }",
        # A tap's gradient is spread over the matrices as its weight is in the convolution's.
        "__syncthreads();",
        f"float total[{-(-taps // 32)}] = {{}};",
        f"float* const mine = (float*)memory + warp * {_CHUNK * 128};",
        "if (channel < count) {",
    ]
    for chunk in range(0, len(band.blocks), _CHUNK):
        part = range(chunk, min(chunk + _CHUNK, len(band.blocks)))
        for b in part:
            to = f"mine + {(b - chunk) * 128} + (lane >> 2) * 8 + (lane & 3) * 2"
            out.append(f"*(float2*)({to}) = make_float2(sums[{b}][0], sums[{b}][1]);")
            out.append(f"*(float2*)({to} + 64) = make_float2(sums[{b}][2], sums[{b}][3]);")
        out += [
            "__syncwarp();",
            f"for (int d = lane; d < {taps}; d += 32) for (int i = 0; i < 16; ++i) {{",
            f"const u32 at = where{number}[d * 16 + i] - {chunk * 128}u;",
            f"if (at < {len(part) * 128}u) total[d / 32] += mine[at]; }}",
            "__syncwarp();",
        ]
    out += [
        f"float* const to = partial + ((i64)(part + member) * C + c0 + channel) * {most + 1};",
        f"for (int d = lane; d < {taps}; d += 32) to[d] = total[d / 32];",
        # Every column of the product with ones is the sum; lanes with the first column add their rows.
        "float rows = (lane & 3) == 0 ? ones[0] + ones[2] : 0.f;",
        "for (int k = 16; k; k /= 2) rows += __shfl_down_sync(0xffffffffu, rows, k);",
        f"if (lane == 0) to[{most}] = rows;",
        "}",
    ]
    return tables, out


def _source(spec: Spec) -> str:
    weight = spec.kind == "weight"
    all_programs = programs(spec)
    most = max(len(program.fold) for program, _ in all_programs)
    tables, cases = [], []
    for number, (program, band) in enumerate(all_programs):
        written = _weight(spec, number, program, band, most) if weight else _gather(spec, number, program, band)
        tables += written[0]
        cases += [f"case {number}: {{", *_geometry(spec, program, band), *written[1], "break; }"]
    defines = {
        "K": spec.weights,
        "VECTOR": spec.vector,
        "CHANNELS": spec.channels,
        "TEAM": spec.team,
        "TILES": spec.tiles,
        "GROUPS": spec.groups,
        "HALO": spec.halo,
        "WHOLE": int(spec.whole),
        "PITCH": spec.pitch,
        "PLANE": spec.plane_bytes,
        "STAGE": spec.stage_words,
        "SPAN": min(8 * spec.groups, _SPAN),
        "SKEW": _SKEW,
        "MMA_T": '"bf16"' if spec.dtype == "bf16" else '"f16"',
        "ONES": "0x3f803f80u" if spec.dtype == "bf16" else "0x3c003c00u",
    }
    pair = "to_bf16x2(a, b)" if spec.dtype == "bf16" else "(u32)to_half(a) | (u32)to_half(b) << 16"
    if weight:
        head, tail = "const T* __restrict__ x, const T* __restrict__ g, float* __restrict__ partial,", ""
        # Blocks without work leave zeros to the second stage.
        setup = f"""const int part = (split * strips + strip) * TEAM;
    for (int i = threadIdx.x; i < count * {most + 1}; i += blockDim.x) for (int s = 0; s < TEAM; ++s)
        partial[((i64)(part + s) * C + c0 + i / {most + 1}) * {most + 1} + i % {most + 1}] = 0.f;
    unsigned char* const grad_frames = memory + CHANNELS * PLANE + 128;
    const u32 grad_frame = frame + CHANNELS * PLANE + 128;"""
    else:
        head = source.gather_arguments(spec.wide)
        tail = ", i64 reverse, i64 identity_"
        setup = """const float identity = (float)identity_;
    u32* const stages = (u32*)(memory + CHANNELS * PLANE + 128);"""
    parts = [
        source._PRELUDE,
        source.types(spec.dtype, spec.wide),
        "\n".join(f"#define {name} {value}" for name, value in defines.items()),
        f"__device__ __forceinline__ u32 to_pair(float a, float b) {{ return {pair}; }}",
        _HEAD,
        _CARRY if spec.last else _CARRY_PLANES,
        "" if weight else _GIVE if spec.last else _GIVE_PLANES,
        _PRODUCTS,
        *tables,
        f"""
extern "C" __global__ void __launch_bounds__(THREADS, 1) {spec.functions["run"]}(
    {head}
    const int* __restrict__ table, i64 N_, i64 C_, i64 hi_, i64 wi_, i64 ho_, i64 wo_, i64 by_image{tail})
{{
    extern __shared__ __align__(128) unsigned char memory[];
    const int C = (int)C_, hi = (int)hi_, wi = (int)wi_, ho = (int)ho_, wo = (int)wo_;
    const int strip = blockIdx.x, strips = gridDim.x;
    const int* const entry = table + 5 * blockIdx.y;
    const int program = entry[0], c0 = entry[1], count = {"CHANNELS" if spec.full else "entry[2]"}, split = entry[3], splits = entry[4];
    // A block has every `jump`-th image, or a part of the lines of all.
    const int jump = by_image ? splits : 1, N = by_image ? ((int)N_ - split + splits - 1) / splits : (int)N_;
    x += by_image ? (i64)split * hi * wi * C : 0;
    {"g" if weight else "y"} += by_image ? (i64)split * ho * wo * C : 0;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int member = TEAM == 1 ? 0 : warp / CHANNELS, channel = TEAM == 1 ? warp : warp % CHANNELS;
    unsigned char* const frames = memory;
    const u32 frame = shared(memory) + channel * PLANE + {"((warp / VECTOR) & 1) * 64 + " if spec.last else ""}HALO * 2 + (lane >> 3) * 16;
    for (int i = threadIdx.x; i < {2 if weight else 1} * (CHANNELS * PLANE + 128) / 16; i += blockDim.x)
        ((uint4*)memory)[i] = make_uint4(0, 0, 0, 0);
    {setup}
    __syncthreads();
    switch (program) {{""",
        *cases,
        "    }\n}",
        source.reduce(_plain(spec), 5, "row[3] == 0 ? row[4] * parts : -1") if weight else "",
    ]
    return "\n".join(parts)
