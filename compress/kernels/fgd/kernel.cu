// Focal distillation (FGD) without its global term, of all levels, in three launches.
//
//     u[n,p] = mean_c |x|    S = HW softmax_p(u / T)        v[n,c] = mean_p |x|    Q = C softmax_c(v / T)
//     L = sum over levels  1/N sum_n ( 1/C sum m S_t Q_t (s - t)^2 + gamma (mean_p |S_s - S_t| + mean_c |Q_s - Q_t|) )
//     g = scale * ( 2/(N C) m S_t Q_t (s - t) + sign(s) (e[n,p] / C + d[n,c] / HW) )
//     e = gamma/(N HW T) S_s (sign(S_s - S_t) - mean_p(sign(S_s - S_t) S_s))
//     d = gamma/(N C T) Q_s (sign(Q_s - Q_t) - mean_c(sign(Q_s - Q_t) Q_s))
//
// Pixels and channels have the same role, so the kernels see only one matrix per image, with rows and columns:
// C x HW in NCHW, HW x C channels last. The mask m belongs to whichever are the pixels.
//
//   fgd_sums       sums of |x| along rows and columns, of both from one read     reads 2U (1U without gamma)
//   fgd_attention  softmaxes, signs and slopes of the two small maps             float32 maps of HW and C per image
//   fgd_gradient   loss and gradient                                             reads 2U, writes 1U
//
// Traffic: 5U (4U without gamma), and for the small maps 0.15U (float32) or 0.25U (half) if C = 256, twice that
//   if C = 64. `fgd_gradient` goes through the tiles backwards: it starts with what `fgd_sums` read last and the L2
//   still holds. Groups of images that fit in the L2 would be read once, but cost three launches each.
// Tiling: a block owns a tile of rows and columns; `lanes` threads share a row, 16 bytes each, and each thread walks
//   down kRowsPerThread rows. It keeps the sums (the coefficients) of its columns in registers; sums of a row go
//   through shuffles. If 16-byte access does not fit, a thread has four columns of one element.
// Numerics: see common.cuh. Sums of a tile are partial sums, which fgd_attention adds in order. Student and teacher go
//   through the same operations, so equal maps give attentions that differ by exactly 0, and sign(0) is 0. The error of
//   a softmax grows with mean |x| / T, as it does in plain torch.
#include "common.cuh"

constexpr int kThreads = THREADS;
constexpr int kAttentionThreads = ATTENTION_THREADS;
constexpr uint32 kRowsPerThread = ROWS_PER_THREAD;
constexpr int kRowsAtOnce = 2;  // whose loads are in flight together

/// Columns of a thread that reads V neighbours at a time.
template <int V> constexpr int kColumns = V == 1 ? SCALAR_COLUMNS : V;

/// The rows, or the columns, of all images.
struct FgdAxis {
    float* sums;        // (maps, images, parts, length): of |x|, one part for each tile across
    float* weights;     // (images, length): teacher's attention, times the mask where these are pixels
    float* slopes;      // (images, length): derivative of the loss by |s|
    const float* mask;  // (images, length), or null where these are channels
    uint32 length, parts;
};

struct FgdLevel {
    const void* student;
    const void* teacher;
    void* gradient;
    float* distances;  // (images, 2): gamma/N mean |S_s - S_t| of the columns, of the rows
    FgdAxis columns, rows;
    uint32 images;
    uint32 first_block;  // if each block has one tile
    uint32 lanes;        // power of two, 8 to 32
    uint32 vectorised;   // 16-byte access is aligned and never crosses a row
};

struct FgdArgs {
    FgdLevel levels[kMaxLevels];
    const float* scale;
    float* partials;
    uint32* ticket;
    float* loss;
    float gamma, inv_temperature;
    uint32 maps;  // to be summed: the teacher's, and with gamma the student's
    int count;
};

// ---- tiles --------------------------------------------------------------------------------------------------------

/// A block's tile, and this thread's rows and columns of it.
struct Tile {
    uint32 image, row_part, column_part;  // a row has one part for each tile of columns
    uint32 group, groups;                 // of threads that share a row
    uint32 lane;                          // of the group
    uint32 first_row, end_row;
    uint32 first_column;
};

