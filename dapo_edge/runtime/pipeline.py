"""Frames through an inspector, one after the other, with every frame accounted for.

captured = inspected + dropped + failed holds after every frame. Nothing is dropped: this loop waits for the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from dapo_edge.errors import FrameError
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.sources import Source
from dapo_edge.structures import Frame, Inspection


@dataclass(frozen=True, eq=False)
class Outcome:
    """One captured frame: inspected, or failed with the reason."""

    source: str
    frame: Frame | None = None
    inspection: Inspection | None = None
    error: FrameError | None = None


@dataclass
class Statistics:
    """What became of the frames so far."""

    captured: int = 0
    inspected: int = 0
    dropped: int = 0
    failed: int = 0
    verdicts: dict[str, int] = field(default_factory=lambda: {"ok": 0, "ng": 0, "unsure": 0})
    started: float = field(default_factory=time.perf_counter)  # seconds

    def count(self, outcome: Outcome) -> None:
        """Account for one more frame."""
        self.captured += 1
        if outcome.inspection is None:
            self.failed += 1
        else:
            self.inspected += 1
            self.verdicts[outcome.inspection.verdict] += 1

    def as_json(self) -> dict[str, object]:
        """The summary line's values."""
        seconds = time.perf_counter() - self.started
        return {
            "captured": self.captured,
            "inspected": self.inspected,
            "dropped": self.dropped,
            "failed": self.failed,
            "verdicts": dict(self.verdicts),
            "seconds": round(seconds, 3),
            "fps": round(self.inspected / seconds, 2) if seconds else 0.0,
        }


def inspect_stream(
    inspector: Inspector,
    sources: Iterable[Source],
    *,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Inspect sources one after the other, at most `limit` frames of each, until `stopped()` says so.

    A frame that can't be used is yielded as failed and the stream goes on. Raises `SourceError` when a source breaks.
    """
    for source in sources:
        with source:
            uri = source.properties.uri
            taken = 0
            while not stopped() and (limit is None or taken < limit):
                outcome = _next(inspector, source, uri)
                if outcome is None:
                    break
                taken += 1
                yield outcome


def _next(inspector: Inspector, source: Source, uri: str) -> Outcome | None:
    frame = None
    try:
        frame = source.read()
        return None if frame is None else Outcome(uri, frame, inspector.inspect(frame))
    except FrameError as error:
        return Outcome(uri, frame, error=error)
