"""Frames that arrive by a clock, whether the engine is ready or not: the time that they wait counts.

A loop that takes the next frame when the last one is done never sees a frame wait: one stall costs it one slow frame,
where a line would have had a row of them. Here the real line runtime is fed at the asked rate, and a frame's "total"
is from its arrival to its written result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_edge.bench.clocked import ClockedLine
from dapo_edge.bench.feed import Feed
from dapo_edge.bench.latency import Tick
from dapo_edge.bench.metronome import Flood, MemoryCamera, Metronome, check_in_memory
from dapo_edge.bench.plan import BenchPlan
from dapo_edge.bench.samples import Samples, percentiles
from dapo_edge.errors import SourceError
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.plan import CameraPlan

WARM_UP = 10  # frames of each camera: the runtime's own threads and rings
SHORT = 0.98  # of a rate: less is told
LEAST_GROWTH = 3  # intervals between two frames: by so much longer they take at the end of a run than at its beginning
LEAST_BACKLOG_S, BACKLOG_SHARE = 2.0, 0.2  # of the run: when frames wait longer, the rest would only take longer
LEAST_TIMED = 10  # frames of all cameras, however far behind
START_S = 0.05  # for threads to start before the first frame is due
FOR_EVER_MS = 1e300  # how long a lost frame takes. Percentiles calculate with it, which infinity spoils


@dataclass(frozen=True, eq=False)
class RateRun:
    """What came of frames that arrived at a rate. captured = inspected + dropped + failed, of the frames that count."""

    fps: float  # asked for, of each camera
    cameras: int
    samples: Samples
    started_s: float  # arrival of the first frame that counts, by time.monotonic
    seconds: float  # until the last result was written
    inspected: int
    dropped: int  # by the camera or the line; not those that the end of the run cut off
    failed: int
    offered_fps: float  # arrivals per second of all cameras together
    achieved_fps: float  # results per second, between the first and the last one
    saturated: bool  # the engine can't keep up; see `at_rate`
    source_too_slow: bool  # a camera gave less than 98 % of what was asked for
    interrupted: bool  # by Ctrl-C, or because the source broke off: all of this is of a part of the run
    error: SourceError | None = None  # with which the source broke off

    @property
    def captured(self) -> int:
        """Frames that count."""
        return self.inspected + self.dropped + self.failed

    @property
    def lost(self) -> int:
        """Frames without a result."""
        return self.dropped + self.failed

    def as_json(self) -> dict[str, Any]:
        """As in the bench document's "rate"."""
        return {
            "asked_fps": self.fps,
            "cameras": self.cameras,
            "offered_fps": self.offered_fps,
            "achieved_fps": self.achieved_fps,
            "captured": self.captured,
            "inspected": self.inspected,
            "dropped": self.dropped,
            "failed": self.failed,
            "saturated": self.saturated,
            "source_too_slow": self.source_too_slow,
        }


