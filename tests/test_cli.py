"""The command line as a user meets it: a subprocess, its streams and its exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dapo_edge.package import EnginePackage

RUN = [sys.executable, "-m", "dapo_edge"]


def dapo_edge(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)], capture_output=True, encoding="utf-8", timeout=120, check=False, **options
    )


def refused(code: int, *texts: str, result: subprocess.CompletedProcess[str]) -> None:
    """Exit code, and one line on stderr that starts with "error:" and holds all texts."""
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in errors[0]


@pytest.fixture(scope="module")
def recipe_file(tiny_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_fields))
    return path


def test_build_run_and_accounting(recipe_file: Path, tmp_path: Path) -> None:
    built = dapo_edge("build", recipe_file, "-o", tmp_path / "p.dapo", "--json")
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["package"] == str(tmp_path / "p.dapo")
    assert "accuracy gate" in built.stderr
    assert "seeded weights" in built.stderr
    assert "every verdict is 'unsure'" in built.stderr

    run = dapo_edge(
        "run", tmp_path / "p.dapo", "synthetic://128x96@30?seed=1", "--frames", 3, "--json", "--out", tmp_path / "o"
    )
    assert run.returncode == 0, run.stderr
    *lines, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert list(line) == ["camera", "source", "index", "timestamp_ns", "score", "verdict", "defects", "ms"]
        assert set(line["ms"]) == {"wait", "preprocess", "encode", "map", "decide", "total"}
        assert line["verdict"] in ("ok", "ng", "unsure")
        for defect in line["defects"]:
            assert list(defect) == ["type", "score", "area_px", "box"]
    summary = last["summary"]
    assert (summary["captured"], summary["inspected"], summary["dropped"], summary["failed"]) == (3, 3, 0, 0)
    assert sum(summary["verdicts"].values()) == 3
    assert len(list((tmp_path / "o").glob("*.png"))) == 3


def test_text_goes_to_stderr_only(package: EnginePackage) -> None:
    run = dapo_edge("run", package.path, "synthetic://64x64@30?frames=2")
    assert run.stdout == ""
    assert "2 captured, 2 inspected, 0 dropped, 0 failed" in run.stderr


def test_bad_frames_are_counted_and_the_run_goes_on(package: EnginePackage, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "d.png").touch()
    run = dapo_edge("run", package.path, tmp_path, "--json")
    refused(5, "2 of 4 frames could not be used", result=run)
    *lines, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert [("error" in line) for line in lines] == [False, True, False, True]
    assert "d.png" in lines[3]["error"]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert [line["source"].rpartition("/")[2] for line in lines] == ["a.png", "b.png", "c.png", "d.png"]
    summary = last["summary"]
    assert (summary["captured"], summary["inspected"], summary["failed"]) == (4, 2, 2)


def test_show(package: EnginePackage) -> None:
    shown = json.loads(dapo_edge("show", package.path, "--json").stdout)
    assert shown["defects"] == {"scratch": "scratch", "missing part": "missing part", "glue": "dried glue strip"}
    assert shown["digest"] == package.digest
    assert "dried glue strip" in dapo_edge("show", package.path).stdout


def test_recipe_errors(recipe_file: Path, tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    def build(**changes: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({**tiny_fields, **changes}))
        return dapo_edge("build", tmp_path / "r.yaml", "-o", tmp_path / "x.dapo")

    refused(2, "unknown key 'precission' (did you mean 'precision'?)", result=build(precission="fp32"))
    refused(2, "'image_size' is 'big'", result=build(image_size="big"))
    refused(2, "unknown method 'dap'", "dapo", result=build(method="dap"))
    refused(2, "unknown backbone model 'ViT-B-61'", "ViT-B-16", result=build(backbone={"model": "ViT-B-61"}))
    refused(2, "can't be read", result=dapo_edge("build", tmp_path / "none.yaml"))
    refused(2, "no recipe given", result=dapo_edge("build"))
    refused(2, "No such option", result=dapo_edge("build", recipe_file, "--fast"))
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_tune(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {**tiny_fields, "image_size": 64, "prompts": {"defects": ["hole", "stain"]}}
    fields["tuning"] = {"images": 8, "validation": 0.5, "loss_px": 16, "stages": [{"epochs": 1}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
    first = dapo_edge("tune", tmp_path / "r.yaml", "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert list(result) == ["schema", "tuned", "epochs", "best_epoch", "best"]
    assert (result["schema"], result["epochs"], result["best_epoch"]) == ("dapo-edge tune 1", 1, 1)
    assert {"map_loss", "image_loss", "pixel_auroc", "image_auroc", "aupro", "type_accuracy"} <= result["best"].keys()
    assert result["tuned"] == "tuned/tiny/best.safetensors"
    assert (tmp_path / result["tuned"]).is_file()
    refused(2, "can't be read", result=dapo_edge("tune", tmp_path / "none.yaml"))
    refused(2, "Missing argument", result=dapo_edge("tune"))


def test_package_and_source_errors(package: EnginePackage, package_copy: Path, tmp_path: Path) -> None:
    refused(3, "there is no engine package", result=dapo_edge("run", tmp_path / "no.dapo", "synthetic://"))
    refused(5, "unknown kind", "synthetic://", result=dapo_edge("run", package.path, "rtps://camera"))
    refused(5, "No such file", result=dapo_edge("run", package.path, tmp_path / "none.png"))
    (tmp_path / "video.mp4").write_bytes(b"not a video")
    refused(5, "video.mp4", result=dapo_edge("run", package.path, tmp_path / "video.mp4"))
    blocked = dapo_edge("run", package.path, "synthetic://?frames=1", "--out", package.encoder_path() / "sub")
    refused(1, "can't be written", result=blocked)
    refused(2, "not a map size", result=dapo_edge("run", package.path, "synthetic://", "--map-size", "0x5"))
    encoder = package_copy / "encoder.onnx"
    encoder.write_bytes(encoder.read_bytes()[:-1])
    for command in (["show"], ["doctor"], ["bench"]):
        refused(3, "truncated or edited", "build it again", result=dapo_edge(*command, package_copy))


def test_weights_without_a_network(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {**tiny_fields, "backbone": {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "HF_HOME": str(tmp_path / "hf")}
    result = dapo_edge("build", tmp_path / "r.yaml", "-o", tmp_path / "x.dapo", env=offline)
    refused(7, "can't be downloaded", "backbone.checkpoint", result=result)
    assert not list(tmp_path.glob("*.dapo"))


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, **options
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_stopping_a_run(package: EnginePackage, number: int, code: int) -> None:
    process = start("run", package.path, "synthetic://64x64@30", "--json")
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    summary = json.loads(output.splitlines()[-1])["summary"]
    assert summary["captured"] == summary["inspected"] >= 5, "the frame in hand is finished"
    assert "Traceback" not in errors


def test_sigterm_wakes_a_waiting_source(package: EnginePackage) -> None:
    process = start("run", package.path, "synthetic://64x64@0.02?realtime=1", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["index"] == 0
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["summary"]["captured"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["loading", "exporting", "gate"])
def test_stopping_a_build(recipe_file: Path, package_copy: Path, number: int, step: str) -> None:
    process = start("build", recipe_file, "-o", package_copy)
    assert process.stderr is not None
    while step not in process.stderr.readline():
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    assert EnginePackage.open(package_copy).manifest.name == "tiny"
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


def test_a_reader_that_goes_away(package: EnginePackage) -> None:
    command = (
        f"set -o pipefail; {' '.join(RUN)} run {package.path} synthetic://64x64@30 --frames 400 --json | head -n 1"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert json.loads(result.stdout)["index"] == 0
    assert result.returncode == 0
    assert result.stderr == ""


def test_closed_streams_do_not_stop_the_line(package: EnginePackage, tmp_path: Path) -> None:
    for closed in (">&-", "--json 2>&-", ">&- 2>&-"):
        command = f"{' '.join(RUN)} run {package.path} 'synthetic://64x64@30?frames=2' --out {tmp_path} {closed}"
        assert subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False).returncode == 0


def test_results_that_nobody_can_get_are_an_error(package: EnginePackage) -> None:
    for command in (f"run {package.path} 'synthetic://64x64@30?frames=2' --json", f"show {package.path}"):
        result = subprocess.run(
            ["bash", "-c", f"{' '.join(RUN)} {command} >&-"], capture_output=True, text=True, timeout=60, check=False
        )
        refused(1, "stdout is closed", result=result)


def test_output_is_utf8_whatever_the_locale_says(package: EnginePackage, tmp_path: Path) -> None:
    odd = bytes(tmp_path) + b"/teil-\xff-\xc3\xbc.png"
    Path(os.fsdecode(odd)).write_bytes(encoded_picture())
    environment = {**os.environ, "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [*map(str.encode, RUN), b"run", bytes(package.path), odd, b"--json"],
        capture_output=True, check=False, timeout=60, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.decode("utf-8").splitlines()[0])
    assert "ü" in line["source"]


def encoded_picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def test_overlays_never_replace_what_they_are_made_of(package: EnginePackage, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded_picture())
    (tmp_path / "a-000000.png").write_bytes(encoded_picture())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    cases = [(tmp_path, tmp_path), (f"dir://{tmp_path}", tmp_path), (tmp_path / "a.png", tmp_path)]
    for source, out in [*cases, (tmp_path / "a.png", tmp_path / "a.png")]:
        refused(1, "is where the source", result=dapo_edge("run", package.path, source, "--out", out))
    refused(1, "not a path", result=dapo_edge("run", package.path, tmp_path, "--out", "rtsp://u:secret@cam/1"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for fine in ("overlays", "results.2024"):
        assert dapo_edge("run", package.path, tmp_path, "--out", tmp_path / fine).returncode == 0
    dotted = tmp_path / "pics.v2"
    dotted.mkdir()
    (dotted / "x.png").write_bytes(encoded_picture())
    refused(1, "is where the source", result=dapo_edge("run", package.path, dotted / "x.png", "--out", dotted))


def test_a_broken_source_does_not_keep_the_others_waiting(package: EnginePackage, tmp_path: Path) -> None:
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "cut.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(40):
        writer.write(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    writer.release()
    whole = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    run = dapo_edge("run", package.path, tmp_path / "cut.avi", "synthetic://64x64?frames=3", "--json")
    refused(5, "breaks off", result=run)
    sources = [json.loads(line).get("source", "") for line in run.stdout.splitlines()]
    assert sum(source.startswith("synthetic") for source in sources) == 3


def test_passwords_are_never_printed(package: EnginePackage, tmp_path: Path) -> None:
    process = start("run", package.path, "rtsp://user:geheim@localhost:1/stream", "--json")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert json.loads(lines[1])["camera"]["state"] == "lost"
    assert "rtsp://***@localhost:1/stream" in output
    assert "geheim" not in "".join(lines) + output + errors
    for arguments in (
        ["run", "rtsp://user:geheim@cam/1", package.path],
        ["show", "rtsp://user:geheim@cam/1"],
        ["run", package.path, "file:///v.mp4?password=geheim"],
        ["run", package.path, "synthetic://64x64?token=geheim"],
    ):
        result = dapo_edge(*arguments)
        assert result.returncode in (2, 3, 5)
        assert "geheim" not in result.stdout + result.stderr
        assert result.stderr.count("error:") == 1


def test_paths_with_at_signs_are_not_taken_for_passwords(package: EnginePackage, tmp_path: Path) -> None:
    for name in ("10:30@cam1.png", "me@plant.png", "pass=2.png"):
        refused(5, name, result=dapo_edge("run", package.path, tmp_path / name))
        if "=" not in name:  # without a folder it can't be told from a setting that holds a password
            refused(5, name, result=dapo_edge("run", package.path, name, cwd=tmp_path))


def test_sigterm_in_the_middle_of_a_video(package: EnginePackage, tmp_path: Path) -> None:
    """The signal lands inside a read; it must not wait for the lock that the read holds."""
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 30, (1920, 1080))
    noise = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)
    for index in range(60):
        writer.write(np.roll(noise, 40 * index, axis=1))
    writer.release()
    for pause in (0.0, 0.05, 0.11):
        process = start("run", package.path, tmp_path / "v.mp4", "--json")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "summary" in output.splitlines()[-1]


def test_without_a_command_there_is_help() -> None:
    result = dapo_edge()
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: dapo-edge")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_stdout_that_is_full(package: EnginePackage) -> None:
    for command in (["show", package.path], ["run", package.path, "synthetic://64x64@30?frames=2"]):
        with open("/dev/full", "w") as full:  # noqa: PTH123
            result = subprocess.run(
                [*RUN, *map(str, command), "--json"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                timeout=60,
            )
        refused(1, "stdout", "No space left on device", result=result)


def test_help_comes_at_once() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        dapo_edge("--help")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) <= 0.5


def test_the_first_result_comes_within_two_seconds(package: EnginePackage) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        dapo_edge("run", package.path, "synthetic://640x480?frames=1")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) <= 2


def test_help_of_every_command() -> None:
    help_text = dapo_edge("--help").stdout
    for command in ("build", "tune", "synth", "run", "show", "doctor", "bench", "demo"):
        assert command in help_text
        assert dapo_edge(command, "--help").returncode == 0
    assert json.loads(dapo_edge("build", "--schema").stdout)["title"] == "Recipe"
    assert yaml.safe_load(dapo_edge("build", "--print-demo-recipe").stdout)["name"] == "surface-tiny"
