"""From a defect map to regions and a verdict."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dapo_edge.extras import require
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec
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
    above = anomaly > threshold
    if not above.any():
        return ()
    cv2 = require("cv2")
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above.view(np.uint8), connectivity=8)
    height, width = anomaly.shape
    rows, columns = spec.tables((width, height))
    scale_x, scale_y = frame_size[0] / width, frame_size[1] / height
    regions = []
    for label in range(1, count):
        left, top, across, down, area = (int(value) for value in stats[label])
        window = (slice(top, top + down), slice(left, left + across))
        inside = labels[window] == label
        probabilities = reference.region_probabilities(inside, patch_probs, rows, columns, (top, left))
        x, y = round(left * scale_x), round(top * scale_y)
        right, bottom = round((left + across) * scale_x), round((top + down) * scale_y)
        regions.append(
            Region(
                type=names[1 + int(probabilities[1:].argmax())],
                score=float(anomaly[window][inside].max()),
                area_px=max(1, round(area * scale_x * scale_y)),
                box=(min(x, frame_size[0] - 1), min(y, frame_size[1] - 1), max(1, right - x), max(1, bottom - y)),
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.score))
