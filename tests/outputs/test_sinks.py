"""Results arrive whole: in lines, in files that are rotated, in pictures; and a sink says when it can't write."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from line_fakes import FLAT

from dapo_edge.errors import FrameError, OutputError
from dapo_edge.outputs.events import camera_text, frame_json, frame_text, statistics_text
from dapo_edge.outputs.lines import LineFile, Stdout
from dapo_edge.outputs.sinks import (
    SINKS,
    JsonLines,
    JsonLinesOptions,
    Pictures,
    PicturesOptions,
    RunFacts,
    TextLines,
    TextLinesOptions,
    sink_plans,
)
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.structures import Frame, Inspection
from dapo_edge.terminal import ReaderGone


def outcome(index: int = 0, camera: str = "left", verdict: Any = "ok", source: str = "rtsp://cam/1", **of_frame: Any):
    frame = Frame(np.full((48, 64, 3), 90, np.uint8), index, 10**18, source, **of_frame)
    inspection = Inspection(0.25, verdict, FLAT, (), (64, 48), ms={"wait": 1.5, "total": 3.0})
    return Outcome(frame.source, index, frame, inspection, camera=camera)


def failed(index: int | None = 3) -> Outcome:
    return Outcome("rtsp://cam/1", index, error=FrameError("torn", "mend it"), camera="left")


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LOST = CameraEvent("left", "rtsp://cam/1", "lost", "unplugged", 2, 0.4321, 10**18)
LIVE = CameraEvent("left", "rtsp://cam/1", "live", timestamp_ns=10**18)


def json_lines(path: Path, run: RunFacts | None = None, **options: Any) -> JsonLines:
    sink = JsonLines(JsonLinesOptions(kind="jsonl", path=path, **options), run or RunFacts())
    sink.open()
    return sink


def test_frame_lines_hold_the_documented_keys() -> None:
    assert list(frame_json(outcome())) == [
        "camera", "source", "index", "timestamp_ns", "score", "verdict", "defects", "ms",
    ]  # fmt: skip
    after_loss = frame_json(outcome(lost=2, resumed=True))
    assert (after_loss["lost"], after_loss["resumed"], after_loss["camera"]) == (2, True, "left")
    assert list(frame_json(failed())) == ["camera", "source", "index", "timestamp_ns", "error"]
    assert "2 lost before it, first after a loss" in frame_text(outcome(lost=2, resumed=True))
    assert frame_text(failed()).startswith("left  rtsp://cam/1 #3  failed: torn")


def test_json_lines_hold_frames_failures_and_cameras(tmp_path: Path) -> None:
    sink = json_lines(tmp_path / "new" / "r.jsonl")
    sink.write(outcome(7))
    sink.write(failed())
    sink.note(LOST)
    assert len(lines_of(tmp_path / "new" / "r.jsonl")) == 3, "they are there before the sink is closed"
    sink.close()
    frame, error, camera = lines_of(tmp_path / "new" / "r.jsonl")
    assert (frame["index"], frame["ms"]) == (7, {"wait": 1.5, "total": 3.0})
    assert error["error"].startswith("torn")
    assert camera == {
        "camera": {
            "name": "left", "source": "rtsp://cam/1", "state": "lost", "reason": "unplugged", "attempt": 2,
            "retry_s": 0.432, "timestamp_ns": 10**18,
        }
    }  # fmt: skip


def test_that_a_file_begins_and_ends_is_no_news(tmp_path: Path) -> None:
    sink = json_lines(tmp_path / "r.jsonl", RunFacts(("left",), files=frozenset({"left"})))
    sink.note(LIVE)
    assert lines_of(tmp_path / "r.jsonl") == []
    sink.note(LOST)
    sink.close()
    assert len(lines_of(tmp_path / "r.jsonl")) == 1


def test_a_cut_off_line_is_ended_and_the_next_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"index": 1}\n{"ind')
    sink = json_lines(path)
    sink.write(outcome(2))
    sink.close()
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["index"], torn, json.loads(last)["index"]) == (1, '{"ind', 2)
    json_lines(path).close()
    assert path.read_text().count("\n") == 3, "a whole line is left as it is"


def test_files_are_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    file = LineFile(path, max_mb=100e-6, keep=2)
    file.open()
    for number in range(20):
        file.append(f"{number:029d}")  # with its end 30 bytes, so that three fit
    file.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r.jsonl", "r.jsonl.1", "r.jsonl.2"]
    kept = [
        int(line) for name in ("r.jsonl.2", "r.jsonl.1", "r.jsonl") for line in (tmp_path / name).read_text().split()
    ]
    assert kept == list(range(12, 20))
    assert all(entry.stat().st_size <= 100 for entry in tmp_path.iterdir())


def test_rotation_without_old_files_and_lines_longer_than_a_file(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "r", max_mb=10e-6, keep=0)
    file.open()
    for text in ("a" * 50, "b"):
        file.append(text)
    file.close()
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["b\n"]


def test_a_file_that_was_moved_or_removed_is_begun_anew(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "r")
    file.open()
    file.append("1")
    (tmp_path / "r").rename(tmp_path / "old")
    file.append("2")
    (tmp_path / "r").unlink()
    file.append("3")
    file.close()
    assert ((tmp_path / "old").read_text(), (tmp_path / "r").read_text()) == ("1\n", "3\n")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:4])

    file = LineFile(tmp_path / "r")
    file.open()
    file.append("whole")
    file.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode, buffering: Full(self, mode.replace("b", "")))
        with pytest.raises(OutputError, match=r"No space left.*Free some space"):
            file.append("cut off")
    file.close()
    assert (tmp_path / "r").read_bytes() == b"whole\n"


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "r.jsonl", tmp_path, Path("/proc/r.jsonl"), Path("a\0b")):
        with pytest.raises(OutputError, match="can't be written"):
            json_lines(path)
    if Path("/dev/full").exists():
        file = LineFile(Path("/dev/full"))
        with pytest.raises(OutputError, match="No space left"):
            file.append("x")
        file.close()


def test_stdout_that_breaks_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    stdout = Stdout(lambda: told.append("broken"))
    stdout.append("fine")
    assert capsys.readouterr().out == "fine\n"

    def gone(text: str) -> None:
        raise ReaderGone

    monkeypatch.setattr("dapo_edge.outputs.lines.print_text", gone)
    for _ in range(2):
        with pytest.raises(OutputError, match="nobody reads stdout"):
            stdout.append("lost")
    assert told == ["broken"]
    assert isinstance(stdout.broken, ReaderGone)


def test_text_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    sink = TextLines(TextLinesOptions(kind="lines"), RunFacts())
    sink.open()
    sink.write(outcome())
    sink.note(LOST)
    sink.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    frame, camera = captured.err.splitlines()
    assert "left  rtsp://cam/1 #0" in frame
    assert camera.endswith("lost: unplugged; attempt 3 in 0.4 s")
    assert camera_text(LIVE).endswith("live")


def test_pictures_of_certain_verdicts(tmp_path: Path) -> None:
    sink = Pictures(PicturesOptions(kind="pictures", path=tmp_path / "p", only=("ng", "unsure")), RunFacts())
    sink.open()
    for index, verdict in enumerate(("ok", "ng", "unsure")):
        sink.write(outcome(index, verdict=verdict))
    sink.write(failed())
    sink.close()
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["left-000001.png", "left-000002.png"]


def test_pictures_of_two_cameras_do_not_replace_each_other(tmp_path: Path) -> None:
    run = RunFacts(("left", "right", "a", "b"), files=frozenset({"a", "b"}))
    sink = Pictures(PicturesOptions(kind="pictures", path=tmp_path), run)
    sink.open()
    for camera in ("left", "right"):
        sink.write(outcome(5, camera, source=f"rtsp://{camera}/1"))
    for camera in ("a", "b"):
        sink.write(outcome(5, camera, source=f"image:///{camera}/part.png"))
    sink.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["left-000005.png", "part-000005-2.png", "part-000005.png", "right-000005.png"]


def frames_in(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()


def test_several_cameras_make_a_video_each(tmp_path: Path) -> None:
    options = PicturesOptions(kind="pictures", path=tmp_path / "line.mp4")
    sink = Pictures(options, RunFacts(("left", "right"), fps=10.0))
    sink.open()
    for index in range(3):
        sink.write(outcome(index, "left"))
    sink.write(outcome(0, "right"))
    sink.close()
    assert (frames_in(tmp_path / "line-left.mp4"), frames_in(tmp_path / "line-right.mp4")) == (3, 1)
    alone = Pictures(options, RunFacts(("left",)))
    alone.open()
    alone.write(outcome())
    alone.close()
    assert frames_in(tmp_path / "line.mp4") == 1


def test_every_video_is_completed_though_one_fails(tmp_path: Path) -> None:
    sink = Pictures(PicturesOptions(kind="pictures", path=tmp_path / "line.mp4"), RunFacts(("left", "right")))
    sink.open()
    for camera in ("left", "right"):
        sink.write(outcome(0, camera))
    next(tmp_path.glob(".line-left*.part.mp4")).unlink()
    with pytest.raises(OutputError, match=r"line-left\.mp4.* holds 0 of 1 frames"):
        sink.close()
    assert frames_in(tmp_path / "line-right.mp4") == 1


def test_sinks_are_made_by_kind(tmp_path: Path) -> None:
    plans = sink_plans(
        [
            JsonLinesOptions(kind="jsonl", name="results", queue=7, policy="newest"),
            TextLinesOptions(kind="lines"),
            PicturesOptions(kind="pictures", path=tmp_path),
        ],
        RunFacts(),
    )
    assert [type(plan.sink) for plan in plans] == list(SINKS.values())
    assert [plan.sink.name for plan in plans] == ["results", "lines", "pictures"]
    assert (plans[0].queue, plans[0].policy, plans[1].policy) == (7, "newest", None)
    with pytest.raises(OutputError, match=r"\.avi"):
        sink_plans([PicturesOptions(kind="pictures", path=Path("x.avi"))], RunFacts())


def account(**counts: int) -> dict[str, Any]:
    dropped = {"policy": 0, "stale": 0, "camera": 0, "shutdown": 0}
    zero = dict.fromkeys(("captured", "inspected", "dropped", "failed", "in_flight"), 0)
    return {**zero, "dropped_by": dropped, **counts}


def test_statistics_for_people() -> None:
    camera = {**account(captured=4, inspected=4), "name": "left", "source": "rtsp://cam/1", "state": "live"}
    camera |= {"waiting_ms": {"p50": 1.0, "p99": 2.5, "max": 3.0}, "reconnects": 1}
    silent = {**camera, "name": "right", "waiting_ms": None, "reconnects": 0, "state": "lost"}
    whole = account(captured=9, inspected=6, dropped=2, in_flight=1)
    whole["dropped_by"] = {**whole["dropped_by"], "stale": 2}
    whole |= {"verdicts": {"ok": 6, "ng": 0, "unsure": 0}, "fps": 3.0, "seconds": 2.0, "cameras": [camera, silent]}
    whole["sinks"] = [
        {"name": "a", "written": 6, "lost": 0, "failed": 0},
        {"name": "b", "written": 1, "lost": 5, "failed": 0},
    ]
    total, left, right, sink = statistics_text(whole)
    assert total == (
        "after 2 s: 9 captured, 6 inspected, 2 dropped (2 stale), 0 failed, 1 in flight; "
        "6 ok, 0 ng, 0 unsure; 3.0 frames/s"
    )
    assert left.endswith("; waited 1.0 ms, 99 % at most 2.5 ms; found again 1 times")
    assert right == "right  rtsp://cam/1  lost: 4 captured, 4 inspected, 0 dropped, 0 failed"
    assert sink == "sink b: 1 written, 5 lost, 0 failed"
    (summary,) = statistics_text({**whole, "cameras": [camera], "sinks": [], "device": "CPU", "precision": "fp32"})
    assert summary.startswith("9 captured")
    assert summary.endswith("on CPU, fp32")


def test_dev_null_is_no_file_to_rotate() -> None:
    file = LineFile(Path(os.devnull), max_mb=1e-6, keep=1)
    file.open()
    for _ in range(3):
        file.append("x" * 10)
    file.close()
    assert Path(os.devnull).is_char_device()
