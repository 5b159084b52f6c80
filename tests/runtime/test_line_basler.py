"""An emulated Basler camera on a whole line: torn frames, a pulled cable, triggers, and an engine that is too slow."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import pytest
from line_fakes import FakeInspector
from rigs import basler_rig
from rigs.line_rig import Line, percentile_ms

from dapo_edge import Inspector, assets
from dapo_edge.config import load_recipe
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.plan import CameraPlan
from dapo_edge.runtime.sources.basler import BaslerSource

SMALL = {"Width": 128, "Height": 96, "PixelFormat": "Mono8"}
FAST = {**SMALL, "AcquisitionFrameRateEnable": 1, "AcquisitionFrameRate": 100}


@pytest.fixture(autouse=True)
def _emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    basler_rig.emulate(monkeypatch)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """The demo's package, with little calibration."""
    from dapo_edge.engine.build import build

    recipe = load_recipe(Path(assets.__file__).parent / "surface-tiny.yaml")
    quick = {
        "gate": recipe.gate.model_copy(update={"count": 2}),
        "thresholds": recipe.thresholds.model_copy(update={"count": 8}),
    }
    return build(recipe.model_copy(update=quick), tmp_path_factory.mktemp("demo") / "demo.dapo")


def test_three_torn_frames_are_three_failed_ones() -> None:
    with Line(FakeInspector(), [CameraPlan("a", basler_rig.uri(**FAST), policy="wait", frames=60)]) as line:
        line.wait(lambda: len(line.ledger.entries) > 10)
        basler_rig.node(line.source(), "ForceFailedBufferCount").FromString("3")
        basler_rig.node(line.source(), "ForceFailedBuffer").Execute()
        counts = line.end()
    assert (counts.captured, counts.inspected, counts.failed, counts.dropped) == (60, 57, 3, 0)
    failed = [entry.index for entry in line.ledger.entries if entry.failed]
    assert failed == list(range(failed[0], failed[0] + 3))  # type: ignore[arg-type, operator]
    assert [entry.index for entry in line.ledger.entries] == list(range(60))
    assert line.ledger.states("a") == ["connecting", "live", "ended"]  # a torn frame is no lost camera


def test_a_pulled_cable_is_found_again_beside_a_camera_that_never_notices() -> None:
    plans = [
        CameraPlan(serial, basler_rig.uri(serial, **FAST), policy="wait", queue=50) for serial in basler_rig.SERIALS
    ]
    pulled, other = basler_rig.SERIALS
    with Line(FakeInspector(batch=2), plans) as line:
        for times in range(1, 4):
            line.wait(lambda: all(len(line.ledger.of(name)) > 20 * times for name in basler_rig.SERIALS))  # noqa: B023
            before = line.source()
            pulled_s = time.monotonic()
            basler_rig.node(before, "FirePnPCallback").Execute()
            found = line.resumed(pulled, pulled_s)
            assert line.source() is not before
            print(f"found again in {found.done_s - pulled_s:.2f} s")
            assert found.done_s - pulled_s < 3.0
    assert line.ledger.states(pulled) == ["connecting", "live", *["lost", "live"] * 3, "ended"]
    reasons = [change.event.reason for change in line.ledger.changes if change.event.state == "lost"]
    assert len(reasons) == 3
    assert all("was removed" in reason for reason in reasons)
    assert line.ledger.states(other) == ["connecting", "live", "ended"]
    for name in basler_rig.SERIALS:
        indices = [entry.index for entry in line.ledger.of(name)]
        assert indices == list(range(len(indices)))
    assert line.pipeline.counts().dropped == 0


def test_the_lines_rate_triggers_and_a_verdict_follows(demo: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 2 idle cores 13 ms for a trigger to become a frame, and 3 ms for its verdict to reach the sink."""
    triggered_s: list[float] = []
    execute = BaslerSource._execute_trigger

    def note_and_execute(source: BaslerSource) -> None:
        triggered_s.append(time.monotonic())
        execute(source)

    monkeypatch.setattr(BaslerSource, "_execute_trigger", note_and_execute)
    uri = basler_rig.uri(trigger="software", ExposureTime=1000, Width=640, Height=480, PixelFormat="Mono8")
    with Inspector(demo) as inspector, Line(inspector, [CameraPlan("a", uri, fps=20, frames=60)]) as line:
        counts = line.end()
    assert (counts.captured, counts.inspected) == (60, 60)
    entries = line.ledger.entries[10:]
    starts = triggered_s[10:60]
    assert [entry.index for entry in entries] == list(range(10, 60))
    took_s = [entry.done_s - start_s for entry, start_s in zip(entries, starts, strict=True)]
    to_frame_s = [entry.arrived_s - start_s for entry, start_s in zip(entries, starts, strict=True)]  # type: ignore[operator]
    intervals_s = [after - before for before, after in itertools.pairwise(starts)]
    for name, seconds in (("verdict", took_s), ("frame", to_frame_s), ("next trigger", intervals_s)):
        print(f"trigger to {name}: median {percentile_ms(seconds, 50):.1f}, p99 {percentile_ms(seconds, 99):.1f} ms")
    assert all(seconds > 0 for seconds in (*took_s, *to_frame_s))
    assert statistics.median(took_s) < 0.1
    assert 0.045 < statistics.mean(intervals_s) < 0.055
    assert line.pipeline.cameras[0].lane.policy == "wait"  # no part may be left out


def test_wait_holds_the_camera_back_and_loses_nothing() -> None:
    """The emulated camera stops while it has no free buffer. 100 frames a second meet an engine that makes 25."""
    plan = CameraPlan("a", basler_rig.uri(**FAST, buffers=4), policy="wait", queue=2)
    with Line(FakeInspector(seconds=0.04), [plan]) as line:
        line.wait(lambda: len(line.ledger.entries) > 5)
        began_s, before = time.monotonic(), sent(line)
        time.sleep(1.0)
        rate = (sent(line) - before) / (time.monotonic() - began_s)
        print(f"{rate:.0f} frames/s, of 100")
        assert 5 < rate < 30
    counts = line.pipeline.counts()
    assert counts.dropped == counts.failed == 0
    assert [entry.index for entry in line.ledger.entries] == list(range(counts.captured))
    assert line.pipeline.as_json()["cameras"][0]["reconnects"] == 0


def test_newest_lets_the_camera_go_on_and_leaves_frames_out() -> None:
    plan = CameraPlan("a", basler_rig.uri(**FAST, buffers=4), policy="newest", queue=2)
    with Line(FakeInspector(seconds=0.04), [plan]) as line:
        line.wait(lambda: len(line.ledger.entries) > 30)
        counts, rate = line.pipeline.counts(), sent(line)
    counts = line.pipeline.counts()
    assert counts.dropped == counts.dropped_by["policy"] > counts.inspected
    assert counts.inspected + counts.dropped == counts.captured >= rate - 4


def sent(line: Line) -> int:
    """Frames that the camera says it has delivered."""
    return int(line.source()._camera.GetStreamGrabberNodeMap().GetNode("Statistic_Total_Buffer_Count").ToString())
