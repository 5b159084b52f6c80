// The threads of CUDA's blocks, on a CPU. Blocks run one after the other; there are two engines for the threads of one:
//
//   fibers (default)     each CUDA thread is a fiber of one OS thread: fast, and the same every time. `order` changes the
//                        order of blocks and threads, which must change no bit of the results.
//   DAPO_EDGE_THREADS    each CUDA thread is a real one, for ThreadSanitizer (races) and AddressSanitizer (overflows).
//
// Both stop with a message where the block can't go on: a barrier that not all threads reach, a wrong mask.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef DAPO_EDGE_THREADS
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#define EMU_SHARED static
#else
#include <setjmp.h>
#include <ucontext.h>
#define EMU_SHARED static thread_local
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emu {

constexpr unsigned GARBAGE = 0xffffffffu;  // NaN as a float: what nobody wrote must not look like a result
constexpr std::size_t RED_ZONE = 256;      // bytes behind the dynamic shared memory
constexpr int MAX_WORDS = 6;               // that a lane brings to a warp operation

// What waits together: the threads of a block, or the lanes of a warp.
#ifdef DAPO_EDGE_THREADS
struct Room {
    std::mutex mutex;
    std::condition_variable changed;
};
using Lock = std::unique_lock<std::mutex>;
inline Lock enter(Room& room) { return Lock(room.mutex); }
#else
struct Room {};
struct Lock {
    ~Lock() {}  // used, says the compiler
};
inline Lock enter(Room&) { return {}; }
#endif

struct Warp;

struct Thread {
    uint3 index;
    unsigned lane;
    Warp* warp;
    bool waiting, finished;
};

struct Warp {
    Room room;
    std::vector<Thread*> lanes;
    unsigned alive, arrived;     // one bit per lane
    unsigned masks[32];          // that the waiting lanes gave
    unsigned words[32][MAX_WORDS];
};

struct Block {
    dim3 grid, threads_shape;
    uint3 index;
    Room room;
    unsigned live, arrived;
    const char* site;  // of the __syncthreads at which they wait
    std::vector<Thread> threads;
    std::vector<std::unique_ptr<Warp>> warps;
    unsigned char* dynamic;
};

Block& block();
Thread& self();
void sleep(Room& room, Lock& lock);     // until another thread wakes this one
void wake(Room& room, Thread& thread);  // with the room's lock held

[[noreturn]] inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const uint3 at = block().index;
    std::fprintf(stderr, "cuda_host: block (%u, %u, %u): ", at.x, at.y, at.z);
    std::vfprintf(stderr, format, values);
    std::fprintf(stderr, "\n");
    va_end(values);
    std::abort();
}

[[noreturn]] inline void fail_stuck() {
    const Block& all = block();
    fail(
        "deadlock: of %u live threads %u wait at __syncthreads (%s), the others in warp operations", all.live,
        all.arrived, all.arrived ? all.site : "nowhere"
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers: whoever completes a group wakes it. A thread that has returned is no longer waited for.

inline void release_block(Block& all) {
    if (all.live == 0 || all.arrived < all.live) return;
    all.arrived = 0;
    for (Thread& thread : all.threads) {
        if (!thread.finished) wake(all.room, thread);
    }
}

inline void sync_block(const char* site) {
    Block& all = block();
    Lock lock = enter(all.room);
    if (all.arrived++ == 0) all.site = site;
    if (std::strcmp(all.site, site) != 0) fail("threads meet at different __syncthreads: %s and %s", all.site, site);
    self().waiting = true;
    release_block(all);
    sleep(all.room, lock);
}

inline void release_lanes(Warp& warp, unsigned mask) {
    const unsigned group = mask & warp.alive;
    if (group == 0 || (warp.arrived & group) != group) return;
    warp.arrived &= ~group;
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((group >> lane & 1) == 0) continue;
        if (warp.masks[lane] != mask) fail("lanes meet with masks %08x and %08x", mask, warp.masks[lane]);
        wake(warp.room, *warp.lanes[lane]);
    }
}

inline void sync_lanes(unsigned mask) {
    Thread& me = self();
    Warp& warp = *me.warp;
    if ((mask >> me.lane & 1) == 0) fail("lane %u takes part in a warp operation of mask %08x", me.lane, mask);
    Lock lock = enter(warp.room);
    warp.arrived |= 1u << me.lane;
    warp.masks[me.lane] = mask;
    me.waiting = true;
    release_lanes(warp, mask);
    sleep(warp.room, lock);
}

inline void leave(Thread& me) {
    {
        Warp& warp = *me.warp;
        const Lock lock = enter(warp.room);
        warp.alive &= ~(1u << me.lane);
        std::fill_n(warp.words[me.lane], MAX_WORDS, GARBAGE);
        for (unsigned lane = 0; lane < 32; lane++) {
            if (warp.arrived >> lane & 1) release_lanes(warp, warp.masks[lane]);
        }
    }
    const Lock lock = enter(block().room);
    me.finished = true;
    block().live--;
    release_block(block());
}

// A shuffle moves values but orders no memory: ThreadSanitizer must not take it for a barrier.
struct OrdersNothing {
#ifdef __SANITIZE_THREAD__
    OrdersNothing() {
        AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~OrdersNothing() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    }
#else
    OrdersNothing() {}
#endif
};

// Every lane of `mask` brings some words and gets those of all; garbage for lanes that aren't there.
template <int N> void gather(unsigned mask, const unsigned (&mine)[N], unsigned (&all)[32][N]) {
    static_assert(N <= MAX_WORDS, "MAX_WORDS is too small");
    const OrdersNothing quiet;
    Warp& warp = *self().warp;
    std::copy_n(mine, N, warp.words[self().lane]);
    sync_lanes(mask);
    for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) {
            std::copy_n(warp.words[lane], N, all[lane]);
        } else {
            std::fill_n(all[lane], N, GARBAGE);
        }
    }
    sync_lanes(mask);  // before anybody brings new words
}

