"""benchmarks/guard.py: what it flags, what it forgives, and that a busy machine alone does not look slower."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.package import EnginePackage

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import guard
import guard_metrics
from guard import Committed, against, band_of, committed_in, in_words
from guard_metrics import Metric, Reading, Watched, read, slowed, timed, together


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Two metrics whose ratios, of one measurement after the other, are these; the last one stays."""
    ratios = {"inspect": [1.5], "map": [0.5]}
    visits = dict.fromkeys(ratios, 0)

    def metric(name: str, of_each: int) -> Watched:
        @contextlib.contextmanager
        def opened(plant: float) -> Iterator[Metric]:
            """What it is."""
            visits[name] += 1
            ratio = ratios[name][0]
            if visits[name] % of_each == 0 and len(ratios[name]) > 1:
                ratios[name].pop(0)
            yield Metric(lambda: 10 * ratio * (1 + plant), lambda: 10.0, 4)

        return Watched(opened, of_each)

    monkeypatch.setattr(guard, "METRICS", {"inspect": metric("inspect", 2), "map": metric("map", 3)})
    monkeypatch.setattr(guard, "visited_alone", guard.visited)
    return ratios


@pytest.fixture
def file(tmp_path: Path, machine: dict[str, list[float]]) -> Path:
    """The committed file of that machine."""
    path = tmp_path / "guard.json"
    assert guard.written(path) == 0
    return path


def test_the_file_says_what_was_measured_and_how(file: Path) -> None:
    document = json.loads(file.read_text())
    assert document["schema"] == "dapo-edge guard 1"
    assert document["command"] == "python benchmarks/guard.py --write"
    assert document["device"]["cores"] >= 1 and document["date"].endswith("+00:00")
    entry = document["metrics"]["inspect"]
    assert entry["ratio"] == pytest.approx(1.5)
    assert entry["reruns"] == pytest.approx([1.5] * guard.RERUNS)
    assert (entry["band"], entry["what"]) == (guard.LEAST_BAND, "What it is.")
    assert committed_in(file) == {
        "inspect": Committed(entry["ratio"], 0.05),
        "map": Committed(document["metrics"]["map"]["ratio"], 0.05),
    }


