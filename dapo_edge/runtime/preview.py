"""What is looked at, drawn over a frame: regions of interest and tiles, before a run is started with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import OutputError
from dapo_edge.extras import require
from dapo_edge.outputs.labels import BLACK, WHITE, Colour, Image, Label, ink, place, text_size, write
from dapo_edge.outputs.palette import type_colour
from dapo_edge.outputs.sheet import checked
from dapo_edge.runtime.regions import inside_polygon
from dapo_edge.runtime.tiling import Plan
from dapo_edge.structures import Box

LONGEST_PX = 1280  # side of the picture: lines keep their width on a screen, however large the camera's frames are
DIMMED = 0.3  # brightness of what nobody looks at
TINT = 0.25  # of a region's colour, over tiles that overlap


def draw_views(image: NDArray[np.uint8], plan: Plan) -> Image:
    """Regions of interest and numbered tiles over a frame [H, W, 3] BGR; [h, w, 3], at most `LONGEST_PX` a side.

    The rest is dimmed, overlaps of tiles are tinted. Numbers count as the encoder sees the tiles, from 1. Raises
    `OutputError` for a frame of another size than the plan's.
    """
    cv2 = require("cv2")
    height, width = checked(image).shape[:2]
    if (width, height) != plan.frame_size:
        expected = "x".join(map(str, plan.frame_size))
        raise OutputError(f"the frame is {width}x{height}, the plan is for {expected}", "Draw the frame it is made for")
    scale = min(1.0, LONGEST_PX / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shown = _dimmed(cv2.resize(image, size, interpolation=cv2.INTER_AREA), plan, scale)
    first = 1
    for number, grid in enumerate(plan.grids):
        boxes = [_scaled(box, scale) for box, used in zip(grid.boxes, grid.used, strict=True) if used]
        _draw_tiles(shown, boxes, type_colour(number + 1), first)
        first += len(boxes)
    for number, grid in enumerate(plan.grids):
        outline = np.round(np.array(grid.region.corners) * scale).astype(np.int32)
        for colour, thickness in ((BLACK, 5), (type_colour(number + 1), 3)):
            cv2.polylines(shown, [outline], True, colour, thickness, cv2.LINE_AA)
    place(shown, tuple(_label(plan, number, scale) for number in range(len(plan.grids))))
    return shown


def _dimmed(image: Image, plan: Plan, scale: float) -> Image:
    """The picture, dark outside of the regions."""
    height, width = image.shape[:2]
    looked_at = np.zeros((height, width), np.bool_)
    for grid in plan.grids:
        looked_at |= inside_polygon([(x * scale, y * scale) for x, y in grid.region.corners], width, height)
    return np.where(looked_at[..., None], image, (image * DIMMED).astype(np.uint8))


def _draw_tiles(image: Image, boxes: list[Box], colour: Colour, first: int) -> None:
    """Outlines, tinted overlaps and numbers. Changes `image`."""
    if len(boxes) == 1:
        return  # it is the region itself
    cv2 = require("cv2")
    count = np.zeros(image.shape[:2], np.uint16)
    for x, y, width, height in boxes:
        count[y : y + height, x : x + width] += 1
    shared = count > 1
    image[shared] = ((1 - TINT) * image[shared] + TINT * np.array(colour)).astype(np.uint8)
    for x, y, width, height in boxes:
        cv2.rectangle(image, (x, y), (x + width - 1, y + height - 1), colour, 1)
    for number, box in enumerate(boxes, first):
        _write_number(image, str(number), box)


def _write_number(image: Image, text: str, box: Box) -> None:
    """In the middle of a tile, where no other tile's number is; left out of a tile that is smaller than it."""
    size = text_size(*image.shape[:2])
    cover = ink(text, size)
    height, width = cover.shape[0], cover.shape[1] + size // 2
    left, top = box[0] + (box[2] - width) // 2, box[1] + (box[3] - height) // 2
    if width < box[2] and height < box[3]:
        image[top : top + height, left : left + width] = BLACK
        write(image, text, left + size // 4, top, size, WHITE)


def _label(plan: Plan, number: int, scale: float) -> Label:
    grid = plan.grids[number]
    whole = grid.box == (0, 0, *plan.frame_size)
    name = grid.region.name or ("the frame" if whole else f"region {number + 1}")
    tiles = int(np.count_nonzero(grid.used))
    text = f"{name}: {tiles} tiles of {grid.boxes[0][2]} x {grid.boxes[0][3]} px" if tiles > 1 else name
    return Label(text, type_colour(number + 1), _scaled(grid.box, scale))


def _scaled(box: Box, scale: float) -> Box:
    x, y, width, height = box
    left, top = round(x * scale), round(y * scale)
    return left, top, max(1, round((x + width) * scale) - left), max(1, round((y + height) * scale) - top)
