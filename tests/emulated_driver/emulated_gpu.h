// State of the emulated GPU, and what several of libcuda.cpp's functions do with it.

#pragma once

#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

using Clock = std::chrono::steady_clock;
using Launcher = void (*)(const unsigned*, const unsigned*, size_t, int, void**);
using Sizes = int (*)(size_t*);

struct Work {
    std::function<CUresult()> run;
    CUevent event = nullptr;
};

struct CUctx_st {
    bool alive = true;
};

struct CUevent_st {
    int waiting = 0;  // recorded in a stream that hasn't come to it yet
    bool is_passed = false, is_internal = false;
    Clock::time_point time;
};

struct CUgraph_st {
    std::vector<Work> work;
};

struct CUgraphExec_st {
    std::vector<Work> work;
};

struct CUstream_st {
    enum { RUNNING, CAPTURING, BROKEN } state = RUNNING;
    std::vector<Work> queue, captured;
};

struct CUfunc_st {
    std::string name;
    Launcher launch;
    Sizes sizes;
};

struct CUmod_st {
    std::vector<std::unique_ptr<CUfunc_st>> functions;
};

struct Block {
    size_t bytes;
    bool is_pinned;
};

static std::mutex lock;
static bool is_initialised, breaks_stack;
static int is_integrated, retained;
static size_t memory_left = size_t(1) << 30;
static CUresult lost = CUDA_SUCCESS;  // the sticky error
static CUcontext primary;
static std::map<uintptr_t, Block> blocks;
static std::set<void*> streams, events, graphs, executables, modules;
static std::map<std::string, CUresult> failing;  // kernels that are to fail
static thread_local std::vector<CUcontext> stack;
static thread_local CUstream capturing;

static CUresult complain(CUresult code, const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::fputs("emulated driver: ", stderr);
    std::vfprintf(stderr, format, values);
    std::fputc('\n', stderr);
    va_end(values);
    return code;
}

// What every call that works in a context begins with.
static CUresult check() {
    if (!is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (!stack.back()->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return lost;
}

static CUresult check_outside_capture() {
    if (CUresult code = check()) return code;
    if (!capturing) return CUDA_SUCCESS;
    capturing->state = CUstream_st::BROKEN;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

static bool holds(uintptr_t address, size_t bytes, bool must_be_pinned) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = blocks.upper_bound(address);
    if (next == blocks.begin()) return false;
    auto& [start, block] = *std::prev(next);
    return address + bytes <= start + block.bytes && (block.is_pinned || !must_be_pinned);
}

static CUresult run(std::vector<Work>& queue) {
    std::vector<Work> now;
    now.swap(queue);
    for (Work& work : now) {
        if (lost == CUDA_SUCCESS) lost = work.run();
        if (work.event) --work.event->waiting;
    }
    return lost;
}

static CUresult run_everything() {
    for (void* stream : std::set<void*>(streams)) run(static_cast<CUstream>(stream)->queue);
    return lost;
}

static CUresult submit(CUstream stream, Work work) {
    if (CUresult code = check()) return code;
    if (!streams.count(stream)) return complain(CUDA_ERROR_INVALID_HANDLE, "work for stream %p", (void*)stream);
    if (stream->state == CUstream_st::BROKEN) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    bool now = stream->state == CUstream_st::RUNNING;
    if (now && work.event) ++work.event->waiting;
    (now ? stream->queue : stream->captured).push_back(std::move(work));
    return CUDA_SUCCESS;
}

static CUresult allocate(uintptr_t* address, size_t bytes, bool is_pinned) {
    if (CUresult code = check_outside_capture()) return code;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > memory_left) return CUDA_ERROR_OUT_OF_MEMORY;
    void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(memory, 0xCD, bytes);
    std::lock_guard<std::mutex> guard(lock);
    memory_left -= bytes;
    blocks[*address = reinterpret_cast<uintptr_t>(memory)] = {bytes, is_pinned};
    return CUDA_SUCCESS;
}

static CUresult release(uintptr_t address, bool is_pinned) {
    if (CUresult code = check_outside_capture()) return code;
    run_everything();  // as the real one does: freeing waits
    std::lock_guard<std::mutex> guard(lock);
    auto block = blocks.find(address);
    if (block == blocks.end() || block->second.is_pinned != is_pinned) return CUDA_ERROR_INVALID_VALUE;
    memory_left += block->second.bytes;
    blocks.erase(block);
    std::free(reinterpret_cast<void*>(address));
    return CUDA_SUCCESS;
}

static CUresult copy(CUstream stream, uintptr_t target, uintptr_t source, size_t bytes, bool to_device) {
    if (!holds(to_device ? source : target, bytes, true))
        return complain(CUDA_ERROR_INVALID_VALUE, "an asynchronous copy of %zu bytes of unpinned memory", bytes);
    return submit(stream, {[=] {
        if (!holds(target, bytes, false) || !holds(source, bytes, false)) return CUDA_ERROR_ILLEGAL_ADDRESS;
        std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
        return CUDA_SUCCESS;
    }});
}

template <typename Handle>
static CUresult drop(std::set<void*>& known, Handle handle, const char* what) {
    if (!known.erase(handle)) return complain(CUDA_ERROR_INVALID_HANDLE, "%s is destroyed that isn't there", what);
    delete handle;
    return CUDA_SUCCESS;
}

static void destroy_primary() {
    if (lost == CUDA_SUCCESS) {
        const size_t left[] = {streams.size(), events.size(), graphs.size(), executables.size(), modules.size()};
        const char* names[] = {"streams", "events", "graphs", "executable graphs", "modules"};
        for (int kind = 0; kind < 5; ++kind)
            if (left[kind]) complain(CUDA_SUCCESS, "the context is destroyed with %zu %s", left[kind], names[kind]);
        if (!blocks.empty()) complain(CUDA_SUCCESS, "the context is destroyed with %zu allocations", blocks.size());
    }
    for (auto* known : {&streams, &events, &graphs, &executables, &modules}) known->clear();
    for (auto& [address, block] : blocks) memory_left += block.bytes;
    blocks.clear();
    primary->alive = false;  // never deleted: a handle that somebody kept must be found out
    lost = CUDA_SUCCESS;
}

__attribute__((destructor)) static void at_the_end() {
    if (retained) complain(CUDA_SUCCESS, "the process ends with the primary context retained %d times", retained);
}
