"""What became of every frame: captured = inspected + dropped + failed + in flight, per camera, at any moment."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dapo_edge.structures import Verdict

# policy: a newer frame took its place, or the target rate left it out. stale: it waited too long. camera: the camera or
# its driver lost it. shutdown: the run was ended before its turn.
DropReason = Literal["policy", "stale", "camera", "shutdown"]
REMEMBERED_WAITS = 4096  # for percentiles; a line runs for years


@dataclass(frozen=True)
class Counts:
    """One moment of an `Account`."""

    captured: int = 0
    inspected: int = 0
    failed: int = 0
    in_flight: int = 0  # waiting for the engine, or in it
    dropped_by: dict[DropReason, int] = field(
        default_factory=lambda: {"policy": 0, "stale": 0, "camera": 0, "shutdown": 0}
    )
    verdicts: dict[Verdict, int] = field(default_factory=lambda: {"ok": 0, "ng": 0, "unsure": 0})

    @property
    def dropped(self) -> int:
        """For whatever reason."""
        return sum(self.dropped_by.values())

    @property
    def balanced(self) -> bool:
        """Whether every frame is accounted for."""
        return self.captured == self.inspected + self.dropped + self.failed + self.in_flight

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.captured + other.captured,
            self.inspected + other.inspected,
            self.failed + other.failed,
            self.in_flight + other.in_flight,
            {reason: count + other.dropped_by[reason] for reason, count in self.dropped_by.items()},
            {verdict: count + other.verdicts[verdict] for verdict, count in self.verdicts.items()},
        )

    def as_json(self) -> dict[str, Any]:
        """As in the summary line."""
        return {
            "captured": self.captured,
            "inspected": self.inspected,
            "dropped": self.dropped,
            "dropped_by": dict(self.dropped_by),
            "failed": self.failed,
            "in_flight": self.in_flight,
            "verdicts": dict(self.verdicts),
        }


class Account:
    """The frames of one camera. Every change is one step under a lock, so each moment's counts are whole.

    Closed, it takes no more changes: an engine or a camera that hung may come back when the sum is drawn already.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captured = self._inspected = self._failed = self._in_flight = 0
        self._dropped = dict(Counts().dropped_by)
        self._verdicts = dict(Counts().verdicts)
        self._waits_ms: deque[float] = deque(maxlen=REMEMBERED_WAITS)
        self._closed = False

    def captured(self, *, lost: int = 0) -> None:
        """A frame came and is in flight; `lost` ones before it never did."""
        with self._lock:
            if self._closed:
                return
            self._captured += 1 + lost
            self._in_flight += 1
            self._dropped["camera"] += lost

    def never_came(self, lost: int) -> None:
        """The camera lost frames."""
        with self._lock:
            if self._closed:
                return
            self._captured += lost
            self._dropped["camera"] += lost

    def came_unusable(self) -> None:
        """A frame came that can't be inspected."""
        with self._lock:
            if self._closed:
                return
            self._captured += 1
            self._failed += 1

    def inspected(self, verdict: Verdict, waited_s: float) -> None:
        """A frame in flight got its verdict."""
        with self._lock:
            if self._closed:
                return
            self._in_flight -= 1
            self._inspected += 1
            self._verdicts[verdict] += 1
            self._waits_ms.append(waited_s * 1e3)

    def failed(self) -> None:
        """A frame in flight could not be inspected."""
        with self._lock:
            if self._closed:
                return
            self._in_flight -= 1
            self._failed += 1

    def dropped(self, reason: DropReason) -> None:
        """A frame in flight was given up."""
        with self._lock:
            if self._closed:
                return
            self._in_flight -= 1
            self._dropped[reason] += 1

    def close(self) -> int:
        """Draw the sum: what is still in flight is given up, as many as are returned."""
        with self._lock:
            self._closed = True
            given_up, self._in_flight = self._in_flight, 0
            self._dropped["shutdown"] += given_up
            return given_up

    def counts(self) -> Counts:
        """This moment's."""
        with self._lock:
            return Counts(
                self._captured,
                self._inspected,
                self._failed,
                self._in_flight,
                dict(self._dropped),
                dict(self._verdicts),
            )

    def waiting_ms(self) -> dict[str, float] | None:
        """Percentiles of how long the latest frames waited for the engine; None before the first one."""
        with self._lock:
            waits = np.asarray(self._waits_ms)
        if not len(waits):
            return None
        p50, p99, longest = np.percentile(waits, (50, 99, 100))
        return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(float(longest), 3)}


class Stopwatch:
    """How long a run lasts: until it ends, then for ever the same."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._ended_s: float | None = None

    def end(self) -> None:
        """Stop counting."""
        if self._ended_s is None:
            self._ended_s = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return (time.monotonic() if self._ended_s is None else self._ended_s) - self._started_s

    def rate(self, count: int) -> float:
        """`count` per second."""
        return round(count / self.seconds, 2) if self.seconds else 0.0


def total(counts: Sequence[Counts]) -> Counts:
    """All cameras together."""
    return sum(counts, start=Counts())
