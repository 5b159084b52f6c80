"""One frame at a time: what is timed, when it is steady, what an interruption leaves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from line_fakes import FLAT, scripted
from rate_fakes import Engine

from dapo_edge.bench.feed import open_feed
from dapo_edge.bench.latency import (
    WARM_UP_LIMIT_S,
    batch_sweep,
    by_turns,
    is_steady,
    median_interval,
    one_at_a_time,
    warm_up,
)
from dapo_edge.errors import FrameError, FrameTimeout, SourceError
from dapo_edge.structures import Frame, Inspection

SOURCE = "synthetic://64x64@30"


def test_the_total_holds_capture_engine_and_emit() -> None:
    run = one_at_a_time(Engine(seconds=0.002), open_feed(SOURCE), 10, None)  # type: ignore[arg-type]
    stages = run.samples.stages()
    assert list(stages) == ["capture", "encode", "emit", "total"]
    assert len(run.samples) == 10
    parts = sum(run.samples.of(stage) for stage in ("capture", "encode", "emit"))
    assert (run.samples.of("total") >= parts).all()
    assert stages["total"]["min"] >= 2
    assert not run.interrupted
    assert not run.ended


def test_so_many_seconds() -> None:
    run = one_at_a_time(Engine(seconds=0.005), open_feed(SOURCE), 1, 0.3)  # type: ignore[arg-type]
    assert 0.3 <= run.seconds < 1
    assert 10 <= len(run.samples) <= 60


def test_an_interruption_keeps_what_there_is() -> None:
    def tick(done: int, of: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    run = one_at_a_time(Engine(), open_feed(SOURCE), 100, None, tick)  # type: ignore[arg-type]
    assert run.interrupted
    assert len(run.samples) == 5


def test_an_interruption_before_the_first_frame_is_one() -> None:
    def interrupted(frame: Frame) -> BaseException:
        return KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        one_at_a_time(Engine(fault=interrupted), open_feed(SOURCE), 100, None)  # type: ignore[arg-type]


def test_a_source_that_breaks_off_leaves_what_was_timed() -> None:
    broken = SourceError("the cable is out", "Plug it in")
    with scripted(belt=[[0], [0, 1, 2, broken]]):
        run = one_at_a_time(Engine(), open_feed("camera://belt"), 100, None)  # type: ignore[arg-type]
    assert (len(run.samples), run.interrupted, run.error) == (3, True, broken)
    with scripted(belt=[[0], [broken]]), pytest.raises(SourceError, match="the cable is out"):
        one_at_a_time(Engine(), open_feed("camera://belt"), 100, None)  # type: ignore[arg-type]
    with scripted(belt=[[0], [0, 1, broken]]):
        both = by_turns(Engine(), Engine(), open_feed("camera://belt"), 100, None)  # type: ignore[arg-type]
    assert (len(both.ours.samples), both.ours.error) == (2, broken)


def test_a_camera_that_falls_silent_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_edge.bench.feed.SILENT_S", 0.05)
    with scripted(belt=[[0], [0, 1]]):
        run = one_at_a_time(Engine(), open_feed("camera://belt"), 100, None)  # type: ignore[arg-type]
    assert len(run.samples) == 2
    assert isinstance(run.error, FrameTimeout)


def test_frames_that_fail_are_counted() -> None:
    def every_third(frame: Frame) -> FrameError | None:
        return FrameError("torn", "look") if frame.index % 3 == 0 else None

    run = one_at_a_time(Engine(fault=every_third), open_feed(SOURCE), 15, None)  # type: ignore[arg-type]
    assert (len(run.samples), run.failed) == (10, 5)


def test_when_no_frame_can_be_inspected() -> None:
    engine = Engine(fault=lambda frame: FrameError("torn", "look"))
    with pytest.raises(SourceError, match=r"none of the first 100 frames can be inspected \(torn\)"):
        one_at_a_time(engine, open_feed(SOURCE), 1000, 60)  # type: ignore[arg-type]


def test_a_camera_that_ends_says_so() -> None:
    with scripted(belt=[[0], [0, 1, 2]], short=[[0, 1]]):
        feed = replace(open_feed("scripted://belt"), live=True)
        run = one_at_a_time(Engine(), feed, 100, None)  # type: ignore[arg-type]
        by_time = one_at_a_time(Engine(), replace(feed, full_uri="scripted://short"), 1, 60)  # type: ignore[arg-type]
    assert run.ended and by_time.ended
    assert (len(run.samples), len(by_time.samples)) == (3, 2)


def test_steady_times_are_those_that_stay() -> None:
    assert is_steady([0.01] * 60)
    assert not is_steady([0.01] * 59)
    falling = list(np.linspace(0.02, 0.01, 60))
    assert not is_steady(falling)
    assert is_steady(falling + [0.01] * 60)
    assert is_steady([2.0] * 6), "slow engines have short windows"
    one_stall = [0.01] * 60
    one_stall[30] = 1.0
    assert is_steady(one_stall), "a single stall says nothing about the clocks"


def test_warming_up_stops_when_it_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("dapo_edge.bench.latency.time.perf_counter", lambda: next(clock) * 0.05)
    found = warm_up(Engine(), open_feed(SOURCE), None)  # type: ignore[arg-type]
    assert found.steady
    assert found.frames < 100


def test_warming_up_ends_where_times_never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = Engine(), [0.0]

    def slower_each_time(frame: Frame) -> None:
        now[0] += 0.1 * 1.1 ** len(engine.batches)

    engine.fault = slower_each_time
    monkeypatch.setattr("dapo_edge.bench.latency.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("dapo_edge.bench.latency.time.monotonic", lambda: now[0])
    found = warm_up(engine, open_feed(SOURCE), None)  # type: ignore[arg-type]
    assert found.steady is False
    assert WARM_UP_LIMIT_S < found.seconds < 3 * WARM_UP_LIMIT_S


def test_a_given_warm_up_is_that_long() -> None:
    engine = Engine()
    assert warm_up(engine, open_feed(SOURCE), 7).frames == 7  # type: ignore[arg-type]
    assert warm_up(engine, open_feed(SOURCE), 0).frames == 0  # type: ignore[arg-type]
    assert len(engine.batches) == 7


def test_two_packages_take_turns() -> None:
    fast, slow = Engine(seconds=0.004), Engine(seconds=0.012)
    both = by_turns(fast, slow, open_feed(SOURCE), 20, None)  # type: ignore[arg-type]
    assert len(fast.batches) == len(slow.batches) == 20
    median, low, high = both.times_faster
    assert low <= median <= high
    assert 1.5 < median < 4
    assert both.verdicts_differ == 0


def test_verdicts_that_differ_are_counted() -> None:
    class Other(Engine):
        def inspect(self, frame: Frame) -> Inspection:
            found = super().inspect(frame)
            return Inspection(found.score + 0.25, "ng", FLAT, (), (16, 16), ms=found.ms)

    both = by_turns(Engine(), Other(), open_feed(SOURCE), 4, None)  # type: ignore[arg-type]
    assert both.verdicts_differ == 4
    assert both.score_difference_max == pytest.approx(0.25)


def test_the_interval_of_a_median_holds_the_true_one_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3, 1, (400, 101))
    inside = [low <= 3 <= high for _, low, high in map(median_interval, draws)]
    assert 0.93 <= np.mean(inside) <= 0.99
    assert median_interval(np.array([2.0])) == (2, 2, 2)


def test_calls_of_many_frames() -> None:
    engine = Engine(seconds=0.001)
    one, four = batch_sweep(engine, open_feed(SOURCE), (1, 4))  # type: ignore[arg-type]
    assert (one["frames_per_call"], four["frames_per_call"]) == (1, 4)
    assert set(engine.batches) == {1, 4}
    assert one["call_ms"]["n"] == 20
    assert four["ms_per_frame"] == pytest.approx(four["call_ms"]["p50"] / 4)