def at_rate(
    inspector: Inspector,
    feed: Feed,
    *,
    fps: float,
    cameras: int = 1,
    frames: int | None = None,
    seconds: float | None = None,
    warm_up: int = WARM_UP,
    progress: Tick = lambda done, of: None,
) -> RateRun:
    """Let frames arrive at `fps` of each camera, and time `frames` of each (default 200), or as many as in `seconds`.

    Frames in memory arrive by the clock, cameras one after the other within an interval; none is dropped. A live camera
    is its own clock: what it gives is told in `offered_fps`, whatever was asked. `warm_up`: frames of each camera that
    come before those. `progress` is called in the caller's thread, and may raise.

    Saturated: the queue grows, so that in the last fifth of the run the median frame takes longer than in the first
    fifth by more than three intervals between frames. When a frame waits for more than 2 s (or 20 % of the run) to be
    taken at all, the run is saturated and ends, as soon as ten frames are timed. Of live cameras: more than 2 % are
    dropped for newer ones.

    KeyboardInterrupt: what was timed is returned, marked `interrupted`; before the first frame that counts it is
    raised. Raises `RecipeError` for what can't be measured, `SourceError` for a camera that is not there and when not
    one frame could be timed, and what the engine raises.
    """
    frames = BenchPlan.frames if frames is None else frames
    BenchPlan(frames=frames, seconds=seconds, warm_up=warm_up, rate_fps=fps, cameras=(cameras,))  # refuses nonsense
    count = frames if seconds is None else max(1, round(seconds * fps))
    if feed.live:
        taken = None if seconds is not None else warm_up + count
        plans = [CameraPlan(f"camera {number}", feed.full_uri, frames=taken) for number in range(cameras)]
        line = ClockedLine(inspector, feed, plans, warm_up=warm_up * cameras)
        interrupted = line.run(count * cameras, seconds, progress)
        return _of_live(line, fps, cameras, interrupted)
    metronomes = _metronomes(feed, cameras, fps, warm_up, count)
    line = _in_memory(inspector, feed, metronomes, warm_up)
    interrupted = line.run(count * cameras, None, progress)
    return _of_memory(line, fps, cameras, interrupted, any(source.gave_up for source in metronomes.values()))


def flat_out(
    inspector: Inspector, feed: Feed, *, cameras: int, seconds: float, progress: Tick = lambda done, of: None
) -> float | None:
    """Frames per second of so many cameras together where a new frame is there whenever one was taken.

    None when a KeyboardInterrupt cut it short. Errors are those of `at_rate`.
    """
    sources = {f"camera {number}": Flood(feed, number) for number in range(cameras)}
    line = _in_memory(inspector, feed, sources, WARM_UP)
    interrupted = line.run(0, seconds, progress)
    return None if interrupted else _results_per_second(line.clock.samples)


def camera_sweep(
    inspector: Inspector,
    feed: Feed,
    counts: Sequence[int],
    *,
    fps: float | None = None,
    seconds: float = 4.0,
    deadline_ms: float | None = None,
    progress: Tick = lambda done, of: None,
) -> list[dict[str, Any]]:
    """What so many cameras get, for each of `counts`; latencies are from arrival to written result.

    With `fps` of each camera: how long frames take, how many miss the deadline, whether the engine keeps up. Without:
    only how many frames per second all of them get together at most, each frame held back until there is room for it;
    how long one takes then says more about the length of the queues than about the engine.

    A KeyboardInterrupt leaves out the count in hand and those after it. Raises `RecipeError` for a live camera.
    """
    check_in_memory(feed, "a sweep over cameras")
    rows: list[dict[str, Any]] = []
    for count in counts:
        row: dict[str, Any] = {"cameras": count, "fps_per_camera": fps, "offered_fps": None}
        unknown = dict.fromkeys(("p50_ms", "p99_ms", "misses", "saturated"))
        try:
            if fps is None:
                most = flat_out(inspector, feed, cameras=count, seconds=seconds, progress=progress)
                if most is None:
                    break
                rows.append({**row, "achieved_fps": most, **unknown})
                continue
            run = at_rate(inspector, feed, fps=fps, cameras=count, seconds=seconds, progress=progress)
        except KeyboardInterrupt:
            break
        if run.interrupted:
            break
        rows.append({**row, **_row(run, deadline_ms)})
    return rows


def deadline_json(samples: Samples, deadline_ms: float, *, lost: int = 0) -> dict[str, Any]:
    """How many frames took longer than the deadline, or were `lost`: failed or dropped.

    Met: the p99 of "total" lies within the deadline, where a lost frame counts as one that takes for ever.
    """
    total = samples.of("total")
    misses = int((total > deadline_ms).sum()) + lost
    p99 = float(np.percentile(np.append(total, [FOR_EVER_MS] * lost), 99))
    return {"ms": deadline_ms, "misses": misses, "share": misses / (len(total) + lost), "met": p99 <= deadline_ms}


