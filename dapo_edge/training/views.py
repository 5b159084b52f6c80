"""How training looks at the generated world: surfaces and parts at cameras' sizes, through the line's own resize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.host import resize_view
from dapo_edge.data.captions import Caption
from dapo_edge.data.surfaces import make_surface, stream

# Camera pictures in multiples of the model's input: as it is, wider (a 4:3 camera), and finer.
_CAMERAS = ((1.0, 1.0), (4 / 3, 1.0), (1.5, 1.5))
_CAMERA_SHARES = (0.4, 0.4, 0.2)
_PART_SHARE = 0.4
_VIEW = 99  # a random stream that no picture uses


@dataclass(frozen=True, eq=False)
class WorldView:
    """A picture of the world at the model's input size."""

    image: NDArray[np.uint8]  # [S, S, 3] BGR
    material: str
    caption: Caption


def world_view(
    seed: int,
    image_size: int,
    materials: Sequence[str],
    defects: Sequence[str],
    *,
    good_share: float = 0.3,
    max_defects: int = 1,
) -> WorldView:
    """Picture `seed` of the world, drawn at a camera's size and resized to `image_size`."""
    rng = stream(seed, _VIEW)
    wide, tall = _CAMERAS[int(rng.choice(len(_CAMERAS), p=_CAMERA_SHARES))]
    # Drawn at a model's usual input or above: a coarser training phase is to see a smaller picture, not a coarser one.
    base = max(image_size, 128)
    surface = make_surface(
        seed,
        (round(wide * base), round(tall * base)),
        materials=materials,
        defects=defects,
        good_share=good_share,
        max_defects=max_defects,
        framing="part" if rng.random() < _PART_SHARE else "surface",
    )
    return WorldView(resize_view(surface.image, image_size), surface.material, surface.caption)
