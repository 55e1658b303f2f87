// 1x1 adapter and weighted mean squared error on tensor cores: loss and all gradients in one pass, for float16 and
// bfloat16 maps of up to 128 channels. The adapted map is never written to memory.
//
//     a = W x + b,  d = a - t        per pixel; W and b rounded to the dtype of the maps
//     L = sum over levels  inv * sum_{n,c,p} w[n,p] d^2        inv = 1 / (C * sum w + 1e-9), or 1 / (N C HW)
//     G = u w d,  f = scale * 2 * inv / u:        dx = f W^T G,  dW = f sum_{n,p} G x^T,  db = f sum_{n,p} G
//
// Traffic: reads x and t once, writes dx once (3U, U the mean of the two maps), and dW | db as float32 once per block,
//   which `adapter_sums` reads again: at 128 channels of 80x80, batch 32, another 0.3U.
// Tiling: a tile is 64 pixels of all channels; a fixed number of blocks process the tiles of their level in strides. A
//   block has a warp for every 16 channels of the teacher, and W in shared memory all the time; the next tile of x and
//   t is copied there (cp.async) while this one is processed. For each tile
//     1. a = W x, every warp its 16 channels;
//     2. d, loss and db from the registers; G overwrites t in shared memory;
//     3. dW += G x^T, in registers from the first tile to the last;
//     4. dx = W^T G, divided among the warps by channels and pixels; overwrites x in shared memory, then goes to memory.
//   NCHW holds a tile as rows of pixels. Channels last holds it as rows of channels, and there every product is done
//   transposed, so that two neighbours in a register are neighbours in memory. A build serves one pair of channel
//   counts and one layout. Channels are padded to a multiple of 16 by zeros.
// Numerics: products of 16-bit values, added in float32; a and d stay float32. G is rounded to 16 bits for the last two
//   products, before scale and inv come in, which would make it vanish in float16; u = 1 / sqrt(mean w) keeps it in
//   range whatever the weights' size: halfway between weights that are alike and one pixel that has them all.
#include "tensor_core.cuh"
#include "weights.cuh"

constexpr int kStudent = STUDENT_CHANNELS, kTeacher = TEACHER_CHANNELS;
constexpr bool kLast = CHANNELS_LAST;
static_assert(kStudent % 8 == 0 && kTeacher % 8 == 0 && kStudent <= MAX_CHANNELS && kTeacher <= MAX_CHANNELS,
              "what a block can hold");

constexpr int kPixels = PIXELS;  // of a tile
template <int kChannels> constexpr int kPadded = (kChannels + 15) / 16 * 16;
constexpr int kIn = kPadded<kStudent>, kOut = kPadded<kTeacher>;
constexpr int kWarps = kOut / 16, kThreads = kWarps * kWarp;
constexpr int kMinBlocks = BLOCKS_PER_SM > 1 ? BLOCKS_PER_SM : 0;  // small blocks spill to have more
constexpr int kMatrix = kTeacher * kStudent, kSums = kMatrix + kTeacher;  // dW, then db
constexpr int kSumThreads = SUM_THREADS, kSumEntries = SUM_ENTRIES;  // of a block of adapter_sums
constexpr int kSumBlocks = (kSums + kSumEntries - 1) / kSumEntries;
static_assert(kSums % 4 == 0 && kSumEntries == 4 * kWarp && kSumThreads % kSumEntries == 0, "a lane adds four neighbours");

struct AdapterLevel {
    const void* student;
    const void* teacher;
    void* gradient;
    const float* matrix;           // (kTeacher, kStudent)
    const float* bias;             // (kTeacher)
    const float* weights;          // (N, HW), or null
    const float* weight_partials;  // (kWeightBlocks), or null
    float* sums;                   // (blocks, kSums)
    float* matrix_gradient;
    float* bias_gradient;
    uint32 images, pixels;  // of one image; channels last counts as one image of N * HW
    uint32 first_block, blocks;
    uint32 vectorised;  // 16-byte access is aligned and never crosses a row
    uint32 unused;
};

