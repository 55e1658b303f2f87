// Channel-wise distillation of all levels, loss and gradient together.
//
//     p = softmax(t / tau), q = softmax(s / tau)      over the HW values of a row, one channel of one image
//     L = sum over levels  tau^2 / (N C) * sum over rows of sum p (log p - log q)
//     g = scale * tau / (N C) * (q - p)
//
// NCHW, `cwd_rows`: reads s and t once, writes g once (3U). Rows of more than 8192 values, or off the 16-byte grid, are
//   read twice (5U), the second time from a cache. A fixed number of blocks is dealt out to the levels. As many warps
//   share a row as hold it in registers at 16 values per thread and map, so a block takes one row of a large level at a
//   time, and several of a small one.
// Channels last, where rows are columns: `cwd_column_sums` reads s and t and writes each column's softmax, then
//   `cwd_columns` reads them again and writes g (5U), backwards, since the L2 still holds what was read last. A block
//   takes a stretch of pixels, so long that all blocks run at once; neighbouring threads have neighbouring channels, 16
//   bytes each.
// Numerics: everything is 2^(kappa x - maximum) with kappa = log2(e) / tau. A thread uses the maximum of its own values;
//   when threads or blocks merge their sums, they scale them to the common maximum, so one barrier per row is enough.
//   The maximum is only a scale: fmaxf drops a NaN, but the sums carry it to the loss and to the whole row. Student and
//   teacher go through the same operations, and no product is contracted into the sum of one only: equal maps give
//   exactly 0.
#include "common.cuh"

constexpr int kRowThreads = ROW_THREADS;  // at most
constexpr int kColumnThreads = COLUMN_THREADS;
constexpr int kValues = VALUES;      // of a row and map in a thread's registers
constexpr int kColumnBlocks = COLUMN_BLOCKS_PER_SM;
constexpr int kPixels = 2;           // of a column whose loads are under way together
constexpr float kLeastMaximum = -3.0e38f;  // of no values: finite, so that the difference of two maxima is no NaN
constexpr float kLn2 = 0.693147180559945f;

/// 2^x to 2 ulp in one instruction, 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef EDGESTILL_HOST
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

struct Factors {
    float kappa;
    float gradient;  // scale * tau / (N C)
};

/// x a - y b, exactly 0 if x equals y and a equals b: as fmaf(x, a, -(y b)) it would be a rounding error.
__device__ __forceinline__ float difference(float x, float a, float y, float b) {
    return __fmul_rn(x, a) - __fmul_rn(y, b);
}

/// q - p of a pair, and its share of sum p (y - x), x and y the exponents below the maxima; `weights` are 1 / sums.
__device__ __forceinline__ float softmax_difference(float s, float t, const float (&maxima)[2],
                                                    const float (&weights)[2], float kappa, float& cross) {
    const float x = fmaf(kappa, s, -maxima[0]), y = fmaf(kappa, t, -maxima[1]);
    const float e = exp2_fast(y);
    cross = fmaf(e * weights[1], y - x, cross);
    return difference(exp2_fast(x), weights[0], e, weights[1]);
}

// ---- rows: NCHW ---------------------------------------------------------------------------------------------------

struct RowsLevel {
    const void* student;
    const void* teacher;
    void* gradient;
    uint32 rows;    // N * C
    uint32 pixels;  // of a row
    uint32 first_block, blocks;
    uint32 warps;       // that share a row: it is held in registers if they can
    uint32 vectorised;  // 16-byte access is aligned and never crosses a row
};

struct RowsArgs {
    RowsLevel levels[kMaxLevels];
    const float* scale;
    float* partials;
    uint32* ticket;
    float* loss;
    float tau;
    float kappa;  // log2(e) / tau
    int count;
};

/// The softmax of the student's values (0) and of the teacher's (1), as far as they are known.
struct Softmaxes {
    float maximum[2] = {kLeastMaximum, kLeastMaximum};  // largest kappa x
    float sum[2] = {0.0f, 0.0f};                        // of 2^(kappa x - maximum)
};

__device__ __forceinline__ void merge_warp(Softmaxes& x) {
    float maximum[2] = {x.maximum[0], x.maximum[1]};
    warp_reduce<Max>(maximum);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        x.sum[m] *= exp2_fast(x.maximum[m] - maximum[m]);
        x.maximum[m] = maximum[m];
    }
    warp_reduce<Sum>(x.sum);
}

