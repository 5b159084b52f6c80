"""Frames at a rate: that waiting counts, that overload is said and ends, and what interruptions leave."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from line_fakes import scripted, until
from rate_fakes import Engine, feed

from dapo_edge.bench import clocked, rate
from dapo_edge.bench.latency import one_at_a_time
from dapo_edge.bench.rate import RateRun, _falls_behind, at_rate, camera_sweep, deadline_json, jitter
from dapo_edge.bench.samples import Samples
from dapo_edge.errors import BackendError, FrameError, RecipeError, SourceError
from dapo_edge.structures import Frame

ATTEMPTS = 3  # at what a busy machine can spoil


def run(engine: Engine, fps: float, **options: Any) -> RateRun:
    return at_rate(engine, options.pop("feed", None) or feed(), fps=fps, **options)  # type: ignore[arg-type]


def p99(samples: Samples) -> float:
    return float(np.percentile(samples.of("total"), 99))


def test_a_stall_shows_in_what_arrives_by_the_clock_and_hides_in_a_loop() -> None:
    """The harness' own test: 50 ms once a second are one slow frame of a loop, but a row of waiting frames."""
    stalled = run(Engine(0.002, stall_s=0.05), 100, seconds=2.6)
    assert p99(stalled.samples) >= 40
    assert stalled.samples.of("total").max() >= 45
    assert (stalled.samples.of("total") > 12).sum() >= 2 * 3  # frames that waited behind each of the stalls
    assert not stalled.saturated
    assert any(p99(looped(Engine(0.002, stall_s=0.05))) < 10 for _ in range(ATTEMPTS))
    assert any(p99(run(Engine(0.002), 100, seconds=1).samples) < 10 for _ in range(ATTEMPTS))


def looped(engine: Engine) -> Samples:
    samples = one_at_a_time(engine, feed(), 1, 1.5).samples  # type: ignore[arg-type]
    assert samples.of("total").max() >= 45
    return samples


def test_what_a_run_says() -> None:
    ticks: list[tuple[int, int]] = []
    engine = Engine(0.001)
    found = run(engine, 100, frames=60, warm_up=5, progress=lambda done, of: ticks.append((done, of)))
    assert len(engine.seen) == 65
    assert len(found.samples) == 60
    assert list(found.samples.stages()) == ["capture", "wait", "encode", "emit", "total"]
    parts = sum(found.samples.of(stage) for stage in ("capture", "wait", "encode", "emit"))
    assert (found.samples.of("total") >= parts - 0.05).all()
    assert found.as_json() == {
        "asked_fps": 100,
        "cameras": 1,
        "offered_fps": 100,
        "achieved_fps": pytest.approx(100, rel=0.03),
        "captured": 60,
        "inspected": 60,
        "dropped": 0,
        "failed": 0,
        "saturated": False,
        "source_too_slow": False,
    }
    assert found.seconds == pytest.approx(0.6, abs=0.1)
    assert found.started_s == pytest.approx(engine.seen[5][0])
    assert not found.interrupted
    assert ticks[-1] == (60, 60)


def test_the_copy_that_a_driver_makes_is_no_waiting() -> None:
    found = run(Engine(0.0), 50, feed=feed(size="1920x1080"), frames=20, warm_up=2).samples
    assert np.median(found.of("capture")) > 0.1
    parts = sum(found.of(stage) for stage in ("capture", "wait", "encode", "emit"))
    assert (parts <= found.of("total") + 0.05).all()


def test_frames_arrive_by_the_clock_even_while_nobody_can_take_them() -> None:
    engine = Engine(0.03)
    run(engine, 50, frames=20, warm_up=0)
    arrivals = [arrived_s for arrived_s, _ in engine.seen]
    np.testing.assert_allclose(np.diff(arrivals), 1 / 50, atol=1e-6)


