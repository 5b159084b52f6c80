"""A few at a time, or one alone: calls of an engine, and what must not happen during any of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Slots:
    """At most `count` threads are inside `one()`; whoever is inside `all()` is alone, and waits for nobody new."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(count)
        self._entry = threading.Lock()  # held by who waits for slots, so that those who come later wait behind

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Take a slot."""
        with self._entry:
            self._free.acquire()
        try:
            yield
        finally:
            self._free.release()

    @contextlib.contextmanager
    def all(self, timeout_s: float = -1) -> Iterator[None]:
        """Take all slots, as soon as those inside have left. Raises `TimeoutError`; -1 waits for ever."""
        taken = 0
        if not self._entry.acquire(timeout=timeout_s):
            raise TimeoutError
        try:
            while taken < self._count:
                if not self._free.acquire(timeout=None if timeout_s < 0 else timeout_s):
                    raise TimeoutError
                taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()
            self._entry.release()