/// Merge the softmaxes of the `warps` that share a row; each of their threads gets the whole. `scratch` holds a float4
/// per warp, and the next call must be given another.
__device__ __forceinline__ void merge_row(Softmaxes& x, int warps, float4* scratch) {
    merge_warp(x);
    if (warps == 1) return;  // the same in the whole block
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, first = warp - warp % warps;
    if (lane == 0) scratch[warp] = make_float4(x.maximum[0], x.maximum[1], x.sum[0], x.sum[1]);
    __syncthreads();
    x = Softmaxes();
    if (lane < warps && first + lane < static_cast<int>(blockDim.x) / kWarp) {  // warps left over have no whole row
        const float4 other = scratch[first + lane];
        x.maximum[0] = other.x, x.maximum[1] = other.y, x.sum[0] = other.z, x.sum[1] = other.w;
    }
    merge_warp(x);
}

template <int V>
__device__ __forceinline__ void raise_maxima(Softmaxes& x, const float (&s)[V], const float (&t)[V], float kappa) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
        x.maximum[0] = fmaxf(x.maximum[0], kappa * s[i]);
        x.maximum[1] = fmaxf(x.maximum[1], kappa * t[i]);
    }
}

/// A thread's share of a row: units of V values, the first at `at`, each other `stride` values after the one before.
struct RowShare {
    uint64 at;
    uint32 stride;
    uint32 units;
    bool first;  // this is the first of the row's threads
};

/// This thread's share of the row's KL divergence in bits; `cross` is its sum of p (y - x), x and y the exponents of s
/// and t below the maxima.
__device__ __forceinline__ float divergence(const RowShare& share, const Softmaxes& whole, float cross) {
    return share.first ? cross + log2f(whole.sum[0] / whole.sum[1]) : cross;
}

template <class T> constexpr uint32 kMinusInfinity = 0xff800000u;  // as 4 bytes of T
template <> constexpr uint32 kMinusInfinity<__half> = 0xfc00fc00u;
template <> constexpr uint32 kMinusInfinity<__nv_bfloat16> = 0xff80ff80u;

template <class T> __device__ __forceinline__ uint4 minus_infinities() {
    return make_uint4(kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>);
}

/// A row of which each thread holds up to kValues values. Returns the thread's share of the divergence.
template <class T>
__device__ __forceinline__ float held_row(const RowsLevel& level, const RowShare& share, const Factors& factors,
                                          float4* scratch) {
    constexpr int V = kVector<T>, kUnits = kValues / V;
    uint4 raw_s[kUnits], raw_t[kUnits];  // all loads are under way before the first is unpacked
#pragma unroll
    for (uint32 j = 0; j < kUnits; ++j) {
        raw_s[j] = raw_t[j] = minus_infinities<T>();  // past the row: in no maximum, and 0 in the sums
        if (j < share.units) {
            raw_s[j] = read_raw<V>(static_cast<const T*>(level.student) + share.at + j * share.stride);
            raw_t[j] = read_raw<V>(static_cast<const T*>(level.teacher) + share.at + j * share.stride);
        }
    }
    float s[kUnits][V], t[kUnits][V];
    Softmaxes mine;
#pragma unroll
    for (uint32 j = 0; j < kUnits; ++j) {
        unpack<V, T>(raw_s[j], s[j]);
        unpack<V, T>(raw_t[j], t[j]);
        raise_maxima(mine, s[j], t[j], factors.kappa);
    }
    float cross = 0.0f;
#pragma unroll
    for (uint32 j = 0; j < kUnits; ++j) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float x = fmaf(factors.kappa, s[j][i], -mine.maximum[0]);
            const float y = fmaf(factors.kappa, t[j][i], -mine.maximum[1]);
            s[j][i] = exp2_fast(x);
            t[j][i] = exp2_fast(y);
            mine.sum[0] += s[j][i];
            mine.sum[1] += t[j][i];
            sum = fmaf(t[j][i], y - x, sum);
        }
        cross += j < share.units ? sum : 0.0f;  // past the row, -inf less -inf is NaN
    }
    Softmaxes whole = mine;
    merge_row(whole, level.warps, scratch);
    if (share.units == 0) return 0.0f;

    const float below_s = mine.maximum[0] - whole.maximum[0], below_t = mine.maximum[1] - whole.maximum[1];
    const float to_q = __fdividef(exp2_fast(below_s), whole.sum[0]);
    const float to_p = __fdividef(exp2_fast(below_t), whole.sum[1]);
    const float a = factors.gradient * to_q, b = factors.gradient * to_p;
