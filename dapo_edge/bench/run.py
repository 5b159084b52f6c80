"""One benchmark: warm up, measure, and write down all that the numbers depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dapo_edge.bench.bystanders import Bystanders
from dapo_edge.bench.feed import Feed, open_feed
from dapo_edge.bench.latency import Comparison, LatencyRun, WarmUp, batch_sweep, by_turns, one_at_a_time, warm_up
from dapo_edge.bench.metronome import check_in_memory
from dapo_edge.bench.plan import BenchPlan
from dapo_edge.bench.provenance import provenance
from dapo_edge.bench.rate import SHORT, RateRun, at_rate, camera_sweep, deadline_json, jitter
from dapo_edge.bench.samples import Samples
from dapo_edge.bench.search import FoundRate, Probe, find_rate
from dapo_edge.bench.sensors import Sensors
from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.runtime.inspector import Inspector

SCHEMA = "dapo-edge bench 2"
PROBE_S = 4.0
SWEEP_S = 4.0
LEAST_FOR_P99 = 100
MOST_OTHERS = 0.05  # of all processors, that other programs may take unsaid
LEAST_FOR_INTERVAL = 6  # pairs: all of fewer hold the median in less than 95 of 100 cases

Progress = Callable[[str, int, int], None]  # step, done, of; may raise KeyboardInterrupt


@dataclass
class _Measured:
    """What a run has found so far."""

    samples: Samples
    started_s: float
    seconds: float
    failed: int = 0
    dropped: int = 0
    interrupted: bool = False
    error: SourceError | None = None  # with which the source broke off
    warnings: list[str] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)  # of the document


@dataclass
class _Sweeps:
    """Rows of the document."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    cameras: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False


def bench(
    inspector: Inspector,
    plan: BenchPlan | None = None,
    *,
    compare: Inspector | None = None,
    command: Sequence[str] = (),
    progress: Progress = lambda step, done, of: None,
) -> dict[str, Any]:
    """Measure by `plan`, and return the document of `dapo-edge bench --json`; times are milliseconds.

    `compare` is timed on the same frames by turns. A KeyboardInterrupt keeps what was measured, marked "interrupted";
    before the first timed frame it is raised. Raises `SourceError` for a source without frames, `DeadlineError` where
    no rate can meet the deadline, and `RecipeError` for a comparison at a rate and for a live camera where frames must
    be in memory.
    """
    plan = plan or BenchPlan()
    feed = _checked_feed(plan, alone=compare is None)
    for other in (compare,) if compare else ():
        warm_up(other, feed, plan.warm_up, _step(progress, "warming up the other package"))
    warm = warm_up(inspector, feed, plan.warm_up, _step(progress, "warming up"))
    with Sensors() as sensors:
        bystanders = Bystanders()
        found = _measured(inspector, plan, feed, compare, progress)
        others = bystanders.summary()
        # By turns with another package, the energy is that of both.
        frames = 0 if compare else len(found.samples)
        sensed = sensors.summary(found.started_s, found.started_s + found.seconds, frames)
        timeline = found.samples.timeline(found.started_s)
        sensors.annotate(timeline, found.started_s)
        sweeps = _sweeps(inspector, plan, feed, progress) if not found.interrupted else _Sweeps()
    warnings = [*_warnings(plan, warm, found, sweeps, others.get("share", 0.0)), *sensed.pop("warnings")]
    return {
        "schema": SCHEMA,
        **provenance(command),
        **_setting(inspector, plan, feed),
        "interrupted": found.interrupted or sweeps.interrupted,
        "error": None if found.error is None else {"cause": found.error.cause, "remedy": found.error.remedy},
        "warm_up": asdict(warm),
        **_figures(plan, found),
        "sweeps": {"batches": sweeps.batches, "cameras": sweeps.cameras},
        "histogram": found.samples.histogram(),
        "cdf": found.samples.cdf(),
        "timeline": timeline,
        **sensed,
        "others": others,
        "warnings": [*feed.warnings, *found.warnings, *warnings],
    }


