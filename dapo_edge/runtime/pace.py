"""A target rate: which of the frames that come are taken, or when the next one is asked for."""

from __future__ import annotations

import time


class Pace:
    """At most so many frames per second, evenly."""

    def __init__(self, fps: float | None) -> None:
        self._period_s = 1 / fps if fps else 0.0
        self._due_s = 0.0

    def lets_through(self, arrived_s: float) -> bool:
        """Whether a frame that came by itself is due."""
        if arrived_s < self._due_s:
            return False
        # Evenly from the last one that was due; after a gap from now, or two frames would pass at once.
        self._due_s = max(self._due_s, arrived_s - self._period_s / 2) + self._period_s
        return True

    def delay_s(self) -> float:
        """How long to wait before the next frame is asked for."""
        if not self._period_s:
            return 0.0
        now_s = time.monotonic()
        if now_s < self._due_s:
            return self._due_s - now_s
        self._due_s = max(self._due_s, now_s - self._period_s / 2) + self._period_s
        return 0.0
