// PKD: Pearson correlation of each channel over (N, H, W), M samples, and its gradient.
//
//     x = s - mean s    y = t - mean t    v = var + 1e-6    q = sqrt(v_s / v_t)    e = (var_s - q cov) / v_s
//     loss of a channel = 1/2 (var_s - q cov) / v_s + 1/2 (var_t - cov / q) / v_t         L = mean over the channels
//     g = scale / (C M v_s) * (x - q y - e x)
//
// It is half the mean squared difference of the standardised maps, expanded. Equal maps give x = y, var_s = cov
// and q = 1, hence loss and gradient of exactly 0; `fmaf` is written explicitly where a compiler's own contraction
// would leave a rounding error instead.
//
// Two-pass form: `statistics` reads s and t (2U), `gradient` reads them again and writes g (3U). 5U; for NCHW maps 3U
//   of DRAM, if the launcher launches the pair for as many channels at a time as the L2 cache holds.
// Cluster form, NCHW on sm_90 and newer: the blocks of a cluster keep their channel in shared memory. 3U.
// Tiling: NCHW: a block takes every `splits`th piece of one channel, over all images, 16 bytes per thread at a time.
//   Channels last: a block takes `width` vectors of channels, a thread one of them, and every `splits`th piece of the
//   pixels; its gradient goes through them backwards. The last block of a channel (of a tile of channels) adds up the
//   splits and solves for what `gradient` needs.
// Numerics: see common.cuh. Moments are taken about a shift near the mean, against cancellation: the mean of kSpread
//   samples, since the first one, a corner of the zero-padded image, is the least typical.
#include "common.cuh"

constexpr int kThreads = THREADS;
constexpr int kClusterThreads = CLUSTER_THREADS;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMoments = MOMENTS;            // sums of x, y, x^2, y^2, x y about the shift
constexpr int kCoefficients = COEFFICIENTS;  // see Solution
constexpr uint32 kPixels = 2;     // of a thread, channels last, whose loads are under way together
constexpr uint32 kSpread = 8;     // samples whose mean is the shift; kThreads / 32 at most
constexpr float kEps = static_cast<float>(EPS);

struct PkdLevel {  // or a range of a level's channels; every pointer is that of the first
    const void* student;
    const void* teacher;
    void* gradient;
    float* records;       // moments of each split, see the kernels
    float* coefficients;  // (channels, kCoefficients)
    float* losses;        // (channels)
    uint32* tickets;      // (channels)
    uint32 images, channels, pixels;  // of the whole level
    uint32 first_block, splits;
    uint32 width;       // channels last: vectors side by side, a power of 2
    uint32 vectorised;  // 16-byte access is aligned and never crosses a row of pixels (or of channels)
};

struct PkdArgs {
    PkdLevel levels[kMaxLevels];
    const float* scale;
    const float* losses;  // of all channels of all levels
    float* loss;          // null but in the last launch
    uint32* ticket;
    uint32 channels;  // of all levels
    int count;
};

// ---- what a channel needs -----------------------------------------------------------------------------------------

struct Shift {
    float s, t;
};

/// m[k * Stride] += the k-th moment of one sample.
template <int Stride> __device__ __forceinline__ void add_sample(float s, float t, Shift shift, float* m) {
    const float x = s - shift.s, y = t - shift.t;
    m[0] += x;
    m[Stride] += y;
    m[2 * Stride] = fmaf(x, x, m[2 * Stride]);
    m[3 * Stride] = fmaf(y, y, m[3 * Stride]);
    m[4 * Stride] = fmaf(x, y, m[4 * Stride]);
}

struct Solution {
    float mean_s, mean_t, ratio, excess, factor;  // the coefficients: means, q, e, scale / (C M v_s)
    float loss;                                   // the channel's part of L
};

/// Not fmaxf, which hides NaN. Only rounding makes a variance negative.
__device__ __forceinline__ float guarded(float variance) {
    const float v = variance + kEps;
    return v < kEps ? kEps : v;
}

