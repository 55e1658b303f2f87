// Weighted mean squared error of all levels, loss and gradient in one pass.
//
//     L = sum over levels  inv * sum_{n,c,p} w[n,p] (s - t)^2        inv = 1 / (C * sum w + 1e-9), or 1 / (N C HW)
//     g = scale * 2 * inv * w * (s - t)
//
// Traffic: reads s and t once, writes g once (3U), and w (N*HW float32) once for 32 channels.
// Tiling: the blocks are dealt out to the levels in proportion to their size; each walks its level in strides of the
//   level's blocks, 16 bytes of each map per thread at a time, NCHW or channels last.
// Numerics: see common.cuh. The sums of the weights come first, by `weight_sums`, in a fixed order too.
#include "weights.cuh"

constexpr int kThreads = THREADS;
constexpr int kBlocks = BLOCKS_PER_SM;  // at least; without it the compiler spills to have more
constexpr uint32 kChannels = 32;   // that share one read of the weights
constexpr uint32 kAtOnce = 8;      // weights whose loads are under way together, in `weight_sums`

struct MseLevel {
    const void* student;
    const void* teacher;
    void* gradient;
    const float* weights;  // (N, HW), or null
    uint64 elements;
    uint32 channels, pixels;  // of one image
    uint32 first_block, blocks;
    uint32 channels_last;
    uint32 vectorised;  // 16-byte access is aligned and never crosses a row of pixels (or of channels)
};

struct MseArgs {
    MseLevel levels[kMaxLevels];
    const float* scale;
    const float* weight_partials;  // (levels, kWeightBlocks)
    float* partials;
    uint32* ticket;
    float* loss;
    int count;
};

/// The share of V elements at `i` in sum w (s - t)^2; writes factor * w * (s - t).
template <class T, int V>
__device__ __forceinline__ float compare(const MseLevel& level, uint64 i, const float (&w)[V], float factor, float sum) {
    float s[V], t[V];
    read(static_cast<const T*>(level.student) + i, s);
    read(static_cast<const T*>(level.teacher) + i, t);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const float difference = s[k] - t[k], weighted = w[k] * difference;
        sum = fmaf(weighted, difference, sum);
        s[k] = factor * weighted;
    }
    write(static_cast<T*>(level.gradient) + i, s);
    return sum;
}

/// Elements in the order of memory: no weights, or channels last, where the vectors of a pixel are neighbours and one
/// broadcast serves them.
template <class T, int V> __device__ __forceinline__ float walk_memory(const MseLevel& level, float factor) {
    const uint32 vectors = static_cast<uint32>(level.elements / V), vectors_a_pixel = level.channels / V;
    float sum = 0.0f, w[V];
    fill(w, 1.0f);
#pragma unroll 2
    for (uint32 v = (blockIdx.x - level.first_block) * kThreads + threadIdx.x; v < vectors; v += level.blocks * kThreads) {
        if (level.weights) fill(w, read_broadcast(level.weights + v / vectors_a_pixel, v % vectors_a_pixel == 0));
        sum = compare<T>(level, static_cast<uint64>(v) * V, w, factor, sum);
    }
    return sum;
}

/// NCHW with weights: a thread keeps the weights of V pixels and walks down kChannels channels.
template <class T, int V> __device__ __forceinline__ float walk_channels(const MseLevel& level, float factor) {
    const uint32 row = level.pixels / V;  // vectors in a channel
    const uint32 columns = static_cast<uint32>(level.elements / level.channels / V);
    const uint32 tiles_of_columns = (columns + kThreads - 1) / kThreads;
    const uint32 tiles = tiles_of_columns * ((level.channels + kChannels - 1) / kChannels);
    float sum = 0.0f;
    for (uint32 tile = blockIdx.x - level.first_block; tile < tiles; tile += level.blocks) {
        const uint32 column = tile % tiles_of_columns * kThreads + threadIdx.x;
        if (column >= columns) continue;
        const uint32 image = column / row, first = tile / tiles_of_columns * kChannels;
        const uint64 pixel = column % row * V;
        const uint32 last = min(first + kChannels, level.channels);
        float w[V];
        read_map(level.weights + static_cast<uint64>(image) * level.pixels + pixel, w);
#pragma unroll 2  // four vectors in flight per thread; more cost occupancy, and spill
        for (uint32 c = first; c < last; ++c)
            sum = compare<T>(level, (static_cast<uint64>(image) * level.channels + c) * level.pixels + pixel, w, factor, sum);
    }
    return sum;
}

template <class T, int V> __device__ __forceinline__ float walk(const MseLevel& level, float factor) {
    const bool in_order = !level.weights || level.channels_last;
    return in_order ? walk_memory<T, V>(level, factor) : walk_channels<T, V>(level, factor);
}

template <class T> __device__ __forceinline__ void weighted_mse(const MseArgs& args) {
    __shared__ float scratch[kWarp];
    const MseLevel& level = level_of_block(args.levels, args.count);
    float inv = 1.0f / static_cast<float>(level.elements);
    if (level.weights)
        inv = weighted_norm(args.weight_partials + (&level - args.levels) * kWeightBlocks, level.channels, scratch);
    const float factor = assumed_scale(args.scale) * 2.0f * inv;
    float sum[1] = {level.vectorised ? walk<T, kVector<T>>(level, factor) : walk<T, 1>(level, factor)};
    block_reduce<Sum>(sum, scratch);
    grid_total(inv * sum[0], args.partials, args.ticket, args.loss, scratch);
}

EDGESTILL_PER_DTYPE(weighted_mse, MseArgs, kThreads, kBlocks)

struct WeightSumLevel {
    const float* weights;
    uint64 elements;
};

struct WeightSumArgs {
    WeightSumLevel levels[kMaxLevels];
    float* partials;  // (levels, kWeightBlocks)
};

/// Sums of each level's weights, kWeightBlocks partial sums per level.
extern "C" __global__ void __launch_bounds__(kThreads) weight_sums(const __grid_constant__ WeightSumArgs args) {
    __shared__ float scratch[kWarp];
    const WeightSumLevel& level = args.levels[blockIdx.x / kWeightBlocks];
    constexpr uint32 kStep = kWeightBlocks * kThreads;
    float sum[1] = {0.0f};
#pragma unroll 1
    for (uint64 i = (blockIdx.x % kWeightBlocks) * kThreads + threadIdx.x; i < level.elements; i += kAtOnce * kStep) {
        float w[kAtOnce];
#pragma unroll
        for (uint32 n = 0; n < kAtOnce; ++n) {
            const uint64 at = i + n * kStep;
            w[n] = at < level.elements ? read_raw<1>(level.weights + at) : 0.0f;
        }
#pragma unroll
        for (uint32 n = 0; n < kAtOnce; ++n) sum[0] += w[n];
    }
    block_reduce<Sum>(sum, scratch);
    if (threadIdx.x == 0) write_result(args.partials + blockIdx.x, sum[0]);
}

EDGESTILL_KERNEL(weight_sums, WeightSumArgs)
