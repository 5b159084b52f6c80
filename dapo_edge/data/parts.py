"""A part on the conveyor belt: a plate with rounded corners and a bevelled edge, its shadow on black rubber."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import Image, Plane, Shape, colour, field, shape_of, softened, tinted, unit_of
from dapo_edge.data.flaws import LIGHT_FROM
from dapo_edge.structures import Truth

# Sides of a part, in shares of the shorter side of the view.
SMALLEST, LARGEST = 0.7, 0.86


@dataclass(frozen=True)
class Placing:
    """Where a part lies in a view, in pixels."""

    left: int
    top: int
    width: int
    height: int
    corner_px: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @classmethod
    def drawn(cls, rng: np.random.Generator, shape: Shape) -> Placing:
        """A part of random size and place in a view of `shape` (height, width)."""
        height, width = (round(rng.uniform(SMALLEST, LARGEST) * min(shape)) for _ in range(2))
        left = round(rng.uniform(0.2, 0.8) * (shape[1] - width))
        top = round(rng.uniform(0.25, 0.75) * (shape[0] - height))
        return cls(left, top, width, height, rng.uniform(0.06, 0.16) * min(height, width))


def rubber(rng: np.random.Generator, shape: Shape) -> Image:
    """The belt itself: matt black, with a fine grain."""
    return tinted(colour(40, 38, 36), 1.5 * field(rng, shape, unit_of(shape), 1.5))


def lay_down(plate: Image, truth: Truth, placing: Placing, belt: Image) -> tuple[Image, NDArray[np.uint8]]:
    """The part on the belt: image float32 [H, W, 3] BGR, not yet clipped, and types uint8 [H, W]."""
    shape = shape_of(belt)
    depth = _plate_depth((placing.height, placing.width), placing.corner_px)
    cover = np.clip(depth + 0.5, 0, 1)
    unit = unit_of((placing.height, placing.width))
    area = (
        slice(placing.top, placing.top + placing.height),
        slice(placing.left, placing.left + placing.width),
    )
    on_belt = np.zeros(shape, np.float32)
    on_belt[area] = cover
    shadow = np.roll(softened(on_belt, 3 * unit), round(2 * unit), axis=(0, 1))
    image = belt * (1 - 0.6 * shadow)[..., None]
    bevel = np.where(truth.mask, 0, _bevel(depth, 1.5 * unit))
    image[area] += cover[..., None] * (plate + bevel[..., None] - image[area])
    types = np.zeros(shape, np.uint8)
    types[area] = np.where(cover > 0.5, truth.types, 0)
    return image, types


def _plate_depth(shape: Shape, corner_px: float) -> Plane:
    """Distance in pixels from the edge of a plate with rounded corners, positive inside, [H, W]."""
    y, x = (np.abs(np.arange(n, dtype=np.float32) - (n - 1) / 2) - n / 2 + 1 + corner_px for n in shape)
    outside = np.hypot(np.maximum(x, 0)[None, :], np.maximum(y, 0)[:, None])
    inside = np.minimum(np.maximum(x[None, :], y[:, None]), 0)
    return (corner_px - outside - inside).astype(np.float32)


def _bevel(depth: Plane, width_px: float) -> Plane:
    """Light on the rim of a plate, in grey levels: bright where it faces the lamp, dark where it faces away."""
    slope_y, slope_x = np.gradient(depth)
    facing = -(slope_x * math.cos(LIGHT_FROM) + slope_y * math.sin(LIGHT_FROM))
    return (45 * facing * np.clip(1.3 - depth / width_px, 0, 1)).astype(np.float32)
