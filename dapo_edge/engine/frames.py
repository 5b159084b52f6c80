"""The frames that a build looks at: a folder of the line's own pictures, or generated surfaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dapo_edge.backends.base import View
from dapo_edge.errors import RecipeError
from dapo_edge.structures import Picture

SYNTHETIC_SIZE = (640, 480)
VIEWS_PER_PART = 3  # of a belt: on its way in, in the middle, on its way out

T = TypeVar("T")


@dataclass(frozen=True)
class BuildFrames:
    """A known number of BGR views, made or read one at a time: hundreds of camera frames do not fit into memory."""

    count: int
    load: Callable[[int], View]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[View]:
        return (self.load(index) for index in range(self.count))


def build_frames(origin: str, count: int, *, good_only: bool, seed: int) -> BuildFrames:
    """At most `count` views spread evenly over a folder, or exactly `count` generated ones.

    `origin` is a folder, "synthetic", or the address of a synthetic belt. Raises `RecipeError` for a folder that is not
    there and `SourceError` for one without images or an address that can't be drawn.
    """
    draw = generated(origin, good_only=good_only, seed=seed)
    if draw is not None:
        return BuildFrames(count, lambda index: draw(index).image)
    from dapo_edge.data.pictures import read_image

    paths = spread(images_below(origin), count)
    return BuildFrames(len(paths), lambda index: read_image(paths[index]))


def generated(origin: str, *, good_only: bool, seed: int, belt_from: int = 0) -> Callable[[int], Picture] | None:
    """What draws picture 0, 1, 2 ... of "synthetic", from world number `seed` on, or of a synthetic belt's address.

    A belt has its seed in its address, and its pictures begin at view `belt_from`. None for any other origin. Raises
    `SourceError` for an address that can't be drawn.
    """
    if origin == "synthetic":
        from dapo_edge.data.surfaces import Framing, make_surface

        def draw(index: int) -> Picture:
            # Surfaces fill the frame, parts lie on the belt: a line may look at either.
            framing: Framing = "part" if index % 2 else "surface"
            share = 1.0 if good_only else 0.5
            return make_surface(seed + index, SYNTHETIC_SIZE, good_share=share, framing=framing)

        return draw
    if origin.startswith("synthetic://"):
        from dapo_edge.runtime.sources.synthetic import SyntheticSource

        belt = SyntheticSource(origin).belt(good=1.0 if good_only else None)
        apart = max(1, round(min(belt.size) / (VIEWS_PER_PART * belt.step_px)))
        return lambda index: belt.frame(apart * (belt_from + index))
    return None


def images_below(origin: str) -> list[Path]:
    """The images directly inside a folder. Raises `RecipeError` without a folder, `SourceError` without images."""
    from dapo_edge.runtime.sources.stills import images_in

    folder = Path(origin)
    if not folder.is_dir():
        raise RecipeError(f"the folder of frames '{folder}' does not exist", "Check 'frames' in the recipe")
    return images_in(folder)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of some items, evenly spread over them and in their order."""
    taken = min(count, len(items))
    return [items[index * len(items) // taken] for index in range(taken)]