__device__ __forceinline__ Solution solve(const float (&m)[kMoments], Shift shift, const PkdLevel& level, float scale) {
    const float samples = static_cast<float>(level.images) * static_cast<float>(level.pixels);
    const float channels = static_cast<float>(level.channels);
    const float x = m[0] / samples, y = m[1] / samples;
    const float var_s = fmaf(-x, x, m[2] / samples), var_t = fmaf(-y, y, m[3] / samples);
    const float cov = fmaf(-x, y, m[4] / samples);
    const float v_s = guarded(var_s), v_t = guarded(var_t);
    const float q = sqrtf(v_s / v_t);
    const float excess_s = fmaf(-q, cov, var_s) / v_s, excess_t = fmaf(-1.0f / q, cov, var_t) / v_t;
    return {shift.s + x, shift.t + y, q, excess_s, scale / (channels * samples) / v_s,
            0.5f * (excess_s + excess_t) / channels};
}

__device__ __forceinline__ void store(const Solution& solution, const PkdLevel& level, uint32 channel) {
    float* const to = level.coefficients + channel * kCoefficients;
    write_result(to, solution.mean_s);
    write_result(to + 1, solution.mean_t);
    write_result(to + 2, solution.ratio);
    write_result(to + 3, solution.excess);
    write_result(to + 4, solution.factor);
    write_result(level.losses + channel, solution.loss);
}

/// c: as in Solution.
__device__ __forceinline__ float gradient_of(float s, float t, const float (&c)[kCoefficients]) {
    const float x = s - c[0], y = t - c[1];
    return c[4] * fmaf(-c[3], x, fmaf(-c[2], y, x));
}

/// L, by one block, when the losses of all channels are there.
__device__ __forceinline__ void total_loss(const PkdArgs& args, float* scratch) {
    float sum[1] = {0.0f};
    for (uint32 i = threadIdx.x; i < args.channels; i += blockDim.x) sum[0] += read_shared_result(args.losses + i);
    block_reduce<Sum>(sum, scratch);
    if (threadIdx.x == 0) write_result(args.loss, sum[0]);
}

/// The i-th of kSpread samples among `count`: steps of the golden ratio, so that no image size puts all on the border.
__device__ __forceinline__ uint32 spread(uint32 i, uint32 count) {
    return static_cast<uint32>((static_cast<uint64>((i + 1) * 2654435769u) * count) >> 32);
}

// ---- NCHW ---------------------------------------------------------------------------------------------------------

/// From a channel's first element to its i-th vector, counted over the images.
template <int V> __device__ __forceinline__ uint64 offset_of(const PkdLevel& level, uint32 i) {
    const uint32 row = level.pixels / V, image = i / row;
    return static_cast<uint64>(image) * level.channels * level.pixels + (i - image * row) * V;
}

/// The channel's shift, in all threads of the block.
template <class T>
__device__ __forceinline__ Shift channel_shift(const PkdLevel& level, const T* s, const T* t, float* scratch) {
    if (threadIdx.x < kWarp) {
        float sums[2] = {0.0f, 0.0f};
        if (threadIdx.x < kSpread) {
            const uint64 at = offset_of<1>(level, spread(threadIdx.x, level.images * level.pixels));
            float one[1];
            read(s + at, one), sums[0] = one[0];
            read(t + at, one), sums[1] = one[0];
        }
        warp_reduce<Sum>(sums);
        if (threadIdx.x == 0) scratch[0] = sums[0] / kSpread, scratch[1] = sums[1] / kSpread;
    }
    __syncthreads();
    return {scratch[0], scratch[1]};
}

/// Adds one record of moments per lane, `records` of them, and so on in a fixed order; every lane gets the sums.
template <class Read>
__device__ __forceinline__ void add_records(uint32 records, float (&m)[kMoments], Read read_moment) {
#pragma unroll
    for (int k = 0; k < kMoments; ++k) m[k] = threadIdx.x < records ? read_moment(threadIdx.x, k) : 0.0f;
    warp_reduce<Sum>(m);
}

