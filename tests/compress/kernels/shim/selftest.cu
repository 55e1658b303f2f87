// Tiny kernels that test the shim itself: right ones, then wrong ones.
#include "shim.h"

struct Arrays {
    const void* in;
    void* out;
    unsigned count;
    unsigned mode;
};

static __device__ unsigned global_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// mode 0 half to float, 1 float to half, 2 bfloat16 to float, 3 float to bfloat16.
extern "C" __global__ void convert(const Arrays args) {
    for (unsigned i = global_index(); i < args.count; i += gridDim.x * blockDim.x) {
        if (args.mode == 0) static_cast<float*>(args.out)[i] = __half2float(static_cast<const __half*>(args.in)[i]);
        if (args.mode == 1) static_cast<__half*>(args.out)[i] = __float2half(static_cast<const float*>(args.in)[i]);
        if (args.mode == 2)
            static_cast<float*>(args.out)[i] = __bfloat162float(static_cast<const __nv_bfloat16*>(args.in)[i]);
        if (args.mode == 3)
            static_cast<__nv_bfloat16*>(args.out)[i] = __float2bfloat16(static_cast<const float*>(args.in)[i]);
    }
}
SHIM_KERNEL(convert, Arrays)

// float in, int32 out: four ways to round, then the same as unsigned.
extern "C" __global__ void round_to_int(const Arrays args) {
    unsigned i = global_index();
    if (i >= args.count) return;
    float x = static_cast<const float*>(args.in)[i];
    int values[8] = {__float2int_rn(x), __float2int_rz(x), __float2int_rd(x), __float2int_ru(x),
                     int(__float2uint_rn(x)), int(__float2uint_rz(x)),
                     int(__float2uint_rd(x)), int(__float2uint_ru(x))};
    for (int k = 0; k < 8; ++k) static_cast<int*>(args.out)[i * 8 + k] = values[k];
}
SHIM_KERNEL(round_to_int, Arrays)

struct ShuffleArgs {
    void* out;    // one value per lane
    unsigned op;  // 0 index, 1 up, 2 down, 3 xor
    int operand, width;
    unsigned mask;
};

template <class T>
static __device__ void shuffle(const ShuffleArgs& args) {
    unsigned lane = threadIdx.x;
    if (!(args.mask >> lane & 1)) return;
    T value = T(100 + lane);
    if (args.op == 0) value = __shfl_sync(args.mask, value, args.operand, args.width);
    if (args.op == 1) value = __shfl_up_sync(args.mask, value, args.operand, args.width);
    if (args.op == 2) value = __shfl_down_sync(args.mask, value, args.operand, args.width);
    if (args.op == 3) value = __shfl_xor_sync(args.mask, value, args.operand, args.width);
    static_cast<T*>(args.out)[lane] = value;
}
extern "C" __global__ void shuffle_float(const ShuffleArgs args) { shuffle<float>(args); }
extern "C" __global__ void shuffle_int(const ShuffleArgs args) { shuffle<int>(args); }
extern "C" __global__ void shuffle_unsigned(const ShuffleArgs args) { shuffle<unsigned>(args); }
extern "C" __global__ void shuffle_double(const ShuffleArgs args) { shuffle<double>(args); }
SHIM_KERNEL(shuffle_float, ShuffleArgs)
SHIM_KERNEL(shuffle_int, ShuffleArgs)
SHIM_KERNEL(shuffle_unsigned, ShuffleArgs)
SHIM_KERNEL(shuffle_double, ShuffleArgs)

// Two halves of a warp vote and shuffle apart, then all together; each lane writes what it saw.
extern "C" __global__ void votes(const Arrays args) {
    unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    unsigned* out = static_cast<unsigned*>(args.out) + global_index() * 8;
    for (unsigned round = 0; round < 3; ++round) {  // unequal speeds: one half may be rounds ahead
        out[0] = __ballot_sync(mask, lane % 3 == 0);
        out[1] = unsigned(__any_sync(mask, lane == 20));
        out[2] = unsigned(__all_sync(mask, lane < 16));
        out[3] = unsigned(__shfl_xor_sync(mask, int(lane), 1));
    }
    __syncwarp();
    out[4] = __ballot_sync(0xffffffffu, lane & 1);
    out[5] = unsigned(__syncthreads_count(threadIdx.x % 5 == 0));
    out[6] = unsigned(__syncthreads_or(threadIdx.x == 7));
    out[7] = unsigned(__syncthreads_and(threadIdx.x != 7));
}
SHIM_KERNEL(votes, Arrays)

