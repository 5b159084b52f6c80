"""`dapo-edge bench` as its users call it: modes, refusals, interruptions, what is written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_edge.bench import SCHEMA, BenchPlan, bench
from dapo_edge.cli import main
from dapo_edge.cli_bench import bench as command
from dapo_edge.cli_bench import check_deadline
from dapo_edge.errors import DeadlineError, PackageIncompatible, RecipeError
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.inspector import Inspector

RUN = [sys.executable, "-m", "dapo_edge"]
SMALL = ("--source", "synthetic://96x64", "--warmup", "1")
PERCENTILES = ["n", "mean", "std", "min", "p50", "p90", "p95", "p99", "max"]
KEYS = [
    "schema", "version", "date", "command", "device", "software", "package", "backend", "precision", "source", "mode",
    "interrupted", "error", "warm_up", "frames", "failed", "seconds", "fps", "stages", "jitter_ms", "deadline", "rate",
    "find_rate", "compare", "sweeps", "histogram", "cdf", "timeline", "power", "clocks", "temperature", "memory",
    "power_mode", "others", "warnings",
]  # fmt: skip


def dapo_edge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def timed(package: EnginePackage, *arguments: object) -> dict[str, Any]:
    result = dapo_edge("bench", package.path, *SMALL, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(code: int, *texts: str, result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr, result.stderr


def test_one_frame_at_a_time(package: EnginePackage) -> None:
    found = timed(package, "--frames", 5)
    assert list(found) == KEYS
    assert found["schema"] == SCHEMA == "dapo-edge bench 2"
    assert found["mode"] == "latency"
    assert (found["source"]["width"], found["source"]["height"]) == (96, 64)
    assert list(found["stages"]) == ["capture", "preprocess", "encode", "map", "decide", "emit", "total"]
    for stage in found["stages"].values():
        assert list(stage) == PERCENTILES
        assert stage["n"] == 5
        assert stage["min"] <= stage["p50"] <= stage["p90"] <= stage["p95"] <= stage["p99"] <= stage["max"]
    assert found["warm_up"]["frames"] == 1
    assert found["warm_up"]["steady"] is None
    assert found["package"]["digest"] == package.digest
    assert found["command"].startswith("__main__.py bench")
    assert any("p99 of 5 frames" in warning for warning in found["warnings"])
    assert sum(found["histogram"]["counts"]) == 5


def test_stages_explain_the_total(package: EnginePackage) -> None:
    stages = timed(package, "--frames", 60)["stages"]
    parts = sum(stages[stage]["p50"] for stage in stages if stage != "total")
    assert parts <= stages["total"]["p50"] * 1.05
    assert parts >= stages["total"]["p50"] * 0.8


def test_at_a_rate(package: EnginePackage) -> None:
    found = timed(package, "--rate", 20, "--frames", 10, "--cameras", 2, "--deadline-ms", 5000)
    assert found["mode"] == "rate"
    assert found["rate"]["cameras"] == 2
    assert found["rate"]["captured"] == found["rate"]["inspected"] == found["frames"] == 20
    assert found["rate"]["dropped"] == found["rate"]["failed"] == 0
    assert "wait" in found["stages"]
    assert found["deadline"] == {"ms": 5000.0, "misses": 0, "share": 0.0, "met": True}
    assert found["sweeps"]["cameras"] == []
    assert found["fps"] == found["rate"]["achieved_fps"] <= 42
    assert not any("opened for the most frames" in warning for warning in found["warnings"])


def test_a_live_source_keeps_its_own_rate_and_says_so(package: EnginePackage) -> None:
    slow = timed(package, "--source", "synthetic://96x64@5?realtime=1", "--rate", 10, "--frames", 5)
    assert any("of the 10 frames/s that were asked for" in warning for warning in slow["warnings"])
    fast = timed(package, "--source", "synthetic://96x64@10?realtime=1", "--rate", 5, "--frames", 5)
    assert any("where 5 were asked for" in warning for warning in fast["warnings"])


def test_pictures_that_are_left_out_are_said(package: EnginePackage, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "good.pgm").write_bytes(b"P5 32 32 255\n" + bytes(32 * 32))
    found = timed(package, "--source", tmp_path, "--frames", 3)
    assert any("1 of the first 2 frames" in warning for warning in found["warnings"])


def test_a_table_and_a_page(package: EnginePackage, tmp_path: Path) -> None:
    page = tmp_path / "new" / "bench.html"
    result = dapo_edge("bench", package.path, *SMALL, "--frames", 5, "--report", page)
    assert result.returncode == 0, result.stderr
    assert "stage, ms" in result.stdout
    assert f"written: {page}" in result.stderr
    assert "<svg" in page.read_text(encoding="utf-8")


def test_two_packages_and_sweeps(package: EnginePackage, package_copy: Path) -> None:
    found = timed(package, "--frames", 6, "--compare", package_copy, "--batches", "1,3", "--cameras", "1,2")
    compare = found["compare"]
    assert compare["pairs"] == 6
    assert compare["verdicts_differ"] == 0
    assert compare["score_difference_max"] == 0
    assert compare["times_faster"]["low"] <= compare["times_faster"]["median"] <= compare["times_faster"]["high"]
    assert [row["frames_per_call"] for row in found["sweeps"]["batches"]] == [1, 3]
    assert [row["cameras"] for row in found["sweeps"]["cameras"]] == [1, 2]
    assert any("opened for the most frames" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "0"), "--rate"),
        (("--rate", "-5"), "--rate"),
        (("--rate", "nan"), "not a finite number"),
        (("--deadline-ms", "0"), "--deadline-ms"),
        (("--frames", "0"), "--frames"),
        (("--find-rate",), "Add --deadline-ms"),
        (("--find-rate", "--rate", "5", "--deadline-ms", "9"), "Leave out --rate or --find-rate"),
        (("--cameras", "1,x"), "no list of whole numbers"),
        (("--cameras", "0"), "0 cameras"),
        (("--batches", "99999"), "Use from 1 to 256"),
        (("--compare-precision", "int8"), "Name it with --compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_can_t_be_measured(package: EnginePackage, arguments: tuple[str, ...], message: str) -> None:
    refused(2, message, result=dapo_edge("bench", package.path, *arguments))


def test_sources_without_frames(package: EnginePackage, tmp_path: Path) -> None:
    refused(5, result=dapo_edge("bench", package.path, "--source", tmp_path))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    refused(5, "no frame that can be used", result=dapo_edge("bench", package.path, "--source", tmp_path))
    refused(5, "No such file", result=dapo_edge("bench", package.path, "--source", tmp_path / "none.png"))


def test_packages_that_are_not_there(package: EnginePackage, tmp_path: Path) -> None:
    refused(3, "there is no engine package", result=dapo_edge("bench", tmp_path / "none.dapo"))
    refused(3, "there is no engine package", result=dapo_edge("bench", package.path, "--compare", tmp_path / "none"))


def test_a_package_for_another_target(
    package: EnginePackage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PackageIncompatible("it was compiled for another GPU", "Compile it here: dapo-edge compile PKG")

    monkeypatch.setattr("dapo_edge.backends.openvino.OpenVinoBackend.open", refuse)
    with pytest.raises(SystemExit) as left:
        main(["bench", str(package.path)])
    assert left.value.code == 3
    assert "Compile it here" in capsys.readouterr().err


def test_a_report_that_can_t_be_written_is_refused_before_the_run(package: EnginePackage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    result = dapo_edge("bench", package.path, "--report", tmp_path / "file" / "x.html", "--seconds", 100)
    refused(1, "can't be written", result=result)
    assert time.monotonic() - started < 60


def test_a_deadline_below_the_encoder_s_floor(package: EnginePackage) -> None:
    result = dapo_edge("bench", package.path, *SMALL, "--find-rate", "--deadline-ms", "0.01")
    refused(6, "0.01 ms", "encode", result=result)
    late = dapo_edge("bench", package.path, *SMALL, "--frames", 5, "--deadline-ms", "0.01", "--json")
    refused(6, "5 frames late or lost (100.00%)", result=late)
    found = json.loads(late.stdout)  # nothing is lost
    assert found["deadline"]["misses"] == 5
    assert any("below what the encoder alone takes" in warning for warning in found["warnings"])


def test_a_missed_deadline_is_an_error() -> None:
    missed = {"ms": 10.0, "met": False, "misses": 3, "share": 3 / 7}
    with pytest.raises(DeadlineError, match=r"p99 of 41\.2 ms against a deadline of 10 ms: 3 frames late .*42\.86%"):
        check_deadline({"deadline": missed, "stages": {"total": {"p99": 41.23}}})
    check_deadline({"deadline": None})
    check_deadline({"deadline": {"met": True}})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("mode", [(), ("--rate", "50")], ids=["latency", "rate"])
def test_an_interruption_keeps_what_was_measured(
    package: EnginePackage, tmp_path: Path, mode: tuple[str, ...], number: signal.Signals
) -> None:
    page = tmp_path / "part.html"
    command = [*RUN, "bench", package.path, *SMALL, *mode, "--seconds", "600", "--json", "--report", page]
    with subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        until_line(process.stderr.readline, "timing frames")
        time.sleep(1.5)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    found = json.loads(out)
    assert found["interrupted"] is True
    assert found["frames"] > 0
    assert any("interrupted after" in warning for warning in found["warnings"])
    assert "interrupted" in page.read_text(encoding="utf-8")


def until_line(readline: Callable[[], str], text: str) -> None:
    while text not in (line := readline()):
        assert line, "the program ended too soon"


def test_passwords_stay_out_of_the_document(package: EnginePackage, tmp_path: Path) -> None:
    result = dapo_edge("bench", package.path, "--source", "rtsp://me:secret@127.0.0.1:9/x?dapo.open_timeout_s=1")
    assert result.returncode == 5
    assert "secret" not in result.stdout + result.stderr


def test_the_options_have_the_plan_s_defaults() -> None:
    plan, options = BenchPlan(), {option.name: option.default for option in command.params}
    assert (options["source"], options["frames"]) == (plan.source, plan.frames)


def test_from_python(package: EnginePackage) -> None:
    steps: list[str] = []
    with Inspector(package) as inspector:
        plan = BenchPlan(source="synthetic://96x64", frames=4, warm_up=0)
        found = bench(inspector, plan, progress=lambda step, done, of: steps.append(step))
        with pytest.raises(RecipeError, match="not at a rate"):
            bench(inspector, BenchPlan(rate_fps=5), compare=inspector)
    assert found["frames"] == 4
    assert found["command"] == ""
    assert set(steps) == {"timing frames"}
    assert np.isclose(found["fps"], 4 / found["seconds"], rtol=0.05)
