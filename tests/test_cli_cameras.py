"""`dapo-edge cameras`: tables for people, documents for programs, exit codes for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from click.testing import CliRunner, Result
from rigs import basler_rig, genicam_rig, sdks

from dapo_edge.cli_cameras import cameras
from dapo_edge.errors import SourceError
from dapo_edge.runtime.sources.gentl import PATH_VARIABLE


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    sdks.preload()
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.delenv("PYLON_CAMEMU", raising=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cameras, [str(argument) for argument in arguments])


def test_list_for_people() -> None:
    path = genicam_rig.producer()
    result = run("list", "--cti", path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["kind", "camera", "serial", "URI"]
    assert f"genicam://1?cti={path}" in result.stdout
    assert any(line.startswith("V4L2") for line in lines)


def test_list_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    basler_rig.emulate(monkeypatch)
    result = run("list", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "dapo-edge cameras list 1"
    kinds = {kind["kind"]: kind for kind in document["kinds"]}
    assert [camera["uri"] for camera in kinds["Basler"]["cameras"]] == ["basler://0815-0000", "basler://0815-0001"]
    assert set(kinds["Basler"]["cameras"][0]) == {"uri", "model", "serial", "note"}
    assert PATH_VARIABLE in kinds["GenICam"]["problem"]
    assert kinds["Basler"]["problem"] is None


def test_a_wrong_cti_is_an_error() -> None:
    genicam_rig.producer()
    result = run("list", "--cti", "/nowhere/x.cti")
    assert isinstance(result.exception, SourceError)
    assert result.exception.exit_code == 5


def test_probe_for_people(tmp_path: Path) -> None:
    picture = tmp_path / "last.png"
    result = run("probe", "synthetic://96x64@30", "--frames", 5, "--save", picture)
    assert result.exit_code == 0
    assert "96 x 64 BGR8" in result.stdout
    assert "5 in" in result.stdout
    assert "0 failed, 0 lost" in result.stdout
    assert "latency      not available" in result.stdout
    assert cv2.imread(str(picture)).shape == (64, 96, 3)


def test_probe_as_json() -> None:
    result = run("probe", genicam_rig.uri(PixelFormat="Mono8"), "--frames", 5, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["frames"] == 5
    assert document["pixel_format"] == "Mono8"
    assert document["latency_ms"] is None
    assert document["interval_ms"]["n"] == 4
    assert document["live"] is True


def test_a_silent_camera_is_exit_code_5(monkeypatch: pytest.MonkeyPatch) -> None:
    basler_rig.emulate(monkeypatch)
    result = run("probe", basler_rig.uri(trigger="Line1"), "--seconds", 0.3)
    assert isinstance(result.exception, SourceError)
    assert result.exception.exit_code == 5
    assert "gave no frame that can be used within 0.3 s" in str(result.exception)
    assert "frames come by a trigger" in result.stdout
    assert "never came" in result.stdout


def test_what_can_not_be_opened_says_why(tmp_path: Path) -> None:
    result = run("probe", tmp_path / "none.mp4")
    assert isinstance(result.exception, SourceError)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [("--seconds", 0), ("--seconds", "nan"), ("--frames", 0), ("--save", "picture.txt")]
)
def test_wrong_options_are_usage_errors(arguments: tuple[object, ...]) -> None:
    assert run("probe", "synthetic://96x64@30", *arguments).exit_code == 2