def _checked_feed(plan: BenchPlan, *, alone: bool) -> Feed:
    """The source; what it and the plan can't do together is refused before anything is timed."""
    if not alone and (plan.rate_fps is not None or plan.find_rate):
        raise RecipeError(
            "two packages are compared one frame at a time, not at a rate",
            "Leave out --rate and --find-rate, or measure each alone",
        )
    feed = open_feed(plan.source)
    if plan.swept_cameras:
        check_in_memory(feed, "a sweep over cameras")
    return feed


def _setting(inspector: Inspector, plan: BenchPlan, feed: Feed) -> dict[str, Any]:
    return {
        "package": _package(inspector),
        "backend": inspector.backend.name,
        "precision": inspector.backend.precision,
        "source": {
            "uri": feed.uri,
            "width": feed.width,
            "height": feed.height,
            "distinct_frames": None if feed.live else len(feed.frames),
            "live": feed.live,
        },
        "mode": _mode(plan),
    }


def _figures(plan: BenchPlan, found: _Measured) -> dict[str, Any]:
    samples, lost = found.samples, found.failed + found.dropped
    fps = len(samples) / max(found.seconds, 1e-9)
    if "rate" in found.parts:  # counted from the first arrival, n frames fill n - 1 intervals
        fps = found.parts["rate"]["achieved_fps"]
    elif "compare" in found.parts:  # it also runs for the other package
        fps = 1e3 / float(samples.of("total").mean())
    return {
        "frames": len(samples),
        "failed": found.failed,
        "seconds": round(found.seconds, 3),
        "fps": fps,
        "stages": samples.stages(),
        "jitter_ms": jitter(samples),
        "deadline": None if plan.deadline_ms is None else deadline_json(samples, plan.deadline_ms, lost=lost),
        **dict.fromkeys(("rate", "find_rate", "compare")),
        **found.parts,
    }


def _mode(plan: BenchPlan) -> str:
    if plan.find_rate:
        return "find-rate"
    return "latency" if plan.rate_fps is None else "rate"


def _package(inspector: Inspector) -> dict[str, Any]:
    manifest, size = inspector.package.manifest, inspector.map_size
    return {
        "name": manifest.name,
        "digest": inspector.package.digest,
        "backbone": manifest.backbone,
        "image_size": manifest.image_size,
        "map_size": size if isinstance(size, str) else list(size),
        "batch": manifest.batch,
        "defects": len(inspector.package.bank().names) - 1,
    }


def _measured(
    inspector: Inspector, plan: BenchPlan, feed: Feed, compare: Inspector | None, progress: Progress
) -> _Measured:
    tick = _step(progress, "timing frames")
    if plan.find_rate:
        return _of_search(_search(inspector, plan, feed, progress))
    if plan.rate_fps is not None:
        count = plan.cameras[0] if len(plan.cameras) == 1 else 1
        return _of_rate(
            at_rate(
                inspector,
                feed,
                fps=plan.rate_fps,
                cameras=count,
                frames=plan.frames,
                seconds=plan.seconds,
                progress=tick,
            )
        )
    if compare is not None:
        return _of_comparison(by_turns(inspector, compare, feed, plan.frames, plan.seconds, tick), compare)
    return _of_latency(one_at_a_time(inspector, feed, plan.frames, plan.seconds, tick))


def _search(inspector: Inspector, plan: BenchPlan, feed: Feed, progress: Progress) -> FoundRate:
    assert plan.deadline_ms is not None, "the plan asks for it"
    last = [""]

    def tell(probe: Probe) -> None:
        last[0] = f": {probe.fps:.3g} frames/s {'meet' if probe.met else 'miss'} it"

    return find_rate(
        inspector,
        feed,
        deadline_ms=plan.deadline_ms,
        seconds=plan.seconds or PROBE_S,
        progress=lambda done, of: progress(f"finding the rate{last[0]}", done, of),
        tell=tell,
    )


def _of_latency(run: LatencyRun) -> _Measured:
    found = _Measured(run.samples, run.started_s, run.seconds, run.failed, 0, run.interrupted, run.error)
    if run.ended:
        found.warnings.append(f"the source ended after {len(run.samples)} frames")
    return found


