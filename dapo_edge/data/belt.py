"""An endless conveyor belt under a fixed camera: plates of all materials pass by, some of them defective.

Parts and belt move together, so the world is one long still picture. It is drawn in slots, one part in each, and a
frame is a window onto it that moves by `step_px` per frame; only the light and the sensor noise stay with the camera.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import Plane, Shape, colour, cv2, field, softened, tinted, unit_of
from dapo_edge.data.flaws import DEFECTS, LIGHT_FROM
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.surfaces import check_world, draw_surface, light_gradient, stream
from dapo_edge.errors import RecipeError
from dapo_edge.structures import NORMAL, Picture, Truth

MIN_BELT_SIDE_PX = 64  # its parts are then just large enough for a surface
CROSSING_S = 4.0  # seconds that a part takes through the camera's view

_BELT, _LIGHT, _NOISE, _PART = range(4)
_NOISE_MARGIN_PX = 64
_NOISE_LEVELS = 2.0
_LIGHT_ONE = 128  # brightness 1 as a byte


@dataclass(frozen=True, eq=False)
class _Slot:
    """A stretch of the belt with one part on it."""

    image: NDArray[np.uint8]  # [H, pitch, 3] BGR
    types: NDArray[np.uint8]  # [H, pitch]


class Belt:
    """Frames of `size` (width, height) pixels, in any order; a frame depends on nothing but its index.

    At most as many slots are kept as a frame shows, plus two, so memory does not grow.
    """

    def __init__(
        self,
        size: tuple[int, int] = (640, 480),
        fps: float = 30.0,
        *,
        seed: int = 0,
        materials: Sequence[str] = tuple(MATERIALS),
        defects: Sequence[str] = tuple(DEFECTS),
        good_share: float = 0.5,
        max_defects: int = 1,
    ) -> None:
        check_world(seed, size, materials, defects, good_share, max_defects)
        if min(size) < MIN_BELT_SIDE_PX:
            raise RecipeError(
                f"a belt of {size[0]} x {size[1]} pixels is too small",
                f"Use at least {MIN_BELT_SIDE_PX} x {MIN_BELT_SIDE_PX}",
            )
        if not (fps > 0 and math.isfinite(fps)):
            raise RecipeError(f"a belt can't run at {fps} frames per second", "Use a number above 0")
        self.size = size
        self.fps = fps
        self.names = (NORMAL, *defects)
        self._seed = seed
        self._materials = tuple(materials)
        self._defects = tuple(defects)
        self._good_share = good_share
        self._max_defects = max_defects
        self._pitch_px = round(0.8 * min(size))
        self._light, self._bright, self._dark = self._camera()
        visible = math.ceil(size[0] / self._pitch_px) + 1
        self._slot = lru_cache(maxsize=visible + 2)(self._draw_slot)

    @property
    def step_px(self) -> int:
        """Pixels by which everything moves to the left from one frame to the next."""
        return max(1, round(self.size[0] / (self.fps * CROSSING_S)))

    def frame(self, index: int) -> Picture:
        """What the camera sees at frame `index`, counted from 0."""
        if index < 0:
            raise RecipeError(f"a belt has no frame {index}", "Count frames from 0")
        width, height = self.size
        image = np.empty((height, width, 3), np.uint8)
        types = np.empty((height, width), np.uint8)
        left = index * self.step_px
        column = 0
        while column < width:
            number, start = divmod(left + column, self._pitch_px)
            slot = self._slot(number)
            count = min(self._pitch_px - start, width - column)
            image[:, column : column + count] = slot.image[:, start : start + count]
            types[:, column : column + count] = slot.types[:, start : start + count]
            column += count
        return Picture(self._photograph(image, index), Truth(types, self.names))

    def _camera(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Light [H, W, 3] as bytes around 128, and the two halves of the noise tile: added, taken away."""
        width, height = self.size
        light = light_gradient(stream(self._seed, _LIGHT), (height, width))
        tile = (height + _NOISE_MARGIN_PX, width + _NOISE_MARGIN_PX, 3)
        noise = stream(self._seed, _NOISE).standard_normal(tile, dtype=np.float32) * _NOISE_LEVELS
        light_bytes = np.repeat(np.round(light * _LIGHT_ONE).astype(np.uint8)[..., None], 3, axis=2)
        return light_bytes, np.clip(noise, 0, 255).astype(np.uint8), np.clip(-noise, 0, 255).astype(np.uint8)

    def _photograph(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        # Drawing noise for every frame would cost more than all the rest. A fixed tile, moved to a place that depends
        # on the index alone, repeats after 4096 frames; the multiplier is odd, so no place is left out.
        top, left = divmod(index * 2531 % _NOISE_MARGIN_PX**2, _NOISE_MARGIN_PX)
        area = (slice(top, top + image.shape[0]), slice(left, left + image.shape[1]))
        lit = cv2().multiply(image, self._light, scale=1 / _LIGHT_ONE)
        cv2().add(lit, self._bright[area], lit)
        return cv2().subtract(lit, self._dark[area], lit)

    def _draw_slot(self, number: int) -> _Slot:
        """Slot `number` of the world: rubber, the part's shadow, the part with its bevelled edge."""
        rng = stream(self._seed, _PART, number)
        shape = (self.size[1], self._pitch_px)
        height, width = (round(rng.uniform(0.58, 0.72) * self._pitch_px / 0.8) for _ in range(2))
        left = round(rng.uniform(0.2, 0.8) * (shape[1] - width))
        top = round(rng.uniform(0.25, 0.75) * (shape[0] - height))
        surface = draw_surface(
            int(rng.integers(2**63)),
            (width, height),
            materials=self._materials,
            defects=self._defects,
            good_share=self._good_share,
            max_defects=self._max_defects,
        )
        depth = _plate_depth((height, width), rng.uniform(0.06, 0.16) * min(height, width))
        cover = np.clip(depth + 0.5, 0, 1)
        unit = unit_of((height, width))

        area = (slice(top, top + height), slice(left, left + width))
        on_belt = np.zeros(shape, np.float32)
        on_belt[area] = cover
        shadow = np.roll(softened(on_belt, 3 * unit), round(2 * unit), axis=(0, 1))
        image = self._rubber(number, shape) * (1 - 0.6 * shadow)[..., None]
        bevel = np.where(surface.truth.mask, 0, _bevel(depth, 1.5 * unit))
        plate = surface.image + bevel[..., None]
        image[area] += cover[..., None] * (plate - image[area])
        types = np.zeros(shape, np.uint8)
        types[area] = np.where(cover > 0.5, surface.truth.types, 0)
        # The half turns the conversion's truncation into rounding.
        pixels = np.clip(softened(image, 0.6) + 0.5, 0, 255).astype(np.uint8)
        return _Slot(pixels, types)

    def _rubber(self, number: int, shape: Shape) -> NDArray[np.float32]:
        grain = field(stream(self._seed, _BELT, number), shape, unit_of(self.size), 1.5)
        return tinted(colour(40, 38, 36), 1.5 * grain)


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
