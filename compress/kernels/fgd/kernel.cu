// Focal distillation (FGD) without its global term, of all levels, in two launches.
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
//   fgd_sums      sums of |x| along rows and columns, of both from one read     reads 2U (1U without gamma)
//                 The last block of an image makes of its sums the two attentions, their signs and slopes.
//   fgd_gradient  loss and gradient                                             reads 2U, writes 1U
//
// Traffic: 5U (4U without gamma), and for the small maps, float32 of HW and of C an image, 0.14U (float32) or 0.27U
//   (half) if C = 256, twice that if C = 64. `fgd_gradient` goes through blocks and rows backwards: it starts with what
//   `fgd_sums` read last and the L2 still holds. Groups of images that fit in the L2 would be read once, but cost two
//   launches each.
// Tiling: a block owns a tile of rows and columns of both maps; all blocks run at once if there are not too many images.
//   `lanes` threads share a row, 16 bytes each, and each thread walks down the tile. It keeps the sums (the coefficients)
//   of its columns in registers; sums of a row go through shuffles. If 16-byte access does not fit, a thread has four
//   columns of one element.
// Numerics: see common.cuh. Sums of a tile are partial sums, which an image's last block adds in order. Student and teacher
//   go through the same operations, so equal maps give attentions that differ by exactly 0, and sign(0) is 0. The error
//   of a softmax grows with mean |x| / T, as it does in plain torch.
#include "common.cuh"

constexpr int kThreads = THREADS;
constexpr int kBlocks = BLOCKS_PER_SM;
constexpr uint32 kRowsAtOnce = 2;  // of a thread and map whose loads are under way together
constexpr uint32 kEntries = 4;     // of an attention, of each map, that a thread adds up together
constexpr int kTeacher = 0, kStudent = 1;

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
    float* distances;  // (images): gamma/N (mean |S_s - S_t| + mean |Q_s - Q_t|)
    uint32* tickets;   // (images)
    FgdAxis columns, rows;
    uint32 images;
    uint32 first_block;
    uint32 lanes;       // power of two, 8 to 32
    uint32 tile_rows;
    uint32 vectorised;  // 16-byte access is aligned and never crosses a row
    uint32 unused;
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
    tile.first_row = tile.row_part * level.tile_rows;
    tile.end_row = min(tile.first_row + level.tile_rows, level.rows.length);
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

/// A thread's elements of a row, as they are in memory.
template <int V, class T> struct Row {
    Raw<V, T> parts[kColumns<V> / V];
};

/// Starts to read a row that `exists`; 0 beyond the last column.
template <int V, class T>
__device__ __forceinline__ Row<V, T> read_row(const T* row, const FgdLevel& level, const Tile& tile, bool exists) {
    Row<V, T> to;
#pragma unroll
    for (int k = 0; k < kColumns<V>; k += V) {
        const uint32 column = tile.first_column + place_of<V>(level, tile, k);
        to.parts[k / V] = Raw<V, T>();
        if (exists && column < level.columns.length) to.parts[k / V] = read_raw<V>(row + column);
    }
    return to;
}