def test_the_same_code_passes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main(["--out", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "inspect: 1.500 -> 1.500 (+0.0%, band 5.0%), as it was",
        "map: 0.500 -> 0.500 (+0.0%, band 5.0%), as it was",
    ]


def test_a_slowdown_fails_and_is_named(
    file: Path, machine: dict[str, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["map"] = [0.55]
    assert guard.main(["--out", str(file)]) == 1
    out = capsys.readouterr().out
    assert "map: 0.500 -> 0.550 (+10.0%, band 5.0%), SLOWER, measured 4 times" in out
    assert "inspect: 1.500 -> 1.500 (+0.0%, band 5.0%), as it was" in out


def test_a_single_slow_measurement_is_forgiven(
    file: Path, machine: dict[str, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["map"] = [0.6, 0.58, 0.51]
    assert guard.main(["--json", "--out", str(file)]) == 0
    finding = json.loads(capsys.readouterr().out)["findings"][1]
    assert (finding["name"], finding["verdict"], finding["tries"]) == ("map", "same", 3)
    assert finding["new"] == pytest.approx(0.51)


def test_a_gain_asks_for_an_update(
    file: Path, machine: dict[str, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["inspect"] = [1.2]
    assert guard.main(["--out", str(file)]) == 0
    assert "inspect: 1.500 -> 1.200 (-20.0%, band 5.0%), faster: update with --write" in capsys.readouterr().out


def test_a_planted_slowdown_is_caught(file: Path) -> None:
    assert guard.main(["--plant", "0.1", "--out", str(file)]) == 1
    assert guard.main(["--plant", "0.02", "--out", str(file)]) == 0


def test_an_unknown_device_gets_its_ratios(
    tmp_path: Path, machine: dict[str, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guard.main(["--out", str(tmp_path / "guard.json")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("nothing is committed for this device")
    assert lines == ["inspect: 1.500", "map: 0.500"]
    assert not list(tmp_path.iterdir())


def test_other_versions_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(file.read_text())
    now = document["device"]["packages"]["numpy"]
    document["device"]["packages"]["numpy"] = "1.0"
    file.write_text(json.dumps(document))
    assert guard.main(["--out", str(file)]) == 0
    assert f"other versions than then: numpy 1.0 -> {now}" in capsys.readouterr().out


def test_the_self_test_writes_what_it_found(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.self_tested(file) == 0
    outcome = json.loads(file.read_text())["self_test"]
    assert outcome["caught"] == ["inspect", "map"]
    assert (outcome["missed"], outcome["clean_runs"], outcome["clean_runs_flagged"]) == ([], 10, 0)
    assert json.loads(capsys.readouterr().out) == outcome
    assert guard.main(["--out", str(file)]) == 0


def test_the_self_test_fails_where_the_guard_sleeps(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "visited_alone", lambda names, plant: guard.visited(names, 0.0))
    assert guard.self_tested(file) == 1
    assert json.loads(file.read_text())["self_test"]["missed"] == ["inspect", "map"]


def test_the_self_test_fails_where_the_guard_cries_wolf(file: Path, machine: dict[str, list[float]]) -> None:
    machine["map"] = [0.6]
    assert guard.self_tested(file) == 1
    outcome = json.loads(file.read_text())["self_test"]
    assert (outcome["clean_runs_flagged"], outcome["flagged"]) == (10, ["map"])


def test_a_noisy_metric_is_not_written(
    tmp_path: Path, machine: dict[str, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["map"] = [0.5, 0.53, 0.47, 0.5]
    with pytest.raises(BackendError, match=r"'map' moves by 4\.9% \(standard deviation\) from run to run"):
        guard.written(tmp_path / "guard.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("spread", "band"), [(0.0, 0.05), (0.01, 0.05), (0.02, 0.06), (0.029, 0.087)])
def test_bands(spread: float, band: float) -> None:
    assert band_of("map", spread) == pytest.approx(band)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema": "dapo-edge guard 1", "metrics": {"map": {"ratio": 1}}}', '{"schema": "x", "metrics": {}}']
    + [
        json.dumps({"schema": "dapo-edge guard 1", "metrics": {"map": entry}})
        for entry in ({"ratio": 0, "band": 0.05}, {"ratio": 1, "band": 0.5}, {"ratio": "1", "band": 0.05})
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "guard.json"
    path.write_text(content)
    assert guard.main(["--out", str(path)]) == 2
    assert "is not what the guard wrote. Write it again: python benchmarks/guard.py --write." in capsys.readouterr().err


def test_a_metric_that_the_file_lacks_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "METRICS", {**guard.METRICS, "encode": guard.METRICS["map"]})
    with pytest.raises(RecipeError, match="has other metrics than the guard: encode"):
        guard.compared(file, 0.0, as_json=False)
    with pytest.raises(RecipeError, match="has other metrics than the guard: encode"):
        guard.self_tested(file)


@pytest.mark.parametrize("flag", ["--write", "--self-test"])
def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "measured", lambda names, plant: pytest.fail("measured first"))
    assert guard.main([flag, "--out", str(tmp_path)]) == 1
    assert "can't be written (it is no plain file)" in capsys.readouterr().err


def test_a_self_test_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Write it first: python benchmarks/guard\.py --write"):
        guard.self_tested(tmp_path / "guard.json")


@pytest.mark.parametrize("arguments", [["--plant", "-0.1"], ["--plant", "x"], ["--plant", "0.1", "--write"]])
def test_impossible_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        guard.main(arguments)
    assert error.value.code == 2


def test_a_visit_that_breaks_off_is_told() -> None:
    with pytest.raises(BackendError, match=r"a visit broke off \(exit code 2\)"):
        guard.visited_alone(["no such metric"], 0.0)


def test_a_visit_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real one, of a metric that takes no package."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import os\nprint(os.getpid(), file=open(os.environ['SEEN'], 'w'))\n")
    monkeypatch.setenv("SEEN", str(tmp_path / "pid"))
    readings = guard.visited_alone(["preprocess 720p"], 0.1)
    assert readings["preprocess 720p"].ratio > 0
    assert int((tmp_path / "pid").read_text()) != os.getpid()


def test_pairs_cancel_what_both_sides_feel() -> None:
    """A machine that becomes ten times slower halfway through leaves the ratio where it was."""
    calls: list[str] = []

    def side(name: str, ms: float) -> Any:
        def run() -> float:
            calls.append(name)
            return ms * (10 if len(calls) > 12 else 1)

        return run

    reading = read(Metric(side("ours", 3.0), side("yardstick", 2.0), pairs=9))
    assert (reading.ratio, reading.spread) == (1.5, 0.0)
    assert calls[:4] == ["yardstick", "ours", "ours", "yardstick"]
    assert len(calls) == 2 * (guard_metrics.WARM + 9)


def test_one_odd_visit_does_not_count() -> None:
    visits = [Reading(ratio, 0.01, 3 * ratio, 3.0) for ratio in (1.4, 1.41, 1.9, 1.39, 1.4)]
    assert together(visits) == Reading(1.4, 0.01, pytest.approx(4.2), 3.0)


def test_a_slowed_call_does_its_work_and_takes_longer() -> None:
    def work(x: int) -> int:
        time.sleep(0.02)
        return x + 1

    assert slowed(work, 0.0) is work
    started = time.perf_counter()
    assert slowed(work, 2.0)(1) == 2
    assert time.perf_counter() - started >= 0.06
    assert timed(lambda: time.sleep(0.005), times=3)() >= 15


def test_words_name_old_new_and_band(machine: dict[str, list[float]]) -> None:
    machine["map"] = [2.4]
    (finding,) = against({"map": Committed(2.0, 0.06)}, {"map": Reading(2.5, 0, 1, 1)}, 0.0)
    assert in_words(finding) == "map: 2.000 -> 2.400 (+20.0%, band 6.0%), SLOWER, measured 4 times"


def test_every_metric_measures_both_sides(demo: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones of the small model, once."""
    monkeypatch.setattr(guard_metrics, "reference_package", lambda: demo)
    monkeypatch.setattr(guard_metrics, "FRAMES_EACH", 2)
    small = (guard_metrics.inspect_reference, guard_metrics.preprocess, guard_metrics.map_vga)
    for opened in (*small, guard_metrics.four_cameras):
        with opened(0.0) as metric, opened(0.1) as planted:
            assert metric.ours() > 0 and metric.yardstick() > 0 and metric.pairs >= 3
            assert planted.ours() > 0
        assert opened in [watched.opened for watched in guard_metrics.METRICS.values()]
