"""V4L2 cameras: a driver in memory for each rare case, and the kernel's own `vivid` driver for the real thing."""

from __future__ import annotations

import errno
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rigs import camera_checks, leaks, v4l2_guest
from rigs.camera_checks import woken_by_close
from rigs.fake_v4l2 import Driver, Shot
from rigs.v4l2_checks import FOURCCS, MARK

from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources import open_source, v4l2_api
from dapo_edge.runtime.sources.v4l2 import holder_of
from dapo_edge.runtime.sources.v4l2_pixels import reader_of
from dapo_edge.structures import Frame

URI = "v4l2:///dev/video7"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(v4l2_api, "Device", made.open)
    return made


def shots(driver: Driver, *sequences: int) -> None:
    size = driver.stride * driver.height
    driver.shots.extend(Shot(bytes([number % 256]) * size, number) for number in sequences)


def frames(count: int, uri: str = URI) -> list[Frame]:
    with open_source(uri) as source:
        taken = [source.read(1.0) for _ in range(count)]
    return [frame for frame in taken if frame is not None]


def failure(uri: str = URI) -> SourceError:
    return camera_checks.failure(uri, wait_s=0.1)


def test_frames_and_what_was_lost_between_them(driver: Driver) -> None:
    shots(driver, 2**32 - 2, 2**32 - 1, 3, 4)  # the driver's counter starts again at 0
    taken = frames(4)
    assert [frame.lost for frame in taken] == [0, 0, 3, 0]
    assert [frame.index for frame in taken] == [0, 1, 2, 3]
    assert [int(frame.image[5, 5, 1]) for frame in taken] == [254, 255, 3, 4]
    assert all(frame.image.shape == (24, 32, 3) for frame in taken)
    assert driver.opened == 0


@pytest.mark.parametrize("sequences", [(5000, 0, 1), (0, 0, 0), (9, 2**31, 2**31 + 1), (0, 20_000, 20_001)])
def test_a_counter_that_is_set_anew_or_stands_still_has_lost_nothing(
    driver: Driver, sequences: tuple[int, ...]
) -> None:
    shots(driver, *sequences)
    assert [frame.lost for frame in frames(3)] == [0, 0, 0]


def test_what_was_lost_before_a_damaged_frame_is_not_forgotten(driver: Driver) -> None:
    shots(driver, 0, 4, 5)
    driver.shots[1].flags = v4l2_api.FLAG_ERROR
    with open_source(URI) as source:
        source.read(1.0)
        with pytest.raises(FrameError, match=r"frame 1 .* is damaged") as caught:
            source.read(1.0)
        assert (caught.value.index, caught.value.source) == (1, URI)
        frame = source.read(1.0)
    assert frame is not None
    assert (frame.index, frame.lost) == (2, 3)


def test_a_short_buffer_is_damaged(driver: Driver) -> None:
    driver.shots.append(Shot(b"\0" * 100, 0))
    assert "is damaged" in str(failure())


def test_an_error_that_is_kept_does_not_keep_the_camera(driver: Driver) -> None:
    """A driver holds a device that is mapped: no exception may keep a view of its memory."""
    gc.collect()
    gc.disable()
    try:

        def cycle() -> None:
            driver.shots.append(Shot(b"\0" * 100, 0))
            kept.append(failure())

        kept: list[SourceError] = []
        before = Path("/proc/self/maps").read_text().count("memfd:camera")
        assert leaks.leaked(cycle, 5) == (0, 0)
        assert Path("/proc/self/maps").read_text().count("memfd:camera") == before
    finally:
        gc.enable()


def test_no_frame_in_time(driver: Driver) -> None:
    with open_source(URI) as source:
        began_s = time.monotonic()
        with pytest.raises(FrameTimeout):
            source.read(0.3)
        assert 0.29 < time.monotonic() - began_s < 0.6
        shots(driver, 0)
        assert source.read(0.3) is not None


def test_closing_wakes_a_reader_that_waits(driver: Driver) -> None:
    assert woken_by_close(open_source(URI).open()) < 1.0


def test_what_the_camera_does_not_give_is_refused(driver: Driver) -> None:
    for query, words in (
        ("width=64", "gives 32x24 BGR3, not 64x24 BGR3"),
        ("fourcc=mjpg", "gives 32x24 BGR3, not 32x24 MJPG"),
        ("fps=25", "gives 30 frames per second, not 25"),
        ("gain=8", "makes gain=7 of 8. Ask for gain=7"),
        ("gain=10", "a whole number from 0 to 9"),
        ("gian=3", "Did you mean 'gain'"),
        ("temperature=3", "unknown key 'temperature'"),
        ("fourcc=toolong", "four characters"),
        ("width=x", "a whole number from 16"),
        ("buffers=1", "from 2 to 32"),
    ):
        error = failure(f"{URI}?{query}")
        assert isinstance(error, SourceRefused)
        assert words in str(error)
        assert driver.opened == 0
    shots(driver, 0)
    assert len(frames(1, f"{URI}?width=32&height=24&fps=30&gain=6&buffers=2")) == 1
    assert driver.control == 6


