// A CUDA driver for machines without a GPU: real enough that an unchanged pycuda works on it. Device memory is host
// memory, kernels are the shipped sources compiled by g++ (their library is named in DAPO_EDGE_HOST_KERNELS).
//
// Stricter than a GPU: a stream's work waits until somebody synchronises, copies must lie inside one live allocation,
// asynchronous ones need pinned memory, and what the context still holds when it goes is named on stderr. Every
// signature is checked against the machine's cuda.h. The other functions that pycuda links to are made by
// driver_library.py: they say their name on stderr and return CUDA_ERROR_NOT_SUPPORTED.

#include <dlfcn.h>

#include "emulated_gpu.h"

#undef cuEventElapsedTime  // since CUDA 13 it stands for cuEventElapsedTime_v2; ctypes asks for the plain name

extern "C" {

// For tests: what goes wrong, and what is there.
void emu_fail_kernel(const char* name, int code) { failing[name] = CUresult(code); }
void emu_lose(int code) { lost = CUresult(code); }
void emu_memory_left(size_t bytes) { memory_left = bytes; }
void emu_integrated(int yes) { is_integrated = yes; }
void emu_break_stack(int yes) { breaks_stack = yes; }
int emu_stack_depth() { return int(stack.size()); }
int emu_objects() {
    return int(streams.size() + events.size() + graphs.size() + executables.size() + modules.size() + blocks.size());
}
CUresult emu_unsupported(const char* name) { return complain(CUDA_ERROR_NOT_SUPPORTED, "%s is not emulated", name); }

CUresult cuInit(unsigned int flags) {
    is_initialised = flags == 0;
    return is_initialised ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    static const std::map<int, const char*> texts = {
        {0, "no error"},
        {1, "invalid argument"},
        {2, "out of memory"},
        {3, "initialization error"},
        {101, "invalid device ordinal"},
        {200, "device kernel image is invalid"},
        {201, "invalid device context"},
        {400, "invalid resource handle"},
        {500, "named symbol not found"},
        {600, "device not ready"},
        {700, "an illegal memory access was encountered"},
        {709, "context is destroyed"},
        {719, "unspecified launch failure"},
        {801, "operation not supported"},
        {900, "operation not permitted when stream is capturing"},
        {901, "operation failed due to a previous error during capture"},
    };
    auto found = texts.find(error);
    *text = found == texts.end() ? nullptr : found->second;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return is_initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
    *device = index;
    return index == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    std::snprintf(name, size, "Emulated GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) {
    *bytes = size_t(1) << 30;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    static const std::map<int, int> values = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 16},
    };
    auto found = values.find(attribute);
    *value = found != values.end() ? found->second : attribute == CU_DEVICE_ATTRIBUTE_INTEGRATED ? is_integrated : 0;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    if (!is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (retained++ == 0) primary = new CUctx_st;
    *context = primary;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    if (retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--retained == 0) destroy_primary();  // takes it off nobody's stack
    return CUDA_SUCCESS;
}

// A primary context can only be released, not detached.
CUresult cuCtxDetach(CUcontext) { return CUDA_ERROR_INVALID_CONTEXT; }

CUresult cuCtxPushCurrent(CUcontext context) {
    if (breaks_stack && lost != CUDA_SUCCESS) return lost;
    if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
    if (breaks_stack && lost != CUDA_SUCCESS) return lost;
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* left, size_t* total) {
    *left = memory_left;
    *total = size_t(1) << 30;
    return check();
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    uintptr_t memory = 0;
    CUresult code = allocate(&memory, bytes, false);
    *address = memory;
    return code;
}

CUresult cuMemFree(CUdeviceptr address) { return release(address, false); }

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
    if (flags & ~(CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)) return CUDA_ERROR_INVALID_VALUE;
    return allocate(reinterpret_cast<uintptr_t*>(address), bytes, true);
}

CUresult cuMemFreeHost(void* address) { return release(reinterpret_cast<uintptr_t>(address), true); }

