// What the text of the CUDA kernels needs of CUDA, on one thread of a CPU.
//
// Every CUDA thread is a fiber. The warps of a block run one after the other, each as far as the next __syncthreads();
// the lanes of a warp run one after the other, each as far as the next instruction that all of them take part in. So
// threads are as far apart as barriers allow, and what a missing barrier permits happens under one order or another of
// warps and lanes.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uchar4 { unsigned char x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y; };

static Index gridDim, blockIdx, blockDim, threadIdx;

namespace emulator {

// Threads -------------------------------------------------------------------------------------------------------------

constexpr size_t STACK = 128 * 1024;
constexpr size_t FENCE = 1024;   // bytes behind a block's shared memory that must not change
constexpr unsigned BASE = 1024;  // address of its first byte

enum class State { READY, WARP, BLOCK, DONE };  // what a thread waits for

struct Copy {
    unsigned char* to;
    const void* from;
    int bytes;
};

struct Fiber {
    ucontext_t entry;
    jmp_buf place;
    char* stack = new char[STACK];
    bool begun = false;
    State state = State::READY;
    void (*act)(void* const* lanes) = nullptr;  // what the lanes of its warp do together, with the data of each
    void* data = nullptr;
    std::vector<std::vector<Copy>> copies;  // cp.async that have not arrived, by group; the last group is open
};

struct Failure {
    const char* message;
};

static std::vector<Fiber*> fibers;
static Fiber* current;
static jmp_buf scheduler;
static void (*body)();
static const long long* arguments;  // of the kernel
static const char* failure;         // of a fiber
static int order;  // 0 ascending, 1 descending, else random from this seed
static uint64_t random_state;
alignas(128) static unsigned char shared[(228 << 10) + FENCE];
static unsigned shared_bytes;

static unsigned random_number() {
    random_state = random_state * 6364136223846793005 + 1442695040888963407;
    return random_state >> 33;
}

// setjmp and longjmp go from stack to stack: swapcontext saves the signal mask too, a system call each time.
static __attribute__((noinline)) void pause() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

static __attribute__((noinline)) void resume(unsigned thread) {
    current = fibers[thread];
    threadIdx = {thread, 0};
    if (!_setjmp(scheduler)) {
        if (current->begun) _longjmp(current->place, 1);
        current->begun = true;
        setcontext(&current->entry);
    }
    if (failure) throw Failure{failure};
}

static void run_fiber() {
    for (;;) {  // once for each block
        body();
        current->state = State::DONE;
        pause();
    }
}

// In a fiber, from which nothing can be thrown.
static void check(bool condition, const char* message) {
    if (condition) return;
    failure = message;
    pause();
}

static void all_lanes(void (*act)(void* const*), void* data) {
    current->act = act;
    current->data = data;
    current->state = State::WARP;
    pause();
}

static std::vector<unsigned> ordered(unsigned first, unsigned last) {
    std::vector<unsigned> result(last - first);
    for (unsigned i = 0; i < last - first; ++i) {
        result[i] = order == 1 ? last - 1 - i : first + i;
        if (order > 1) std::swap(result[i], result[random_number() % (i + 1)]);
    }
    return result;
}

// Run the threads first to last - 1 until each of them waits for the block or is done.
static void run_warp(unsigned first, unsigned last) {
    const std::vector<unsigned> lanes = ordered(first, last);
    for (;;) {
        unsigned waiting = 0;
        for (unsigned lane : lanes) {
            if (fibers[lane]->state == State::READY) resume(lane);
            waiting += fibers[lane]->state == State::WARP;
        }
        if (waiting == 0) return;
        if (waiting != last - first) throw Failure{"some lanes of a warp wait for the others"};
        void* data[32];
        for (unsigned lane = first; lane < last; ++lane) {
            const bool same = fibers[lane]->act == fibers[first]->act;
            if (!same) throw Failure{"lanes of a warp are at different instructions"};
            data[lane - first] = fibers[lane]->data;
            fibers[lane]->state = State::READY;
        }
        for (unsigned lane = last - first; lane < 32; ++lane) data[lane] = data[0];
        fibers[first]->act(data);
    }
}

static void run_block() {
    const unsigned threads = blockDim.x, warps = (threads + 31) / 32;
    std::memset(shared, 0xff, shared_bytes + FENCE);  // NaN of every kind
    for (unsigned thread = 0; thread < threads; ++thread) {
        fibers[thread]->state = State::READY;
        fibers[thread]->copies.assign(1, {});
    }
    for (unsigned alive = threads; alive;) {
        for (unsigned warp : ordered(0, warps))
            run_warp(32 * warp, 32 * warp + 32 < threads ? 32 * warp + 32 : threads);
        alive = 0;
        for (unsigned thread = 0; thread < threads; ++thread) {
            if (fibers[thread]->state == State::DONE) continue;
            fibers[thread]->state = State::READY;
            ++alive;
        }
    }
    for (size_t i = 0; i < FENCE; ++i)
        if (shared[shared_bytes + i] != 0xff) throw Failure{"written behind the shared memory of a block"};
}

template <auto kernel, class... P, size_t... I>
void call(void (*)(P...), std::index_sequence<I...>) {
    kernel((P)arguments[I]...);
}
template <class... P>
std::index_sequence_for<P...> numbered(void (*)(P...)) { return {}; }

// What went wrong; null if nothing did. The shape: grid (x, y), threads, bytes of shared memory, order.
template <auto kernel>
const char* launch(const int* shape, const long long* arguments_) {
    gridDim = {(unsigned)shape[0], (unsigned)shape[1]};
    blockDim = {(unsigned)shape[2], 1};
    shared_bytes = shape[3];
    random_state = order = shape[4];
    arguments = arguments_;
    body = [] { call<kernel>(kernel, numbered(kernel)); };
    failure = nullptr;
    while (fibers.size() < blockDim.x) {
        Fiber* const fiber = new Fiber;
        getcontext(&fiber->entry);
        fiber->entry.uc_stack.ss_sp = fiber->stack;
        fiber->entry.uc_stack.ss_size = STACK;
        makecontext(&fiber->entry, run_fiber, 0);
        fibers.push_back(fiber);
    }
    try {
        if (shared_bytes + FENCE > sizeof shared) throw Failure{"too much shared memory"};
        for (unsigned block : ordered(0, gridDim.x * gridDim.y)) {
            blockIdx = {block % gridDim.x, block / gridDim.x};
            run_block();
        }
    } catch (const Failure& thrown) {
        fibers.clear();  // they stopped somewhere, and are left there
        return thrown.message;
    }
    return nullptr;
}

// Numbers -------------------------------------------------------------------------------------------------------------

template <class To, class From>
To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

static unsigned short to_bf16(float f) {
    const unsigned u = as<unsigned>(f);
    return std::isnan(f) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static unsigned short to_half(float f) {
    const unsigned short sign = as<unsigned>(f) >> 16 & 0x8000;
    const float size = std::fabs(f);
    if (std::isnan(f)) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    const int exponent = std::fmax(std::ilogb(size), -14);
    return sign + ((exponent + 14) << 10) + (int)std::nearbyint(std::ldexp(size, 10 - exponent));
}
static float from_half(unsigned short h) {
    const int exponent = h >> 10 & 31, digits = h & 1023;
    float size = exponent ? std::ldexp(1024.f + digits, exponent - 25) : std::ldexp((float)digits, -24);
    if (exponent == 31) size = digits ? NAN : INFINITY;
    return h & 0x8000 ? -size : size;
}

// One of the two 16-bit numbers of a word; `type` is "bf16" or "f16".
static float number(const char* type, unsigned word, int half) {
    const unsigned short bits = half ? word >> 16 : word;
    return type[0] == 'b' ? as<float>((unsigned)bits << 16) : from_half(bits);
}

// Instructions: first what they give, then what they take ------------------------------------------------------------

static void cvt_bf16x2(unsigned& r, float high, float low) { r = to_bf16(low) | (unsigned)to_bf16(high) << 16; }
static void cvt_from_half(float& f, unsigned short h) { f = from_half(h); }
static void cvt_to_half(unsigned short& h, float f) { h = to_half(f); }

template <class Word>
void load(Word& r, const void* from) {
    check((uintptr_t)from % sizeof r == 0, "loaded from an address that is not aligned");
    std::memcpy(&r, from, sizeof r);
}
template <class Word>
void store(void* to, Word r) {
    check((uintptr_t)to % sizeof r == 0, "stored to an address that is not aligned");
    std::memcpy(to, &r, sizeof r);
}
static void load_u16(unsigned& r, const char* from, bool there) {
    unsigned short v;
    if (there) load(v, from), r = v;
}
static void load_2(unsigned& a, unsigned& b, const char* from, bool there) {
    unsigned long long v;
    if (there) load(v, from), a = (unsigned)v, b = (unsigned)(v >> 32);
}
static void load_4(unsigned& a, unsigned& b, unsigned& c, unsigned& d, const char* from, bool there) {
    uint4 v;
    if (there) load(v, from), a = v.x, b = v.y, c = v.z, d = v.w;
}
static void store_u16(char* to, unsigned short r, bool there) {
    if (there) store(to, r);
}
static void store_2(unsigned a, unsigned b, char* to, bool there) {
    if (there) store(to, a | (unsigned long long)b << 32);
}
static void store_4(unsigned a, unsigned b, unsigned c, unsigned d, char* to, bool there) {
    if (there) store(to, uint4{a, b, c, d});
}

static unsigned char* at(unsigned address, unsigned bytes) {
    check(address >= BASE && address - BASE + bytes <= shared_bytes, "an address outside of shared memory");
    check(address % bytes == 0, "an address of shared memory that is not aligned");
    return shared + (address - BASE);
}
static void load_shared(unsigned& r, unsigned address) { std::memcpy(&r, at(address, 4), 4); }
static void store_from_shared(void* to, unsigned address, bool there) {
    unsigned v;
    load_shared(v, address);
    if (there) store(to, v);
}

// Copies arrive when they are waited for, or at once; both are allowed, and worst for one mistake or another.
static void copy_async(unsigned address, const void* from, int bytes, bool there = true) {
    if (!there) return;
    const Copy copy{at(address, bytes), from, bytes};
    check((uintptr_t)from % bytes == 0, "copied from an address that is not aligned");
    const bool late = order == 0 || (order > 1 && random_number() % 2);
    if (late) current->copies.back().push_back(copy);
    else std::memcpy(copy.to, copy.from, bytes);
}
static void copy_async_16(unsigned address, const void* from) { copy_async(address, from, 16); }
static void copy_async_4_if(unsigned address, const void* from, bool there) { copy_async(address, from, 4, there); }
static void commit_group() { current->copies.emplace_back(); }
static void wait_group(size_t later) {
    auto& groups = current->copies;
    while (groups.size() > later + 1) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

// ldmatrix: matrix m has its rows where lanes 8 m to 8 m + 7 say; lane l gets two neighbours of row l / 4, or of column
// l / 4 if it is transposed.
struct Matrices {
    const unsigned char* row;
    unsigned words[4];
};
template <int number, bool transposed>
void load_matrices(void* const* lanes) {
    for (int m = 0; m < number; ++m)
        for (int lane = 0; lane < 32; ++lane) {
            unsigned short pair[2];
            for (int i = 0; i < 2; ++i) {
                const int near = lane / 4, far = 2 * (lane % 4) + i;
                const unsigned char* row = ((Matrices*)lanes[8 * m + (transposed ? far : near)])->row;
                std::memcpy(&pair[i], row + 2 * (transposed ? near : far), 2);
            }
            ((Matrices*)lanes[lane])->words[m] = pair[0] | (unsigned)pair[1] << 16;
        }
}
static void ldmatrix_4(
    const char* transposed, unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned address) {
    Matrices mine{at(address, 16), {}};
    all_lanes(transposed[0] ? load_matrices<4, true> : load_matrices<4, false>, &mine);
    a = mine.words[0], b = mine.words[1], c = mine.words[2], d = mine.words[3];
}
static void ldmatrix_2_transposed(unsigned& a, unsigned& b, unsigned address) {
    const bool used = threadIdx.x % 32 < 16;  // addresses of the other lanes are not
    Matrices mine{used ? at(address, 16) : nullptr, {}};
    all_lanes(load_matrices<2, true>, &mine);
    a = mine.words[0], b = mine.words[1];
}

// mma: sums (16 x 8) += left (16 x depth) * right (depth x 8).
struct Product {
    const char* type;
    unsigned left[4], right[2];
    float sums[4];
};
template <int depth>
void multiply(void* const* lanes) {
    float left[16][depth], right[depth][8];
    const char* const type = ((Product*)lanes[0])->type;
    for (int lane = 0; lane < 32; ++lane) {
        const Product& p = *(Product*)lanes[lane];
        for (int half = 0; half < 2; ++half) {
            const int column = 2 * (lane % 4) + half;
            for (int r = 0; r < depth / 4; ++r)
                left[lane / 4 + 8 * (r % 2)][column + 8 * (r / 2)] = number(type, p.left[r], half);
            for (int r = 0; r < depth / 8; ++r) right[column + 8 * r][lane / 4] = number(type, p.right[r], half);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float& sum = ((Product*)lanes[lane])->sums[i];
            for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][column];
        }
}
static void mma_16(
    const char* type, float& s0, float& s1, float& s2, float& s3,
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Product mine{type, {a0, a1, a2, a3}, {b0, b1}, {s0, s1, s2, s3}};
    all_lanes(multiply<16>, &mine);
    s0 = mine.sums[0], s1 = mine.sums[1], s2 = mine.sums[2], s3 = mine.sums[3];
}
static void mma_16_bf16(
    float& s0, float& s1, float& s2, float& s3,
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    mma_16("bf16", s0, s1, s2, s3, a0, a1, a2, a3, b0, b1);
}
static void mma_16_first(
    const char* type, float& s0, float& s1, float& s2, float& s3,
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, float start) {
    s0 = s1 = s2 = s3 = start;
    mma_16(type, s0, s1, s2, s3, a0, a1, a2, a3, b0, b1);
}
static void mma_8(
    const char* type, float& s0, float& s1, float& s2, float& s3, unsigned a0, unsigned a1, unsigned b) {
    Product mine{type, {a0, a1}, {b}, {s0, s1, s2, s3}};
    all_lanes(multiply<8>, &mine);
    s0 = mine.sums[0], s1 = mine.sums[1], s2 = mine.sums[2], s3 = mine.sums[3];
}

static void nothing(void* const*) {}

struct Shuffle {
    float value, received;
    int from;  // lane
};
static void exchange(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        Shuffle& mine = *(Shuffle*)lanes[lane];
        mine.received = ((Shuffle*)lanes[mine.from])->value;
    }
}
static float shuffle(float value, int from) {
    Shuffle mine{value, 0.f, from};
    all_lanes(exchange, &mine);
    return mine.received;
}

}  // namespace emulator

// CUDA's own functions ------------------------------------------------------------------------------------------------

static void __syncthreads() {
    emulator::current->state = emulator::State::BLOCK;
    emulator::pause();
}
static void __syncwarp() { emulator::all_lanes(emulator::nothing, nullptr); }
static float __shfl_down_sync(unsigned, float v, int distance, int width = 32) {
    const int lane = threadIdx.x % 32;
    return emulator::shuffle(v, lane % width + distance < width ? lane + distance : lane);
}
static float __shfl_xor_sync(unsigned, float v, int mask) { return emulator::shuffle(v, threadIdx.x % 32 ^ mask); }
static unsigned __cvta_generic_to_shared(const void* p) {
    return (unsigned)((const unsigned char*)p - emulator::shared) + emulator::BASE;
}

template <class T>
T __ldg(const T* p) { return *p; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned u) { return emulator::as<float>(u); }
static float __int_as_float(int i) { return emulator::as<float>(i); }
static unsigned __float_as_uint(float f) { return emulator::as<unsigned>(f); }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static int __clz(int a) { return a ? __builtin_clz(a) : 32; }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
static float rsqrtf(float f) { return 1.f / std::sqrt(f); }
#define __expf(f) std::exp(f)  // the C library has a function of this name

namespace emulator {
static void prmt(unsigned& r, unsigned word, unsigned selector) { r = __byte_perm(word, 0, selector); }
}  // namespace emulator

// The text of the kernels follows -------------------------------------------------------------------------------------
