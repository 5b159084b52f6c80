"""Regions and tiles drawn over a frame."""

from __future__ import annotations

import numpy as np
import pytest
from field_backend import SPEC
from numpy.typing import NDArray

from dapo_edge.errors import OutputError
from dapo_edge.outputs.palette import type_colour
from dapo_edge.runtime.preview import DIMMED, LONGEST_PX, draw_views
from dapo_edge.runtime.regions import RegionOfInterest
from dapo_edge.runtime.tiling import Views, plan

LID = RegionOfInterest.of((100, 80, 300, 200), "lid")
SEAL = RegionOfInterest.of([(450, 100), (620, 100), (450, 400)], "seal")


def grey(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.full((size[1], size[0], 3), 100, np.uint8)


def test_regions_are_outlined_and_the_rest_is_dimmed() -> None:
    frame = grey((640, 480))
    shown = draw_views(frame, plan(Views((LID, SEAL)), (640, 480), SPEC, "frame"))
    assert shown.shape == frame.shape
    assert shown.dtype == np.uint8
    assert (frame == 100).all(), "the frame itself is left as it is"
    assert tuple(shown[180, 250]) == (100, 100, 100)  # inside the lid
    assert tuple(shown[200, 500]) == (100, 100, 100)  # inside the seal
    assert tuple(shown[380, 600]) == (round(100 * DIMMED),) * 3  # in the seal's box, outside of the seal
    assert tuple(shown[450, 50]) == (round(100 * DIMMED),) * 3
    assert tuple(shown[280, 250]) == type_colour(1), "the lid's lower edge"
    assert tuple(shown[250, 450]) == type_colour(2), "the seal's left edge"


def test_overlaps_are_tinted_and_tiles_numbered() -> None:
    frame = grey((640, 480))
    shown = draw_views(frame, plan(Views(tile=(240, 480), overlap=40), (640, 480), SPEC, "frame"))
    assert tuple(shown[400, 120]) == (100, 100, 100)  # one tile
    tinted = shown[400, 220]  # two of them
    assert tuple(tinted) != (100, 100, 100)
    assert tuple(shown[400, 200]) == type_colour(1)
    assert tuple(shown[400, 239]) == type_colour(1)
    for middle in (120, 320, 520):
        number = shown[228:252, middle - 12 : middle + 12]
        assert number.min() < 40
        assert number.max() > 220


def test_a_large_frame_becomes_a_picture_for_a_screen() -> None:
    views = Views((RegionOfInterest.of((200, 150, 1800, 1500)),), (700, 600), 150)
    shown = draw_views(grey((4000, 3000)), plan(views, (4000, 3000), SPEC, "model"))
    assert shown.shape == (960, LONGEST_PX, 3)
    line = (shown[200] == type_colour(1)).all(axis=1)
    assert line[64] and line[640], "the region's edges"
    assert tuple(shown[200, 700]) == (30, 30, 30)


@pytest.mark.parametrize("size", [(40, 30), (16, 16), (2000, 20)])
def test_small_and_narrow_frames(size: tuple[int, int]) -> None:
    shown = draw_views(grey(size), plan(Views(tile=(16, 16), overlap=8), size, SPEC, "frame"))
    assert max(shown.shape) <= LONGEST_PX


def test_a_frame_of_another_size() -> None:
    with pytest.raises(OutputError, match="the frame is 640x480, the plan is for 640x400"):
        draw_views(grey((640, 480)), plan(Views(), (640, 400), SPEC, "frame"))
    with pytest.raises(OutputError, match="can't be drawn"):
        draw_views(np.zeros((480, 640), np.uint8), plan(Views(), (640, 480), SPEC, "frame"))
