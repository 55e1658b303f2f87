// Soft labels of a detector's head, of all levels, loss and gradient together.
//
//     L = sum over levels  obj balance / (B R) * sum over all rows KL(o_T || o_S)
//                          + norm * sum over top rows g (cls mean_k KL(c_T || c_S) + box (1 - GIoU))
//     g = sigmoid(o), o mostly o_T, norm = 1 / max(sum over top rows g, B), KL of Bernoulli distributions, by logits
//     gradient by a logit of objectness or of a class = scale * factor * (sigmoid(z_S) - sigmoid(z_T))
//
// A row is the logits x, y, w, h, o, c of one cell and anchor; each of the B images has R of them, and its `top` rows
//   with the largest gates are top rows. Of equal gates the first count.
// Traffic: of all rows the two logits of objectness (the teacher's twice) and the gradient, which is 0 elsewhere; all
//   logits only of the top rows. At 640 pixels and 80 classes these are 12 %, so it is half of what one pass over both
//   maps would move. Beside that a float32 a row, which the L2 cache holds while it is read a few times.
// Tiling: `soft_head_select`, a block for each level and image, finds the smallest top gate as a number of three digits
//   by a histogram each, and among rows of just this gate the last that counts in the same way. `soft_head`, a block for
//   each tile of rows, makes the gradient of the tile in shared memory: first a thread a row (objectness, boxes), then
//   the classes of the tile's top rows by all threads; it is written 16 bytes a thread.
// Numerics: KL = p_T (z_T - z_S) + log1p(e^z_S) - log1p(e^z_T) has its two logarithms as one, and both signs changed if
//   z_T > 0, where 1 - p_T is small: less is cancelled than in plain torch, and equal logits give exactly 0. So do equal
//   boxes; where edges are equal, half of a gradient goes to each, as torch has it. Counts are integers, and all sums
//   have a fixed order.
#include "common.cuh"

constexpr int kThreads = THREADS;  // of soft_head
constexpr int kDigitBits = DIGIT_BITS;
constexpr int kSelectThreads = 1 << kDigitBits;  // of soft_head_select: one for each value of a digit
constexpr int kGateDigits = 3;                   // of a float32 in [0, 1], whose two highest bits are 0
constexpr int kAtOnce = 4;                       // rows or classes of a thread whose loads are in flight together
constexpr uint32 kObjectness = 4, kClasses = 5;  // places in a row
constexpr float kBoxEps = static_cast<float>(BOX_EPS);
constexpr float kNoTop = -1.0f;  // weight of a row that is no top row
static_assert(kGateDigits * kDigitBits >= 30 && 2 * kDigitBits < 32, "three digits hold a gate");

struct SoftHeadLevel {
    const void* student;
    const void* teacher;
    const void* seen;  // a map whose objectness is that of the gates
    void* gradient;
    const float* anchors;  // (anchor_count, 2)
    float* weights;        // (images, rows): gates, or kNoTop
    float* gate_sums;      // (images): of top rows
    float* norm;           // 1 / max(sum of gate_sums, images)
    uint32* ticket;
    uint32 images, anchor_count, pixels, logits;
    uint32 top;  // of an image
    uint32 first_block, blocks;
    uint32 tile;                                   // rows of a block
    uint32 student_last, teacher_last, seen_last;  // rows in the order (pixel, anchor), else (anchor, pixel)
    float objectness;                              // obj balance / (images * rows)
    float classes;                                 // cls / number of classes
    uint32 unused;

    /// Of an image.
    __device__ __forceinline__ uint32 rows() const { return anchor_count * pixels; }
};

struct SoftHeadArgs {
    SoftHeadLevel levels[kMaxLevels];
    const float* scale;
    float* partials;
    uint32* ticket;
    float* loss;
    float box;
    uint32 tells_all;  // else NaN is a logit that the teacher does not give, and pulls nowhere
    int count;
};

// ---- the top rows -------------------------------------------------------------------------------------------------

/// The teacher's probability of an object, as torch computes it: it decides which gates are equal. Rounded step by step,
/// so that no product inside expf is contracted with the sum.
__device__ __forceinline__ float gate_of(float logit) {
    const float gate = __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-logit)));
    return gate == gate ? gate : 0.0f;
}

/// use(row, gate) for each row of an image; gates are integers of the same order as the numbers.
template <class Use> __device__ __forceinline__ void each_gate(const float* weights, uint32 rows, Use use) {
    for (uint32 first = threadIdx.x; first < rows; first += kAtOnce * kSelectThreads) {
        float gates[kAtOnce][1];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (first + k * kSelectThreads < rows) read_fresh(weights + first + k * kSelectThreads, gates[k]);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (first + k * kSelectThreads < rows) use(first + k * kSelectThreads, __float_as_uint(gates[k][0]));
    }
}

