"""The highest rate at which 99 of 100 frames still meet their deadline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dapo_edge.bench.feed import Feed
from dapo_edge.bench.latency import Tick, one_at_a_time
from dapo_edge.bench.metronome import check_in_memory
from dapo_edge.bench.plan import BenchPlan
from dapo_edge.bench.rate import RateRun, at_rate, deadline_json
from dapo_edge.errors import DeadlineError
from dapo_edge.runtime.inspector import Inspector

STEP = 1.03  # as near as two rates are told apart
PROBE_FRAMES, LEAST_FRAMES = 200, 20
LEAST_PROBE_S = 1.0  # what happens once a second must happen in a probe
CONFIRM = 5  # times as long as a probe
MOST_STEPS = 20  # down from what the probes found
UNLOADED_S = 1.0
FIRST_LOAD, LOWEST_LOAD = 0.5, 0.1  # of what one frame after the other comes to


@dataclass(frozen=True)
class Probe:
    """One rate that was tried."""

    fps: float
    p99_ms: float  # from arrival to written result, of the frames that have one
    misses: int  # frames above the deadline, failed or dropped
    saturated: bool
    met: bool  # not saturated, and the p99 within the deadline


@dataclass(frozen=True, eq=False)
class FoundRate:
    """What a search found."""

    fps: float | None  # None: it was interrupted before any rate met the deadline
    run: RateRun  # the long one that confirms the rate; of an interrupted search the best one, or the last
    probes: tuple[Probe, ...]  # in the order in which they were tried, with the confirming runs


def find_rate(
    inspector: Inspector,
    feed: Feed,
    *,
    deadline_ms: float,
    seconds: float = 4.0,
    progress: Tick = lambda done, of: None,
    tell: Callable[[Probe], None] = lambda probe: None,
) -> FoundRate:
    """The highest rate of one camera whose p99 of "total" lies within the deadline and that the engine keeps up with.

    Doubles from half of what one frame after the other comes to, then halves the interval (in ratios) down to 3 %. A
    probe is 200 frames, but no longer than `seconds` and no shorter than a second, and 20 frames at least; one that
    misses the deadline without saturating the engine is repeated once, because a single hiccup of the machine decides
    its p99. A run of five times the length then confirms the rate, which goes down by 3 % until one does.

    `progress` is of the run in hand, `tell` takes each rate that was tried. A KeyboardInterrupt keeps what was found,
    its run marked `interrupted`; before the first timed frame at a rate it is raised. Raises `DeadlineError` where no
    rate can meet the deadline, `RecipeError` for a live camera, and what `at_rate` raises.
    """
    BenchPlan(deadline_ms=deadline_ms, seconds=seconds, find_rate=True)  # refuses nonsense
    check_in_memory(feed, "finding the highest rate")
    unloaded_s = _unloaded_s(inspector, feed, deadline_ms, progress)
    search = _Search(inspector, feed, deadline_ms, seconds, progress, tell)
    try:
        low, high = search.bracket(1 / unloaded_s)
        return search.confirmed(search.narrowed(low, high))
    except KeyboardInterrupt:
        return search.so_far()


def _unloaded_s(inspector: Inspector, feed: Feed, deadline_ms: float, progress: Tick) -> float:
    """Median seconds of a frame that meets an idle engine. Raises `DeadlineError` where that is too long."""
    run = one_at_a_time(inspector, feed, 1, UNLOADED_S, progress)
    if run.interrupted:
        raise run.error or KeyboardInterrupt
    total, capture, encode = (run.samples.of(stage) for stage in ("total", "capture", "encode"))
    # Of a file capture is reading it, which frames in memory are spared.
    needed_ms = float(np.median(total - capture if len(capture) else total))
    if needed_ms > deadline_ms:
        encoder = f", {np.median(encode):.1f} ms of it in the encoder" if len(encode) else ""
        raise DeadlineError(
            f"a deadline of {deadline_ms:g} ms is below what a frame takes that never waits "
            f"(median {needed_ms:.1f} ms{encoder})",
            "Allow more time, or use a faster precision, a smaller encoder or a smaller map",
        )
    return needed_ms / 1e3


class _Search:
    """What was tried so far."""

    def __init__(
        self,
        inspector: Inspector,
        feed: Feed,
        deadline_ms: float,
        seconds: float,
        progress: Tick,
        tell: Callable[[Probe], None],
    ) -> None:
        self._inspector, self._feed = inspector, feed
        self._deadline_ms, self._seconds = deadline_ms, seconds
        self._progress, self._tell = progress, tell
        self._probes: list[Probe] = []
        self._best: RateRun | None = None  # of the highest rate that was met
        self._last: RateRun | None = None

    def bracket(self, one_by_one_fps: float) -> tuple[float, float]:
        """A rate that meets the deadline and one that does not. Raises `DeadlineError` where none does."""
        fps = FIRST_LOAD * one_by_one_fps
        while not self._holds(fps):
            fps /= 2
            if fps < LOWEST_LOAD * one_by_one_fps:
                raise self._refusal()
        while self._holds(2 * fps):
            fps *= 2
        return fps, 2 * fps

    def narrowed(self, low: float, high: float) -> float:
        """The highest rate that meets the deadline, to 3 %."""
        while high / low > STEP:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._holds(middle) else (low, middle)
        return low

    def confirmed(self, fps: float) -> FoundRate:
        """The rate that a long run holds, this one or a lower one. Raises `DeadlineError` where none does."""
        for step in range(MOST_STEPS):
            run, met = self._probe(fps / STEP**step, CONFIRM)
            if met:
                return FoundRate(run.fps, run, tuple(self._probes))
        raise self._refusal()

    def so_far(self) -> FoundRate:
        """What an interrupted search has. Raises `KeyboardInterrupt` where that is nothing."""
        run = self._best or self._last
        if run is None:
            raise KeyboardInterrupt
        return FoundRate(self._best.fps if self._best else None, replace(run, interrupted=True), tuple(self._probes))

    def _holds(self, fps: float) -> bool:
        run, met = self._probe(fps)
        if not met and not run.saturated:
            _, met = self._probe(fps)
        return met

    def _probe(self, fps: float, times: int = 1) -> tuple[RateRun, bool]:
        """A run at a rate, and whether it met the deadline. An interrupted one is kept, but says nothing."""
        seconds = times * min(max(PROBE_FRAMES / fps, LEAST_PROBE_S), self._seconds)
        frames = max(times * LEAST_FRAMES, round(fps * seconds))
        run = at_rate(self._inspector, self._feed, fps=fps, frames=frames, progress=self._progress)
        self._last = run
        if run.interrupted:
            raise KeyboardInterrupt
        within = deadline_json(run.samples, self._deadline_ms, lost=run.lost)
        met = within["met"] and not run.saturated
        p99_ms = float(np.percentile(run.samples.of("total"), 99))
        probe = Probe(fps, p99_ms, within["misses"], run.saturated, met)
        self._probes.append(probe)
        if met and (self._best is None or fps >= self._best.fps):
            self._best = run
        self._tell(probe)
        return run, met

    def _refusal(self) -> DeadlineError:
        last = self._probes[-1]
        return DeadlineError(
            f"a deadline of {self._deadline_ms:g} ms is missed by more than 1 % of the frames even at {last.fps:.3g} "
            f"frames/s, where hardly any waits (p99 {last.p99_ms:.1f} ms)",
            "Allow more time, or find out what else runs on this machine",
        )
