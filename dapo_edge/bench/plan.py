"""What a benchmark run measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dapo_edge.errors import RecipeError

DEFAULT_SOURCE = "synthetic://1920x1080@30"
MOST_CAMERAS = 64
MOST_FRAMES_PER_CALL = 256


@dataclass(frozen=True)
class BenchPlan:
    """Raises `RecipeError` for what can't be measured.

    Without a rate frames go through one at a time, the next when the last one is done. With `rate_fps` they arrive by
    the clock, whether the engine is ready or not, and the time that they wait counts.
    """

    source: str = DEFAULT_SOURCE
    frames: int = 200  # to be timed
    seconds: float | None = None  # time for so long instead
    warm_up: int | None = None  # frames before the first one that counts; None: until times are steady
    rate_fps: float | None = None  # of each camera
    deadline_ms: float | None = None  # from a frame's arrival to its written result
    find_rate: bool = False  # the highest rate whose p99 meets the deadline
    cameras: tuple[int, ...] = ()  # sweep: so many cameras at once
    batches: tuple[int, ...] = ()  # sweep: so many frames per call

    def __post_init__(self) -> None:
        self._check_positive("rate", self.rate_fps, "frames per second")
        self._check_positive("deadline", self.deadline_ms, "milliseconds")
        self._check_positive("time to measure", self.seconds, "seconds")
        if self.frames < 1:
            raise RecipeError(f"{self.frames} frames can't be timed", "Ask for 1 at least")
        if self.warm_up is not None and self.warm_up < 0:
            raise RecipeError(f"a warm-up of {self.warm_up} frames is impossible", "Ask for 0 or more")
        if self.find_rate and self.deadline_ms is None:
            raise RecipeError("the highest rate is that which meets a deadline", "Add --deadline-ms")
        if self.find_rate and self.rate_fps is not None:
            raise RecipeError("the rate is to be found, and given", "Leave out --rate or --find-rate")
        self._check_counts("cameras", self.cameras, MOST_CAMERAS)
        self._check_counts("frames per call", self.batches, MOST_FRAMES_PER_CALL)

    @property
    def swept_cameras(self) -> tuple[int, ...]:
        """Numbers of cameras that are timed besides; a single one at a rate is that of the run itself."""
        return () if self.rate_fps is not None and len(self.cameras) == 1 else self.cameras

    @staticmethod
    def _check_positive(what: str, value: float | None, unit: str) -> None:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"a {what} of {value:g} {unit} is impossible", "Use a number above 0")

    @staticmethod
    def _check_counts(what: str, counts: tuple[int, ...], most: int) -> None:
        bad = next((count for count in counts if not 1 <= count <= most), None)
        if bad is not None:
            raise RecipeError(f"{bad} {what} can't be measured", f"Use from 1 to {most}")
