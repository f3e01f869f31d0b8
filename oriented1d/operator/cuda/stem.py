"""CUDA C++ of the stem's first half: a pointwise layer, an oriented one, LayerNorm over the channels, GELU.

The first two are linear, so channel ``c`` takes from each tap and image channel ``i`` the weight ``projection[c, i] *
weight[c, t]``. The bias of the pointwise layer is the weight of one more image channel, which is 1 inside the image.
Four numbers a pixel are 8 bytes, and four taps fill the inner side of a 16 x 8 x 16 product: its rows are 16 outputs
next to each other, its columns 8 channels of one angle. A warp keeps the weights of its 8 channels in registers; the
warps of a block, one for each 8 channels, share a tile of the image.

LayerNorm and GELU happen on the way out, when a block has all channels of a tile of outputs in shared memory; in the
backward pass, on the way in.

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
_RESIDENT = {"forward": 3, "backward": 2}  # blocks of a processor, for which the compiler keeps registers


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    Attributes:
        kind: ``"forward"`` or ``"backward"``.
        image: dtype of the image, ``"float"`` or ``"bf16"``.
        channels: of the image.
        kernel_size, stride: of the oriented layer.
        reach: pixels that a tap can be away.
        warps: of a block; each has 8 channels.
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
        return frame + _TILE * _TILE * (16 * self.warps + 16)

    @property
    def text(self) -> str:
        return _source(self)

    @property
    def functions(self) -> dict[str, str]:
        names = ("run",) if self.kind == "forward" else ("run", "reduce", "reduce_norm")
        return {name: f"oriented_stem_{self.kind if name == 'run' else name}" for name in names}


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
    if taps.channels > 64 or taps.channels & (taps.channels - 1):
        return "channels other than 8, 16, 32 or 64"
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
    image = {torch.float32: "float", torch.bfloat16: "bf16"}[dtype]
    spec = Spec(kind, image, channels, taps.kernel_size, stride, reach, taps.channels // _GROUP, -(-most // 4))
    code = compiler.compile(spec, device)
    code.reserve("run", spec.shared_bytes, device)
    processors, memory = compiler.limits(device)
    resident = max(1, min(_RESIDENT[kind] * 8 // spec.warps, memory // (spec.shared_bytes + 1024)))
    return _Plan(spec, code, compiler.DeviceArray(_table(spec, taps), device), processors * resident)


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


def _launch(plan: _Plan, image: Tensor, size: tuple[int, int], blocks: int, eps: float, *pointers: int) -> None:
    n, _, height, width = image.shape
    config = compiler.config((blocks, 1, 1), 32 * plan.spec.warps, plan.spec.shared_bytes)
    table, bits = plan.table.pointer, int(np.float32(eps).view(np.int32))
    arguments = *image.stride(), n, height, width, *size, *_tiles(size), bits
    plan.code.launch("run", config, image.data_ptr(), *pointers, table, *arguments)


def _tiles(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // _TILE), -(-size[1] // _TILE)


def _blocks(plan: _Plan, images: int, size: tuple[int, int]) -> int:
    """Blocks that share out the tiles of all images."""
    down, along = _tiles(size)
    return min(plan.resident, images * down * along)


def forward(
    image: Tensor,
    parameters: tuple[Tensor | None, ...],
    eps: float,
    taps: LayerTaps,
    stride: int,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``(N, I, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``, channels_last.

    ``parameters`` are ``projection (C, I)`` and ``offset (C,)`` of the pointwise layer, ``weight (C, K)`` and ``bias
    (C,)`` of the oriented one, weight and bias ``(C,)`` of LayerNorm. With ``keep`` the second result is what LayerNorm
    read.
    """
    n, i, height, width = image.shape
    size = -(-height // stride), -(-width // stride)
    shape = n, taps.channels, *size
    output = torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)
    conv = torch.empty_like(output) if keep else output.new_empty(0)
    if output.numel() == 0:
        return output, conv
    floats = [None if t is None else t.float().contiguous() for t in parameters]
    with compiler.current(image.device):
        plan = _plan("forward", image.dtype, i, taps, stride, image.device)
        pointers = [0 if t is None else t.data_ptr() for t in (output, conv if keep else None, *floats)]
        _launch(plan, image, size, _blocks(plan, n, size), eps, *pointers)
    return output, conv


