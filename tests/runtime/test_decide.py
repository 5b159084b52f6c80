"""What is found on a map of several parts."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.kernels import reference, resample
from dapo_edge.runtime.decide import MapPart, regions_of_parts

NAMES = ("normal", "scratch", "hole", "stain", "dent")


def random_part(seed: int, size: tuple[int, int], origin: tuple[int, int], owned: NDArray[np.bool_] | None) -> MapPart:
    scores = 2.5 * np.random.default_rng(seed).gumbel(size=(len(NAMES), 7, 9))
    probs = np.exp(scores) / np.exp(scores).sum(axis=0)
    rows = resample.upsample(7, size[0], align_corners=False, sigma=1.0)
    columns = resample.upsample(9, size[1], align_corners=False, sigma=1.0)
    return MapPart(probs.astype(np.float32), rows, columns, origin, owned)


@pytest.mark.parametrize("seed", range(6))
def test_the_type_of_a_defect_is_that_of_its_pixels_whichever_part_they_are_of(seed: int) -> None:
    """Two parts that overlap, against the mean of whole channel maps over each connected area."""
    owner = np.random.default_rng(seed).random((80, 130)) < 0.5
    parts = (
        random_part(seed, (80, 90), (0, 0), ~owner[:, :90]),
        random_part(seed + 99, (60, 100), (20, 30), owner[20:, 30:]),
    )
    parts[0].owned[:, :30] = parts[0].owned[:20] = True  # type: ignore[index]  # where the other one is not
    channels = np.zeros((len(NAMES), 80, 130), np.float32)
    for part in parts:
        top, left = part.origin
        window = channels[:, top : top + part.rows.size_out, left : left + part.columns.size_out]
        window[:, part.owned] = reference.upsample_maps(part.probs[None], part.rows, part.columns)[0][:, part.owned]
    anomaly = channels[1:].sum(axis=0)
    found = regions_of_parts(anomaly, parts, NAMES, 0.9, (260, 160))
    count, labels = cv2.connectedComponents((anomaly > 0.9).view(np.uint8), connectivity=8)
    expected = []
    for label in range(1, count):
        inside = labels == label
        rows, columns = np.nonzero(inside)
        kind = NAMES[1 + int(channels[1:, inside].mean(axis=1).argmax())]
        expected.append((float(anomaly[inside].max()), kind, (2 * int(columns.min()), 2 * int(rows.min()))))
    assert len(found) == len(expected) > 5
    for region, (score, kind, corner) in zip(found, sorted(expected, key=lambda each: -each[0]), strict=True):
        assert (region.score, region.type, region.box[:2]) == (score, kind, corner)
    assert len({region.type for region in found}) > 1


@pytest.mark.parametrize("seed", range(12))
def test_areas_are_the_connected_components(seed: int) -> None:
    """Specks, areas inside the holes of others, areas that touch at a corner, and areas at the map's edges."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(2, 90, 2))
    anomaly = rng.random((height, width)).astype(np.float32)
    threshold = float(rng.choice([0.2, 0.5, 0.8, 0.97]))
    if seed % 3 == 0:
        anomaly = np.zeros((40, 50), np.float32)
        anomaly[5:35, 5:35], anomaly[8:32, 8:32] = 0.8, 0.1  # a ring
        anomaly[12:20, 12:20] = 0.9  # in its hole
        anomaly[20:24, 20:24] = 0.7  # touches that one at a corner
        anomaly[39, 49], threshold = 1, 0.5
        height, width = anomaly.shape
    part = random_part(seed, (height, width), (0, 0), None)
    found = regions_of_parts(anomaly, (part,), NAMES, threshold, (width, height))
    above = (anomaly > threshold).view(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    expected = [
        (tuple(map(int, stats[label, :4])), int(stats[label, cv2.CC_STAT_AREA]), float(anomaly[labels == label].max()))
        for label in range(1, len(stats))
    ]
    assert expected
    assert sorted((region.box, region.area_px, region.score) for region in found) == sorted(expected)
    assert [region.score for region in found] == sorted((score for _, _, score in expected), reverse=True)
