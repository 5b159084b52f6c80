"""Frames through an inspector, one after the other, with every frame accounted for.

captured = inspected + dropped + failed holds after every frame. Nothing is dropped: this loop waits for the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.sources import Source
from dapo_edge.structures import Frame, Inspection


@dataclass(frozen=True, eq=False)
class Outcome:
    """One captured frame: inspected, or failed with the reason."""

    source: str  # URI of the frame
    index: int | None  # within its source; None when a failed frame does not know it
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
    statistics: Statistics,
    *,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Inspect sources one after the other, at most `limit` frames of each, until `stopped()` says so.

    A frame that can't be used is yielded as failed and the stream goes on. A source that breaks does not keep the
    others from being inspected: its `SourceError` is raised at the end. `BackendError` is raised at once. `statistics`
    account for every frame in any case.
    """
    broken: list[SourceError] = []
    for source in sources:
        if stopped():
            break
        try:
            yield from _frames(inspector, source, statistics, limit, stopped)
        except SourceError as error:
            if stopped():  # it was closed to end a wait
                break
            broken.append(error)
    if len(broken) > 1:
        raise SourceError("; ".join(error.cause for error in broken), broken[0].remedy)
    if broken:
        raise broken[0]


def _frames(
    inspector: Inspector, source: Source, statistics: Statistics, limit: int | None, stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    with source:
        uri = source.properties.uri
        taken = 0
        while not stopped() and (limit is None or taken < limit):
            try:
                frame = source.read()
            except FrameError as error:
                statistics.captured += 1
                statistics.failed += 1
                outcome = Outcome(error.source or uri, error.index, error=error)
            else:
                if frame is None:
                    break
                outcome = _inspected(inspector, frame, statistics)
            taken += 1
            yield outcome


def _inspected(inspector: Inspector, frame: Frame, statistics: Statistics) -> Outcome:
    statistics.captured += 1
    try:
        inspection = inspector.inspect(frame)
    except FrameError as error:
        statistics.failed += 1
        return Outcome(frame.source, frame.index, frame, error=error)
    except KeyboardInterrupt:
        statistics.dropped += 1  # by the person who stopped the run
        raise
    except BaseException:
        statistics.failed += 1
        raise
    statistics.inspected += 1
    statistics.verdicts[inspection.verdict] += 1
    return Outcome(frame.source, frame.index, frame, inspection)