def test_two_cameras_take_turns_within_an_interval() -> None:
    engine = Engine(0.0)
    found = run(engine, 50, cameras=2, frames=20, warm_up=2)
    arrivals = sorted(arrived_s for arrived_s, _ in engine.seen)
    np.testing.assert_allclose(np.diff(arrivals), 1 / 100, atol=1e-6)
    assert sorted(index for _, index in engine.seen) == sorted([*range(22), *range(22)])
    assert (found.captured, found.offered_fps) == (40, 100)


def test_overload_is_said_and_ends_early() -> None:
    started = time.monotonic()
    found = run(Engine(0.01), 1000, seconds=5)  # would take 50 s
    assert time.monotonic() - started < 5
    assert found.saturated
    assert found.achieved_fps < 110
    assert found.offered_fps == 1000
    assert 10 <= found.captured == found.inspected < 1000
    assert p99(found.samples) > 1500  # what waited says so


def test_a_very_slow_engine_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "LEAST_BACKLOG_S", 0.05)
    found = run(Engine(0.05), 1000, frames=100, warm_up=6)
    assert found.saturated
    assert 10 <= found.captured < 20


def test_a_little_too_much_is_overload_too() -> None:
    assert run(Engine(0.01), 130, seconds=1).saturated
    assert not run(Engine(0.01), 60, seconds=0.5).saturated


def test_a_queue_that_grows_by_one_in_a_hundred_is_overload_in_the_long_run() -> None:
    def arriving(fps: float, slower: float, jump_ms: float = 0.0) -> Samples:
        samples = Samples()
        for number in range(10_000):
            late_ms = number * slower * 1e3 / fps + (jump_ms if number > 9_950 else 0)
            samples.add({"total": 8 + late_ms}, number / fps + late_ms / 1e3)
        return samples

    assert _falls_behind(arriving(100, 0.01), 100)
    assert not _falls_behind(arriving(100, 0.0), 100)
    assert not _falls_behind(arriving(100, 0.0, jump_ms=5000), 100), "a stall at the end is no growth"


def test_a_failed_frame_is_a_miss() -> None:
    def fault(frame: Frame) -> FrameError | None:
        return FrameError("it is torn", "Look at the cable") if frame.index in (3, 12, 15) else None

    found = run(Engine(0.0, fault=fault), 200, frames=50, warm_up=10)
    assert (found.captured, found.inspected, found.failed, found.lost) == (50, 48, 2, 2)
    assert found.achieved_fps < 0.98 * found.offered_fps
    assert not found.saturated  # nothing waited
    assert deadline_json(found.samples, 1000, lost=found.lost) == {"ms": 1000, "misses": 2, "share": 0.04, "met": False}


def test_nothing_but_failed_frames_is_an_error() -> None:
    engine = Engine(0.0, fault=lambda frame: FrameError("it is torn", "Look at the cable"))
    with pytest.raises(SourceError, match=r"none of 20 frames can be inspected \(it is torn\)\. Look at the cable\."):
        run(engine, 200, frames=20, warm_up=0)


def test_an_engine_that_breaks_is_an_error() -> None:
    engine = Engine(0.0, fault=lambda frame: BackendError("it broke", "Mend it") if frame.index == 9 else None)
    with pytest.raises(BackendError, match="it broke"):
        run(engine, 200, frames=20, warm_up=0)


def interrupt(done: int, of: int) -> None:
    if done:
        raise KeyboardInterrupt


def test_an_interruption_keeps_what_was_timed() -> None:
    found = run(Engine(0.0), 100, seconds=60, warm_up=2, progress=interrupt)
    assert found.interrupted
    assert 1 <= len(found.samples) < 1000
    assert found.captured == len(found.samples)


def test_a_signal_keeps_what_was_timed_too() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        found = run(Engine(0.0), 100, seconds=60)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert found.interrupted
    assert len(found.samples) > 5