// The sum of the block, `count` times over, through one scratch array. Every thread keeps its results: the barrier
// marked REUSE is what a fair schedule does not miss.
extern "C" __global__ void block_sums(const Arrays args) {
    __shared__ float scratch[32];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (unsigned round = 0; round < args.count; ++round) {
        float x = static_cast<const float*>(args.in)[(global_index() + round * 37) % (gridDim.x * blockDim.x)];
        shim_count_read(sizeof x);
        for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        __syncthreads();  // REUSE
        if (lane == 0) scratch[warp] = x;
        __syncthreads();  // READ
        x = lane < warps ? scratch[lane] : 0.0f;
        for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        static_cast<float*>(args.out)[round * gridDim.x * blockDim.x + global_index()] = x;
        shim_count_write(sizeof x);
    }
}
SHIM_KERNEL(block_sums, Arrays)

// The last block, by ticket, adds all partials in order. `in` is a ticket of 0. After the total and the partials, `out`
// holds each block's place in the order of arrival.
extern "C" __global__ void last_block_total(const Arrays args) {
    __shared__ bool last;
    float* partials = static_cast<float*>(args.out) + 1;
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = 1.0f / float(blockIdx.x + 3);
        __threadfence();
        unsigned* ticket = static_cast<unsigned*>(const_cast<void*>(args.in));
        unsigned place = atomicInc(ticket, gridDim.x - 1);
        last = place == gridDim.x - 1;
        partials[gridDim.x + blockIdx.x] = float(place);
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    float total = 0.0f;
    for (unsigned i = 0; i < gridDim.x; ++i) total += partials[i];
    *static_cast<float*>(args.out) = total;
}
SHIM_KERNEL(last_block_total, Arrays)

// Named like a function of libc, which must not run in its place.
extern "C" __global__ void ftok(const Arrays args) { static_cast<unsigned*>(args.out)[threadIdx.x] = threadIdx.x; }
SHIM_KERNEL(ftok, Arrays)

extern "C" __global__ void atomics(const Arrays args) {
    auto* words = static_cast<unsigned*>(args.out);
    atomicAdd(&words[0], 2u);
    atomicMax(&words[1], global_index());
    atomicMin(&words[2], global_index());
    atomicInc(&words[3], 6);
    atomicDec(&words[4], 6);
    atomicExch(&words[5], 9u);
    atomicCAS(&words[6], global_index(), global_index() + 1);  // in order of threads only: seed 0
    atomicAdd(reinterpret_cast<float*>(&words[7]), 0.5f);
    atomicMax(reinterpret_cast<int*>(&words[8]), -int(global_index()));
}
SHIM_KERNEL(atomics, Arrays)

// What each block finds in its shared memory before it writes there: mode 0 dynamic, 1 static.
template <class T>
static __device__ T first_touch(unsigned mode, T* dynamic) {
    __shared__ T fixed[8];
    T* memory = mode ? fixed : dynamic;
    T found = memory[threadIdx.x];
    memory[threadIdx.x] = T(1);
    return found;
}
extern "C" __global__ void untouched(const Arrays args) {
    DYNAMIC_SHARED(unsigned, dynamic);
    static_cast<unsigned*>(args.out)[global_index()] = first_touch(args.mode, dynamic);
}
SHIM_KERNEL(untouched, Arrays)

// Each block publishes values in its shared memory; after a barrier all read those of all ranks, in order.
// mode bit 0: static shared memory; bit 1: leave out the barrier before the reads; bit 2: leave out the last one.
extern "C" __global__ void exchange(const Arrays args) {
    DYNAMIC_SHARED(float, dynamic);
    __shared__ float fixed[64];
    float* own = args.mode & 1 ? fixed : dynamic;
    own[threadIdx.x] = 1.0f / float(1 + global_index());
    if (!(args.mode & 2)) cluster_barrier();
    float sum = 0.0f;
    for (unsigned rank = 0; rank < cluster_size(); ++rank)
        sum += float(rank + 1) * cluster_load(&own[threadIdx.x ^ 1], rank);
    if (!(args.mode & 4)) cluster_barrier();
    static_cast<float*>(args.out)[global_index()] = sum;
    if (own[threadIdx.x] != 1.0f / float(1 + global_index())) static_cast<float*>(args.out)[global_index()] = -1.0f;
}
SHIM_KERNEL(exchange, Arrays)

