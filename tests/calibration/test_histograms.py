"""Streaming histograms against all values at once, and the estimators against their definitions, slowly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.calibration.histograms import BINS, ESTIMATORS, LEVELS, StreamingHistogram

SHAPES = ("normal", "laplace", "t3", "outliers", "uniform")


def values(shape: str, count: int = 100_000) -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    made = {
        "normal": lambda: rng.standard_normal(count),
        "laplace": lambda: rng.laplace(size=count),
        "t3": lambda: rng.standard_t(3, count),
        "outliers": lambda: np.concatenate([rng.standard_normal(count), np.full(5, -60.0)]),
        "uniform": lambda: rng.uniform(-0.3, 0.3, count),
    }
    return made[shape]().astype(np.float32)


def histogram_of(*parts: NDArray[np.float32]) -> StreamingHistogram:
    histogram = StreamingHistogram()
    for part in parts:
        magnitudes = np.abs(part)
        histogram.add(magnitudes, float(magnitudes.max()))
    return histogram


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_one_look_at_everything(shape: str) -> None:
    numbers = values(shape)
    rising = np.sort(np.abs(numbers))  # the range doubles again and again
    for parts in (np.array_split(numbers, 7), np.array_split(rising, 40), np.array_split(rising[::-1], 40)):
        histogram = histogram_of(*parts)
        assert histogram.max == rising[-1]
        top = histogram.width * BINS
        assert top / 2 <= histogram.max < top
        np.testing.assert_array_equal(histogram.counts, np.histogram(rising, BINS, (0, top))[0])


def test_zeros_before_the_first_number_are_counted() -> None:
    histogram = histogram_of(np.zeros((3, 4), np.float32), np.array([0.75, 0.0], np.float32))
    assert (histogram.counts[0], histogram.counts.sum()) == (13, 14)
    assert histogram.estimates()["max"] == 0.75


@pytest.mark.parametrize("numbers", [np.zeros(9, np.float32), np.full(9, 1e-38, np.float32)])
def test_nothing_but_zeros_has_no_range(numbers: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="no value above 0"):
        histogram_of(numbers).estimates()
    with pytest.raises(ValueError, match="no value above 0"):
        StreamingHistogram().estimates()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
def test_every_estimate_lies_within_what_was_seen(shape: str, size: float) -> None:
    numbers = (values(shape, 5000) * size).astype(np.float32)
    estimates = histogram_of(numbers).estimates()
    assert tuple(estimates) == ESTIMATORS
    assert estimates["max"] == np.abs(numbers).max()
    assert all(0 < value <= estimates["max"] for value in estimates.values())


def test_one_value_alone() -> None:
    estimates = histogram_of(np.full(50, 3.0, np.float32)).estimates()
    assert all(value == pytest.approx(3, rel=2 / BINS) for value in estimates.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_percentiles_are_values_of_their_rank(shape: str) -> None:
    rising = np.sort(np.abs(values(shape)))
    histogram = histogram_of(rising)
    for percent in ("99.9", "99.99", "99.999"):
        rank = math.ceil(Fraction(percent) / 100 * len(rising))
        found = histogram.estimates()[f"percentile_{percent}"]
        assert found == pytest.approx(rising[rank - 1], abs=histogram.width)


def error_of(numbers: NDArray[np.float32], reach: float) -> float:
    scale = reach / LEVELS
    return float(((numbers - np.clip(np.rint(numbers / scale), -LEVELS, LEVELS) * scale) ** 2).mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_the_least_error_of_real_rounding(shape: str) -> None:
    numbers = values(shape)
    found = histogram_of(numbers).estimates()["mse"]
    largest = float(np.abs(numbers).max())
    least = min(error_of(numbers, reach) for reach in np.linspace(largest / 200, largest, 200))
    assert error_of(numbers, found) <= 1.05 * least


def slow_entropy(counts: NDArray[np.int64], levels: int = 128) -> int:
    """Migacz's pseudocode, line by line."""
    best = (math.inf, 0)
    for kept in range(levels, len(counts) + 1):
        reference = [float(count) for count in counts[:kept]]
        reference[-1] += float(counts[kept:].sum())
        candidate = [0.0] * kept
        for level in range(levels):
            bins = [place for place in range(kept) if place * levels // kept == level]
            filled = [place for place in bins if counts[place]]
            for place in filled:
                candidate[place] = float(counts[bins].sum()) / len(filled)
        total, inside = sum(reference), sum(candidate)
        divergence = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p:
                divergence += p / total * math.log((p / total) / (q / inside)) if q else math.inf
        best = min(best, (divergence, kept))
    return best[1]


@pytest.mark.parametrize("shape", ["normal", "outliers"])
def test_entropy_equals_its_pseudocode(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dapo_edge.calibration import histograms

    coarse = histogram_of(values(shape, 20_000)).counts.reshape(256, 8).sum(axis=1)
    monkeypatch.setattr(histograms, "_ENTROPY_LEVELS", 16)
    found = histograms._entropy(coarse[: int(np.flatnonzero(coarse)[-1]) + 1])
    assert found == slow_entropy(coarse[: int(np.flatnonzero(coarse)[-1]) + 1], 16)


def test_outliers_are_clipped_by_entropy_and_kept_where_every_value_counts() -> None:
    outliers, uniform = histogram_of(values("outliers")).estimates(), histogram_of(values("uniform")).estimates()
    assert outliers["max"] == 60
    assert outliers["entropy"] < 6
    assert outliers["percentile_99.99"] < 6
    assert uniform["entropy"] > 0.29
    assert uniform["mse"] > 0.29


@pytest.mark.parametrize("shape", SHAPES)
def test_logarithmic_bins_keep_every_value(shape: str) -> None:
    numbers = np.abs(values(shape))
    histogram = histogram_of(numbers)
    coarse = histogram.logarithmic(20, 5)
    assert coarse.sum() == len(numbers)
    edges = histogram.max * 2.0 ** (5 * (np.arange(21) / 20 - 1))
    expected = np.histogram(numbers, [0, *edges[1:-1], np.inf])[0]
    assert np.abs(coarse - expected).max() < 0.01 * len(numbers)
