"""From a defect map to regions and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.extras import require
from dapo_edge.kernels import reference
from dapo_edge.kernels.blas import one_thread
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.resample import TapTable
from dapo_edge.package import Thresholds
from dapo_edge.structures import Region, Verdict


def decide(score: float, highest_anomaly: float, thresholds: Thresholds) -> Verdict:
    """`ng` when image score and map both lie above their thresholds, `ok` when neither does.

    `unsure` when they contradict each other, and always while the package is not calibrated.
    """
    if thresholds.image is None or thresholds.pixel is None:
        return "unsure"
    above = (score > thresholds.image.value) + (highest_anomaly > thresholds.pixel.value)
    return ("ok", "unsure", "ng")[above]


@dataclass(frozen=True, eq=False)
class MapPart:
    """A rectangle of the map, and the patches it was made of."""

    probs: NDArray[np.float32]  # [K+1, h, w]
    rows: TapTable
    columns: TapTable
    origin: tuple[int, int] = (0, 0)  # row and column of the map where it begins
    owned: NDArray[np.bool_] | None = None  # the pixels that it gave to the map; None: all of its rectangle


def find_regions(
    anomaly: NDArray[np.float32],  # [H, W]
    patch_probs: NDArray[np.float32],  # [K+1, h, w]
    names: tuple[str, ...],
    spec: MapSpec,
    threshold: float,
    frame_size: tuple[int, int],
) -> tuple[Region, ...]:
    """Connected areas above `threshold`, most anomalous first, in pixels of a frame of (width, height).

    A region's type is the defect type with the highest mean probability over its pixels.
    """
    height, width = anomaly.shape
    return regions_of_parts(
        anomaly, (MapPart(patch_probs, *spec.tables((width, height))),), names, threshold, frame_size
    )


def regions_of_parts(
    anomaly: NDArray[np.float32],  # [H, W]
    parts: Sequence[MapPart],
    names: tuple[str, ...],
    threshold: float,
    frame_size: tuple[int, int],
) -> tuple[Region, ...]:
    """`find_regions` on a map that was made of several parts."""
    above = anomaly > threshold
    if not above.any():
        return ()
    with one_thread():
        regions = [_region(spot, anomaly, parts, names, frame_size) for spot in _spots(above)]
    return tuple(sorted(regions, key=lambda region: (-region.score, region.box[1], region.box[0])))


@dataclass(frozen=True, eq=False)
class _Spot:
    """One connected area: where its window of the map begins, and its pixels in there."""

    top: int
    left: int
    inside: NDArray[np.bool_]  # [h, w]


def _spots(above: NDArray[np.bool_]) -> Iterator[_Spot]:
    """The connected areas of a map [H, W] on which some pixel is True; pixels that touch at a corner belong together.

    Their windows are those of their outlines: the statistics that OpenCV makes with the labels take far longer than
    labels and outlines do, when areas are large.
    """
    cv2 = require("cv2")
    left, top, width, height = cv2.boundingRect(above.view(np.uint8))
    part = np.ascontiguousarray(above[top : top + height, left : left + width]).view(np.uint8)
    _, labels = cv2.connectedComponents(part, connectivity=8)
    outlines, hierarchy = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for outline, (_, _, _, around) in zip(outlines, hierarchy[0], strict=True):
        if around == -1:  # else it is that of a hole
            x, y, across, down = cv2.boundingRect(outline)
            column, row = outline[0, 0]
            yield _Spot(top + y, left + x, labels[y : y + down, x : x + across] == labels[row, column])


def _region(
    spot: _Spot,
    anomaly: NDArray[np.float32],
    parts: Sequence[MapPart],
    names: tuple[str, ...],
    frame_size: tuple[int, int],
) -> Region:
    (height, width), (down, across) = anomaly.shape, spot.inside.shape
    scale_x, scale_y = frame_size[0] / width, frame_size[1] / height
    weights = np.sum([_type_weights(spot.inside, (spot.top, spot.left), part) for part in parts], axis=0)
    x, y = round(spot.left * scale_x), round(spot.top * scale_y)
    right, bottom = round((spot.left + across) * scale_x), round((spot.top + down) * scale_y)
    window = anomaly[spot.top : spot.top + down, spot.left : spot.left + across]
    return Region(
        type=names[1 + int(weights[1:].argmax())],
        score=float((window * spot.inside).max()),
        area_px=max(1, round(np.count_nonzero(spot.inside) * scale_x * scale_y)),
        box=(min(x, frame_size[0] - 1), min(y, frame_size[1] - 1), max(1, right - x), max(1, bottom - y)),
    )


def _type_weights(inside: NDArray[np.bool_], origin: tuple[int, int], part: MapPart) -> NDArray[np.float32]:
    """Probabilities of each channel added up over those pixels of a window of the map that are a part's own, [K+1]."""
    (top, left), (part_top, part_left) = origin, part.origin
    first_row, first_column = max(top, part_top), max(left, part_left)
    end_row = min(top + inside.shape[0], part_top + part.rows.size_out)
    end_column = min(left + inside.shape[1], part_left + part.columns.size_out)
    mask = inside[first_row - top : max(0, end_row - top), first_column - left : max(0, end_column - left)]
    place = (first_row - part_top, first_column - part_left)
    if part.owned is not None and mask.size:
        mask = mask & part.owned[place[0] : place[0] + mask.shape[0], place[1] : place[1] + mask.shape[1]]
    if not mask.any():
        return np.zeros(len(part.probs), np.float32)
    mean = reference.region_probabilities(mask, part.probs, part.rows, part.columns, place)
    return mean * np.float32(np.count_nonzero(mask))
