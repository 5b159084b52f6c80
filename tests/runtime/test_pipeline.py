"""Frames of many cameras through one engine: order, batches, back-pressure, the end, and every frame accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from line_fakes import (
    Collector,
    FakeInspector,
    Running,
    cameras,
    files,
    finished,
    line,
    scripted,
    until,
)

from dapo_edge.errors import BackendError, FrameError, RecipeError, SourceError
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.runtime.pace import Pace
from dapo_edge.runtime.plan import CameraPlan
from dapo_edge.structures import Frame


def test_files_are_inspected_wholly_and_in_order() -> None:
    sink = Collector()
    with scripted(a=[range(50)], b=[range(30)]):
        pipeline = line(FakeInspector(batch=4, concurrency=3, seconds=0.001), files("a", "b"), sink)
        pipeline.run()
    assert sink.indices("a") == list(range(50)) and sink.indices("b") == list(range(30))
    assert finished(pipeline).inspected == 80
    assert sink.opened == sink.closed == 1
    assert all(outcome.inspection and outcome.inspection.ms["wait"] >= 0 for outcome in sink.outcomes)
    assert sink.states("a") == ["connecting", "live", "ended"]


def test_batches_mix_cameras_and_starve_none() -> None:
    engine = FakeInspector(batch=4)
    sink = Collector()
    with scripted(a=[range(40)], b=[range(40)], c=[range(40)]):
        engine.gate.clear()
        with Running(line(engine, files("a", "b", "c"), sink, batch_window_s=0.05)) as running:
            until(lambda: running.pipeline.counts().in_flight >= 12)
            engine.gate.set()
            running.end()
    assert max(engine.batches) == 4 and sum(engine.batches) == 120
    first = [outcome.camera for outcome in sink.outcomes[:60]]
    assert min(first.count(name) for name in "abc") >= 10


def test_a_batch_waits_for_other_cameras_no_longer_than_its_window() -> None:
    engine = FakeInspector(batch=8)
    with scripted(a=[[0]], b=[[lambda: time.sleep(0.3) or 0]]):  # type: ignore[func-returns-value]
        started = time.monotonic()
        outcomes = []
        for outcome in line(engine, files("a", "b"), batch_window_s=0.05):
            outcomes.append((outcome.camera, time.monotonic() - started))
    assert [name for name, _ in outcomes] == ["a", "b"]
    assert 0.05 <= outcomes[0][1] < 0.25


def test_frames_that_fail_at_either_end_are_counted_and_reported_in_order() -> None:
    lost = FrameError("torn", "replace it").at(1, "scripted://a/1")
    engine = FakeInspector(fault=lambda frame: FrameError("odd shape", "mend it") if frame.index == 2 else None)
    sink = Collector()
    with scripted(a=[[0, lost, 2, 3]]):
        pipeline = line(engine, files("a"), sink)
        pipeline.run()
    assert sink.indices("a") == [0, 1, 2, 3]
    assert [bool(outcome.error) for outcome in sink.outcomes] == [False, True, True, False]
    assert sink.outcomes[1].source == "scripted://a/1"
    counts = finished(pipeline)
    assert (counts.captured, counts.inspected, counts.failed) == (4, 2, 2)


def test_a_file_that_breaks_does_not_keep_the_others_from_being_inspected() -> None:
    broken = SourceError("the belt tore", "glue it")
    with scripted(a=[[0, 1, broken]], b=[range(9)]):
        pipeline = line(FakeInspector(), files("a", "b"))
        with pytest.raises(SourceError, match=r"the belt tore\. [Gg]lue it"):
            pipeline.run()
    assert finished(pipeline).inspected == 11
    with scripted(a=[[broken]], b=[[SourceError("no light", "wait")]], c=[[0]]):
        pipeline = line(FakeInspector(), files("a", "b", "c"))
        with pytest.raises(SourceError, match="tore; no light"):
            pipeline.run()
    assert finished(pipeline).inspected == 1


def test_an_engine_that_breaks_ends_the_run_at_once() -> None:
    engine = FakeInspector(fault=lambda frame: BackendError("GPU lost", "restart") if frame.index == 3 else None)
    with scripted(a=[range(1000)], b=[range(1000)]):
        pipeline = line(engine, [*files("a"), *cameras("b")])
        with pytest.raises(BackendError, match="GPU lost"):
            pipeline.run()
    counts = finished(pipeline, stopped=True)
    assert counts.failed >= 1 and counts.inspected < 100


def test_wait_holds_the_source_back_and_drops_nothing() -> None:
    engine = FakeInspector(seconds=0.005)
    read: list[int] = []

    def step(index: int) -> Callable[[], int]:
        return lambda: read.append(index) or index  # type: ignore[func-returns-value]

    engine.gate.clear()
    with (
        scripted(a=[[step(index) for index in range(40)]]),
        Running(line(engine, cameras("a", policy="wait", queue=3, frames=40))) as running,
    ):
        until(lambda: len(read) == 5)
        time.sleep(0.3)  # twice as long as the watchdog's patience
        assert len(read) == 5  # one in the engine, three in the ring, one in hand
        engine.gate.set()
        running.end()
    assert running.error is None
    counts = finished(running.pipeline)
    assert (counts.inspected, counts.dropped) == (40, 0)
    assert running.pipeline.as_json()["cameras"][0]["reconnects"] == 0


def test_newest_keeps_the_latest_frames_and_counts_the_others() -> None:
    engine = FakeInspector()
    engine.gate.clear()
    sink = Collector()
    with scripted(a=[range(100)]), Running(line(engine, files("a", policy="newest", queue=2), sink)) as running:
        until(lambda: running.pipeline.counts().captured == 100)
        engine.gate.set()
        running.end()
    assert sink.indices("a")[-2:] == [98, 99]
    counts = finished(running.pipeline)
    assert counts.inspected + counts.dropped_by["policy"] == 100
    assert counts.dropped == counts.dropped_by["policy"] >= 95


def test_a_live_source_keeps_the_newest_and_a_file_waits_where_nothing_is_said() -> None:
    with scripted(a=[range(3)], b=[range(3)]):
        pipeline = line(FakeInspector(), [*files("a"), *cameras("b", frames=3)])
        pipeline.run()
    assert [camera.lane.policy for camera in pipeline.cameras] == ["wait", "newest"]


def test_stale_frames_are_dropped_by_our_own_clock() -> None:
    old = Frame(np.zeros((16, 16, 3), np.uint8), 0, 0, "x", arrived_s=time.monotonic() - 5)
    young = Frame(np.zeros((16, 16, 3), np.uint8), 1, 2**62, "x")  # its wall clock is far in the future
    with scripted(a=[[old, young]]):
        pipeline = line(FakeInspector(), files("a", max_age_s=1.0))
        pipeline.run()
    counts = finished(pipeline)
    assert (counts.inspected, counts.dropped_by["stale"]) == (1, 1)


def test_frames_that_the_camera_lost_are_in_the_account() -> None:
    frames = [
        Frame(np.zeros((16, 16, 3), np.uint8), 0, 0, "x"),
        Frame(np.zeros((16, 16, 3), np.uint8), 4, 0, "x", lost=3),
    ]
    with scripted(a=[frames]):
        pipeline = line(FakeInspector(), files("a"))
        pipeline.run()
    counts = finished(pipeline)
    assert (counts.captured, counts.inspected, counts.dropped_by["camera"]) == (5, 2, 3)


@pytest.mark.parametrize("policy", ["wait", "newest"])
def test_a_target_rate_is_kept(policy: Any) -> None:
    def soon() -> int:
        time.sleep(0.001)
        return 0

    with scripted(a=[[soon] * 100_000]), Running(line(FakeInspector(), files("a", policy=policy, fps=50))) as running:
        time.sleep(1)
        running.pipeline.stop()
        running.end()
    counts = finished(running.pipeline)
    seconds = running.pipeline.as_json()["seconds"]
    assert 20 <= counts.inspected <= 50 * seconds + 2
    assert (counts.dropped_by["policy"] > 100) == (policy == "newest")


def test_stop_emits_what_was_captured() -> None:
    engine = FakeInspector(seconds=0.01)
    sink = Collector(seconds=0.002)
    endless = iter(range(10**9))
    with scripted(a=[endless], b=[range(10**6)]), Running(line(engine, files("a", "b"), sink)) as running:
        until(lambda: running.pipeline.counts().inspected > 10)
        running.pipeline.stop()
        started = time.monotonic()
        running.end()
        assert time.monotonic() - started < 1
    assert running.error is None
    counts = finished(running.pipeline)
    assert counts.dropped == 0 and len(sink.outcomes) == counts.inspected == counts.captured


def test_stop_waits_for_a_slow_engine_only_so_long() -> None:
    engine = FakeInspector(seconds=0.2)
    with scripted(a=[range(100)]), Running(line(engine, files("a", queue=50), drain_s=0.5)) as running:
        until(lambda: running.pipeline.counts().captured > 40)
        running.pipeline.stop()
        started = time.monotonic()
        running.end()
        assert time.monotonic() - started < 1.5
    counts = finished(running.pipeline, stopped=True)
    assert counts.dropped_by["shutdown"] > 30 and counts.inspected >= 2


def test_abort_drops_what_waits() -> None:
    engine = FakeInspector(seconds=0.05)
    with scripted(a=[range(1000)]), Running(line(engine, files("a", queue=30))) as running:
        until(lambda: running.pipeline.counts().captured > 20)
        running.pipeline.abort()
        running.end()
    counts = finished(running.pipeline, stopped=True)
    assert counts.dropped_by["shutdown"] >= 15 and counts.captured < 60


def test_a_cameras_own_bytes_become_bgr_unless_the_backend_takes_them() -> None:
    view = PixelView(np.full((16, 16), 9, np.uint8), "GRAY8", 16, 16)
    kinds = []
    for takes in (False, True):
        engine = FakeInspector(fault=lambda frame: kinds.append(type(frame.pixels)))  # type: ignore[func-returns-value]
        engine.backend.takes_camera_bytes = takes
        with scripted(a=[[Frame(view, 0, 0, "x")]]):
            line(engine, files("a")).run()
    assert kinds == [np.ndarray, PixelView]
    nonsense = Frame("no pixels at all", 7, 0, "x")  # type: ignore[arg-type]
    with scripted(a=[[nonsense, 8]]):
        outcomes = list(line(FakeInspector(), files("a")))
    assert [(outcome.index, bool(outcome.error)) for outcome in outcomes] == [(7, True), (8, False)]


def test_what_can_not_run_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(RecipeError, match="needs a source"):
        line(FakeInspector(), [])
    with scripted(a=[[0]]) as opened:
        with pytest.raises(RecipeError, match="two sources are called 'a'"):
            line(FakeInspector(), files("a", "a"))
        with pytest.raises(RecipeError, match="two sinks are called 'x'"):
            line(FakeInspector(), files("a"), Collector("x"), Collector("x"))
        with pytest.raises(SourceError, match="unknown kind"):
            line(FakeInspector(), [CameraPlan("a", "telepathy://a")])
    assert not opened


def test_a_target_rate_lets_no_two_pass_at_once_even_after_a_gap() -> None:
    pace = Pace(1.0)
    seconds = (0.0, 0.03, 1.0, 1.2, 2.0, 7.3, 7.4, 8.2, 8.31)
    assert [second for second in seconds if pace.lets_through(second + 100)] == [0.0, 1.0, 2.0, 7.3, 8.2]
    pace = Pace(20.0)
    passed = sum(pace.lets_through(100 + frame / 30) for frame in range(300))
    assert 198 <= passed <= 202, "a third is left out of 30 per second, evenly"


def test_so_many_frames_are_taken_whatever_the_rate_left_out() -> None:
    def soon() -> int:
        time.sleep(0.002)
        return 0

    with scripted(a=[[soon] * 100_000]):
        pipeline = line(FakeInspector(), files("a", policy="newest", fps=50, frames=5, queue=9))
        pipeline.run()
    assert finished(pipeline).inspected == 5


def test_a_frame_in_tiles_does_not_wait_for_others_to_fill_a_batch() -> None:
    engine = FakeInspector(batch=4)
    views: Any = object()
    with scripted(a=[range(8)], b=[range(8)]):
        line(engine, [*files("a", views=views), *files("b")], batch_window_s=0.02).run()
    assert sum(engine.batches) == 16 and len(engine.batches) >= 8


def test_a_run_runs_once() -> None:
    with scripted(a=[range(3)]):
        pipeline = line(FakeInspector(), files("a"))
        pipeline.run()
        with pytest.raises(RecipeError, match="this run is over"):
            pipeline.run()


def test_an_engine_that_hangs_at_the_end_leaves_nothing_in_flight(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeInspector()
    engine.gate.clear()
    with scripted(a=[range(9)]), Running(line(engine, files("a"), drain_s=0.1)) as running:
        until(lambda: running.pipeline.counts().captured == 6)
        running.pipeline.stop()
        running.end()
    assert finished(running.pipeline, stopped=True).dropped_by["shutdown"] == 6
    assert "1 frames were still in the engine" in caplog.text
    engine.gate.set()
    time.sleep(0.05)
    assert running.pipeline.counts().inspected == 0, "the sum is drawn"