/// This thread's share of the moments of split `split`.
template <class T, int V>
__device__ __forceinline__ void walk_statistics(const PkdLevel& level, const T* from_s, const T* from_t, uint32 split,
                                                Shift shift, float (&m)[kMoments]) {
    const uint32 vectors = level.images * (level.pixels / V);
    for (uint32 i = split * kThreads + threadIdx.x; i < vectors; i += level.splits * kThreads) {
        const uint64 at = offset_of<V>(level, i);
        float s[V], t[V];
        read(from_s + at, s);
        read(from_t + at, t);
#pragma unroll
        for (int k = 0; k < V; ++k) add_sample<1>(s[k], t[k], shift, m);
    }
}

/// Block: one of the splits of one channel. Records: (channels, splits, kMoments); splits <= 32.
template <class T> __device__ __forceinline__ void pkd_statistics(const PkdArgs& args) {
    __shared__ float scratch[kWarp * kMoments];
    const PkdLevel& level = level_of_block(args.levels, args.count);
    const uint32 block = blockIdx.x - level.first_block, channel = block / level.splits, split = block % level.splits;
    const uint64 base = static_cast<uint64>(channel) * level.pixels;
    const T* const s = static_cast<const T*>(level.student) + base;
    const T* const t = static_cast<const T*>(level.teacher) + base;
    const Shift shift = channel_shift(level, s, t, scratch);
    float m[kMoments] = {};
    if (level.vectorised)
        walk_statistics<T, kVector<T>>(level, s, t, split, shift, m);
    else
        walk_statistics<T, 1>(level, s, t, split, shift, m);
    block_reduce<Sum>(m, scratch);
    float* const records = level.records + channel * level.splits * kMoments;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < kMoments; ++k) write_result(records + split * kMoments + k, m[k]);
    }
    if (!is_last_block(level.tickets + channel, level.splits) || threadIdx.x >= kWarp) return;
    add_records(level.splits, m, [=](uint32 i, int k) { return read_shared_result(records + i * kMoments + k); });
    if (threadIdx.x == 0) store(solve(m, shift, level, assumed_scale(args.scale)), level, channel);
}

template <class T, int V>
__device__ __forceinline__ void walk_gradient(const PkdLevel& level, uint32 channel, uint32 split,
                                              const float (&c)[kCoefficients]) {
    const uint64 base = static_cast<uint64>(channel) * level.pixels;
    const uint32 vectors = level.images * (level.pixels / V);
#pragma unroll 2  // takes 32 registers on sm_90, no unrolling 40
    for (uint32 i = split * kThreads + threadIdx.x; i < vectors; i += level.splits * kThreads) {
        const uint64 at = base + offset_of<V>(level, i);
        float s[V], t[V];
        read(static_cast<const T*>(level.student) + at, s);
        read(static_cast<const T*>(level.teacher) + at, t);
#pragma unroll
        for (int k = 0; k < V; ++k) s[k] = gradient_of(s[k], t[k], c);
        write(static_cast<T*>(level.gradient) + at, s);
    }
}

/// `count` floats from global to shared memory, by the block; ends with a barrier.
__device__ __forceinline__ void load_table(const float* from, uint32 count, float* to) {
    for (uint32 i = threadIdx.x; i < count; i += kThreads) {
        float one[1];
        read_map(from + i, one);
        to[i] = one[0];
    }
    __syncthreads();
}

/// Block: as in pkd_statistics.
template <class T> __device__ __forceinline__ void pkd_gradient(const PkdArgs& args) {
    __shared__ float table[kCoefficients], scratch[kWarp];
    const PkdLevel& level = level_of_block(args.levels, args.count);
    const uint32 block = blockIdx.x - level.first_block, channel = block / level.splits, split = block % level.splits;
    load_table(level.coefficients + channel * kCoefficients, kCoefficients, table);
    const float c[kCoefficients] = {table[0], table[1], table[2], table[3], table[4]};
    if (level.vectorised)
        walk_gradient<T, kVector<T>>(level, channel, split, c);
    else
        walk_gradient<T, 1>(level, channel, split, c);
    if (args.loss && blockIdx.x == 0) total_loss(args, scratch);
}