/// Keys, and a place among them.
struct Rank {
    uint32 key;    // its digits that are known
    uint32 place;  // from 1, the largest first, among the keys that begin with these digits
    uint32 equal;  // number of these keys
};

/// Shared memory of `largest`.
struct Selection {
    uint32 histogram[kSelectThreads];
    uint32 sums[kWarp];
    Rank found;
};

/// `rank` with one more digit, from the histogram of that digit's values, which is left 0. Begins and ends with a barrier.
__device__ __forceinline__ Rank with_digit(const Rank& rank, Selection& shared) {
    const uint32 digit = kSelectThreads - 1 - threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    __syncthreads();
    const uint32 own = shared.histogram[digit];
    shared.histogram[digit] = 0;
    uint32 sum = own;  // of this digit and larger ones
#pragma unroll
    for (uint32 offset = 1; offset < kWarp; offset *= 2) {
        const uint32 other = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == kWarp - 1) shared.sums[warp] = sum;
    __syncthreads();
    for (uint32 w = 0; w < warp; ++w) sum += shared.sums[w];
    if (sum - own < rank.place && rank.place <= sum)
        shared.found = {rank.key << kDigitBits | digit, rank.place - (sum - own), own};
    __syncthreads();
    return shared.found;
}

/// The key at `place` among those of the rows; `takes(row, gate, key)` says whether a row takes part, and its key. The
/// histogram is 0 before and after.
template <class Takes>
__device__ __forceinline__ Rank largest(const float* weights, uint32 rows, uint32 place, int digits, Selection& shared,
                                        Takes takes) {
    Rank rank = {0, place, rows};
    for (int shift = (digits - 1) * kDigitBits; shift >= 0; shift -= kDigitBits) {
        each_gate(weights, rows, [&](uint32 row, uint32 gate) {
            uint32 key;
            if (takes(row, gate, key) && key >> shift >> kDigitBits == rank.key)
                atomicAdd(shared.histogram + (key >> shift) % kSelectThreads, 1u);
        });
        rank = with_digit(rank, shared);
    }
    return rank;
}

/// Block: one image of one level. Rows are numbered in the order (anchor, pixel).
template <class T> __device__ __forceinline__ void soft_head_select(const SoftHeadArgs& args) {
    __shared__ Selection shared;
    __shared__ float scratch[kWarp];
    const SoftHeadLevel& level = level_of_block(args.levels, args.count);
    const uint32 image = blockIdx.x - level.first_block, rows = level.rows();
    float* const weights = level.weights + static_cast<uint64>(image) * rows;
    const T* const logits = static_cast<const T*>(level.seen) + static_cast<uint64>(image) * rows * level.logits + kObjectness;
    shared.histogram[threadIdx.x] = 0;
#pragma unroll 4
    for (uint32 row = threadIdx.x; row < rows; row += kSelectThreads) {  // a thread reads later what it writes here
        const uint32 place = level.seen_last ? row % level.pixels * level.anchor_count + row / level.pixels : row;
        float logit[1];
        read(logits + static_cast<uint64>(place) * level.logits, logit);
        write_result(weights + row, gate_of(logit[0]));
    }
    __syncthreads();  // the histogram is 0
    const Rank least = largest(weights, rows, level.top, kGateDigits, shared, [](uint32, uint32 gate, uint32& key) {
        key = gate;
        return true;
    });
    uint32 last = rows - 1;  // row of the smallest gate that counts
    if (least.place < least.equal) {
        const int digits = rows <= 1u << kDigitBits ? 1 : rows <= 1u << 2 * kDigitBits ? 2 : 3;
        const auto equal_ones = [=](uint32 row, uint32 gate, uint32& key) {
            key = rows - 1 - row;
            return gate == least.key;
        };
        last -= largest(weights, rows, least.place, digits, shared, equal_ones).key;
    }
    float sum[1] = {0.0f};
    each_gate(weights, rows, [&](uint32 row, uint32 gate) {
        if (gate > least.key || (gate == least.key && row <= last))
            sum[0] += __uint_as_float(gate);
        else
            write_result(weights + row, kNoTop);
    });
    block_reduce<Sum>(sum, scratch);
    if (threadIdx.x == 0) write_result(level.gate_sums + image, sum[0]);
    if (!is_last_block(level.ticket, level.images)) return;
    sum[0] = 0.0f;
    for (uint32 i = threadIdx.x; i < level.images; i += kSelectThreads) sum[0] += read_shared_result(level.gate_sums + i);
    block_reduce<Sum>(sum, scratch);
    if (threadIdx.x == 0) write_result(level.norm, 1.0f / fmaxf(sum[0], static_cast<float>(level.images)));
}