template <int V> __device__ __forceinline__ Tile tile_at(const FgdLevel& level, uint32 index) {
    Tile tile;
    tile.column_part = index % level.rows.parts;
    tile.row_part = index / level.rows.parts % level.columns.parts;
    tile.image = index / level.rows.parts / level.columns.parts;
    tile.group = threadIdx.x / level.lanes;
    tile.groups = kThreads / level.lanes;
    tile.lane = threadIdx.x % level.lanes;
    tile.first_row = tile.row_part * tile.groups * kRowsPerThread;
    tile.end_row = min(tile.first_row + tile.groups * kRowsPerThread, level.rows.length);
    tile.first_column = tile.column_part * level.lanes * kColumns<V>;
    return tile;
}

/// Place in the tile of the k-th column of a thread. The threads of a group read V neighbours each, all in one stretch.
template <int V> __device__ __forceinline__ uint32 place_of(const FgdLevel& level, const Tile& tile, int k) {
    return (k / V * level.lanes + tile.lane) * V + k % V;
}

__device__ __forceinline__ uint64 image_offset(const FgdLevel& level, const Tile& tile) {
    return static_cast<uint64>(tile.image) * level.rows.length * level.columns.length;
}

/// A thread's elements of a row; 0 beyond the last column.
template <int V, class T, int K>
__device__ __forceinline__ void read_row(const T* row, const FgdLevel& level, const Tile& tile, float (&to)[K]) {
#pragma unroll
    for (int k = 0; k < K; k += V) {
        const uint32 column = tile.first_column + place_of<V>(level, tile, k);
        float some[V];
        fill(some, 0.0f);
        if (column < level.columns.length) read(row + column, some);
#pragma unroll
        for (int i = 0; i < V; ++i) to[k + i] = some[i];
    }
}

template <int V, class T, int K>
__device__ __forceinline__ void write_row(T* row, const FgdLevel& level, const Tile& tile, const float (&from)[K]) {
#pragma unroll
    for (int k = 0; k < K; k += V) {
        const uint32 column = tile.first_column + place_of<V>(level, tile, k);
        float some[V];
#pragma unroll
        for (int i = 0; i < V; ++i) some[i] = from[k + i];
        if (column < level.columns.length) write(row + column, some);
    }
}

// ---- sums ---------------------------------------------------------------------------------------------------------

/// Where the partial sums of a tile begin.
__device__ __forceinline__ float* part_of(const FgdAxis& axis, uint32 map, uint32 images, uint32 image, uint32 part) {
    return axis.sums + (static_cast<uint64>(map * images + image) * axis.parts + part) * axis.length;
}

/// `shared` holds kColumns<V> * kThreads floats.
template <class T, int V>
__device__ __forceinline__ void sum_tile(const FgdLevel& level, uint32 index, uint32 map, float* shared) {
    constexpr int K = kColumns<V>;
    const Tile tile = tile_at<V>(level, index);
    const T* const x = static_cast<const T*>(map == 0 ? level.teacher : level.student) + image_offset(level, tile);
    float* const row_sums = part_of(level.rows, map, level.images, tile.image, tile.column_part);
    float* const column_sums = part_of(level.columns, map, level.images, tile.image, tile.row_part);
    float sums[K];
    fill(sums, 0.0f);
    for (uint32 start = tile.first_row; start < tile.end_row; start += kRowsAtOnce * tile.groups) {
        float values[kRowsAtOnce][K], sum[kRowsAtOnce];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const uint32 row = start + r * tile.groups + tile.group;
            fill(values[r], 0.0f);
            if (row < tile.end_row) read_row<V>(x + row * level.columns.length, level, tile, values[r]);
        }
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            sum[r] = 0.0f;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float magnitude = fabsf(values[r][k]);
                sum[r] += magnitude;
                sums[k] += magnitude;
            }
        }
        for (uint32 offset = level.lanes / 2; offset > 0; offset /= 2)
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; ++r) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const uint32 row = start + r * tile.groups + tile.group;
            if (tile.lane == 0 && row < tile.end_row) write_result(row_sums + row, sum[r]);
        }
    }
    const uint32 width = K * level.lanes, column = tile.first_column + threadIdx.x;
#pragma unroll
    for (int k = 0; k < K; ++k) shared[tile.group * width + place_of<V>(level, tile, k)] = sums[k];
    __syncthreads();
    if (threadIdx.x >= width || column >= level.columns.length) return;
    float sum = 0.0f;
    for (uint32 group = 0; group < tile.groups; ++group) sum += shared[group * width + threadIdx.x];
    write_result(column_sums + column, sum);
}

template <class T> __device__ __forceinline__ void fgd_sums(const FgdArgs& args) {
    __shared__ float shared[kVector<T> * kThreads];
    const uint32 block = blockIdx.x / args.maps, map = blockIdx.x % args.maps;
    const FgdLevel& level = entry_of_block(args.levels, args.count, block);
    if (level.vectorised)
        sum_tile<T, kVector<T>>(level, block - level.first_block, map, shared);
    else
        sum_tile<T, 1>(level, block - level.first_block, map, shared);
}

