"""`dapo-edge calibrate` as a user meets it: files, streams, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from test_cli import RUN, dapo_edge, refused

from dapo_edge.calibration.histograms import ESTIMATORS
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.config import load_recipe
from dapo_edge.data.surfaces import make_surface

LINEARS = [f"block{block}.{role}" for block in range(1, 6) for role in ("qkv", "out", "fc1", "fc2")]


@pytest.fixture
def recipe_file(tiny_fields: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(tiny_fields))
    return path


def test_the_file_the_table_and_the_line_for_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    done = dapo_edge("calibrate", recipe_file, "--frames", "synthetic", "--count", 9, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "calibration" / "tiny.ranges.json"
    ranges = ActivationRanges.read(written)
    assert list(ranges.linears) == LINEARS
    assert [path.name for path in written.parent.iterdir()] == ["tiny.ranges.json"]
    heading, *rows = done.stdout.splitlines()
    assert heading.split() == ["widest", "outliers", "max", "99.99", "%", "times", "entropy", "mse"]
    spread = {name: linear.max / linear.estimates["percentile_99.99"] for name, linear in ranges.linears.items()}
    assert [row.split()[0] for row in rows] == sorted(LINEARS, key=lambda name: -spread[name])[:8]
    assert "20 Linears over 9 frames (9 looked at, 0 unreadable, 0 without contrast)" in done.stderr
    assert "fewer than 32 miss values" in done.stderr
    line = done.stderr.splitlines()[-1].removeprefix("for the recipe: ")
    recipe_file.write_text(f"{recipe_file.read_text()}{line}\n")
    calibration = load_recipe(recipe_file).calibration
    assert calibration.frames == "synthetic"
    assert calibration.ranges is not None
    assert calibration.ranges.resolve() == written
    assert calibration.count == 9


def test_one_document_on_stdout(recipe_file: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(40):
        Image.fromarray(make_surface(number, (96, 96)).image).save(frames / f"{number}.png")
    (frames / "1.png").write_bytes((frames / "1.png").read_bytes()[:200])
    without = recipe_file.read_text()
    section = {
        "frames": str(frames),
        "count": 8,
        "estimator": "mse",
        "migration": 0.5,
        "keep": ["block2", "block1.fc1"],
    }
    recipe_file.write_text(f"{without}calibration: {json.dumps(section)}\n")
    asked = load_recipe(recipe_file)
    done = dapo_edge("calibrate", recipe_file, "-o", tmp_path / "new" / "r.json", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["file"]) == ("dapo-edge calibrate 1", str(tmp_path / "new" / "r.json"))
    assert list(found["linears"]) == LINEARS
    assert tuple(found["linears"]["block1.qkv"]) == ESTIMATORS
    assert [found["frames"][key] for key in ("offered", "unreadable", "used", "not_picked")] == [24, 1, 8, 15]
    assert "1.png" in done.stderr
    line = done.stderr.splitlines()[-1].removeprefix("for the recipe: ")
    assert f"frames: {os.path.relpath(frames, recipe_file.parent)}" in line
    recipe_file.write_text(f"{without}{line}\n")
    pasted = load_recipe(recipe_file)
    assert pasted.calibration.ranges is not None
    assert pasted.calibration.ranges.samefile(tmp_path / "new" / "r.json")
    again = pasted.calibration.model_copy(update={"frames": str(frames), "ranges": None})
    assert (Path(str(pasted.calibration.frames)).resolve(), again) == (frames, asked.calibration), "nothing is lost"
    assert not (tmp_path / "calibration").exists()


def test_what_can_not_be_calibrated_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    def calibrate(*arguments: object) -> subprocess.CompletedProcess[str]:
        return dapo_edge("calibrate", recipe_file, *arguments, cwd=tmp_path)

    refused(2, "names no calibration frames", "--frames", result=calibrate())
    refused(2, "do not exist", result=calibrate("--frames", "nowhere"))
    refused(2, "--count", result=calibrate("--frames", "synthetic", "--count", 7))
    refused(5, "unknown kind", result=calibrate("--frames", "rtps://user:secret@host"))
    refused(2, "nothing.yaml", result=dapo_edge("calibrate", tmp_path / "nothing.yaml"))
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.png").write_bytes(b"no picture")
    refused(2, "holds 1 frames, calibration needs 8", result=calibrate("--frames", "few"))
    refused(1, "can't be written", result=calibrate("--frames", "synthetic", "-o", recipe_file / "r.json"))
    assert "secret" not in calibrate("--frames", "rtps://user:secret@host").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "recipes"], "no empty folder is left behind"


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, "loading"), (signal.SIGTERM, "exporting"), (signal.SIGINT, "measuring")]
)
def test_stopping_leaves_an_old_file_alone(recipe_file: Path, tmp_path: Path, number: int, step: str) -> None:
    old = tmp_path / "r.ranges.json"
    old.write_text("old")
    process = subprocess.Popen(
        [*RUN, "calibrate", str(recipe_file), "--frames", "synthetic", "--count", "500", "-o", str(old)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    while step not in process.stderr.readline():
        time.sleep(0.001)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (output, errors.splitlines()[-1]) == ("", "interrupted")
    assert old.read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "dapo-edge"))], (
        "nothing is left behind"
    )


@pytest.mark.parametrize("place", ["recipes/tiny.yaml", ".", ""])
def test_what_is_no_ranges_file_is_never_replaced(recipe_file: Path, tmp_path: Path, place: str) -> None:
    before = recipe_file.read_text()
    refused(1, result=dapo_edge("calibrate", recipe_file, "--frames", "synthetic", "-o", place, cwd=tmp_path))
    assert recipe_file.read_text() == before


def test_a_damaged_ranges_file_may_be_replaced(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ranges.json").write_text("{")
    done = dapo_edge(
        "calibrate", recipe_file, "--frames", "synthetic", "--count", 8, "-o", "x.ranges.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert list(ActivationRanges.read(tmp_path / "x.ranges.json").linears) == LINEARS
