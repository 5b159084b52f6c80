"""Where a frame is looked at: regions of interest, cut into overlapping tiles, and how the tiles' maps become one.

Tiles are laid out in pixels of the map, and what is cut out of the frame follows from that: so the maps of neighbours
lie on one grid, and one pair of banded tables per region makes its map from all of its tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import View
from dapo_edge.errors import RecipeError
from dapo_edge.kernels.map_spec import MapSize, MapSpec
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import TapTable
from dapo_edge.runtime.regions import RegionOfInterest, inside_polygon
from dapo_edge.structures import MIN_SIDE_PX, Box

MAX_TILES = 1024  # of one frame: each is a view of its own for the encoder
_SMOOTHED_SIGMAS = 4  # how far `resample.gaussian` reaches
_ROUNDING_PX = 1e-6


@dataclass(frozen=True)
class Views:
    """The parts of each frame that are inspected. Raises `RecipeError` for what can't be on any frame.

    Whatever lies outside the regions is good by definition. Tiles let small defects be seen in large frames; each one
    is as much work as a whole frame.
    """

    regions: tuple[RegionOfInterest, ...] = ()  # none: the whole frame
    tile: tuple[int, int] | None = None  # width, height in pixels of the frame; None: each region at once
    overlap: int = 0  # of neighbouring tiles, px; over it one map passes into the next

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", tuple(self.regions))
        if not all(isinstance(region, RegionOfInterest) for region in self.regions):
            raise RecipeError("views are made of regions of interest", "Make each by RegionOfInterest.of(shape)")
        if type(self.overlap) is not int or self.overlap < 0:
            raise RecipeError(f"an overlap of {self.overlap!r:.40} is impossible", "Use 0 or more whole pixels")
        if self.tile is not None:
            self._check_tile(self.tile)
        elif self.overlap:
            raise RecipeError("there is an overlap, but no tile size", "Give the tile's width and height, too")

    def _check_tile(self, tile: tuple[int, int]) -> None:
        is_pair = isinstance(tile, (tuple, list)) and len(tile) == 2
        if not is_pair or any(type(side) is not int or side < MIN_SIDE_PX for side in tile):
            raise RecipeError(
                f"{tile!r:.60} is no tile size", f"Use (width, height) in whole pixels, {MIN_SIDE_PX} or more"
            )
        object.__setattr__(self, "tile", (tile[0], tile[1]))
        if self.overlap >= min(tile):
            raise RecipeError(
                f"tiles of {tile[0]} x {tile[1]} px are not larger than their overlap of {self.overlap} px",
                "Use larger tiles, or an overlap of a tenth to a quarter of the tile",
            )

    @property
    def whole_frame(self) -> bool:
        """Whether nothing is left out or cut up."""
        return not self.regions and self.tile is None

    @property
    def warning(self) -> str | None:
        """What to tell before the first frame; None when there is nothing."""
        if self.whole_frame:
            return None
        parts = "tiles" if self.tile else "regions of interest"
        return (
            f"thresholds hold for pictures like those that they were made from: those of whole frames do not hold for "
            f"{parts}, which show the same defect larger. A frame's score is the highest of its {parts}"
        )

    def check(self, width: int, height: int) -> None:
        """Raise `RecipeError` if a region leaves a frame of `width` x `height` px."""
        for region in self.regions:
            x, y, across, down = region.box
            if x + across > width or y + down > height:
                raise RecipeError(
                    f"{region} reaches to ({x + across}, {y + down}), outside of the frame of {width} x {height} px",
                    "Make it smaller, or set the camera to the size that the region was drawn for",
                )


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one region, in rows and columns, and how their patches side by side become its part of the map."""

    region: RegionOfInterest
    box: Box  # of the region, px of the frame
    window: Box  # what it fills of the map, px of the map
    shape: tuple[int, int]  # rows, columns of tiles
    boxes: tuple[Box, ...]  # of each tile, row by row, px of the frame
    windows: tuple[Box, ...]  # of each tile, px of the map, within `window`
    used: NDArray[np.bool_]  # [tiles]: False for those that nothing inside the polygon depends on
    rows: TapTable  # from rows · h patches to the window's height
    columns: TapTable  # from columns · w patches to the window's width
    inside: NDArray[np.bool_] | None  # [height, width] of the window; None: all of it

    def side_by_side(self, probs: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Patch probabilities of the used tiles, `[K+1, h, w]` each, in place: `[K+1, rows · h, columns · w]`."""
        channels, h, w = probs[0].shape
        every = np.zeros((len(self.boxes), channels, h, w), np.float32)
        every[self.used] = probs
        rows, columns = self.shape
        grid = every.reshape(rows, columns, channels, h, w).transpose(2, 0, 3, 1, 4)
        return grid.reshape(channels, rows * h, columns * w)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is cut out of each frame of one size, and the map that it makes."""

    frame_size: tuple[int, int]  # width, height
    map_size: tuple[int, int]  # width, height of the frame's map
    grids: tuple[TileGrid, ...]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What the encoder looks at, px of the frame: the used tiles, grid by grid."""
        return tuple(box for grid in self.grids for box, used in zip(grid.boxes, grid.used, strict=True) if used)

    def cut(self, view: View) -> list[View]:
        """The parts of one frame, in the order of `boxes`. No pixel is copied, but for NV12, which has two planes."""
        if isinstance(view, np.ndarray):
            return [view[y : y + height, x : x + width] for x, y, width, height in self.boxes]
        return [_cropped(view, box) for box in self.boxes]


@lru_cache(maxsize=128)  # more cameras with regions of their own than one machine has
def plan(views: Views, frame_size: tuple[int, int], spec: MapSpec, map_size: MapSize) -> Plan:
    """How frames of (width, height) px are looked at; made once per size.

    With a `map_size` of "model" a tile is shown at the encoder's size, or its own where that is smaller. Raises
    `RecipeError` where the views do not fit the frame.
    """
    views.check(*frame_size)
    regions = views.regions or (RegionOfInterest.of((0, 0, *frame_size)),)
    size = _map_pixels(views, regions, frame_size, spec, map_size)
    count = sum(_count(views, region, frame_size, size) for region in regions)
    if count > MAX_TILES:
        raise RecipeError(
            f"{count} tiles would be cut out of a frame of {frame_size[0]} x {frame_size[1]} px",
            f"Use larger tiles or a smaller overlap: {MAX_TILES} at most",
        )
    return Plan(frame_size, size, tuple(_grid(views, region, frame_size, size, spec) for region in regions))


@dataclass(frozen=True)
class _Axis:
    """One axis of a region: its tiles in pixels of the frame and of the map."""

    start: int  # of the region, px of the frame
    length: int
    map_start: int  # of the region, px of the map
    map_length: int
    tile: int  # px of the map
    tile_starts: tuple[int, ...]  # px of the map, from the region's start

    def cuts(self) -> list[tuple[int, int]]:
        """Start and length of each tile, px of the frame. Lengths are equal, because a GPU has a graph for each."""
        scale = self.length / self.map_length
        # Never too short, or a pixel between two tiles is seen by neither; the rest is float rounding.
        length = max(1, int(np.ceil(self.tile * scale - _ROUNDING_PX)))
        return [(self.start + min(round(start * scale), self.length - length), length) for start in self.tile_starts]


def _axis(views: Views, region: RegionOfInterest, axis: int, frame: int, pixels: int) -> _Axis:
    """Lay out one axis (0: x) of a region on a frame of `frame` px whose map has `pixels`."""
    scale = pixels / frame
    start, length = region.box[axis], region.box[2 + axis]
    map_start = min(round(start * scale), pixels - 1)
    map_length = max(1, round((start + length) * scale) - map_start)
    tile: int = map_length
    starts: tuple[int, ...] = (0,)
    if views.tile is not None and views.tile[axis] < length:
        tile, starts = _tiles_along(views.tile[axis], views.overlap, length, scale, map_length)
    return _Axis(start, length, map_start, map_length, tile, starts)


def _tiles_along(side: int, overlap: int, length: int, scale: float, map_length: int) -> tuple[int, tuple[int, ...]]:
    """Length and starts, px of the map, of the tiles along an axis; `side`, `overlap`, `length` are px of the frame."""
    step = side - overlap
    # Counted in pixels of the frame: rounding to those of the map must not add a tile.
    regular = [round(number * step * scale) for number in range(-(-(length - side) // step))]
    gaps = [*np.diff(regular), -(-(map_length - regular[-1]) // 2)]  # which rounding must not leave either
    tile = min(map_length, max(1, round(side * scale), *map(int, gaps)))
    # The last tile ends at the region's edge and overlaps its neighbour by more.
    return tile, tuple(sorted({start for start in regular if start + tile < map_length} | {map_length - tile}))


def _map_pixels(
    views: Views,
    regions: tuple[RegionOfInterest, ...],
    frame_size: tuple[int, int],
    spec: MapSpec,
    map_size: MapSize,
) -> tuple[int, int]:
    """Width and height of the frame's map."""
    if map_size == "frame":
        return frame_size
    if map_size != "model":
        return map_size[0], map_size[1]
    sides = []
    for axis, frame in enumerate(frame_size):
        smallest = min(region.box[2 + axis] for region in regions)
        looked_at = min(smallest, views.tile[axis]) if views.tile else smallest
        sides.append(min(frame, round(frame * spec.image_size / looked_at)))
    return sides[0], sides[1]


def _axes(views: Views, region: RegionOfInterest, frame: tuple[int, int], size: tuple[int, int]) -> tuple[_Axis, _Axis]:
    return _axis(views, region, 0, frame[0], size[0]), _axis(views, region, 1, frame[1], size[1])


def _count(views: Views, region: RegionOfInterest, frame: tuple[int, int], size: tuple[int, int]) -> int:
    across, down = _axes(views, region, frame, size)
    return len(across.tile_starts) * len(down.tile_starts)


def _grid(
    views: Views, region: RegionOfInterest, frame: tuple[int, int], size: tuple[int, int], spec: MapSpec
) -> TileGrid:
    across, down = _axes(views, region, frame, size)
    window = (across.map_start, down.map_start, across.map_length, down.map_length)
    rows, columns = spec.tiled_tables(window[2:], (across.tile, down.tile), across.tile_starts, down.tile_starts)
    windows = tuple((x, y, across.tile, down.tile) for y in down.tile_starts for x in across.tile_starts)
    inside = None
    if not region.is_rectangle:
        inside = _inside(region, window, (size[0] / frame[0], size[1] / frame[1]))
    reach = [
        int(np.ceil(_SMOOTHED_SIGMAS * spec.smoothing_px * axis.tile / spec.image_size)) for axis in (across, down)
    ]
    return TileGrid(
        region=region,
        box=region.box,
        window=window,
        shape=(len(down.tile_starts), len(across.tile_starts)),
        boxes=tuple((x, y, width, height) for y, height in down.cuts() for x, width in across.cuts()),
        windows=windows,
        used=np.array([inside is None or _touches(inside, box, (reach[0], reach[1])) for box in windows]),
        rows=rows,
        columns=columns,
        inside=inside,
    )


def _inside(region: RegionOfInterest, window: Box, scale: tuple[float, float]) -> NDArray[np.bool_]:
    """Pixels of the map in a region, at least one of them, [height, width] bool of its window."""
    left, top, width, height = window
    corners = [(x * scale[0] - left, y * scale[1] - top) for x, y in region.corners]
    inside = inside_polygon(corners, width, height)
    if not inside.any():
        raise RecipeError(
            f"{region} is smaller than a pixel of the map", "Use a larger map: a map size of 'frame' shows all of it"
        )
    return inside


def _touches(inside: NDArray[np.bool_], box: Box, reach: tuple[int, int]) -> bool:
    """Whether any pixel inside takes part of its value from a tile, be it through smoothing."""
    x, y, width, height = box
    rows = slice(max(0, y - reach[1]), y + height + reach[1])
    return bool(inside[rows, max(0, x - reach[0]) : x + width + reach[0]].any())


def _cropped(view: PixelView, box: Box) -> PixelView:
    """A part of a camera's own bytes, and no more of them than it needs: what follows may convert all it is given."""
    x, y, width, height = box
    left, top = view.window[:2]
    return replace(view, crop=(left + x, top + y, width, height)).trimmed()
