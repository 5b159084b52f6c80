"""Views of the generated world: what training sees is what the line would see, with the truth in step."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_edge.backends.host import resize_view
from dapo_edge.data.camera import SHIFTS
from dapo_edge.structures import NORMAL, Picture, Truth
from dapo_edge.training.views import AnyDefect, View, ViewStore, World, as_view, world_view

MATERIALS, DEFECTS = ("plastic", "rubber"), ("hole", "stain", "crack")


def world(count: int = 12, **changes: object) -> World:
    return World(500, count, 48, MATERIALS, DEFECTS, **changes)  # type: ignore[arg-type]


def test_sizes_types_and_names() -> None:
    pictures = world()
    assert pictures.names == (NORMAL, *DEFECTS)
    views = [pictures[index] for index in range(len(pictures))]
    for view in views:
        assert (view.image.shape, view.image.dtype) == ((48, 48, 3), np.uint8)
        assert (view.types.shape, view.types.dtype) == ((48, 48), np.uint8)
        assert view.types.max() <= len(DEFECTS)
    assert {bool(view.types.any()) for view in views} == {True, False}, "good ones and defective ones"
    assert len({view.image.tobytes() for view in views}) == len(views)


def test_captions_name_what_the_picture_shows() -> None:
    for index in range(20):
        view = world_view(index, 64, MATERIALS, DEFECTS, max_defects=2)
        assert view.material in MATERIALS
        assert view.caption.material in (None, view.material)
        assert view.caption == world_view(index, 64, MATERIALS, DEFECTS, max_defects=2).caption
        shown = tuple(DEFECTS[kind - 1] for kind in np.unique(view.types) if kind)
        assert set(shown) <= set(view.caption.defects), "a sliver may be lost in the resize, nothing may be added"
        assert bool(view.caption.defects) or not view.types.any()


def test_the_same_number_is_the_same_picture() -> None:
    one, other = world(), world()
    for index in (0, 5, 11):
        assert one[index].image.tobytes() == other[index].image.tobytes()
        assert one[index].types.tobytes() == other[index].types.tobytes()
    later = World(505, 1, 48, MATERIALS, DEFECTS)
    assert later[0].image.tobytes() == one[5].image.tobytes(), "numbers count from the first one"


@pytest.mark.parametrize("index", [12, 100, -1])
def test_beyond_the_end(index: int) -> None:
    with pytest.raises(IndexError):
        world()[index]
    assert len(list(iter(world(2)))) == 2, "a loop over it ends"


def test_shifts_come_by_turns() -> None:
    count = len(SHIFTS) + 1
    shifted, plain = world(count, shifted=True, belt_share=0), world(count, belt_share=0)
    for index in range(count):
        wanted = tuple(SHIFTS)[index % len(SHIFTS)]
        by_name = world_view(500 + index, 48, MATERIALS, DEFECTS, shift=wanted)
        assert shifted[index].image.tobytes() == by_name.image.tobytes()
        assert shifted[index].image.tobytes() != plain[index].image.tobytes()
        np.testing.assert_array_equal(shifted[index].types, plain[index].types, err_msg="a shift moves no defect")


def test_belts_are_among_the_pictures() -> None:
    belts, plain, shifted = world(20, belt_share=1), world(20, belt_share=0), world(20, belt_share=1, shifted=True)
    some = world(200)
    changed = sum(some[n].image.tobytes() != world(200, belt_share=0)[n].image.tobytes() for n in range(200))
    assert 30 < changed < 70, "a quarter"
    for index in range(20):
        assert belts[index].image.shape == (48, 48, 3)
        assert belts[index].image.tobytes() != plain[index].image.tobytes()
        assert belts[index].image.tobytes() != shifted[index].image.tobytes()
        np.testing.assert_array_equal(belts[index].types, shifted[index].types)
    assert {bool(belts[index].types.any()) for index in range(20)} == {True, False}


def test_types_survive_the_resize() -> None:
    """No number between two types, and every region stays where it was."""
    types = np.zeros((120, 160), np.uint8)
    types[30:60, 40:80], types[60:90, 40:80] = 1, 7
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    names = (NORMAL, *"abcdefg")
    view = as_view(Picture(image, Truth(types, names)), 40)
    expected = np.zeros((40, 40), np.uint8)
    expected[10:20, 10:20], expected[20:30, 10:20] = 1, 7
    np.testing.assert_array_equal(view.types, expected)
    np.testing.assert_array_equal(view.image, resize_view(image, 40))


def test_a_speck_is_not_lost() -> None:
    types = np.zeros((120, 160), np.uint8)
    types[61, 81] = 3
    view = as_view(Picture(np.zeros((120, 160, 3), np.uint8), Truth(types, (NORMAL, *"abc"))), 40)
    assert np.argwhere(view.types).tolist() == [[20, 20]]
    assert view.types[20, 20] == 3


def test_all_defects_as_one_type() -> None:
    plain, merged = world(), AnyDefect(world())
    assert (len(merged), len(merged.names)) == (12, 2)
    assert merged.identity != plain.identity
    for index in range(12):
        assert merged[index].image.tobytes() == plain[index].image.tobytes()
        np.testing.assert_array_equal(merged[index].types, plain[index].types > 0)


def test_other_pictures_have_another_identity() -> None:
    assert world().identity == world().identity == ViewStore(world(), 48).identity
    others = (world(13), world(max_defects=2), world(shifted=True), World(501, 12, 48, MATERIALS, DEFECTS))
    assert len({world().identity, *(other.identity for other in others)}) == 5


def test_a_view_of_the_right_size_is_not_touched() -> None:
    view = View(np.zeros((48, 48, 3), np.uint8), np.zeros((48, 48), np.uint8))
    assert as_view(view, 48) is view
    assert as_view(view, 32).image.shape == (32, 32, 3)


def test_the_store_keeps_order_and_prepares_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counted(World):
        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            asked.append(index)
            return super().__getitem__(index)

    pictures = Counted(500, 6, 48, MATERIALS, DEFECTS)
    store = ViewStore(pictures, 48)
    images, types = store.fetch([4, 1, 5])
    assert (images.shape, images.dtype, types.shape, types.dtype) == ((3, 48, 48, 3), np.uint8, (3, 48, 48), np.uint8)
    for place, index in enumerate([4, 1, 5]):
        assert images[place].tobytes() == world()[index].image.tobytes()
        assert types[place].tobytes() == world()[index].types.tobytes()
    again, _ = store.fetch([1, 4])
    np.testing.assert_array_equal(again, images[[1, 0]])
    assert sorted(asked) == [1, 4, 5]
    monkeypatch.setattr("dapo_edge.training.views._MEMORY_BYTES", 0)
    asked.clear()
    small = ViewStore(pictures, 48)
    small.fetch([2])
    np.testing.assert_array_equal(small.fetch([2])[0], world()[2].image[None])
    assert asked == [2, 2], "what does not fit into memory is made again"
