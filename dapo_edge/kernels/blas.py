"""NumPy's BLAS on one thread, for as long as a frame's small products take."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# The limit holds for the whole process: two threads that set and restore it by turns would leave it set. So the first
# one that comes sets it, and the last one that goes restores it.
_change = threading.Lock()
_inside = 0
_restore = contextlib.ExitStack()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep matrix products on the thread that asks for them.

    After a product OpenBLAS lets its other threads spin for a while in case another one follows. Here the encoder
    follows, on the same cores, and takes twice as long beside them.
    """
    global _inside
    with _change:
        if _inside == 0:
            _restore.enter_context(_controller().limit(limits=1, user_api="blas"))
        _inside += 1
    try:
        yield
    finally:
        with _change:
            _inside -= 1
            if _inside == 0:
                _restore.close()


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