#pragma unroll
    for (uint32 j = 0; j < kUnits; ++j)
        if (j < share.units) {
#pragma unroll
            for (int i = 0; i < V; ++i) s[j][i] = difference(s[j][i], a, t[j][i], b);
            write(static_cast<T*>(level.gradient) + share.at + j * share.stride, s[j]);
        }
    return divergence(share, whole, to_p * fmaf(mine.sum[1], below_t - below_s, cross));
}

/// A row of any length: read once for its softmaxes, and again for the gradient.
template <class T, int V>
__device__ __forceinline__ float streamed_row(const RowsLevel& level, const RowShare& share, const Factors& factors,
                                              float4* scratch) {
    const T* const student = static_cast<const T*>(level.student) + share.at;
    const T* const teacher = static_cast<const T*>(level.teacher) + share.at;
    T* const gradient = static_cast<T*>(level.gradient) + share.at;
    float s[V], t[V];
    Softmaxes whole;
#pragma unroll(V == 1 ? 4 : 1)
    for (uint32 j = 0; j < share.units; ++j) {
        read(student + j * share.stride, s);
        read(teacher + j * share.stride, t);
        const Softmaxes before = whole;
        raise_maxima(whole, s, t, factors.kappa);
        whole.sum[0] = __fmul_rn(whole.sum[0], exp2_fast(before.maximum[0] - whole.maximum[0]));
        whole.sum[1] = __fmul_rn(whole.sum[1], exp2_fast(before.maximum[1] - whole.maximum[1]));
#pragma unroll
        for (int i = 0; i < V; ++i) {
            whole.sum[0] += exp2_fast(fmaf(factors.kappa, s[i], -whole.maximum[0]));
            whole.sum[1] += exp2_fast(fmaf(factors.kappa, t[i], -whole.maximum[1]));
        }
    }
    merge_row(whole, level.warps, scratch);
    if (share.units == 0) return 0.0f;

    const float weights[2] = {__fdividef(1.0f, whole.sum[0]), __fdividef(1.0f, whole.sum[1])};
    float cross = 0.0f;
#pragma unroll(V == 1 ? 4 : 1)
    for (uint32 j = 0; j < share.units; ++j) {
        read(student + j * share.stride, s);
        read(teacher + j * share.stride, t);
#pragma unroll
        for (int i = 0; i < V; ++i)
            s[i] = factors.gradient * softmax_difference(s[i], t[i], whole.maximum, weights, factors.kappa, cross);
        write(gradient + j * share.stride, s);
    }
    return divergence(share, whole, cross);
}

/// The block's rows of a level; returns this thread's share of their divergences in bits.
template <class T, int V, bool kHeld>
__device__ __forceinline__ float process_rows(const RowsLevel& level, const Factors& factors) {
    __shared__ float4 scratch[2][kRowThreads / kWarp];
    const uint32 threads = level.warps * kWarp, at_once = blockDim.x / threads;
    const uint32 mine = threadIdx.x / threads, thread = threadIdx.x % threads;
    const uint32 units = (level.pixels / V + threads - 1 - thread) / threads;
    RowShare share = {0, threads * V, 0, thread == 0};
    float loss = 0.0f;
    uint32 turn = 0;
    const uint32 block = blockIdx.x - level.first_block;
#pragma unroll 1
    for (uint32 first = block * at_once; first < level.rows; first += level.blocks * at_once) {
        const uint32 row = first + mine;
        share.at = static_cast<uint64>(row) * level.pixels + thread * V;
        share.units = mine < at_once && row < level.rows ? units : 0;
        if constexpr (kHeld)
            loss += held_row<T>(level, share, factors, scratch[turn]);
        else
            loss += streamed_row<T, V>(level, share, factors, scratch[turn]);
        turn ^= 1;  // a slow warp may still read what this row left
    }
    return loss;
}