def jitter(samples: Samples) -> dict[str, float]:
    """How much "total" varies."""
    total = percentiles(samples.of("total"))
    return {"std_ms": total["std"], "p99_minus_p50_ms": total["p99"] - total["p50"]}


def _metronomes(feed: Feed, cameras: int, fps: float, warm_up: int, count: int) -> dict[str, Metronome]:
    """Cameras that tick one after the other within an interval."""
    start_s, give_up_s = time.monotonic() + START_S, max(LEAST_BACKLOG_S, BACKLOG_SHARE * count / fps)
    return {
        f"camera {number}": Metronome(
            feed,
            number,
            start_s=start_s + number / cameras / fps,
            fps=fps,
            frames=warm_up + count,
            least=warm_up + math.ceil(LEAST_TIMED / cameras),
            give_up_s=give_up_s,
        )
        for number in range(cameras)
    }


def _in_memory(inspector: Inspector, feed: Feed, sources: Mapping[str, MemoryCamera], warm_up: int) -> ClockedLine:
    plans = [CameraPlan(name, name, policy="wait") for name in sources]
    return ClockedLine(inspector, feed, plans, warm_up=warm_up * len(sources), sources=sources)


def _of_memory(line: ClockedLine, fps: float, cameras: int, interrupted: bool, gave_up: bool) -> RateRun:
    samples, offered = line.clock.samples, fps * cameras
    saturated = gave_up or _falls_behind(samples, offered)
    return _rate_run(line, fps, cameras, offered, saturated=saturated, interrupted=interrupted)


def _of_live(line: ClockedLine, fps: float, cameras: int, interrupted: bool) -> RateRun:
    clock, dropped = line.clock, line.dropped
    captured = clock.done + sum(dropped.values())
    assert clock.first_s is not None, "a frame was timed"
    offered = _per_second(captured, clock.last_s - clock.first_s)
    saturated = dropped["policy"] > (1 - SHORT) * captured
    return _rate_run(line, fps, cameras, offered, saturated=saturated, interrupted=interrupted)


def _rate_run(
    line: ClockedLine, fps: float, cameras: int, offered_fps: float, *, saturated: bool, interrupted: bool
) -> RateRun:
    clock = line.clock
    assert clock.first_s is not None, "a frame was timed"
    return RateRun(
        fps=fps,
        cameras=cameras,
        samples=clock.samples,
        started_s=clock.first_s,
        seconds=float(clock.samples.done_s()[-1]) - clock.first_s,
        inspected=len(clock.samples),
        dropped=sum(line.dropped.values()),
        failed=clock.failed,
        offered_fps=offered_fps,
        achieved_fps=_results_per_second(clock.samples),
        saturated=saturated,
        source_too_slow=0 < offered_fps < SHORT * fps * cameras,
        interrupted=interrupted,
        error=line.broken,
    )


def _falls_behind(samples: Samples, offered_fps: float) -> bool:
    total, fifth = samples.of("total"), max(1, len(samples) // 5)
    growth_ms = np.median(total[-fifth:]) - np.median(total[:fifth])
    return bool(growth_ms > LEAST_GROWTH * 1e3 / offered_fps)


def _results_per_second(samples: Samples) -> float:
    done_s = samples.done_s()
    return _per_second(len(done_s), float(done_s[-1] - done_s[0]))


def _per_second(count: int, seconds: float) -> float:
    """`seconds` from the first to the last; 0 of a single one, which has no rate."""
    return (count - 1) / seconds if count > 1 and seconds > 0 else 0.0


def _row(run: RateRun, deadline_ms: float | None) -> dict[str, Any]:
    total = percentiles(run.samples.of("total"))
    misses = None if deadline_ms is None else deadline_json(run.samples, deadline_ms, lost=run.lost)["misses"]
    return {
        "offered_fps": run.offered_fps,
        "achieved_fps": run.achieved_fps,
        "p50_ms": total["p50"],
        "p99_ms": total["p99"],
        "misses": misses,
        "saturated": run.saturated,
    }