template <int V, class T> __device__ __forceinline__ void unpack_row(const Row<V, T>& row, float (&to)[kColumns<V>]) {
#pragma unroll
    for (int k = 0; k < kColumns<V>; k += V) {
        float some[V];
        unpack<V, T>(row.parts[k / V], some);
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

/// `shared` holds 2 * kColumns<V> * kThreads floats.
template <class T, int V>
__device__ __forceinline__ void sum_tile(const FgdLevel& level, const Tile& tile, uint32 maps, float* shared) {
    constexpr int K = kColumns<V>;
    const uint64 image = image_offset(level, tile);
    const T* const x[2] = {static_cast<const T*>(level.teacher) + image, static_cast<const T*>(level.student) + image};
    float sums[2][K] = {};
#pragma unroll 1
    for (uint32 start = tile.first_row + tile.group; start - tile.group < tile.end_row; start += kRowsAtOnce * tile.groups) {
        Row<V, T> rows[kRowsAtOnce][2];
#pragma unroll
        for (uint32 r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
            for (uint32 map = 0; map < 2; ++map) {
                const uint32 row = start + r * tile.groups;
                const uint64 at = static_cast<uint64>(row) * level.columns.length;
                rows[r][map] = read_row<V>(x[map] + at, level, tile, row < tile.end_row && map < maps);
            }
        float sum[kRowsAtOnce][2] = {};
#pragma unroll
        for (uint32 r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
            for (uint32 map = 0; map < 2; ++map) {
                float values[K];
                unpack_row<V>(rows[r][map], values);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    sum[r][map] += fabsf(values[k]);
                    sums[map][k] += fabsf(values[k]);
                }
            }
        for (uint32 offset = level.lanes / 2; offset > 0; offset /= 2)
#pragma unroll
            for (uint32 r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
                for (uint32 map = 0; map < 2; ++map) sum[r][map] += __shfl_xor_sync(kAllLanes, sum[r][map], offset);
#pragma unroll
        for (uint32 r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
            for (uint32 map = 0; map < 2; ++map) {
                const uint32 row = start + r * tile.groups;
                if (tile.lane > 0 || row >= tile.end_row || map >= maps) continue;
                write_result(part_of(level.rows, map, level.images, tile.image, tile.column_part) + row, sum[r][map]);
            }
    }
    const uint32 width = K * level.lanes, size = tile.groups * width, column = tile.first_column + threadIdx.x;
#pragma unroll
    for (uint32 map = 0; map < 2; ++map)
#pragma unroll
        for (int k = 0; k < K; ++k)
            shared[map * size + tile.group * width + place_of<V>(level, tile, k)] = sums[map][k];
    for (uint32 half = tile.groups / 2; half > 0; half /= 2) {  // in pairs: the error of 64 one after another is twice eager's
        __syncthreads();
        if (tile.group >= half) continue;
#pragma unroll
        for (uint32 map = 0; map < 2; ++map)
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float* const own = shared + map * size + tile.group * width + place_of<V>(level, tile, k);
                *own += own[half * width];
            }
    }
    __syncthreads();
    if (threadIdx.x >= width || column >= level.columns.length) return;
    for (uint32 map = 0; map < maps; ++map)
        write_result(part_of(level.columns, map, level.images, tile.image, tile.row_part) + column,
                     shared[map * size + threadIdx.x]);
}

// ---- attention ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

/// Means of |x| over the `across` elements of entries `first`, `first` + kThreads, ... of teacher and student.
__device__ __forceinline__ void read_means(const FgdAxis& axis, const float* const (&sums)[2], uint32 first, uint32 across,
                                           float (&means)[kEntries][2]) {
#pragma unroll
    for (uint32 e = 0; e < kEntries; ++e) fill(means[e], 0.0f);
#pragma unroll 1  // two parts at once spill
    for (uint32 part = 0; part < axis.parts; ++part) {
        const uint64 begin = static_cast<uint64>(part) * axis.length;
#pragma unroll
        for (uint32 e = 0; e < kEntries; ++e) {
            const uint32 i = first + e * kThreads;
#pragma unroll
            for (int map = 0; map < 2; ++map)
                if (i < axis.length) means[e][map] += read_shared_result(sums[map] + begin + i);
        }
    }
#pragma unroll
    for (uint32 e = 0; e < kEntries; ++e)
#pragma unroll
        for (int map = 0; map < 2; ++map) means[e][map] /= static_cast<float>(across);
}

/// The weights and slopes of one axis of one image, whose sums are there. The result, in every thread, is
/// gamma/N mean |S_s - S_t|. `scratch` holds 2 * kWarp floats.
__device__ __forceinline__ float attend(const FgdArgs& args, const FgdAxis& axis, uint32 across, uint32 images, uint32 image,
                                        float* scratch) {
    const uint64 entry = static_cast<uint64>(image) * axis.length;
    const float length = static_cast<float>(axis.length);
    // Without gamma there are no sums of the student: taken for the teacher's, its slopes become 0.
    const float* const sums[2] = {part_of(axis, kTeacher, images, image, 0), part_of(axis, args.maps - 1, images, image, 0)};
    // First means, then their exponentials, then what the two are for. A thread reads only what it wrote itself.
    float* const maps[2] = {axis.weights + entry, axis.slopes + entry};
    float top[2] = {Max::identity(), Max::identity()};
#pragma unroll 1
    for (uint32 first = threadIdx.x; first < axis.length; first += kEntries * kThreads) {
        float means[kEntries][2];
        read_means(axis, sums, first, across, means);
#pragma unroll
        for (uint32 e = 0; e < kEntries; ++e) {
            const uint32 i = first + e * kThreads;
            if (i >= axis.length) continue;
#pragma unroll
            for (int map = 0; map < 2; ++map) {
                write_result(maps[map] + i, means[e][map]);
                top[map] = Max::of(top[map], means[e][map]);
            }
        }
    }
    block_reduce<Max>(top, scratch);

    float factors[2] = {0.0f, 0.0f};  // from an exponential to the attention, once they are added up
#pragma unroll 4
    for (uint32 i = threadIdx.x; i < axis.length; i += kThreads)
#pragma unroll
        for (int map = 0; map < 2; ++map) {
            float mean[1];
            read_fresh(maps[map] + i, mean);
            const float exponential = expf((mean[0] - top[map]) * args.inv_temperature);
            write_result(maps[map] + i, exponential);
            factors[map] += exponential;
        }
    block_reduce<Sum>(factors, scratch);
#pragma unroll
    for (int map = 0; map < 2; ++map) factors[map] = length / factors[map];
    // Not contracted with the difference of two attentions, or equal ones would no longer differ by 0.
    const auto attention = [&](int map, uint32 i) {
        float exponential[1];
        read_fresh(maps[map] + i, exponential);
        return __fmul_rn(exponential[0], factors[map]);
    };

    float totals[2] = {0.0f, 0.0f};  // of sign(S_s - S_t) S_s, of |S_s - S_t|
#pragma unroll 4
    for (uint32 i = threadIdx.x; i < axis.length; i += kThreads) {
        const float of_student = attention(kStudent, i), difference = of_student - attention(kTeacher, i);
        totals[0] += sign(difference) * of_student;
        totals[1] += fabsf(difference);
    }
    block_reduce<Sum>(totals, scratch);
    const float mean = totals[0] / length, weight = args.gamma / (static_cast<float>(images) * length);
    const float slope = weight * args.inv_temperature / static_cast<float>(across);
#pragma unroll 4
    for (uint32 i = threadIdx.x; i < axis.length; i += kThreads) {
        const float of_teacher = attention(kTeacher, i), of_student = attention(kStudent, i);
        float mask[1] = {1.0f};
        if (axis.mask) read_map(axis.mask + entry + i, mask);
        write_result(maps[kTeacher] + i, mask[0] * of_teacher);
        write_result(maps[kStudent] + i, slope * of_student * (sign(of_student - of_teacher) - mean));
    }
    return weight * totals[1];
}

template <class T> __device__ __forceinline__ void fgd_sums(const FgdArgs& args) {
    __shared__ float shared[2 * kVector<T> * kThreads];
    const FgdLevel& level = level_of_block(args.levels, args.count);
    const uint32 block = blockIdx.x - level.first_block, tiles = level.rows.parts * level.columns.parts;
    if (level.vectorised)
        sum_tile<T, kVector<T>>(level, tile_at<kVector<T>>(level, block), args.maps, shared);
    else
        sum_tile<T, 1>(level, tile_at<1>(level, block), args.maps, shared);
    const uint32 image = block / tiles;
    __syncthreads();
    if (!is_last_block(level.tickets + image, tiles)) return;
    const float of_columns = attend(args, level.columns, level.rows.length, level.images, image, shared);
    const float of_rows = attend(args, level.rows, level.columns.length, level.images, image, shared);
    if (threadIdx.x == 0) write_result(level.distances + image, of_columns + of_rows);
}

EDGESTILL_PER_DTYPE(fgd_sums, FgdArgs, kThreads, kBlocks)

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
    const uint32 first = tile.first_row + tile.group;
    // Backwards: the L2 cache still holds what fgd_sums read last.
#pragma unroll 1
    for (uint32 left = first < tile.end_row ? (tile.end_row - first - 1) / tile.groups + 1 : 0; left > 0; --left) {
        const uint32 row = first + (left - 1) * tile.groups;
        const uint64 offset = image + static_cast<uint64>(row) * level.columns.length;
        const auto raw_s = read_row<V>(static_cast<const T*>(level.student) + offset, level, tile, true);
        const auto raw_t = read_row<V>(static_cast<const T*>(level.teacher) + offset, level, tile, true);
        const float weight = read_broadcast(level.rows.weights + rows + row, tile.lane == 0);
        const float slope = scale * read_broadcast(level.rows.slopes + rows + row, tile.lane == 0);
        float s[K], t[K], sum = 0.0f;
        unpack_row<V>(raw_s, s);
        unpack_row<V>(raw_t, t);
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
    if (threadIdx.x == 0 && index % tiles == 0) mine += read_broadcast(level.distances + index / tiles, true);
    grid_total(mine, args.partials, args.ticket, args.loss, scratch);
}

EDGESTILL_PER_DTYPE(fgd_gradient, FgdArgs, kThreads, kBlocks)