template <class T> __device__ __forceinline__ void cwd_rows(const RowsArgs& args) {
    __shared__ float scratch[kWarp];
    const RowsLevel& level = level_of_block(args.levels, args.count);
    const float mean = args.tau / static_cast<float>(level.rows);
    const Factors factors = {args.kappa, assumed_scale(args.scale) * mean};
    float bits[1];
    if (!level.vectorised)
        bits[0] = process_rows<T, 1, false>(level, factors);  // 16 addresses per thread and map: 106 registers
    else if (level.pixels > level.warps * kWarp * kValues)
        bits[0] = process_rows<T, kVector<T>, false>(level, factors);
    else
        bits[0] = process_rows<T, kVector<T>, true>(level, factors);
    block_reduce<Sum>(bits, scratch);
    grid_total(args.tau * mean * kLn2 * bits[0], args.partials, args.ticket, args.loss, scratch);
}

EDGESTILL_PER_DTYPE(cwd_rows, RowsArgs, kRowThreads)

// ---- columns: channels last ---------------------------------------------------------------------------------------

struct ColumnsLevel {
    const void* student;
    const void* teacher;
    void* gradient;
    float* parts;     // (images, stretches, 4, channels): maxima and sums of student and teacher in a stretch of pixels
    float* wholes;    // (images, 4, channels): the same of all pixels
    uint32* tickets;  // (images, tiles)
    uint32 images, channels, pixels;
    uint32 first_block;
    uint32 stretches, stretch;  // of an image, and pixels in each
    uint32 tiles, lanes;        // across the channels, and threads across a tile, V channels each
    uint32 vectorised;          // 16-byte access is aligned and never crosses a pixel
    uint32 unused;
};

struct ColumnsArgs {
    ColumnsLevel levels[kMaxLevels];
    const float* scale;
    float* partials;
    uint32* ticket;
    float* loss;
    float tau;
    float kappa;  // log2(e) / tau
    int count;
};

/// A block's pixels and channels, and this thread's of them.
struct Tile {
    uint32 image, stretch, index;  // index across the channels
    uint32 row, rows;              // of threads; each row has all channels of the tile
    uint32 channel;                // first of the thread's V
    uint32 begin, end;             // pixels of the thread, every rows-th
    bool works;                    // the thread has a row and channels
};

template <int V> __device__ __forceinline__ Tile tile_at(const ColumnsLevel& level, uint32 block) {
    Tile tile;
    tile.index = block % level.tiles;
    tile.stretch = block / level.tiles % level.stretches;
    tile.image = block / level.tiles / level.stretches;
    tile.rows = kColumnThreads / level.lanes;
    tile.row = threadIdx.x / level.lanes;
    tile.channel = (tile.index * level.lanes + threadIdx.x % level.lanes) * V;
    tile.works = tile.row < tile.rows && tile.channel < level.channels;
    tile.begin = tile.stretch * level.stretch + tile.row;
    tile.end = tile.works ? min((tile.stretch + 1) * level.stretch, level.pixels) : 0;
    return tile;
}

/// Offset of the thread's channels at a pixel.
__device__ __forceinline__ uint64 offset_of(const ColumnsLevel& level, const Tile& tile, uint32 pixel) {
    return (static_cast<uint64>(tile.image) * level.pixels + pixel) * level.channels + tile.channel;
}

/// The softmax of one channel of one map: {maximum, sum}.
__device__ __forceinline__ float2 merged(float2 a, float2 b) {
    const float maximum = fmaxf(a.x, b.x);
    return make_float2(maximum, fmaf(a.y, exp2_fast(a.x - maximum), __fmul_rn(b.y, exp2_fast(b.x - maximum))));
}

/// Add N pixels to the softmaxes of V channels.
template <class T, int V, int N>
__device__ __forceinline__ void add_pixels(float2 (&softmaxes)[V], const Raw<V, T> (&raw)[N], float kappa) {
    float x[N][V];
#pragma unroll
    for (int p = 0; p < N; ++p) unpack<V, T>(raw[p], x[p]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        float maximum = softmaxes[i].x;
#pragma unroll
        for (int p = 0; p < N; ++p) maximum = fmaxf(maximum, kappa * x[p][i]);
        float sum = __fmul_rn(softmaxes[i].y, exp2_fast(softmaxes[i].x - maximum));
#pragma unroll
        for (int p = 0; p < N; ++p) sum += exp2_fast(fmaf(kappa, x[p][i], -maximum));
        softmaxes[i] = make_float2(maximum, sum);
    }
}

