"""The numbers that turn patch tokens into a defect map, and the tap tables that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapo_edge.errors import RecipeError
from dapo_edge.kernels import resample

ScoreRule = Literal["image", "max", "top"]  # image embedding, highest pixel, mean of the highest 1 %
MapSize = Literal["model", "frame"] | tuple[int, int]  # the encoder's, the frame's, or (width, height) in px


MAX_MAP_SIDE_PX = 16384


def check_map_size(size: object) -> None:
    """Raise `RecipeError` for what is no map size."""
    if isinstance(size, str) and size in ("model", "frame"):
        return
    if (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(type(side) is int and 1 <= side <= MAX_MAP_SIDE_PX for side in size)
    ):
        return
    raise RecipeError(
        f"{size!r:.60} is not a map size",
        f"Use 'model', 'frame' or (width, height) with sides from 1 to {MAX_MAP_SIDE_PX}",
    )


@dataclass(frozen=True)
class MapSpec:
    """Fixed at build time; equal for every backend that runs the package."""

    image_size: int  # side of the encoder's square input, px
    grid: tuple[int, int]  # patch rows, patch columns
    temperature: float
    align_corners: bool  # how patch probabilities are upsampled
    smoothing_px: float  # Gaussian sigma at the encoder's image size; scales with the map
    score: ScoreRule

    def __post_init__(self) -> None:
        if min(self.image_size, *self.grid) < 1 or not 0 < self.temperature < 1e3 or not 0 <= self.smoothing_px < 1e3:
            raise ValueError(f"impossible numbers: {self}")

    def tables(self, size: tuple[int, int]) -> tuple[resample.TapTable, resample.TapTable]:
        """Row and column tables for a map of `size` = (width, height) in px."""
        width, height = size
        return self._table(self.grid[0], height), self._table(self.grid[1], width)

    def tiled_tables(
        self, size: tuple[int, int], tile: tuple[int, int], lefts: tuple[int, ...], tops: tuple[int, ...]
    ) -> tuple[resample.TapTable, resample.TapTable]:
        """Row and column tables for a map that overlapping tiles make, from their patches side by side.

        `size` and `tile` are (width, height), `lefts` and `tops` where the tiles begin, all in px of the map. Smoothing
        follows the blending, so that it does not stop at a tile's border.
        """
        (width, height), (tile_width, tile_height) = size, tile
        rows = self._tiled_table(self.grid[0], tile_height, tops, height)
        return rows, self._tiled_table(self.grid[1], tile_width, lefts, width)

    def _tiled_table(self, patches: int, tile: int, starts: tuple[int, ...], pixels: int) -> resample.TapTable:
        if len(starts) == 1:
            return self._table(patches, pixels)
        # Each patch at its own centre: with aligned corners, two tiles would show one place up to a patch apart.
        piece = resample.bilinear(patches, tile, align_corners=False)
        sigma = self.smoothing_px * tile / self.image_size
        return resample.gaussian(pixels, sigma) @ resample.blend(piece, starts, pixels)

    def _table(self, patches: int, pixels: int) -> resample.TapTable:
        sigma = self.smoothing_px * pixels / self.image_size
        return resample.upsample(patches, pixels, align_corners=self.align_corners, sigma=sigma)
