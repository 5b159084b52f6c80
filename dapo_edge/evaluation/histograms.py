"""Ranking metrics from counts per threshold: exact for a few scores, and for millions of pixels in fixed histograms.

Maps lie in [0, 1], so pixels are counted in bins that are known beforehand: one pass, and memory that doesn't grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.floating]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Curve:
    """How many positives and negatives lie at each distinct threshold, from the highest threshold down.

    Every metric is NaN without a positive or without a negative: a ranking needs both.
    """

    positives: Counts  # [T]
    negatives: Counts  # [T]

    @classmethod
    def of_scores(cls, scores: ArrayLike, positive: ArrayLike) -> Curve:
        """Exact: one threshold per distinct score. Both are [N], `positive` is bool."""
        values, place = np.unique(-np.asarray(scores, np.float64), return_inverse=True)
        histogram = Histogram(values.size)
        histogram.add(place, np.asarray(positive, bool))
        return Curve(histogram.counts[1], histogram.counts[0])

    @property
    def defined(self) -> bool:
        """Whether there is something to rank: at least one of each."""
        return bool(self.positives.any() and self.negatives.any())

    def rates(self) -> tuple[FloatArray, FloatArray]:
        """False and true positive rate at each threshold, two [T + 1] that rise from 0 to 1; only if `defined`."""
        return rising_share(self.negatives), rising_share(self.positives)

    def precision_recall(self) -> tuple[FloatArray, FloatArray]:
        """Recall and precision at each threshold from the highest down, two [T]; only if `defined`."""
        true, flagged = self._flagged()
        return true / self.positives.sum(), np.where(flagged > 0, true / np.maximum(flagged, 1), 1.0)

    def auroc(self) -> float:
        """Area under the ROC curve; the trapezoid counts a tie between a positive and a negative as half."""
        return area_under(*self.rates()) if self.defined else math.nan

    def average_precision(self) -> float:
        """Σ (recall_n - recall_n-1) · precision_n: steps, no interpolation, as scikit-learn defines it."""
        if not self.defined:
            return math.nan
        true, flagged = self._flagged()
        return float((self.positives / self.positives.sum()) @ (true / np.maximum(flagged, 1)))

    def f1_max(self) -> float:
        """The highest 2 TP / (2 TP + FP + FN) over all thresholds."""
        if not self.defined:
            return math.nan
        true, flagged = self._flagged()
        return float((2 * true / (flagged + self.positives.sum())).max())

    def _flagged(self) -> tuple[Counts, Counts]:
        """Positives, and pixels of both kinds, at or above each threshold."""
        true = np.cumsum(self.positives)
        return true, true + np.cumsum(self.negatives)


def thinned(x: FloatArray, y: FloatArray, points: int = 300) -> tuple[FloatArray, FloatArray]:
    """At most so many points of a curve, spread over its length as it is seen: pixels have 100,000 thresholds."""
    if len(x) <= points:
        return x, y
    way = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    chosen = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points)).clip(0, len(x) - 1))
    return x[chosen], y[chosen]


class Histogram:
    """Counts of negatives (row 0) and positives (row 1) per bin, [2, bins]."""

    def __init__(self, bins: int) -> None:
        self.counts: Counts = np.zeros((2, bins), np.int64)

    def add(self, place: NDArray[np.integer], positive: NDArray[np.bool_]) -> None:
        """Count values whose bins are `place`; both arrays have one shape."""
        bins = self.counts.shape[1]
        self.counts[0] += np.bincount(place.ravel(), minlength=bins)
        inside = place[positive]
        if inside.size:  # a good image has none, and passing over all bins costs as much as counting its pixels
            counts = np.bincount(inside, minlength=bins)
            self.counts[0] -= counts
            self.counts[1] += counts

    def curve(self) -> Curve:
        """The bins as thresholds. Values of one bin count as tied, so AUROC is wrong by at most half the share of
        (positive, negative) pairs that have a bin in common."""
        return Curve(self.counts[1, ::-1], self.counts[0, ::-1])


def bin_of(values: FloatArray, bins: int) -> NDArray[np.uint32]:
    """The bin of each value in [0, 1]. The edges lie on a square-root scale from both ends to 0.5.

    A confident map is nearly 0 or nearly 1 almost everywhere. Even bins would call most of its pixels tied; these are
    2 / bins wide at 0.5 (twice an even bin) and 2 / bins² at the ends.
    """
    values = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    half = bins / 2
    side = values - 0.5
    place = 1 - values  # from here on in place: fresh memory costs more than the arithmetic
    np.minimum(place, values, out=place)
    np.maximum(place, 0, out=place)  # rounding may leave [0, 1]
    np.sqrt(place, out=place)
    place *= bins * math.sqrt(0.5)  # now 0 at both ends and `half` in the middle
    np.copysign(np.subtract(half, place, out=place), side, out=place)
    place += half
    return np.minimum(place, bins - 1, out=place).astype(np.uint32)


def rising_share(counts: NDArray[np.int64] | NDArray[np.float64]) -> FloatArray:
    """Cumulative sum divided by the total, with the 0 before the first threshold: [T] -> [T + 1]."""
    total = np.cumsum(counts, dtype=np.float64)
    return np.concatenate([[0.0], total / total[-1]])


def area_under(x: FloatArray, y: FloatArray, limit: float = 1.0) -> float:
    """Trapezoidal area from x = 0 to `limit`, divided by `limit`; x rises from 0 to 1, y is interpolated there."""
    below = int(np.searchsorted(x, limit, side="right"))
    x, y = np.append(x[:below], limit), np.append(y[:below], np.interp(limit, x, y))
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2 / limit)