EDGESTILL_PER_DTYPE(soft_head_select, SoftHeadArgs, kSelectThreads)

// ---- loss and gradient --------------------------------------------------------------------------------------------

/// sigmoid(x) and sigmoid(-x), the larger and the smaller of them, and e^-|x|.
struct Sigmoid {
    float yes, no, larger, smaller, power;

    __device__ __forceinline__ explicit Sigmoid(float x) {
        power = expf(-fabsf(x));
        larger = __fdividef(1.0f, 1.0f + power);
        smaller = power * larger;
        yes = x < 0.0f ? smaller : larger, no = x < 0.0f ? larger : smaller;
    }
};

/// A term of the loss, and its derivative by the student's logit.
struct Term {
    float value, slope;
};

/// A logit of the teacher, or the student's own in place of one that is not given.
__device__ __forceinline__ float given(float teacher, float student, bool tells_all) {
    return tells_all || teacher == teacher ? teacher : student;
}

/// KL(sigmoid(t) || sigmoid(s)).
__device__ __forceinline__ Term divergence(float s, float t) {
    const Sigmoid student(s), teacher(t);
    const float x = t > 0.0f ? -s : s, y = -fabsf(t);  // the same divergence
    const float between = log1pf((student.power - teacher.power) * teacher.larger);
    return {fmaf(teacher.smaller, y - x, fmaxf(x, 0.0f)) + between, student.yes - teacher.yes};
}

/// A student's and a teacher's interval on an axis, and the derivatives by the student's edges as halves of edges: 0, 1, 2.
struct Axis {
    float own, other;          // lengths
    float shared, hull;        // length of the intersection, of the smallest interval that holds both
    float low, high, reaches;  // whether an edge is the intersection's (2), both edges are (1); whether they touch

    __device__ __forceinline__ Axis(float s, float s_size, float t, float t_size) {
        const float s_low = s - s_size / 2, s_high = s + s_size / 2, t_low = t - t_size / 2, t_high = t + t_size / 2;
        own = s_high - s_low, other = t_high - t_low;
        const float between = fminf(s_high, t_high) - fmaxf(s_low, t_low);
        shared = fmaxf(between, 0.0f), hull = fmaxf(s_high, t_high) - fminf(s_low, t_low);
        low = (s_low > t_low) + (s_low >= t_low), high = (s_high < t_high) + (s_high <= t_high);
        reaches = between >= 0.0f ? 0.5f : 0.0f;
    }

    /// The derivative by the student's centre, from those by `shared` and `hull`.
    __device__ __forceinline__ float by_centre(float by_shared, float by_hull) const {
        return (high - low) * (reaches * by_shared - 0.5f * by_hull);
    }

    /// The derivative by the student's size.
    __device__ __forceinline__ float by_size(float by_shared, float by_hull, float by_own) const {
        return 0.5f * (reaches * (high + low) * by_shared + 0.5f * (4.0f - high - low) * by_hull) + by_own;
    }
};

/// 1 - GIoU of two boxes by their logits x, y, w, h; `slopes` are the derivatives by the student's. Products are rounded
/// before they are added: contracted, equal boxes would not give exactly 0.
__device__ __forceinline__ float box_distance(const float (&s)[4], const float (&t)[4], const float (&anchor)[2],
                                              float (&slopes)[4]) {
    const Sigmoid own[4] = {Sigmoid(s[0]), Sigmoid(s[1]), Sigmoid(s[2]), Sigmoid(s[3])};
    float size[2], t_size[2], centre[2], t_centre[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float twice = 2.0f * own[k + 2].yes, t_twice = 2.0f * Sigmoid(t[k + 2]).yes;
        centre[k] = 2.0f * own[k].yes - 0.5f, t_centre[k] = 2.0f * Sigmoid(t[k]).yes - 0.5f;
        size[k] = twice * twice * anchor[k], t_size[k] = t_twice * t_twice * anchor[k];
    }
    const Axis x(centre[0], size[0], t_centre[0], t_size[0]), y(centre[1], size[1], t_centre[1], t_size[1]);
    const float shared = __fmul_rn(x.shared, y.shared), hull = __fmul_rn(x.hull, y.hull);
    const float both = __fmul_rn(x.own, y.own) + __fmul_rn(x.other, y.other) - shared;
    const float by_both = 1.0f / (both + kBoxEps), by_hull = 1.0f / (hull + kBoxEps);
    const float iou = (shared + kBoxEps) / (both + kBoxEps);
    // GIoU's derivatives by the union's area, by the intersection's (which the union has too), by the hull's
    const float of_union = by_hull - __fmul_rn(iou, by_both), of_shared = by_both - of_union;
    const float of_hull = __fmul_rn(-(both + kBoxEps) / (hull + kBoxEps), by_hull);
    const float w_shared = __fmul_rn(of_shared, y.shared), w_hull = __fmul_rn(of_hull, y.hull);
    const float h_shared = __fmul_rn(of_shared, x.shared), h_hull = __fmul_rn(of_hull, x.hull);
    slopes[0] = -2.0f * own[0].yes * own[0].no * x.by_centre(w_shared, w_hull);
    slopes[1] = -2.0f * own[1].yes * own[1].no * y.by_centre(h_shared, h_hull);
    slopes[2] = -2.0f * own[2].no * size[0] * x.by_size(w_shared, w_hull, of_union * y.own);
    slopes[3] = -2.0f * own[3].no * size[1] * y.by_size(h_shared, h_hull, of_union * x.own);
    return 1.0f - (iou - (hull - both) / (hull + kBoxEps));
}

