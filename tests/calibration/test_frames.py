"""Calibration frames from every origin, and what becomes of those that can't be used."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.calibration.frames import Recording, Usable, advise, calibration_frames
from dapo_edge.config import Gate
from dapo_edge.data import protocol
from dapo_edge.engine.frames import build_frames
from dapo_edge.engine.gate_frames import gate_frames
from dapo_edge.errors import FrameError, RecipeError, SourceError
from dapo_edge.runtime import sources
from dapo_edge.runtime.sources import Properties, Source
from dapo_edge.structures import Frame

SIZE = 32


def picture(number: int) -> NDArray[np.uint8]:
    """A picture that tells its number: an odd one is wide, an even one is tall."""
    shape = (40, 56, 3) if number % 2 else (56, 40, 3)
    image = np.random.default_rng(number).integers(0, 200, shape, np.uint8)
    image[:8, :8] = number
    return image


def fill(folder: Path, count: int) -> Path:
    for number in range(count):
        cv2.imwrite(str(folder / f"{number}.png"), picture(number))
    return folder


def usable_of(recording: Recording) -> tuple[list[NDArray[np.uint8]], Usable]:
    usable = Usable(SIZE)
    return list(usable.enough_of(recording)), usable


def numbers_of(recording: Recording) -> list[int]:
    return [-1 if isinstance(frame, FrameError) else int(frame.image[0, 0, 0]) for frame in recording.frames()]


def images_of(recording: Recording) -> list[NDArray[np.uint8]]:
    return [frame.image for frame in recording.frames() if isinstance(frame, Frame)]


@pytest.mark.parametrize(
    ("count", "spare", "expected"), [(40, 1, list(range(40))), (10, 1, range(0, 40, 4)), (5, 4, range(0, 40, 2))]
)
def test_a_folder_is_thinned_evenly(tmp_path: Path, count: int, spare: int, expected: Any) -> None:
    recording = calibration_frames(str(fill(tmp_path, 40)), count, 0, spare=spare)
    assert recording.length == len(expected)
    assert numbers_of(recording) == list(expected)
    assert numbers_of(recording) == list(expected), "a recording can be read again"


def test_frames_that_can_not_be_used_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 12)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:300])
    (tmp_path / "5.png").write_bytes(b"")
    cv2.imwrite(str(tmp_path / "7.png"), np.full((50, 50, 3), 90, np.uint8))
    lens_cap = np.random.default_rng(0).normal(20, 2, (480, 640, 3)).clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "8.png"), lens_cap)
    views, usable = usable_of(calibration_frames(str(tmp_path), 100, 0))
    assert [view.shape for view in views] == [(SIZE, SIZE, 3)] * 8
    assert (usable.offered, usable.unreadable, usable.constant, usable.count) == (12, 2, 2, 8)
    for text in ("3.png", "5.png", "7.png' has no contrast", "8.png' has no contrast"):
        assert text in caplog.text


def test_the_plainest_part_has_contrast() -> None:
    plain = np.full((480, 640, 3), 120.0) + np.linspace(-4, 4, 640)[:, None]  # a little more light on one side
    noisy = (plain + np.random.default_rng(0).normal(0, 2, plain.shape)).clip(0, 255).astype(np.uint8)
    assert len(list(Usable(SIZE).of([Frame(noisy, 0, 0, "camera")]))) == 1


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_frames_are_refused(tmp_path: Path, count: int) -> None:
    recording = calibration_frames(str(fill(tmp_path, count)), 100, 0)
    with pytest.raises(RecipeError, match=rf"gives {count} usable frames, calibration needs 8.*best 300"):
        usable_of(recording)


@pytest.mark.parametrize(("count", "warned"), [(8, True), (20, True), (31, True), (32, False)])
def test_few_frames_are_warned_about(caplog: pytest.LogCaptureFixture, count: int, warned: bool) -> None:
    advise("belt", count)
    assert ("fewer than 32 miss values" in caplog.text) == warned


def test_nothing_but_bad_frames(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"0 usable frames of 40 \(40 unreadable, 0 without contrast\)"):
        usable_of(calibration_frames(str(tmp_path), 100, 0))


def test_a_video(tmp_path: Path) -> None:
    path = str(tmp_path / "belt.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 20.0, (64, 48))
    for number in range(60):
        image = np.random.default_rng(number).integers(0, 40, (48, 64, 3), np.uint8)
        image[:16, :16] = 4 * number
        writer.write(image)
    writer.release()
    for origin in (path, f"file://{path}"):
        recording = calibration_frames(origin, 20, 0)
        assert recording.length == 20
        assert np.abs(np.array(numbers_of(recording)) - 12 * np.arange(20)).max() < 12
    assert len(usable_of(calibration_frames(path, 300, 0))[0]) == 60


def test_generated_frames_are_none_of_another_purpose() -> None:
    made = calibration_frames("synthetic", 3, 5, spare=4)
    assert made.length == 3, "generated frames need no choice"
    first = protocol.first_picture(protocol.CALIBRATION, 5, 3)
    expected = list(build_frames("synthetic", 3, good_only=False, seed=first))
    np.testing.assert_array_equal(images_of(made), expected)
    purposes = (protocol.TUNING, protocol.TEST, protocol.THRESHOLDS, protocol.GATE)
    starts = sorted(protocol.first_picture(purpose, 5, 3) for purpose in (*purposes, protocol.CALIBRATION))
    assert starts[-1] == first
    assert first - starts[-2] >= protocol.PICTURES_PER_SEED
    assert protocol.first_picture(protocol.CALIBRATION, 2**20 - 1, 1) + protocol.PICTURES_PER_SEED <= protocol.FREE_FROM


def test_a_synthetic_belt() -> None:
    recording = calibration_frames("synthetic://96x64@5?seed=4", 9, 0, spare=4)
    images = images_of(recording)
    assert (recording.length, len(images)) == (9, 9)
    assert all(np.any(a != b) for a, b in itertools.pairwise(images))


@pytest.mark.parametrize("origin", ["synthetic", "synthetic://96x64@5?seed=4"])
def test_calibration_and_gate_share_no_generated_picture(origin: str) -> None:
    held_out = list(gate_frames(Gate(frames=origin), 12, protocol.first_picture(protocol.GATE, 0, 12)).views)
    calibrated = images_of(calibration_frames(origin, 12, 0))
    assert len(held_out) == len(calibrated) == 12
    for a, b in itertools.product(held_out, calibrated):
        assert np.abs(a.astype(int) - b).mean() > 5, "two photographs of one scene differ by their noise, 2"


@pytest.mark.parametrize(
    ("origin", "error", "text"),
    [
        ("nowhere/frames", RecipeError, "'nowhere/frames' do not exist"),
        ("synthetic://12x5", SourceError, "12x5"),
        ("rtps://user:secret@host", SourceError, "unknown kind"),
    ],
)
def test_origins_that_are_none(origin: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        calibration_frames(origin, 10, 0)
    assert "secret" not in str(caught.value)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match="holds no image"):
        calibration_frames(str(tmp_path), 10, 0)
    with pytest.raises(SourceError, match="no extension of an image or a video"):
        calibration_frames(str(tmp_path / "notes.txt"), 10, 0)


class Camera(Source):
    """`camera://?frames=N&breaks=I&damaged=J`: without a known length."""

    ends, breaks, damaged = 10**9, -1, -1

    def _open(self) -> Properties:
        self._index = -1
        return Properties(self.uri)

    def _read(self, timeout_s: float | None) -> Frame | None:
        self._index += 1
        if self._index == self.breaks:
            raise SourceError("the cable was pulled", "Plug it in")
        if self._index == self.damaged:
            raise FrameError("a frame was torn", "Check the cable")
        return None if self._index >= self.ends else Frame(picture(self._index), self._index, 0, self.uri)

    def _close(self) -> None:
        pass


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**settings: int) -> str:
        kind = type("Camera", (Camera,), settings)
        monkeypatch.setattr(sources, "made", kind, raising=False)
        monkeypatch.setitem(sources.SOURCES, "camera", "dapo_edge.runtime.sources:made")
        return "camera://user:secret@host/1"

    return make


def test_an_endless_camera_gives_its_first_frames(camera: Any, caplog: pytest.LogCaptureFixture) -> None:
    recording = calibration_frames(camera(), 15, 0, spare=3)
    assert recording.length is None
    assert numbers_of(recording) == list(range(45))
    assert "its first 45 frames" in caplog.text
    assert "secret" not in caplog.text + recording.source


def test_a_source_that_ends_or_breaks(camera: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert numbers_of(calibration_frames(camera(ends=12), 15, 0)) == list(range(12))
    assert not caplog.records
    recording = calibration_frames(camera(breaks=11, damaged=4), 15, 0)
    assert numbers_of(recording) == [*range(4), -1, *range(5, 11)]
    assert "the cable was pulled" in caplog.text
    with caplog.at_level(logging.WARNING):
        views, usable = usable_of(recording)
    assert (len(views), usable.unreadable) == (10, 1)
    assert "a frame was torn" in caplog.text