EDGESTILL_PER_DTYPE(pkd_statistics, PkdArgs, kThreads)
EDGESTILL_PER_DTYPE(pkd_gradient, PkdArgs, kThreads)

// ---- channels last ------------------------------------------------------------------------------------------------

/// The position of a thread of a channels-last block.
template <int V> struct Tile {
    uint32 index, split, width;
    uint32 column, row, rows;  // this thread's vector and pixel among the `rows` pixels that the block reads at once
    uint32 first, channel;     // channels: the tile's, the thread's
    bool inside;               // the thread's channels exist

    __device__ __forceinline__ explicit Tile(const PkdLevel& level) {
        const uint32 block = blockIdx.x - level.first_block;
        width = level.width;
        index = block / level.splits, split = block % level.splits;
        column = threadIdx.x % width, row = threadIdx.x / width, rows = kThreads / width;
        first = index * width * V, channel = first + column * V;
        inside = channel < level.channels;
    }

    /// The thread's first element, and the elements from one of its pixels to the next.
    __device__ __forceinline__ uint64 begin(const PkdLevel& level) const {
        return static_cast<uint64>(split * rows + row) * level.channels + channel;
    }
    __device__ __forceinline__ uint64 step(const PkdLevel& level) const {
        return static_cast<uint64>(level.splits * rows) * level.channels;
    }
    /// Its pixels among `samples`.
    __device__ __forceinline__ uint32 turns(const PkdLevel& level, uint32 samples) const {
        const uint32 first = split * rows + row;
        return first < samples ? (samples - first - 1) / (level.splits * rows) + 1 : 0;
    }
};

/// Channels of a tile at most.
template <class T> constexpr int kTile = VECTOR_COLUMNS * kVector<T>;
static_assert(SCALAR_COLUMNS <= kTile<float>, "a tile of single channels must fit too");

/// Adds x[k] over the threads of each column into scratch[k * width + column]; ends with a barrier. Another must lie
/// between the last use of `scratch` and this.
template <int K> __device__ __forceinline__ void column_sums(float (&x)[K], uint32 width, float* scratch) {
    const uint32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, sums = K * width;
    for (uint32 offset = kWarp / 2; offset >= width; offset /= 2)
#pragma unroll
        for (int k = 0; k < K; ++k) x[k] += __shfl_xor_sync(kAllLanes, x[k], offset);
    if (lane < width) {
#pragma unroll
        for (int k = 0; k < K; ++k) scratch[warp * sums + k * width + lane] = x[k];
    }
    __syncthreads();
    for (uint32 i = threadIdx.x; i < sums; i += kThreads) {
        float sum = scratch[i];
        for (uint32 w = 1; w < kWarps; ++w) sum += scratch[w * sums + i];
        scratch[i] = sum;
    }
    __syncthreads();
}

/// The shifts of the tile's channels, student's and teacher's, to shifts (2, V, width).
template <class T, int V>
__device__ __forceinline__ void tile_shifts(const PkdLevel& level, const Tile<V>& tile, float* scratch, float* shifts) {
    float s[V], t[V], sums[2 * V];
    fill(s, 0.0f);
    fill(t, 0.0f);
    if (tile.inside && tile.row < kSpread) {
        const uint64 row = spread(tile.row, level.images * level.pixels), at = row * level.channels + tile.channel;
        read(static_cast<const T*>(level.student) + at, s);
        read(static_cast<const T*>(level.teacher) + at, t);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] = s[k], sums[V + k] = t[k];
    column_sums(sums, tile.width, scratch);
    for (uint32 i = threadIdx.x; i < 2 * V * tile.width; i += kThreads) shifts[i] = scratch[i] / kSpread;
    __syncthreads();
}

