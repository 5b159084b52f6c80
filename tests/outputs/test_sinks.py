"""Results arrive whole: in lines, in files that are rotated, in pictures; and a sink says when it can't write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from line_fakes import FLAT

from dapo_edge.errors import FrameError, OutputError
from dapo_edge.outputs.events import camera_text, frame_json, frame_text, statistics_text
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

TAKEN = "20010909T014640.000Z"  # 10**18 ns after 1970


def outcome(
    index: int = 0,
    camera: str = "left",
    verdict: Any = "ok",
    source: str = "rtsp://cam/1",
    taken_ns: int = 10**18,
    **of_frame: Any,
) -> Outcome:
    frame = Frame(np.full((48, 64, 3), 90, np.uint8), index, taken_ns, source, **of_frame)
    inspection = Inspection(0.25, verdict, FLAT, (), (64, 48), ms={"wait": 1.5, "total": 3.0})
    return Outcome(frame.source, index, frame, inspection, camera=camera)


def failed(index: int | None = 3) -> Outcome:
    return Outcome("rtsp://cam/1", index, error=FrameError("torn", "mend it"), camera="left")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_text_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    sink = TextLines(TextLinesOptions(kind="lines"), RunFacts())
    sink.open()
    sink.write(outcome())
    sink.note(LOST)
    sink.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    frame, camera = captured.err.splitlines()
    assert frame.startswith("left #0 "), "the address of a camera says nothing new"
    assert camera.endswith("lost: unplugged; attempt 3 in 0.4 s")
    assert camera_text(LIVE).endswith("live")


def test_text_lines_name_what_tells_sources_apart(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"source": "image:///parts/a%20b.png"}
    for run, given, start in (
        (RunFacts(("left",), frozenset({"left"})), parts, "left  image:///parts/a%20b.png #0 "),
        (RunFacts(("left", "b"), frozenset({"left"})), parts, "left  a b.png #0 "),
        (RunFacts(("left", "b"), frozenset({"left"})), {"source": "file:///belt.mp4"}, "left #0 "),
    ):
        TextLines(TextLinesOptions(kind="lines"), run).write(outcome(**given))
        assert capsys.readouterr().err.startswith(start)
    TextLines(TextLinesOptions(kind="lines"), RunFacts(("left",))).write(failed())
    assert capsys.readouterr().err.startswith("left #3  failed: torn")


def test_pictures_of_certain_verdicts(tmp_path: Path) -> None:
    sink = Pictures(PicturesOptions(kind="pictures", path=tmp_path / "p", only=("ng", "unsure")), RunFacts())
    sink.open()
    for index, verdict in enumerate(("ok", "ng", "unsure")):
        sink.write(outcome(index, verdict=verdict))
    sink.write(failed())
    sink.close()
    assert names_in(tmp_path / "p") == [f"left-{TAKEN}-000001.png", f"left-{TAKEN}-000002.png"]


def test_pictures_of_two_cameras_do_not_replace_each_other(tmp_path: Path) -> None:
    run = RunFacts(("left", "right", "a", "b"), files=frozenset({"a", "b"}))
    sink = Pictures(PicturesOptions(kind="pictures", path=tmp_path), run)
    sink.open()
    for camera in ("left", "right"):
        sink.write(outcome(5, camera, source=f"rtsp://{camera}/1"))
    for camera in ("a", "b"):
        sink.write(outcome(5, camera, source=f"image:///{camera}/part.png"))
    sink.close()
    assert names_in(tmp_path) == [
        "a-part-000005.png", "b-part-000005.png", f"left-{TAKEN}-000005.png", f"right-{TAKEN}-000005.png",
    ]  # fmt: skip


def test_pictures_of_a_given_name_say_whose_they_are(tmp_path: Path) -> None:
    run = RunFacts(("left", "a", "b"), files=frozenset({"a", "b"}))
    sink = pictures(tmp_path / "part.png", run, keep=1)
    for index in (4, 5):
        sink.write(outcome(index, taken_ns=10**18 + index * 10**9))
    for camera in ("b", "a"):
        sink.write(outcome(5, camera, source="synthetic://64x48"))
    assert names_in(tmp_path) == [
        "part-a-000005.png", "part-b-000005.png", "part-left-20010909T014645.000Z-000005.png",
    ]  # fmt: skip


def test_the_longest_names_are_short_enough_for_a_file(tmp_path: Path) -> None:
    name, rare = "n" * 64, "\U00020000" * 99  # each of them four bytes
    sink = pictures(tmp_path, RunFacts((name, "b"), files=frozenset({name})))
    sink.write(outcome(10**6, name, source=f"image:///{rare}.png"))
    assert len(names_in(tmp_path)[0].encode()) > 200


def pictures(path: Path, run: RunFacts | None = None, **options: Any) -> Pictures:
    sink = Pictures(PicturesOptions(kind="pictures", path=path, **options), run or RunFacts(("left",)))
    sink.open()
    return sink


def test_a_restart_replaces_no_picture_of_a_camera(tmp_path: Path) -> None:
    """Each run counts from 0 again, and in the last one the clock was set back."""
    for taken_ns in (10**18, 10**18 + 1_500_000, 10**18):
        for path in (tmp_path, tmp_path / "line.mp4"):
            sink = pictures(path)
            sink.write(outcome(7, taken_ns=taken_ns))
            sink.close()
    names = [f"{TAKEN}-000007-2", f"{TAKEN}-000007", f"{TAKEN[:-2]}1Z-000007"]
    files = [f"{stem}-{name}{suffix}" for stem, suffix in (("left", ".png"), ("line", ".mp4")) for name in names]
    assert names_in(tmp_path) == files


def test_the_oldest_pictures_make_room(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(bytes(50_000))
    for start in (0, 10):  # the second run finds what the first one left
        sink = pictures(tmp_path, keep=4)
        for index in range(start, start + 10):
            sink.write(outcome(index, taken_ns=10**18 + index * 10**9))
        sink.close()
    assert [name[-10:] for name in names_in(tmp_path)] == [*(f"{index:06d}.png" for index in range(16, 20)), "mine.png"]
    size = (tmp_path / names_in(tmp_path)[0]).stat().st_size
    sink = pictures(tmp_path, max_mb=2.5 * size / 1e6)
    sink.write(outcome(20, taken_ns=10**18 + 20 * 10**9))
    assert [name[-10:] for name in names_in(tmp_path)] == ["000019.png", "000020.png", "mine.png"]
    assert len(names_in(tmp_path)) == 3


def test_pictures_of_files_are_all_kept(tmp_path: Path) -> None:
    sink = pictures(tmp_path, RunFacts(("left",), files=frozenset({"left"})), keep=1)
    for index in range(3):
        sink.write(outcome(index, source="image:///parts/a.png"))
    sink.close()
    assert names_in(tmp_path) == ["a-000000.png", "a-000001.png", "a-000002.png"]


def test_a_cameras_video_is_complete_up_to_its_last_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("dapo_edge.outputs.segments.time.monotonic", lambda: now_s)
    sink = pictures(tmp_path / "line.mp4", segment_s=10, keep=2)
    for index in range(7):
        now_s = 4.0 * index
        sink.write(outcome(index, taken_ns=10**18 + index * 4 * 10**9))
    done = [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".")]
    assert [path.name for path in done] == [
        "line-20010909T014640.000Z-000000.mp4", "line-20010909T014652.000Z-000003.mp4",
    ]  # fmt: skip
    assert [frames_in(path) for path in done] == [3, 3], "although the run may be killed now"
    sink.close()
    assert [name[-10:] for name in names_in(tmp_path)] == ["000003.mp4", "000006.mp4"]


def test_what_a_killed_run_left_of_a_segment_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".line-20010909T014640.000Z-000000.999999999.part.mp4").touch()
    (tmp_path / ".other-20010909T014640.000Z-000000.999999999.part.mp4").touch()
    pictures(tmp_path / "line.mp4").close()
    assert [name[:6] for name in names_in(tmp_path)] == [".other"]


def frames_in(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()


def test_several_sources_make_a_video_each(tmp_path: Path) -> None:
    options = PicturesOptions(kind="pictures", path=tmp_path / "line.mp4")
    sink = Pictures(options, RunFacts(("left", "right", "belt"), frozenset({"left", "right"}), fps=10.0))
    sink.open()
    for index in range(3):
        sink.write(outcome(index, "left"))
    for camera in ("right", "belt"):
        sink.write(outcome(0, camera))
    sink.close()
    assert frames_in(tmp_path / f"line-belt-{TAKEN}-000000.mp4") == 1
    assert (frames_in(tmp_path / "line-left.mp4"), frames_in(tmp_path / "line-right.mp4")) == (3, 1)
    alone = Pictures(options, RunFacts(("left",), frozenset({"left"})))
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
    with pytest.raises(OutputError, match=r"line-left-.*\.mp4.* holds 0 of 1 frames"):
        sink.close()
    assert frames_in(tmp_path / f"line-right-{TAKEN}-000000.mp4") == 1


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
    assert (plans[1].queue, plans[2].queue) == (256, 8)
    assert [plan.sink.draws for plan in plans] == [False, False, True]
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
        {"name": "c", "written": 1, "lost": 0, "failed": 5, "error": "'/x' can't be written. Free some space."},
    ]
    total, left, right, sink, failing = statistics_text(whole)
    assert total == (
        "after 2 s: 9 captured, 6 inspected, 2 dropped (2 stale), 0 failed, 1 in flight; "
        "6 ok, 0 ng, 0 unsure; 3.0 frames/s"
    )
    assert left.endswith("; waited 1.0 ms, 99 % at most 2.5 ms; found again 1 times")
    assert right == "right  rtsp://cam/1  lost: 4 captured, 4 inspected, 0 dropped, 0 failed"
    assert sink == "sink b: 1 written, 5 lost, 0 failed"
    assert failing == "sink c: 1 written, 0 lost, 5 failed; '/x' can't be written. Free some space."
    (summary,) = statistics_text({**whole, "cameras": [camera], "sinks": [], "device": "CPU", "precision": "fp32"})
    assert summary.startswith("9 captured")
    assert summary.endswith("on CPU, fp32")
