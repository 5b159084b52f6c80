"""benchmarks/peers.py: contenders take turns, and who computes something else or breaks is not timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_edge.errors import BackendError
from dapo_edge.package import EnginePackage

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers
from peer_contenders import CONTENDERS
from peer_results import times_faster
from peer_spec import Spec


class FakeProcess:
    """In the place of a contender's process: computes what it is told to, and takes as long."""

    asked: list[str]
    made: list[str]
    maps: dict[str, float]  # by loader and precision, what its maps are off by; beyond 1: it can't be loaded
    about_of: dict[str, str]  # what it says that it runs as, where that is none of its precisions
    side: dict[str, int]  # of its maps, where that is another one
    breaks: str | None

    def __init__(self, python: str, spec: Spec, log: Path) -> None:
        self.name = log.stem
        FakeProcess.made.append(self.name)
        if self.maps.get(self.name, 0) > 1:
            raise BackendError("it is not installed", "Install it")
        kind = CONTENDERS[self.name].precision.partition("-")[0]
        runs_as = kind if kind in ("fp32", "bf16", "fp16", "int8") else "bf16"
        self.about = {"runs_as": self.about_of.get(self.name, runs_as), "versions": {}, "notes": []}
        self.cpu_s = 0.0

    def ask(self, *, do: str, out: str = "", warm: int = 0, frames: int = 0) -> dict[str, Any]:
        if do == "check":
            side = self.side.get(self.name, 8)
            anomaly = np.tile(np.linspace(0, 1, side), (4, side, 1)) + self.maps.get(self.name, 0)
            np.savez(out, anomaly=anomaly, types=np.zeros((4, 8, 8), np.uint8), reference=anomaly[:1])
            return {"ms": 10.0}
        FakeProcess.asked.append(self.name)
        if self.breaks == self.name:
            raise BackendError("its process ended", "Look")
        return {"raw": [10.0] * frames, "jpeg": [20.0] * frames}

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def stage(package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peers.Stage:
    monkeypatch.setattr(peers, "Process", FakeProcess)
    monkeypatch.setattr(peers, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(peers, "available_mb", lambda: 1e6)
    FakeProcess.asked, FakeProcess.made, FakeProcess.maps, FakeProcess.breaks = [], [], {}, None
    FakeProcess.about_of, FakeProcess.side = {}, {}
    return peers.Stage(package, tmp_path, peers.Options(rounds=3, budget_s=0.08, anomalib_python=None))


def test_everyone_begins_a_round_once(stage: peers.Stage) -> None:
    stage.measure(["eager-fp32", "ort-fp32", "ours-int8"])
    eager, ort, ours = "eager-fp32", "ort-fp32", "ours-int8"
    assert FakeProcess.asked == [eager, ours, ort, ours, ort, eager, ort, eager, ours]
    assert [len(one) for one in stage.rounds] == [3, 3, 3]
    assert len(stage.rounds[0][ort]["raw"]) == 4, "80 ms for frames of 10 ms, each raw and as a JPEG"
    assert stage.waiting_cpu_share == 0


def test_who_is_wrong_is_not_timed(stage: peers.Stage) -> None:
    FakeProcess.maps = {"ort-fp32": 0.05, "eager-bf16": 0.004, "openvino": float("nan"), "compile-fp32": 2}
    stage.measure(["eager-fp32", "eager-bf16", "compile-fp32", "ort-fp32", "openvino", "anomalib-winclip", "ours-int8"])
    found = {name: row["status"] for name, row in stage.rows.items()}
    assert found == {
        "eager-fp32": "timed",
        "ours-int8": "timed",
        "eager-bf16": "timed",
        "compile-fp32": "missing",
        "ort-fp32": "wrong",
        "openvino": "wrong",
        "anomalib-winclip": "missing",
    }
    assert set(FakeProcess.asked) == {"eager-fp32", "ours-int8", "eager-bf16"}
    assert stage.rows["compile-fp32"]["reason"] == "it is not installed"
    assert stage.rows["anomalib-winclip"]["reason"] == "anomalib is not installed here"
    assert stage.rows["ort-fp32"]["difference"]["max_difference"] == pytest.approx(0.05)


def test_maps_that_can_t_be_compared_stop_nobody_else(stage: peers.Stage) -> None:
    FakeProcess.side, FakeProcess.about_of = {"ort-fp32": 9}, {"openvino": "fp4"}
    stage.measure(["eager-fp32", "ort-fp32", "openvino", "ours-int8"])
    assert "(4, 9, 9) can't be compared with (4, 8, 8)" in stage.rows["ort-fp32"]["reason"]
    assert stage.rows["openvino"]["reason"] == "it runs as fp4, for which there is no bound"
    assert {name for one in stage.rounds for name in one} == {"eager-fp32", "ours-int8"}


def test_without_the_reference_nobody_is_right(stage: peers.Stage) -> None:
    FakeProcess.maps = {"eager-fp32": 2}
    stage.measure(["eager-fp32", "ours-int8"])
    assert {row["status"] for row in stage.rows.values()} == {"missing"}
    assert "torch in FP32 failed" in stage.rows["ours-int8"]["reason"]
    assert not FakeProcess.asked


def test_short_memory_makes_groups_that_can_be_compared(stage: peers.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available_mb", lambda: 0.0)
    stage.measure(["eager-fp32", "ort-fp32", "openvino", "ours-int8"])
    assert [set(one) for one in stage.rounds] == [{"eager-fp32", "ours-int8", "ort-fp32"}] * 3 + [
        {"eager-fp32", "ours-int8", "openvino"}
    ] * 3
    assert times_faster(stage.rounds, "ours-int8", "openvino", "raw") == {"median": 1, "min": 1, "max": 1}


def test_who_breaks_in_a_round_is_out(stage: peers.Stage) -> None:
    FakeProcess.breaks = "ort-fp32"
    stage.measure(["eager-fp32", "ort-fp32", "ours-int8"])
    assert stage.rows["ort-fp32"] == {"status": "missing", "reason": "failed while it was timed: its process ended"}
    assert FakeProcess.asked.count("ort-fp32") == 1
    assert FakeProcess.asked.count("ours-int8") == 3


def test_a_busy_machine_is_told(
    package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Busy:
        def summary(self) -> dict[str, float]:
            return {"share": 0.3}

    monkeypatch.setattr(peers, "Bystanders", Busy)
    monkeypatch.setattr(peers, "package_of", lambda configuration, folders: package)
    monkeypatch.setattr(peers, "contenders_for", lambda configuration, only: [])
    found = peers.measured("reference", (tmp_path,), peers.Options(rounds=1, budget_s=1.0, anomalib_python=None))
    assert found["others"] == {"share": 0.3}
    assert "WARNING: other programs took 30% of the processors: measure again" in capsys.readouterr().err