struct AdapterArgs {
    AdapterLevel levels[kMaxLevels];
    const float* scale;
    float* partials;
    uint32* ticket;
    float* loss;
    int count;
};

// ---- shared memory ------------------------------------------------------------------------------------------------

/// Elements from row to row. The eight rows that ldmatrix reads at one column must be in eight different groups of
/// four banks: rows of 64 or 128 elements are swizzled to that end, others are an odd number of 16 bytes apart.
template <int kColumns> constexpr int kPitch = kColumns % 64 == 0 ? kColumns : kColumns + 8;

template <class T, int kColumns> struct Matrix {
    using Element = T;
    T* first;
    __device__ __forceinline__ T* at(int row, int column) const {
        if constexpr (kColumns % 64 == 0) column ^= row % 8 * 8;
        return first + row * kPitch<kColumns> + column;
    }
};

/// A tile of a map: a row for each channel, or channels last for each pixel.
template <class T, int kChannels> using Tile = Matrix<T, kLast ? kPadded<kChannels> : kPixels>;
template <int kChannels>
constexpr int kTileSize = kLast ? kPixels * kPitch<kPadded<kChannels>> : kPadded<kChannels> * kPitch<kPixels>;

/// A block's shared memory; tiles and weights twice, for the current tile and for the next.
template <class T> struct Shared {
    T* first;
    __device__ __forceinline__ Matrix<T, kIn> matrix() const { return {first}; }
    __device__ __forceinline__ Tile<T, kStudent> student(int buffer) const {
        return {first + kOut * kPitch<kIn> + buffer * kTileSize<kStudent>};
    }
    __device__ __forceinline__ Tile<T, kTeacher> teacher(int buffer) const {
        return {student(2).first + buffer * kTileSize<kTeacher>};
    }
    __device__ __forceinline__ float* weights(int buffer) const {
        return reinterpret_cast<float*>(teacher(2).first) + buffer * kPixels;
    }
    __device__ __forceinline__ float* bias() const { return weights(2); }
};

/// Two neighbours, moved as one.
template <class T> struct alignas(4) Pair {
    T x, y;
};

// ---- tiles, in and out --------------------------------------------------------------------------------------------

struct Place {
    uint32 image, pixel;  // the tile's first, in its image
    int left;             // of the tile's pixels, those inside the image
};

__device__ __forceinline__ uint32 tiles_of_image(const AdapterLevel& level) {
    return (level.pixels + kPixels - 1) / kPixels;
}

__device__ __forceinline__ Place place_of(const AdapterLevel& level, uint32 tile) {
    const uint32 tiles = tiles_of_image(level), pixel = tile % tiles * kPixels;
    return {tile / tiles, pixel, static_cast<int>(min(level.pixels - pixel, uint32{kPixels}))};
}

/// Elements before the tile in a map.
template <int kChannels> __device__ __forceinline__ uint64 offset_of(const AdapterLevel& level, const Place& place) {
    const uint64 image = static_cast<uint64>(place.image) * level.pixels;
    return image * kChannels + static_cast<uint64>(place.pixel) * (kLast ? kChannels : 1);
}

/// Calls body(row, column, offset, count) for each 8 neighbours of a tile that this thread moves: where they are in
/// shared memory, how far behind the tile's first element in the map, and how many of them the map has.
template <int kChannels, class Body>
__device__ __forceinline__ void each_eight(const AdapterLevel& level, int left, Body body) {
    constexpr int kRows = kLast ? kPixels : kPadded<kChannels>, kEights = (kLast ? kPadded<kChannels> : kPixels) / 8;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kEights; i += kThreads) {
        const int row = i / kEights, column = i % kEights * 8;
        const int channel = kLast ? column : row, pixel = kLast ? row : column;
        const int count = channel >= kChannels || pixel >= left ? 0 : kLast ? 8 : min(left - pixel, 8);
        body(row, column, kLast ? uint32{kChannels} * pixel + channel : level.pixels * channel + pixel, count);
    }
}

