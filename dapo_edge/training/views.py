"""Pictures as training sees them: at the model's input size, through the line's own resize, with the true types."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.host import resize_view
from dapo_edge.data.belt import Belt
from dapo_edge.data.camera import SHIFTS, under_shift
from dapo_edge.data.captions import Caption
from dapo_edge.data.dataset import types_at
from dapo_edge.data.surfaces import make_surface, stream
from dapo_edge.structures import NORMAL, Picture

# Camera pictures in multiples of the model's input: as it is, wider (a 4:3 camera), and finer.
_CAMERAS = ((1.0, 1.0), (4 / 3, 1.0), (1.5, 1.5))
_CAMERA_SHARES = (0.4, 0.4, 0.2)
_PART_SHARE = 0.4
_SMALLEST_PX = 128  # that a scene is drawn at
_VIEW, _BELT = 99, 1  # random streams that no picture uses
_MEMORY_BYTES = 4 << 30  # prepared views above this are prepared again whenever they are needed


@dataclass(frozen=True, eq=False)
class View:
    """A picture at the model's input size, and what is on it."""

    image: NDArray[np.uint8]  # [S, S, 3] BGR
    types: NDArray[np.uint8]  # [S, S], index into the names of the set


@dataclass(frozen=True, eq=False)
class WorldView(View):
    """A view of the generated world."""

    material: str
    caption: Caption


class Pictures(Protocol):
    """Labelled pictures that are made or read when asked for: `data.dataset.FileSet`, `World`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Row 0 is normal, then the defect types."""
        ...

    @property
    def identity(self) -> str:
        """Tells these pictures from others, without reading them."""
        ...

    @property
    def kinds(self) -> Sequence[tuple[str, str]] | None:
        """Category and defect of every picture, or None where only the pictures themselves tell."""
        ...

    def title(self, index: int) -> str:
        """What people know a picture by."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture | View: ...


@dataclass(frozen=True)
class World:
    """A numbered stretch of the generated world as views of `image_size` px."""

    first: int  # number of the first picture
    count: int
    image_size: int
    materials: tuple[str, ...]
    defects: tuple[str, ...]
    good_share: float = 0.3
    max_defects: int = 1
    shifted: bool = False  # under one of `camera.SHIFTS`, by turns
    belt_share: float = 0.25  # of the pictures: a moving belt, with parts that the frame's border cuts

    @property
    def names(self) -> tuple[str, ...]:
        """Row 0 is normal, then `defects`."""
        return (NORMAL, *self.defects)

    @property
    def identity(self) -> str:
        """As `Pictures.identity`."""
        return repr(self)

    @property
    def kinds(self) -> None:
        """As `Pictures.kinds`."""
        return None

    def title(self, index: int) -> str:
        """As `Pictures.title`."""
        return f"number {self.first + index} of the generated world"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> View:
        if not 0 <= index < self.count:
            raise IndexError(index)
        shift = tuple(SHIFTS)[index % len(SHIFTS)] if self.shifted else None
        if stream(self.first + index, _VIEW, _BELT).random() < self.belt_share:
            return self._belt_view(self.first + index, shift)
        return world_view(
            self.first + index,
            self.image_size,
            self.materials,
            self.defects,
            good_share=self.good_share,
            max_defects=self.max_defects,
            shift=shift,
        )

    def _belt_view(self, seed: int, shift: str | None) -> View:
        rng, side = stream(seed, _VIEW, _BELT, 1), max(self.image_size, _SMALLEST_PX)
        belt = Belt(
            (round(4 / 3 * side), side),
            seed=seed,
            materials=self.materials,
            defects=self.defects,
            # Two parts are in view, and both have to be good.
            good_share=self.good_share**0.5,
            max_defects=self.max_defects,
        )
        picture = belt.frame(int(rng.integers(1000)))
        image = picture.image if shift is None else under_shift(picture.image, rng, shift)
        return as_view(Picture(image, picture.truth), self.image_size)


@dataclass(frozen=True)
class AnyDefect:
    """A world in which all defects are one type, for methods that know no types."""

    NAMES = (NORMAL, "damaged")

    world: World

    @property
    def names(self) -> tuple[str, ...]:
        """Normal, and everything else."""
        return self.NAMES

    @property
    def identity(self) -> str:
        """As `Pictures.identity`."""
        return f"{self.world.identity} as one type"

    @property
    def kinds(self) -> None:
        """As `Pictures.kinds`."""
        return None

    def title(self, index: int) -> str:
        """As `Pictures.title`."""
        return self.world.title(index)

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> View:
        view = self.world[index]
        return View(view.image, (view.types > 0).astype(np.uint8))


def world_view(
    seed: int,
    image_size: int,
    materials: Sequence[str],
    defects: Sequence[str],
    *,
    good_share: float = 0.3,
    max_defects: int = 1,
    shift: str | None = None,
) -> WorldView:
    """Picture `seed` of the world, a surface or a part, drawn at a camera's size and resized to `image_size`."""
    rng = stream(seed, _VIEW)
    wide, tall = _CAMERAS[int(rng.choice(len(_CAMERAS), p=_CAMERA_SHARES))]
    # Drawn at a model's usual input or above: a coarser training phase is to see a smaller picture, not a coarser one.
    base = max(image_size, _SMALLEST_PX)
    surface = make_surface(
        seed,
        (round(wide * base), round(tall * base)),
        materials=materials,
        defects=defects,
        good_share=good_share,
        max_defects=max_defects,
        framing="part" if rng.random() < _PART_SHARE else "surface",
        shift=shift,
    )
    view = as_view(surface, image_size)
    return WorldView(view.image, view.types, surface.material, surface.caption)


def as_view(picture: Picture | View, image_size: int) -> View:
    """A picture at the model's input size; its types are taken from the nearest pixel, and none of them gets lost."""
    if isinstance(picture, View) and picture.types.shape == (image_size, image_size):
        return picture
    return View(resize_view(picture.image, image_size), types_at(picture.types, (image_size, image_size)))


class ViewStore:
    """Views of a set by index, prepared once and kept where they fit into memory."""

    def __init__(self, pictures: Pictures, image_size: int, workers: int = 2) -> None:
        self.names = pictures.names
        self.image_size = image_size
        self.identity = pictures.identity
        self.kinds = pictures.kinds
        self.title = pictures.title
        self._pictures = pictures
        self._pool = ThreadPoolExecutor(workers)
        self._fits = len(pictures) * image_size**2 * 4 <= _MEMORY_BYTES
        self._kept: dict[int, View] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    def fetch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images [B, S, S, 3] BGR and types [B, S, S]. Raises what reading a picture raises."""
        views = list(self._pool.map(self._view, indices))
        return np.stack([view.image for view in views]), np.stack([view.types for view in views])

    def _view(self, index: int) -> View:
        if index in self._kept:
            return self._kept[index]
        view = as_view(self._pictures[index], self.image_size)
        if self._fits:
            self._kept[index] = view
        return view
