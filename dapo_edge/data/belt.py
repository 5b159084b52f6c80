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

from dapo_edge.data.brushes import cv2, softened
from dapo_edge.data.camera import light_gradient
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.parts import Placing, lay_down, rubber
from dapo_edge.data.surfaces import check_world, draw_surface, stream
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
        self._pitch_px = min(size)
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
        """Slot `number` of the world: rubber, the part's shadow, the part."""
        rng = stream(self._seed, _PART, number)
        shape = (self.size[1], self._pitch_px)
        placing = Placing.drawn(rng, shape)
        surface = draw_surface(
            int(rng.integers(2**63)),
            placing.size,
            materials=self._materials,
            defects=self._defects,
            good_share=self._good_share,
            max_defects=self._max_defects,
        )
        belt = rubber(stream(self._seed, _BELT, number), shape)
        image, types = lay_down(surface.image, surface.truth, placing, belt)
        # The half turns the conversion's truncation into rounding.
        pixels = np.clip(softened(image, 0.6) + 0.5, 0, 255).astype(np.uint8)
        return _Slot(pixels, types)