/// Starts to read a tile; values outside the image, and those that pad the channels, become 0.
template <class T, int kChannels>
__device__ __forceinline__ void load_tile(const AdapterLevel& level, const void* map, const Place& place,
                                          const Tile<T, kChannels>& to) {
    const T* const from = static_cast<const T*>(map) + offset_of<kChannels>(level, place);
    if (level.vectorised) {
        each_eight<kChannels>(level, place.left, [&](int row, int column, uint32 offset, int count) {
            copy_async<16>(to.at(row, column), count ? from + offset : from, count);
        });
    } else {
        each_eight<kChannels>(level, place.left, [&](int row, int column, uint32 offset, int count) {
            for (int i = 0; i < 8; ++i) {
                float value[1] = {0.0f};
                if (i < count) read(from + offset + i, value);
                to.at(row, column)[i] = from_float<T>(value[0]);
            }
        });
    }
}

/// Writes a tile of the student's gradient.
template <class T>
__device__ __forceinline__ void store_tile(const AdapterLevel& level, const Place& place,
                                           const Tile<T, kStudent>& from) {
    T* const to = static_cast<T*>(level.gradient) + offset_of<kStudent>(level, place);
    if (level.vectorised) {
        each_eight<kStudent>(level, place.left, [&](int row, int column, uint32 offset, int count) {
            if (count) write_raw(to + offset, *reinterpret_cast<const uint4*>(from.at(row, column)));
        });
    } else {
        each_eight<kStudent>(level, place.left, [&](int row, int column, uint32 offset, int count) {
            for (int i = 0; i < count; ++i) {
                const float value[1] = {to_float(from.at(row, column)[i])};
                write(to + offset + i, value);
            }
        });
    }
}

/// Starts to read all inputs of a tile.
template <class T>
__device__ __forceinline__ void fetch(const AdapterLevel& level, uint32 tile, const Shared<T>& shared, int buffer) {
    const Place place = place_of(level, tile);
    load_tile<T, kStudent>(level, level.student, place, shared.student(buffer));
    load_tile<T, kTeacher>(level, level.teacher, place, shared.teacher(buffer));
    if (!level.weights) return;
    const float* const from = level.weights + static_cast<uint64>(place.image) * level.pixels + place.pixel;
    for (int i = threadIdx.x; i < kPixels; i += kThreads)
        copy_async<4>(shared.weights(buffer) + i, i < place.left ? from + i : from, i < place.left);
}

/// W, b and, if a level has none, weights of 1.
template <class T> __device__ __forceinline__ void fetch_constants(const AdapterLevel& level, const Shared<T>& shared) {
#pragma unroll 8
    for (int i = threadIdx.x; i < kOut * kIn; i += kThreads) {
        const int row = i / kIn, column = i % kIn;
        float value[1] = {0.0f};
        if (row < kTeacher && column < kStudent) read_map(level.matrix + row * kStudent + column, value);
        *shared.matrix().at(row, column) = from_float<T>(value[0]);
    }
    for (int i = threadIdx.x; i < kTeacher; i += kThreads) {
        float value[1];
        read_map(level.bias + i, value);
        shared.bias()[i] = to_float(from_float<T>(value[0]));
    }
    if (level.weights) return;
    for (int i = threadIdx.x; i < 2 * kPixels; i += kThreads) shared.weights(0)[i] = 1.0f;
}

// ---- products of one warp -----------------------------------------------------------------------------------------

/// Sixteen rows from `row` and sixteen columns from `column` as four 8x8 matrices: the two of the first eight columns
/// first or, kAcross, the two of the first eight rows.
template <bool kTransposed, bool kAcross, class M>
__device__ __forceinline__ void load_fragment(uint32 (&to)[4], const M& matrix, int row, int column) {
    const int lane = threadIdx.x % kWarp, first = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    row += first + (kAcross ? third : second);
    column += kAcross ? second : third;
    const void* const at = matrix.at(row, column);
    if constexpr (kTransposed)
        ldmatrix_x4_trans(to, at);
    else
        ldmatrix_x4(to, at);
}