def _of_comparison(both: Comparison, compare: Inspector) -> _Measured:
    found = _of_latency(both.ours)
    median, low, high = both.times_faster
    pairs = len(both.theirs.samples)
    if pairs < LEAST_FOR_INTERVAL:
        found.warnings.append(f"{pairs} pairs of frames are too few for 95 %: time {LEAST_FOR_INTERVAL} at least")
    found.parts["compare"] = {
        "package": _package(compare),
        "backend": compare.backend.name,
        "precision": compare.backend.precision,
        "stages": both.theirs.samples.stages(),
        "times_faster": {"median": median, "low": low, "high": high},
        "pairs": pairs,
        "verdicts_differ": both.verdicts_differ,
        "score_difference_max": both.score_difference_max,
    }
    return found


def _of_rate(run: RateRun) -> _Measured:
    found = _Measured(run.samples, run.started_s, run.seconds, run.failed, run.dropped, run.interrupted, run.error)
    found.parts["rate"] = run.as_json()
    if run.source_too_slow:
        asked = run.fps * run.cameras
        found.warnings.append(f"the source gave {run.offered_fps:.1f} of the {asked:g} frames/s that were asked for")
    if run.offered_fps > run.fps * run.cameras / SHORT:
        found.warnings.append(
            f"the source is its own clock: it gave {run.offered_fps:.1f} frames/s where {run.fps * run.cameras:g} were "
            "asked for, and the times are those of its own rate"
        )
    if run.saturated:
        found.warnings.append(
            f"the engine can't keep up: {run.achieved_fps:.1f} of {run.offered_fps:.1f} frames/s, "
            "and the waiting frames grow more; latencies depend on how long the run was"
        )
    return found


def _of_search(search: FoundRate) -> _Measured:
    found = _of_rate(search.run)
    found.parts["find_rate"] = {"fps": search.fps, "probes": [asdict(probe) for probe in search.probes]}
    return found


def _sweeps(inspector: Inspector, plan: BenchPlan, feed: Feed, progress: Progress) -> _Sweeps:
    """Interrupted, a sweep is shorter than it was asked for, and none comes after it."""
    found = _Sweeps()
    if plan.batches:
        found.batches = batch_sweep(inspector, feed, plan.batches, _step(progress, "timing calls of many frames"))
        found.interrupted = len(found.batches) < len(plan.batches)
    if plan.swept_cameras and not found.interrupted:
        found.cameras = camera_sweep(
            inspector,
            feed,
            plan.swept_cameras,
            fps=plan.rate_fps,
            seconds=SWEEP_S,
            deadline_ms=plan.deadline_ms,
            progress=_step(progress, "timing many cameras"),
        )
        found.interrupted = len(found.cameras) < len(plan.swept_cameras)
    return found


def _warnings(plan: BenchPlan, warm: WarmUp, found: _Measured, sweeps: _Sweeps, others: float) -> list[str]:
    """`others`: which share of the processors was somebody else's."""
    warnings = []
    if others > MOST_OTHERS:
        warnings.append(
            f"other programs, or other guests of this computer, took {others:.0%} of its processors meanwhile"
        )
    if found.interrupted:
        why = f" ({found.error.cause})" if found.error else ""
        warnings.append(f"interrupted after {len(found.samples)} frames{why}: the figures are of a part of the run")
    if sweeps.interrupted:
        warnings.append("interrupted during the sweeps: what is there of them is complete")
    if warm.steady is False:
        warnings.append(
            f"times were not steady after {warm.seconds:.0f} s of warm-up: something else runs on this machine, "
            "or its clocks change"
        )
    if len(found.samples) < LEAST_FOR_P99:
        warnings.append(f"p99 of {len(found.samples)} frames is little more than the slowest: time {LEAST_FOR_P99}")
    if found.failed:
        warnings.append(f"{found.failed} frames could not be inspected")
    encode = found.samples.of("encode")
    if plan.deadline_ms is not None and len(encode) and plan.deadline_ms < encode.min():
        warnings.append(
            f"the deadline of {plan.deadline_ms:g} ms lies below what the encoder alone takes "
            f"({encode.min():.1f} ms at best)"
        )
    return warnings


def _step(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, of: progress(name, done, of)