EDGESTILL_PER_DTYPE(fgd_sums, FgdArgs, kThreads)

// ---- attention ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

/// One axis of one image, of teacher (0) and student (1).
struct Attention {
    float* maps[2];  // means of |x|, of which each thread reads only those that it wrote
    float top[2], sum[2];
    float length, inv_temperature;

    __device__ __forceinline__ float exponential(int map, uint32 i) const {
        float mean[1];
        read_fresh(maps[map] + i, mean);
        return expf((mean[0] - top[map]) * inv_temperature);
    }
    /// Ends with the division: a product would be contracted with the difference of two attentions, and equal ones
    /// would no longer differ by 0.
    __device__ __forceinline__ float at(int map, uint32 i) const { return length * exponential(map, i) / sum[map]; }
};

/// Mean of |x| over the `across` elements of entry `i`; `sums` is the first part of them.
__device__ __forceinline__ float mean_at(const FgdAxis& axis, const float* sums, uint32 i, uint32 across) {
    float sum = 0.0f;
#pragma unroll 8
    for (uint32 part = 0; part < axis.parts; ++part) {
        float one[1];
        read_map(sums + static_cast<uint64>(part) * axis.length + i, one);
        sum += one[0];
    }
    return sum / static_cast<float>(across);
}

/// Softmax of the means, which this writes to `maps`.
__device__ __forceinline__ Attention attend(
    const FgdArgs& args, const FgdAxis& axis, uint32 across, uint32 images, uint32 image, float* scratch) {
    const uint64 entry = static_cast<uint64>(image) * axis.length;
    const float length = static_cast<float>(axis.length);
    Attention attention = {{axis.weights + entry, axis.slopes + entry}, {}, {}, length, args.inv_temperature};
    fill(attention.top, Max::identity());
#pragma unroll
    for (int map = 0; map < 2; ++map) {
        // Without gamma there are no sums of the student: taken for the teacher's, its slopes become 0.
        const float* const sums = part_of(axis, min(static_cast<uint32>(map), args.maps - 1), images, image, 0);
        for (uint32 i = threadIdx.x; i < axis.length; i += kAttentionThreads) {
            const float mean = mean_at(axis, sums, i, across);
            write_result(attention.maps[map] + i, mean);
            attention.top[map] = Max::of(attention.top[map], mean);
        }
    }
    block_reduce<Max>(attention.top, scratch);
    fill(attention.sum, 0.0f);
    for (uint32 i = threadIdx.x; i < axis.length; i += kAttentionThreads) {
#pragma unroll
        for (int map = 0; map < 2; ++map) attention.sum[map] += attention.exponential(map, i);
    }
    block_reduce<Sum>(attention.sum, scratch);
    return attention;
}

/// Turns the means into the teacher's weights and the student's slopes. The result, in every thread, is gamma/N mean
/// |S_s - S_t|; `weight` is gamma/(N length).
__device__ __forceinline__ float finish(
    const Attention& attention, const FgdAxis& axis, uint32 across, uint32 image, float weight, float* scratch) {
    float sums[2] = {0.0f, 0.0f};  // of sign(S_s - S_t) S_s, of |S_s - S_t|
    for (uint32 i = threadIdx.x; i < axis.length; i += kAttentionThreads) {
        const float of_student = attention.at(1, i), difference = of_student - attention.at(0, i);
        sums[0] += sign(difference) * of_student;
        sums[1] += fabsf(difference);
    }
    block_reduce<Sum>(sums, scratch);
    const float mean = sums[0] / attention.length;
    const float slope = weight * attention.inv_temperature / static_cast<float>(across);
    for (uint32 i = threadIdx.x; i < axis.length; i += kAttentionThreads) {
        const float of_teacher = attention.at(0, i), of_student = attention.at(1, i);
        float mask[1] = {1.0f};
        if (axis.mask) read_map(axis.mask + static_cast<uint64>(image) * axis.length + i, mask);
        write_result(attention.maps[0] + i, mask[0] * of_teacher);
        write_result(attention.maps[1] + i, slope * of_student * (sign(of_student - of_teacher) - mean));
    }
    return weight * sums[1];
}