/// to += A's rows from `row` times B's columns from `column`, over kDepth. kFlipA, kFlipB: the matrix that is given
/// holds the transpose of A, of B.
template <bool kFlipA, bool kFlipB, int kDepth, int kM, int kN, class A, class B>
__device__ __forceinline__ void multiply(float (&to)[kM][kN][4], const A& a, int row, const B& b, int column) {
    static_assert(kDepth % 16 == 0 && kN % 2 == 0, "whole fragments");
    constexpr typename A::Element tag{};
#pragma unroll 2  // all of it costs registers that spill
    for (int k = 0; k < kDepth; k += 16) {
        uint32 left[kM][4];
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            if constexpr (kFlipA)
                load_fragment<true, true>(left[i], a, k, row + 16 * i);
            else
                load_fragment<false, false>(left[i], a, row + 16 * i, k);
        }
#pragma unroll
        for (int j = 0; j < kN; j += 2) {
            uint32 right[4];
            if constexpr (kFlipB)
                load_fragment<false, true>(right, b, column + 8 * j, k);
            else
                load_fragment<true, false>(right, b, k, column + 8 * j);
            const uint32 first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
            for (int i = 0; i < kM; ++i) {
                mma_m16n8k16(to[i][j], left[i], first, tag);
                mma_m16n8k16(to[i][j + 1], left[i], second, tag);
            }
        }
    }
}

// A warp's piece of a map, 16 channels of kSpan pixels, is float[kPieceRows][kPieceColumns][4] as mma leaves it: value
// 2 h + e of [i][j] is row 16 i + 8 h + lane / 4 and column 8 j + lane % 4 * 2 + e from the piece's corner in the tile.
template <int kSpan> constexpr int kPieceRows = kLast ? kSpan / 16 : 1;
template <int kSpan> constexpr int kPieceColumns = kLast ? 2 : kSpan / 8;
constexpr int kBiasValues = kLast ? 4 : 2;  // channels of which a lane holds values in a piece

/// Sum of u w d^2 of this thread's values. Puts G over the teacher's values and adds it up for the bias.
template <class T>
__device__ __forceinline__ float compare(const float (&adapted)[kPieceRows<kPixels>][kPieceColumns<kPixels>][4],
                                         float unit, const Shared<T>& shared, int buffer, int left,
                                         float (&db)[kBiasValues]) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16;
    const float* const weights = shared.weights(buffer);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieceRows<kPixels>; ++i)
#pragma unroll
        for (int j = 0; j < kPieceColumns<kPixels>; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 16 * i + 8 * h + lane / 4 + (kLast ? 0 : first);
                const int column = 8 * j + lane % 4 * 2 + (kLast ? first : 0);
                Pair<T>* const two = reinterpret_cast<Pair<T>*>(shared.teacher(buffer).at(row, column));
                const float teacher[2] = {to_float(two->x), to_float(two->y)};
                float g[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int channel = kLast ? column + e : row, pixel = kLast ? row : column + e;
                    // Chosen, not multiplied by 0: an infinite map times the padding is NaN.
                    const bool exists = channel < kTeacher && pixel < left;
                    const float d = exists ? adapted[i][j][2 * h + e] + shared.bias()[channel] - teacher[e] : 0.0f;
                    g[e] = unit * weights[pixel] * d;
                    sum = fmaf(g[e], d, sum);
                    db[kLast ? 2 * j + e : h] += g[e];
                }
                *two = {from_float<T>(g[0]), from_float<T>(g[1])};
            }
    return sum;
}

