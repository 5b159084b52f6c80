"""Memory that belongs together: made one by one, measured and given back as a whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.cuda import Cuda, DeviceBuffer, PinnedBuffer


class Buffers:
    """Buffers of one owner, on the GPU and page-locked on the host."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._device: list[DeviceBuffer] = []
        self.pinned: list[PinnedBuffer] = []  # in the order in which they were made

    @property
    def nbytes(self) -> int:
        """Memory that they hold, of host and GPU."""
        return sum(buffer.nbytes for buffer in self._device) + sum(buffer.nbytes for buffer in self.pinned)

    def allocate(self, nbytes: int, purpose: str) -> DeviceBuffer:
        """Device memory; see `Cuda.allocate`."""
        buffer = self._cuda.allocate(nbytes, purpose)
        self._device.append(buffer)
        return buffer

    def constant(self, array: NDArray[np.generic], purpose: str) -> int:
        """The address of device memory that holds a copy of `array`."""
        buffer = self._cuda.constant(array, purpose)
        self._device.append(buffer)
        return buffer.address

    def pin(self, nbytes: int) -> PinnedBuffer:
        """Page-locked host memory; see `Cuda.pinned`."""
        buffer = self._cuda.pinned(nbytes)
        self.pinned.append(buffer)
        return buffer

    def close(self) -> None:
        """Give all of it back."""
        for buffer in self._device:
            self._cuda.free(buffer)
        for pinned in self.pinned:
            self._cuda.unpin(pinned)
        self._device.clear()
        self.pinned.clear()
