"""The maps of a frame's tiles become one map of the frame, with its scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.kernels import reference
from dapo_edge.kernels.blas import one_thread
from dapo_edge.runtime.decide import MapPart
from dapo_edge.runtime.tiling import Plan, TileGrid


@dataclass(frozen=True, eq=False)
class TileResult:
    """What the engine made of one tile."""

    probs: NDArray[np.float32]  # [K+1, h, w]
    image_score: float


@dataclass(frozen=True, eq=False)
class FrameMap:
    """One frame's map and scores."""

    anomaly: NDArray[np.float32]  # [H, W] in [0, 1]; exactly 0 where nobody looks
    types: NDArray[np.uint8]  # [H, W]
    type_scores: NDArray[np.float32]  # [K] in [0, 1]: highest probability of each type inside the regions
    score: float
    parts: tuple[MapPart, ...]  # what the map is made of, for the types of what is found on it


def stitch(plan: Plan, tiles: Sequence[TileResult], rule: str) -> FrameMap:
    """Tiles in the order of `plan.boxes` to one map. Where regions of interest overlap, the higher anomaly counts.

    Score rules: `image` is the highest image score of the tiles, `max` the highest pixel of the map, `top` the highest
    of the tiles' means over the highest 1 % of their pixels. None of them looks outside of the regions.
    """
    with one_thread():
        pieces = [_piece(grid, own, rule) for grid, own in _by_grid(plan, tiles)]
        if len(pieces) == 1 and pieces[0].grid.window == (0, 0, *plan.map_size):
            anomaly, types = pieces[0].maps.anomaly[0], pieces[0].maps.types[0]
            parts: tuple[MapPart, ...] = (pieces[0].part(None),)
        else:
            anomaly, types, parts = _merged(plan, pieces)
    return FrameMap(
        anomaly=anomaly,
        types=types,
        type_scores=np.max([piece.maps.peaks[0, 1:] for piece in pieces], axis=0),
        score=float(np.max([piece.score for piece in pieces])),  # NaN if any is
        parts=parts,
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """What one region of interest adds to the map."""

    grid: TileGrid
    probs: NDArray[np.float32]  # [K+1, rows · h, columns · w]
    maps: reference.Maps  # of one image
    score: float

    def part(self, owned: NDArray[np.bool_] | None) -> MapPart:
        left, top = self.grid.window[:2]
        return MapPart(self.probs, self.grid.rows, self.grid.columns, (top, left), owned)


def _by_grid(plan: Plan, tiles: Sequence[TileResult]) -> Iterator[tuple[TileGrid, Sequence[TileResult]]]:
    start = 0
    for grid in plan.grids:
        end = start + int(np.count_nonzero(grid.used))
        yield grid, tiles[start:end]
        start = end


def _piece(grid: TileGrid, tiles: Sequence[TileResult], rule: str) -> _Piece:
    probs = grid.side_by_side([tile.probs for tile in tiles])
    maps = reference.defect_map(probs[None], grid.rows, grid.columns, grid.inside)
    return _Piece(grid, probs, maps, _score(rule, grid, tiles, maps.anomaly[0]))


def _score(rule: str, grid: TileGrid, tiles: Sequence[TileResult], anomaly: NDArray[np.float32]) -> float:
    if not all(np.isfinite(tile.probs).all() for tile in tiles):
        return math.nan  # which a maximum over regions could hide
    if rule == "max":
        return float(anomaly.max())
    scores = []
    windows = [window for window, used in zip(grid.windows, grid.used, strict=True) if used]
    for tile, (x, y, width, height) in zip(tiles, windows, strict=True):
        place = (slice(y, y + height), slice(x, x + width))
        pixels = anomaly[place] if grid.inside is None else anomaly[place][grid.inside[place]]
        if pixels.size:  # other tiles are there for smoothing alone
            scores.append(tile.image_score if rule == "image" else reference.top_mean(pixels))
    return float(np.max(scores))


def _merged(plan: Plan, pieces: Sequence[_Piece]) -> tuple[NDArray[np.float32], NDArray[np.uint8], tuple[MapPart, ...]]:
    """Anomaly and types [H, W] of the whole frame, and the parts with the pixels that are theirs."""
    width, height = plan.map_size
    anomaly = np.zeros((height, width), np.float32)
    types = np.zeros((height, width), np.uint8)
    owner = np.zeros((height, width), np.uint16)
    for number, piece in enumerate(pieces):
        place = _place(piece.grid)
        higher = piece.maps.anomaly[0] > anomaly[place]
        np.copyto(anomaly[place], piece.maps.anomaly[0], where=higher)
        np.copyto(types[place], piece.maps.types[0], where=higher)
        np.copyto(owner[place], np.uint16(number), where=higher)
    parts = tuple(piece.part(owner[_place(piece.grid)] == number) for number, piece in enumerate(pieces))
    return anomaly, types, parts


def _place(grid: TileGrid) -> tuple[slice, slice]:
    left, top, width, height = grid.window
    return slice(top, top + height), slice(left, left + width)
