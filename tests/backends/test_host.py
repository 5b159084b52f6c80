"""The resize before the encoder, its halves on two threads: the pixels of Pillow on the whole picture, or nearly."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dapo_edge.backends import host
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
    """A level at most on one of 1000 pixels, by the rounding of weights; of noise in full boxes more, see there."""
    difference = np.abs(made.astype(int) - pillows(view, size))
    height, width = view.shape[:2]
    across, down = pillow_bicubic(width, size).factor, pillow_bicubic(height, size).factor
    if across * down == 1 or width % across or height % down:
        assert difference.max() <= 1
        assert difference.sum() <= max(3, difference.size / 1000)
    else:  # halves are rounded otherwise, and the mean of two pixels is one half of the time
        assert difference.max() <= 2
        assert difference.mean() <= 0.5


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(16, 300),
    width=st.integers(16, 300),
    size=st.integers(8, 60),
    cores=st.integers(1, 2),
    halves=st.booleans(),
)
def test_halves_are_the_whole_picture(height: int, width: int, size: int, cores: int, halves: bool) -> None:
    """Boxes that don't fill the last row or column among them."""
    view = picture(height, width, seed=height)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_WORTH_A_THREAD_BYTES", 0 if halves else 1 << 30)
        patch.setattr(host, "usable_cores", lambda: cores)
        check_pillows(resize_view(view, size), view, size)


@pytest.mark.parametrize("shape", [(1080, 1920), (1025, 1923), (3000, 4096), (720, 1280)])
def test_camera_pictures(shape: tuple[int, int]) -> None:
    view = picture(*shape)
    assert view.nbytes >= host._WORTH_A_THREAD_BYTES
    for size in (224, 336, 518):
        check_pillows(resize_view(view, size), view, size)


def test_a_photograph_differs_by_a_level_at_most() -> None:
    view = make_surface(3, (1920, 1080), good_share=0).image
    difference = np.abs(resize_view(view, 224).astype(int) - pillows(view, 224))
    assert difference.max() <= 1
    assert difference.mean() <= 0.1


def test_part_of_a_picture_and_one_upside_down() -> None:
    whole = picture(1100, 2000)
    for view in (whole[10:1090, 30:1950], whole[::-1], whole[:, ::-1]):
        check_pillows(resize_view(view, 224), view, 224)


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    view = picture(40, 40)
    np.testing.assert_array_equal(resize_view(view, 40), view)


def test_several_pictures_at_once() -> None:
    views = [picture(900, 1600, seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for made, view in zip(pool.map(lambda view: resize_view(view, 96), views), views, strict=True):
            check_pillows(made, view, 96)


@pytest.mark.parametrize("bad", range(4))
def test_what_fails_on_either_thread_is_raised_here(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    before = threading.active_count()

    def work(item: int) -> int:
        if item == bad:
            raise MemoryError(f"no room for {item}")
        return item

    with pytest.raises(MemoryError, match=f"no room for {bad}"):
        host._on_two_threads(work, range(4))
    assert threading.active_count() == before


def test_results_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    assert host._on_two_threads(lambda item: -item, range(50)) == [-item for item in range(50)]