def test_refusals_of_the_driver(driver: Driver) -> None:
    driver.refused = {v4l2_api.SET_CONTROL: errno.EACCES}
    assert isinstance(failure(f"{URI}?gain=3"), SourceRefused)
    driver.refused = {v4l2_api.REQUEST_BUFFERS: errno.EBUSY}
    error = failure()
    assert not isinstance(error, SourceRefused)
    assert "is used by another program" in str(error)
    driver.refused = {v4l2_api.DEQUEUE: errno.ENODEV}
    shots(driver, 0)
    assert "there is no camera" in str(failure())
    driver.refused = {v4l2_api.DEQUEUE: errno.EIO}
    assert "the driver of '/dev/video7' failed (Input/output error)" in str(failure())
    driver.refused = {v4l2_api.QUERY_CAPABILITY: errno.ENOTTY}
    assert "not a camera of V4L2" in str(failure())
    driver.refused = {}
    driver.path_errno = errno.EACCES
    error = failure()
    assert isinstance(error, SourceRefused)
    assert "usermod -aG video" in str(error)
    assert driver.opened == 0


def test_devices_that_are_no_cameras(driver: Driver) -> None:
    driver.capabilities = v4l2_api.CAP_MULTIPLANAR | v4l2_api.CAP_STREAMING
    assert "csi://0" in str(failure())
    driver.capabilities = 0x00800000 | v4l2_api.CAP_STREAMING  # V4L2_CAP_META_CAPTURE
    assert "the camera's second device" in str(failure())
    driver.capabilities = v4l2_api.CAP_CAPTURE | v4l2_api.CAP_STREAMING
    driver.fourcc = "HSV3"
    error = failure()
    assert isinstance(error, SourceRefused)
    assert "the format HSV3" in str(error)
    assert "offers BGR3, MJPG" in str(error)
    driver.fourcc, driver.height = "BGR3", 8
    assert "32x8" in str(failure())


def test_paths_that_are_no_devices(tmp_path: Path) -> None:
    assert "there is no camera at" in str(failure(f"v4l2://{tmp_path}/video9"))
    assert isinstance(failure("v4l2:///dev/null"), SourceRefused)
    assert isinstance(failure("v4l2://"), SourceError)


def test_who_holds_a_device(tmp_path: Path) -> None:
    path = tmp_path / "video0"
    path.touch()
    assert holder_of(path) is None
    with path.open():
        assert "(process " in str(holder_of(path))


# --- pixels ---


def form(fourcc: str, width: int, height: int, stride: int, **more: int) -> v4l2_api.Format:
    return v4l2_api.Format(
        fourcc=v4l2_api.fourcc_code(fourcc), width=width, height=height, bytes_per_line=stride, **more
    )


def picture(data: bytes | np.ndarray, given: v4l2_api.Format) -> Any:
    reader = reader_of(given, BufferPool())
    assert not isinstance(reader, str)
    return reader(np.frombuffer(bytes(data), np.uint8))


@pytest.mark.parametrize(
    ("fourcc", "pixel_format", "rows", "row_bytes"),
    [("RGB3", "RGB8", 18, 90), ("GREY", "GRAY8", 18, 30), ("RGGB", "BayerRG8", 18, 30), ("NV12", "NV12", 27, 30)],
)
def test_formats_that_stay_as_they_are(fourcc: str, pixel_format: str, rows: int, row_bytes: int) -> None:
    padded = np.random.default_rng(0).integers(0, 256, (rows, row_bytes + 6), np.uint8)
    view = picture(padded.tobytes(), form(fourcc, 30, 18, row_bytes + 6))
    assert isinstance(view, PixelView)
    assert view.format == pixel_format
    np.testing.assert_array_equal(view.data, padded[:, :row_bytes])
    assert picture(padded.tobytes()[: -row_bytes - 6], form(fourcc, 30, 18, row_bytes + 6)) is None