CUresult cuMemHostGetDevicePointer(CUdeviceptr* address, void* host, unsigned int) {
    *address = reinterpret_cast<uintptr_t>(host);
    if (CUresult code = check()) return code;
    return holds(*address, 1, true) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyHtoD(CUdeviceptr target, const void* source, size_t bytes) {
    if (CUresult code = check_outside_capture()) return code;
    if (!holds(target, bytes, false)) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(reinterpret_cast<void*>(target), source, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    return copy(stream, target, reinterpret_cast<uintptr_t>(source), bytes, true);
}

CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
    return copy(stream, reinterpret_cast<uintptr_t>(target), source, bytes, false);
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned int value, size_t count, CUstream stream) {
    return submit(stream, {[=] {
        if (!holds(target, 4 * count, false)) return CUDA_ERROR_ILLEGAL_ADDRESS;
        std::fill_n(reinterpret_cast<unsigned*>(target), count, value);
        return CUDA_SUCCESS;
    }});
}

CUresult cuModuleLoadDataEx(
    CUmodule* module, const void* image, unsigned int count, CUjit_option* options, void** values) {
    for (unsigned index = 0; index < count; ++index)
        if (options[index] == CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES || options[index] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
            values[index] = nullptr;  // bytes written
    if (CUresult code = check_outside_capture()) return code;
    if (std::memcmp(image, "\x7f" "ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    modules.insert(*module = new CUmod_st);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    CUresult code = check_outside_capture();
    return code ? code : drop(modules, module, "a module");
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (CUresult code = check()) return code;
    static void* library = dlopen(std::getenv("DAPO_EDGE_HOST_KERNELS"), RTLD_NOW);
    if (!library) return complain(CUDA_ERROR_NOT_SUPPORTED, "no kernels: %s", dlerror());
    auto entry = [name](const char* prefix) { return dlsym(library, (std::string(prefix) + name).c_str()); };
    if (!entry("emu_launch_")) return CUDA_ERROR_NOT_FOUND;
    auto launch = reinterpret_cast<Launcher>(entry("emu_launch_"));
    auto sizes = reinterpret_cast<Sizes>(entry("emu_sizes_"));
    module->functions.emplace_back(new CUfunc_st{name, launch, sizes});
    *function = module->functions.back().get();
    return CUDA_SUCCESS;
}

// pycuda calls it before every launch, in captures, too.
CUresult cuFuncSetBlockShape(CUfunction, int x, int y, int z) {
    if (CUresult code = check()) return code;
    return std::min({x, y, z}) > 0 && x * y * z <= 1024 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernel(
    CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
    unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, CUstream stream, void** parameters,
    void** extra) {
    size_t sizes[64], packed = 0;
    if (function->sizes(sizes) != 1) return complain(CUDA_ERROR_NOT_SUPPORTED, "only kernels with one parameter");
    const void* source = parameters ? parameters[0] : nullptr;
    for (; extra && *extra != CU_LAUNCH_PARAM_END; extra += 2) {
        if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) source = extra[1];
        if (*extra == CU_LAUNCH_PARAM_BUFFER_SIZE) packed = *static_cast<size_t*>(extra[1]);
    }
    if (!source || (!parameters && packed != sizes[0]))
        return complain(
            CUDA_ERROR_INVALID_VALUE, "%s takes %zu bytes, not %zu", function->name.c_str(), sizes[0], packed);
    uint64_t threads = uint64_t(block_x) * block_y * block_z, groups = uint64_t(grid_x) * grid_y * grid_z;
    if (threads == 0 || threads > 1024 || groups == 0 || shared_bytes > 48 << 10) return CUDA_ERROR_INVALID_VALUE;
    std::string values(static_cast<const char*>(source), sizes[0]);
    return submit(stream, {[=] {
        auto fails = failing.find(function->name);
        if (fails != failing.end()) return fails->second;
        alignas(16) char content[4096];
        std::memcpy(content, values.data(), values.size());
        const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
        void* arguments[] = {content};
        function->launch(grid, block, shared_bytes, 0, arguments);
        return CUDA_SUCCESS;
    }});
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    return submit(stream, {[=] {
        function(data);
        return CUDA_SUCCESS;
    }});
}

CUresult cuStreamCreate(CUstream* stream, unsigned int) {
    if (CUresult code = check()) return code;
    streams.insert(*stream = new CUstream_st);
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
    if (CUresult code = check()) return code;
    run_everything();
    return drop(streams, stream, "a stream");
}

// Copies without a stream are done when they return, so there is nothing to wait for.
CUresult cuCtxSynchronize() { return check(); }

CUresult cuStreamSynchronize(CUstream stream) {
    if (CUresult code = check()) return code;
    if (stream->state == CUstream_st::RUNNING) return run(stream->queue);
    stream->state = CUstream_st::BROKEN;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    if (CUresult code = check()) return code;
    if (mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL || capturing) return CUDA_ERROR_INVALID_VALUE;
    stream->state = CUstream_st::CAPTURING;
    capturing = stream;
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    *graph = nullptr;
    if (CUresult code = check()) return code;
    if (capturing != stream) return CUDA_ERROR_ILLEGAL_STATE;
    capturing = nullptr;
    std::vector<Work> work;
    work.swap(stream->captured);
    bool is_whole = stream->state == CUstream_st::CAPTURING;
    stream->state = CUstream_st::RUNNING;
    if (!is_whole) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    graphs.insert(*graph = new CUgraph_st{work});
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags) {
    if (CUresult code = check()) return code;
    if (flags || !graphs.count(graph)) return CUDA_ERROR_INVALID_VALUE;
    executables.insert(*executable = new CUgraphExec_st{graph->work});
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    if (!executables.count(executable)) return complain(CUDA_ERROR_INVALID_HANDLE, "a graph that isn't there");
    for (const Work& work : executable->work)
        if (CUresult code = submit(stream, work)) return code;
    return check();
}

CUresult cuGraphDestroy(CUgraph graph) { return drop(graphs, graph, "a graph"); }

CUresult cuGraphExecDestroy(CUgraphExec executable) { return drop(executables, executable, "an executable graph"); }

CUresult cuEventCreate(CUevent* event, unsigned int) {
    if (CUresult code = check()) return code;
    events.insert(*event = new CUevent_st);
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
    CUresult code = check();
    return code ? code : drop(events, event, "an event");
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned int flags) {
    if (CUresult code = check()) return code;
    if (!events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    bool is_captured = stream->state != CUstream_st::RUNNING, is_external = flags == CU_EVENT_RECORD_EXTERNAL;
    if (is_external && !is_captured) return CUDA_ERROR_INVALID_VALUE;
    event->is_internal = is_captured && !is_external;
    if (event->is_internal) return submit(stream, {[] { return CUDA_SUCCESS; }});
    return submit(stream, {[event] {
        event->time = Clock::now();
        event->is_passed = true;
        return CUDA_SUCCESS;
    }, event});
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    if (CUresult code = check()) return code;
    for (CUevent event : {start, end}) {
        if (event->is_internal) return CUDA_ERROR_INVALID_VALUE;
        if (event->waiting) return CUDA_ERROR_NOT_READY;
        if (!event->is_passed) return CUDA_ERROR_INVALID_HANDLE;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return CUDA_SUCCESS;
}

}  // extern "C"
