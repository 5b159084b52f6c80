"""Buffers come back when the last view of them is gone, and never before."""

from __future__ import annotations

import gc
import threading

import numpy as np

from dapo_edge.runtime.buffers import MOST_KEPT, BufferPool


def test_steady_use_needs_one_buffer() -> None:
    pool = BufferPool()
    for number in range(100):
        array = pool.take((4, 5, 3))
        array[...] = number
        assert array.flags.c_contiguous and array.flags.writeable and array.dtype == np.uint8
        del array
    assert pool.made == 1


def test_a_view_keeps_its_buffer_out_of_the_pool() -> None:
    pool = BufferPool()
    array = pool.take((4, 4))
    array[...] = 7
    corner = array[1:3, 1:3].T[::-1]
    del array
    gc.collect()
    other = pool.take((4, 4))
    other[...] = 9
    assert (corner == 7).all() and pool.made == 2
    del corner
    assert pool.take((4, 4)) is not None and pool.made == 2


def test_another_shape_starts_again_and_old_buffers_are_not_mixed_in() -> None:
    pool = BufferPool()
    old = pool.take((8, 8))
    new = pool.take((2, 2))
    del old
    assert new.shape == pool.take((2, 2)).shape == (2, 2)


def test_a_burst_is_not_kept_for_ever() -> None:
    pool = BufferPool()
    burst = [pool.take((2, 2)) for _ in range(3 * MOST_KEPT)]
    del burst
    assert len(pool._free) == MOST_KEPT


def test_threads_never_share_a_buffer() -> None:
    pool = BufferPool()
    mixed = []

    def work(mark: int) -> None:
        for _ in range(500):
            array = pool.take((64,))
            array[...] = mark
            if not (array == mark).all():
                mixed.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed and pool.made <= 4
