"""What becomes of a camera's bytes: against OpenCV, Pillow, and the rules written out pixel by pixel."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dapo_edge.errors import FrameError
from dapo_edge.kernels import pixels
from dapo_edge.kernels.pixels import FORMATS, Bytes, PixelFormat, PixelView, to_rgb

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def random_bytes(rows: int, columns: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns), np.uint8)


def test_colour_orders() -> None:
    data = random_bytes(3, 12)
    image = data.reshape(3, 4, 3)
    np.testing.assert_array_equal(to_rgb(data, "RGB8", 4, 3), image)
    np.testing.assert_array_equal(to_rgb(data, "BGR8", 4, 3), cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    np.testing.assert_array_equal(to_rgb(data, "GRAY8", 12, 3), cv2.cvtColor(data, cv2.COLOR_GRAY2RGB))


@pytest.mark.parametrize(("width", "height"), [(2, 2), (64, 48), (130, 66)])
def test_nv12_is_opencvs(width: int, height: int) -> None:
    data = random_bytes(height * 3 // 2, width)
    np.testing.assert_array_equal(to_rgb(data, "NV12", width, height), cv2.cvtColor(data, cv2.COLOR_YUV2RGB_NV12))


def test_every_colour_of_nv12_is_opencvs() -> None:
    """All pairs of chroma at the luma values where something is cut off, and between."""
    chroma = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).astype(np.uint8).reshape(256, 512)
    for luma in (0, 15, 16, 17, 128, 235, 236, 255):
        data = np.concatenate([np.full((512, 512), luma, np.uint8), chroma])
        found = to_rgb(data, "NV12", 512, 512)
        np.testing.assert_array_equal(found, cv2.cvtColor(data, cv2.COLOR_YUV2RGB_NV12))


@pytest.mark.parametrize(("width", "height"), [(33, 20), (32, 21), (33, 21), (3, 3)])
def test_nv12_of_odd_sizes_is_the_corner_of_the_even_one(width: int, height: int) -> None:
    """OpenCV takes even sizes only."""
    even = random_bytes(-(-height // 2) * 3, width + width % 2)
    whole = cv2.cvtColor(even, cv2.COLOR_YUV2RGB_NV12)
    data = np.delete(even, height, axis=0) if height % 2 else even
    np.testing.assert_array_equal(to_rgb(data, "NV12", width, height), whole[:height, :width])


@pytest.mark.parametrize(("width", "height"), [(16, 12), (67, 45), (130, 66)])
def test_bayer_inside_is_opencvs(width: int, height: int) -> None:
    """OpenCV names the pattern by the second row's second and third pixel: red at the top left is BG."""
    data = random_bytes(height, width)
    found = to_rgb(data, "BayerRG8", width, height)
    opencv = cv2.cvtColor(data, cv2.COLOR_BayerBG2RGB)
    np.testing.assert_array_equal(found[1:-1, 1:-1], opencv[1:-1, 1:-1])


def _mirrored(place: int, size: int) -> int:
    return -place if place < 0 else 2 * size - 2 - place if place >= size else place


def _demosaic_slowly(mosaic: Bytes) -> NDArray[np.int64]:
    """A colour that a pixel has, or the mean of the nearest that do, the border mirrored."""
    height, width = mosaic.shape
    result = np.zeros((height, width, 3), np.int64)
    for y, x in np.ndindex(height, width):
        for colour in range(3):
            # red at even places, blue at odd ones, green between
            near: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for down, right in np.ndindex(3, 3):
                if (y + down - 1) % 2 + (x + right - 1) % 2 == colour:
                    value = mosaic[_mirrored(y + down - 1, height), _mirrored(x + right - 1, width)]
                    near[abs(down - 1) + abs(right - 1)].append(int(value))
            values = near[0] or near[1] or near[2]
            result[y, x, colour] = (sum(values) + len(values) // 2) // len(values)
    return result


@pytest.mark.parametrize(("width", "height"), [(2, 2), (3, 2), (2, 5), (8, 6), (11, 9)])
def test_bayer_up_to_the_border(width: int, height: int) -> None:
    data = random_bytes(height, width)
    np.testing.assert_array_equal(to_rgb(data, "BayerRG8", width, height), _demosaic_slowly(data))


def test_bayer_keeps_a_colour() -> None:
    mosaic = np.zeros((7, 9), np.uint8)
    mosaic[::2, ::2], mosaic[1::2, 1::2] = 200, 50
    mosaic[::2, 1::2] = mosaic[1::2, ::2] = 120
    np.testing.assert_array_equal(to_rgb(mosaic, "BayerRG8", 9, 7), np.broadcast_to([200, 120, 50], (7, 9, 3)))


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_a_view_is_a_part_of_the_whole_picture(pixel_format: PixelFormat) -> None:
    """Rows may be longer than the picture; neighbours outside the crop count."""
    wide = random_bytes(40, 110)
    view = PixelView(wide, pixel_format, 31, 24, crop=(5, 3, 11, 9))
    assert view.window == (5, 3, 11, 9)
    assert view.shape == (9, 11, 3) == view.rgb().shape
    whole = PixelView(wide, pixel_format, 31, 24)
    assert whole.window == (0, 0, 31, 24)
    assert whole.shape == (24, 31, 3) == whole.rgb().shape
    np.testing.assert_array_equal(view.rgb(), whole.rgb()[3:12, 5:16])
    rows, row_bytes = (36, 32) if pixel_format == "NV12" else (24, 93 if pixel_format in ("BGR8", "RGB8") else 31)
    np.testing.assert_array_equal(PixelView(wide[:rows, :row_bytes], pixel_format, 31, 24).rgb(), whole.rgb())
    with pytest.raises(FrameError, match=rf"which need \[{rows}, {row_bytes}\]"):
        PixelView(wide[:rows, : row_bytes - 1], pixel_format, 31, 24)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "YUYV"}, "unknown pixel format 'YUYV'. Use one of BGR8, RGB8, GRAY8, BayerRG8, NV12"),
        ({"data": np.zeros((20, 30), np.uint16)}, "must be a uint8 array"),
        ({"data": np.zeros((20, 10, 3), np.uint8)}, "must be a uint8 array"),
        ({"data": b"0" * 600}, "must be a uint8 array"),
        ({"width": 11}, r"\[20, 30\] bytes don't hold 11 x 20 px of BGR8, which need \[20, 33\]"),
        ({"height": 21}, r"don't hold 10 x 21 px"),
        ({"format": "GRAY8", "width": 31}, r"don't hold 31 x 20 px of GRAY8, which need \[20, 31\]"),
        ({"format": "NV12", "height": 14}, r"need \[21, 10\]"),
        ({"format": "NV12", "width": 31, "height": 13}, r"need \[20, 32\]"),
        ({"width": 1}, "2 px per side"),
        ({"height": 0}, "2 px per side"),
        ({"crop": (-1, 0, 5, 5)}, r"the crop \(-1, 0, 5, 5\) leaves the picture of 10 x 20 px. Make it smaller"),
        ({"crop": (0, -1, 5, 5)}, "leaves the picture"),
        ({"crop": (6, 0, 5, 5)}, "leaves the picture"),
        ({"crop": (0, 16, 5, 5)}, "leaves the picture"),
        ({"crop": (0, 0, 0, 5)}, "leaves the picture"),
        ({"crop": (0, 0, 5, 0)}, "leaves the picture"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"data": random_bytes(20, 30), "format": "BGR8", "width": 10, "height": 20, "crop": None}
    PixelView(**right)
    with pytest.raises(FrameError, match=message):
        PixelView(**{**right, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"crop": (0.0, 0.0, 5.0, 5.0)},
        {"crop": (0, 0, 5)},
        {"crop": "abcd"},
        {"width": "10"},
        {"width": None},
        {"height": 20.0},
        {"format": 3},
        {"format": None},
    ],
)
def test_what_are_no_pixels_is_refused(fields: dict[str, Any]) -> None:
    right: dict[str, Any] = {"data": random_bytes(20, 30), "format": "BGR8", "width": 10, "height": 20, "crop": None}
    with pytest.raises(FrameError, match=r"whole numbers of pixels|unknown pixel format"):
        PixelView(**{**right, **fields})


def test_numbers_of_any_kind_become_plain_ones() -> None:
    data = random_bytes(20, 30)
    view = PixelView(data, "BGR8", np.uint8(10), np.int16(20), np.array([1, 2, 3, 4]))  # type: ignore[arg-type]
    assert (view.width, view.height, view.crop) == (10, 20, (1, 2, 3, 4))
    assert all(type(number) is int for number in (view.width, view.height, *view.window))
    assert PixelView(data, "BGR8", 10, 20, [1, 2, 3, 4]).crop == (1, 2, 3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize(
    "crop", [(0, 0, 9, 8), (1, 0, 8, 9), (5, 3, 7, 6), (14, 12, 7, 7), (0, 0, 21, 19), (20, 18, 1, 1)]
)
def test_a_trimmed_view_shows_the_same(pixel_format: PixelFormat, crop: tuple[int, int, int, int]) -> None:
    rows = 19 + (10 if pixel_format == "NV12" else 0)
    data = random_bytes(rows, 3 * 21 + 4)
    view = PixelView(data, pixel_format, 21, 19, crop)
    small = view.trimmed()
    np.testing.assert_array_equal(small.rgb(), view.rgb())
    assert small.shape == view.shape
    assert small.trimmed().data.nbytes <= small.data.nbytes <= data.nbytes
    if crop[2:] == (7, 6):
        assert small.data.nbytes <= {"BGR8": 126, "RGB8": 126, "GRAY8": 42, "BayerRG8": 90, "NV12": 120}[pixel_format]


@pytest.mark.parametrize(("width", "height", "size"), [(61, 53, 48), (192, 108, 224), (64, 64, 64), (300, 200, 32)])
def test_preprocessing_is_pillows(width: int, height: int, size: int) -> None:
    rgb = random_bytes(height, 3 * width).reshape(height, width, 3)
    found = pixels.preprocess(rgb, size, MEAN, STD)
    assert found.shape == (3, size, size)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    pillow = Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    normalised = (np.asarray(pillow) / 255 - MEAN) / STD
    error = 255 * np.array(STD) * np.abs(found.transpose(1, 2, 0) - normalised)  # grey levels
    assert error.max() < 2.001
    assert error.mean() < 0.5


@pytest.mark.parametrize(("down", "across"), [(1, 1), (2, 3), (3, 2), (5, 7), (1, 4), (40, 50)])
def test_boxes_are_pillows_reduce(down: int, across: int) -> None:
    """Bit for bit, at the borders, too."""
    for contents in (random_bytes(37, 3 * 44), np.full((37, 3 * 44), 255, np.uint8)):
        rgb = contents.reshape(37, 44, 3)
        pillow = np.asarray(Image.fromarray(rgb).reduce((across, down)))
        np.testing.assert_array_equal(pixels.reduce_boxes(rgb, down, across), pillow)


def _random_view(pixel_format: PixelFormat, rng: np.random.Generator) -> PixelView:
    """Any size from 2 pixels on, with longer rows, mostly with a crop."""
    width, height = (int(side) for side in rng.integers(2, 40, 2))
    data = rng.integers(0, 256, (2 * height + 3, 3 * (width + 9)), np.uint8)
    if rng.random() < 0.3:
        return PixelView(data, pixel_format, width, height)
    left, top = int(rng.integers(width)), int(rng.integers(height))
    across, down = int(rng.integers(1, width - left + 1)), int(rng.integers(1, height - top + 1))
    return PixelView(data, pixel_format, width, height, (left, top, across, down))


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_bgr_by_opencv_is_the_definition_bit_for_bit(pixel_format: PixelFormat, monkeypatch: Any) -> None:
    rng = np.random.default_rng(1)
    views = [_random_view(pixel_format, rng) for _ in range(200)]
    fast = [view.bgr() for view in views]
    monkeypatch.setitem(sys.modules, "cv2", None)  # as where OpenCV is not installed
    for view, image in zip(views, fast, strict=True):
        np.testing.assert_array_equal(image, view.rgb()[..., ::-1])
        np.testing.assert_array_equal(image, view.bgr())
        assert image.flags.c_contiguous
        assert image.shape == view.shape


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize("is_installed", [True, False])
def test_bgr_into_memory_that_is_there(pixel_format: PixelFormat, is_installed: bool, monkeypatch: Any) -> None:
    if not is_installed:
        monkeypatch.setitem(sys.modules, "cv2", None)
    rng = np.random.default_rng(2)
    for view in (_random_view(pixel_format, rng) for _ in range(50)):
        out = np.empty(view.shape, np.uint8)
        assert view.bgr(out) is out
        np.testing.assert_array_equal(out, view.bgr())
    for wrong in (np.empty((*view.shape[:2], 4), np.uint8), np.empty(view.shape, np.float32), out[:, ::-1]):
        with pytest.raises(FrameError, match="can't hold the picture"):
            view.bgr(wrong)


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize("crop", [None, (1, 1, 638, 478)])
def test_bgr_into_memory_that_is_there_takes_no_more(
    pixel_format: PixelFormat, crop: tuple[int, int, int, int] | None
) -> None:
    data = np.zeros((720, 1920), np.uint8)
    view = PixelView(data, pixel_format, 640, 480, crop)
    out = np.empty(view.shape, np.uint8)
    view.bgr(out)
    tracemalloc.start()
    try:
        view.bgr(out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (1.1 * out.nbytes if pixel_format == "NV12" and crop else 0.2 * out.nbytes)
