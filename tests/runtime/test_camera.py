"""A camera that fails, hangs or goes away is found again, and nobody else notices."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from line_fakes import QUICK, Collector, FakeInspector, ScriptedSource, scripted

from dapo_edge.errors import DependencyMissing, SourceError, SourceRefused
from dapo_edge.runtime.camera import MOST_LEFT_BEHIND, Patience
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.session import Session
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
    assert [event.attempt for event in sink.events] == [0, 1, 2, 2, 0]
    assert not sink.outcomes[0].frame.resumed  # type: ignore[union-attr]  # it never was there before


@pytest.mark.parametrize("error", [SourceRefused("wrong password", "ask"), DependencyMissing("no SDK", "install it")])
def test_a_camera_that_refuses_from_the_start_ends_the_run(error: Exception) -> None:
    with scripted(a=[[error]], b=[range(10**6)]), pytest.raises(type(error), match=str(error)):
        run(camera("a"), CameraPlan("b", "scripted://b"))


def test_a_refusal_later_on_is_a_loss_like_any_other() -> None:
    with scripted(a=[[0, SourceRefused("rebooting", "wait")], [0]]):
        assert run(camera("a", frames=2)).counts().inspected == 2
    with scripted(a=[[GONE], [SourceRefused("still booting", "wait")], [DependencyMissing("?", "?")], [0]]):
        assert run(camera("a", frames=1)).counts().inspected == 1


def test_no_thread_for_one_camera_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.start
    failures = iter([True, True, False])

    def start(session: Session) -> None:
        if session.name == "camera a" and next(failures, False):
            raise RuntimeError("can't start new thread")
        real(session)

    monkeypatch.setattr(Session, "start", start)
    sink = Collector()
    with scripted(a=[range(3)], b=[range(30)]):
        run(camera("a", frames=3), camera("b", frames=30), sink=sink)
    assert sink.indices("a") == [0, 1, 2] and sink.indices("b") == list(range(30))


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


def test_a_triggered_camera_is_live_before_its_first_frame() -> None:
    with scripted(a=[[None] * 1000]):
        pipeline = Pipeline(FakeInspector(), [camera("a", triggered=True)], patience=QUICK)  # type: ignore[arg-type]
        thread = threading.Thread(target=pipeline.run)
        thread.start()
        end = time.monotonic() + 5
        while pipeline.as_json()["cameras"][0]["state"] != "live" and time.monotonic() < end:
            time.sleep(0.01)
        state = pipeline.as_json()["cameras"][0]["state"]
        pipeline.stop()
        thread.join()
    assert state == "live" and pipeline.counts().captured == 0


def test_a_triggered_camera_whose_library_hangs_is_given_up() -> None:
    release = threading.Event()

    def hang() -> int:
        release.wait(5)
        return 9

    sink = Collector()
    with scripted(a=[[0, hang], [1]]):
        run(camera("a", frames=2, triggered=True), sink=sink)
        release.set()
    assert sink.states("a") == ["connecting", "live", "stalled", "lost", "live", "ended"]
    assert "hangs" in sink.events[2].reason


def test_a_camera_slower_than_anyone_knows_becomes_live() -> None:
    slow = [sleeping(0.5, index) for index in range(3)]  # more than three times the silence allowed at first
    with scripted(a=[slow] * 6) as opened:
        pipeline = run(camera("a", frames=3))
    assert len(opened) <= 4 and pipeline.counts().inspected == 3


def test_a_plan_may_say_how_long_a_source_may_be_silent() -> None:
    with scripted(a=[[0, sleeping(0.4, 1), sleeping(0.4, 2)]]) as opened:
        run(camera("a", frames=3, silence_s=0.8))
    assert len(opened) == 1


def test_a_camera_that_comes_and_goes_is_tried_less_and_less_and_fills_no_log() -> None:
    sink = Collector()
    patience = replace(QUICK, steady_s=0.5)
    flaps = [[0, GONE]] * 40
    started = time.monotonic()
    with scripted(a=[*flaps, range(10**6)]):
        run(camera("a", frames=60), sink=sink, patience=patience)
    assert time.monotonic() - started > 30 * 0.05 * 0.8, "the back-off went on growing"
    assert len(sink.events) < 16
    assert sink.states("a")[-2:] != ["lost", "ended"]


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
