"""The numbers that turn patch tokens into a defect map, and the tap tables that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapo_edge.kernels import resample

ScoreRule = Literal["image", "max", "top"]  # image embedding, highest pixel, mean of the highest 1 %
MapSize = Literal["model", "frame"] | tuple[int, int]  # the encoder's, the frame's, or (width, height) in px


@dataclass(frozen=True)
class MapSpec:
    """Fixed at build time; equal for every backend that runs the package."""

    image_size: int  # side of the encoder's square input, px
    grid: tuple[int, int]  # patch rows, patch columns
    temperature: float
    align_corners: bool  # how patch probabilities are upsampled
    smoothing_px: float  # Gaussian sigma at the encoder's image size; scales with the map
    score: ScoreRule

    def tables(self, size: tuple[int, int]) -> tuple[resample.TapTable, resample.TapTable]:
        """Row and column tables for a map of `size` = (width, height) in px."""
        width, height = size
        return self._table(self.grid[0], height), self._table(self.grid[1], width)

    def _table(self, patches: int, pixels: int) -> resample.TapTable:
        sigma = self.smoothing_px * pixels / self.image_size
        return resample.upsample(patches, pixels, align_corners=self.align_corners, sigma=sigma)
