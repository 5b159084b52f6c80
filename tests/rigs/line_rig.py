"""A whole line beside the test: a pipeline in its own thread, and a sink that audits it as results come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_edge.runtime.accounting import Counts
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan


@dataclass(frozen=True)
class Entry:
    """One result as it reached the sink. Seconds of the monotonic clock."""

    camera: str
    index: int | None
    done_s: float
    arrived_s: float | None  # None: the frame failed before it was a frame
    resumed: bool
    error: str  # "" where it was inspected


@dataclass(frozen=True)
class Change:
    """A camera's new state as it reached the sink."""

    done_s: float
    event: CameraEvent


class Ledger:
    """A sink that keeps the moments of all entries, not their pictures, and looks whether the books balance."""

    name = "ledger"
    draws = False

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.changes: list[Change] = []
        self.unbalanced: list[Counts] = []
        self.counts: Callable[[], Counts] = Counts

    def open(self) -> None:
        pass

    def write(self, outcome: Outcome) -> None:
        done_s, frame = time.monotonic(), outcome.frame
        arrived_s, resumed = (frame.arrived_s, frame.resumed) if frame else (None, False)
        error = str(outcome.error or "")
        self.entries.append(Entry(outcome.camera, outcome.index, done_s, arrived_s, resumed, error))
        self._audit()

    def note(self, event: CameraEvent) -> None:
        self.changes.append(Change(time.monotonic(), event))
        self._audit()

    def close(self) -> None:
        pass

    def of(self, camera: str, since_s: float = 0.0, until_s: float = float("inf")) -> list[Entry]:
        """A camera's results within a span of time."""
        return [entry for entry in list(self.entries) if entry.camera == camera and since_s <= entry.done_s <= until_s]

    def states(self, camera: str) -> list[str]:
        return [change.event.state for change in list(self.changes) if change.event.camera == camera]

    def _audit(self) -> None:
        counts = self.counts()
        if not counts.balanced:
            self.unbalanced.append(counts)


class Line:
    """A pipeline that runs while the block does; then it is told to stop, and all that was captured comes out."""

    def __init__(self, inspector: Any, plans: Sequence[CameraPlan], **options: Any) -> None:
        self.ledger = Ledger()
        self.pipeline = Pipeline(inspector, plans, [SinkPlan(self.ledger, "newest", queue=10_000)], **options)
        self.ledger.counts = self.pipeline.counts
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="line")

    def source(self, number: int = 0) -> Any:
        """The source that camera `number` reads now."""
        session = self.pipeline.cameras[number]._session
        assert session is not None
        return session.source

    def wait(self, condition: Callable[[], object], seconds: float = 15.0) -> float:
        """The moment when `condition` came true. Fails the test when it does not, or when the run broke."""
        end_s = time.monotonic() + seconds
        while not condition():
            assert self._error is None, self._error
            assert time.monotonic() < end_s, f"it never happened; {self.pipeline.as_json()}"
            time.sleep(0.005)
        return time.monotonic()

    def resumed(self, camera: str, since_s: float, seconds: float = 15.0) -> Entry:
        """The first result after a camera was found again."""
        self.wait(lambda: any(entry.resumed for entry in self.ledger.of(camera, since_s)), seconds)
        return next(entry for entry in self.ledger.of(camera, since_s) if entry.resumed)

    def end(self, seconds: float = 20.0) -> Counts:
        """Wait for a run that ends by itself; what became of its frames."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), self.pipeline.as_json()
        assert self._error is None, self._error
        counts = self.pipeline.counts()
        assert counts.balanced, counts
        assert counts.in_flight == 0, counts
        assert not self.ledger.unbalanced
        return counts

    def _run(self) -> None:
        try:
            self.pipeline.run()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Line:
        self._thread.start()
        self.wait(lambda: self.pipeline.cameras)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.pipeline.stop()
        self._thread.join(20)
        if kind is None:  # else the test has its own story
            self.end()


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    """A percentile of durations, in milliseconds."""
    return float(np.percentile(seconds, percent)) * 1e3
