"""What eager torch and each precision are worth where the truth is known, counted frame by frame in constant memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch
from dapo_edge.data.dataset import types_at
from dapo_edge.engine.gate_frames import GateFrame
from dapo_edge.evaluation.evaluate import number
from dapo_edge.evaluation.metrics import ImageMetrics, PixelMetrics
from dapo_edge.gate import Drops, Expected


@dataclass(frozen=True)
class Accuracy:
    """Metrics as fractions; None where one is undefined: good or defective frames (or pixels) are missing."""

    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    image_pairs: int = 0  # of one good and one defective frame each


class AccuracyMeter:
    """Metrics of one backend."""

    def __init__(self) -> None:
        self._images, self._pixels = ImageMetrics(), PixelMetrics()

    def add(self, anomaly: NDArray[np.float32], score: float, defective: bool, mask: NDArray[np.bool_] | None) -> None:
        """Count one frame: anomaly map [H, W] and image score in [0, 1] against its label and defective pixels [H, W].

        Without a mask it counts as a whole image only. A frame whose map or score is no number is left out.
        """
        if not (np.isfinite(anomaly).all() and np.isfinite(score)):
            return  # its drift is no number either, and fails the gate by itself
        self._images.add(score, defective)
        if mask is not None:
            self._pixels.add(anomaly, mask)

    def accuracy(self) -> Accuracy:
        """All metrics of what was counted so far."""
        return Accuracy(
            image_auroc=number(self._images.curve().auroc()),
            pixel_auroc=number(self._pixels.curve().auroc()),
            aupro=number(self._pixels.aupro()),
            image_pairs=sum(self._images.defective) * (len(self._images.defective) - sum(self._images.defective)),
        )


class GateAccuracy:
    """Eager torch and all precisions of one gate, fed frame by frame."""

    def __init__(self) -> None:
        self._reference = AccuracyMeter()
        self._found: dict[str, AccuracyMeter] = {}

    def add(self, frame: GateFrame, expected: Expected, batches: Mapping[str, MapBatch]) -> None:
        """Count what the reference and each precision made of a frame; one without a label counts nowhere."""
        if frame.defective is None:
            return
        mask = mask_at(frame, expected.anomaly.shape)
        self._reference.add(expected.anomaly, expected.score, frame.defective, mask)
        for precision, batch in batches.items():
            meter = self._found.setdefault(precision, AccuracyMeter())
            meter.add(batch.anomaly[0], float(batch.image_scores[0]), frame.defective, mask)

    @property
    def reference(self) -> Accuracy:
        """Of eager torch."""
        return self._reference.accuracy()

    @property
    def precisions(self) -> dict[str, Accuracy]:
        """Of every precision that saw a labelled frame."""
        return {precision: meter.accuracy() for precision, meter in self._found.items()}


def drops(reference: Accuracy, candidate: Accuracy) -> Drops:
    """By how much a candidate is worse than the reference; below 0 it is better, None where a metric is undefined."""

    def drop(before: float | None, after: float | None) -> float | None:
        return None if before is None or after is None else before - after

    return Drops(
        image_auroc=drop(reference.image_auroc, candidate.image_auroc),
        pixel_auroc=drop(reference.pixel_auroc, candidate.pixel_auroc),
        aupro=drop(reference.aupro, candidate.aupro),
        image_pairs=reference.image_pairs,
    )


def mask_at(frame: GateFrame, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """The defective pixels of a frame at the map's shape [H, W]; None if nobody knows where they are."""
    if frame.truth is None:
        return None
    height, width = shape
    return types_at(frame.truth.types, (width, height)) > 0