/// N of a thread's pixels, from `pixel` on, whose loads are under way together.
template <int N, class T, int V>
__device__ __forceinline__ void sum_pixels(const ColumnsLevel& level, const Tile& tile, uint32 pixel, float kappa,
                                           float2 (&softmaxes)[2][V]) {
    Raw<V, T> s[N], t[N];
#pragma unroll
    for (int p = 0; p < N; ++p) {
        const uint64 at = offset_of(level, tile, pixel + p * tile.rows);
        s[p] = read_raw<V>(static_cast<const T*>(level.student) + at);
        t[p] = read_raw<V>(static_cast<const T*>(level.teacher) + at);
    }
    add_pixels<T>(softmaxes[0], s, kappa);
    add_pixels<T>(softmaxes[1], t, kappa);
}

/// Merge the results of the rows of threads for one map (0 student, 1 teacher) into `to`, (4, channels) maxima and sums.
/// `shared` holds V float2 per thread.
template <int V>
__device__ __forceinline__ void merge_rows(const ColumnsLevel& level, const Tile& tile, int map,
                                           const float2 (&mine)[V], float2* shared, float* to) {
#pragma unroll
    for (int i = 0; i < V; ++i) shared[i * kColumnThreads + threadIdx.x] = mine[i];
    __syncthreads();
    for (uint32 rows = tile.rows, half; rows > 1; rows = half) {
        half = (rows + 1) / 2;
        if (tile.row + half < rows)
#pragma unroll
            for (int i = 0; i < V; ++i) {
                float2* const own = shared + i * kColumnThreads + threadIdx.x;
                *own = merged(*own, own[half * level.lanes]);
            }
        __syncthreads();
    }
    if (tile.row > 0 || !tile.works) return;  // from here on a thread reads its own only: the next call may begin
    float* const at = to + map * level.channels + tile.channel;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        write_result(at + i, shared[i * kColumnThreads + threadIdx.x].x);
        write_result(at + 2 * level.channels + i, shared[i * kColumnThreads + threadIdx.x].y);
    }
}

template <int V> __device__ __forceinline__ void clear(float2 (&softmaxes)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) softmaxes[i] = make_float2(kLeastMaximum, 0.0f);
}

/// The softmaxes of a tile; the last block of an image merges those of all stretches.
template <class T, int V>
__device__ __forceinline__ void sum_tile(const ColumnsLevel& level, uint32 block, float kappa, float2* shared) {
    const Tile tile = tile_at<V>(level, block);
    float2 softmaxes[2][V];
    clear(softmaxes[0]);
    clear(softmaxes[1]);
    uint32 pixel = tile.begin;
#pragma unroll 1
    for (; pixel + (kPixels - 1) * tile.rows < tile.end; pixel += kPixels * tile.rows)
        sum_pixels<kPixels, T>(level, tile, pixel, kappa, softmaxes);
#pragma unroll 1
    for (; pixel < tile.end; pixel += tile.rows) sum_pixels<1, T>(level, tile, pixel, kappa, softmaxes);
    float* const parts = level.parts + static_cast<uint64>(tile.image) * level.stretches * 4 * level.channels;
    for (int map = 0; map < 2; ++map)
        merge_rows(level, tile, map, softmaxes[map], shared, parts + tile.stretch * 4 * level.channels);
    __syncthreads();
    if (!is_last_block(level.tickets + tile.image * level.tiles + tile.index, level.stretches)) return;
    for (int map = 0; map < 2; ++map) {
        clear(softmaxes[map]);
        if (tile.works)
            for (uint32 stretch = tile.row; stretch < level.stretches; stretch += tile.rows) {
                const float* const part = parts + (stretch * 4 + map) * level.channels + tile.channel;
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float maximum = read_shared_result(part + i);
                    const float sum = read_shared_result(part + 2 * level.channels + i);
                    softmaxes[map][i] = merged(softmaxes[map][i], make_float2(maximum, sum));
                }
            }
        merge_rows(level, tile, map, softmaxes[map], shared, level.wholes + tile.image * 4 * level.channels);
    }
}

