"""A GPU for machines without one: pycuda and the driver's library as Python objects, kernels compiled by g++.

Its memory is host memory. Stricter than a real GPU: work waits in the stream until somebody synchronises, every copy is
checked against the live allocations, and what may not happen during a capture (allocating, waiting) or without a
current context raises.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from driver_fakes import H200, FakeLibcuda, use
from host_kernels import shipped_module

from dapo_edge.kernels.compile import Cubin, source_digest

CUBIN = b"\x7fELF of a GPU that isn't there"
STREAM_HANDLE = 0x7F00_0000_1234  # does not fit into a C int: who forgets a c_void_p is found out


class Stacks(threading.local):
    """What one thread has pushed: pycuda keeps a stack of its own, and of it only the top in the driver's."""

    def __init__(self) -> None:
        self.depth = 0  # the driver's
        self.contexts: list[Any] = []  # pycuda's

    def top(self) -> Any:
        while self.contexts and not self.contexts[-1].is_valid:
            self.contexts.pop()
        return self.contexts[-1] if self.contexts else None


class FakeGpu(FakeLibcuda):
    """State of the GPU, and the driver functions that dapo-edge calls by ctypes."""

    def __init__(self, memory: int = 1 << 30, version: int = 12060, **properties: Any) -> None:
        super().__init__({**H200, **properties}, version=version)
        self.memory_left = memory
        self.live: dict[int, np.ndarray] = {}  # address -> bytes, of the device and pinned
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.objects: dict[int, Any] = {}  # graphs, events, streams, modules
        self.handles = itertools.count(0x5500_0000_0000)
        self.log: list[str] = []  # what ran, by name
        self.broken: str | None = None  # the message of a sticky error
        self.api = _pycuda_driver(self)
        self.current = Stacks()

    def submit(self, name: str, work: Callable[[], None]) -> None:
        self.check_context()

        def run() -> None:
            self.log.append(name)
            work()

        (self.queue if self.capturing is None else self.capturing).append(run)

    def check_context(self) -> None:
        if not self.current.depth:
            raise self.api.LogicError("invalid device context")
        if self.broken:
            raise self.api.LaunchError(self.broken)

    def not_in_capture(self, what: str) -> None:
        self.check_context()
        if self.capturing is not None:
            raise self.api.LogicError(f"{what} failed: operation not permitted when stream is capturing")

    def synchronise(self) -> None:
        self.not_in_capture("cuStreamSynchronize")
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        for start, content in self.live.items():
            if start <= address and address + nbytes <= start + content.nbytes:
                return content[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not in one live allocation")

    def new(self, content: Any) -> int:
        handle = next(self.handles)
        self.objects[handle] = content
        return handle

    def _cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current.depth -= 1
        return 0 if self.current.depth >= 0 else 201

    def _cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> None:
        assert (stream.value, mode) == (STREAM_HANDLE, 1)
        assert not self.queue, "the stream must be idle before a capture"
        self.capturing = []

    def _cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> None:
        assert stream.value == STREAM_HANDLE
        graph._obj.value = self.new(self.capturing)
        self.capturing = None

    def _cuGraphInstantiateWithFlags(self, executable: Any, graph: ctypes.c_void_p, flags: Any) -> None:
        executable._obj.value = self.new(list(self.objects[graph.value]))

    def _cuGraphDestroy(self, graph: ctypes.c_void_p) -> None:
        del self.objects[graph.value]

    _cuGraphExecDestroy = _cuGraphDestroy

    def _cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        work = self.objects[executable.value]
        self.submit("graph", lambda: [run() for run in work] and None)

    def _cuEventCreate(self, event: Any, flags: int) -> None:
        event._obj.value = self.new(SimpleNamespace(time=None))

    def _cuEventRecordWithFlags(self, event: ctypes.c_void_p, stream: ctypes.c_void_p, flags: int) -> None:
        assert flags == (1 if self.capturing is not None else 0), "timing in a graph needs external events"
        record = self.objects[event.value]
        self.submit("event", lambda: setattr(record, "time", len(self.log)))

    def _cuEventElapsedTime(self, elapsed: Any, start: ctypes.c_void_p, end: ctypes.c_void_p) -> int:
        times = [self.objects[event.value].time for event in (start, end)]
        if None in times:
            return 600
        elapsed._obj.value = float(times[1] - times[0])
        return 0

    def _cuEventDestroy_v2(self, event: ctypes.c_void_p) -> None:
        del self.objects[event.value]


def compile_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels would be compiled for the GPU, g++ has them ready: a cubin in name only."""
    cubin = Cubin(CUBIN, "sm_90", "nvcc 12.6", source_digest(), {}, ())
    for module in ("tensorrt", "tensorrt_compile"):
        monkeypatch.setattr(f"dapo_edge.backends.{module}.compile_kernels", lambda *_, **__: cubin)


def install(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, tensorrt_major: int = 10) -> ModuleType:
    """Let dapo-edge find this GPU with pycuda and TensorRT; returns the fake tensorrt, to be told what goes wrong."""
    use(monkeypatch, gpu)
    package = ModuleType("pycuda")
    package.__spec__ = ModuleSpec("pycuda", None)
    package.driver = gpu.api  # type: ignore[attr-defined]
    tensorrt = fake_tensorrt.make(tensorrt_major)
    for name, module in (("pycuda", package), ("pycuda.driver", gpu.api), ("tensorrt", tensorrt)):
        monkeypatch.setitem(sys.modules, name, module)

    def on_enqueue(stream: int, work: Callable[[], None]) -> None:
        assert stream == STREAM_HANDLE
        gpu.submit("engine", work)

    monkeypatch.setattr(fake_tensorrt, "on_enqueue", on_enqueue)
    return tensorrt


def _pycuda_driver(gpu: FakeGpu) -> Any:
    api: Any = ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    class Context:
        def __init__(self) -> None:
            self.is_valid, self._thread = True, threading.get_ident()

        def push(self) -> None:
            gpu.current.depth += 0 if gpu.current.contexts else 1
            gpu.current.contexts.append(self)

        @staticmethod
        def synchronize() -> None:
            gpu.not_in_capture("cuCtxSynchronize")

        @staticmethod
        def pop() -> None:
            stacks = gpu.current
            stacks.depth -= 1 if stacks.contexts else 0
            if not stacks.top():
                raise api.LogicError("context::pop failed: invalid device context - cannot pop non-current context")
            stacks.contexts.pop()
            stacks.depth += 1 if stacks.top() else 0

        @staticmethod
        def get_current() -> Any:
            return gpu.current.top()

        def detach(self) -> None:
            if not self.is_valid:
                raise api.LogicError("context::detach failed: invalid device context")
            was_current = gpu.current.top() is self
            assert was_current or self._thread == threading.get_ident(), "another thread can't release it like that"
            self.is_valid = False
            gpu.log.append("detached")
            # The driver's stack keeps a primary context; what stood below comes on top of it.
            if not was_current or gpu.current.top():
                gpu.current.depth += 1

    class Device:
        def __init__(self, index: int) -> None:
            assert index == 0

        def retain_primary_context(self) -> Context:
            return Context()

    class Owned:
        """What a destructor gives back, silently if its context is closed; else that must be current."""

        def __init__(self, handle: int, content: str) -> None:
            gpu.check_context()
            self._context, self._place = gpu.current.top(), handle
            gpu.objects[handle] = content

        def __del__(self) -> None:
            if self._context.is_valid:
                assert gpu.current.top() is self._context, "destroyed where its context isn't current"
            gpu.objects.pop(self._place, None)

    class Stream(Owned):
        handle = STREAM_HANDLE

        def __init__(self, flags: int) -> None:
            assert flags == 1, "the stream must not wait for the default stream"
            super().__init__(STREAM_HANDLE, "stream")

        def synchronize(self) -> None:
            gpu.synchronise()

    class DeviceAllocation:
        def __init__(self, nbytes: int) -> None:
            gpu.not_in_capture("cuMemAlloc")
            if nbytes > gpu.memory_left:
                raise api.MemoryError("cuMemAlloc failed: out of memory")
            gpu.memory_left -= nbytes
            self._content = np.full(nbytes, 0xCD, np.uint8)
            self._address = self._content.ctypes.data
            gpu.live[self._address] = self._content

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            gpu.not_in_capture("cuMemFree")
            del gpu.live[self._address]
            gpu.memory_left += self._content.nbytes

    class PagelockedHostAllocation:
        def __init__(self, array: np.ndarray) -> None:
            self._address = array.ctypes.data
            gpu.live[self._address] = array

        def get_device_pointer(self) -> int:
            return self._address

        def free(self) -> None:
            gpu.not_in_capture("cuMemFreeHost")
            del gpu.live[self._address]

    class Pinned(np.ndarray):
        @property
        def base(self) -> Any:
            return self.owner

    def pagelocked_empty(nbytes: int, dtype: Any, mem_flags: int) -> np.ndarray:
        gpu.not_in_capture("cuMemHostAlloc")
        assert (dtype, mem_flags) == (np.uint8, 2)
        array = np.full(nbytes, 0xCD, np.uint8).view(Pinned)
        array.owner = PagelockedHostAllocation(np.asarray(array))  # type: ignore[attr-defined]
        return array

    def copy_in(name: str) -> Callable[..., None]:
        def copy(target: int, source: np.ndarray, stream: Any = None) -> None:
            gpu.bytes_at(target, source.nbytes)
            if stream is None:
                gpu.not_in_capture(name)
                gpu.bytes_at(target, source.nbytes)[...] = source
                return
            gpu.bytes_at(source.ctypes.data, source.nbytes)  # only pinned memory is copied asynchronously
            gpu.submit(name, lambda: gpu.bytes_at(target, source.nbytes).__setitem__(..., source))

        return copy

    def memcpy_dtoh_async(target: np.ndarray, source: int, stream: Any) -> None:
        gpu.bytes_at(target.ctypes.data, target.nbytes)
        gpu.submit("download", lambda: target.__setitem__(..., gpu.bytes_at(source, target.nbytes)))

    def memset_d32_async(target: int, value: int, count: int, stream: Any) -> None:
        gpu.submit("clear", lambda: gpu.bytes_at(target, 4 * count).view(np.uint32).__setitem__(..., value))

    class Function:
        def __init__(self, module: Any, name: str) -> None:
            self._module, self._name = module, name  # a function keeps its module alive

        def prepare(self, formats: list[str]) -> None:
            self._size = int(formats[0].rstrip("s"))

        def prepared_async_call(self, grid: Any, block: Any, stream: Any, job: bytes, shared_size: int) -> None:
            assert isinstance(block, tuple) and isinstance(stream, Stream)
            assert {type(number) for number in (*grid, *block, shared_size)} == {int}, "pycuda takes no NumPy integers"
            assert len(job) == self._size and shared_size <= 48 << 10
            argument = np.frombuffer(job, f"V{len(job)}")[0]
            gpu.submit(self._name, lambda: shipped_module().launch(self._name, grid, block, shared_size, [argument]))

    class Module(Owned):
        def get_function(self, name: str) -> Function:
            return Function(self, name)

    def module_from_buffer(content: bytes) -> Module:
        gpu.not_in_capture("cuModuleLoadData")
        if not content.startswith(b"\x7fELF"):
            raise api.LogicError("cuModuleLoadDataEx failed: device kernel image is invalid - ")
        return Module(next(gpu.handles), "module")

    api.Error = Error
    for name in ("LogicError", "MemoryError", "LaunchError", "RuntimeError"):
        setattr(api, name, type(name, (Error,), {}))
    api.init = lambda: None
    api.mem_get_info = lambda: (gpu.memory_left, 1 << 30)
    api.Context, api.Device, api.Stream, api.mem_alloc = Context, Device, Stream, DeviceAllocation
    api.host_alloc_flags = SimpleNamespace(DEVICEMAP=2)
    api.pagelocked_empty, api.module_from_buffer = pagelocked_empty, module_from_buffer
    api.memcpy_htod, api.memcpy_htod_async = copy_in("copy"), copy_in("upload")
    api.memcpy_dtoh_async, api.memset_d32_async = memcpy_dtoh_async, memset_d32_async
    return api
