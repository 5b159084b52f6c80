"""What an inspection found against what is really there, counted over frames whose truth is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dapo_edge.extras import require
from dapo_edge.structures import Box, Inspection, Truth, Verdict

MISSED = "missed"
VERDICTS: tuple[Verdict, ...] = ("ok", "ng", "unsure")

# Limits in shares of the frame's area, and of its shorter side; in pixels of 640 x 480.
MIN_AREA = 1 / 3072  # 100 px: each mark of the belt has more; smaller are splinters of a larger one
MIN_REACH = 1 / 20  # 24 px, less than a patch: what is left at the border, or seen first, of a defect
MARGIN = 1 / 60  # 8 px: patches blur the map, so that a region may lie beside its cause

Mask = NDArray[np.bool_]  # [H, W]
Content = Literal["defective", "barely", "good"]
CONTENTS: tuple[Content, ...] = ("defective", "barely", "good")


@dataclass(frozen=True, eq=False)
class TrueDefect:
    """One 8-connected area of one type, in pixels of the frame."""

    type: str
    box: Box
    area_px: int
    inside: Mask  # the defect within its box, [height, width]
    visible: bool  # large enough to be asked for: not a splinter, nor a sliver at the frame's border


@dataclass
class Confusion:
    """Counts of inspections against truths. A defect that is barely visible is neither asked for nor forbidden."""

    verdicts: dict[Content, Counter[Verdict]] = field(default_factory=lambda: {row: Counter() for row in CONTENTS})
    called: dict[str, Counter[str]] = field(default_factory=dict)  # true type -> word of the inspection, or MISSED
    words: dict[str, None] = field(default_factory=dict)  # defect words that inspections could use, in order
    frames: int = 0
    false_alarms: int = 0  # regions without a true pixel in or near them

    def add(self, inspection: Inspection, truth: Truth) -> tuple[TrueDefect, ...]:
        """Count one frame; gives back what is really on it."""
        height, width = truth.types.shape
        if inspection.frame_size != (width, height):
            raise ValueError(f"a truth of {width} x {height} px does not belong to a frame of {inspection.frame_size}")
        defects = true_defects(truth)
        found = _region_pixels(inspection)
        self.frames += 1
        self.words.update(dict.fromkeys(inspection.types[1:]))
        self.verdicts[content_of(defects)][inspection.verdict] += 1
        for defect in defects:
            if defect.visible:
                self.called.setdefault(defect.type, Counter())[_word(defect, found, inspection)] += 1
        self.false_alarms += len(inspection.regions) - _near(found, truth.mask, len(inspection.regions))
        return defects

    def as_json(self) -> dict[str, Any]:
        """The demo's "confusion". A true type with `"word": false` could not be called right: the bank lacks it."""
        types = {}
        for name, called in self.called.items():
            regions = sum(called.values())
            types[name] = {
                "word": name in self.words,
                "regions": regions,
                "found": regions - called[MISSED],
                "right": called[name],
                "called": dict(called.most_common()),
            }
        return {
            "frames": self.frames,
            "verdicts": {row: {word: counts[word] for word in VERDICTS} for row, counts in self.verdicts.items()},
            "words": list(self.words),
            "types": types,
            "false_alarms": self.false_alarms,
            "false_alarms_per_frame": round(self.false_alarms / self.frames, 4) if self.frames else 0.0,
        }


def true_defects(truth: Truth) -> tuple[TrueDefect, ...]:
    """All connected areas of a truth, in the order of its names."""
    cv2 = require("cv2")
    found = []
    for index in np.flatnonzero(np.bincount(truth.types.ravel())):
        if index == 0:
            continue
        mask = (truth.types == index).view(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        for label in range(1, count):
            x, y, width, height, area = (int(value) for value in stats[label])
            inside = labels[y : y + height, x : x + width] == label
            visible = _is_visible((x, y, width, height), area, truth.types.shape)
            found.append(TrueDefect(truth.names[index], (x, y, width, height), area, inside, visible))
    return tuple(found)


def content_of(defects: tuple[TrueDefect, ...]) -> Content:
    """The row of the verdict table to which a frame with these defects belongs."""
    if any(defect.visible for defect in defects):
        return "defective"
    return "barely" if defects else "good"


def _is_visible(box: Box, area_px: int, shape: tuple[int, ...]) -> bool:
    """`shape` is the frame's (height, width)."""
    frame_height, frame_width = shape
    x, y, width, height = box
    reach = MIN_REACH * min(shape)
    sliver_x = (x == 0 or x + width == frame_width) and width < reach
    sliver_y = (y == 0 or y + height == frame_height) and height < reach
    return area_px >= MIN_AREA * frame_height * frame_width and not (sliver_x or sliver_y)


def _region_pixels(inspection: Inspection) -> NDArray[np.int32]:
    """Which region each pixel of the frame belongs to, [H, W]: 0 none, n the n-th of `inspection.regions`.

    Regions keep their boxes only, so their pixels are looked up in the map; a box the map does not show counts whole.
    """
    width, height = inspection.frame_size
    pixels = np.zeros((height, width), np.int32)
    if not inspection.regions:
        return pixels
    labels, boxes = _components(inspection)
    # The most defective ones come last, so that they stay on top.
    for number in range(len(inspection.regions), 0, -1):
        x, y, w, h = inspection.regions[number - 1].box
        area = (slice(y, y + h), slice(x, x + w))
        overlaps = _overlaps((x, y, w, h), boxes)
        if overlaps.size and overlaps.max() > 0.5:
            pixels[area][labels[area] == 1 + overlaps.argmax()] = number
        else:
            pixels[area] = number
    return pixels


def _components(inspection: Inspection) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Areas of the map above the threshold: labels at the frame's size [H, W] from 1, and boxes x, y, w, h [n, 4]."""
    cv2 = require("cv2")
    if inspection.pixel_threshold is None:
        return np.zeros(inspection.frame_size[::-1], np.int32), np.zeros((0, 4), np.int32)
    above = (inspection.anomaly_map > inspection.pixel_threshold).view(np.uint8)
    above = cv2.resize(above, inspection.frame_size, interpolation=cv2.INTER_NEAREST)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    return labels, stats[1:, :4]


def _overlaps(box: Box, boxes: NDArray[np.int32]) -> NDArray[np.float64]:
    """Intersection over union of one box with others [n, 4], in [0, 1]."""
    x, y, w, h = box
    left, top, width, height = boxes.T
    across = np.minimum(x + w, left + width) - np.maximum(x, left)
    down = np.minimum(y + h, top + height) - np.maximum(y, top)
    shared = np.maximum(across, 0) * np.maximum(down, 0)
    overlaps: NDArray[np.float64] = shared / (w * h + width * height - shared)
    return overlaps


def _word(defect: TrueDefect, found: NDArray[np.int32], inspection: Inspection) -> str:
    """The type of the region that covers most of the defect; MISSED when none covers a single pixel."""
    x, y, width, height = defect.box
    shares = np.bincount(found[y : y + height, x : x + width][defect.inside])[1:]
    return inspection.regions[int(shares.argmax())].type if shares.any() else MISSED


def _near(found: NDArray[np.int32], mask: Mask, regions: int) -> int:
    """How many of the regions have a true pixel inside, or not farther away than the margin."""
    if not (regions and mask.any()):
        return 0
    cv2 = require("cv2")
    size = 2 * max(1, round(MARGIN * min(mask.shape))) + 1
    around = cv2.dilate(mask.view(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    return int(np.count_nonzero(np.bincount(found[around > 0], minlength=regions + 1)[1:]))
