"""Pictures and videos reach the disk whole, under names that tell them apart, or an error says why not."""

from __future__ import annotations

import resource
import shutil
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.errors import OutputError
from dapo_edge.outputs.recorder import Recorder
from dapo_edge.structures import Frame


def flat(value: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, np.uint8)


def frame(source: str, index: int = 0) -> Frame:
    return Frame(flat(0), index, 0, source)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        done, image = capture.read()
        if not done:
            return frames
        frames.append(image)


def test_a_folder_takes_numbered_pictures(tmp_path: Path) -> None:
    with Recorder(tmp_path / "new" / "größe") as recorder:
        paths = [recorder.write(flat(value)) for value in (10, 20)]
    assert names(tmp_path / "new" / "größe") == ["frame-000000.png", "frame-000001.png"]
    assert [cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), 1)[0, 0, 0] for path in paths] == [10, 20]


def test_a_pattern_gives_name_and_kind(tmp_path: Path) -> None:
    with Recorder(tmp_path / "part.JPG") as recorder:
        path = recorder.write(flat(10))
    assert names(tmp_path) == ["part-000000.jpg"]
    assert path.read_bytes()[:3] == b"\xff\xd8\xff"
    with Recorder(tmp_path / "part.png") as recorder:
        recorder.write(flat(10), frame("image:///a/x.png", 7))
    assert "part-000007.png" in names(tmp_path)


def test_names_come_from_the_frame_and_never_collide(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for source in (
            "image:///line1/part 7.png",
            "image:///line2/part%207.png",
            "file:///videos/größe.mp4",
            "synthetic://640x480@30?seed=1",
            "rtsp://***@host/stream/1",
            "image:///" + "部" * 300 + ".png",
            "dir:///..",
            "",
        ):
            recorder.write(flat(10), frame(source, 3))
    assert names(tmp_path) == sorted(
        [
            "part_7-000003.png",
            "part_7-000003-2.png",
            "größe-000003.png",
            "640x480_30-000003.png",
            "1-000003.png",
            "部" * 32 + "-000003.png",
            "frame-000003.png",
            "frame-000003-2.png",
        ]
    )


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Recorder(tmp_path) as recorder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the system then refuses as it does on a full disk
        try:
            with pytest.raises(OutputError, match="can't be written"):
                recorder.write(image)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_a_video(tmp_path: Path) -> None:
    with Recorder(tmp_path / "new" / "größe.mp4", fps=12.5) as recorder:
        for value in range(0, 200, 10):
            assert recorder.write(flat(value), frame("synthetic://")) == recorder.path
        assert not recorder.path.exists()  # complete or not there
    assert names(tmp_path / "new") == ["größe.mp4"]
    frames = frames_of(recorder.path)
    assert [round(float(image.mean()) / 10) for image in frames] == list(range(20))
    assert cv2.VideoCapture(str(recorder.path)).get(cv2.CAP_PROP_FPS) == 12.5


def test_other_sizes_are_fitted_into_a_video(tmp_path: Path) -> None:
    with Recorder(tmp_path / "v.mp4") as recorder:
        for image in (flat(200, 65, 47), flat(200, 20, 80), flat(200, 200, 100)):
            recorder.write(image)
    frames = frames_of(tmp_path / "v.mp4")
    assert [image.shape for image in frames] == [(48, 66, 3)] * 3
    assert frames[1][24, 2].max() < 80  # a bar beside the narrow picture
    assert frames[1][24, 33].min() > 150


def test_an_interrupted_video_keeps_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path / "v.mp4") as recorder:
        recorder.write(flat(10))
        raise KeyboardInterrupt
    assert len(frames_of(tmp_path / "v.mp4")) == 1


def test_no_frame_no_video(tmp_path: Path) -> None:
    with Recorder(tmp_path / "v.mp4"):
        pass
    assert names(tmp_path) == []


def test_a_full_disk_under_a_video_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match="of 30 frames"), Recorder(tmp_path / "v.mp4") as recorder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
            for _ in range(30):
                recorder.write(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match="no room"), Recorder(tmp_path / "v.mp4") as recorder:
        recorder.write(flat(10))
    assert names(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "v.mp4", Path("/proc/v.mp4")):
        with pytest.raises(OutputError, match="can't be written"):
            Recorder(path).open()
    with pytest.raises(OutputError, match=r"Use a path that ends in \.mp4"):
        Recorder(tmp_path / "v.avi")
    with pytest.raises(OutputError, match="not text"):
        Recorder(tmp_path / "\udcff" / "v.mp4")
    for fps in (0, -1, float("nan"), 1e9):
        with pytest.raises(OutputError, match="frames per second"):
            Recorder(tmp_path / "v.mp4", fps=fps)
    with Recorder(tmp_path / "out") as recorder, pytest.raises(OutputError, match="uint8 in BGR"):
        recorder.write(flat(1)[..., 0])