// ---------------------------------------------------------------------------------------------------------------------
// Preparation

inline unsigned count(const dim3& shape) { return shape.x * shape.y * shape.z; }

inline uint3 position(unsigned number, const dim3& shape) {
    return {number % shape.x, number / shape.x % shape.y, number / shape.x / shape.y};
}

// 0 forward, 1 backward, anything else shuffled.
inline void arrange(std::vector<unsigned>& numbers, int order, std::mt19937& random) {
    if (order == 1) std::reverse(numbers.begin(), numbers.end());
    if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
}

inline std::vector<unsigned> first_numbers(unsigned count) {
    std::vector<unsigned> numbers(count);
    for (unsigned i = 0; i < count; i++) numbers[i] = i;
    return numbers;
}

inline void prepare(Block& all, unsigned number) {
    const unsigned threads = count(all.threads_shape);
    all.index = position(number, all.grid);
    all.live = threads;
    all.arrived = 0;
    all.threads.resize(threads);
    while (all.warps.size() < (threads + 31) / 32) all.warps.push_back(std::make_unique<Warp>());
    for (auto& warp : all.warps) {
        warp->lanes.clear();
        warp->alive = warp->arrived = 0;
        std::fill_n(warp->words[0], 32 * MAX_WORDS, GARBAGE);
    }
    for (unsigned i = 0; i < threads; i++) {
        Warp& warp = *all.warps[i / 32];
        all.threads[i] = {position(i, all.threads_shape), i % 32, &warp, false, false};
        warp.lanes.push_back(&all.threads[i]);
        warp.alive |= 1u << i % 32;
    }
}

// Fresh for every block. Exactly as long as asked for, so that AddressSanitizer sees the end; a red zone else.
class Dynamic {
  public:
    explicit Dynamic(std::size_t bytes) : bytes_(bytes) {
        block().dynamic = static_cast<unsigned char*>(std::malloc(bytes + ZONE));  // aligned to 16 bytes
        std::memset(block().dynamic, 0xff, bytes + ZONE);
    }
    ~Dynamic() {
        const unsigned char* end = block().dynamic + bytes_;
        if (std::any_of(end, end + ZONE, [](unsigned char byte) { return byte != 0xff; })) {
            fail("a write beyond the %zu bytes of dynamic shared memory", bytes_);
        }
        std::free(block().dynamic);
    }
    Dynamic(const Dynamic&) = delete;

  private:
#ifdef DAPO_EDGE_THREADS
    static constexpr std::size_t ZONE = 0;
#else
    static constexpr std::size_t ZONE = RED_ZONE;
#endif
    std::size_t bytes_;
};

void run_threads(const std::function<void()>& body, int order, std::mt19937& random);  // of one prepared block

inline void launch(dim3 grid, dim3 threads, std::size_t dynamic_bytes, int order, const std::function<void()>& body) {
    block().grid = grid;
    block().threads_shape = threads;
    if (count(threads) > 1024 || count(threads) == 0 || count(grid) == 0) fail("no GPU runs such a launch");
    std::mt19937 random(static_cast<unsigned>(order));
    std::vector<unsigned> blocks = first_numbers(count(grid));
    arrange(blocks, order, random);
    for (const unsigned number : blocks) {
        prepare(block(), number);
        const Dynamic memory(dynamic_bytes);
        run_threads(body, order, random);
    }
}

// A kernel and its arguments, as cuLaunchKernel takes them: the address of each value.
template <class... Parameters, std::size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
}

template <class... Parameters> void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

// How many parameters a kernel has; the size of each goes to `sizes`.
template <class... Parameters> int parameter_sizes(void (*)(Parameters...), std::size_t* sizes) {
    const std::size_t all[] = {sizeof(Parameters)..., 0};
    std::copy_n(all, sizeof...(Parameters), sizes);
    return sizeof...(Parameters);
}

}  // namespace emu

#ifdef DAPO_EDGE_THREADS
#include "cuda_host_threads.h"
#else
#include "cuda_host_fibers.h"
#endif