def test_a_second_signal_at_once_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def twice(done: int, of: int) -> None:
        if done:
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = run(Engine(0.35), 20, seconds=60, warm_up=1, progress=twice)  # busy when the second one comes
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.interrupted
    assert found.captured == len(found.samples) >= 1
    assert not caplog.records


def test_an_interruption_before_the_first_frame_is_raised_and_nothing_runs_on() -> None:
    def at_once(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Engine(0.0), 10, seconds=60, warm_up=100, progress=at_once)
    names = ("bench", "camera", "inspect", "sink")
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith(names)], 2)


def test_a_live_camera_is_its_own_clock_and_too_slow_is_said() -> None:
    camera = feed("synthetic://64x64@25?realtime=1&loop=2", live=True)
    found = run(Engine(0.0), 50, feed=camera, frames=20, warm_up=2)
    assert found.source_too_slow
    assert found.offered_fps == pytest.approx(25, rel=0.1)
    assert found.captured == found.inspected == 20
    assert "capture" not in found.samples.stages()
    assert not found.saturated
    fast_enough = run(Engine(0.0), 20, feed=camera, seconds=0.5, warm_up=0)
    assert not fast_enough.source_too_slow
    assert 10 <= fast_enough.captured <= 20


def test_one_frame_has_no_rate() -> None:
    found = run(Engine(0.0), 50, feed=feed("synthetic://64x64@50?realtime=1&frames=1", live=True), frames=1, warm_up=0)
    assert (found.captured, found.offered_fps, found.achieved_fps) == (1, 0, 0)
    assert not found.source_too_slow
    assert not found.saturated


def test_a_live_camera_without_one_good_frame_ends_all_the_same() -> None:
    engine = Engine(0.0, fault=lambda frame: FrameError("it is torn", "Look at the cable"))
    with pytest.raises(SourceError, match=r"none of \d+ frames can be inspected"):
        run(engine, 50, feed=feed("synthetic://64x64@100?realtime=1&loop=2", live=True), seconds=0.2, warm_up=0)


def test_what_a_live_camera_gives_too_much_is_dropped_and_counts() -> None:
    found = run(Engine(0.02), 100, feed=feed("synthetic://64x64@100?realtime=1&loop=2", live=True), frames=100)
    assert found.saturated
    assert found.dropped > 20
    assert found.captured == found.inspected + found.dropped == pytest.approx(100, abs=10)
    assert deadline_json(found.samples, 1e6, lost=found.lost)["misses"] == found.dropped


def test_a_live_camera_that_ends_before_it_counts() -> None:
    camera = feed("synthetic://64x64@100?realtime=1&frames=5", live=True)
    with pytest.raises(SourceError, match="ended before the first frame that counts"):
        run(Engine(0.0), 100, feed=camera, frames=20, warm_up=10)


def test_a_live_camera_that_stays_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocked, "CAMERA_S", 0.5)
    gone = SourceError("nobody answers", "Plug it in")
    with (
        scripted(belt=itertools.repeat([gone])),
        pytest.raises(SourceError, match=r"gave no frame for 0\.5 s \(nobody"),
    ):
        run(Engine(0.0), 100, feed=feed("camera://belt", live=True), frames=20)


def test_frames_in_memory_may_be_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocked, "CAMERA_S", 0.3)
    assert run(Engine(0.0), 0.5, cameras=2, frames=1, warm_up=0).captured == 2


def test_one_of_two_live_cameras_that_stays_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocked, "CAMERA_S", 0.5)
    gone = SourceError("nobody answers", "Plug it in")
    with scripted(belt=itertools.chain([range(5)], itertools.repeat([gone]))):
        found = run(Engine(0.0), 100, cameras=2, feed=feed("camera://belt", live=True), frames=5, warm_up=0)
    assert found.interrupted
    assert 0 < found.captured <= 5, "what the other one gave is kept"
    assert "gave no frame for 0.5 s" in str(found.error)