def backward(
    grad_output: Tensor,
    conv: Tensor,
    image: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    taps: LayerTaps,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all outputs of the gradient (before LayerNorm) times what each tap reads: ``(C, K, I + 1)``, the
    image's channels and 1 inside the image. Gradients ``(C,)`` of LayerNorm's weight and bias. All float32."""
    n, i, _, _ = image.shape
    c, kernel_size = taps.channels, taps.kernel_size
    sums = torch.empty((c, kernel_size, i + 1), dtype=torch.float32, device=image.device)
    norm = torch.empty((2, c), dtype=torch.float32, device=image.device)
    if grad_output.numel() == 0:
        norm.zero_()
        return sums.zero_(), norm[0], norm[1]
    g = grad_output.to(conv.dtype).contiguous(memory_format=torch.channels_last)
    floats = [t.float().contiguous() for t in (norm_weight, norm_bias)]
    size = g.shape[2], g.shape[3]
    with compiler.current(image.device):
        plan = _plan("backward", image.dtype, i, taps, stride, image.device)
        blocks = _blocks(plan, n, size)
        partial = torch.empty((blocks, c, 4 * plan.spec.steps, 4), dtype=torch.float32, device=image.device)
        partial_norm = torch.empty((blocks, 2, c), dtype=torch.float32, device=image.device)
        pointers = [t.data_ptr() for t in (g, conv, *floats, partial, partial_norm)]
        _launch(plan, image, size, blocks, eps, *pointers)
        config = compiler.config((-(-c * kernel_size // 8), 1, 1), 256, 0)
        plan.code.launch("reduce", config, partial.data_ptr(), sums.data_ptr(), plan.table.pointer, blocks)
        config = compiler.config((2 * c, 1, 1), 32, 0)
        plan.code.launch("reduce_norm", config, partial_norm.data_ptr(), norm.data_ptr(), blocks)
    return sums, norm[0], norm[1]


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

// LayerNorm over the channels of a pixel: WARPS threads next to each other have eight each.
struct Norm {
    float w[8], b[8], eps;
    int part;
    __device__ __forceinline__ Norm(const float* weight, const float* bias, i64 bits)
        : eps(__int_as_float((int)bits)), part(threadIdx.x % WARPS) {
        #pragma unroll
        for (int j = 0; j < 8; ++j) { w[j] = weight[part * 8 + j]; b[j] = bias[part * 8 + j]; }
    }
    __device__ __forceinline__ float mean(float v) const {
        #pragma unroll
        for (int k = WARPS / 2; k; k /= 2) v += __shfl_xor_sync(0xffffffffu, v, k);
        return v * (1.f / CHANNELS);
    }
    __device__ __forceinline__ void statistics(const float (&x)[8], float& centre, float& scale) const {
        float v = 0.f;
        #pragma unroll
        for (int j = 0; j < 8; ++j) v += x[j];
        centre = mean(v);
        v = 0.f;
        #pragma unroll
        for (int j = 0; j < 8; ++j) v += (x[j] - centre) * (x[j] - centre);
        scale = rsqrtf(mean(v) + eps);
    }
    static __device__ __forceinline__ void read(const uint4& v, float (&x)[8]) {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int j = 0; j < 4; ++j) { x[2 * j] = bf16_low(words[j]); x[2 * j + 1] = bf16_high(words[j]); }
    }
    static __device__ __forceinline__ uint4 write(const float (&x)[8]) {
        return make_uint4(to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3]), to_bf16x2(x[4], x[5]), to_bf16x2(x[6], x[7]));
    }
};
"""

_FORWARD = r"""
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) oriented_stem_forward(
    const T* __restrict__ image, u16* __restrict__ z, u16* __restrict__ y,
    const float* __restrict__ projection, const float* __restrict__ offset,
    const float* __restrict__ weight, const float* __restrict__ bias,
    const float* __restrict__ norm_weight, const float* __restrict__ norm_bias, const int4* __restrict__ table,
    i64 sn, i64 sc, i64 sh, i64 sw, i64 N, i64 H, i64 W, i64 ho, i64 wo, i64 down, i64 along, i64 eps)
{
    extern __shared__ __align__(16) uint2 frame[];
    unsigned char* const outs = (unsigned char*)frame + FRAME;
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
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
        unsigned char* to = outs + lane / 4 * OUT_PITCH + mine * 2;
        #pragma unroll 4
        for (int r = 0; r < 16; ++r) {
            float d[4] = {b0, b1, b0, b1};
            #pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const u32 a = from[s][0] + r * (STRIDE * PITCH * 8), b = from[s][1] + r * (STRIDE * PITCH * 8);
                MMA(d, word(a), word(a + 64 * STRIDE), word(b), word(b + 64 * STRIDE), w[s][0], w[s][1]);
            }
            *(u32*)(to + r * 16 * OUT_PITCH) = to_bf16x2(d[0], d[1]);
            *(u32*)(to + (r * 16 + 8) * OUT_PITCH) = to_bf16x2(d[2], d[3]);
        }
        __syncthreads();
        const Norm norm(norm_weight, norm_bias, eps);
        #pragma unroll 1
        for (int at = threadIdx.x / WARPS; at < 256; at += 32) {
            const int r = py + at / 16, q = px + at % 16;
            const uint4 v = *(const uint4*)(outs + at * OUT_PITCH + norm.part * 16);
            float x[8], mean, scale;
            norm.read(v, x);
            norm.statistics(x, mean, scale);
            if (r < ho && q < wo) {
                const i64 there = ((n * ho + r) * wo + q) * CHANNELS + norm.part * 8;
                if (y) *(uint4*)(y + there) = v;
                #pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float u = (x[j] - mean) * scale * norm.w[j] + norm.b[j];
                    x[j] = 0.5f * u * (1.f + erff(u * 0.70710678f));
                }
                *(uint4*)(z + there) = norm.write(x);
            }
        }
    }
}
"""

_BACKWARD = r"""
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) oriented_stem_backward(
    const T* __restrict__ image, const u16* __restrict__ g, const u16* __restrict__ y,
    const float* __restrict__ norm_weight, const float* __restrict__ norm_bias,
    float* __restrict__ partial, float* __restrict__ partial_norm, const int4* __restrict__ table,
    i64 sn, i64 sc, i64 sh, i64 sw, i64 N, i64 H, i64 W, i64 ho, i64 wo, i64 down, i64 along, i64 eps)
{
    extern __shared__ __align__(16) uint2 frame[];
    unsigned char* const grads = (unsigned char*)frame + FRAME;
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    // Rows lane / 4 and 8 more of a product are two numbers of one tap; columns of the left matrix are outputs.
    u32 from[STEPS];
    float sums[STEPS][4] = {};
    #pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int4 tap = table[group * STEPS * 4 + s * 4 + lane / 8];
        from[s] = shared(frame) + (REACH * PITCH + REACH + tap.x + lane % 4 * 2 * STRIDE) * 8 + (lane / 4) % 2 * 4;
    }
    const u32 from_g = shared(grads) + (lane & 15) * OUT_PITCH + group * 16;
    const Norm norm(norm_weight, norm_bias, eps);
    float of_w[8] = {}, of_b[8] = {};
    for (i64 tile = blockIdx.x; tile < N * down * along; tile += gridDim.x) {
        const int n = (int)(tile / (down * along)), rest = (int)(tile - n * (down * along));
        const int py = rest / (int)along * 16, px = rest % (int)along * 16;
        #pragma unroll 2
        for (int at = threadIdx.x / WARPS; at < 256; at += 32) {
            const int r = py + at / 16, q = px + at % 16;
            uint4 v = make_uint4(0, 0, 0, 0), v_y = v;
            if (r < ho && q < wo) {
                const i64 there = ((n * ho + r) * wo + q) * CHANNELS + norm.part * 8;
                v = *(const uint4*)(g + there);
                v_y = *(const uint4*)(y + there);
            }
            float gu[8], x[8], mean, scale, a = 0.f, b = 0.f;
            norm.read(v, gu);
            norm.read(v_y, x);
            norm.statistics(x, mean, scale);
            #pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[j] = (x[j] - mean) * scale;
                const float u = x[j] * norm.w[j] + norm.b[j];
                gu[j] *= 0.5f * (1.f + erff(u * 0.70710678f)) + u * 0.39894228f * __expf(-0.5f * u * u);
                of_w[j] += gu[j] * x[j];
                of_b[j] += gu[j];
                gu[j] *= norm.w[j];
                a += gu[j];
                b += gu[j] * x[j];
            }
            a = norm.mean(a); b = norm.mean(b);
            #pragma unroll
            for (int j = 0; j < 8; ++j) gu[j] = scale * (gu[j] - a - x[j] * b);
            *(uint4*)(grads + at * OUT_PITCH + norm.part * 16) = norm.write(gu);
        }
        fill(frame, image + n * sn, sc, sh, sw, (int)H, (int)W, py, px);
        __syncthreads();
        #pragma unroll 2
        for (int r = 0; r < 16; ++r) {
            u32 g0, g1;
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                : "=r"(g0), "=r"(g1) : "r"(from_g + r * (16 * OUT_PITCH)));
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
            partial[(((i64)blockIdx.x * CHANNELS + c) * (STEPS * 4) + tap) * 4 + i] = sums[s][j];
        }
    // Threads with the same channels, 32 of them, add up in shared memory.
    float* const mine = (float*)grads;
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
        mine[threadIdx.x / WARPS * (2 * CHANNELS) + norm.part * 8 + j] = of_w[j];
        mine[threadIdx.x / WARPS * (2 * CHANNELS) + CHANNELS + norm.part * 8 + j] = of_b[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += THREADS) {
        float total = 0.f;
        for (int t = 0; t < 32; ++t) total += mine[t * (2 * CHANNELS) + i];
        partial_norm[(i64)blockIdx.x * (2 * CHANNELS) + i] = total;
    }
}

// A warp has 8 x 4 threads for one tap of a channel: every eighth part, the four numbers of a pixel.
extern "C" __global__ void __launch_bounds__(256) oriented_stem_reduce(
    const float* __restrict__ partial, float* __restrict__ result, const int* __restrict__ table, i64 parts)
{
    const int at = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, i = lane % 4;
    if (at >= CHANNELS * K) return;
    const int c = at / K, t = at - c * K, place = table[WARPS * STEPS * 16 + c / 8 * K + t];
    float total = 0.f;
    #pragma unroll 8
    for (int part = lane / 4; part < parts; part += 8)
        total += partial[(((i64)part * CHANNELS + c) * (STEPS * 4) + place) * 4 + i];
    for (int k = 16; k >= 4; k /= 2) total += __shfl_down_sync(0xffffffffu, total, k);
    if (lane <= IN) result[at * (IN + 1) + lane] = total;
}

extern "C" __global__ void oriented_stem_reduce_norm(
    const float* __restrict__ partial, float* __restrict__ result, i64 parts)
{
    float total = 0.f;
    for (int part = threadIdx.x; part < parts; part += 32) total += partial[(i64)part * (2 * CHANNELS) + blockIdx.x];
    for (int k = 16; k; k /= 2) total += __shfl_down_sync(0xffffffffu, total, k);
    if (threadIdx.x == 0) result[blockIdx.x] = total;
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
        "RESIDENT": _RESIDENT[spec.kind],
        "CHANNELS": _GROUP * spec.warps,
        "STEPS": spec.steps,
        "SIDE": spec.side,
        "PITCH": spec.pitch,
        "FRAME": "((SIDE * PITCH * 8 + 15) / 16 * 16)",  # bytes
        "OUT_PITCH": "(16 * WARPS + 16)",  # bytes of an output in shared memory: rows of eight outputs fill all banks
    }
    parts = [
        source._PRELUDE,
        source._TYPES[spec.image],
        "\n".join(f"#define {name} {value}" for name, value in defines.items()),
        _CODE,
        _FORWARD if spec.kind == "forward" else _BACKWARD,
    ]
    return "\n".join(parts)
