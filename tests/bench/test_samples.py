"""Percentiles, histogram, distribution and course of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dapo_edge.bench.samples import BINS, WINDOWS, Samples, percentiles


def made(totals: list[float], done_s: list[float] | None = None) -> Samples:
    samples = Samples()
    for number, total in enumerate(totals):
        samples.add({"total": total, "encode": total / 2}, done_s[number] if done_s else number / 100)
    return samples


@pytest.mark.parametrize(("noted", "count"), [({"encode": 1.0}, 2), ({"encode": 1.0, "total": 5.0}, 3)])
def test_a_frame_that_an_interruption_tore_counts_whole_or_not_at_all(noted: dict[str, float], count: int) -> None:
    class Torn(dict[str, float]):
        def items(self) -> Any:
            yield from noted.items()
            raise KeyboardInterrupt

    samples = made([3.0, 4.0])
    with pytest.raises(KeyboardInterrupt):
        samples.add(Torn(), 9.0)
    assert len(samples) == len(samples.done_s()) == len(samples.of("total")) == count
    assert sum(point["n"] for point in samples.timeline(0)) == count


def test_percentiles_are_numpy_s() -> None:
    values = np.random.default_rng(1).gamma(2, 5, 1000)
    found = percentiles(values)
    assert list(found) == ["n", "mean", "std", "min", "p50", "p90", "p95", "p99", "max"]
    assert found["n"] == 1000
    assert found["p99"] == pytest.approx(np.quantile(values, 0.99))
    assert found["std"] == pytest.approx(values.std())


def test_stages_come_in_the_order_of_a_frame_s_way() -> None:
    samples = Samples()
    samples.add({"total": 9, "emit": 1, "own": 1, "map": 1, "encode": 1, "capture": 1}, 0)
    assert list(samples.stages()) == ["capture", "encode", "map", "emit", "own", "total"]


def test_the_histogram_holds_every_frame_even_a_stall() -> None:
    found = made([10 + number % 7 for number in range(2000)] + [5000]).histogram()
    assert len(found["edges_ms"]) == BINS + 1
    assert sum(found["counts"]) == 2001
    assert found["edges_ms"][-1] < 20, "one stall does not squeeze the rest into a bar"


def test_a_histogram_of_equal_times_has_a_width() -> None:
    found = made([5.0] * 10).histogram()
    assert sum(found["counts"]) == 10
    assert found["edges_ms"][0] < found["edges_ms"][-1]


def test_the_distribution_ends_at_the_slowest() -> None:
    found = made([float(number) for number in range(1, 101)]).cdf()
    assert found["share"][-1] == 1
    assert found["ms"][-1] == 100
    assert found["ms"] == sorted(found["ms"])


def test_the_timeline_shows_a_gap_as_a_window_without_frames() -> None:
    done = [number / 10 for number in range(100)] + [30 + number / 10 for number in range(100)]
    points = made([1.0] * 200, done).timeline(0)
    assert sum(point["n"] for point in points) == 200
    assert len(points) <= WINDOWS
    empty = [point for point in points if point["n"] == 0]
    assert empty
    assert all("p50" not in point for point in empty)
    assert all(10 < point["at_s"] < 30 for point in empty)


def test_a_timeline_of_one_frame() -> None:
    (point,) = made([3.0], [7.5]).timeline(7.0)
    assert point == {"at_s": 0.25, "n": 1, "p50": 3.0, "p99": 3.0, "max": 3.0}