// One block waits for what the other one writes: both must be resident. Without __nanosleep nobody else would run.
extern "C" __global__ void handshake(const Arrays args) {
    auto* flag = static_cast<volatile unsigned*>(args.out);
    if (blockIdx.x == args.mode) {
        *flag = 1;
        return;
    }
    while (*flag == 0) __nanosleep(20);
    if (threadIdx.x == 0) flag[1 + blockIdx.x] = 1;
}
SHIM_KERNEL(handshake, Arrays)

struct FragmentArgs {
    const uint32_t *a, *b;  // [lane][4], [lane][2]
    float* d;               // [lane][4], accumulated into
};
extern "C" __global__ void multiply_half(const FragmentArgs args) {
    uint32_t a[4], b[2];
    float d[4];
    memcpy(a, args.a + threadIdx.x * 4, sizeof a);
    memcpy(b, args.b + threadIdx.x * 2, sizeof b);
    memcpy(d, args.d + threadIdx.x * 4, sizeof d);
    mma_m16n8k16(d, a, b, __half());
    memcpy(args.d + threadIdx.x * 4, d, sizeof d);
}
extern "C" __global__ void multiply_bfloat(const FragmentArgs args) {
    uint32_t a[4], b[2];
    float d[4];
    memcpy(a, args.a + threadIdx.x * 4, sizeof a);
    memcpy(b, args.b + threadIdx.x * 2, sizeof b);
    memcpy(d, args.d + threadIdx.x * 4, sizeof d);
    mma_m16n8k16(d, a, b, __nv_bfloat16());
    memcpy(args.d + threadIdx.x * 4, d, sizeof d);
}
SHIM_KERNEL(multiply_half, FragmentArgs)
SHIM_KERNEL(multiply_bfloat, FragmentArgs)

// out[lane][4] = the four 8x8 matrices of `in` [32 rows][8]; mode 1 transposes.
extern "C" __global__ void load_fragments(const Arrays args) {
    DYNAMIC_SHARED(uint16_t, tile);
    for (unsigned i = threadIdx.x; i < 256; i += 32) tile[i] = static_cast<const uint16_t*>(args.in)[i];
    __syncwarp();
    uint32_t r[4];
    if (args.mode) ldmatrix_x4_trans(r, tile + threadIdx.x * 8);
    else ldmatrix_x4(r, tile + threadIdx.x * 8);
    memcpy(static_cast<uint32_t*>(args.out) + threadIdx.x * 4, r, sizeof r);
}
SHIM_KERNEL(load_fragments, Arrays)

// D[16,8] += A[16,16] B[16,8], A and B row-major halves in `in`, as a kernel does it: ldmatrix, then mma.
extern "C" __global__ void tile_product(const Arrays args) {
    DYNAMIC_SHARED(__half, tile);  // A with rows of 24, then B with rows of 8: 16-byte rows
    __half *a_tile = tile, *b_tile = tile + 16 * 24;
    const auto* in = static_cast<const __half*>(args.in);
    for (unsigned i = threadIdx.x; i < 256; i += 32) a_tile[i / 16 * 24 + i % 16] = in[i];
    for (unsigned i = threadIdx.x; i < 128; i += 32) b_tile[i] = in[256 + i];
    __syncwarp();
    unsigned lane = threadIdx.x, g = lane / 4, q = lane % 4;
    uint32_t a[4], b4[4];
    ldmatrix_x4(a, a_tile + (lane % 16) * 24 + lane / 16 * 8);
    ldmatrix_x4_trans(b4, b_tile + (lane % 16) * 8);  // the upper 16 lanes repeat the addresses
    uint32_t b[2] = {b4[0], b4[1]};
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_m16n8k16(d, a, b, __half());
    auto* out = static_cast<float*>(args.out);
    for (unsigned r = 0; r < 4; ++r) out[(g + r / 2 * 8) * 8 + 2 * q + r % 2] = d[r];
}
SHIM_KERNEL(tile_product, Arrays)

// Copies `count` floats to shared memory, zeros behind them. out[0]: what lies there before the wait, [1]: after it.
extern "C" __global__ void copy_to_shared(const Arrays args) {
    DYNAMIC_SHARED(float, tile);
    auto* out = static_cast<float*>(args.out);
    tile[threadIdx.x] = 5.0f;
    copy_async<4>(&tile[threadIdx.x], static_cast<const float*>(args.in) + threadIdx.x, threadIdx.x < args.count);
    out[threadIdx.x] = tile[threadIdx.x];
    copy_async_wait();
    __syncthreads();
    out[blockDim.x + threadIdx.x] = tile[threadIdx.x];
}
SHIM_KERNEL(copy_to_shared, Arrays)

