"""The few drawing tools that materials and defects share: noise fields, soft shapes, strokes and blending.

Everything is measured in *units*, 1/128 of the image's shorter side, so a scene looks the same at any size. Points are
(x, y) in pixels. A function that draws a size-dependent amount of noise takes it from a child generator, so the
caller's own random numbers, and with them the scene's geometry, do not depend on the size either.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from dapo_edge.extras import require

UNITS_PER_IMAGE = 128
_SUBPIXEL_BITS = 4

# float32 both; numpy's annotations lose that in sums with Python numbers, so it is tests that hold it.
Image = NDArray[np.floating]  # [H, W, 3] BGR, nominally 0..255
Plane = NDArray[np.floating]  # [H, W]
Colour = NDArray[np.floating]  # [3] BGR
Points = NDArray[np.float64]  # [N, 2] x, y in pixels
Shape = tuple[int, int]  # height, width in pixels
Window = tuple[slice, slice]


@cache
def cv2() -> ModuleType:
    """OpenCV, imported at first use."""
    return require("cv2")


def unit_of(shape: Shape) -> float:
    """Pixels per unit of an image of this shape."""
    return min(shape) / UNITS_PER_IMAGE


def shape_of(image: Image) -> Shape:
    """Height and width."""
    return image.shape[0], image.shape[1]


def child(rng: np.random.Generator) -> np.random.Generator:
    """A generator of its own, seeded by exactly one number of `rng`."""
    return np.random.Generator(np.random.PCG64(int(rng.integers(2**63))))


def field(
    rng: np.random.Generator,
    shape: Shape,
    unit: float,
    cell: float | tuple[float, float],
    octaves: int = 1,
    gain: float = 0.55,
) -> Plane:
    """Smooth noise around 0, spread about 0.7: bumps of `cell` (height, width) units, halved with each octave."""
    own = child(rng)
    tall, wide = (cell, cell) if isinstance(cell, (int, float)) else cell
    # A larger picture has room for finer detail; without it, it would look out of focus.
    detail = max(0, int(math.log2(unit)))
    total = np.zeros(shape, np.float32)
    norm = math.sqrt(sum(gain ** (2 * octave) for octave in range(octaves)))
    for octave in range(octaves + detail):
        rows = min(shape[0], max(2, round(shape[0] / (tall * unit) * 2**octave)))
        columns = min(shape[1], max(2, round(shape[1] / (wide * unit) * 2**octave)))
        lattice = own.standard_normal((rows, columns), dtype=np.float32)
        lattice *= gain**octave / norm
        total += cv2().resize(lattice, (shape[1], shape[0]), interpolation=cv2().INTER_CUBIC)
    return total


def colour(*bgr: float) -> Colour:
    """[3] float32 BGR."""
    return np.array(bgr, np.float32)


def tinted(base: Colour, grain: Plane) -> Image:
    """One colour, made lighter and darker by `grain` grey levels."""
    return cv2().merge([grain + channel for channel in base.tolist()])


def between(dark: Colour, light: Colour, share: Plane) -> Image:
    """Colours from `dark` (share 0) to `light` (share 1)."""
    pairs = zip(dark.tolist(), light.tolist(), strict=True)
    return cv2().merge([share * (high - low) + low for low, high in pairs])


def blend(image: Image, alpha: Plane, paint: Image | Colour) -> Image:
    """`paint` (an image or one colour) over `image`; where alpha is 0 the pixels stay bit-equal."""
    return image + alpha[..., None] * (paint - image)


def tone(image: Image, mask: Plane) -> float:
    """Mean grey level of the pixels under the mask."""
    return sum(cv2().mean(image, (mask > 0).astype(np.uint8))[:3]) / 3


def place(rng: np.random.Generator, shape: Shape) -> tuple[float, float]:
    """A point (x, y) in pixels, well inside the image."""
    x, y = rng.uniform(0.24, 0.76, 2).tolist()
    return x * shape[1], y * shape[0]


def walk(
    rng: np.random.Generator, start: tuple[float, float], angle: float, steps: int, step_px: float, turn: float
) -> Points:
    """A path of `steps` equal steps whose direction wanders by about `turn` radians per step."""
    angles = angle + np.cumsum(rng.normal(0, turn, steps))
    moves = step_px * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([[start], start + np.cumsum(moves, axis=0)])


def outline(rng: np.random.Generator, centre: tuple[float, float], radius_px: float, wobble: float) -> Points:
    """A closed round outline of 48 points; `wobble` 0 is a circle, 0.3 a splash."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = np.arange(2, 6)
    phases = rng.uniform(0, 2 * np.pi, len(waves))
    heights = rng.normal(0, 1, len(waves)) / waves
    radii = 1 + wobble * np.clip((np.sin(np.outer(angles, waves) + phases) * heights).sum(axis=1), -1, 1)
    return np.array(centre) + radius_px * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.round(points * 2**_SUBPIXEL_BITS).astype(np.int32)


def filled(shape: Shape, points: Points) -> Plane:
    """Coverage 0..1 of a polygon, with soft edges."""
    mask = np.zeros(shape, np.uint8)
    cv2().fillPoly(mask, [_fixed(points)], 255, cv2().LINE_AA, _SUBPIXEL_BITS)
    return mask.astype(np.float32) / 255


def stroked(shape: Shape, paths: list[Points], width_px: float) -> Plane:
    """Coverage 0..1 of lines of one width (whole pixels, at least 1), with soft edges."""
    mask = np.zeros(shape, np.uint8)
    lines = [_fixed(path) for path in paths]
    cv2().polylines(mask, lines, False, 255, max(1, round(width_px)), cv2().LINE_AA, _SUBPIXEL_BITS)
    return mask.astype(np.float32) / 255


def ribbon(shape: Shape, path: Points, width_px: float) -> Plane:
    """Coverage 0..1 of a gently bent line that is `width_px` wide in the middle and pointed at both ends."""
    along = np.gradient(path, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    half = 0.5 * width_px * np.sin(np.linspace(0.05, np.pi - 0.05, len(path)))[:, None] ** 0.5
    return filled(shape, np.concatenate([path + across * half, (path - across * half)[::-1]]))


def window(shape: Shape, centre: tuple[float, float], radius_px: float) -> tuple[Window, Plane, Plane]:
    """The part of the image around a disc, and its coordinates (dx [1, w], dy [h, 1]) in radii from the centre."""
    left, top = (max(0, math.floor(c - radius_px)) for c in centre)
    right, bottom = (min(n, math.ceil(c + radius_px) + 1) for c, n in zip(centre, shape[::-1], strict=True))
    dx = (np.arange(left, right, dtype=np.float32) - centre[0]) / radius_px
    dy = (np.arange(top, bottom, dtype=np.float32) - centre[1]) / radius_px
    return (slice(top, bottom), slice(left, right)), dx[None, :], dy[:, None]


def softened(plane: Plane, sigma_px: float) -> Plane:
    """Gaussian blur."""
    return cv2().GaussianBlur(plane, (0, 0), max(sigma_px, 0.3))
