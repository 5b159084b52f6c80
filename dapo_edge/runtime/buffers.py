"""Frame buffers that are used again: in steady state what a source copies out of its driver needs no new memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_KEPT, MOST_KEPT_BYTES = 16, 128 << 20  # a line holds a handful of frames at a time; more were a burst


class BufferPool:
    """Lends uint8 arrays of one shape at a time; a buffer comes back by itself when nobody refers to its pixels."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # taken again where the garbage collector returns a buffer in the middle
        self._shape: tuple[int, ...] = ()
        self._free: list[NDArray[np.uint8]] = []
        self.made = 0  # buffers that were allocated

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of `shape`, its content undefined. Views of it keep it out of the pool, too."""
        with self._lock:
            if shape != self._shape:
                self._shape, self._free = shape, []
            if self._free:
                buffer = self._free.pop()
            else:
                buffer = np.empty(shape, np.uint8)
                self.made += 1
        return np.asarray(_Lease(self, buffer))

    def _give_back(self, buffer: NDArray[np.uint8]) -> None:
        with self._lock:
            most = max(1, min(MOST_KEPT, MOST_KEPT_BYTES // max(1, buffer.nbytes)))
            if buffer.shape == self._shape and len(self._free) < most:
                self._free.append(buffer)


class _Lease:
    """What owns a lent array's memory in NumPy's eyes: it dies with the last view of the array."""

    def __init__(self, pool: BufferPool, buffer: NDArray[np.uint8]) -> None:
        self._pool = pool
        self._buffer = buffer

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._buffer.__array_interface__

    def __del__(self) -> None:
        self._pool._give_back(self._buffer)
