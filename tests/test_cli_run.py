"""`dapo-edge run` with a fake engine: configs, options, previews, statistics. Its end is in test_cli_run_stop.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from line_fakes import ScriptedSource, scripted
from line_main import Engine
from PIL import Image

from dapo_edge.cli import main
from dapo_edge.errors import FrameError, SourceError
from dapo_edge.package import EnginePackage

LINE = [sys.executable, str(Path(__file__).with_name("line_main.py"))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Engine]]:
    """The engines that runs make in this process."""
    made: list[Engine] = []

    def make(package: object, **options: Any) -> Engine:
        made.append(Engine(package, **options))
        return made[-1]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("dapo_edge.runtime.inspector.Inspector", make)
    yield made
    signal.signal(signal.SIGTERM, before)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
        self.frames = [line for line in lines if "index" in line]
        self.events = [line["camera"] for line in lines if isinstance(line.get("camera"), dict)]
        self.summary = lines[-1].get("summary") if lines else None


@pytest.fixture
def dapo_edge(engine: list[Engine], capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return call


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump({"package": "p.dapo", **content}))
    return path


def test_a_config_runs(dapo_edge: Any, engine: list[Engine], tmp_path: Path) -> None:
    config = write(
        tmp_path / "line.yaml",
        map_size=[32, 32],
        thresholds={"image": 0.25},
        sources=[{"uri": "scripted://a", "name": "left"}, {"uri": "scripted://b", "frames": 2}],
        sinks=[{"kind": "jsonl", "path": "results.jsonl"}],
    )
    with scripted(a=[range(3)] * 2, b=[range(9)] * 2):
        done = dapo_edge("run", "--config", config)
    assert done.code == 0, done.err
    assert done.out == ""
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    by_camera = {name: [line["index"] for line in lines if line["camera"] == name] for name in ("left", "camera2")}
    assert by_camera == {"left": [0, 1, 2], "camera2": [0, 1]}
    total, *cameras = done.err.splitlines()
    assert total.startswith("5 captured, 5 inspected, 0 dropped, 0 failed; 5 ok, 0 ng, 0 unsure; ")
    assert total.endswith(" frames/s on none, fp32")
    assert [line.split()[0] for line in cameras] == ["left", "camera2"]
    assert engine[0].options == {"backend": "openvino", "precision": None, "map_size": (32, 32), "throughput": True}
    assert engine[0].thresholds.image.value == 0.25


def test_options_win_over_the_config(dapo_edge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "line.yaml", sources=[{"uri": "scripted://a"}])
    monkeypatch.setenv("DAPO_EDGE_RUN__SOURCES__0__NAME", "left")
    monkeypatch.setenv("DAPO_EDGE_RUN__SOURCES__0__FRAMES", "2")
    options = [
        "--policy",
        "wait",
        "--max-age-ms",
        "9000",
        "--fps",
        "500",
        "--tiles",
        "64x48:8",
        "--region",
        "0,0,64,48",
    ]
    with scripted():
        printed = dapo_edge("run", "--config", config, "--frames", 3, *options, "--set", "drain_s=2", "--print-config")
    assert printed.code == 0, printed.err
    (source,) = yaml.safe_load(printed.out)["sources"]
    assert source == {
        "name": "left", "uri": "scripted://a", "policy": "wait", "max_age_ms": 9000.0, "fps": 500.0, "frames": 3,
        "queue": 4, "regions": [{"box": [0, 0, 64, 48]}], "tiles": {"size": [64, 48], "overlap": 8},
    }  # fmt: skip
    assert yaml.safe_load(printed.out)["drain_s"] == 2.0
    with scripted(a=[range(9)] * 2):
        done = dapo_edge("run", "--config", config, "--frames", 3, *options, "--json")
    assert [line["index"] for line in done.frames] == [0, 1, 2]
    assert done.summary["cameras"][0]["name"] == "left"
    assert "note: left: thresholds hold for pictures like those" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["p.dapo"], 2, "Missing argument"),
        (["p.dapo", "scripted://a", "--region", "1,2,3"], 2, "'1,2,3' is no value of --region"),
        (["p.dapo", "scripted://a", "--region", "0,0,-5,5"], 2, "is no value of --region"),
        (["p.dapo", "scripted://a", "--tiles", "64x"], 2, "is no value of --tiles"),
        (["p.dapo", "scripted://a", "--tiles", "64:64"], 2, "not larger than their overlap"),
        (["p.dapo", "scripted://a", "--fps", "0"], 2, "'sources.0.fps' is 0"),
        (["p.dapo", "scripted://a", "--set", "sources.0.uri"], 2, "sets nothing"),
        (["p.dapo", "scripted://a", "--backend", "openvin"], 2, "Did you mean 'openvino'?"),
        (["p.dapo", "scripted://a", "--stats-every", "0"], 2, "--stats-every"),
        (["p.dapo", "scripted://a", "--stats-every", "nan"], 2, "'nan' is not a finite number"),
        (["p.dapo", "scripted://a", "--stats-every", "inf"], 2, "--stats-every"),
        (["p.dapo", "scripted://a", "--fps", "nan"], 2, "'--fps': 'nan' is not a finite number"),
        (["p.dapo", "scripted://a", "--fps", "inf"], 2, "'--fps': 'inf' is not a finite number"),
        (["p.dapo", "scripted://a", "--max-age-ms", "nan"], 2, "'--max-age-ms': 'nan' is not"),
        (["p.dapo", "scripted://a", "--max-age-ms", "inf"], 2, "'--max-age-ms': 'inf' is not"),
        (["p.dapo", "scripted://a", "--set", "sources.0.silence_s=.nan"], 2, "finite number"),
        (["--config", "none.yaml"], 2, "can't be read"),
        (["p.dapo", "rtps://cam/1"], 5, "unknown kind"),
        (["p.dapo", "scripted://a", "--preview", "x.bmp"], 1, "not the name of a picture"),
        (["p.dapo", "scripted://a", "--out", "rtsp://u:geheim@cam/1"], 1, "not a path"),
    ],
)
def test_bad_options(
    dapo_edge: Any, engine: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with scripted(a=[range(2)] * 2):
        done = dapo_edge("run", *arguments)
    assert done.code == code, done.err
    assert message in done.err
    assert "geheim" not in done.err
    assert engine == []
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_read_or_written_shows_before_the_engine_is_loaded(
    dapo_edge: Any, engine: list[Engine], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    config = write(tmp_path / "line.yaml", sources=[{"uri": "empty"}, {"uri": "bad.mp4"}, {"uri": "synthetic://"}])
    done = dapo_edge("run", "--config", config)
    assert done.code == 5
    assert "holds no image" in done.err, "all of them at once"
    assert "bad.mp4" in done.err
    config = write(
        tmp_path / "line.yaml", sources=[{"uri": "synthetic://"}], sinks=[{"kind": "jsonl", "path": "bad.mp4/r.jsonl"}]
    )
    done = dapo_edge("run", "--config", config)
    assert (done.code, engine) == (1, [])
    assert "can't be written" in done.err


def test_cameras_are_not_waited_for(dapo_edge: Any, engine: list[Engine]) -> None:
    gone = SourceError("unplugged", "plug it in")
    with scripted(a=[[gone], [gone], [0, 1]]) as opened:
        done = dapo_edge("run", "p.dapo", "camera://a", "--frames", 2, "--json")
    assert done.code == 0, done.err
    assert [line["index"] for line in done.frames] == [0, 1]
    states = [event["state"] for event in done.events]
    assert states == ["connecting", "lost", "lost", "live", "ended"]
    assert (done.events[1]["reason"], done.events[2]["attempt"]) == ("unplugged", 2)
    assert len(opened) == 3
    assert done.summary["cameras"][0]["reconnects"] == 1


def test_failed_frames_and_broken_files_show_at_the_end(dapo_edge: Any) -> None:
    torn = FrameError("torn", "mend it").at(1, "scripted://a/1")
    with scripted(a=[[0, torn, 2]] * 2):
        done = dapo_edge("run", "p.dapo", "scripted://a", "--json")
    assert done.code == 5
    assert "error: 1 of 3 frames could not be used" in done.err
    assert [("error" in line) for line in done.frames] == [False, True, False]
    assert (done.summary["inspected"], done.summary["failed"]) == (2, 1)
    with scripted(a=[[0, SourceError("breaks off", "copy it again")]] * 2, b=[range(4)] * 2):
        done = dapo_edge("run", "p.dapo", "scripted://a", "scripted://b", "--json")
    assert done.code == 5
    assert "error: breaks off" in done.err
    assert done.summary["inspected"] == 5
    assert [event["state"] for event in done.events] == ["ended"], "of files, only troubles are told"


def test_a_sink_that_fails_shows_at_the_end(dapo_edge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, image: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dapo_edge.outputs.recorder.save_picture", refuse)
    with scripted(a=[range(3)] * 2):
        ScriptedSource.shape = (48, 64, 3)
        try:
            done = dapo_edge("run", "p.dapo", "scripted://a", "--json", "--out", tmp_path / "o")
        finally:
            ScriptedSource.shape = (16, 16, 3)
    assert done.code == 1
    assert "the sink 'pictures' failed 3 times" in done.err
    assert [line["index"] for line in done.frames] == [0, 1, 2], "it loses its own results only"
    assert {sink["name"]: sink["failed"] for sink in done.summary["sinks"]} == {"jsonl": 0, "pictures": 3}


def test_a_preview_of_each_source(dapo_edge: Any, engine: list[Engine], package: EnginePackage, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 300, 3), np.uint8)).save(tmp_path / "parts" / "a.png")
    config = write(
        tmp_path / "line.yaml",
        package=str(package.path),
        sources=[
            {"uri": "parts", "regions": [{"box": [20, 20, 200, 100]}], "tiles": {"size": 96, "overlap": 16}},
            {"uri": "synthetic://128x96", "name": "belt"},
        ],
    )
    done = dapo_edge("run", "--config", config, "--preview", tmp_path / "p" / "look.png", "--json")
    assert done.code == 0, done.err
    assert [entry["camera"] for entry in json.loads(done.out)["preview"]] == ["camera1", "belt"]
    sizes = {path.name: cv2.imread(str(path)).shape[:2] for path in (tmp_path / "p").iterdir()}
    assert sizes == {"look-camera1.png": (200, 300), "look-belt.png": (96, 128)}
    assert engine == [], "nothing is inspected"
    alone = dapo_edge("run", package.path, tmp_path / "parts" / "a.png", "--preview", tmp_path / "look.jpg")
    assert (alone.code, (tmp_path / "look.jpg").exists(), alone.out) == (0, True, "")
    outside = dapo_edge("run", "--config", config, "--region", "0,0,400,50", "--preview", tmp_path / "no.png")
    assert outside.code == 2
    assert "camera1: the region of interest at (0, 0) reaches to (400, 50)" in outside.err
    for target in (tmp_path / "parts" / "look.png", tmp_path / "parts" / "a.png"):
        refused = dapo_edge("run", package.path, tmp_path / "parts", "--preview", target)
        assert refused.code == 1
        assert "is where the source" in refused.err
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["a.png"]
    with scripted(a=[[0], []]):
        ScriptedSource.shape = (64, 64, 3)
        try:
            later = dapo_edge("run", package.path, "scripted://a", "scripted://a", "--preview", tmp_path / "some.png")
        finally:
            ScriptedSource.shape = (16, 16, 3)
    assert (later.code, later.err.splitlines()[0]) == (5, f"camera1: {tmp_path / 'some-camera1.png'}")
    assert (tmp_path / "some-camera1.png").exists(), "and that it does is said, though a later source fails"
    with scripted(a=[[FrameError("torn", "mend it")]]):
        empty = dapo_edge("run", package.path, "scripted://a", "--preview", tmp_path / "no.png")
    assert (empty.code, (tmp_path / "no.png").exists()) == (5, False)
    assert "gave no frame" in empty.err


def test_what_many_views_cost_is_said(dapo_edge: Any) -> None:
    calls = {"64": "121 views per frame: about 31 engine calls per frame", "320": None}
    for size, message in calls.items():
        done = dapo_edge("run", "p.dapo", "synthetic://640x640?frames=1", "--tiles", f"{size}:4", "--json")
        assert done.code == 0, done.err
        assert ("views per frame" in done.err) == (message is not None)
        assert message is None or f"note: camera1: {message}" in done.err
    regions = [option for number in range(65) for option in ("--region", f"{number},0,32,32")]
    with scripted(a=[range(1)] * 2):
        done = dapo_edge("run", "p.dapo", "scripted://a", *regions)
    assert "note: camera1: 65 views per frame: about 17 engine calls per frame" in done.err


def test_statistics_now_and_then(dapo_edge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPO_TEST_ENGINE_MS", "60")
    with scripted(a=[range(8)] * 2):
        done = dapo_edge("run", "p.dapo", "scripted://a", "--json", "--stats-every", "0.1")
    statistics = [json.loads(line)["statistics"] for line in done.out.splitlines() if '"statistics"' in line[:15]]
    assert 2 <= len(statistics) <= 8
    for now in statistics:
        assert now["captured"] == now["inspected"] + now["dropped"] + now["failed"] + now["in_flight"]
    assert statistics[0]["inspected"] < done.summary["inspected"] == 8
    with scripted(a=[range(8)] * 2):
        text = dapo_edge("run", "p.dapo", "scripted://a", "--stats-every", "0.1")
    assert "after 0 s: " in text.err
    assert text.out == ""


def test_schema_and_printed_config_need_no_package(dapo_edge: Any, tmp_path: Path) -> None:
    assert json.loads(dapo_edge("run", "--schema").out)["title"] == "RunConfig"
    config = write(tmp_path / "line.yaml", sources=[{"uri": "rtsp://u:geheim@cam/1"}])
    printed = dapo_edge("run", "--config", config, "--print-config")
    assert "geheim" not in printed.out + printed.err
    assert yaml.safe_load(printed.out)["sources"][0]["uri"] == "rtsp://***@cam/1"
