// Runs CUDA kernels on the CPU, so that the very .cu files we ship can be tested without a GPU.
//
// Every CUDA thread of a block (or of a cluster of blocks) is a fiber inside one OS thread. A fiber runs until it must
// wait (barrier, shuffle, vote, mma); then the scheduler picks another one, in an order that depends on a seed. Bugs
// that a fair order hides show up under an unfair one. Blocks (clusters) run one after another.
//
// A kernel takes one trivially copyable struct by value and is registered by SHIM_KERNEL(name, ArgsType), which exports
//   int host_<name>(const ShimOptions*, grid, block, shared_bytes, const void* args)   0; or 1, see shim_error()
//   unsigned long size_<name>()                                                        sizeof(ArgsType)
// A failed launch abandons its fibers and returns; it never takes the process down. A wild pointer still does.
//
// Stricter than the hardware, on purpose: a barrier after a thread of the block has returned, a barrier or shuffle met
// at two different lines, and a full shuffle mask in a partial warp are faults; a shuffle from a lane outside its mask
// gives 0xFF bytes. Not modelled: memory order between blocks, bank conflicts, speed.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <link.h>
#endif
#if !defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_UCONTEXT
#endif
#ifdef SHIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Keywords. After the system headers: libstdc++ spells some of its attributes the same way.

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const
#define __shared__ static thread_local
#define SHIM_EXPORT extern "C" __attribute__((visibility("default"), used))

// ---------------------------------------------------------------------------------------------------------------------
// Vector types, with CUDA's alignment: the misaligned ones are found by UBSan and by the cached load and store below.

#define SHIM_VECTOR(type, base, align2, align4)                                                                   \
    struct __align__(align2) type##2 { base x, y; };                                                              \
    struct type##3 { base x, y, z; };                                                                             \
    struct __align__(align4) type##4 { base x, y, z, w; };                                                        \
    static inline type##2 make_##type##2(base x, base y) { return {x, y}; }                                       \
    static inline type##3 make_##type##3(base x, base y, base z) { return {x, y, z}; }                            \
    static inline type##4 make_##type##4(base x, base y, base z, base w) { return {x, y, z, w}; }