/// N of a thread's pixels of a tile, `step` elements apart, as they are in memory; all their loads are under way together.
template <class T, int V, int N> struct Turn {
    Raw<V, T> s[N], t[N];

    __device__ __forceinline__ Turn(const PkdLevel& level, uint64 at, uint64 step) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            s[n] = read_raw<V>(static_cast<const T*>(level.student) + at + n * step);
            t[n] = read_raw<V>(static_cast<const T*>(level.teacher) + at + n * step);
        }
    }
};

template <class T, int V, int N>
__device__ __forceinline__ void add_pixels(const Turn<T, V, N>& turn, const Shift (&shift)[V], float (&m)[kMoments * V]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float s[V], t[V];
        unpack<V, T>(turn.s[n], s);
        unpack<V, T>(turn.t[n], t);
#pragma unroll
        for (int k = 0; k < V; ++k) add_sample<V>(s[k], t[k], shift[k], m + k);
    }
}

template <class T, int V, int N>
__device__ __forceinline__ void write_gradient(const PkdLevel& level, uint64 at, uint64 step,
                                               const float (&c)[V][kCoefficients]) {
    const Turn<T, V, N> turn(level, at, step);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float s[V], t[V];
        unpack<V, T>(turn.s[n], s);
        unpack<V, T>(turn.t[n], t);
#pragma unroll
        for (int k = 0; k < V; ++k) s[k] = gradient_of(s[k], t[k], c[k]);
        write(static_cast<T*>(level.gradient) + at + n * step, s);
    }
}

/// This thread's share of the moments of its channels in split `tile.split`: m (kMoments, V).
template <class T, int V>
__device__ __forceinline__ void walk_tile(const PkdLevel& level, const Tile<V>& tile, const float* shifts,
                                          float (&m)[kMoments * V]) {
    const uint32 samples = level.images * level.pixels;
    const float* const column = shifts + tile.column;
    Shift shift[V];
#pragma unroll
    for (int k = 0; k < V; ++k) shift[k] = {column[k * tile.width], column[(V + k) * tile.width]};
    uint32 left = tile.turns(level, samples);
    const uint64 step = tile.step(level);
    uint64 at = tile.begin(level);
#pragma unroll 1
    for (; left >= kPixels; left -= kPixels, at += kPixels * step)
        add_pixels(Turn<T, V, kPixels>(level, at, step), shift, m);
#pragma unroll 1
    for (; left > 0; --left, at += step) add_pixels(Turn<T, V, 1>(level, at, step), shift, m);
}

/// Adds up the tile's records and solves for its channels, a thread each.
template <int V>
__device__ __forceinline__ void solve_tile(const PkdLevel& level, const Tile<V>& tile, const float* records,
                                           const float* shifts, float scale, float* scratch) {
    const uint32 sums = V * tile.width;  // of one moment
    for (uint32 q = 0; q < kMoments; ++q) {  // one after the other: all at once do not fit into the registers
        float x[V];
        fill(x, 0.0f);
        for (uint32 i = tile.row; i < level.splits; i += tile.rows)
#pragma unroll
            for (int k = 0; k < V; ++k)
                x[k] += read_shared_result(records + (i * kMoments + q) * sums + k * tile.width + tile.column);
        column_sums(x, tile.width, scratch + q * kWarps * sums);
    }
    if (threadIdx.x >= sums || tile.first + threadIdx.x >= level.channels) return;
    const uint32 at = threadIdx.x % V * tile.width + threadIdx.x / V;
    float m[kMoments];
#pragma unroll
    for (int q = 0; q < kMoments; ++q) m[q] = scratch[q * kWarps * sums + at];
    store(solve(m, {shifts[at], shifts[sums + at]}, level, scale), level, tile.first + threadIdx.x);
}

