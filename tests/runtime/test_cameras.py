"""What is found on this machine, and what a probe says about a source."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rigs import basler_rig, genicam_rig, sdks

from dapo_edge.errors import FrameError, SourceError, SourceRefused
from dapo_edge.runtime import cameras
from dapo_edge.runtime.cameras import Listing, list_cameras, probe
from dapo_edge.runtime.sources import Properties, Source
from dapo_edge.runtime.sources.gentl import PATH_VARIABLE
from dapo_edge.structures import Frame


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    sdks.preload()
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.delenv("PYLON_CAMEMU", raising=False)


@pytest.fixture
def v4l2(tmp_path: Path) -> Path:
    """What the kernel writes about a webcam with two streams, and one that has no name."""
    for number, name, index in (
        (10, "Late Cam", "0"),
        (2, "HD [Pro] Webcam: USB", "0"),
        (3, "HD [Pro] Webcam: USB", "1"),
    ):
        folder = tmp_path / f"video{number}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "index").write_text(f"{index}\n")
    (tmp_path / "video11").mkdir()
    (tmp_path / "v4l-subdev0").mkdir()
    return tmp_path


def of_kind(listings: tuple[Listing, ...], kind: str) -> Listing:
    return next(listing for listing in listings if listing.kind == kind)


def test_v4l2_cameras_have_their_names(v4l2: Path) -> None:
    found = of_kind(list_cameras(v4l2_names=v4l2), "V4L2").cameras
    assert [camera.uri for camera in found] == [f"v4l2:///dev/video{number}" for number in (2, 3, 10, 11)]
    assert [camera.model for camera in found] == ["HD [Pro] Webcam: USB", "HD [Pro] Webcam: USB", "Late Cam", "video11"]
    assert [bool(camera.note) for camera in found] == [False, True, False, False]


def test_no_v4l2_at_all(tmp_path: Path) -> None:
    assert of_kind(list_cameras(v4l2_names=tmp_path / "none"), "V4L2") == Listing("V4L2", ())


def test_a_missing_sdk_is_shown_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("harvesters", "pypylon.pylon", "gi"):
        monkeypatch.setitem(sys.modules, module, None)
    listings = list_cameras(v4l2_names=tmp_path)
    assert [listing.kind for listing in listings] == ["V4L2", "GenICam", "Basler", "Aravis"]
    assert "pip install 'dapo-edge[genicam]'" in listings[1].problem
    assert "pip install 'dapo-edge[basler]'" in listings[2].problem
    assert "gir1.2-aravis-0.8" in listings[3].problem


def test_genicam_cameras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = genicam_rig.producer()
    assert PATH_VARIABLE in of_kind(list_cameras(v4l2_names=tmp_path), "GenICam").problem
    given = of_kind(list_cameras([path], tmp_path), "GenICam").cameras
    assert [camera.uri for camera in given] == [f"genicam://{number}?cti={path}" for number in range(3)]
    monkeypatch.setenv(PATH_VARIABLE, str(path.parent))
    assert of_kind(list_cameras(v4l2_names=tmp_path), "GenICam").cameras == given
    with pytest.raises(SourceRefused, match=r"'/nowhere/x\.cti' is not there"):
        list_cameras([Path("/nowhere/x.cti")], tmp_path)


def test_basler_cameras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    basler_rig.emulate(monkeypatch)
    found = of_kind(list_cameras(v4l2_names=tmp_path), "Basler").cameras
    assert [camera.uri for camera in found] == [f"basler://{serial}" for serial in basler_rig.SERIALS]


# --- probing ---


class Scripted(Source):
    """Frames 10 ms apart, or the exceptions in between."""

    has_camera_clock = False
    script: ClassVar[deque[Any]] = deque()

    def _open(self) -> Properties:
        return Properties(self.uri, 32, 24, 100.0, live=True)

    def _read(self, timeout_s: float | None) -> Frame | None:
        if not self.script:
            return None
        entry = self.script.popleft()
        if isinstance(entry, Exception):
            raise entry
        time.sleep(0.01)
        image = np.zeros((24, 32, 3), np.uint8)
        return Frame(image, 0, time.time_ns() - 50_000_000, self.uri, lost=entry)

    def _close(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(cameras, "open_source", Scripted)
    monkeypatch.setattr(Scripted, "script", deque())
    return Scripted


def test_a_probe_counts_and_times(scripted: type[Scripted]) -> None:
    scripted.script.extend([0, 3, FrameError("torn", "mend it"), 0, 0, 1])
    found = probe("fake://x", 5.0)
    assert (found.frames, found.failed, found.lost) == (5, 1, 4)
    assert found.fps is not None
    assert 20 < found.fps < 101
    assert found.interval_ms is not None
    assert found.interval_ms["n"] == 4
    assert found.first_frame_s is not None
    assert found.first_frame_s >= 0.01
    assert found.pixel_format == "BGR8"
    assert str(found.last_failure) == "torn. mend it."
    document = found.as_json()
    assert document["schema"] == "dapo-edge cameras probe 1"
    assert (document["width"], document["height"]) == (32, 24)


def test_latency_is_only_known_by_the_cameras_own_clock(
    scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.script.extend([0, 0])
    assert probe("fake://x").latency_ms is None
    monkeypatch.setattr(Scripted, "has_camera_clock", True)
    scripted.script.extend([0, 0])
    latency = probe("fake://x").latency_ms
    assert latency is not None
    assert 50 <= latency["p50"] < 500


def test_a_probe_stops_in_time(scripted: type[Scripted]) -> None:
    scripted.script.extend([0] * 1000)
    assert probe("fake://x", 5.0, frames=3).frames == 3
    start_s = time.monotonic()
    found = probe("fake://x", 0.2)
    assert 0.2 <= time.monotonic() - start_s < 2
    assert found.frames >= 1


def test_what_ends_a_probe_is_told(scripted: type[Scripted]) -> None:
    scripted.script.extend([0, SourceError("unplugged", "plug it in")])
    found = probe("fake://x")
    assert found.frames == 1
    assert found.fps is None
    assert found.interval_ms is None
    assert str(found.error) == "unplugged. plug it in."


def test_a_source_without_frames(scripted: type[Scripted]) -> None:
    found = probe("fake://x")
    assert (found.frames, found.first_frame_s, found.last, found.latency_ms) == (0, None, None, None)
    assert found.as_json()["width"] is None


def test_a_real_camera_keeps_its_names() -> None:
    found = probe(genicam_rig.uri(AcquisitionFrameRate=100), 5.0, frames=20)
    assert found.frames == 20
    assert found.pixel_format == "RGBa8"
    assert found.latency_ms is None  # it has no clock
    assert found.fps is not None
    assert found.fps > 30
