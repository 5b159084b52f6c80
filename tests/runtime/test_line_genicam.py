"""GenICam cameras on a whole line: faster than the engine, and in the hands of another program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from line_fakes import FakeInspector
from rigs import genicam_rig, gige_rig
from rigs.line_rig import Line

from dapo_edge.runtime.accounting import Counts
from dapo_edge.runtime.plan import CameraPlan
from dapo_edge.runtime.sources import open_source
from dapo_edge.runtime.sources.genicam import GenicamSource
from dapo_edge.runtime.sources.industrial import Grab
from dapo_edge.structures import Frame

FASTEST: dict[str, Any] = {"AcquisitionFrameRate": 200, "PixelFormat": "Mono8", "buffers": 4}
ENGINE_S = 0.04  # 25 frames a second
FOUND_S = 3.0
HEARTBEAT_S = 15.0  # a killed program's camera is taken after 6 s, on an idle machine

HOLDER = """
import sys
sys.path[:0] = {paths!r}
from rigs import gige_rig
gige_rig.need()
from line_fakes import FakeInspector
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan
pipeline = Pipeline(FakeInspector(), [CameraPlan("a", {uri!r})])
for number, outcome in enumerate(pipeline):
    if number == 0:
        print("live", flush=True)
        sys.stdin.readline()
        break
"""


@pytest.fixture
def frame_ids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The camera's own numbers of the frames that were read."""
    genicam_rig.producer()
    seen: list[int] = []
    deliver = GenicamSource._deliver

    def note_and_deliver(source: GenicamSource, grab: Grab) -> Frame:
        assert grab.frame_id is not None
        seen.append(grab.frame_id)
        return deliver(source, grab)

    monkeypatch.setattr(GenicamSource, "_deliver", note_and_deliver)
    return seen


def run_for(seconds: float, plan: CameraPlan, engine_s: float) -> tuple[Line, float]:
    """A line that has run for a while, and how many frames a second the camera took in that time."""
    with Line(FakeInspector(seconds=engine_s), [plan]) as line:
        line.wait(lambda: line.ledger.entries)
        time.sleep(seconds)
        summary = line.pipeline.as_json()
    return line, summary["captured"] / summary["seconds"]


def check(line: Line, frame_ids: list[int]) -> Counts:
    """Every number that the camera gave is in the account, once."""
    counts = line.pipeline.counts()
    assert counts.captured == frame_ids[-1] - frame_ids[0] + 1
    assert counts.dropped_by["camera"] == counts.captured - len(frame_ids)
    assert counts.inspected == len(line.ledger.entries)
    assert counts.failed == counts.dropped_by["stale"] == counts.dropped_by["shutdown"] == 0
    return counts


def test_newest_against_a_slower_engine_accounts_for_every_frame(frame_ids: list[int]) -> None:
    plan = CameraPlan("a", genicam_rig.uri(**FASTEST), policy="newest")
    line, rate = run_for(0.8, plan, ENGINE_S)
    counts = check(line, frame_ids)
    print(f"{rate:.0f} frames/s: {counts.as_json()}")
    assert counts.inspected + counts.dropped_by["policy"] == len(frame_ids)
    assert counts.dropped_by["policy"] > counts.inspected  # five of six on an idle machine
    latest = [entry.done_s - entry.arrived_s for entry in line.ledger.entries if entry.arrived_s]
    assert sorted(latest)[len(latest) // 2] < 0.5  # no older than what waited with it, 4 frames


def test_wait_drops_nothing_and_reads_as_fast_as_the_engine(frame_ids: list[int]) -> None:
    """This camera can't be held back itself: what finds none of its 4 buffers free is lost there, and counted so."""
    plan = CameraPlan("a", genicam_rig.uri(**FASTEST), policy="wait")
    line, rate = run_for(0.8, plan, ENGINE_S)
    counts = check(line, frame_ids)
    print(f"{rate:.0f} frames/s: {counts.as_json()}")
    assert counts.dropped_by["policy"] == 0
    assert counts.inspected == len(frame_ids)
    assert counts.dropped_by["camera"] > counts.inspected
    assert [entry.index for entry in line.ledger.entries] == list(range(counts.inspected))
    assert line.ledger.states("a") == ["connecting", "live", "ended"]  # held back is not silent


def test_wait_with_an_engine_that_is_fast_enough_loses_nothing(frame_ids: list[int]) -> None:
    plan = CameraPlan("a", genicam_rig.uri(AcquisitionFrameRate=20, PixelFormat="Mono8", buffers=30), policy="wait")
    line, _ = run_for(0.6, plan, 0.0)
    counts = check(line, frame_ids)
    assert counts.dropped == 0
    assert counts.captured == counts.inspected > 5


# --- a camera that somebody else has ---


def taken(line: Line) -> float:
    """When the first result came."""
    return line.wait(lambda: line.ledger.entries, HEARTBEAT_S + FOUND_S)


def refusals(line: Line) -> list[str]:
    return [change.event.reason for change in line.ledger.changes if change.event.state == "lost"]


def test_a_camera_in_use_is_waited_for() -> None:
    """Here by the same program, as its producer allows no other one to see it."""
    with open_source(genicam_rig.uri()) as holder:
        assert holder.read(2)
        with Line(FakeInspector(), [CameraPlan("a", genicam_rig.uri())]) as line:
            line.wait(lambda: len(refusals(line)) >= 3)
            assert holder.read(2)
            holder.close()
            free_s = time.monotonic()
            took_s = taken(line) - free_s
    assert took_s < FOUND_S
    assert all("in use" in reason for reason in refusals(line))
    states = line.ledger.states("a")
    assert states[:2] == ["connecting", "lost"]
    assert states[-2:] == ["live", "ended"]
    assert not any(entry.resumed for entry in line.ledger.entries)  # it was never there before


@contextmanager
def another_run(uri: str) -> Iterator[subprocess.Popen[str]]:
    """Another program's line, which has the camera until its stdin is closed or it is killed."""
    paths = [path for path in sys.path if path and path != str(gige_rig.SYSTEM_PACKAGES)]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(paths=paths, uri=uri)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "live\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def gige_uri() -> Iterator[str]:
    """A GigE Vision camera that real packets lead to."""
    with gige_rig.FakeCamera():
        yield gige_rig.uri(AcquisitionFrameRate=50, trigger="off")


@pytest.mark.slow
def test_a_camera_of_another_program_is_waited_for(gige_uri: str) -> None:
    with another_run(gige_uri) as process, Line(FakeInspector(), [CameraPlan("a", gige_uri)]) as line:
        line.wait(lambda: len(refusals(line)) >= 3)
        assert not line.ledger.entries
        process.communicate("\n", timeout=10)
        free_s = time.monotonic()
        took_s = taken(line) - free_s
        print(f"taken {took_s:.2f} s after it was free")
    assert took_s < FOUND_S
    assert all("in use" in reason for reason in refusals(line)[:3])


def test_a_run_that_is_killed_leaves_its_camera_to_the_next_one(gige_uri: str) -> None:
    """The camera lets go of the dead one after its heartbeat of 3 s; the next run asks until then.

    The emulated one may then go on sending to the dead one until it is opened once more, which the watchdog sees to.
    """
    with another_run(gige_uri) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed_s = time.monotonic()
        with Line(FakeInspector(), [CameraPlan("a", gige_uri)]) as line:
            took_s = taken(line) - killed_s
            line.wait(lambda: len(line.ledger.entries) > 10)
        print(f"taken {took_s:.2f} s after the kill")
    assert "in use" in refusals(line)[0]
    assert took_s < HEARTBEAT_S
