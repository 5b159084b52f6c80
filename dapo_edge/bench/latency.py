"""One frame at a time: warm up until times are steady, then time each frame from its capture to its written result."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge.bench.feed import Feed, Shot, shots
from dapo_edge.bench.samples import Samples, percentiles
from dapo_edge.errors import FrameError, SourceError
from dapo_edge.outputs.events import frame_json
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.outcome import Outcome
from dapo_edge.structures import Inspection

Tick = Callable[[int, int], None]  # done, of; may raise KeyboardInterrupt

STEADY_WINDOWS, STEADY_SPREAD = 3, 0.05
WINDOW_S, MOST_IN_WINDOW, LEAST_IN_WINDOW = 0.5, 20, 2
WARM_UP_LIMIT_S = 20.0
CALLS_PER_BATCH = 20


@dataclass(frozen=True)
class WarmUp:
    """What went before the first frame that counts."""

    frames: int
    seconds: float
    steady: bool | None  # None: the number of frames was given


@dataclass(frozen=True, eq=False)
class LatencyRun:
    """Times of single frames."""

    samples: Samples
    started_s: float  # by time.monotonic
    seconds: float
    failed: int  # frames that could not be inspected
    interrupted: bool  # by Ctrl-C, or because the source broke off
    ended: bool  # the source gave no more frames
    error: SourceError | None = None  # with which the source broke off


class Emitter:
    """Writes each result as `run` does, to where nobody reads it."""

    def __enter__(self) -> Self:
        self._file = Path(os.devnull).open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def emit(self, outcome: Outcome) -> float:
        """Milliseconds that the line took."""
        started = time.perf_counter()
        self._file.write(json.dumps(frame_json(outcome), ensure_ascii=False) + "\n")
        self._file.flush()
        return (time.perf_counter() - started) * 1e3


def one_frame(inspector: Inspector, shot: Shot, emitter: Emitter) -> tuple[dict[str, float], Inspection]:
    """Milliseconds per stage of one frame, with "capture", "emit" and the "total" of all. Raises `FrameError`."""
    frame = shot.frame
    started = time.perf_counter()
    result = inspector.inspect(frame)
    emit_ms = emitter.emit(Outcome(frame.source, frame.index, frame, result))
    total_ms = (time.perf_counter() - started) * 1e3 + (shot.capture_ms or 0.0)
    captured = {} if shot.capture_ms is None else {"capture": shot.capture_ms}
    return {**captured, **result.ms, "emit": emit_ms, "total": total_ms}, result


def warm_up(inspector: Inspector, feed: Feed, frames: int | None, tick: Tick = lambda done, of: None) -> WarmUp:
    """Inspect so many frames; with None until times are steady, for 20 s at most.

    Steady: the medians of the last three windows of half a second (2 to 20 frames) lie within 5 % of each other.
    """
    times: list[float] = []
    started, pictures = time.monotonic(), itertools.cycle(feed.frames)
    while frames is None or len(times) < frames:
        begun = time.perf_counter()
        inspector.inspect(next(pictures))
        times.append(time.perf_counter() - begun)
        tick(len(times), frames or 0)
        if frames is None and (is_steady(times) or time.monotonic() - started > WARM_UP_LIMIT_S):
            break
    return WarmUp(len(times), time.monotonic() - started, is_steady(times) if frames is None else None)


def is_steady(times_s: list[float]) -> bool:
    """Whether the last three windows agree."""
    recent = times_s[-STEADY_WINDOWS * MOST_IN_WINDOW :]
    window = int(min(MOST_IN_WINDOW, max(LEAST_IN_WINDOW, WINDOW_S / max(statistics.median(recent), 1e-6))))
    if len(recent) < STEADY_WINDOWS * window:
        return False
    last = np.asarray(recent[-STEADY_WINDOWS * window :]).reshape(STEADY_WINDOWS, window)
    medians = np.median(last, axis=1)
    return bool(medians.max() <= medians.min() * (1 + STEADY_SPREAD))


def one_at_a_time(
    inspector: Inspector, feed: Feed, frames: int, seconds: float | None, tick: Tick = lambda done, of: None
) -> LatencyRun:
    """Time `frames` frames, or for `seconds`.

    A KeyboardInterrupt, or a source that breaks off, ends the run and keeps what there is; before the first frame it is
    raised. Raises `SourceError` when not one frame could be inspected.
    """
    (run,) = _turns((inspector,), feed, frames, seconds, tick, lambda results: None)
    return run


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two packages on the same frames, by turns."""

    ours: LatencyRun
    theirs: LatencyRun
    times_faster: tuple[float, float, float]  # median of the frames' ratios, and its 95 % confidence interval
    verdicts_differ: int
    score_difference_max: float


