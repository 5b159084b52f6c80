"""What was found, drawn over the frame: heat, contours, labels and the verdict."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import OutputError
from dapo_edge.extras import require
from dapo_edge.outputs.labels import Image, Label, contrast, fitted, ink, place, text_size, write
from dapo_edge.outputs.palette import (
    CAPTION_COLOUR,
    HEAT_FROM,
    NO_TYPE_COLOUR,
    STRIP_COLOUR,
    VERDICT_COLOURS,
    heat_table,
    type_colour,
)
from dapo_edge.outputs.recorder import Recorder, save_picture
from dapo_edge.outputs.sheet import checked, contact_sheet
from dapo_edge.structures import Frame, Inspection, Region

__all__ = ["Recorder", "banner_height", "contact_sheet", "draw", "save_picture"]

HIGHEST_START = 0.98  # a threshold above it would leave no room for shades
HALO = (0, 0, 0)  # under every contour, so that it shows on light and dark parts alike


def draw(frame: Frame | Image, inspection: Inspection, *, banner: bool = True) -> Image:
    """The frame with heat, contours and labels, [H, W, 3] uint8 BGR; the frame itself is left as it is.

    The verdict stands in a strip added on top, so that it hides nothing: H grows by `banner_height(H, W)`, an even
    number. `banner=False` leaves the size alone.
    """
    image = checked(frame.image if isinstance(frame, Frame) else frame)
    height, width = image.shape[:2]
    if inspection.frame_size != (width, height):
        expected = "x".join(map(str, inspection.frame_size))
        cause = f"the frame is {width}x{height}, its inspection belongs to one of {expected}"
        raise OutputError(cause, "Pass the frame that was inspected")
    shown = _heated(image, inspection)
    _outline(shown, inspection)
    place(shown, tuple(_label(region, inspection) for region in inspection.regions))
    return np.concatenate([_strip(inspection, height, width), shown]) if banner else shown


def banner_height(height: int, width: int) -> int:
    """Pixels that `draw` adds on top. Even, because video encoders want even sizes."""
    return 2 * round(1.1 * text_size(height, width))


@lru_cache(maxsize=1)
def _heat() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return heat_table()


def _heated(image: Image, inspection: Inspection) -> Image:
    """The picture under a layer whose opacity follows the anomaly above the threshold; good areas stay clear."""
    cv2 = require("cv2")
    height, width = image.shape[:2]
    start = min(HEAT_FROM if inspection.pixel_threshold is None else inspection.pixel_threshold, HIGHEST_START)
    anomaly = np.clip(np.nan_to_num(inspection.anomaly_map), start, 1)
    levels = np.round((anomaly - start) / (1 - start) * 255).astype(np.uint8)
    levels = cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR)
    levels = cv2.merge([levels, levels, levels])
    layer, keep = _heat()
    shown: Image = cv2.multiply(image, cv2.LUT(levels, keep), scale=1 / 255)
    return cv2.add(shown, cv2.LUT(levels, layer))


def _outline(image: Image, inspection: Inspection) -> None:
    """Draw each region's contour, or its box where the map does not show it. Changes `image`."""
    cv2 = require("cv2")
    height, width = image.shape[:2]
    thickness = max(2, round(min(height, width) / 360))
    masks: dict[int, NDArray[np.bool_]] = {}
    for region in inspection.regions:
        index = _type_index(region, inspection)
        if index not in masks:
            masks[index] = _enlarged(_defective(inspection, index), width, height)
        x, y, w, h = _inside(region, width, height)
        inner = masks[index][y : y + h, x : x + w]
        if not inner.any():
            inner = np.ones((h, w), np.bool_)
        contours, _ = cv2.findContours(inner.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(x, y))
        for colour, extra in ((HALO, 2), (type_colour(index), 0)):
            cv2.drawContours(image, contours, -1, colour, thickness + extra, cv2.LINE_AA)


def _defective(inspection: Inspection, index: int) -> NDArray[np.bool_]:
    """The map's pixels that belong to a region of type `index`, as far as is known, [H, W] bool."""
    if inspection.pixel_threshold is not None:
        above: NDArray[np.bool_] = inspection.anomaly_map > inspection.pixel_threshold
        return above
    return (inspection.type_map == index) & (index > 0)


def _enlarged(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    """`mask` at the frame's size, [height, width] bool."""
    cv2 = require("cv2")
    cover = cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR)
    # Averaged over one pixel of the map and cut at one half, edges are smooth instead of stairs.
    pixel = max(1, round(width / mask.shape[1])), max(1, round(height / mask.shape[0]))
    return cv2.blur(cover, pixel) > 127


def _inside(region: Region, width: int, height: int) -> tuple[int, int, int, int]:
    """The region's box, cut to the picture; at least one pixel."""
    x, y, w, h = region.box
    left, top = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    return left, top, max(1, min(x + w, width) - left), max(1, min(y + h, height) - top)


def _type_index(region: Region, inspection: Inspection) -> int:
    return inspection.types.index(region.type) if region.type in inspection.types else 0


def _label(region: Region, inspection: Inspection) -> Label:
    index = _type_index(region, inspection)
    colour = type_colour(index) if index else NO_TYPE_COLOUR
    return Label(f"{region.type} {percent(region.score)}", colour, region.box)


def percent(share: float) -> str:
    """`87 %`."""
    return f"{100 * share:.0f} %"


def _strip(inspection: Inspection, height: int, width: int) -> Image:
    """The verdict's strip, [banner_height, W, 3]: what was decided, the score, what was found, and how long it took."""
    strip = np.full((banner_height(height, width), width, 3), STRIP_COLOUR, np.uint8)
    size = text_size(height, width)
    gap = size // 2 + 2
    colour = VERDICT_COLOURS[inspection.verdict]
    verdict = ink(inspection.verdict.upper(), size)
    top = (strip.shape[0] - verdict.shape[0]) // 2
    badge = min(width, verdict.shape[1] + 2 * gap)
    strip[:, :badge] = colour
    write(strip, inspection.verdict.upper(), gap, top, size, contrast(colour))

    timing = f"{inspection.ms['total']:.1f} ms" if "total" in inspection.ms else ""
    right = width - gap - ink(timing, size).shape[1]
    if right > badge + gap:
        write(strip, timing, right, top, size, CAPTION_COLOUR)
    count = len(inspection.regions)
    found = f"   {count} region{'s' if count > 1 else ''}" if count else ""
    text = fitted(f"score {inspection.score:.3f}{found}", size, right - badge - 2 * gap)
    write(strip, text, badge + gap, top, size, CAPTION_COLOUR)
    return strip
