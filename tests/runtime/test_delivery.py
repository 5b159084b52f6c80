"""Results on their way out: every sink has a queue of its own, and what goes wrong with one stays there."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from line_fakes import (
    Collector,
    FakeInspector,
    Running,
    files,
    finished,
    line,
    scripted,
    until,
)

from dapo_edge.errors import OutputError, SourceError
from dapo_edge.runtime.outcome import Outcome
from dapo_edge.runtime.plan import CameraPlan, SinkPlan


def test_a_slow_sink_loses_its_own_entries_and_delays_nobody() -> None:
    slow, quick = Collector("slow", seconds=0.05), Collector("quick")
    with scripted(a=[range(200)]):
        pipeline = line(FakeInspector(), files("a"), SinkPlan(slow, "newest", queue=2), SinkPlan(quick, "wait"))
        pipeline.run()
    assert len(quick.outcomes) == finished(pipeline).inspected == 200
    state = {sink["name"]: sink for sink in pipeline.as_json()["sinks"]}
    assert state["slow"]["written"] + state["slow"]["lost"] == 200 and state["slow"]["lost"] > 100
    assert slow.indices("a")[-1] == 199 and slow.closed == 1


def test_a_sink_of_files_loses_nothing_by_default() -> None:
    slow = Collector(seconds=0.002)
    with scripted(a=[range(100)]):
        pipeline = line(FakeInspector(), files("a"), SinkPlan(slow, queue=2))
        pipeline.run()
    assert slow.indices("a") == list(range(100))


def test_a_sink_that_raises_is_counted_and_named_at_the_end() -> None:
    bad, good = Collector("bad", fault=OutputError("disk full", "free some space")), Collector("good")
    with scripted(a=[range(20)]):
        pipeline = line(FakeInspector(), files("a"), bad, good)
        with pytest.raises(OutputError, match=r"sink 'bad' failed 20 times \(disk full\). [Ff]ree some space"):
            pipeline.run()
    assert len(good.outcomes) == finished(pipeline).inspected == 20
    assert pipeline.as_json()["sinks"][0]["failed"] == 20


def test_a_sink_that_hangs_does_not_keep_a_stopped_run() -> None:
    stuck = Collector("stuck", seconds=3600)
    with (
        scripted(a=[range(10**6)]),
        Running(line(FakeInspector(), files("a"), SinkPlan(stuck, "newest"), drain_s=0.3)) as running,
    ):
        until(lambda: running.pipeline.counts().inspected > 10)
        running.pipeline.stop()
        started = time.monotonic()
        running.end()
        assert time.monotonic() - started < 2  # the drain, and a second to wind up
    assert finished(running.pipeline).dropped == 0


def test_results_can_be_looped_over_and_left() -> None:
    with scripted(a=[range(10)], b=[range(10**6)]):
        assert [outcome.index for outcome in line(FakeInspector(), files("a"))] == list(range(10))
        pipeline = line(FakeInspector(), files("b"))
        for outcome in pipeline:
            if outcome.index == 5:
                break
        del outcome
    until(lambda: not [thread for thread in threading.enumerate() if thread.name in ("run", "camera b")])
    assert pipeline.counts().balanced


def test_a_loop_gets_the_error_after_the_results() -> None:
    seen = []
    with scripted(a=[[0, 1, SourceError("torn", "glue")]]), pytest.raises(SourceError, match="torn"):
        for outcome in line(FakeInspector(), files("a")):
            seen.append(outcome.index)
    assert seen == [0, 1]


def test_a_file_that_is_not_there_shows_before_the_sinks_are_opened(tmp_path: Any) -> None:
    sink = Collector()
    pipeline = line(FakeInspector(), [CameraPlan("a", f"image://{tmp_path}/none.png")], sink)
    with pytest.raises(SourceError, match="can't be opened"):
        pipeline.run()
    assert sink.opened == 0


def test_a_sink_that_does_not_draw_holds_no_pictures() -> None:
    plain, drawing = Collector("plain"), Collector("drawing")
    plain.draws = False
    with scripted(a=[range(3)]):
        line(FakeInspector(), files("a"), plain, drawing).run()
    for bare, whole in zip(plain.outcomes, drawing.outcomes, strict=True):
        assert whole.nbytes > 0 and bare.nbytes == 0
        assert bare.frame and whole.frame and bare.frame.index == whole.frame.index
        assert bare.inspection and bare.inspection.verdict == "ok" and bare.inspection.types == ("normal", "a")


def test_a_queue_of_pictures_is_bounded_by_its_bytes() -> None:
    slow = Collector("slow", seconds=0.02)
    with scripted(a=[range(60)]):
        pipeline = line(FakeInspector(), files("a"), SinkPlan(slow, "newest", queue=1000, max_bytes=5_000))
        pipeline.run()
    (state,) = pipeline.as_json()["sinks"]
    assert state["written"] + state["lost"] == 60 and state["lost"] > 30
    with scripted(a=[range(6)]):
        huge = Collector("huge")
        line(FakeInspector(), files("a"), SinkPlan(huge, "wait", max_bytes=1)).run()
    assert len(huge.outcomes) == 6, "one entry may always wait"


def test_a_sinks_failure_and_recovery_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    class Flaky(Collector):
        def write(self, outcome: Outcome) -> None:
            if 3 <= (outcome.index or 0) < 8:
                raise OSError(28, "No space left on device")
            super().write(outcome)

    with scripted(a=[range(12)]), pytest.raises(OutputError, match="failed 5 times"):
        line(FakeInspector(), files("a"), Flaky("disk")).run()
    assert [record.getMessage() for record in caplog.records] == [
        "the sink 'disk' fails: [Errno 28] No space left on device",
        "the sink 'disk' works again; 5 entries failed so far",
    ]


def test_a_failed_sink_shows_also_after_a_stop() -> None:
    bad = Collector("bad", fault=OSError("full"))
    with scripted(a=[range(10**6)]), Running(line(FakeInspector(), files("a"), bad)) as running:
        until(lambda: running.pipeline.counts().inspected > 10)
        running.pipeline.stop()
        running.end()
    assert isinstance(running.error, OutputError)