/// A row of a tile in the maps.
struct Row {
    uint32 teacher;  // its number in the teacher's map
    uint32 anchor;
    float weight;

    /// Row `number` of the student's map.
    __device__ __forceinline__ Row(const SoftHeadLevel& level, uint32 number) {
        const uint32 rows = level.rows(), image = number / rows, place = number - image * rows;
        const uint32 outer = place / (level.student_last ? level.anchor_count : level.pixels);
        const uint32 inner = place - outer * (level.student_last ? level.anchor_count : level.pixels);
        anchor = level.student_last ? inner : outer;
        const uint32 pixel = level.student_last ? outer : inner, plain = anchor * level.pixels + pixel;
        teacher = image * rows + (level.teacher_last ? pixel * level.anchor_count + anchor : plain);
        weight = read_broadcast(level.weights + static_cast<uint64>(image) * rows + plain, true);
    }
};

/// A top row of a tile.
struct TopRow {
    uint32 row;      // of the tile
    uint32 teacher;  // its number in the teacher's map
    float weight;
};

/// 4 logits in turn.
template <class T> __device__ __forceinline__ void read_box(const T* from, float (&to)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        float one[1];
        read(from + k, one);
        to[k] = one[0];
    }
}

/// The classes of the tile's top rows: their share of the loss; the gradient goes to the tile.
template <class T>
__device__ __forceinline__ float compare_classes(const SoftHeadLevel& level, const T* student, const TopRow* top,
                                                 uint32 count, float factor, float scale, bool tells_all, T* tile) {
    const T* const teacher = static_cast<const T*>(level.teacher);
    const uint32 classes = level.logits - kClasses, rows_a_step = kThreads / classes, rest = kThreads % classes;
    uint32 row = threadIdx.x / classes, index = threadIdx.x % classes;
    float sum = 0.0f;
    while (row < count) {
        float s[kAtOnce][1], t[kAtOnce][1], weight[kAtOnce];
        uint32 place[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const TopRow& one = top[min(row, count - 1)];
            weight[k] = row < count ? factor * one.weight : kNoTop;
            place[k] = one.row * level.logits + kClasses + index;
            if (row < count) {
                read(student + place[k], s[k]);
                read(teacher + static_cast<uint64>(one.teacher) * level.logits + kClasses + index, t[k]);
            }
            row += rows_a_step, index += rest;
            if (index >= classes) index -= classes, ++row;
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            if (weight[k] < 0.0f) continue;
            const Term term = divergence(s[k][0], given(t[k][0], s[k][0], tells_all));
            sum = fmaf(weight[k], term.value, sum);
            tile[place[k]] = from_float<T>(scale * weight[k] * term.slope);
        }
    }
    return sum;
}

/// `bytes` of 0, a multiple of 16, by the block.
__device__ __forceinline__ void clear(void* memory, uint32 bytes) {
    for (uint32 i = threadIdx.x; i < bytes / VECTOR_BYTES; i += kThreads) static_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
}

/// `count` elements from shared memory to an address on the 16-byte grid, by the block.
template <class T> __device__ __forceinline__ void write_tile(const T* tile, uint32 count, T* to) {
    constexpr uint32 V = kVector<T>;
    for (uint32 i = threadIdx.x; i < count / V; i += kThreads) write_raw(to + i * V, reinterpret_cast<const uint4*>(tile)[i]);
    const uint32 rest = count / V * V + threadIdx.x;
    if (rest < count) {
        const float one[1] = {to_float(tile[rest])};
        write(to + rest, one);
    }
}

