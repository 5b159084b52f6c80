"""The GPU of these tests: the shipped kernels through the CUDA driver, memory of the driver's own or of torch's.

Only ctypes and NumPy are needed, and torch for graphs and timing: a machine with a GPU may have neither pycuda nor
TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dapo_edge import device
from dapo_edge.errors import BackendError, DependencyMissing
from dapo_edge.kernels.compile import Cubin, compile_kernels
from dapo_edge.kernels.launch import Launch

Work = Callable[[], object]
_HANDLE = ctypes.c_void_p
_L2_CACHE_SIZE = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE


@dataclass(frozen=True, eq=False)
class Buffer:
    """An array in a machine's memory. Lives as long as its machine."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    memory: Any  # what keeps it alive

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Machine(Protocol):
    """What `works.py` needs: memory, and a stream that kernels are put into."""

    multiprocessors: int

    def place(self, array: NDArray[Any]) -> Buffer:
        """A copy of `array`, in an allocation of its own."""
        ...

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Overwrite a buffer, in stream order; `array` has its size in bytes."""
        ...

    def clear(self, buffer: Buffer) -> None:
        """Set a buffer to zero, in stream order."""
        ...

    def fetch(self, buffer: Buffer) -> NDArray[Any]:
        """Wait for the stream and copy a buffer out."""
        ...

    def start(self, launch: Launch, job: ctypes.Structure) -> None:
        """Put a kernel into the stream."""
        ...

    def synchronise(self) -> None:
        """Wait until the stream is empty."""
        ...


class DriverMachine:
    """The first GPU, by the driver alone. Every buffer is an allocation, so compute-sanitizer sees its exact end."""

    def __init__(self) -> None:
        """Compile and load the kernels. Raises `BackendError` without a GPU, `DependencyMissing` without a compiler."""
        found = device.gpus()
        if not found:
            raise BackendError(device.driver_problem() or "there is no CUDA driver, or no GPU", "Run it where one is")
        self.gpu, self._driver = found[0], device.load_driver()
        self.multiprocessors = self.gpu.multiprocessors
        major, minor = map(int, self.gpu.driver_cuda.split("."))
        self.cubin: Cubin = compile_kernels("sm_" + self.gpu.sm.replace(".", ""), driver_cuda=(major, minor))
        self._device, context, self._module = ctypes.c_int(), _HANDLE(), _HANDLE()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        # The primary context, which torch works in, too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(self.cubin.data))
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._addresses: list[int] = []

    def place(self, array: NDArray[Any]) -> Buffer:
        """See `Machine`."""
        content, address = np.ascontiguousarray(array), ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(content.nbytes))
        self._addresses.append(address.value)
        buffer = Buffer(address.value, content.shape, content.dtype, None)
        self.write(buffer, content)
        return buffer

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Machine`."""
        content = _same_size(buffer, array)
        source = _HANDLE(content.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(buffer.address), source, ctypes.c_size_t(content.nbytes))

    def clear(self, buffer: Buffer) -> None:
        """See `Machine`."""
        self._call("cuMemsetD8_v2", ctypes.c_uint64(buffer.address), ctypes.c_ubyte(0), ctypes.c_size_t(buffer.nbytes))

    def fetch(self, buffer: Buffer) -> NDArray[Any]:
        """See `Machine`."""
        self.synchronise()
        array = np.empty(buffer.shape, buffer.dtype)
        target = _HANDLE(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(buffer.address), ctypes.c_size_t(array.nbytes))
        return array

    def start(self, launch: Launch, job: ctypes.Structure) -> None:
        """See `Machine`."""
        function = self._functions.get(launch.kernel)
        if function is None:
            function = _HANDLE()
            self._call("cuModuleGetFunction", ctypes.byref(function), self._module, launch.kernel.encode())
            self._functions[launch.kernel] = function
        shape = map(ctypes.c_uint, (*launch.grid, *launch.block, launch.shared_bytes))
        parameters = (_HANDLE * 1)(ctypes.addressof(job))  # read during the call, so `job` may change after it
        self._call("cuLaunchKernel", function, *shape, _HANDLE(self._stream()), parameters, None)

    def synchronise(self) -> None:
        """See `Machine`. Errors of everything before surface here."""
        self._call("cuStreamSynchronize", _HANDLE(self._stream()))

    def free_bytes(self) -> int:
        """Device memory that nobody has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        size = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(size), _L2_CACHE_SIZE, self._device)
        return size.value

    def close(self) -> None:
        """Free the buffers and the kernels."""
        self._call("cuCtxSynchronize")
        for address in self._addresses:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._addresses.clear()
        self._call("cuModuleUnload", self._module)

    def _stream(self) -> int:
        return 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise BackendError(f"{name} failed ({device.driver_message(self._driver, code)})", "See the line above")


class TorchMachine(DriverMachine):
    """The first GPU with torch's memory on torch's current stream, so that torch captures and times the kernels."""

    torch_device = "cuda"

    def __init__(self) -> None:
        """Raises `DependencyMissing` without a torch that sees the GPU, and what `DriverMachine` raises."""
        try:
            import torch
        except ImportError as error:
            raise DependencyMissing(f"torch can't be imported ({error})", "Use a Python that has torch") from error
        if not torch.cuda.is_available():
            raise DependencyMissing(f"torch {torch.__version__} sees no GPU", "Use a torch that is made for CUDA")
        self._torch = torch
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # from here on torch's context is there
        super().__init__()

    def place(self, array: NDArray[Any]) -> Buffer:
        """See `Machine`."""
        content = np.ascontiguousarray(array)
        tensor = self._torch.from_numpy(_bytes_of(content).copy()).to(self.torch_device)
        return Buffer(tensor.data_ptr(), content.shape, content.dtype, tensor)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Machine`."""
        buffer.memory.copy_(self._torch.from_numpy(_bytes_of(_same_size(buffer, array)).copy()))

    def clear(self, buffer: Buffer) -> None:
        """See `Machine`."""
        buffer.memory.zero_()

    def fetch(self, buffer: Buffer) -> NDArray[Any]:
        """See `Machine`."""
        content: NDArray[np.uint8] = buffer.memory.cpu().numpy()
        return content.view(buffer.dtype).reshape(buffer.shape)

    def capture(self, work: Work) -> Work:
        """Record what `work` puts into the stream; each call of the result puts it there again."""
        side = self._torch.cuda.Stream()
        side.wait_stream(self._torch.cuda.current_stream())
        with self._torch.cuda.stream(side):  # libraries make their handles in the first call, not in the capture
            work()
        self._torch.cuda.current_stream().wait_stream(side)
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            work()
        return graph.replay

    def sample_us(self, work: Work, samples: int, between: Work | None = None) -> list[float]:
        """Microseconds of the GPU for each of `samples` calls, by events; `between` runs before each, untimed.

        Work that the host puts in more slowly than the GPU takes it out counts the GPU's waiting, too: capture it.
        """
        events = [[self._torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
        for before, after in events:
            if between is not None:
                between()
            before.record()
            work()
            after.record()
        self.synchronise()
        return [before.elapsed_time(after) * 1e3 for before, after in events]

    def copy_work(self, nbytes: int) -> Work:
        """A copy of `nbytes` from device memory to device memory."""
        source = self._torch.ones(nbytes, dtype=self._torch.uint8, device="cuda")
        target = self._torch.empty_like(source)
        return lambda: target.copy_(source)

    def flush_work(self) -> Work:
        """Drives everything out of the L2 cache, by writing four times its size."""
        other = self._torch.empty(4 * self.l2_bytes(), dtype=self._torch.uint8, device=self.torch_device)
        return other.zero_

    def close(self) -> None:
        """Free the kernels; torch keeps its memory."""
        with contextlib.suppress(BackendError):
            super().close()

    def _stream(self) -> int:
        return int(self._torch.cuda.current_stream().cuda_stream)


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _same_size(buffer: Buffer, array: NDArray[Any]) -> NDArray[Any]:
    if array.nbytes != buffer.nbytes:
        raise ValueError(f"{array.nbytes} bytes don't belong into a buffer of {buffer.nbytes}")
    return np.ascontiguousarray(array)