SHIM_VECTOR(char, signed char, 2, 4)
SHIM_VECTOR(uchar, unsigned char, 2, 4)
SHIM_VECTOR(short, short, 4, 8)
SHIM_VECTOR(ushort, unsigned short, 4, 8)
SHIM_VECTOR(int, int, 8, 16)
SHIM_VECTOR(uint, unsigned int, 8, 16)
SHIM_VECTOR(longlong, long long, 16, 16)
SHIM_VECTOR(ulonglong, unsigned long long, 16, 16)
SHIM_VECTOR(float, float, 8, 16)
SHIM_VECTOR(double, double, 16, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct ShimOptions {
    unsigned seed;     // seed % 3: 0 round robin, 1 greedy, 2 random; odd seeds reverse the lanes; 0 shuffles nothing
    unsigned cluster;  // blocks per cluster; the whole grid as one cluster makes every block resident at once
};

// ---------------------------------------------------------------------------------------------------------------------
// The machine: fibers, warps, blocks, and the cluster that is running. All state is static, hence per shared library:
// an inline variable would be merged with the one of every other library that is loaded.

namespace shim {

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 1024, kMaxSharedBytes = 227 * 1024, kMaxSpins = 10000;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;  // redzones make frames several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr size_t kStacksKept = 1024;  // more than these are given back after a launch

enum Counter { kRead, kWritten, kBarriers, kShuffles, kAtomics, kClusterBarriers, kMatrix, kSwitches, kCounters };

struct Site {
    const char* file;
    int line;
    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
    }
    bool operator!=(const Site& other) const { return !(*this == other); }
};
#define SHIM_SITE shim::Site site = {__builtin_FILE(), __builtin_LINE()}

// A rendezvous of all threads of a block or cluster. `result` is kept per parity of the generation: the next barrier
// can complete only after everyone has left this one, but its first arrivals may come before.
struct Barrier {
    unsigned generation = 0, count = 0, votes = 0, result[2] = {0, 0};
    unsigned first_thread = 0;
    Site site = {"", 0};
};

// A rendezvous of the lanes of one mask. Free when nobody has arrived and nobody still has to read.
struct Meeting {
    unsigned generation = 0, mask = 0, arrived = 0, unread = 0;
    const char* what = nullptr;
    Site site = {"", 0};
    uint64_t slot[32];
};

struct Block {
    uint3 index = {0, 0, 0};
    unsigned rank = 0, live = 0;
    Barrier barrier;
    unsigned char* dynamic = nullptr;
    std::vector<unsigned char> statics;  // the block's static shared arrays while another block of the cluster runs
};

struct Fiber;
struct Warp {
    Block* block = nullptr;
    Fiber* lanes = nullptr;
    unsigned present = 0, exited = 0;  // bit sets of lanes
    size_t meetings_used = 0;
    Meeting meetings[33];  // each lane belongs to at most one that is not free, so one is always left
};

struct AsyncCopy {  // cp.async that its thread has not waited for
    void* shared;
    const void* global;
    size_t bytes;
    bool inside;
};

struct Fiber {
#ifdef SHIM_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
    unsigned char* stack = nullptr;
    uint3 thread = {0, 0, 0};
    Block* block = nullptr;
    Warp* warp = nullptr;
    unsigned lane = 0;
    bool done = false, spinning = false;
    const unsigned* awaited = nullptr;  // runs on when this generation differs from `seen`
    unsigned seen = 0;
    const char* what = "";
    Site site = {"", 0};
    std::vector<AsyncCopy> copies;
};

struct Machine {
    dim3 grid, block;
    unsigned cluster_blocks = 1, shared_bytes = 0, seed = 0;
    uint64_t random = 0;
    void (*kernel)(const void*) = nullptr;
    const void* args = nullptr;

    Fiber* current = nullptr;
    Block* loaded = nullptr;  // whose static shared arrays are in the thread-local segment now
    Barrier cluster_barrier;
    unsigned live = 0;
    std::vector<Block> blocks;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    std::vector<unsigned char*> stacks;

    unsigned char* statics = nullptr;
    size_t statics_bytes = 0;
    unsigned long long counters[kCounters] = {};
    bool failed = false;
    char error[2048] = "";
#ifdef SHIM_UCONTEXT
    ucontext_t scheduler;
#else
    void* scheduler = nullptr;
#endif
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
};
static Machine machine;

// ---------------------------------------------------------------------------------------------------------------------
// Switching stacks.

#ifndef SHIM_UCONTEXT
extern "C" __attribute__((visibility("hidden"))) void shim_switch_stack(void** save, void* load);
asm(R"(
    .text
    .p2align 4
    .globl shim_switch_stack
    .hidden shim_switch_stack
    .type shim_switch_stack, @function
shim_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size shim_switch_stack, .-shim_switch_stack
)");
#endif

static inline void to_scheduler() {
    Fiber* fiber = machine.current;
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fake, machine.scheduler_stack,
                                   machine.scheduler_stack_bytes);
#endif
#ifdef SHIM_UCONTEXT
    swapcontext(&fiber->context, &machine.scheduler);
#else
    shim_switch_stack(&fiber->stack_pointer, machine.scheduler);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

static inline void to_fiber(Fiber* fiber) {
    machine.current = fiber;
    ++machine.counters[kSwitches];
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber->stack, kStackBytes);
#endif
#ifdef SHIM_UCONTEXT
    swapcontext(&machine.scheduler, &fiber->context);
#else
    shim_switch_stack(&machine.scheduler, fiber->stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    machine.current = nullptr;
}

static unsigned thread_of(const Fiber* fiber) { return fiber->thread.x; }

__attribute__((format(printf, 1, 2))) static void set_error(const char* format, ...) {
    if (machine.failed) return;
    machine.failed = true;
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(machine.error, sizeof machine.error, format, arguments);
    va_end(arguments);
    size_t end = std::min(sizeof machine.error - 1, static_cast<size_t>(used < 0 ? 0 : used));
    if (machine.current)
        snprintf(machine.error + end, sizeof machine.error - end, " [block %u, thread %u]",
                 machine.current->block->index.x, thread_of(machine.current));
}

// Leaves the fiber for good: the scheduler sees `failed` and gives up all fibers.
[[noreturn]] static void give_up() {
    for (;;) to_scheduler();
}
#define SHIM_FAIL(...) (shim::set_error(__VA_ARGS__), shim::give_up())

static inline void wait(const unsigned* generation, unsigned seen, const char* what, Site site) {
    Fiber* fiber = machine.current;
    fiber->awaited = generation;
    fiber->seen = seen;
    fiber->what = what;
    fiber->site = site;
    to_scheduler();
    fiber->awaited = nullptr;
}

static inline bool ready(const Fiber& fiber) {
    return !fiber.done && (!fiber.awaited || *fiber.awaited != fiber.seen);
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, and meetings of lanes.

static inline unsigned arrive(Barrier& barrier, unsigned total, unsigned live, const char* what, Site site, bool vote) {
    if (live != total)
        SHIM_FAIL("divergent barrier: %u of %u threads returned before %s at %s:%d", total - live, total, what,
                  site.file, site.line);
    if (barrier.count == 0) {
        barrier.site = site;
        barrier.first_thread = thread_of(machine.current);
    } else if (barrier.site != site) {
        SHIM_FAIL("divergent barrier: thread %u waits in %s at %s:%d, another thread reached %s:%d",
                  barrier.first_thread, what, barrier.site.file, barrier.site.line, site.file, site.line);
    }
    unsigned generation = barrier.generation;
    barrier.votes += vote;
    if (++barrier.count == total) {
        barrier.result[generation & 1] = barrier.votes;
        barrier.count = barrier.votes = 0;
        ++barrier.generation;
        ++machine.counters[&barrier == &machine.cluster_barrier ? kClusterBarriers : kBarriers];
    } else {
        wait(&barrier.generation, generation, what, site);
    }
    return barrier.result[generation & 1];
}

static inline unsigned block_barrier(const char* what, Site site, bool vote = false) {
    Block& block = *machine.current->block;
    return arrive(block.barrier, machine.block.x, block.live, what, site, vote);
}

static inline Meeting& find_meeting(Warp& warp, unsigned mask) {
    Meeting* idle = nullptr;
    for (size_t i = 0; i < warp.meetings_used; ++i) {
        Meeting& meeting = warp.meetings[i];
        if (meeting.arrived && meeting.mask == mask) return meeting;
        if (!meeting.arrived && !meeting.unread && !idle) idle = &meeting;
    }
    if (!idle) idle = &warp.meetings[warp.meetings_used++];
    idle->mask = mask;
    return *idle;
}

static inline void release(Meeting& meeting) {
    meeting.unread = meeting.arrived;
    meeting.arrived = 0;
    ++meeting.generation;
}

struct Nothing {
    void operator()(Meeting&) const {}
};

// Waits for all lanes of the mask. The last one to come runs `complete` while the others stand still, so that it may
// work on their local variables. The caller reads what it needs from the slots, then calls `leave`.
template <class Complete = Nothing>
static inline Meeting& meet(unsigned mask, const char* what, Site site, uint64_t word, Complete complete = {}) {
    Fiber& fiber = *machine.current;
    Warp& warp = *fiber.warp;
    unsigned bit = 1u << fiber.lane;
    if (!(mask & bit))
        SHIM_FAIL("%s at %s:%d: the calling lane %u is not in mask 0x%08x", what, site.file, site.line,
                  fiber.lane, mask);
    if (mask & ~warp.present)
        SHIM_FAIL("%s at %s:%d: mask 0x%08x names lanes that do not exist, the warp has 0x%08x", what, site.file,
                  site.line, mask, warp.present);
    if (mask & warp.exited)
        SHIM_FAIL("%s at %s:%d: mask 0x%08x names exited lanes 0x%08x", what, site.file, site.line, mask,
                  mask & warp.exited);
    Meeting& meeting = find_meeting(warp, mask);
    if (!meeting.arrived) {
        meeting.what = what;
        meeting.site = site;
    } else if (strcmp(meeting.what, what) != 0 || meeting.site != site) {
        SHIM_FAIL("divergent warp: lanes of mask 0x%08x meet in %s at %s:%d and in %s at %s:%d", mask, meeting.what,
                  meeting.site.file, meeting.site.line, what, site.file, site.line);
    }
    meeting.slot[fiber.lane] = word;
    meeting.arrived |= bit;
    if (meeting.arrived == meeting.mask) {
        complete(meeting);
        release(meeting);
    } else {
        wait(&meeting.generation, meeting.generation, what, site);
    }
    return meeting;
}

static inline void leave(Meeting& meeting) { meeting.unread &= ~(1u << machine.current->lane); }

static const char* const kSyncwarp = "__syncwarp";

// What a returning thread leaves behind must not wait for it.
static void exit_thread(Fiber& fiber) {
    Warp& warp = *fiber.warp;
    Block& block = *fiber.block;
    unsigned bit = 1u << fiber.lane;
    for (const Barrier* barrier : {&block.barrier, &machine.cluster_barrier})
        if (barrier->count)
            set_error("divergent barrier: a thread returned while thread %u waits at %s:%d", barrier->first_thread,
                      barrier->site.file, barrier->site.line);
    for (size_t i = 0; i < warp.meetings_used; ++i) {
        Meeting& meeting = warp.meetings[i];
        if (!meeting.arrived || !(meeting.mask & bit)) continue;
        if (meeting.what == kSyncwarp) {  // waits for lanes that have not exited only
            meeting.mask &= ~bit;
            if (meeting.arrived == meeting.mask) release(meeting);
        } else {
            set_error("%s at %s:%d: mask 0x%08x names lane %u, which exited", meeting.what, meeting.site.file,
                      meeting.site.line, meeting.mask, fiber.lane);
        }
    }
    if (!fiber.copies.empty()) set_error("a thread returned before its copy_async had been waited for");
    fiber.done = true;
    warp.exited |= bit;
    --machine.live;
    if (--block.live == 0 && machine.shared_bytes) memset(block.dynamic, 0xFF, machine.shared_bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Starting fibers.

__attribute__((no_sanitize("address"))) static void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
    machine.kernel(machine.args);
    exit_thread(*machine.current);
    give_up();
}

static void prepare_stack(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // frames that an aborted launch left behind
#endif
#ifdef SHIM_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#else
    // Six saved registers, where to return to, and the null return address that ends a backtrace: after the return the
    // stack pointer is 8 below a multiple of 16, as the ABI promises a function.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 8;
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = top;
#endif
}

static bool grow_stacks(size_t count) {
    while (machine.stacks.size() < count) {
        void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        mprotect(memory, kGuardBytes, PROT_NONE);  // a kernel that needs more than the stack crashes, not corrupts
        machine.stacks.push_back(static_cast<unsigned char*>(memory) + kGuardBytes);
    }
    return true;
}

static void shrink_stacks() {
    while (machine.stacks.size() > kStacksKept) {
        munmap(machine.stacks.back() - kGuardBytes, kGuardBytes + kStackBytes);
        machine.stacks.pop_back();
    }
}

// Static shared arrays are thread-local, and nothing else in this library is: so the library's thread-local segment is
// the block's static shared memory. It is poisoned before each block and exchanged between the blocks of a cluster.
static thread_local unsigned char statics_anchor[16];

#if defined(__linux__)
static int find_statics(dl_phdr_info* info, size_t size, void*) {
    auto anchor = reinterpret_cast<uintptr_t>(statics_anchor);
    if (size < offsetof(dl_phdr_info, dlpi_tls_data) + sizeof(void*) || !info->dlpi_tls_data) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        auto start = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
        if (header.p_type != PT_TLS || anchor < start || anchor >= start + header.p_memsz) continue;
        machine.statics = static_cast<unsigned char*>(info->dlpi_tls_data);
        machine.statics_bytes = header.p_memsz;
        return 1;
    }
    return 0;
}
#endif

static void locate_statics() {
    machine.statics = statics_anchor;  // also makes the loader allocate this thread's segment
    machine.statics_bytes = 0;
    asm volatile("" : : "r"(machine.statics) : "memory");
#if defined(__linux__)
    dl_iterate_phdr(find_statics, nullptr);
#endif
}

static void load_statics(Block* block) {
    if (machine.loaded == block || machine.cluster_blocks == 1) return;
    if (machine.loaded) memcpy(machine.loaded->statics.data(), machine.statics, machine.statics_bytes);
    memcpy(machine.statics, block->statics.data(), machine.statics_bytes);
    machine.loaded = block;
}

static void prepare_cluster(unsigned first_block) {
    unsigned threads = machine.block.x, warps_per_block = (threads + 31) / 32;
    machine.cluster_barrier = Barrier();
    machine.live = threads * machine.cluster_blocks;
    machine.loaded = nullptr;
    memset(machine.statics, 0xFF, machine.statics_bytes);
    for (unsigned rank = 0; rank < machine.cluster_blocks; ++rank) {
        Block& block = machine.blocks[rank];
        block.index = {first_block + rank, 0, 0};
        block.rank = rank;
        block.live = threads;
        block.barrier = Barrier();
        if (machine.shared_bytes) memset(block.dynamic, 0xFF, machine.shared_bytes);
        if (machine.cluster_blocks > 1) block.statics.assign(machine.statics_bytes, 0xFF);
        for (unsigned thread = 0; thread < threads; ++thread) {
            size_t index = size_t(rank) * threads + thread;
            Warp& warp = machine.warps[size_t(rank) * warps_per_block + thread / 32];
            Fiber& fiber = machine.fibers[index];
            if (thread % 32 == 0) {
                warp.block = &block;
                warp.lanes = &fiber;
                warp.present = threads - thread >= 32 ? ~0u : (1u << (threads - thread)) - 1;
                warp.exited = 0;
                for (size_t i = 0; i < warp.meetings_used; ++i) warp.meetings[i] = Meeting();
                warp.meetings_used = 0;
            }
            fiber.stack = machine.stacks[index];
            fiber.thread = {thread, 0, 0};
            fiber.block = &block;
            fiber.warp = &warp;
            fiber.lane = thread % 32;
            fiber.done = fiber.spinning = false;
            fiber.awaited = nullptr;
            fiber.copies.clear();
            prepare_stack(fiber);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The schedules.

static uint64_t next_random() {  // splitmix64
    uint64_t z = (machine.random += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static void shuffle_order(std::vector<unsigned>& order) {
    if (!machine.seed) return;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

static std::vector<unsigned> count_up(size_t count) {
    std::vector<unsigned> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = static_cast<unsigned>(i);
    shuffle_order(order);
    return order;
}

// Resumes each lane that can run once. False when none could, or those that could only polled.
static bool run_warp(Warp& warp) {
    bool moved = false;
    int count = 32 - __builtin_clz(warp.present);
    for (int i = 0; i < count; ++i) {
        Fiber& fiber = warp.lanes[machine.seed % 2 ? count - 1 - i : i];
        if (!ready(fiber)) continue;
        load_statics(warp.block);
        fiber.spinning = false;
        to_fiber(&fiber);
        moved |= !fiber.spinning;
        if (machine.failed) return true;
    }
    return moved;
}

static bool sweep(const std::vector<unsigned>& order) {
    bool moved = false;
    for (unsigned warp : order) {
        moved |= run_warp(machine.warps[warp]);
        if (machine.failed) return true;
    }
    return moved;
}

// The first warp in the order that can run does so until it blocks; the later ones starve.
static bool step_greedy(const std::vector<unsigned>& order) {
    for (unsigned warp : order) {
        if (!run_warp(machine.warps[warp])) continue;
        while (!machine.failed && run_warp(machine.warps[warp])) {}
        return true;
    }
    return false;
}

static bool step_random(const std::vector<unsigned>& order) {
    return run_warp(machine.warps[order[next_random() % order.size()]]) || sweep(order);
}

static void report_deadlock() {
    struct Group {
        const char* what;
        Site site;
        unsigned count, block, thread;
    };
    std::vector<Group> groups;
    for (const Fiber& fiber : machine.fibers) {
        if (fiber.done) continue;
        const char* what = fiber.awaited ? fiber.what : "__nanosleep";
        auto same = [&](const Group& group) { return group.site == fiber.site && strcmp(group.what, what) == 0; };
        auto found = std::find_if(groups.begin(), groups.end(), same);
        if (found != groups.end()) {
            ++found->count;
        } else if (groups.size() < 6) {
            groups.push_back({what, fiber.site, 1, fiber.block->index.x, thread_of(&fiber)});
        }
    }
    char text[1536] = "";
    size_t used = 0;
    for (const Group& group : groups)
        used += snprintf(text + std::min(used, sizeof text - 1), sizeof text - std::min(used, sizeof text - 1),
                         "; %u in %s at %s:%d (first: block %u, thread %u)", group.count, group.what, group.site.file,
                         group.site.line, group.block, group.thread);
    set_error("deadlock: %u threads wait for each other%s", machine.live, text);
}

static void run_cluster(const std::vector<unsigned>& order) {
    unsigned polls = 0;
    while (machine.live && !machine.failed) {
        bool moved = machine.seed % 3 == 0   ? sweep(order)
                     : machine.seed % 3 == 1 ? step_greedy(order)
                                             : step_random(order);
        bool polled = false;
        if (!moved)
            for (const Fiber& fiber : machine.fibers) polled |= !fiber.done && fiber.spinning;
        polls = moved ? 0 : polls + 1;
        if (!moved && (!polled || polls > kMaxSpins)) report_deadlock();
    }
}

static bool check_launch(unsigned grid, unsigned block) {
    unsigned cluster = machine.cluster_blocks;
    if (!grid || !block || block > kMaxThreads)
        set_error("launch: grid %u, block %u; need grid >= 1, 1 <= block <= %u", grid, block, kMaxThreads);
    else if (!cluster || cluster > kMaxCluster || grid % cluster)
        set_error("launch: cluster %u; need 1 to %u, dividing grid %u", cluster, kMaxCluster, grid);
    else if (machine.shared_bytes > kMaxSharedBytes)
        set_error("launch: %u bytes of dynamic shared memory; a block has at most %u", machine.shared_bytes,
                  kMaxSharedBytes);
    else if (!grow_stacks(size_t(cluster) * block))
        set_error("launch: no memory for the stacks of %u threads", cluster * block);
    return !machine.failed;
}

static int launch(const ShimOptions& options, unsigned grid, unsigned block, unsigned shared_bytes,
                  void (*kernel)(const void*), const void* args) {
    machine.failed = false;
    machine.error[0] = 0;
    memset(machine.counters, 0, sizeof machine.counters);
    machine.grid = dim3(grid);
    machine.block = dim3(block);
    machine.cluster_blocks = options.cluster;
    machine.shared_bytes = shared_bytes;
    machine.seed = options.seed;
    machine.random = options.seed;
    machine.kernel = kernel;
    machine.args = args;
    if (!check_launch(grid, block)) return 1;
    locate_statics();

    machine.blocks.assign(options.cluster, Block());
    machine.warps.assign(size_t(options.cluster) * ((block + 31) / 32), Warp());
    machine.fibers.assign(size_t(options.cluster) * block, Fiber());
    for (Block& each : machine.blocks)  // each its own allocation of the exact size, so that ASan sees its end
        if (posix_memalign(reinterpret_cast<void**>(&each.dynamic), 128, shared_bytes)) set_error("launch: no memory");
    std::vector<unsigned> clusters = count_up(grid / options.cluster);
    for (size_t i = 0; i < clusters.size() && !machine.failed; ++i) {
        prepare_cluster(clusters[i] * options.cluster);
        run_cluster(count_up(machine.warps.size()));
    }
    for (Block& each : machine.blocks) free(each.dynamic);
    shrink_stacks();
    return machine.failed;
}

// ---------------------------------------------------------------------------------------------------------------------
// What the CUDA names below are made of.

static inline void* dynamic_shared() { return machine.current->block->dynamic; }

static inline bool inside(const void* address, size_t bytes, const void* start, size_t size) {
    auto a = reinterpret_cast<uintptr_t>(address), s = reinterpret_cast<uintptr_t>(start);
    return a >= s && a + bytes <= s + size;
}

static inline bool is_shared(const void* address, size_t bytes) {
    return inside(address, bytes, machine.current->block->dynamic, machine.shared_bytes) ||
           inside(address, bytes, machine.statics, machine.statics_bytes);
}

template <class T>
static inline T shuffle(unsigned mask, T value, unsigned source, const char* what, Site site) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves at most 8 bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    Meeting& meeting = meet(mask, what, site, word, [](Meeting&) { ++machine.counters[kShuffles]; });
    word = mask >> source & 1 ? meeting.slot[source] : ~uint64_t(0);  // undefined on the GPU: make it visible
    leave(meeting);
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline unsigned ballot(unsigned mask, bool predicate, const char* what, Site site) {
    Meeting& meeting = meet(mask, what, site, predicate, [](Meeting&) { ++machine.counters[kShuffles]; });
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) bits |= unsigned(meeting.slot[lane]) << lane;
    leave(meeting);
    return bits;
}

static inline unsigned lane() { return machine.current->lane; }
static inline unsigned segment(int width) { return lane() & ~unsigned(width - 1); }

template <class T>
struct same {
    using type = T;
};
template <class T>
using same_t = typename same<T>::type;  // keeps an argument out of template deduction

template <class T>
static inline void check_aligned(const T* address, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T))
        SHIM_FAIL("%s: misaligned address %p for an access of %zu bytes", what, static_cast<const void*>(address),
                  sizeof(T));
}

template <class T>
static inline T load(const T* address, const char* what) {
    check_aligned(address, what);
    return *address;
}

template <class T>
static inline void store(T* address, const T& value, const char* what) {
    check_aligned(address, what);
    *address = value;
}

template <class T, class Update>
static inline T atomic(T* address, Update update) {
    static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "no such atomic");
    check_aligned(address, "atomic");
    ++machine.counters[kAtomics];
    T old = *address;
    *address = update(old);
    return old;
}

template <class To, class From>
static inline To cast_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class Integer>
static inline Integer saturate(double value) {  // CUDA: NaN gives 0, the rest is clamped
    if (value != value) return 0;
    constexpr double low = std::is_signed<Integer>::value ? -2147483648.0 : 0.0;
    constexpr double high = std::is_signed<Integer>::value ? 2147483647.0 : 4294967295.0;
    return static_cast<Integer>(value < low ? low : value > high ? high : value);
}

}  // namespace shim

// ---------------------------------------------------------------------------------------------------------------------
// Exports, counters, registration.

SHIM_EXPORT const char* shim_error() { return shim::machine.error; }
SHIM_EXPORT void shim_counters(unsigned long long out[8]) {
    memcpy(out, shim::machine.counters, sizeof shim::machine.counters);
}

static inline void shim_count_read(unsigned long long bytes) { shim::machine.counters[shim::kRead] += bytes; }
static inline void shim_count_write(unsigned long long bytes) { shim::machine.counters[shim::kWritten] += bytes; }

#define SHIM_KERNEL(name, ...)                                                                                    \
    SHIM_EXPORT int host_##name(const ShimOptions* options, unsigned grid, unsigned block, unsigned shared_bytes, \
                                const void* args) {                                                               \
        static_assert(std::is_trivially_copyable<__VA_ARGS__>::value, "kernel arguments are copied as bytes");    \
        static_assert(sizeof(__VA_ARGS__) <= 4096, "CUDA passes at most 4 KB");                                   \
        alignas(__VA_ARGS__) unsigned char copy[sizeof(__VA_ARGS__)];                                             \
        memcpy(copy, args, sizeof copy);                                                                          \
        auto run = [](const void* bytes) { name(*static_cast<const __VA_ARGS__*>(bytes)); };                      \
        return shim::launch(*options, grid, block, shared_bytes, run, copy);                                      \
    }                                                                                                             \
    SHIM_EXPORT unsigned long size_##name() { return sizeof(__VA_ARGS__); }

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's built-in names.

#define threadIdx (shim::machine.current->thread)
#define blockIdx (shim::machine.current->block->index)
#define blockDim (shim::machine.block)
#define gridDim (shim::machine.grid)
static constexpr int warpSize = 32;

#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(shim::dynamic_shared())

static inline void __syncthreads(SHIM_SITE) { shim::block_barrier("__syncthreads", site); }
static inline int __syncthreads_count(int predicate, SHIM_SITE) {
    return int(shim::block_barrier("__syncthreads_count", site, predicate != 0));
}
static inline int __syncthreads_or(int predicate, SHIM_SITE) {
    return shim::block_barrier("__syncthreads_or", site, predicate != 0) != 0;
}
static inline int __syncthreads_and(int predicate, SHIM_SITE) {
    return shim::block_barrier("__syncthreads_and", site, predicate != 0) == shim::machine.block.x;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    const shim::Warp& warp = *shim::machine.current->warp;
    // One site for all: lanes may meet in __syncwarp from different lines.
    shim::leave(shim::meet(mask & warp.present & ~warp.exited, shim::kSyncwarp, {"any line", 0}, 0));
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __nanosleep(unsigned) {  // a loop that polls memory must call it: nothing else lets the others run
    shim::machine.current->spinning = true;
    shim::to_scheduler();
}
[[noreturn]] static inline void __trap() { SHIM_FAIL("__trap"); }

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_SITE) {
    unsigned lane = shim::segment(width) | (unsigned(source) & unsigned(width - 1));
    return shim::shuffle(mask, value, lane, "__shfl_sync", site);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_SITE) {
    unsigned lane = shim::lane() ^ unsigned(bits);
    bool own = lane >= shim::segment(width) + width;
    return shim::shuffle(mask, value, own ? shim::lane() : lane, "__shfl_xor_sync", site);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_SITE) {
    bool own = shim::lane() - shim::segment(width) < delta;
    return shim::shuffle(mask, value, own ? shim::lane() : shim::lane() - delta, "__shfl_up_sync", site);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_SITE) {
    bool own = shim::lane() + uint64_t(delta) >= shim::segment(width) + uint64_t(width);
    return shim::shuffle(mask, value, own ? shim::lane() : shim::lane() + delta, "__shfl_down_sync", site);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_SITE) {
    return shim::ballot(mask, predicate != 0, "__ballot_sync", site);
}
static inline int __any_sync(unsigned mask, int predicate, SHIM_SITE) {
    return shim::ballot(mask, predicate != 0, "__any_sync", site) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, SHIM_SITE) {
    return shim::ballot(mask, predicate != 0, "__all_sync", site) == mask;
}

// Clusters. The twins of our own wrappers around inline PTX.
static inline unsigned cluster_rank() { return shim::machine.current->block->rank; }
static inline unsigned cluster_size() { return shim::machine.cluster_blocks; }
static inline void cluster_barrier(SHIM_SITE) {
    unsigned total = shim::machine.block.x * shim::machine.cluster_blocks;
    shim::arrive(shim::machine.cluster_barrier, total, shim::machine.live, "cluster_barrier", site, false);
}
static inline float cluster_load(const float* own_shared_address, unsigned rank, SHIM_SITE) {
    shim::Machine& machine = shim::machine;
    shim::Block& own = *machine.current->block;
    if (rank >= machine.cluster_blocks)
        SHIM_FAIL("cluster_load at %s:%d: rank %u of a cluster of %u", site.file, site.line, rank,
                  machine.cluster_blocks);
    if (!shim::is_shared(own_shared_address, sizeof(float)))
        SHIM_FAIL("cluster_load at %s:%d: the address is not in shared memory", site.file, site.line);
    shim::Block& peer = machine.blocks[rank];
    if (!peer.live) SHIM_FAIL("cluster_load at %s:%d: block %u of the cluster has exited", site.file, site.line, rank);
    auto address = reinterpret_cast<const unsigned char*>(own_shared_address);
    if (&peer == &own) return *own_shared_address;
    bool is_static = shim::inside(address, sizeof(float), machine.statics, machine.statics_bytes);
    auto theirs = is_static ? &peer.statics[address - machine.statics] : peer.dynamic + (address - own.dynamic);
    float value;
    memcpy(&value, theirs, sizeof value);
    return value;
}

// Atomics: a switch happens at waits only, so plain read-modify-write is atomic here.
#define SHIM_ATOMIC(name, Requires, result)                                              \
    template <class T>                                                                   \
    static inline T name(T* address, shim::same_t<T> value) {                            \
        static_assert(Requires<T>::value, "no such atomic for this type");               \
        return shim::atomic(address, [=]([[maybe_unused]] T old) { return T(result); }); \
    }
SHIM_ATOMIC(atomicAdd, std::is_arithmetic, old + value)
SHIM_ATOMIC(atomicSub, std::is_integral, old - value)
SHIM_ATOMIC(atomicMax, std::is_integral, old > value ? old : value)
SHIM_ATOMIC(atomicMin, std::is_integral, old < value ? old : value)
SHIM_ATOMIC(atomicExch, std::is_arithmetic, value)
SHIM_ATOMIC(atomicAnd, std::is_integral, old & value)
SHIM_ATOMIC(atomicOr, std::is_integral, old | value)
SHIM_ATOMIC(atomicXor, std::is_integral, old ^ value)
template <class T>
static inline T atomicCAS(T* address, shim::same_t<T> expected, shim::same_t<T> value) {
    static_assert(std::is_integral<T>::value, "no such atomic for this type");
    return shim::atomic(address, [=](T old) { return old == expected ? value : old; });
}
static inline unsigned atomicInc(unsigned* p, unsigned last) {
    return shim::atomic(p, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}
static inline unsigned atomicDec(unsigned* p, unsigned last) {
    return shim::atomic(p, [=](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}

// Cached loads and stores check alignment as the GPU does; they count no bytes (our wrappers do).
template <class T> static inline T __ldg(const T* p) { return shim::load(p, "__ldg"); }
template <class T> static inline T __ldcs(const T* p) { return shim::load(p, "__ldcs"); }
template <class T> static inline T __ldcg(const T* p) { return shim::load(p, "__ldcg"); }
template <class T> static inline T __ldca(const T* p) { return shim::load(p, "__ldca"); }
template <class T> static inline T __ldcv(const T* p) { return shim::load(p, "__ldcv"); }
template <class T> static inline T __ldlu(const T* p) { return shim::load(p, "__ldlu"); }
template <class T> static inline void __stcs(T* p, const shim::same_t<T>& v) { shim::store(p, v, "__stcs"); }
template <class T> static inline void __stcg(T* p, const shim::same_t<T>& v) { shim::store(p, v, "__stcg"); }
template <class T> static inline void __stwb(T* p, const shim::same_t<T>& v) { shim::store(p, v, "__stwb"); }
template <class T> static inline void __stwt(T* p, const shim::same_t<T>& v) { shim::store(p, v, "__stwt"); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic. <math.h> has the rest (expf, exp2f, log2f, fmaf, fmaxf ...). glibc declares __expf and its like, so these
// are macros. The fast ones are exact here: the error of ex2.approx is not modelled.

#define __expf(x) (::expf(x))
#define __exp2f(x) (::exp2f(x))
#define __exp10f(x) (::exp2f((x) * 3.32192809488736f))
#define __logf(x) (::logf(x))
#define __log2f(x) (::log2f(x))
#define __log10f(x) (::log10f(x))
#define __sinf(x) (::sinf(x))
#define __cosf(x) (::cosf(x))
#define __powf(x, y) (::powf(x, y))
#define __tanhf(x) (::tanhf(x))

static inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(double(x))); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return rsqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

static inline int __float_as_int(float x) { return shim::cast_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return shim::cast_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return shim::cast_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return shim::cast_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return shim::cast_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return shim::cast_bits<double>(x); }

static inline int __float2int_rn(float x) { return shim::saturate<int>(nearbyint(double(x))); }
static inline int __float2int_rz(float x) { return shim::saturate<int>(trunc(double(x))); }
static inline int __float2int_rd(float x) { return shim::saturate<int>(floor(double(x))); }
static inline int __float2int_ru(float x) { return shim::saturate<int>(ceil(double(x))); }
static inline unsigned __float2uint_rn(float x) { return shim::saturate<unsigned>(nearbyint(double(x))); }
static inline unsigned __float2uint_rz(float x) { return shim::saturate<unsigned>(trunc(double(x))); }
static inline unsigned __float2uint_rd(float x) { return shim::saturate<unsigned>(floor(double(x))); }
static inline unsigned __float2uint_ru(float x) { return shim::saturate<unsigned>(ceil(double(x))); }
static inline float __int2float_rn(int x) { return static_cast<float>(x); }
static inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __mulhi(int x, int y) { return int((static_cast<long long>(x) * y) >> 32); }
static inline unsigned __umulhi(unsigned x, unsigned y) {
    return unsigned((static_cast<unsigned long long>(x) * y) >> 32);
}

#define SHIM_MIN_MAX(type)                                                     \
    static inline type min(type x, type y) { return y < x ? y : x; }           \
    static inline type max(type x, type y) { return x < y ? y : x; }
SHIM_MIN_MAX(int)
SHIM_MIN_MAX(unsigned)
SHIM_MIN_MAX(long)
SHIM_MIN_MAX(unsigned long)
SHIM_MIN_MAX(long long)
SHIM_MIN_MAX(unsigned long long)
static inline unsigned min(int x, unsigned y) { return min(unsigned(x), y); }
static inline unsigned min(unsigned x, int y) { return min(x, unsigned(y)); }
static inline unsigned max(int x, unsigned y) { return max(unsigned(x), y); }
static inline unsigned max(unsigned x, int y) { return max(x, unsigned(y)); }
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }
static inline double min(double x, double y) { return fmin(x, y); }
static inline double max(double x, double y) { return fmax(x, y); }

// ---------------------------------------------------------------------------------------------------------------------
// Half types: storage and explicit conversions only. Arithmetic on them does not compile, rather than differ silently.

namespace shim {

static inline uint16_t half_from_float(float value) {  // to nearest even; overflow gives infinity, NaN gives 0x7fff
    uint32_t bits = cast_bits<uint32_t>(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fff;
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more
    if (bits < 0x38800000u)  // below 2^-14: adding 0.5 rounds to multiples of 2^-24, the smallest half
        return uint16_t(sign | (cast_bits<uint32_t>(cast_bits<float>(bits) + 0.5f) - 0x3f000000u));
    bits += 0xfffu + (bits >> 13 & 1u);
    return uint16_t(sign | ((bits - 0x38000000u) >> 13));
}

static inline float float_from_half(uint16_t half) {
    uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude > 0x7c00u) return cast_bits<float>(0x7fffffffu);
    if (magnitude == 0x7c00u) return cast_bits<float>(sign | 0x7f800000u);
    if (magnitude >= 0x400u) return cast_bits<float>(sign | ((magnitude << 13) + 0x38000000u));
    return cast_bits<float>(sign | cast_bits<uint32_t>(float(magnitude) * 5.9604644775390625e-8f));  // 2^-24
}

static inline uint16_t bfloat_from_float(float value) {
    uint32_t bits = cast_bits<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float float_from_bfloat(uint16_t bfloat) { return cast_bits<float>(uint32_t(bfloat) << 16); }

}  // namespace shim

struct __align__(2) __half {
    uint16_t bits;
    __half() = default;
    explicit __half(float value) : bits(shim::half_from_float(value)) {}
    explicit operator float() const { return shim::float_from_half(bits); }
};
struct __align__(2) __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value) : bits(shim::bfloat_from_float(value)) {}
    explicit operator float() const { return shim::float_from_bfloat(bits); }
};
struct __align__(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x_, __half y_) : x(x_), y(y_) {}
};
struct __align__(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 x_, __nv_bfloat16 y_) : x(x_), y(y_) {}
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

static inline __half __float2half(float x) { return __half(x); }
static inline __half __float2half_rn(float x) { return __half(x); }
static inline float __half2float(__half x) { return float(x); }
static inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
static inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
static inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
static inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
static inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
static inline __half2 __half2half2(__half x) { return {x, x}; }
static inline __half __low2half(__half2 v) { return v.x; }
static inline __half __high2half(__half2 v) { return v.y; }
static inline float __low2float(__half2 v) { return float(v.x); }
static inline float __high2float(__half2 v) { return float(v.y); }
static inline unsigned short __half_as_ushort(__half x) { return x.bits; }
static inline __half __ushort_as_half(unsigned short x) { return shim::cast_bits<__half>(x); }

static inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
static inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
static inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
static inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
static inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
static inline float __low2float(__nv_bfloat162 v) { return float(v.x); }
static inline float __high2float(__nv_bfloat162 v) { return float(v.y); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return shim::cast_bits<__nv_bfloat16>(x); }

// ---------------------------------------------------------------------------------------------------------------------
// Matrix instructions, after the tables of the PTX ISA. The last lane to arrive does the work of the whole warp.

namespace shim {

struct LoadMatrix {
    uint32_t* registers;
    const unsigned char* row;  // lane 8*i + r names row r of matrix i
};

static inline void load_matrix(uint32_t (&registers)[4], const void* row, bool transposed, const char* what,
                               Site site) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
        SHIM_FAIL("%s at %s:%d: the row address is not a multiple of 16", what, site.file, site.line);
    if (!is_shared(row, 16)) SHIM_FAIL("%s at %s:%d: the row is not in shared memory", what, site.file, site.line);
    LoadMatrix own = {registers, static_cast<const unsigned char*>(row)};
    auto complete = [transposed](Meeting& meeting) {
        ++machine.counters[kMatrix];
        for (unsigned lane = 0; lane < 32; ++lane) {
            auto* target = reinterpret_cast<LoadMatrix*>(meeting.slot[lane]);
            for (unsigned matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (unsigned i = 0; i < 2; ++i) {
                    unsigned major = lane / 4, minor = 2 * (lane % 4) + i;
                    unsigned matrix_row = transposed ? minor : major, column = transposed ? major : minor;
                    auto* source = reinterpret_cast<LoadMatrix*>(meeting.slot[8 * matrix + matrix_row]);
                    memcpy(&pair[i], source->row + 2 * column, 2);
                }
                target->registers[matrix] = pair[0] | uint32_t(pair[1]) << 16;
            }
        }
    };
    leave(meet(0xffffffffu, what, site, reinterpret_cast<uint64_t>(&own), complete));
}

struct Multiply {
    float* d;
    const uint32_t *a, *b;
};

template <class T>
static inline float half_of(uint32_t pair, unsigned index) {
    return static_cast<float>(cast_bits<T>(static_cast<uint16_t>(pair >> (16 * index))));
}

// a: register r of lane 4*g + q holds row g + 8*(r%2), columns 2q, 2q+1 (+8 for r >= 2). b: register r holds column g,
// rows 2q, 2q+1 (+8 for r = 1). d: registers 0, 1 are row g, columns 2q, 2q+1; 2, 3 the same of row g + 8.
template <class T>
static inline void multiply(Meeting& meeting) {
    ++machine.counters[kMatrix];
    float a[16][16], b[8][16];
    for (unsigned lane = 0; lane < 32; ++lane) {
        auto* operand = reinterpret_cast<Multiply*>(meeting.slot[lane]);
        unsigned g = lane / 4, q = lane % 4;
        for (unsigned i = 0; i < 2; ++i) {
            for (unsigned r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * q + i + 8 * (r / 2)] = half_of<T>(operand->a[r], i);
            for (unsigned r = 0; r < 2; ++r) b[g][2 * q + i + 8 * r] = half_of<T>(operand->b[r], i);
        }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        float* d = reinterpret_cast<Multiply*>(meeting.slot[lane])->d;
        for (unsigned r = 0; r < 4; ++r) {
            const float *row = a[lane / 4 + 8 * (r / 2)], *column = b[2 * (lane % 4) + r % 2];
            float sum = d[r];
            for (unsigned k = 0; k < 16; ++k) sum += row[k] * column[k];
            d[r] = sum;
        }
    }
}

}  // namespace shim

static inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row_address, SHIM_SITE) {
    shim::load_matrix(r, shared_row_address, false, "ldmatrix_x4", site);
}
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row_address, SHIM_SITE) {
    shim::load_matrix(r, shared_row_address, true, "ldmatrix_x4_trans", site);
}
template <class T>
static inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, SHIM_SITE) {
    static_assert(std::is_same<T, __half>::value || std::is_same<T, __nv_bfloat16>::value, "__half or __nv_bfloat16");
    shim::Multiply own = {d, a, b};
    shim::leave(shim::meet(0xffffffffu, "mma_m16n8k16", site, reinterpret_cast<uint64_t>(&own), shim::multiply<T>));
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies from global to shared memory. The data arrive when their thread waits, and not before: until then
// the target is poisoned, so that what reads it too early, or overwrites it too late, gives other numbers.

template <int kBytes>
static inline void copy_async(void* shared, const void* global, bool inside, SHIM_SITE) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
    if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes)
        SHIM_FAIL("copy_async at %s:%d: an address is not a multiple of %d", site.file, site.line, kBytes);
    if (!shim::is_shared(shared, kBytes))
        SHIM_FAIL("copy_async at %s:%d: the target is not in shared memory", site.file, site.line);
    if (inside) shim_count_read(kBytes);
    memset(shared, 0xFF, kBytes);
    shim::machine.current->copies.push_back({shared, global, kBytes, inside});
}
static inline void copy_async_wait() {
    std::vector<shim::AsyncCopy>& copies = shim::machine.current->copies;
    for (const shim::AsyncCopy& copy : copies) {
        if (copy.inside)
            memcpy(copy.shared, copy.global, copy.bytes);
        else
            memset(copy.shared, 0, copy.bytes);
    }
    copies.clear();
}