/// dx = factor * W^T G of the tile, over the student's values.
template <class T> __device__ __forceinline__ void student_gradient(const Shared<T>& shared, int buffer, float factor) {
    constexpr int kBlocks = kIn / 16, kParts = kWarps >= 4 * kBlocks ? 4 : kWarps >= 2 * kBlocks ? 2 : 1;
    constexpr int kSpan = kPixels / kParts;
    const int lane = threadIdx.x % kWarp;
    for (int item = threadIdx.x / kWarp; item < kBlocks * kParts; item += kWarps) {
        const int channel = item / kParts * 16, pixel = item % kParts * kSpan;
        float dx[kPieceRows<kSpan>][kPieceColumns<kSpan>][4] = {};
        if constexpr (kLast)
            multiply<false, false, kOut>(dx, shared.teacher(buffer), pixel, shared.matrix(), channel);
        else
            multiply<true, false, kOut>(dx, shared.matrix(), channel, shared.teacher(buffer), pixel);
#pragma unroll
        for (int i = 0; i < kPieceRows<kSpan>; ++i)
#pragma unroll
            for (int j = 0; j < kPieceColumns<kSpan>; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = 16 * i + 8 * h + lane / 4 + (kLast ? pixel : channel);
                    const int column = 8 * j + lane % 4 * 2 + (kLast ? channel : pixel);
                    Pair<T>* const two = reinterpret_cast<Pair<T>*>(shared.student(buffer).at(row, column));
                    *two = {from_float<T>(factor * dx[i][j][2 * h]), from_float<T>(factor * dx[i][j][2 * h + 1])};
                }
    }
}

/// This block's share of dW and db, for `adapter_sums`.
__device__ __forceinline__ void write_sums(float* sums, const float (&dw)[1][kIn / 8][4], float (&db)[kBiasValues],
                                           float factor) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16;
#pragma unroll
    for (int j = 0; j < kIn / 8; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const int row = first + v / 2 * 8 + lane / 4, column = 8 * j + lane % 4 * 2 + v % 2;
            if (row < kTeacher && column < kStudent) write_result(sums + row * kStudent + column, factor * dw[0][j][v]);
        }
#pragma unroll
    for (int v = 0; v < kBiasValues; ++v) {
        // Values of one channel are in the four lanes of a row, or channels last in the eight of a column.
        constexpr int kFirst = kLast ? 4 : 1, kEnd = kLast ? kWarp : 4;
#pragma unroll
        for (int offset = kFirst; offset < kEnd; offset *= 2) db[v] += __shfl_xor_sync(kAllLanes, db[v], offset);
        const int channel = first + (kLast ? v / 2 * 8 + lane % 4 * 2 + v % 2 : 8 * v + lane / 4);
        const bool is_first = (kLast ? lane / 4 : lane % 4) == 0;
        if (is_first && channel < kTeacher) write_result(sums + kMatrix + channel, factor * db[v]);
    }
}

// ---- kernels ------------------------------------------------------------------------------------------------------