@pytest.mark.parametrize("fourcc", ["YUYV", "UYVY"])
def test_yuv_becomes_bgr(fourcc: str) -> None:
    grey = [90, 128] if fourcc == "YUYV" else [128, 90]
    padded = np.zeros((18, 70), np.uint8)
    padded[:, :60] = np.tile(np.array(grey, np.uint8), 30)
    image = picture(padded.tobytes(), form(fourcc, 30, 18, 70))
    assert image.shape == (18, 30, 3)
    np.testing.assert_allclose(image, (90 - 16) * 255 / 219, atol=1)
    assert picture(padded.tobytes()[:-70], form(fourcc, 30, 18, 70)) is None


@pytest.mark.parametrize(("fourcc", "place"), [("BA81", (1, 1)), ("GBRG", (1, 0)), ("GRBG", (0, 1))])
def test_other_bayer_patterns_become_bgr(fourcc: str, place: tuple[int, int]) -> None:
    mosaic = np.zeros((18, 30), np.uint8)
    mosaic[place[0] :: 2, place[1] :: 2] = 200  # the red pixels
    image = picture(mosaic.tobytes(), form(fourcc, 30, 18, 30))
    assert image[9, 15].tolist() == [0, 0, 200]


def test_jpeg_is_decoded_when_it_is_whole() -> None:
    shown = np.full((48, 64, 3), (10, 200, 90), np.uint8)
    data = cv2.imencode(".jpg", shown)[1].tobytes()
    given = form("MJPG", 64, 48, 0)
    assert np.abs(picture(data, given).astype(int) - shown).max() <= 3
    assert picture(data + b"\0" * 999, given) is not None  # as drivers fill their buffers up
    for zeros in (4094, 4095, 4096, 4097, 8191, 100_000):  # wherever the end lies in the pieces that are looked at
        assert picture(data + b"\0" * zeros, given) is not None
        assert picture(data[:-1] + b"\0" * zeros, given) is None
        assert picture(data[:-2] + b"\0" * zeros, given) is None
    assert picture(data[: len(data) // 2], given) is None
    assert picture(b"\0" * 99, given) is None
    assert picture(b"nothing\xff\xd9", given) is None
    assert picture(data, form("MJPG", 64, 32, 0)) is None


@pytest.mark.parametrize("more", [{"quantization": 1}, {"encoding": 2}, {"colorspace": 3}, {"colorspace": 7}])
def test_yuv_of_other_colours_is_refused(more: dict[str, int]) -> None:
    """Full range, Rec. 709 by name, Rec. 709 and JPEG by their colour space."""
    assert "BT.601" in str(reader_of(form("NV12", 30, 18, 30, **more), BufferPool()))
    assert "BT.601" in str(reader_of(form("YUYV", 30, 18, 60, **more), BufferPool()))
    assert not isinstance(reader_of(form("YUYV", 30, 18, 60, colorspace=7, quantization=2), BufferPool()), str)


# --- a real driver ---


@pytest.mark.slow
def test_the_kernels_own_camera(tmp_path: Path) -> None:
    v4l2_guest.need()
    checks, package = Path(v4l2_guest.__file__).with_name("v4l2_checks.py"), Path(__file__).parents[2]
    result = v4l2_guest.run(
        "$MODPROBE vivid n_devs=1 node_types=0x1 num_inputs=1 input_types=0 || exit 9\n"
        f"PYTHONPATH={package} {sys.executable} {checks}\n",
        tmp_path,
    )
    assert result.code == 0, result.output[-3000:]
    found = json.loads(next(line for line in result.output.splitlines() if line.startswith(MARK))[len(MARK) :])
    for fourcc in FOURCCS:  # the first bar is yellow of 75 %
        expected = [0, 191, 191] if fourcc != "GREY" else [176, 176, 176]
        np.testing.assert_allclose(found["pictures"][fourcc], expected, atol=4)
    assert found["pace"]["announced"] == 30
    assert 25 < found["pace"]["measured"] < 31
    assert found["pace"]["age_s"] < 0.1
    assert found["dropped"]["lost"] > 8
    assert 25 < found["dropped"]["rate"] < 31  # what was lost and what came is all of it
    assert 0.45 < found["silent"] < 1.5
    assert len(found["bad_buffer"]) == 1
    assert found["steady"] == {"descriptors": 0, "buffers_made": 1}
    assert found["fatal"][0].startswith("SourceError: the driver")
    assert found["fatal"][1] == "opened"
    assert found["disconnected"][0].startswith("SourceError: there is no camera")
    said = found["refusals"]
    assert "usermod -aG video" in said["forbidden"]
    assert "is used by python" in said["busy"]
    for name in ("size", "rate", "fourcc", "unknown_fourcc", "control", "range"):
        assert said[name].startswith("SourceRefused"), said[name]
    assert said["set"] == "opened, brightness: 200"
