"""NumPy's BLAS on one thread, for as long as a map is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# The limit holds for the whole process: two threads that set and restore it by turns would leave it set.
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep matrix products on the thread that asks for them. Threads wait for each other here.

    After a product OpenBLAS lets its other threads spin for a while in case another one follows. Here the encoder
    follows, on the same cores, and takes twice as long beside them.
    """
    with _ONE_AT_A_TIME, _controller().limit(limits=1, user_api="blas"):
        yield


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