@pytest.mark.parametrize(
    "options",
    [{"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"frames": 0}, {"seconds": 0.0}, {"cameras": 0}, {"warm_up": -1}],
)
def test_what_can_t_be_measured(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        run(Engine(0.0), **{"fps": 10, **options})


def of(*total_ms: float) -> Samples:
    samples = Samples()
    for number, ms in enumerate(total_ms):
        samples.add({"total": ms}, float(number))
    return samples


def test_deadlines() -> None:
    samples = of(*[5.0] * 199, 30.0)
    assert deadline_json(samples, 20) == {"ms": 20, "misses": 1, "share": 1 / 200, "met": True}
    assert deadline_json(samples, 30)["misses"] == 0
    assert deadline_json(samples, 4) == {"ms": 4, "misses": 200, "share": 1, "met": False}
    assert deadline_json(samples, 20, lost=1) == {"ms": 20, "misses": 2, "share": 2 / 201, "met": True}
    assert deadline_json(samples, 30, lost=3) == {"ms": 30, "misses": 3, "share": 3 / 203, "met": False}


def test_jitter() -> None:
    assert jitter(of(4.0, 4.0, 4.0)) == {"std_ms": 0, "p99_minus_p50_ms": 0}
    spread = jitter(of(*np.arange(0.0, 101.0)))
    assert spread == {"std_ms": pytest.approx(np.arange(101).std()), "p99_minus_p50_ms": pytest.approx(49)}


def test_a_sweep_over_cameras_at_a_rate() -> None:
    engine: Any = Engine(0.005)
    rows = camera_sweep(engine, feed(), (1, 4), fps=60, seconds=0.6, deadline_ms=50)
    assert [(row["cameras"], row["fps_per_camera"], row["offered_fps"]) for row in rows] == [(1, 60, 60), (4, 60, 240)]
    assert [row["saturated"] for row in rows] == [False, True]
    assert rows[0]["achieved_fps"] == pytest.approx(60, rel=0.05)
    assert 5 <= rows[0]["p50_ms"] <= rows[0]["p99_ms"]
    assert rows[0]["misses"] == 0
    assert rows[1]["misses"] > 10
    assert camera_sweep(engine, feed(), (1,), fps=60, seconds=0.2)[0]["misses"] is None


def test_a_sweep_over_cameras_at_full_speed() -> None:
    rows = camera_sweep(Engine(0.005), feed(), (1, 3), seconds=0.5, deadline_ms=50)  # type: ignore[arg-type]
    assert [row["cameras"] for row in rows] == [1, 3]
    for row in rows:
        assert 140 <= row.pop("achieved_fps") <= 200
        assert set(row) == {"cameras", "fps_per_camera", "offered_fps", "p50_ms", "p99_ms", "misses", "saturated"}
        assert {value for key, value in row.items() if key != "cameras"} == {None}


def test_an_engine_that_is_slower_than_a_sweep_is_long() -> None:
    (row,) = camera_sweep(Engine(0.1), feed(), (1,), seconds=0.01)  # type: ignore[arg-type]
    assert row["achieved_fps"] == pytest.approx(10, rel=0.1)


def test_an_interrupted_sweep_keeps_the_counts_that_are_complete() -> None:
    engine: Any = Engine(0.0)

    def in_the_second(done: int, of: int) -> None:
        if of > 20 and done:
            raise KeyboardInterrupt

    rows = camera_sweep(engine, feed(), (1, 2), fps=100, seconds=0.2, progress=in_the_second)
    assert [row["cameras"] for row in rows] == [1]
    assert camera_sweep(engine, feed(), (2,), fps=100, seconds=5, progress=interrupt) == []
    assert camera_sweep(engine, feed(), (2,), seconds=5, progress=interrupt) == []


def test_one_camera_can_t_be_several() -> None:
    with pytest.raises(RecipeError, match="gives frames at its own pace"):
        camera_sweep(Engine(0.0), feed("camera://belt", live=True), (1, 2))  # type: ignore[arg-type]
