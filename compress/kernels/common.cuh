// Code that all kernels share: vector access with counted bytes, fixed-order reductions, the assumed loss scale.
//
// The file compiles three ways: by NVRTC when a kernel is first used, by nvcc in the tests, and by g++ with the tests'
// host shim, which runs the same kernels on a CPU. Kernels read and write global memory only through `read*`/`write*`.
// Names in capitals that no header defines are constants of the launcher (`SOURCE` beside each kernel.cu).
//
// Numerics: arithmetic and accumulation in float32; one rounding, to nearest even, when a gradient is stored; an
// overflow becomes infinity, so that a gradient scaler sees it. Every reduction has a fixed partition and order, so
// equal inputs give equal bits.
#pragma once

#ifdef EDGESTILL_HOST
#include "shim.h"
#define EDGESTILL_KERNEL(name, Args) SHIM_KERNEL(name, Args)
#define __grid_constant__
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EDGESTILL_KERNEL(name, Args)
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(16) unsigned char name##_raw[]; \
    type* const name = reinterpret_cast<type*>(name##_raw)
__device__ __forceinline__ void shim_count_read(unsigned) {}
__device__ __forceinline__ void shim_count_write(unsigned) {}
#endif

// NVRTC has neither <cmath> nor <limits>.
#define EDGESTILL_INFINITY __int_as_float(0x7f800000)

using uint32 = unsigned int;
using uint64 = unsigned long long;

constexpr int kMaxLevels = MAX_LEVELS;
constexpr int kWarp = WARP;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- values -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

// ---- global memory ------------------------------------------------------------------------------------------------

/// Elements in the 16 bytes that one thread moves at a time.
template <class T> constexpr int kVector = VECTOR_BYTES / sizeof(T);

/// V elements as they are in memory: 16 bytes, or one element.
template <int V, class T> struct RawOf {
    static_assert(V == kVector<T>, "16 bytes or one element");
    using Type = uint4;
};
template <class T> struct RawOf<1, T> {
    using Type = T;
};
template <int V, class T> using Raw = typename RawOf<V, T>::Type;

template <int V, class T> __device__ __forceinline__ void unpack(Raw<V, T> raw, float (&to)[V]) {
    const T* const values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(values[i]);
}

/// `read` without conversion. Read all that are to be under way together before the first is unpacked: a load that is
/// unpacked at once waits for memory alone.
template <int V, class T> __device__ __forceinline__ Raw<V, T> read_raw(const T* from) {
    shim_count_read(V * sizeof(T));
    return __ldg(reinterpret_cast<const Raw<V, T>*>(from));
}

/// V consecutive elements as float32: V is kVector<T>, the address then a multiple of 16 bytes, or 1. Through the
/// read-only cache: nothing in the launch may write what is read.
template <int V, class T> __device__ __forceinline__ void read(const T* from, float (&to)[V]) {
    unpack<V, T>(read_raw<V>(from), to);
}

/// `read` for memory that the launch itself may write: not through the read-only cache.
template <int V, class T> __device__ __forceinline__ void read_fresh(const T* from, float (&to)[V]) {
    shim_count_read(V * sizeof(T));
    unpack<V, T>(*reinterpret_cast<const Raw<V, T>*>(from), to);
}

/// Writes V elements of T; does not keep them in the cache, so that a gradient does not evict what is still to be read.
template <int V, class T> __device__ __forceinline__ void write(T* to, const float (&from)[V]) {
    shim_count_write(V * sizeof(T));
    if constexpr (V == 1) {
        *to = from_float<T>(from[0]);
    } else {
        static_assert(V == kVector<T>, "16 bytes or one element");
        uint4 raw;
        T* const values = reinterpret_cast<T*>(&raw);
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = from_float<T>(from[i]);
        __stcs(reinterpret_cast<uint4*>(to), raw);
    }
}

/// 16 bytes without conversion, written as `write` does.
__device__ __forceinline__ void write_raw(void* to, uint4 value) {
    shim_count_write(16);
    __stcs(reinterpret_cast<uint4*>(to), value);
}

/// V consecutive float32 of a small map (weights, coefficients), aligned to min(V, 4) of them.
template <int V> __device__ __forceinline__ void read_map(const float* from, float (&to)[V]) {
    shim_count_read(V * sizeof(float));
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = __ldg(from + i);
    }
}

/// A float32 that all or many threads of a warp read at once; `counts` in one thread of those that share it.
__device__ __forceinline__ float read_broadcast(const float* from, bool counts) {
    if (counts) shim_count_read(sizeof(float));
    return __ldg(from);
}

template <int V> __device__ __forceinline__ void fill(float (&x)[V], float value) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = value;
}

/// A float32 that another block of the same launch wrote: not through the read-only cache.
__device__ __forceinline__ float read_shared_result(const float* from) {
    shim_count_read(sizeof(float));
    return *reinterpret_cast<const volatile float*>(from);
}

__device__ __forceinline__ void write_result(float* to, float value) {
    shim_count_write(sizeof(float));
    *to = value;
}

