"""A procedural inspection world: pictures of many materials, good or with defects, whose every pixel is known.

The picture of a seed is drawn in steps, each with random numbers of its own: the material, the defects on it, what
lies around it, and the camera (light, blur, noise). So the same seed with `good_share=1` shows the same surface
without its defects, and the same seed at another size shows the same scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import Image, Plane, cv2, unit_of
from dapo_edge.data.camera import photograph
from dapo_edge.data.captions import Caption, write_caption
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.materials import MATERIALS, draw_material
from dapo_edge.data.parts import SMALLEST, Placing, lay_down, rubber
from dapo_edge.errors import RecipeError
from dapo_edge.structures import NORMAL, Picture, Truth

MIN_SIDE_PX = 32
# A change of this many grey levels in one channel stands out from texture and noise.
VISIBLE_LEVELS = 8

Framing = Literal["surface", "part"]

_SCENE, _MATERIAL, _CAMERA, _FIRST_DEFECT = range(4)
_CAPTION, _PLACING = range(2)  # below _SCENE


@dataclass(frozen=True, eq=False)
class Surface(Picture):
    """A picture of one material, and a sentence about it."""

    material: str
    caption: Caption


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
    framing: Framing = "surface",
    shift: str | None = None,
) -> Surface:
    """The picture of `seed` at `size` (width, height) in pixels: good, or with 1 to `max_defects` types of defect.

    With `framing="surface"` the material fills it; with "part" a plate of the material lies on the belt. `shift` names
    one of `camera.SHIFTS`. Raises `RecipeError` for a world that can't be made.
    """
    if framing not in get_args(Framing):
        raise RecipeError(f"the framing is {framing!r}", f"Use one of: {', '.join(get_args(Framing))}")
    draw = partial(
        draw_surface, seed, materials=materials, defects=defects, good_share=good_share, max_defects=max_defects
    )
    drawing = draw(size) if framing == "surface" else _draw_part(seed, size, draw)
    image = photograph(drawing.image, stream(seed, _CAMERA), shift)
    found = Picture(image, drawing.truth).defects
    caption = write_caption(stream(seed, _SCENE, _CAPTION), drawing.material, found)
    return Surface(image, drawing.truth, drawing.material, caption)


def draw_surface(
    seed: int,
    size: tuple[int, int],
    *,
    materials: Sequence[str],
    defects: Sequence[str],
    good_share: float,
    max_defects: int,
) -> Drawing:
    """A surface that fills the picture, before the camera."""
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


def _draw_part(seed: int, size: tuple[int, int], draw: Callable[[tuple[int, int]], Drawing]) -> Drawing:
    """A part on the belt, before the camera; `draw` makes its surface at the size that it has there."""
    smallest = round(MIN_SIDE_PX / SMALLEST) + 1
    if min(size) < smallest:
        raise RecipeError(
            f"a part can't be drawn in {size[0]} x {size[1]} pixels", f"Use at least {smallest} x {smallest}"
        )
    rng, shape = stream(seed, _SCENE, _PLACING), (size[1], size[0])
    placing = Placing.drawn(rng, shape)
    plate = draw(placing.size)
    image, types = lay_down(plate.image, plate.truth, placing, rubber(rng, shape))
    return Drawing(image, Truth(types, plate.truth.names), plate.material)


def _visible(before: Image, after: Image, soft: Plane) -> NDArray[np.bool_]:
    """The truth of one defect: its core, and its fringe as far as it can be seen."""
    change = cv2().absdiff(before, after).max(axis=2)
    return (soft > 0.5) | ((soft > 0) & (change > VISIBLE_LEVELS))


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
