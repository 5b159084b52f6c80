"""Labelled images read ahead by other processes, in order; one that can't be read is named and the rest goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge.data.dataset import Sample, read_sample
from dapo_edge.data.pictures import read_image
from dapo_edge.errors import DapoEdgeError, SourceError

AHEAD = 3  # images per process that wait to be used: enough to bridge one that is slow to decode


@dataclass(frozen=True, eq=False)
class Loaded:
    """One image of a data set, or why it can't be used."""

    sample: Sample
    image: NDArray[np.uint8] | None = None  # [H, W, 3] BGR
    types: NDArray[np.uint8] | None = None  # [H, W]; None where no mask says which pixels are defective
    error: SourceError | None = None


class Loader:
    """Reads samples in `workers` other processes, or with 0 in this one. A context manager."""

    def __init__(self, workers: int = 0) -> None:
        self._workers = workers
        # Spawned: a fork would copy the threads and locks of an inference runtime in the middle of what they do.
        self._pool = (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _leave_with_parent) if workers else None
        )

    def load(self, samples: Sequence[Sample], names: Sequence[str]) -> Iterator[Loaded]:
        """Every sample in order. Types are indices into `names`, which hold every defect of the samples.

        Raises `DapoEdgeError` when a process dies.
        """
        if self._pool is None:
            for sample in samples:
                yield _loaded(sample, tuple(names))
            return
        waiting: deque[Future[Loaded]] = deque()
        try:
            for sample in samples:
                waiting.append(self._pool.submit(_loaded, sample, tuple(names)))
                if len(waiting) > AHEAD * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DapoEdgeError(
                "a process that reads images died, perhaps for want of memory", "Use fewer workers: --workers 0"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _leave_with_parent() -> None:
    """Ctrl-C is the parent's to handle; a parent that was killed must not leave readers behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _loaded(sample: Sample, names: tuple[str, ...]) -> Loaded:
    try:
        if not sample.is_good and sample.mask is None:
            return Loaded(sample, read_image(sample.image))
        picture = read_sample(sample, names)
        return Loaded(sample, picture.image, picture.types)
    except SourceError as error:
        return Loaded(sample, error=error)