/// A block for each axis of each image of each level, as if all levels had `gridDim.x / (2 * count)` images.
extern "C" __global__ void __launch_bounds__(kAttentionThreads, 1) fgd_attention(const __grid_constant__ FgdArgs args) {
    __shared__ float scratch[2 * kWarp];
    const uint32 axis = blockIdx.x % 2, image = blockIdx.x / 2 / args.count;
    const FgdLevel& level = args.levels[blockIdx.x / 2 % args.count];
    if (image >= level.images) return;
    const FgdAxis& mine = axis == 0 ? level.columns : level.rows;
    const uint32 across = axis == 0 ? level.rows.length : level.columns.length;
    const float weight = args.gamma / (static_cast<float>(level.images) * static_cast<float>(mine.length));
    const Attention attention = attend(args, mine, across, level.images, image, scratch);
    const float distance = finish(attention, mine, across, image, weight, scratch);
    if (threadIdx.x == 0) write_result(level.distances + 2 * image + axis, distance);
}

EDGESTILL_KERNEL(fgd_attention, FgdArgs)

// ---- gradient -----------------------------------------------------------------------------------------------------

/// This thread's share of sum m S_t Q_t (s - t)^2; writes its gradients. `factor` is scale * 2/(N C); `shared` holds
/// 2 * kColumns<V> * kWarp floats.
template <class T, int V>
__device__ __forceinline__ float compare_tile(
    const FgdLevel& level, uint32 index, float factor, float scale, float* shared) {
    constexpr int K = kColumns<V>;
    const Tile tile = tile_at<V>(level, index);
    const uint32 width = K * level.lanes, column = tile.first_column + threadIdx.x;
    if (threadIdx.x < width) {
        const uint64 from = static_cast<uint64>(tile.image) * level.columns.length + column;
        const bool inside = column < level.columns.length;
        shared[threadIdx.x] = inside ? read_broadcast(level.columns.weights + from, true) : 0.0f;
        shared[width + threadIdx.x] = inside ? read_broadcast(level.columns.slopes + from, true) : 0.0f;
    }
    __syncthreads();
    float weights[K], slopes[K], total = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        weights[k] = shared[place_of<V>(level, tile, k)];
        slopes[k] = scale * shared[width + place_of<V>(level, tile, k)];
    }
    const uint64 image = image_offset(level, tile), rows = static_cast<uint64>(tile.image) * level.rows.length;
#pragma unroll 1
    for (uint32 row = tile.first_row + tile.group; row < tile.end_row; row += tile.groups) {
        const uint64 offset = image + row * level.columns.length;
        float s[K], t[K], sum = 0.0f;
        read_row<V>(static_cast<const T*>(level.student) + offset, level, tile, s);
        read_row<V>(static_cast<const T*>(level.teacher) + offset, level, tile, t);
        const float weight = read_broadcast(level.rows.weights + rows + row, tile.lane == 0);
        const float slope = scale * read_broadcast(level.rows.slopes + rows + row, tile.lane == 0);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float difference = s[k] - t[k], weighted = weights[k] * difference;
            sum = fmaf(weighted, difference, sum);
            s[k] = fmaf(factor * weight, weighted, sign(s[k]) * (slopes[k] + slope));
        }
        write_row<V>(static_cast<T*>(level.gradient) + offset, level, tile, s);
        total = fmaf(weight, sum, total);
    }
    return total;
}

template <class T> __device__ __forceinline__ void fgd_gradient(const FgdArgs& args) {
    __shared__ float scratch[kWarp], shared[2 * kVector<T> * kWarp];
    const uint32 block = gridDim.x - 1 - blockIdx.x;
    const FgdLevel& level = entry_of_block(args.levels, args.count, block);
    const uint32 index = block - level.first_block, tiles = level.rows.parts * level.columns.parts;
    const uint32 channels = level.columns.mask ? level.rows.length : level.columns.length;
    const float inv = 1.0f / (static_cast<float>(level.images) * static_cast<float>(channels));
    const float scale = assumed_scale(args.scale), factor = scale * 2.0f * inv;
    float sum[1] = {level.vectorised ? compare_tile<T, kVector<T>>(level, index, factor, scale, shared)
                                     : compare_tile<T, 1>(level, index, factor, scale, shared)};
    block_reduce<Sum>(sum, scratch);
    float mine = inv * sum[0];
    if (threadIdx.x == 0 && index % tiles == 0) {
        float distances[2];
        read_map(level.distances + index / tiles * 2, distances);
        mine += distances[0] + distances[1];
    }
    grid_total(mine, args.partials, args.ticket, args.loss, scratch);
}

EDGESTILL_PER_DTYPE(fgd_gradient, FgdArgs, kThreads)
