"""How the |values| of a tensor are distributed, in one pass over a stream, and how far an INT8 scale should reach.

A range r means the scale r / 127: values up to r are rounded, values beyond are clipped to it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 2048  # as TensorRT's calibrator has
LEVELS = 127  # of |x| above 0 in symmetric int8
PERCENTILES = ("99.9", "99.99", "99.999")
ESTIMATORS = ("max", *(f"percentile_{share}" for share in PERCENTILES), "entropy", "mse")

_ENTROPY_LEVELS = 128  # |x| in int8, 0 among them
_SMALLEST = 1e-30  # below it float32 could not hold a scale

Counts = NDArray[np.int64]


class StreamingHistogram:
    """Counts of |x| in 2048 equal bins from 0 to a power of two, which doubles when a value lies beyond.

    Doubling merges neighbouring bins, and scaling by a power of two is exact, so the counts depend on the values alone,
    not on their order. At least half of the bins lie below the largest value.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(BINS, np.int64)
        self.max = 0.0  # exact; also of values that were not counted
        self._exponent: int | None = None  # of the power of two; None before the first value above 0
        self._zeros = 0  # counted before then

    @property
    def width(self) -> float:
        """Width of a bin, in the values' unit; 0 before the first value above 0."""
        return 0.0 if self._exponent is None else math.ldexp(1.0, self._exponent) / BINS

    def add(self, magnitudes: NDArray[np.float32], largest: float) -> None:
        """Count |values|, of any shape; `largest` is at least their maximum. Both must be finite and not negative."""
        self.max = max(self.max, largest)
        self._reach(largest)
        if self._exponent is None:
            self._zeros += magnitudes.size
            return
        bins = (magnitudes.ravel() * np.float32(1 / self.width)).astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)

    def _reach(self, largest: float) -> None:
        """Make the range larger than `largest`."""
        if largest < _SMALLEST:
            return
        wanted = math.frexp(largest)[1]  # the smallest power of two above it
        if self._exponent is None:
            self._exponent, self.counts[0] = wanted, self._zeros
        while self._exponent < wanted:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self._exponent += 1

    def estimates(self) -> dict[str, float]:
        """The range that each of `ESTIMATORS` chooses, in (0, max].

        Raises `ValueError` when no value above 0 was seen: then no range is better than another.
        """
        if self._exponent is None or not self.counts.any():
            raise ValueError("no value above 0 was seen")
        counts = self.counts[: int(self.max / self.width) + 1]
        found = {f"percentile_{share}": _percentile(counts, float(share)) for share in PERCENTILES}
        found |= {"entropy": _entropy(counts), "mse": _squared_error(counts)}
        return {"max": self.max} | {name: min(bins * self.width, self.max) for name, bins in found.items()}

    def logarithmic(self, bins: int, octaves: float) -> Counts:
        """The counts again in `bins` bins of equal ratio, from max / 2^octaves to max; the first one has all below.

        Within a bin of the histogram values count as evenly spread. The sum is kept.
        """
        below = np.concatenate([[0], np.cumsum(self.counts)])
        edges = self.max * 2.0 ** (octaves * (np.arange(1, bins) / bins - 1))
        inside = np.interp(edges / self.width, np.arange(BINS + 1), below) if self.width else np.zeros(bins - 1)
        return np.diff(np.concatenate([[0], np.rint(inside).astype(np.int64), below[-1:]]))


def _percentile(counts: Counts, percent: float) -> float:
    """Below how many bins that percentage of all values lies; within a bin, values count as evenly spread."""
    below = np.cumsum(counts)
    wanted = math.ceil(
        percent / 100 * int(below[-1]) - 1e-6
    )  # 99.9 is no binary number; one value more may lie far off
    place = int(np.searchsorted(below, wanted))
    return place + 1 - float(below[place] - wanted) / max(1, int(counts[place]))


def _entropy(counts: Counts) -> float:
    """How many bins to keep so that the least information is lost: TensorRT's entropy calibration.

    For each number of bins, P is the histogram with everything beyond added to its last bin, and Q the same bins before
    that, quantised to 128 levels; the least Kullback-Leibler divergence of P from Q wins (Migacz, "8-bit inference with
    TensorRT", GTC 2017, pages 36 to 38).
    """
    bins = len(counts)
    tried = range(_ENTROPY_LEVELS, bins + 1)
    total = int(counts.sum())
    divergences = [_divergence(counts[:kept].astype(np.float64), total) for kept in tried]
    return float(tried[int(np.argmin(divergences))])


def _divergence(inside: NDArray[np.float64], total: int) -> float:
    """Sum of P log(P / Q), with P of `total` values; infinite where Q is 0 and P is not."""
    level = np.arange(len(inside)) * _ENTROPY_LEVELS // len(inside)
    filled = inside > 0
    sums, members = np.bincount(level, inside), np.bincount(level, filled)
    reference = inside / total
    reference[-1] += 1 - inside.sum() / total
    if reference[-1] > 0 and not filled[-1]:
        return math.inf
    candidate = (sums / np.maximum(members, 1))[level][filled] / inside.sum()
    reference = reference[filled]
    return float((reference * np.log(reference / candidate)).sum())


def _squared_error(counts: Counts) -> float:
    """How many bins to reach so that rounding and clipping together cost the least expected squared error.

    With the scale s = r / 127, values below s / 2 become 0 (error x²), values beyond r become r (error (x - r)²), and
    those between are off by s² / 12 in the mean (Bennett, "Spectra of quantized signals", 1948). Every value counts as
    the middle of its bin.
    """
    middles = np.arange(len(counts)) + 0.5
    moments = [np.concatenate([[0.0], np.cumsum(counts * middles**power)]) for power in range(3)]
    reach = np.arange(1, len(counts) + 1)
    step = reach / LEVELS
    dead = np.minimum(np.ceil(step / 2 - 0.5), reach).astype(np.int64)  # bins whose middle lies below step / 2
    number, first, second = (moment[-1] - moment[reach] for moment in moments)
    clipped = second - 2 * reach * first + reach**2 * number
    rounded = (moments[0][reach] - moments[0][dead]) * step**2 / 12 + moments[2][dead]
    return float(reach[np.argmin(clipped + rounded)])
