"""The resize before the encoder: Pillow's pixels, or nearly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dapo_edge.backends.host import resize_view
from dapo_edge.data.surfaces import make_surface
from dapo_edge.kernels.resample import pillow_bicubic

Picture = NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillows(view: Picture, size: int) -> Picture:
    """`resize(BICUBIC, reducing_gap=2.0)`, columns first."""
    height, width = view.shape[:2]
    across, down = pillow_bicubic(width, size).factor, pillow_bicubic(height, size).factor
    image = Image.fromarray(np.ascontiguousarray(view)).reduce((across, down))
    bicubic = Image.Resampling.BICUBIC
    narrow = image.resize((size, image.height), bicubic, box=(0, 0, width / across, image.height))
    return np.asarray(narrow.resize((size, size), bicubic, box=(0, 0, size, height / down)))


def check_pillows(made: Picture, view: Picture, size: int) -> None:
    """One value of 300 is off, by sums of what lies between two levels; by the means of boxes more.

    Absolute weights of a row sum to 1.3 at most: a level becomes 2 in a pass that rounds, and these 3 in the next one.
    """
    difference = np.abs(made.astype(int) - pillows(view, size))
    height, width = view.shape[:2]
    if pillow_bicubic(width, size).factor * pillow_bicubic(height, size).factor == 1:
        assert difference.max() <= 2
        assert difference.sum() <= max(12, difference.size / 300)
    else:  # the mean of two pixels is a half every other time
        assert difference.max() <= 3
        assert difference.mean() <= 0.5


@settings(max_examples=100, deadline=None)
@given(height=st.integers(16, 300), width=st.integers(16, 300), size=st.integers(8, 60))
def test_pictures_of_many_sizes(height: int, width: int, size: int) -> None:
    """Boxes that don't fill the last row or column among them."""
    view = picture(height, width, seed=height)
    check_pillows(resize_view(view, size), view, size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2), (3, 30), (5, 1000)])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_pictures_narrower_than_a_box_and_single_pixels(shape: tuple[int, int], size: int) -> None:
    view = picture(*shape)
    assert np.abs(resize_view(view, size).astype(int) - pillows(view, size)).max() <= 2


@pytest.mark.parametrize("shape", [(1080, 1920), (1025, 1923), (3000, 4096), (720, 1280)])
def test_camera_pictures(shape: tuple[int, int]) -> None:
    view = picture(*shape)
    for size in (224, 336, 518):
        check_pillows(resize_view(view, size), view, size)


@pytest.mark.parametrize("shape", [(1920, 1080), (1925, 1083)])
def test_a_photograph_differs_by_a_level_at_most(shape: tuple[int, int]) -> None:
    view = make_surface(3, shape, good_share=0).image
    difference = np.abs(resize_view(view, 224).astype(int) - pillows(view, 224))
    assert difference.max() <= 1
    assert difference.mean() <= 0.1


def test_black_and_white_edges() -> None:
    """Bicubic overshoots at each, and what is cut off is cut after each pass."""
    view = (255 * (picture(1080, 1920)[::15, ::15] > 127)).astype(np.uint8).repeat(15, axis=0).repeat(15, axis=1)
    for size in (96, 224, 518):
        check_pillows(resize_view(view, size), view, size)


def test_part_of_a_picture_and_one_upside_down() -> None:
    whole = picture(1100, 2000)
    for view in (whole[10:1090, 30:1950], whole[::-1], whole[:, ::-1], whole[..., ::-1]):
        for size in (224, 518, 1200):
            check_pillows(resize_view(view, size), view, size)


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    view = picture(40, 40)
    np.testing.assert_array_equal(resize_view(view, 40), view)


def test_several_pictures_at_once() -> None:
    views = [picture(900, 1600, seed) for seed in range(6)]
    alone = [resize_view(view, 96) for view in views]
    with ThreadPoolExecutor(3) as pool:
        for made, expected in zip(pool.map(lambda view: resize_view(view, 96), views), alone, strict=True):
            np.testing.assert_array_equal(made, expected)
