"""Regions of interest: what is one, and which pixels lie inside."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from dapo_edge.errors import RecipeError
from dapo_edge.runtime.regions import RegionOfInterest, inside_polygon

ARROW = ((10, 10), (90, 30), (60, 90), (50, 40))


def test_a_rectangle_and_a_polygon() -> None:
    rectangle = RegionOfInterest.of([20, 30, 100, 50], "lid")
    assert rectangle.box == (20, 30, 100, 50)
    assert rectangle.corners == ((20, 30), (120, 30), (120, 80), (20, 80))
    assert rectangle.is_rectangle
    arrow = RegionOfInterest.of([list(corner) for corner in ARROW])
    assert arrow.corners == ARROW
    assert arrow.box == (10, 10, 80, 80)
    assert not arrow.is_rectangle
    assert RegionOfInterest.of([(0, 0), (50, 0), (100, 0), (100, 40), (0, 40)]).is_rectangle
    assert hash(rectangle) == hash(RegionOfInterest.of(np.array([20, 30, 100, 50]), "lid")), "plans are cached by it"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 0, 0, 50), "is 0 x 50 px large. Give at least 16 px per side"),
        ((0, 0, 50, -50), "begins outside of the frame"),
        ((-1, 0, 50, 50), r"the region of interest 'lid' begins outside of the frame. Use x and y of 0 or more"),
        ((0, 0, 15, 50), "is 15 x 50 px large"),
        ([(0, 0), (50, 50)], "has 2 corners. Give from 3 to 256"),
        ([(n, n % 2 * 99) for n in range(300)], "has 300 corners"),
        ([(0, 0), (50, 50), (50, 0), (0, 50)], r"crosses or touches itself: the edges that begin at \(0, 0\) and"),
        ([(0, 0), (50, 0), (50, 50), (25, 0), (0, 50)], "crosses or touches itself"),  # a corner on another edge
        ([(0, 0), (50, 0), (20, 0), (20, 50)], "crosses or touches itself"),  # folds back
        ([(0, 0), (50, 0), (50, 0), (50, 50)], "crosses or touches itself"),  # a corner twice
        ([(0, 0), (50, 0), (25, 25), (50, 50), (0, 50), (25, 25)], "crosses or touches itself"),  # an hourglass
        ([(0, 0), (20, 20), (40, 40)], "crosses or touches itself"),  # a line
        ([(0, 0), (50, 0), (50.5, 50)], "is no region of interest. Use"),
        ((0.0, 0, 50, 50), "is no region of interest"),
        ((0, 0, 50), "is no region of interest"),
        ((), "is no region of interest"),
        ("0,0,50,50", "is no region of interest"),
        (None, "is no region of interest"),
        ([[0, 0], [50, 0], 7], "is no region of interest"),
    ],
)
def test_what_is_none(shape: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        RegionOfInterest.of(shape, "lid")


def test_a_name_must_be_text() -> None:
    name: Any = 7
    with pytest.raises(RecipeError, match="is no region of interest"):
        RegionOfInterest.of((0, 0, 50, 50), name)


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.4])
@pytest.mark.parametrize("corners", [ARROW, ARROW[::-1], ((0, 0), (100, 100), (0, 100)), ((5, 50), (50, 5), (95, 50))])
def test_a_pixel_is_inside_when_its_centre_is(corners: Any, scale: float) -> None:
    """OpenCV judges each centre by itself; those on the outline may go either way."""
    scaled = [(x * scale, y * scale) for x, y in corners]
    height, width = 97, 83
    ours = inside_polygon(scaled, width, height)
    outline = np.array(scaled, np.float32)[:, None]
    for row in range(height):
        for column in range(width):
            distance = cv2.pointPolygonTest(outline, (column + 0.5, row + 0.5), True)
            if abs(distance) > 1e-3:
                assert ours[row, column] == (distance > 0), (row, column)


def test_polygons_that_share_an_edge_share_no_pixel() -> None:
    one = inside_polygon(((0, 0), (60, 0), (23, 70), (0, 70)), 90, 70)
    other = inside_polygon(((60, 0), (90, 0), (90, 70), (23, 70)), 90, 70)
    assert (one ^ other).all()


def test_a_rectangle_s_pixels_are_exactly_its_own() -> None:
    inside = inside_polygon(RegionOfInterest.of((20, 30, 40, 16)).corners, 80, 60)
    expected = np.zeros((60, 80), np.bool_)
    expected[30:46, 20:60] = True
    np.testing.assert_array_equal(inside, expected)
