"""The camera that looks at generated scenes: uneven light, a soft lens, a noisy sensor, and harder conditions.

`SHIFTS` are conditions that neither pretraining nor tuning ever shows: a test set under shift is taken with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import Image, Plane, Shape, cv2, shape_of, softened
from dapo_edge.errors import RecipeError, did_you_mean


def light_gradient(rng: np.random.Generator, shape: Shape) -> Plane:
    """Brightness of a lamp that stands to one side, [H, W] around 1."""
    return _slanted(rng, shape, rng.uniform(0.08, 0.3), rng.uniform(0.94, 1.06))


def photograph(image: Image, rng: np.random.Generator, shift: str | None = None) -> NDArray[np.uint8]:
    """A photo of an evenly lit scene (float32 [H, W, 3] BGR), under usual conditions or one of `SHIFTS`."""
    lit = image * light_gradient(rng, shape_of(image))[..., None]
    photo = softened(lit, rng.uniform(0.3, 0.75))
    noise = rng.standard_normal(photo.shape, dtype=np.float32)
    level = rng.uniform(1, 3.5)
    if shift is not None:
        photo = _shift(shift)(rng, photo)
    photo += noise * level
    # Adding one half turns truncation into rounding.
    return np.clip(photo + 0.5, 0, 255, out=photo).astype(np.uint8)


def under_shift(photo: NDArray[np.uint8], rng: np.random.Generator, shift: str) -> NDArray[np.uint8]:
    """A photo [H, W, 3] BGR as one of `SHIFTS` would have changed it."""
    changed = _shift(shift)(rng, photo.astype(np.float32))
    return np.clip(changed + 0.5, 0, 255).astype(np.uint8)


def _slanted(rng: np.random.Generator, shape: Shape, strength: float, middle: float) -> Plane:
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, shape[1], dtype=np.float32) * (strength * math.cos(angle))
    y = np.linspace(-0.5, 0.5, shape[0], dtype=np.float32) * (strength * math.sin(angle))
    return np.add.outer(y + middle, x)


def _lighting(rng: np.random.Generator, photo: Image) -> Image:
    """A lamp much too far to one side, and too strong or too weak."""
    light = _slanted(rng, shape_of(photo), rng.uniform(0.5, 0.8), rng.choice([rng.uniform(0.6, 0.75), 1.25]))
    return photo * light[..., None]


def _blur(rng: np.random.Generator, photo: Image) -> Image:
    """Out of focus."""
    return softened(photo, rng.uniform(1.0, 1.7) * min(shape_of(photo)) / 144)


def _noise(rng: np.random.Generator, photo: Image) -> Image:
    """A sensor at high gain."""
    return photo + rng.standard_normal(photo.shape, dtype=np.float32) * rng.uniform(9, 16)


def _resolution(rng: np.random.Generator, photo: Image) -> Image:
    """A camera with half the pixels."""
    height, width = shape_of(photo)
    share = rng.uniform(0.42, 0.6)
    small = cv2().resize(photo, (round(width * share), round(height * share)), interpolation=cv2().INTER_AREA)
    return cv2().resize(small, (width, height), interpolation=cv2().INTER_LINEAR)


def _colour(rng: np.random.Generator, photo: Image) -> Image:
    """A wrong white balance, with more or less saturation."""
    gains = np.array([rng.uniform(0.7, 1.3), rng.uniform(0.85, 1.15), rng.uniform(0.7, 1.3)], np.float32)
    grey = photo.mean(axis=2, keepdims=True)
    return (grey + np.float32(rng.uniform(0.5, 1.4)) * (photo - grey)) * gains


SHIFTS: dict[str, Callable[[np.random.Generator, Image], Image]] = {
    "lighting": _lighting,
    "blur": _blur,
    "noise": _noise,
    "resolution": _resolution,
    "colour": _colour,
}


def _shift(name: str) -> Callable[[np.random.Generator, Image], Image]:
    if name not in SHIFTS:
        raise RecipeError(
            f"unknown shift '{name}'", did_you_mean(name, SHIFTS) + f"Valid shifts are {', '.join(SHIFTS)}"
        )
    return SHIFTS[name]
