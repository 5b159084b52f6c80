"""A `Machine` without a GPU: memory is NumPy's, kernels are those that g++ makes of the shipped sources."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
from driver import Buffer, Work
from host_kernels import shipped_module
from numpy.typing import NDArray

from dapo_edge.device import Gpu
from dapo_edge.kernels.launch import Launch


class HostMachine:
    """Runs every kernel at once, on the CPU. Does all that the benchmark asks of a GPU; its times mean nothing."""

    torch_device = "cpu"
    multiprocessors = 16
    gpu = Gpu("Emulated GPU", "9.0", 1 << 30, "12.6", False, multiprocessors)

    def place(self, array: NDArray[Any]) -> Buffer:
        content = np.ascontiguousarray(array).copy()
        return Buffer(content.ctypes.data, content.shape, content.dtype, content)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        buffer.memory.reshape(-1).view(np.uint8)[...] = array.reshape(-1).view(np.uint8)

    def clear(self, buffer: Buffer) -> None:
        buffer.memory[...] = 0

    def fetch(self, buffer: Buffer) -> NDArray[Any]:
        return buffer.memory.copy()

    def start(self, launch: Launch, job: ctypes.Structure) -> None:
        shipped_module().launch(launch.kernel, launch.grid, launch.block, launch.shared_bytes, [job])

    def synchronise(self) -> None:
        pass

    def capture(self, work: Work) -> Work:
        return work

    def sample_us(self, work: Work, samples: int, between: Work | None = None) -> list[float]:
        times = []
        for _ in range(samples):
            if between is not None:
                between()
            started = time.perf_counter()
            work()
            times.append((time.perf_counter() - started) * 1e6)
        return times

    def copy_work(self, nbytes: int) -> Work:
        source = np.ones(nbytes, np.uint8)
        target = source.copy()
        return lambda: np.copyto(target, source)

    def l2_bytes(self) -> int:
        return 1 << 16

    def flush_work(self) -> Work:
        other = np.empty(4 * self.l2_bytes(), np.uint8)
        return lambda: other.fill(0)

    def free_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass
