"""The preprocess kernel on the CPU against Pillow, whose pixels the encoder was tuned on, and `pixels.preprocess`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_runs import MEAN, STD, Run, check_barrier, check_sanitized, preprocess_run
from numpy.typing import NDArray
from PIL import Image

from dapo_edge.backends.host import resize_view
from dapo_edge.kernels import pixels
from dapo_edge.kernels.pixels import FORMATS, PixelFormat, PixelView
from dapo_edge.kernels.resample import pillow_bicubic

FloatArray = NDArray[np.float32]
Crop = tuple[int, int, int, int]
WORST, MEAN_ERROR = 2.001, 0.5  # grey levels off Pillow, which rounds once more


def waves(width: int, height: int) -> pixels.Bytes:
    """Smooth, with the noise of a sensor."""
    y, x = np.mgrid[:height, :width]
    bands = 60 * np.stack([np.sin(x / 7), np.cos(y / 11), np.sin((x + y) / 23)], axis=-1)
    return (128 + bands + np.random.default_rng(0).normal(0, 4, bands.shape)).clip(0, 255).astype(np.uint8)


def noise(width: int, height: int) -> pixels.Bytes:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def checks(width: int, height: int) -> pixels.Bytes:
    """Black and white squares of 15 px."""
    squares = np.random.default_rng(2).random((height // 15 + 1, width // 15 + 1, 3)) > 0.5
    return (255 * squares).astype(np.uint8).repeat(15, axis=0).repeat(15, axis=1)[:height, :width]


def colour_view(image: pixels.Bytes, pixel_format: PixelFormat = "BGR8", crop: Crop | None = None) -> PixelView:
    height, width = image.shape[:2]
    return PixelView(np.ascontiguousarray(image).reshape(height, -1), pixel_format, width, height, crop)


def raw_view(
    pixel_format: PixelFormat, width: int, height: int, crop: Crop | None = None, spare_bytes: int = 5
) -> PixelView:
    """Random bytes, in rows that are longer than the picture."""
    row_bytes = {"BGR8": 3 * width, "RGB8": 3 * width, "NV12": width + width % 2}.get(pixel_format, width)
    rows = height + (-(-height // 2) if pixel_format == "NV12" else 0)
    data = np.random.default_rng([width, height]).integers(0, 256, (rows, row_bytes + spare_bytes), np.uint8)
    return PixelView(data, pixel_format, width, height, crop)


def run_of(*views: PixelView, size: int, dtype: Any = np.float32) -> Run:
    return preprocess_run(views, size, dtype)


def images_of(*views: PixelView, size: int) -> FloatArray:
    return run_of(*views, size=size).here()[0]


def grey_levels(images: FloatArray) -> FloatArray:
    """[B, 3, S, S], normalised → [B, S, S, 3] in 0..255"""
    return (images.transpose(0, 2, 3, 1) * np.array(STD, np.float32) + np.array(MEAN, np.float32)) * 255


def check(view: PixelView, size: int, found: FloatArray, worst: float = WORST, mean: float = MEAN_ERROR) -> None:
    """`found` [3, S, S]"""
    levels = grey_levels(found[None])[0]
    assert np.abs(levels - np.rint(levels)).max() < 1e-3
    pillow = resize_view(view.rgb(), size)
    error = np.abs(levels - np.asarray(pillow, np.float32))
    assert error.max() < worst
    assert error.mean() < mean
    defined = pixels.preprocess(view.rgb(), size, MEAN, STD)
    off = np.abs(levels - grey_levels(defined[None])[0])
    # Sums in another order: what lies between two levels may be rounded to either.
    assert off.max() < 1.001
    assert (off > 0.5).mean() < 2e-3


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (480, 270, 129),
        (192, 108, 224),  # larger
        (61, 53, 48),
        (48, 130, 48),  # one axis as it is
        (64, 64, 64),  # both
        (7, 5, 37),  # weights of exactly zero
        (2, 2, 16),
        (1001, 301, 64),
        (4000, 300, 224),
        (3000, 40, 16),
    ],
)
@pytest.mark.parametrize("content", [waves, noise])
def test_pixels_are_pillows(width: int, height: int, size: int, content: Callable[[int, int], pixels.Bytes]) -> None:
    view = colour_view(content(width, height))
    check(view, size, images_of(view, size=size)[0])


@pytest.mark.parametrize(("width", "height", "size"), [(480, 270, 129), (101, 77, 37), (1001, 301, 64), (900, 600, 32)])
def test_black_and_white_edges(width: int, height: int, size: int) -> None:
    """Bicubic overshoots at each: what is cut off, and when, is seen here."""
    view = colour_view(checks(width, height))
    check(view, size, images_of(view, size=size)[0])
    portrait = colour_view(checks(height, width))
    check(portrait, size, images_of(portrait, size=size)[0])


def test_full_hd() -> None:
    view = colour_view(waves(1920, 1080))
    check(view, 518, images_of(view, size=518)[0])


@pytest.mark.parametrize(("width", "height", "size"), [(480, 270, 129), (2001, 1003, 64), (30, 20, 64), (900, 600, 32)])
def test_the_resize_is_pillows(width: int, height: int, size: int) -> None:
    """One call of Pillow does the same for pictures that are not tall, in every version of it."""
    image = checks(width, height)
    pillow = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    difference = np.abs(resize_view(image, size).astype(int) - np.asarray(pillow))
    assert difference.max() <= 1
    boxes = pillow_bicubic(width, size).factor > 1
    assert difference.mean() <= (0.05 if boxes else 1e-3), "what lies between two levels may go to the other one"


def test_every_step_of_sizes() -> None:
    """Tables of all phases: from half to three times a tile's width."""
    for side in range(16, 96, 5):
        for size in (33, 64, 91):
            view = colour_view(noise(side + 3, side))
            check(view, size, images_of(view, size=size)[0])


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize(("width", "height", "size"), [(67, 45, 40), (33, 18, 48), (98, 51, 20)])
@pytest.mark.parametrize("spare_bytes", [0, 5])
def test_every_format(pixel_format: PixelFormat, width: int, height: int, size: int, spare_bytes: int) -> None:
    view = raw_view(pixel_format, width, height, spare_bytes=spare_bytes)
    check(view, size, images_of(view, size=size)[0])


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize(
    "crop",
    [
        (0, 0, 30, 20),
        (1, 0, 30, 20),
        (0, 1, 31, 20),
        (37, 25, 30, 20),
        (36, 24, 31, 21),
        (17, 11, 21, 23),
        (66, 44, 1, 1),
    ],
)
def test_crops_at_every_border_keep_their_phase(pixel_format: PixelFormat, crop: Crop) -> None:
    """Neighbours for colours come from outside the crop, but the resampling ends at it."""
    view = raw_view(pixel_format, 67, 45, crop)
    check(view, 24, images_of(view, size=24)[0])


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_one_colour_stays_exact(pixel_format: PixelFormat) -> None:
    view = raw_view(pixel_format, 123, 77)
    view.data[...] = 200
    (colour,) = np.unique(view.rgb().reshape(-1, 3), axis=0)
    for size in (32, 200):
        levels = grey_levels(images_of(view, size=size))
        np.testing.assert_allclose(levels, np.broadcast_to(colour, levels.shape), rtol=0, atol=1e-4)


def test_channels_are_not_mixed_up() -> None:
    blue_green_red = np.broadcast_to(np.array([10, 100, 250], np.uint8), (20, 30, 3))
    orders: dict[PixelFormat, list[int]] = {"BGR8": [250, 100, 10], "RGB8": [10, 100, 250]}
    for pixel_format, order in orders.items():
        levels = grey_levels(images_of(colour_view(blue_green_red, pixel_format), size=16))
        np.testing.assert_allclose(levels[0, 3, 5], order, rtol=0, atol=1e-4)


def test_half_precision_is_the_rounded_single() -> None:
    view = raw_view("BayerRG8", 67, 45)
    single, half = images_of(view, size=40), run_of(view, size=40, dtype=np.float16).here()[0]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, single.astype(np.float16))


def test_a_batch_is_its_views() -> None:
    views = [
        raw_view("NV12", 67, 45),
        raw_view("BayerRG8", 200, 31, (3, 1, 150, 30)),
        raw_view("GRAY8", 12, 300),
        colour_view(waves(40, 40), "RGB8"),
        raw_view("BGR8", 67, 45, (9, 0, 2, 45)),
    ]
    together = images_of(*views, size=48)
    for view, image in zip(views, together, strict=True):
        np.testing.assert_array_equal(image, images_of(view, size=48)[0])


@pytest.mark.parametrize(("width", "height"), [(67, 45), (400, 300)])
def test_the_tiles_do_not_matter(width: int, height: int) -> None:
    """Rows per thread only divide the work."""
    view = raw_view("RGB8", width, height)
    whole, run = images_of(view, size=70), run_of(view, size=70)
    for rows_per_thread in (1, 2, 3, 4):
        run.job.rows_per_thread = rows_per_thread
        run.buffers[0][...] = np.nan
        grid = (3, -(-70 // (8 * rows_per_thread)), 1)
        np.testing.assert_array_equal(replace(run, launch=replace(run.launch, grid=grid)).here()[0], whole)


@pytest.mark.parametrize(("width", "height", "size"), [(30_000, 6, 40), (6, 30_000, 40), (200_000, 2, 16)])
def test_extreme_views_cost_no_more_shared_memory(width: int, height: int, size: int) -> None:
    view = raw_view("GRAY8", width, height)
    run = run_of(view, size=size)
    assert run.launch.shared_bytes <= 24 << 10
    check(view, size, run.here()[0][0])


@pytest.mark.parametrize("order", [1, 7])
def test_the_order_of_threads_does_not_matter(order: int) -> None:
    views = raw_view("BayerRG8", 167, 95), raw_view("NV12", 67, 45)
    np.testing.assert_array_equal(run_of(*views, size=50).here(order)[0], images_of(*views, size=50))


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("formats", [("BayerRG8", "NV12"), ("BGR8", "GRAY8"), ("RGB8",)])
def test_sanitizers_find_nothing(formats: tuple[PixelFormat, ...], sanitizer: str) -> None:
    """Odd sizes, the last byte of a picture is the last of its memory; several strips."""
    views = [raw_view(name, 37, 43, spare_bytes=0) for name in formats]
    check_sanitized(run_of(*views, size=11), sanitizer)


@pytest.mark.parametrize("barrier", ["preprocess: pixels before columns", "preprocess: columns before rows"])
def test_without_a_barrier_threads_race(barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_barrier(run_of(raw_view("RGB8", 37, 43), size=11), barrier, monkeypatch)
