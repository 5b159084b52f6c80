"""The frames that a build looks at: a folder of the line's own pictures, or generated surfaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dapo_edge.backends.base import View
from dapo_edge.errors import RecipeError

SYNTHETIC_SIZE = (640, 480)


def build_frames(origin: str, count: int, *, good_only: bool, seed: int) -> list[View]:
    """At most `count` BGR views from a folder, or exactly `count` generated ones. Raises `RecipeError` for none."""
    if origin != "synthetic":
        return list(_from_folder(Path(origin), count))
    from dapo_edge.data.surfaces import make_surface

    good_share = 1.0 if good_only else 0.5
    return [make_surface(seed + index, SYNTHETIC_SIZE, good_share=good_share).image for index in range(count)]


def _from_folder(folder: Path, count: int) -> Iterator[View]:
    from dapo_edge.runtime.sources import open_source

    if not folder.is_dir():
        raise RecipeError(f"the folder of frames '{folder}' does not exist", "Check 'frames' in the recipe")
    with open_source(folder) as source:
        for _ in range(count):
            frame = source.read()
            if frame is None:
                return
            yield frame.image