def by_turns(
    ours: Inspector,
    theirs: Inspector,
    feed: Feed,
    frames: int,
    seconds: float | None,
    tick: Tick = lambda done, of: None,
) -> Comparison:
    """Time two packages frame by frame, so that whatever slows the machine slows both.

    Each frame goes through both; which comes first alternates. Raises as `one_at_a_time` does.
    """
    differ, gap = 0, 0.0

    def compare(results: Sequence[Inspection]) -> None:
        nonlocal differ, gap
        one, other = results
        differ += one.verdict != other.verdict
        gap = max(gap, abs(one.score - other.score))

    first, second = _turns((ours, theirs), feed, frames, seconds, tick, compare)
    count = min(len(first.samples), len(second.samples))
    ratios = second.samples.of("total")[:count] / first.samples.of("total")[:count]
    return Comparison(first, second, median_interval(ratios), differ, gap)


def _turns(
    inspectors: Sequence[Inspector],
    feed: Feed,
    frames: int,
    seconds: float | None,
    tick: Tick,
    look: Callable[[Sequence[Inspection]], None],
) -> list[LatencyRun]:
    """Each frame through all inspectors, forwards and backwards by turns; `look` gets what they said of it."""
    series, failed = [Samples() for _ in inspectors], 0
    cut: BaseException | None = None
    started_s = time.monotonic()
    try:
        with Emitter() as emitter:
            for number, shot in enumerate(_so_many(feed, frames, seconds)):
                order = range(len(inspectors))[:: 1 if number % 2 == 0 else -1]
                try:
                    found = {which: one_frame(inspectors[which], shot, emitter) for which in order}
                except FrameError as error:
                    failed += 1
                    _check_any(series[0], failed, error)
                    continue
                for which, (ms, _) in found.items():
                    series[which].add(ms, time.monotonic())
                look([found[which][1] for which in range(len(inspectors))])
                tick(len(series[0]), 0 if seconds else frames)
    except (KeyboardInterrupt, SourceError) as error:
        if not all(map(len, series)):
            raise
        cut = error
    _check_some(series[0], feed)
    passed_s, count = time.monotonic() - started_s, min(map(len, series))
    ended = cut is None and _is_short(count + failed, passed_s, frames, seconds)
    broken = cut if isinstance(cut, SourceError) else None
    return [LatencyRun(samples, started_s, passed_s, failed, cut is not None, ended, broken) for samples in series]


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median, and its 95 % confidence interval by order statistics.

    Source: Conover, Practical Nonparametric Statistics, section 3.2: ranks n/2 ± 1.96 · sqrt(n)/2.
    """
    ordered = np.sort(values)
    half, count = 1.96 * math.sqrt(len(ordered)) / 2, len(ordered)
    low = max(0, math.floor(count / 2 - half) - 1)
    high = min(count - 1, math.ceil(count / 2 + half))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


def batch_sweep(
    inspector: Inspector, feed: Feed, counts: tuple[int, ...], tick: Tick = lambda done, of: None
) -> list[dict[str, Any]]:
    """Time calls with so many frames each; a KeyboardInterrupt keeps the sizes that are finished."""
    pictures = itertools.cycle(feed.frames)
    found: list[dict[str, Any]] = []
    for count in counts:
        calls: list[float] = []
        try:
            for number in range(CALLS_PER_BATCH + 1):
                batch = [next(pictures) for _ in range(count)]
                started = time.perf_counter()
                inspector.inspect_batch(batch)
                if number:  # the first call of a size makes its buffers
                    calls.append((time.perf_counter() - started) * 1e3)
                tick(number, CALLS_PER_BATCH)
        except KeyboardInterrupt:
            break
        per_frame = statistics.median(calls) / count
        found.append(
            {
                "frames_per_call": count,
                "call_ms": percentiles(np.asarray(calls)),
                "ms_per_frame": per_frame,
                "fps": 1e3 / per_frame,
            }
        )
    return found


def _so_many(feed: Feed, frames: int, seconds: float | None) -> Iterator[Shot]:
    until_s = math.inf if seconds is None else time.monotonic() + seconds
    for number, shot in enumerate(shots(feed)):
        yield shot
        if (seconds is None and number + 1 >= frames) or time.monotonic() >= until_s:
            return


def _is_short(taken: int, passed_s: float, frames: int, seconds: float | None) -> bool:
    """Whether a run is over before it has all that was asked for."""
    return taken < frames if seconds is None else passed_s < seconds


def _check_some(samples: Samples, feed: Feed) -> None:
    if not len(samples):
        raise SourceError(f"'{feed.uri}' gave no frame to time", "Name a source with frames that can be inspected")


def _check_any(samples: Samples, failed: int, error: FrameError) -> None:
    """A source of which nothing can be inspected would never end. Raises `SourceError`."""
    if not len(samples) and failed >= 100:
        raise SourceError(
            f"none of the first {failed} frames can be inspected ({error.cause})", error.remedy
        ) from error