/// Block: one of the splits of one tile of channels. Records: (tiles, splits, kMoments, V, width).
template <class T, int V>
__device__ __forceinline__ void tile_statistics(const PkdArgs& args, const PkdLevel& level, float* scratch,
                                                float* shifts) {
    const Tile<V> tile(level);
    const uint32 floats = kMoments * V * tile.width;  // of a record
    float* const records = level.records + static_cast<uint64>(tile.index) * level.splits * floats;
    tile_shifts<T>(level, tile, scratch, shifts);
    float m[kMoments * V];
    fill(m, 0.0f);
    if (tile.inside) walk_tile<T>(level, tile, shifts, m);
    column_sums(m, tile.width, scratch);
    for (uint32 i = threadIdx.x; i < floats; i += kThreads) write_result(records + tile.split * floats + i, scratch[i]);
    __syncthreads();
    if (is_last_block(level.tickets + tile.index, level.splits))
        solve_tile(level, tile, records, shifts, assumed_scale(args.scale), scratch);
}

template <class T> __device__ __forceinline__ void pkd_statistics_last(const PkdArgs& args) {
    __shared__ float scratch[kWarps * kTile<T> * kMoments], shifts[2 * kTile<T>];
    const PkdLevel& level = level_of_block(args.levels, args.count);
    if (level.vectorised)
        tile_statistics<T, kVector<T>>(args, level, scratch, shifts);
    else
        tile_statistics<T, 1>(args, level, scratch, shifts);
}

template <class T, int V> __device__ __forceinline__ void tile_gradient(const PkdLevel& level, float* table) {
    const Tile<V> tile(level);
    const uint32 channels = min(tile.width * V, level.channels - tile.first);
    load_table(level.coefficients + tile.first * kCoefficients, channels * kCoefficients, table);
    if (!tile.inside) return;
    float c[V][kCoefficients];
#pragma unroll
    for (int k = 0; k < V; ++k)
#pragma unroll
        for (int i = 0; i < kCoefficients; ++i) c[k][i] = table[(tile.column * V + k) * kCoefficients + i];
    const uint64 begin = tile.begin(level), step = tile.step(level);
    // Backwards: the L2 cache still holds what pkd_statistics_last read last.
    uint32 left = tile.turns(level, level.images * level.pixels);
#pragma unroll 1
    for (; left >= kPixels; left -= kPixels) write_gradient<T, V, kPixels>(level, begin + (left - kPixels) * step, step, c);
#pragma unroll 1
    for (; left > 0; --left) write_gradient<T, V, 1>(level, begin + (left - 1) * step, step, c);
}

/// Block: as in pkd_statistics_last.
template <class T> __device__ __forceinline__ void pkd_gradient_last(const PkdArgs& args) {
    __shared__ float table[kTile<T> * kCoefficients], scratch[kWarp];
    const PkdLevel& level = level_of_block(args.levels, args.count);
    if (level.vectorised)
        tile_gradient<T, kVector<T>>(level, table);
    else
        tile_gradient<T, 1>(level, table);
    if (args.loss && blockIdx.x == 0) total_loss(args, scratch);
}

#define PKD_LAST_BOUNDS kThreads, LAST_BLOCKS_PER_SM
EDGESTILL_PER_DTYPE(pkd_statistics_last, PkdArgs, PKD_LAST_BOUNDS)
EDGESTILL_PER_DTYPE(pkd_gradient_last, PkdArgs, PKD_LAST_BOUNDS)

// ---- NCHW, a channel in the shared memory of a cluster -------------------------------------------------------------

/// Before the kept maps, in dynamic shared memory: static arrays would leave less of it for the maps.
struct ClusterHead {
    float scratch[kWarp * kMoments];
    float moments[kMoments];  // of this block, read by its peers
    float table[kCoefficients];
    bool last;
};
constexpr int kHeadFloats = CLUSTER_HEAD_BYTES / sizeof(float);
static_assert(sizeof(ClusterHead) <= kHeadFloats * sizeof(float), "the kept maps begin behind it");

