"""Cameras of a benchmark: frames from memory that arrive by a clock, or as fast as they are taken."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod

import numpy as np

from dapo_edge.bench.feed import Feed
from dapo_edge.errors import FrameTimeout, RecipeError
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources import Properties, Source
from dapo_edge.structures import Frame


def check_in_memory(feed: Feed, what: str) -> None:
    """Raise `RecipeError` for a live camera, which nobody can tell when to give a frame."""
    if feed.live:
        raise RecipeError(
            f"{what} is impossible with '{feed.uri}', which gives frames at its own pace",
            "Name pictures, a video or synthetic://, which are kept in memory",
        )


class MemoryCamera(Source):
    """A feed's pictures over and over, each copied into a buffer when it arrives, as a driver's are."""

    def __init__(self, feed: Feed, number: int) -> None:
        """`number`: of the camera. Each begins with another picture, so that caches do not serve all from one."""
        super().__init__(feed.full_uri)
        self.capture_ms: list[float] = []  # of each frame: what its copy took
        self._pictures = [frame.image for frame in feed.frames]
        self._number = number
        self._pool = BufferPool()
        self._closed = threading.Event()

    def _open(self) -> Properties:
        return Properties(self.uri)

    @property
    def _index(self) -> int:
        """Of the next frame."""
        return len(self.capture_ms)

    def _arrived(self, arrived_s: float) -> Frame:
        """The next frame, which came at a moment of the monotonic clock."""
        index, picture = self._index, self._pictures[(self._number + self._index) % len(self._pictures)]
        timestamp_ns = time.time_ns() - round((time.monotonic() - arrived_s) * 1e9)
        started = time.perf_counter()
        pixels = self._pool.take(picture.shape)
        np.copyto(pixels, picture)
        self.capture_ms.append((time.perf_counter() - started) * 1e3)
        return Frame(pixels, index, timestamp_ns, self.uri, arrived_s=arrived_s)

    @abstractmethod
    def _read(self, timeout_s: float | None) -> Frame | None: ...

    def _close(self) -> None:
        self._closed.set()


class Metronome(MemoryCamera):
    """Frame i arrives at `start_s` + i / `fps`, whether anybody asks for it or not.

    A frame that is asked for late has arrived on time all the same: the time until then is waiting, and counts. When
    one is asked for more than `give_up_s` late, the source ends: whoever takes the frames can't keep up, and the rest
    of the run would only take as much longer.
    """

    def __init__(
        self, feed: Feed, number: int, *, start_s: float, fps: float, frames: int, least: int, give_up_s: float
    ) -> None:
        """`start_s`: by `time.monotonic`. `frames`: the source ends after so many, and gives `least` however late."""
        super().__init__(feed, number)
        self.gave_up = False
        self._start_s, self._fps = start_s, fps
        self._frames, self._least, self._give_up_s = frames, least, give_up_s

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self._index == self._frames:
            return None
        due_s = self._start_s + self._index / self._fps
        wait_s = due_s - time.monotonic()
        if wait_s < -self._give_up_s and self._index >= self._least:
            self.gave_up = True
            return None
        if timeout_s is not None and wait_s > timeout_s:
            if self._closed.wait(timeout_s):
                return None
            raise FrameTimeout(f"'{self.uri}' is not due within {timeout_s:g} s", "Wait longer")
        return None if self._closed.wait(max(0.0, wait_s)) else self._arrived(due_s)


class Flood(MemoryCamera):
    """The next frame arrives when the last one was taken: a run goes as fast as the engine allows, until stopped."""

    def _read(self, timeout_s: float | None) -> Frame | None:
        return None if self._closed.is_set() else self._arrived(time.monotonic())
