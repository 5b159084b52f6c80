from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("cv2")

from dapo_edge.data.belt import Belt
from dapo_edge.errors import RecipeError

SIZES = [(160, 120), (90, 200), (301, 97)]


def small(**options):
    return Belt(**{"size": (160, 120), "fps": 10, "seed": 3, "good_share": 0.2, **options})


@pytest.mark.parametrize("size", SIZES)
def test_frame_shapes(size):
    frame = small(size=size).frame(0)
    assert frame.image.shape == (size[1], size[0], 3)
    assert frame.image.dtype == np.uint8
    assert frame.types.shape == (size[1], size[0])
    assert frame.types.dtype == np.uint8


@pytest.mark.parametrize("size", SIZES)
def test_truth_moves_with_the_image(size):
    belt = small(size=size)
    step = belt.step_px
    frames = [belt.frame(index) for index in range(0, 40)]
    for before, after in pairwise(frames):
        assert np.array_equal(before.types[:, step:], after.types[:, :-step])
        # Only the fixed light and the noise differ.
        moved = np.abs(before.image[:, step:].astype(int) - after.image[:, :-step])
        still = np.abs(before.image.astype(int) - after.image)
        assert moved.mean() < 5
        assert moved.mean() < still.mean()
    assert any(frame.mask.any() for frame in frames)


def test_random_access_equals_sequential():
    sequential, random = small(), small()
    frames = [sequential.frame(index) for index in range(60)]
    for index in np.random.default_rng(0).permutation(60).tolist():
        frame = random.frame(index)
        assert np.array_equal(frame.image, frames[index].image)
        assert np.array_equal(frame.types, frames[index].types)


def test_far_frames_and_seeds():
    belt = small()
    far = belt.frame(10**9)
    assert far.image.std() > 5
    assert not np.array_equal(belt.frame(0).image, far.image)
    assert not np.array_equal(belt.frame(0).image, small(seed=4).frame(0).image)


def test_memory_is_bounded():
    belt = small()
    for index in range(0, 3000, 7):
        belt.frame(index)
    cache = belt._slot.cache_info()
    assert cache.misses > cache.maxsize >= cache.currsize


def test_slots_are_drawn_once_when_frames_come_in_order():
    belt = small()
    for index in range(200):
        belt.frame(index)
    reach = 199 * belt.step_px + belt.size[0]
    assert belt._slot.cache_info().misses == -(-reach // belt._pitch_px)


def test_frames_do_not_share_memory():
    belt = small()
    belt.frame(5).image[:] = 0
    belt.frame(5).types[:] = 9
    again = belt.frame(5)
    assert again.image.any()
    assert again.types.max() < 9 or len(again.names) > 9


def test_noise_changes_from_frame_to_frame():
    belt = small()
    step = belt.step_px
    first, second = belt.frame(0).image, belt.frame(1).image
    assert np.abs(first[:, step:].astype(int) - second[:, :-step]).mean() > 0.5


def test_truth_names_follow_the_defects_asked_for():
    belt = small(defects=("hole",), materials=("plastic",), good_share=0)
    frames = [belt.frame(index) for index in range(0, 100, 10)]
    assert all(frame.names == ("normal", "hole") for frame in frames)
    assert {name for frame in frames for name in frame.defects} == {"hole"}


def test_good_parts_have_an_empty_truth():
    belt = small(good_share=1)
    assert not any(belt.frame(index).mask.any() for index in range(0, 100, 10))


@pytest.mark.parametrize(
    "options",
    [
        {"size": (63, 200)},
        {"fps": 0},
        {"fps": float("nan")},
        {"materials": ("gold",)},
        {"good_share": 2},
    ],
)
def test_impossible_belts_are_refused(options):
    with pytest.raises(RecipeError):
        small(**options)


def test_negative_frame_is_refused():
    with pytest.raises(RecipeError, match="from 0"):
        small().frame(-1)