template <class T> __device__ __forceinline__ void adapter_mse(const AdapterArgs& args) {
#if defined(EDGESTILL_HOST) || __CUDA_ARCH__ >= 800
    DYNAMIC_SHARED(T, memory);
    __shared__ float scratch[kWarp];
    const Shared<T> shared = {memory};
    const AdapterLevel& level = level_of_block(args.levels, args.count);
    const uint32 block = blockIdx.x - level.first_block, tiles = level.images * tiles_of_image(level);
    if (block < tiles) fetch(level, block, shared, 0);
    fetch_constants(level, shared);
    const float elements = static_cast<float>(level.images) * level.pixels * kTeacher;
    const float inv = level.weights ? weighted_norm(level.weight_partials, kTeacher, scratch) : 1.0f / elements;
    const float unit = sqrtf(inv * elements);  // weights that are all 0 make it large, not infinite
    const float factor = assumed_scale(args.scale) * 2.0f * inv / unit;

    float dw[1][kIn / 8][4] = {}, db[kBiasValues] = {}, sum[1] = {0.0f};
    const int first = threadIdx.x / kWarp * 16;  // the warp's channels of the teacher
    int buffer = 0;
#pragma unroll 1
    for (uint32 tile = block; tile < tiles; tile += level.blocks, buffer ^= 1) {
        const Place place = place_of(level, tile);
        const auto student = shared.student(buffer);
        copy_async_wait();
        __syncthreads();  // the tile is here, and all are done with the buffers of the one before
        if (tile + level.blocks < tiles) fetch(level, tile + level.blocks, shared, buffer ^ 1);

        float adapted[kPieceRows<kPixels>][kPieceColumns<kPixels>][4] = {};
        if constexpr (kLast)
            multiply<false, true, kIn>(adapted, student, 0, shared.matrix(), first);
        else
            multiply<false, false, kIn>(adapted, shared.matrix(), first, student, 0);
        sum[0] += compare(adapted, unit, shared, buffer, place.left, db);
        __syncwarp();  // for dW a warp needs only its own G
        multiply<kLast, !kLast, kPixels>(dw, shared.teacher(buffer), first, student, 0);
        __syncthreads();  // all of G is there, and nobody needs x any more
        student_gradient(shared, buffer, factor);
        __syncthreads();
        store_tile(level, place, student);
    }
    write_sums(level.sums + static_cast<uint64>(block) * kSums, dw, db, factor);
    block_reduce<Sum>(sum, scratch);
    grid_total(inv / unit * sum[0], args.partials, args.ticket, args.loss, scratch);
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    adapter_mse_f16(const __grid_constant__ AdapterArgs args) {
    adapter_mse<__half>(args);
}
extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    adapter_mse_bf16(const __grid_constant__ AdapterArgs args) {
    adapter_mse<__nv_bfloat16>(args);
}
EDGESTILL_KERNEL(adapter_mse_f16, AdapterArgs)
EDGESTILL_KERNEL(adapter_mse_bf16, AdapterArgs)

/// dW and db of each level, from the shares of its blocks. kSumBlocks blocks per level: a warp adds up every `warps`-th
/// share of kSumEntries numbers, 16 bytes per lane, and the sums of the warps are added in order.
extern "C" __global__ void __launch_bounds__(kSumThreads, 1) adapter_sums(const __grid_constant__ AdapterArgs args) {
    constexpr uint32 kSumWarps = kSumThreads / kWarp, kShares = 8;  // that a lane has under way together
    __shared__ float shared[kSumWarps][kSumEntries];
    const AdapterLevel& level = args.levels[blockIdx.x / kSumBlocks];
    const uint32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first = blockIdx.x % kSumBlocks * kSumEntries;
    float sum[4] = {};
    if (first + 4 * lane < kSums) {
        const float* const from = level.sums + first + 4 * lane;
#pragma unroll 1
        for (uint32 begin = warp; begin < level.blocks; begin += kShares * kSumWarps) {
            uint4 shares[kShares];
#pragma unroll
            for (uint32 n = 0; n < kShares; ++n) {
                const uint32 block = begin + n * kSumWarps;
                shares[n] = {};
                if (block < level.blocks) shares[n] = read_raw<4>(from + static_cast<uint64>(block) * kSums);
            }
#pragma unroll
            for (uint32 n = 0; n < kShares; ++n) {
                float share[4];
                unpack<4, float>(shares[n], share);
#pragma unroll
                for (int k = 0; k < 4; ++k) sum[k] += share[k];
            }
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) shared[warp][k * kWarp + lane] = sum[k];  // neighbouring lanes in neighbouring banks
    __syncthreads();
    const uint32 i = first + threadIdx.x;
    if (threadIdx.x >= kSumEntries || i >= kSums) return;
    float total = 0.0f;
#pragma unroll
    for (uint32 w = 0; w < kSumWarps; ++w) total += shared[w][threadIdx.x % 4 * kWarp + threadIdx.x / 4];
    write_result(i < kMatrix ? level.matrix_gradient + i : level.bias_gradient + i - kMatrix, total);
}

EDGESTILL_KERNEL(adapter_sums, AdapterArgs)