/// The objectness of a row of the tile: its share of the loss; the gradient goes to the row.
template <class T>
__device__ __forceinline__ float compare_objectness(float s, float t, float factor, float scale, bool tells_all, T* row) {
    const Term term = divergence(s, given(t, s, tells_all));
    row[kObjectness] = from_float<T>(scale * factor * term.slope);
    return factor * term.value;
}

/// The boxes of a top row: their share of the loss; the gradient goes to the tile's row.
template <class T>
__device__ __forceinline__ float compare_boxes(const T* student, const T* teacher, const float (&anchor)[2], float factor,
                                               float scale, bool tells_all, T* row) {
    float s[4], t[4], slopes[4];
    read_box(student, s);
    read_box(teacher, t);
#pragma unroll
    for (int k = 0; k < 4; ++k) t[k] = given(t[k], s[k], tells_all);
    const float distance = box_distance(s, t, anchor, slopes);
#pragma unroll
    for (int k = 0; k < 4; ++k) row[k] = from_float<T>(scale * factor * slopes[k]);
    return factor * distance;
}

/// How many threads of the block before this one are `chosen`, and `count` of all. Has a barrier.
__device__ __forceinline__ uint32 place_among(bool chosen, uint32 (&counts)[kThreads / kWarp], uint32& count) {
    const uint32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const uint32 lanes = __ballot_sync(kAllLanes, chosen);
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();  // all counts are there
    uint32 before = __popc(lanes & ((1u << lane) - 1));
    count = 0;
    for (uint32 w = 0; w < kThreads / kWarp; ++w) {
        if (w < warp) before += counts[w];
        count += counts[w];
    }
    return before;
}

/// Block: a tile of rows of the student's map, in its order.
template <class T> __device__ __forceinline__ void soft_head(const SoftHeadArgs& args) {
    DYNAMIC_SHARED(T, tile);  // (rows, logits)
    __shared__ TopRow top[kThreads];
    __shared__ uint32 counts[kThreads / kWarp];
    __shared__ float scratch[kWarp];
    const SoftHeadLevel& level = level_of_block(args.levels, args.count);
    const uint32 first = (blockIdx.x - level.first_block) * level.tile;
    const uint32 rows = min(level.tile, level.images * level.rows() - first);
    const T* const student = static_cast<const T*>(level.student) + static_cast<uint64>(first) * level.logits;
    const T* const own = student + threadIdx.x * level.logits;  // this thread's row
    const T* teacher = nullptr;
    float weight = kNoTop, anchor[2], s[1], t[1];
    uint32 teacher_row = 0;
    if (threadIdx.x < rows) {
        const Row row(level, first + threadIdx.x);
        weight = row.weight, teacher_row = row.teacher;
        teacher = static_cast<const T*>(level.teacher) + static_cast<uint64>(row.teacher) * level.logits;
        read(own + kObjectness, s);
        read(teacher + kObjectness, t);
        anchor[0] = read_broadcast(level.anchors + 2 * row.anchor, true);
        anchor[1] = read_broadcast(level.anchors + 2 * row.anchor + 1, true);
    }
    const float scale = assumed_scale(args.scale), norm = read_broadcast(level.norm, threadIdx.x == 0);
    clear(tile, level.tile * level.logits * sizeof(T));
    uint32 count;
    const bool is_top = weight >= 0.0f;
    const uint32 place = place_among(is_top, counts, count);  // after its barrier the tile is 0
    T* const gradient = tile + threadIdx.x * level.logits;  // of this thread's row
    float sum[1] = {0.0f};
    if (threadIdx.x < rows) sum[0] = compare_objectness(s[0], t[0], level.objectness, scale, args.tells_all, gradient);
    if (is_top) {
        top[place] = {threadIdx.x, teacher_row, weight};
        sum[0] += compare_boxes(own, teacher, anchor, args.box * norm * weight, scale, args.tells_all, gradient);
    }
    __syncthreads();  // the top rows are known
    sum[0] += compare_classes(level, student, top, count, level.classes * norm, scale, args.tells_all, tile);
    __syncthreads();  // the gradient is whole
    write_tile(tile, rows * level.logits, static_cast<T*>(level.gradient) + static_cast<uint64>(first) * level.logits);
    block_reduce<Sum>(sum, scratch);
    grid_total(sum[0], args.partials, args.ticket, args.loss, scratch);
}

EDGESTILL_PER_DTYPE(soft_head, SoftHeadArgs, kThreads)
