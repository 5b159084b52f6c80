"""Regions of interest: the parts of a frame that are looked at, as rectangles or polygons in pixels of the frame."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import RecipeError
from dapo_edge.structures import MIN_SIDE_PX, Box

MAX_CORNERS = 256  # each edge is compared with every other one

Point = tuple[int, int]  # x, y: corners of pixels, so that (0, 0) and (width, height) are the frame's own corners
_AnyPoint = TypeVar("_AnyPoint", bound=tuple[float, float])


@dataclass(frozen=True)
class RegionOfInterest:
    """A polygon that does not cross itself; `of` also takes a rectangle. Raises `RecipeError` for what is neither."""

    corners: tuple[Point, ...]
    name: str = ""  # for error messages and the preview

    @classmethod
    def of(cls, shape: object, name: str = "") -> RegionOfInterest:
        """From [x, y, width, height], or [[x, y], [x, y], [x, y], ...]."""
        numbers = _whole(shape)
        if len(numbers) == 4:
            x, y, width, height = numbers
            return cls(((x, y), (x + width, y), (x + width, y + height), (x, y + height)), name)
        return cls(shape, name)  # type: ignore[arg-type]  # which is checked there

    def __post_init__(self) -> None:
        corners: object = self.corners
        points = [_whole(point) for point in corners] if isinstance(corners, (list, tuple)) else []
        if not points or any(len(point) != 2 for point in points) or not isinstance(self.name, str):
            raise RecipeError(
                f"{corners!r:.80} is no region of interest",
                "Use [x, y, width, height] or [[x, y], [x, y], [x, y], ...] in whole pixels of the frame",
            )
        object.__setattr__(self, "corners", tuple((point[0], point[1]) for point in points))
        if not 3 <= len(points) <= MAX_CORNERS:
            raise RecipeError(f"{self} has {len(points)} corners", f"Give from 3 to {MAX_CORNERS}")
        x, y, width, height = self.box
        if min(x, y) < 0:
            raise RecipeError(f"{self} begins outside of the frame", "Use x and y of 0 or more")
        if min(width, height) < MIN_SIDE_PX:
            raise RecipeError(f"{self} is {width} x {height} px large", f"Give at least {MIN_SIDE_PX} px per side")
        crossing = _crossing(self.corners)
        if crossing is not None:
            raise RecipeError(
                f"{self} crosses or touches itself: the edges that begin at {crossing[0]} and {crossing[1]} meet",
                "Give the corners in the order in which they follow each other along the outline, each once",
            )

    def __str__(self) -> str:
        return f"the region of interest '{self.name}'" if self.name else f"the region of interest at {self.box[:2]}"

    @property
    def box(self) -> Box:
        """The smallest rectangle around it."""
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)

    @property
    def is_rectangle(self) -> bool:
        """Whether it fills its box."""
        return _twice_the_area(self.corners) == 2 * self.box[2] * self.box[3]


def inside_polygon(corners: Sequence[tuple[float, float]], width: int, height: int) -> NDArray[np.bool_]:
    """Pixels of a picture whose centres lie inside, [height, width] bool.

    Even-odd rule along each row of pixels: every edge that crosses the row's centre line turns what follows over.
    """
    turns = np.zeros((height, width + 1), np.bool_)
    for (x0, y0), (x1, y1) in _edges(corners):
        low, high = min(y0, y1), max(y0, y1)
        rows = np.arange(max(0, _after(low)), min(height, _after(high)))  # their centres lie in [low, high)
        if len(rows):
            crossing = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            columns = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
            turns[rows, columns] ^= True
    return np.logical_xor.accumulate(turns, axis=1)[:, :width]


def _edges(corners: Sequence[_AnyPoint]) -> Iterator[tuple[_AnyPoint, _AnyPoint]]:
    return zip(corners, (*corners[1:], corners[0]), strict=True)


def _twice_the_area(corners: Sequence[Point]) -> int:
    """Of a polygon, by the shoelace formula (https://mathworld.wolfram.com/PolygonArea.html), in px²."""
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in _edges(corners)))


def _after(place: float) -> int:
    """The first pixel whose centre lies at `place` or after it."""
    return int(np.ceil(place - 0.5))


def _whole(values: object) -> tuple[int, ...]:
    """Plain integers, or nothing."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return ()
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        return ()


def _crossing(corners: tuple[Point, ...]) -> tuple[Point, Point] | None:
    """Where two edges begin that have more in common than the corner between neighbours."""
    count = len(corners)
    edges = list(_edges(corners))
    for first in range(count):
        for second in range(first + 1, count):
            one, other = edges[first], edges[second]
            if second == first + 1:
                bad = _folds_back(one[0], one[1], other[1])
            elif second == count - 1 and first == 0:
                bad = _folds_back(other[0], other[1], one[1])
            else:
                bad = _meet(*one, *other)
            if bad:
                return one[0], other[0]
    return None


def _turn(a: Point, b: Point, c: Point) -> int:
    """Twice the signed area of a triangle: 0 for points on one line."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _folds_back(a: Point, b: Point, c: Point) -> bool:
    """Whether the edge from b to c runs back over the edge from a to b, or one of them has no length."""
    ahead = (b[0] - a[0]) * (c[0] - b[0]) + (b[1] - a[1]) * (c[1] - b[1])
    return a == b or b == c or (_turn(a, b, c) == 0 and ahead < 0)


def _meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the edges ab and cd have a point in common."""
    sides = _turn(a, b, c), _turn(a, b, d), _turn(c, d, a), _turn(c, d, b)
    if _opposite(sides[0], sides[1]) and _opposite(sides[2], sides[3]):
        return True
    return any(
        side == 0 and _within(*edge, point)
        for side, edge, point in zip(sides, ((a, b), (a, b), (c, d), (c, d)), (c, d, a, b), strict=True)
    )


def _opposite(one: int, other: int) -> bool:
    return (one > 0 > other) or (one < 0 < other)


def _within(a: Point, b: Point, point: Point) -> bool:
    """Whether a point on the line through a and b lies between them."""
    return min(a[0], b[0]) <= point[0] <= max(a[0], b[0]) and min(a[1], b[1]) <= point[1] <= max(a[1], b[1])