/// The upstream gradient that the caller expects, folded into the gradient before it is rounded. 1 if there is
/// none; 0 is read as 1, since nothing could be rescaled from it.
__device__ __forceinline__ float assumed_scale(const float* scale) {
    if (scale == nullptr) return 1.0f;
    const float value = read_broadcast(scale, threadIdx.x == 0);
    return value == 0.0f ? 1.0f : value;
}

// ---- clusters: sm_90 and newer ------------------------------------------------------------------------------------
// For bodies under `#if defined(EDGESTILL_HOST) || __CUDA_ARCH__ >= 900`. The shim has their twins.

#ifndef EDGESTILL_HOST
/// Rank of this block in its cluster, from 0.
__device__ __forceinline__ uint32 cluster_rank() {
    uint32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Blocks in the cluster.
__device__ __forceinline__ uint32 cluster_size() {
    uint32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

/// Barrier of all threads of the cluster; shared memory written before it is visible to the peers after it.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// The value in block `rank` of the cluster at the address that `own` has in this block's shared memory.
__device__ __forceinline__ float cluster_load(const float* own, uint32 rank) {
    const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(own));
    uint32 there;
    float value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
    return value;
}
#endif

// ---- reductions ---------------------------------------------------------------------------------------------------

struct Sum {
    static __device__ __forceinline__ float identity() { return 0.0f; }
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ float identity() { return -EDGESTILL_INFINITY; }
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op, int K> __device__ __forceinline__ void warp_reduce(float (&x)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) x[k] = Op::of(x[k], __shfl_xor_sync(kAllLanes, x[k], offset));
}

/// Reduce K values over the block; every thread gets the results. blockDim.x is a multiple of 32; `scratch` holds
/// 32 * K floats of shared memory and may be used again at once.
template <class Op, int K> __device__ __forceinline__ void block_reduce(float (&x)[K], float* scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    warp_reduce<Op>(x);
    __syncthreads();  // a slow warp may still read what the previous use left in scratch
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) scratch[warp * K + k] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = lane < warps ? scratch[lane * K + k] : Op::identity();
    warp_reduce<Op>(x);
}

/// Whether this block is the last of `blocks` to get here. Then it sees what thread 0 of the others wrote before, and after
/// a barrier what their other threads wrote. The ticket is 0 before the launch and after it. `last` is shared memory of
/// this call alone.
__device__ __forceinline__ bool is_last_block(uint32* ticket, unsigned blocks, bool* last) {
    if (threadIdx.x == 0) {
        __threadfence();
        *last = atomicInc(ticket, blocks - 1) == blocks - 1;
        if (*last) __threadfence();  // in the thread that took the ticket; the barrier hands on what it sees
    }
    __syncthreads();
    return *last;
}

__device__ __forceinline__ bool is_last_block(uint32* ticket, unsigned blocks) {
    __shared__ bool last;
    return is_last_block(ticket, blocks, &last);
}

/// One value of each block, the same in all its threads, added in a fixed order into *total by the last block.
/// `partials` holds gridDim.x floats, `scratch` 32 of shared memory.
__device__ __forceinline__ void grid_total(float mine, float* partials, uint32* ticket, float* total, float* scratch) {
    if (threadIdx.x == 0) write_result(partials + blockIdx.x, mine);
    if (!is_last_block(ticket, gridDim.x)) return;
    float sum[1] = {0.0f};
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum[0] += read_shared_result(partials + i);
    block_reduce<Sum>(sum, scratch);
    if (threadIdx.x == 0) write_result(total, sum[0]);
}

/// The entry whose blocks start at or before `block`: entries[i].first_block rises with i.
template <class Entry, int N>
__device__ __forceinline__ const Entry& entry_of_block(const Entry (&entries)[N], int count, uint32 block) {
    int found = 0;
#pragma unroll
    for (int i = 1; i < N; ++i)
        if (i < count && block >= entries[i].first_block) found = i;
    return entries[found];
}

template <class Entry, int N> __device__ __forceinline__ const Entry& entry_of_block(const Entry (&entries)[N], int count) {
    return entry_of_block(entries, count, blockIdx.x);
}

template <class Level> __device__ __forceinline__ const Level& level_of_block(const Level (&levels)[kMaxLevels], int count) {
    return entry_of_block(levels, count);
}

/// extern "C" entry points of a kernel template over the dtype of the maps; the rest are its launch bounds.
#define EDGESTILL_PER_DTYPE(name, Args, ...)                       \
    EDGESTILL_ENTRY(name, Args, float, name##_f32, __VA_ARGS__)    \
    EDGESTILL_ENTRY(name, Args, __half, name##_f16, __VA_ARGS__)   \
    EDGESTILL_ENTRY(name, Args, __nv_bfloat16, name##_bf16, __VA_ARGS__)
#define EDGESTILL_ENTRY(name, Args, T, entry, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) entry(const __grid_constant__ Args args) { name<T>(args); } \
    EDGESTILL_KERNEL(entry, Args)
