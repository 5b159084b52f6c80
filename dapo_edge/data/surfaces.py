"""A procedural inspection world: pictures of ten materials, good or with defects, whose every pixel is known.

The picture of a seed is drawn in three steps, each with random numbers of its own: the material, the defects on it, and
the camera (light, blur, noise). So the same seed with `good_share=1` shows the same surface without its defects, and
the same seed at another size shows the same scene.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import Image, Plane, Shape, cv2, shape_of, softened, unit_of
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.materials import MATERIALS, draw_material
from dapo_edge.errors import RecipeError
from dapo_edge.structures import NORMAL, Picture, Truth

MIN_SIDE_PX = 32
# A change of this many grey levels in one channel stands out from texture and noise.
VISIBLE_LEVELS = 8

_SCENE, _MATERIAL, _CAMERA, _FIRST_DEFECT = range(4)

_GOOD_CAPTIONS = ("flawless {}", "a close-up photo of {}", "a photo of {} without a defect", "perfect {}", "intact {}")
_DEFECT_CAPTIONS = (
    "a close-up photo of {} with {}",
    "{} with {}",
    "a photo of damaged {} with {}",
    "an inspection image of {} showing {}",
)
_MASS_NOUNS = ("rust",)


@dataclass(frozen=True, eq=False)
class Surface(Picture):
    """A picture of one material, which fills it."""

    material: str
    caption: str


@dataclass(frozen=True, eq=False)
class Drawing:
    """A surface before a camera looks at it."""

    image: Image  # float32 [H, W, 3] BGR, even light
    truth: Truth
    material: str


def stream(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of one part of a seed's world; the parts do not influence each other."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def make_surface(
    seed: int,
    size: tuple[int, int] = (128, 128),
    *,
    materials: Sequence[str] = tuple(MATERIALS),
    defects: Sequence[str] = tuple(DEFECTS),
    good_share: float = 0.3,
    max_defects: int = 1,
) -> Surface:
    """The surface of `seed` at `size` (width, height) in pixels: good, or with 1 to `max_defects` types of defect."""
    drawing = draw_surface(
        seed, size, materials=materials, defects=defects, good_share=good_share, max_defects=max_defects
    )
    image = _photograph(drawing.image, stream(seed, _CAMERA))
    found = Picture(image, drawing.truth).defects
    return Surface(image, drawing.truth, drawing.material, _caption(seed, drawing.material, found))


def draw_surface(
    seed: int,
    size: tuple[int, int],
    *,
    materials: Sequence[str],
    defects: Sequence[str],
    good_share: float,
    max_defects: int,
) -> Drawing:
    """As `make_surface`, but without the camera."""
    check_world(seed, size, materials, defects, good_share, max_defects)
    width, height = size
    rng = stream(seed, _SCENE)
    material = materials[int(rng.integers(len(materials)))]
    image = draw_material(material, stream(seed, _MATERIAL), (height, width))
    types = np.zeros((height, width), np.uint8)
    if defects and rng.random() >= good_share:
        count = int(rng.integers(1, min(max_defects, len(defects)) + 1))
        for number, kind in enumerate(rng.permutation(len(defects))[:count].tolist()):
            altered, soft = DEFECTS[defects[kind]](stream(seed, _FIRST_DEFECT, number), image, unit_of((height, width)))
            altered = np.clip(altered, 0, 255, out=altered)
            types[_visible(image, altered, soft)] = kind + 1
            image = altered
    return Drawing(image, Truth(types, (NORMAL, *defects)), material)


def _visible(before: Image, after: Image, soft: Plane) -> NDArray[np.bool_]:
    """The truth of one defect: its core, and its fringe as far as it can be seen."""
    change = cv2().absdiff(before, after).max(axis=2)
    return (soft > 0.5) | ((soft > 0) & (change > VISIBLE_LEVELS))


def light_gradient(rng: np.random.Generator, shape: Shape) -> Plane:
    """Brightness of a lamp that stands to one side, [H, W] around 1."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.3)
    x = np.linspace(-0.5, 0.5, shape[1], dtype=np.float32) * (strength * math.cos(angle))
    y = np.linspace(-0.5, 0.5, shape[0], dtype=np.float32) * (strength * math.sin(angle))
    return np.add.outer(y + rng.uniform(0.94, 1.06), x)


def _photograph(image: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    lit = image * light_gradient(rng, shape_of(image))[..., None]
    photo = softened(lit, rng.uniform(0.3, 0.75))
    photo += rng.standard_normal(photo.shape, dtype=np.float32) * rng.uniform(1, 3.5)
    # Adding one half turns truncation into rounding.
    return np.clip(photo + 0.5, 0, 255, out=photo).astype(np.uint8)


def _caption(seed: int, material: str, defects: Sequence[str]) -> str:
    rng = stream(seed, _SCENE, 0)
    if not defects:
        return _GOOD_CAPTIONS[rng.integers(len(_GOOD_CAPTIONS))].format(material)
    phrases = [name if name in _MASS_NOUNS else f"a {name}" for name in defects]
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return _DEFECT_CAPTIONS[rng.integers(len(_DEFECT_CAPTIONS))].format(material, listed)


def check_world(
    seed: int,
    size: tuple[int, int],
    materials: Sequence[str],
    defects: Sequence[str],
    good_share: float,
    max_defects: int,
) -> None:
    """Raise `RecipeError` unless a world can be made of these."""
    if seed < 0:
        raise RecipeError(f"the seed is {seed}", "Use 0 or a positive whole number")
    if min(size) < MIN_SIDE_PX:
        raise RecipeError(
            f"a surface of {size[0]} x {size[1]} pixels is too small", f"Use at least {MIN_SIDE_PX} x {MIN_SIDE_PX}"
        )
    _check_names("material", materials, MATERIALS)
    _check_names("defect", defects, DEFECTS)
    if not materials:
        raise RecipeError("no material was given", f"Use at least one of: {', '.join(MATERIALS)}")
    if not 0 <= good_share <= 1:
        raise RecipeError(f"good_share is {good_share}", "Use a share between 0 (all defective) and 1 (all good)")
    if not defects and good_share < 1:
        raise RecipeError(
            "no defect was given, but not all surfaces are to be good", "Name a defect or set good_share=1"
        )
    if max_defects < 1:
        raise RecipeError(f"max_defects is {max_defects}", "Use at least 1; for good surfaces only, set good_share=1")


def _check_names(kind: str, names: Sequence[str], known: Iterable[str]) -> None:
    valid = tuple(known)
    # A lone string would be taken for a sequence of letters.
    if isinstance(names, str) or len(set(names)) < len(names) or not set(names) <= set(valid):
        wrong = repr(names) if isinstance(names, str) else ", ".join(repr(n) for n in names if n not in valid)
        cause = f"unknown {kind}: {wrong}" if wrong else f"a {kind} is named twice in {', '.join(names)}"
        raise RecipeError(cause, f"Use a sequence of different names out of: {', '.join(valid)}")
