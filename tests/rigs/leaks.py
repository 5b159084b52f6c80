"""What a process holds: to see that a cycle of opening and closing gives everything back."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path


def handles() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (counts nothing but what is there already)


def threads() -> int:
    """Threads of this process, those of libraries included."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def leaked(cycle: Callable[[], object], times: int = 20) -> tuple[int, int]:
    """How many handles and threads more there are after `times` cycles than after the first ones; 0 for fewer."""
    for _ in range(3):
        cycle()
    gc.collect()
    before = handles(), threads()
    for _ in range(times):
        cycle()
    gc.collect()
    return max(0, handles() - before[0]), max(0, threads() - before[1])


def resident_bytes() -> int:
    """Memory of this process, without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