/// Cluster: one channel, in equal runs of vectors. Always vectorised; `splits` is the cluster's size.
template <class T> __device__ __forceinline__ void pkd_cluster(const PkdArgs& args) {
#if defined(EDGESTILL_HOST) || __CUDA_ARCH__ >= 900  // never launched on an older GPU: see the launcher
    constexpr int V = kVector<T>;
    DYNAMIC_SHARED(float, memory);
    ClusterHead& head = *reinterpret_cast<ClusterHead*>(memory);
    const PkdLevel& level = level_of_block(args.levels, args.count);
    const uint32 channel = (blockIdx.x - level.first_block) / level.splits, rank = cluster_rank();
    const uint32 vectors = level.images * (level.pixels / V);
    const uint32 first = vectors * rank / level.splits;  // fits: shared memory bounds the vectors
    const uint32 count = vectors * (rank + 1) / level.splits - first;
    uint4* const kept_s = reinterpret_cast<uint4*>(memory + kHeadFloats);
    uint4* const kept_t = kept_s + count;
    const uint64 base = static_cast<uint64>(channel) * level.pixels;
    const T* const from_s = static_cast<const T*>(level.student) + base;
    const T* const from_t = static_cast<const T*>(level.teacher) + base;

    uint4 next_s, next_t;  // under way while the shift is found, and the vectors before them are added up
    const auto fetch = [&](uint32 i) {
        next_s = next_t = {};  // and not what they were, which would have to arrive first
        if (i >= count) return;
        const uint64 at = offset_of<V>(level, first + i);
        next_s = read_raw<V>(from_s + at);
        next_t = read_raw<V>(from_t + at);
    };
    fetch(threadIdx.x);
    const Shift shift = channel_shift(level, from_s, from_t, head.scratch);
    float m[kMoments] = {}, s[V], t[V];
#pragma unroll 2  // or what was fetched would be copied, and waited for, to make room for the next
    for (uint32 i = threadIdx.x; i < count; i += kClusterThreads) {  // a thread keeps, and later reads, its own vectors
        const uint4 raw_s = next_s, raw_t = next_t;
        fetch(i + kClusterThreads);
        kept_s[i] = raw_s;
        kept_t[i] = raw_t;
        unpack<V, T>(raw_s, s);
        unpack<V, T>(raw_t, t);
#pragma unroll
        for (int k = 0; k < V; ++k) add_sample<1>(s[k], t[k], shift, m);
    }
    block_reduce<Sum>(m, head.scratch);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < kMoments; ++k) head.moments[k] = m[k];
    }
    cluster_barrier();
    if (threadIdx.x < kWarp) {
        add_records(level.splits, m, [&](uint32 i, int k) { return cluster_load(head.moments + k, i); });
        if (threadIdx.x == 0) {
            const Solution found = solve(m, shift, level, assumed_scale(args.scale));
            head.table[0] = found.mean_s, head.table[1] = found.mean_t, head.table[2] = found.ratio;
            head.table[3] = found.excess, head.table[4] = found.factor;
            if (rank == 0) write_result(level.losses + channel, found.loss);
        }
    }
    cluster_barrier();  // the table is there; and no peer reads this block's moments any more, so that it may end
    const float c[kCoefficients] = {head.table[0], head.table[1], head.table[2], head.table[3], head.table[4]};
    for (uint32 i = threadIdx.x; i < count; i += kClusterThreads) {
        unpack<V, T>(kept_s[i], s);
        unpack<V, T>(kept_t[i], t);
#pragma unroll
        for (int k = 0; k < V; ++k) s[k] = gradient_of(s[k], t[k], c);
        write(static_cast<T*>(level.gradient) + base + offset_of<V>(level, first + i), s);
    }
    if (args.loss && rank == 0 && is_last_block(args.ticket, gridDim.x / level.splits, &head.last))
        total_loss(args, head.scratch);
#endif
}

EDGESTILL_PER_DTYPE(pkd_cluster, PkdArgs, kClusterThreads)
