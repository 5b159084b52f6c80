"""The GPU as this project uses it: primary context, one stream, buffers, kernels, events, captured graphs.

pycuda owns context, stream, memory and modules. What it lacks (graphs, events that are timed inside one) goes to the
driver's library directly, with the driver's own message in every error. Nothing is touched before `Cuda.open`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge import device
from dapo_edge.device import Gpu
from dapo_edge.errors import BackendError, DependencyMissing
from dapo_edge.kernels.launch import Launch

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: never waits for the default stream
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_EXTERNAL = 1  # CU_EVENT_RECORD_EXTERNAL: inside a graph the event is recorded at each replay, not once at capture

OLDEST_DRIVER = (11, 4)  # has cuGraphInstantiateWithFlags

_LOST = "The GPU's context may be lost: start the process again; if it comes back, look at dmesg and the GPU's health"


@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """Memory of the GPU. Lives as long as its `Cuda`, or until `Cuda.free`."""

    address: int
    nbytes: int
    allocation: Any


@dataclass(frozen=True, eq=False)
class PinnedBuffer:
    """Page-locked memory of the host, which the GPU copies from and to without the CPU."""

    array: NDArray[np.uint8]  # [nbytes]
    device_address: int  # the same memory as the GPU sees it

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.array.nbytes


class Cuda:
    """One GPU, opened for work. A context manager; used by one thread at a time, whichever that is.

    All but `open` and `close` is done inside `with cuda.active()`, where the driver's errors are `BackendError`.
    """

    def __init__(self, gpu: Gpu, api: Any, driver: Any, context: Any) -> None:
        self.gpu = gpu
        self._api = api  # pycuda.driver
        self._driver = driver  # libcuda
        self._context = context
        self._end = BackendError("this GPU is closed", "Open it again")
        self._allocations: list[DeviceBuffer] = []
        self._pinned: list[PinnedBuffer] = []
        self._events: list[Event] = []
        self._kernels: list[Kernels] = []
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._stream: Any = None
        with self.active():
            self._stream = api.Stream(_NON_BLOCKING)
        self.stream_handle = int(self._stream.handle)

    @property
    def sm(self) -> str:
        """The GPU's architecture as compilers name it: "sm_87"."""
        return "sm_" + self.gpu.sm.replace(".", "")

    @property
    def driver_cuda(self) -> tuple[int, int]:
        """The CUDA version that the driver brings."""
        major, minor = self.gpu.driver_cuda.split(".")
        return int(major), int(minor)

    @classmethod
    def open(cls) -> Self:
        """Open the first GPU. Raises `BackendError` without a driver or GPU, `DependencyMissing` without pycuda."""
        found = device.gpus()
        if not found:
            problem = device.driver_problem()
            raise BackendError(
                f"no GPU can be used: {problem}" if problem else "there is no CUDA driver on this machine, or no GPU",
                "A CPU runs packages without it (--backend openvino); see what is missing: dapo-edge doctor",
            )
        if tuple(int(part) for part in found[0].driver_cuda.split(".")) < OLDEST_DRIVER:
            raise BackendError(
                f"the CUDA driver is of CUDA {found[0].driver_cuda}, which is too old for captured graphs",
                f"Update the driver to one of CUDA {OLDEST_DRIVER[0]}.{OLDEST_DRIVER[1]} or newer",
            )
        try:
            api = importlib.import_module("pycuda.driver")
        except ImportError as error:
            raise DependencyMissing(
                f"the Python package 'pycuda' can't be imported ({error})",
                "Install it with this machine's CUDA toolkit on the PATH: pip install 'dapo-edge[gpu]'",
            ) from error
        with _explained(api, "the GPU can't be opened", "End other programs that use it, or look at dmesg"):
            api.init()
            context = api.Device(0).retain_primary_context()  # the one that TensorRT works in
        return cls(found[0], api, device.load_driver(), context)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU's context current on this thread for a while. Raises `BackendError` once it is closed."""
        context = self._context
        if context is None:
            raise BackendError(self._end.cause, self._end.remedy)
        with _explained(self._api, "the GPU failed"):
            context.push()
            try:
                yield
            except BaseException:
                with contextlib.suppress(self._api.Error):
                    self._leave(context)
                raise
            self._leave(context)

    def allocate(self, nbytes: int, purpose: str) -> DeviceBuffer:
        """Device memory. Raises `BackendError` that says how much was asked for, what for, and how much is free."""
        try:
            allocation = self._api.mem_alloc(max(nbytes, 16))
        except self._api.MemoryError as error:
            free, total = self._api.mem_get_info()
            raise BackendError(
                f"the GPU has no {nbytes / 2**20:.1f} MB left for {purpose} "
                f"({free / 2**20:.1f} of {total / 2**20:.0f} MB are free)",
                "Use a smaller batch, map or image size, or end other programs that use the GPU",
            ) from error
        buffer = DeviceBuffer(int(allocation), nbytes, allocation)
        self._allocations.append(buffer)
        return buffer

    def constant(self, array: NDArray[np.generic], purpose: str) -> DeviceBuffer:
        """Device memory that holds a copy of `array`."""
        content = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        buffer = self.allocate(content.nbytes, purpose)
        # Through our own stream, which waits for no other; waiting for the whole context would break others' captures.
        staging = self.pinned(content.nbytes)
        staging.array[: content.nbytes] = content
        self.upload(buffer.address, staging.array[: content.nbytes])
        self.synchronise()
        self.unpin(staging)
        return buffer

    def free(self, buffer: DeviceBuffer) -> None:
        """Give device memory back before the GPU is closed."""
        self._allocations.remove(buffer)
        buffer.allocation.free()

    def pinned(self, nbytes: int) -> PinnedBuffer:
        """Page-locked host memory, zeroed, that the GPU can also reach itself."""
        flags = self._api.host_alloc_flags.DEVICEMAP
        try:
            array = self._api.pagelocked_empty(max(nbytes, 16), np.uint8, mem_flags=flags)
        except self._api.MemoryError as error:
            raise BackendError(
                f"the driver gives no {nbytes / 2**20:.1f} MB of page-locked memory ({error})",
                "Use a smaller batch, map or image size, or end other programs",
            ) from error
        address = int(array.base.get_device_pointer())
        array[:] = 0
        buffer = PinnedBuffer(array, address)
        self._pinned.append(buffer)
        return buffer

    def unpin(self, buffer: PinnedBuffer) -> None:
        """Give page-locked memory back before the GPU is closed; no view of it may live on."""
        self._pinned.remove(buffer)
        buffer.array.base.free()  # type: ignore[union-attr]

    def upload(self, target: int, source: NDArray[np.uint8]) -> None:
        """Copy pinned bytes to the device address `target`, in stream order."""
        self._api.memcpy_htod_async(target, source, self._stream)

    def download(self, target: NDArray[np.uint8], source: int) -> None:
        """Copy from the device address `source` to pinned bytes, in stream order."""
        self._api.memcpy_dtoh_async(target, source, self._stream)

    def clear(self, buffer: DeviceBuffer, value: int = 0) -> None:
        """Set a buffer to zero, or to another 32-bit value, in stream order; bytes beyond a multiple of 4 stay."""
        self._api.memset_d32_async(buffer.address, value, buffer.nbytes // 4, self._stream)

    def load_kernels(self, cubin: bytes) -> Kernels:
        """Load compiled kernels, to be kept until the GPU is closed. Raises `BackendError` when the driver refuses."""
        remedy = "Compile the package again on this device (dapo-edge compile PKG), or start the process again"
        with _explained(self._api, "the driver refuses the compiled kernels", remedy):
            kernels = Kernels(self._api.module_from_buffer(cubin), self._stream)
        self._kernels.append(kernels)
        return kernels

    def event(self) -> Event:
        """An event for timing."""
        event = Event(self._driver, self.stream_handle)
        self._events.append(event)
        return event

    def drop_event(self, event: Event) -> None:
        """Give an event back before the GPU is closed."""
        self._events.remove(event)
        event.close()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts into the stream, without running it. Raises `BackendError` when that is refused."""
        driver, handle = self._driver, ctypes.c_void_p(self.stream_handle)
        graph = ctypes.c_void_p()
        _check(driver, driver.cuStreamBeginCapture_v2(handle, _THREAD_LOCAL), "begin a graph")
        try:
            with _explained(self._api, "a call was refused while a graph was captured"):
                work()
        except BaseException:
            # The stream must leave the capture, whatever it made; the first error is the one to be told.
            driver.cuStreamEndCapture(handle, ctypes.byref(graph))
            if graph:
                driver.cuGraphDestroy(graph)
            raise
        _check(driver, driver.cuStreamEndCapture(handle, ctypes.byref(graph)), "end a graph")
        executable = ctypes.c_void_p()
        try:
            code = driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            _check(driver, code, "make a graph ready")
        finally:
            driver.cuGraphDestroy(graph)
        captured = Graph(driver, executable, handle)
        self._graphs.add(captured)
        return captured

    def synchronise(self) -> None:
        """Wait until the stream is empty. Errors of everything before surface here."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free everything, on whichever thread. Never raises: after a lost context there is nothing left to free."""
        context, self._context = self._context, None
        if context is None:
            return
        with contextlib.suppress(Exception):
            context.push()
            with contextlib.suppress(Exception):
                self._give_back()
            # A context that is current can be released by every thread. pycuda then takes it off its own stack of
            # contexts only, not off the driver's, so that happens here.
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        self._forget(context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # pycuda itself can't release a primary context, and says so on stderr

    def _leave(self, context: Any) -> None:
        """Make current again what was before. Raises pycuda's errors."""
        if self._context is not context:
            self._api.Context.get_current()  # which takes closed ones off pycuda's stack
            return
        try:
            self._api.Context.pop()
        except self._api.Error as error:
            # pycuda ends the whole process if its stack isn't empty when this thread ends.
            self._end = BackendError(f"the GPU failed ({_words(error)})", _LOST)
            self._context = None
            self._forget(context)
            raise

    def _give_back(self) -> None:
        # When this fails, the context is lost, all its memory with it, and each further call would only say so.
        self._stream.synchronize()
        for graph in list(self._graphs):
            graph.close()
        for event in self._events:
            event.close()
        for memory in [buffer.allocation for buffer in self._allocations] + [
            buffer.array.base for buffer in self._pinned
        ]:
            memory.free()
        self._drop()

    def _drop(self) -> None:
        for kernels in self._kernels:
            kernels.close()
        self._stream = None
        for owned in (self._allocations, self._pinned, self._events, self._kernels):
            owned.clear()

    def _forget(self, context: Any) -> None:
        """Release the context; what pycuda's objects held in it goes without a word."""
        with contextlib.suppress(self._api.Error):
            context.detach()
        self._drop()


class Kernels:
    """The functions of one cubin. Every kernel takes one structure by value."""

    def __init__(self, module: Any, stream: Any) -> None:
        self._module = module
        self._stream = stream
        self._functions: dict[tuple[str, int], Any] = {}

    def start(self, launch: Launch, job: ctypes.Structure) -> None:
        """Put a kernel into the stream."""
        size = ctypes.sizeof(job)
        function = self._functions.get((launch.kernel, size))
        if function is None:
            function = self._module.get_function(launch.kernel)
            function.prepare([f"{size}s"])
            self._functions[launch.kernel, size] = function
        function.prepared_async_call(
            launch.grid, launch.block, self._stream, bytes(job), shared_size=launch.shared_bytes
        )

    def close(self) -> None:
        """Unload them."""
        self._functions.clear()
        self._module = self._stream = None


class Event:
    """A point in the stream that can be timed, inside a captured graph, too."""

    def __init__(self, driver: Any, stream_handle: int) -> None:
        self._driver = driver
        self._stream = ctypes.c_void_p(stream_handle)
        self._handle = ctypes.c_void_p()
        _check(driver, driver.cuEventCreate(ctypes.byref(self._handle), 0), "make an event")

    def record(self, *, in_graph: bool) -> None:
        """Put it into the stream."""
        flags = _EXTERNAL if in_graph else 0
        _check(self._driver, self._driver.cuEventRecordWithFlags(self._handle, self._stream, flags), "record an event")

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds between two recorded events that the GPU has passed."""
        elapsed = ctypes.c_float()
        code = self._driver.cuEventElapsedTime(ctypes.byref(elapsed), earlier._handle, self._handle)
        _check(self._driver, code, "read an event")
        return elapsed.value

    def close(self) -> None:
        """Give it back."""
        self._driver.cuEventDestroy_v2(self._handle)


class Graph:
    """Captured work that one call starts again."""

    def __init__(self, driver: Any, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._driver = driver
        self._executable: ctypes.c_void_p | None = executable
        self._stream = stream

    def launch(self) -> None:
        """Put all of it into the stream."""
        _check(self._driver, self._driver.cuGraphLaunch(self._executable, self._stream), "start a graph")

    def close(self) -> None:
        """Give it back."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._driver.cuGraphExecDestroy(executable)


def _check(driver: Any, code: int, what: str) -> None:
    """Raise `BackendError` with the driver's own words for a code that is not 0."""
    if code != 0:
        raise BackendError(f"the CUDA driver can't {what} ({device.driver_message(driver, code)})", _LOST)


@contextlib.contextmanager
def _explained(api: Any, what: str, remedy: str = _LOST) -> Iterator[None]:
    """pycuda's errors as `BackendError`, with the driver's message that they carry."""
    try:
        yield
    except api.Error as error:
        raise BackendError(f"{what} ({_words(error)})", remedy) from error


def _words(error: Exception) -> str:
    return str(error).removesuffix(" - ")  # what pycuda leaves where the driver's log is empty
