"""A camera that fails, hangs or goes away is found again, and nobody else notices."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from line_fakes import QUICK, Collector, FakeInspector, ScriptedSource, scripted

from dapo_edge.errors import DependencyMissing, SourceError, SourceRefused
from dapo_edge.runtime.camera import MOST_LEFT_BEHIND, Patience
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.sources import Properties

GONE = SourceError("cable out", "plug it in")


def camera(name: str, **options: Any) -> CameraPlan:
    return CameraPlan(name, f"camera://{name}", **{"policy": "wait", **options})


def run(*plans: CameraPlan, sink: Collector | None = None, patience: Patience = QUICK) -> Pipeline:
    pipeline = Pipeline(
        FakeInspector(),  # type: ignore[arg-type]
        plans,
        [SinkPlan(sink, "wait")] if sink else [],
        patience=patience,
    )
    pipeline.run()
    counts = pipeline.counts()
    assert counts.balanced and counts.in_flight == 0
    return pipeline


def sleeping(seconds: float, index: int) -> Callable[[], int]:
    def step() -> int:
        time.sleep(seconds)
        return index

    return step


def test_a_lost_camera_is_opened_again_and_its_first_frame_is_marked() -> None:
    sink = Collector()
    with scripted(a=[[0, 1, GONE], [0, 1, 2]]) as opened:
        pipeline = run(camera("a", frames=5), sink=sink)
    assert sink.indices("a") == [0, 1, 2, 3, 4]  # goes on counting
    assert [bool(outcome.frame and outcome.frame.resumed) for outcome in sink.outcomes] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert sink.states("a") == ["connecting", "live", "lost", "live", "ended"]
    lost = sink.events[2]
    assert lost.reason == "cable out" and lost.attempt == 1 and lost.retry_s and lost.retry_s <= QUICK.first_retry_s
    assert pipeline.as_json()["cameras"][0]["reconnects"] == 1
    assert len(opened) == 2 and all(source.closed.is_set() for source in opened)


def test_a_silent_camera_is_stalled_then_found_again() -> None:
    sink = Collector()
    with scripted(a=[[0], [1]]) as opened:  # a script that is over leaves the camera silent
        run(camera("a", frames=2), sink=sink)
    assert sink.states("a") == ["connecting", "live", "stalled", "lost", "live", "ended"]
    assert "no frame for 0.1 s" in sink.events[2].reason or "no frame for 0.2 s" in sink.events[2].reason
    assert all(source.closed.wait(1) for source in opened)


def test_a_camera_that_hangs_in_its_library_is_left_behind_and_its_late_frame_counts_as_lost() -> None:
    release = threading.Event()

    def hang() -> int:
        release.wait(5)
        return 1

    with scripted(a=[[0, hang], [0, lambda: release.set() or 1, sleeping(0.1, 2)]]) as opened:  # type: ignore[func-returns-value]
        pipeline = run(camera("a", frames=4))
    counts = pipeline.counts()
    assert counts.inspected == 4 and counts.dropped_by["camera"] == 1 and counts.captured == 5
    assert opened[0].closed.wait(1)  # by its own thread, when it came back


def test_no_more_threads_are_risked_than_a_few() -> None:
    release = threading.Event()

    def hang() -> int:
        release.wait(10)
        return 0

    sink = Collector()
    with scripted(a=[[hang]] * 50, b=[[sleeping(0.02, index) for index in range(100)]]):
        pipeline = Pipeline(
            FakeInspector(),  # type: ignore[arg-type]
            [camera("a"), camera("b", frames=100)],
            [SinkPlan(sink)],
            patience=QUICK,
        )
        thread = threading.Thread(target=pipeline.run)
        thread.start()
        time.sleep(1.8)
        hanging = [thread for thread in threading.enumerate() if thread.name == "camera a"]
        assert len(hanging) == MOST_LEFT_BEHIND
        assert "still hang" in pipeline.as_json()["cameras"][0]["reason"]
        release.set()
        time.sleep(0.3)
        pipeline.stop()
        thread.join(5)
    assert sink.indices("b") == list(range(100)), "another camera's frames"
    assert pipeline.counts().balanced


def test_a_camera_that_is_not_there_yet_is_waited_for() -> None:
    sink = Collector()

    def absent() -> int:
        raise GONE

    with scripted(a=[[absent], [absent], [0, 1]]):
        run(camera("a", frames=2), sink=sink)
    assert sink.states("a") == ["connecting", "lost", "lost", "live", "ended"]
    assert [event.attempt for event in sink.events] == [0, 1, 2, 0, 0]
    assert not sink.outcomes[0].frame.resumed  # type: ignore[union-attr]  # it never was there before


@pytest.mark.parametrize("error", [SourceRefused("wrong password", "ask"), DependencyMissing("no SDK", "install it")])
def test_a_camera_that_refuses_from_the_start_ends_the_run(error: Exception) -> None:
    with scripted(a=[[error]], b=[range(10**6)]), pytest.raises(type(error), match=str(error)):
        run(camera("a"), CameraPlan("b", "scripted://b"))


def test_a_refusal_later_on_is_a_loss_like_any_other() -> None:
    with scripted(a=[[0, SourceRefused("rebooting", "wait")], [0]]):
        assert run(camera("a", frames=2)).counts().inspected == 2


@pytest.mark.parametrize("error", [RuntimeError("bug in an SDK"), ZeroDivisionError(), OSError(5, "I/O")])
def test_whatever_a_library_raises_is_a_loss(error: Exception) -> None:
    sink = Collector()
    with scripted(a=[[0, error], [0]]):
        run(camera("a", frames=2), sink=sink)
    assert type(error).__name__ in sink.events[2].reason


def test_a_triggered_camera_may_be_silent() -> None:
    with scripted(a=[[0, *([None] * 30), 1]]) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "line_fakes.ScriptedCamera.announced", lambda self: Properties(self.uri, live=True, triggered=True)
        )
        pipeline = run(camera("a", policy=None, frames=2))
    assert len(opened) == 1 and pipeline.cameras[0].lane.policy == "wait"


def test_a_slow_camera_is_not_stalled() -> None:
    with scripted(a=[[0, None, sleeping(0.25, 1), sleeping(0.25, 2)]]) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr("line_fakes.ScriptedCamera.announced", lambda self: Properties(self.uri, fps=4, live=True))
        run(camera("a", frames=3))
    assert len(opened) == 1


def test_an_opening_that_hangs_is_tried_again() -> None:
    slept = []

    def announced(self: ScriptedSource) -> Properties:
        if not slept:
            slept.append(1)
            time.sleep(0.6)
        return Properties(self.uri, live=True)

    sink = Collector()
    with scripted(a=[[0], [0]]), pytest.MonkeyPatch.context() as patch:
        patch.setattr("line_fakes.ScriptedCamera.announced", announced)
        run(camera("a", frames=1), sink=sink)
    assert sink.states("a") == ["connecting", "stalled", "lost", "live", "ended"]
    assert "not open after 0.3 s" in sink.events[1].reason


def test_retries_grow_with_the_loss_and_end_at_a_limit() -> None:
    sink = Collector()
    patience = Patience(first_retry_s=0.01, last_retry_s=0.05, retry_share=0.2, read_s=0.01, tick_s=0.001)

    def absent() -> int:
        raise GONE

    with scripted(a=[[0, GONE], *[[absent]] * 60, [0]]) as opened:
        run(camera("a", frames=2), sink=sink, patience=patience)
    retries = [event.retry_s for event in sink.events if event.retry_s]
    assert len(opened) == 62
    assert retries[0] <= 0.01 and max(retries) <= 0.05 and retries == sorted(retries, key=lambda s: round(s, 2))
    assert len(retries) < 20, "a camera that is away for long is not told at each attempt"


def test_others_lose_nothing_while_one_camera_goes_through_fifty_losses() -> None:
    sink = Collector()
    gc.collect()
    threads = threading.active_count()
    openings = [[0, GONE] if turn % 2 else [0, RuntimeError("x")] for turn in range(50)]
    with scripted(a=[*openings, [0]], b=[range(2000)]):
        pipeline = run(camera("a", frames=51), CameraPlan("b", "scripted://b"), sink=sink)
    assert sink.indices("b") == list(range(2000)) and sink.indices("a") == list(range(51))
    assert pipeline.cameras[0].reconnects == 50
    assert threading.active_count() <= threads
