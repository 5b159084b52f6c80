"""Thresholds against the definition, their intervals against SciPy."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from dapo_edge.calibration.thresholds import clopper_pearson, threshold_at


def test_no_more_good_frames_are_rejected_than_allowed() -> None:
    values = [value / 100 for value in range(100)]
    limit = threshold_at(values, 0.05)
    assert limit.value == pytest.approx(0.945)
    assert sum(value > limit.value for value in values) == 5
    assert limit.false_reject_rate == 0.05


def test_few_frames_put_the_limit_above_the_highest() -> None:
    limit = threshold_at([0.2, 0.9, 0.4], 0.01)
    assert (limit.value, limit.false_reject_rate) == (pytest.approx(0.95), 0.0)


def test_the_limit_can_be_exceeded() -> None:
    for values in ([0.9] + [0.5] * 7, [0.999] + [0.0] * 7):
        assert values[0] < threshold_at(values, 0.01).value < 1


def test_equal_scores_are_all_kept() -> None:
    assert threshold_at([0.5] * 20, 0.1).false_reject_rate == 0.0


@pytest.mark.parametrize(("hits", "trials"), [(0, 64), (1, 64), (3, 300), (8, 8), (0, 1), (50, 5000)])
def test_interval_equals_scipy(hits: int, trials: int) -> None:
    expected = binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)