template <class T> __device__ __forceinline__ void cwd_column_sums(const ColumnsArgs& args) {
    __shared__ float2 shared[kVector<T> * kColumnThreads];
    const ColumnsLevel& level = level_of_block(args.levels, args.count);
    if (level.vectorised)
        sum_tile<T, kVector<T>>(level, blockIdx.x - level.first_block, args.kappa, shared);
    else
        sum_tile<T, 1>(level, blockIdx.x - level.first_block, args.kappa, shared);
}

EDGESTILL_PER_DTYPE(cwd_column_sums, ColumnsArgs, kColumnThreads, kColumnBlocks)

/// The gradient of N of a thread's pixels, from `pixel` on, whose loads are under way together.
template <int N, class T, int V>
__device__ __forceinline__ void gradient_pixels(const ColumnsLevel& level, const Tile& tile, uint32 pixel,
                                                const Factors& factors, const float (&maxima)[V][2],
                                                const float (&weights)[V][2], float& cross) {
    Raw<V, T> raw_s[N], raw_t[N];
#pragma unroll
    for (int p = 0; p < N; ++p) {
        const uint64 at = offset_of(level, tile, pixel + p * tile.rows);
        raw_s[p] = read_raw<V>(static_cast<const T*>(level.student) + at);
        raw_t[p] = read_raw<V>(static_cast<const T*>(level.teacher) + at);
    }
#pragma unroll
    for (int p = 0; p < N; ++p) {
        float s[V], t[V];
        unpack<V, T>(raw_s[p], s);
        unpack<V, T>(raw_t[p], t);
#pragma unroll
        for (int i = 0; i < V; ++i)
            s[i] = factors.gradient * softmax_difference(s[i], t[i], maxima[i], weights[i], factors.kappa, cross);
        write(static_cast<T*>(level.gradient) + offset_of(level, tile, pixel + p * tile.rows), s);
    }
}

/// The gradient of a tile; returns this thread's share of the divergences in bits.
template <class T, int V>
__device__ __forceinline__ float gradient_tile(const ColumnsLevel& level, uint32 block, const Factors& factors) {
    const Tile tile = tile_at<V>(level, block);
    if (!tile.works) return 0.0f;
    float values[4][V], maxima[V][2], weights[V][2];
#pragma unroll
    for (int k = 0; k < 4; ++k)
        read_map(level.wholes + (tile.image * 4 + k) * level.channels + tile.channel, values[k]);
    float cross = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        maxima[i][0] = values[0][i], maxima[i][1] = values[1][i];
        weights[i][0] = __fdividef(1.0f, values[2][i]), weights[i][1] = __fdividef(1.0f, values[3][i]);
        if (tile.stretch == 0 && tile.row == 0) cross += log2f(values[2][i] / values[3][i]);
    }
    // Backwards: the L2 cache still holds what cwd_column_sums read last.
    uint32 left = tile.begin < tile.end ? (tile.end - tile.begin - 1) / tile.rows + 1 : 0;
    const auto next = [&](uint32 count) { return tile.begin + (left -= count) * tile.rows; };
    while (left >= kPixels) gradient_pixels<kPixels, T>(level, tile, next(kPixels), factors, maxima, weights, cross);
    while (left > 0) gradient_pixels<1, T>(level, tile, next(1), factors, maxima, weights, cross);
    return cross;
}

template <class T> __device__ __forceinline__ void cwd_columns(const ColumnsArgs& args) {
    __shared__ float scratch[kWarp];
    const uint32 block = gridDim.x - 1 - blockIdx.x;
    const ColumnsLevel& level = entry_of_block(args.levels, args.count, block);
    const float mean = args.tau / (static_cast<float>(level.images) * static_cast<float>(level.channels));
    const Factors factors = {args.kappa, assumed_scale(args.scale) * mean};
    float bits[1] = {level.vectorised ? gradient_tile<T, kVector<T>>(level, block - level.first_block, factors)
                                      : gradient_tile<T, 1>(level, block - level.first_block, factors)};
    block_reduce<Sum>(bits, scratch);
    grid_total(args.tau * mean * kLn2 * bits[0], args.partials, args.ticket, args.loss, scratch);
}

EDGESTILL_PER_DTYPE(cwd_columns, ColumnsArgs, kColumnThreads, kColumnBlocks)
