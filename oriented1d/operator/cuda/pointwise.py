"""CUDA C++ of a pointwise layer followed by an oriented one, as one dense convolution of the image on tensor cores.

Both are linear, so channel ``c`` takes from each tap and image channel ``i`` the weight ``projection[c, i] *
weight[c, t]``. The bias of the pointwise layer is the weight of one more image channel, which is 1 inside the image.
Four numbers a pixel are 8 bytes, and four taps fill the inner side of a 16 x 8 x 16 product: its rows are 16 outputs
next to each other, its columns 8 channels of one angle. A warp keeps the weights of its 8 channels in registers; the
warps of a block, one for each 8 channels, share a tile of the image.

Nothing here depends on the angles, which arrive as a table: for each 8 channels, the distance of each distinct tap, in
pixels of the tile, with the taps that fall on it.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from oriented1d.geometry import LayerTaps
from oriented1d.operator.cuda import compiler, source

MOST_IN = 3  # channels of the image
_GROUP = 8  # channels of a warp
_TILE = 16  # outputs, both ways
_MOST_PARTS = 2  # blocks of a processor that share out a weight gradient


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    Attributes:
        kind: ``"forward"`` or ``"weight"``.
        image: dtype of the image, ``"float"`` or ``"bf16"``.
        channels: of the image.
        kernel_size, stride: of the oriented layer.
        reach: pixels that a tap can be away.
        warps: of a block.
        steps: products that the distinct taps fill.
    """

    kind: str
    image: str
    channels: int
    kernel_size: int
    stride: int
    reach: int
    warps: int
    steps: int

    @property
    def side(self) -> int:
        """Pixels of a tile, both ways."""
        return (_TILE - 1) * self.stride + 1 + 2 * self.reach

    @property
    def pitch(self) -> int:
        return self.side | 1  # odd: neighbouring rows lie in different banks

    @property
    def shared_bytes(self) -> int:
        frame = -(-self.side * self.pitch * 8 // 16) * 16
        return frame + (_TILE * _TILE * (16 * self.warps + 16) if self.kind == "weight" else 0)

    @property
    def text(self) -> str:
        return _source(self)

    @property
    def functions(self) -> tuple[str, ...]:
        return ("run", "reduce") if self.kind == "weight" else ("run",)


def unsupported(
    device: torch.device, dtype: torch.dtype, image: torch.dtype, channels: int, taps: LayerTaps, stride: int
) -> str | None:
    """Why these kernels cannot run such a pair of layers; None if they can.

    ``dtype`` is that of the output; ``channels`` are those of the image.
    """
    if dtype != torch.bfloat16 or image not in (torch.float32, torch.bfloat16):
        return f"{image} to {dtype}"
    if channels > MOST_IN:
        return f"more than {MOST_IN} image channels"
    if any(run.start % _GROUP or run.stop % _GROUP for run in taps.runs):
        return f"channels of an angle that are no multiple of {_GROUP}"
    if stride > 3 or taps.kernel_size > 31:
        return "a stride over 3 or a kernel size over 31"
    reason = compiler.unavailable(device)
    if reason is None and compiler.capability(device) < (8, 0):
        reason = "compute capability under 8.0"
    return reason


@dataclasses.dataclass
class _Plan:
    spec: Spec
    code: compiler.Compiled
    table: compiler.DeviceArray
    resident: int  # blocks in one launch, at most


@functools.lru_cache(maxsize=256)
def _plan(kind: str, dtype: torch.dtype, channels: int, taps: LayerTaps, stride: int, device: torch.device) -> _Plan:
    reach = max(int(np.abs(run.distinct).max(initial=0)) for run in taps.runs)
    most = max(len(run.distinct) for run in taps.runs)
    groups = taps.channels // _GROUP
    warps = next(number for number in (8, 4, 2, 1) if groups % number == 0)
    image = {torch.float32: "float", torch.bfloat16: "bf16"}[dtype]
    spec = Spec(kind, image, channels, taps.kernel_size, stride, reach, warps, -(-most // 4))
    code = compiler.compile(spec, device)
    code.reserve("run", spec.shared_bytes, device)
    processors, memory = compiler.limits(device)
    fitting = max(1, min(2048 // (32 * warps), memory // (spec.shared_bytes + 1024)))
    resident = processors * min(fitting, _MOST_PARTS if kind == "weight" else 4)
    return _Plan(spec, code, compiler.DeviceArray(_table(spec, taps), device), resident)


def _table(spec: Spec, taps: LayerTaps) -> np.ndarray:
    """For each group of channels and place of a tap: the distance in pixels, the first tap that falls there, how many
    do (coinciding taps follow each other). Then for each group and tap its place."""
    groups = taps.channels // _GROUP
    table = np.zeros((groups, 4 * spec.steps, 4), dtype=np.int32)
    places = np.zeros((groups, taps.kernel_size), dtype=np.int32)
    for run in taps.runs:
        mine = slice(run.start // _GROUP, run.stop // _GROUP)
        places[mine] = run.fold
        for place, (dy, dx) in enumerate(run.distinct.tolist()):
            where = np.flatnonzero(run.fold == place)
            table[mine, place] = dy * spec.pitch + dx, where[0], len(where), 0
    return np.concatenate([table.ravel(), places.ravel()])


def _launch(plan: _Plan, image: Tensor, size: tuple[int, int], channels: int, blocks: int, *pointers: int) -> None:
    n, _, height, width = image.shape
    grid = (blocks, channels // (_GROUP * plan.spec.warps), 1)
    config = compiler.config(grid, 32 * plan.spec.warps, plan.spec.shared_bytes)
    table = int(plan.table.pointer)
    arguments = *image.stride(), n, height, width, *size, *_tiles(size), channels
    plan.code.launch("run", config, image.data_ptr(), *pointers, table, *arguments)


def _tiles(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // _TILE), -(-size[1] // _TILE)


def _blocks(plan: _Plan, images: int, size: tuple[int, int], channels: int) -> int:
    """Blocks that share out the tiles of all images, for each group of ``warps``."""
    down, along = _tiles(size)
    return max(1, min(plan.resident * plan.spec.warps * _GROUP // channels, images * down * along))


def forward(
    image: Tensor,
    projection: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    taps: LayerTaps,
    stride: int,
    dtype: torch.dtype,
) -> Tensor:
    """``(N, I, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``, channels_last.

    ``projection (C, I)`` and ``offset (C,)`` are the pointwise layer, ``weight (C, K)`` and ``bias (C,)`` the oriented
    one.
    """
    n, i, height, width = image.shape
    size = -(-height // stride), -(-width // stride)
    shape = n, taps.channels, *size
    output = torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)
    if output.numel() == 0:
        return output
    parameters = [None if t is None else t.float().contiguous() for t in (projection, offset, weight, bias)]
    with compiler.current(image.device):
        plan = _plan("forward", image.dtype, i, taps, stride, image.device)
        pointers = [0 if t is None else t.data_ptr() for t in parameters]
        blocks = _blocks(plan, n, size, taps.channels)
        _launch(plan, image, size, taps.channels, blocks, output.data_ptr(), *pointers)
    return output


def correlation(grad_output: Tensor, image: Tensor, taps: LayerTaps, stride: int) -> Tensor:
    """Sums over all outputs of the gradient times what each tap reads: float32 ``(C, K, I + 1)``, the image's channels
    and 1 inside the image."""
    n, i, _, _ = image.shape
    c, kernel_size = taps.channels, taps.kernel_size
    result = torch.empty((c, kernel_size, i + 1), dtype=torch.float32, device=image.device)
    if grad_output.numel() == 0:
        return result.zero_()
    g = grad_output.contiguous(memory_format=torch.channels_last)
    size = g.shape[2], g.shape[3]
    with compiler.current(image.device):
        plan = _plan("weight", image.dtype, i, taps, stride, image.device)
        blocks = _blocks(plan, n, size, c)
        partial = torch.empty((blocks, c, 4 * plan.spec.steps, 4), dtype=torch.float32, device=image.device)
        _launch(plan, image, size, c, blocks, g.data_ptr(), partial.data_ptr())
        config = compiler.config((-(-c * kernel_size // 8), 1, 1), 256, 0)
        pointers = partial.data_ptr(), result.data_ptr(), int(plan.table.pointer)
        plan.code.launch("reduce", config, *pointers, blocks, c)
    return result


_CODE = r"""
#define PIXELS (SIDE * SIDE)
#define MMA(d, a0, a1, a2, a3, b0, b1) \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 " \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
__device__ __forceinline__ u32 word(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The tile of the image whose first output is (y, x): four numbers a pixel, zeros outside.
__device__ __forceinline__ void fill(uint2* frame, const T* image, i64 sc, i64 sh, i64 sw, int H, int W, int y, int x) {
    y = y * STRIDE - REACH; x = x * STRIDE - REACH;
    for (int i = threadIdx.x; i < PIXELS; i += THREADS) {
        const int r = i / SIDE, c = i - r * SIDE;
        uint2 pixel = make_uint2(0, 0);
        if ((u32)(y + r) < (u32)H && (u32)(x + c) < (u32)W) {
            const T* p = image + (y + r) * sh + (x + c) * sw;
            float v[4] = {};
            #pragma unroll
            for (int j = 0; j < IN; ++j) v[j] = to_float(p[j * sc]);
            v[IN] = 1.f;
            pixel = make_uint2(to_bf16x2(v[0], v[1]), to_bf16x2(v[2], v[3]));
        }
        frame[r * PITCH + c] = pixel;
    }
}
"""

_FORWARD = r"""
extern "C" __global__ void __launch_bounds__(THREADS) run(
    const T* __restrict__ image, u16* __restrict__ y,
    const float* __restrict__ projection, const float* __restrict__ offset,
    const float* __restrict__ weight, const float* __restrict__ bias, const int4* __restrict__ table,
    i64 sn, i64 sc, i64 sh, i64 sw, i64 N, i64 H, i64 W, i64 ho, i64 wo, i64 down, i64 along, i64 C)
{
    extern __shared__ __align__(16) uint2 frame[];
    const int lane = threadIdx.x % 32, group = blockIdx.y * WARPS + threadIdx.x / 32;
    // Rows of a product are outputs lane / 4 and 8 more; of four numbers of four taps this lane has two of two.
    const int c = group * 8 + lane / 4, half = lane % 2;
    u32 w[STEPS][2], from[STEPS][2];
    #pragma unroll
    for (int s = 0; s < STEPS; ++s)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int4 tap = table[group * STEPS * 4 + s * 4 + (lane % 4) / 2 + 2 * h];
            float total = 0.f, v[2];
            for (int t = tap.y; t < tap.y + tap.z; ++t) total += weight[c * K + t];
            #pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int i = 2 * half + j;
                v[j] = total * (i < IN ? projection[c * IN + i] : i == IN && offset ? offset[c] : 0.f);
            }
            w[s][h] = to_bf16x2(v[0], v[1]);
            from[s][h] = shared(frame) + (REACH * PITCH + REACH + tap.x + lane / 4 * STRIDE) * 8 + half * 4;
        }
    const int mine = group * 8 + lane % 4 * 2;
    const float b0 = bias ? bias[mine] : 0.f, b1 = bias ? bias[mine + 1] : 0.f;
    for (i64 tile = blockIdx.x; tile < N * down * along; tile += gridDim.x) {
        const int n = (int)(tile / (down * along)), rest = (int)(tile - n * (down * along));
        const int py = rest / (int)along * 16, px = rest % (int)along * 16;
        fill(frame, image + n * sn, sc, sh, sw, (int)H, (int)W, py, px);
        __syncthreads();
        u16* to = y + ((n * ho + py) * wo + px + lane / 4) * C + mine;
        const bool there = px + lane / 4 < wo, too = px + lane / 4 + 8 < wo;
        #pragma unroll 4
        for (int r = 0; r < 16; ++r) {
            float d[4] = {b0, b1, b0, b1};
            #pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const u32 a = from[s][0] + r * (STRIDE * PITCH * 8), b = from[s][1] + r * (STRIDE * PITCH * 8);
                MMA(d, word(a), word(a + 64 * STRIDE), word(b), word(b + 64 * STRIDE), w[s][0], w[s][1]);
            }
            if (there && py + r < ho) *(u32*)to = to_bf16x2(d[0], d[1]);
            if (too && py + r < ho) *(u32*)(to + 8 * C) = to_bf16x2(d[2], d[3]);
            to += wo * C;
        }
        __syncthreads();
    }
}
"""

_WEIGHT = r"""
#define GRAD_PITCH (16 * WARPS + 16)  // bytes: rows of eight outputs fill all banks
extern "C" __global__ void __launch_bounds__(THREADS) run(
    const T* __restrict__ image, const u16* __restrict__ g, float* __restrict__ partial, const int4* __restrict__ table,
    i64 sn, i64 sc, i64 sh, i64 sw, i64 N, i64 H, i64 W, i64 ho, i64 wo, i64 down, i64 along, i64 C)
{
    extern __shared__ __align__(16) uint2 frame[];
    unsigned char* const grads = (unsigned char*)frame + (SIDE * PITCH * 8 + 15) / 16 * 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = blockIdx.y * WARPS + warp;
    // Rows lane / 4 and 8 more of a product are two numbers of one tap; columns of the left matrix are outputs.
    u32 from[STEPS];
    float sums[STEPS][4] = {};
    #pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int4 tap = table[group * STEPS * 4 + s * 4 + lane / 8];
        from[s] = shared(frame) + (REACH * PITCH + REACH + tap.x + lane % 4 * 2 * STRIDE) * 8 + (lane / 4) % 2 * 4;
    }
    const u32 from_g = shared(grads) + (lane & 15) * GRAD_PITCH + warp * 16;
    for (i64 tile = blockIdx.x; tile < N * down * along; tile += gridDim.x) {
        const int n = (int)(tile / (down * along)), rest = (int)(tile - n * (down * along));
        const int py = rest / (int)along * 16, px = rest % (int)along * 16;
        #pragma unroll 4
        for (int i = threadIdx.x; i < 256 * WARPS; i += THREADS) {
            const int part = i % WARPS, at = i / WARPS, r = py + at / 16, q = px + at % 16;
            uint4 v = make_uint4(0, 0, 0, 0);
            const u16* const from = g + ((n * ho + r) * wo + q) * C + (blockIdx.y * WARPS + part) * 8;
            if (r < ho && q < wo) v = *(const uint4*)from;
            *(uint4*)(grads + at * GRAD_PITCH + part * 16) = v;
        }
        fill(frame, image + n * sn, sc, sh, sw, (int)H, (int)W, py, px);
        __syncthreads();
        #pragma unroll 2
        for (int r = 0; r < 16; ++r) {
            u32 g0, g1;
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                : "=r"(g0), "=r"(g1) : "r"(from_g + r * (16 * GRAD_PITCH)));
            #pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const u32 a = from[s] + r * (STRIDE * PITCH * 8);
                const u32 p = word(a), q = word(a + 8 * STRIDE), u = word(a + 64 * STRIDE), v = word(a + 72 * STRIDE);
                MMA(sums[s], __byte_perm(p, q, 0x5410), __byte_perm(p, q, 0x7632),
                    __byte_perm(u, v, 0x5410), __byte_perm(u, v, 0x7632), g0, g1);
            }
        }
        __syncthreads();
    }
    #pragma unroll
    for (int s = 0; s < STEPS; ++s)
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int c = group * 8 + lane % 4 * 2 + j % 2, tap = s * 4 + lane / 8, i = (lane / 4) % 2 * 2 + j / 2;
            partial[((blockIdx.x * C + c) * (STEPS * 4) + tap) * 4 + i] = sums[s][j];
        }
}

// A warp has 8 x 4 threads for one tap of a channel: every eighth part, the four numbers of a pixel.
extern "C" __global__ void __launch_bounds__(256) reduce(
    const float* __restrict__ partial, float* __restrict__ result, const int* __restrict__ table, i64 parts, i64 C)
{
    const int at = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, i = lane % 4;
    if (at >= C * K) return;
    const int c = at / K, t = at - c * K, place = table[C / 8 * STEPS * 16 + c / 8 * K + t];
    float total = 0.f;
    #pragma unroll 8
    for (int part = lane / 4; part < parts; part += 8)
        total += partial[((part * C + c) * (STEPS * 4) + place) * 4 + i];
    for (int k = 16; k >= 4; k /= 2) total += __shfl_down_sync(0xffffffffu, total, k);
    if (lane <= IN) result[at * (IN + 1) + lane] = total;
}
"""


def _source(spec: Spec) -> str:
    defines = {
        "IN": spec.channels,
        "K": spec.kernel_size,
        "STRIDE": spec.stride,
        "REACH": spec.reach,
        "WARPS": spec.warps,
        "THREADS": 32 * spec.warps,
        "STEPS": spec.steps,
        "SIDE": spec.side,
        "PITCH": spec.pitch,
    }
    parts = [
        source._PRELUDE,
        source._TYPES[spec.image],
        "\n".join(f"#define {name} {value}" for name, value in defines.items()),
        _CODE,
        _WEIGHT if spec.kind == "weight" else _FORWARD,
    ]
    return "\n".join(parts)