// ---------------------------------------------------------------------------------------------------------------------
// Faults. Each must be reported; the name says which rule is broken.

#define FAULT(name)                                  \
    static __device__ void do_##name(const Arrays&); \
    extern "C" __global__ void name(const Arrays args) { do_##name(args); } \
    SHIM_KERNEL(name, Arrays)                        \
    static __device__ void do_##name([[maybe_unused]] const Arrays& args)

FAULT(early_return_before_barrier) {
    if (threadIdx.x >= args.count) return;
    __syncthreads();
}
FAULT(barriers_at_two_lines) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
FAULT(barrier_in_one_warp_only) {
    if (threadIdx.x < 32) __syncthreads();
    if (threadIdx.x == 32) __shfl_sync(0x3u, 0, 0);  // waits for lane 1, which waits for nobody but has gone
}
FAULT(shuffle_against_barrier) {  // half of the warp at a shuffle of all, half at a barrier of all
    if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    __syncthreads();
}
FAULT(mask_names_exited_lane) {
    if (threadIdx.x == 5) return;
    __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
FAULT(mask_without_caller) { __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }
FAULT(full_mask_shuffle) { __shfl_xor_sync(0xffffffffu, 1.0f, 1); }  // right in whole warps only
FAULT(shuffle_meets_ballot) {
    if (threadIdx.x & 1) __ballot_sync(0xffffffffu, 1);
    else __shfl_sync(0xffffffffu, 1, 0);
}
FAULT(return_before_cluster_barrier) {
    if (blockIdx.x == 1) return;
    cluster_barrier();
}
FAULT(cluster_load_of_global) { cluster_load(static_cast<const float*>(args.in), 0); }
FAULT(cluster_load_of_rank) {
    DYNAMIC_SHARED(float, memory);
    cluster_load(memory, args.count);
}
FAULT(misaligned_load) {
    float4 v = __ldg(reinterpret_cast<const float4*>(static_cast<const char*>(args.in) + 4));
    if (v.x == 1.0f) __trap();
}
FAULT(misaligned_store) {
    __stcs(reinterpret_cast<float2*>(static_cast<char*>(args.out) + 4), make_float2(0.0f, 0.0f));
}
FAULT(trap) {
    if (threadIdx.x == 3) __trap();
    __syncthreads();
}
FAULT(copy_not_waited_for) {
    DYNAMIC_SHARED(float, memory);
    copy_async<4>(memory, args.in, true);
}
FAULT(copy_to_global) { copy_async<4>(args.out, args.in, true); }
FAULT(endless_poll) {
    while (*static_cast<volatile unsigned*>(args.out) == 0) __nanosleep(1);
}
FAULT(ldmatrix_misaligned) {
    DYNAMIC_SHARED(unsigned char, memory);
    uint32_t r[4];
    ldmatrix_x4(r, memory + 8);
}
FAULT(ldmatrix_of_global) {
    uint32_t r[4];
    ldmatrix_x4(r, reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(args.in) / 16 * 16));
}

// These take the process down, or only a sanitizer sees them.
FAULT(wild_pointer) { *reinterpret_cast<volatile int*>(uintptr_t(args.count)) = 1; }
static __device__ __noinline__ unsigned deep(unsigned n) {
    volatile unsigned frame[64];
    frame[n % 64] = n;
    return n ? deep(n - 1) + frame[n % 64] : 0;
}
FAULT(deep_recursion) { *static_cast<unsigned*>(args.out) = deep(args.count); }
FAULT(write_at) { static_cast<volatile float*>(args.out)[args.count] = 1.0f; }
FAULT(write_dynamic_at) {
    DYNAMIC_SHARED(volatile float, memory);
    memory[args.count] = 1.0f;
    __syncthreads();
}
FAULT(write_stack_at) {
    volatile float local[4] = {};
    __syncthreads();
    local[args.count] = 1.0f;
}
FAULT(shift_by) { *static_cast<int*>(args.out) = 1 << args.count; }
FAULT(read_vector) { *static_cast<float*>(args.out) = static_cast<const float4*>(args.in)->x; }
