"""The map kernels on the CPU against `reference.defect_map`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_runs import BARRIERS, Run, check_barrier, check_sanitized, map_run
from numpy.typing import NDArray

from dapo_edge.kernels import launch, reference, resample
from dapo_edge.kernels.resample import TapTable

FloatArray = NDArray[np.float32]
# Float32 sums in another order; a half is 2.4e-4 off at most, a byte half a grey level.
ROUNDING = 1e-6
HALF = 2.6e-4
BYTE = 0.501 / 255
NOTHING = np.zeros((0, 0), np.float32)
MARGIN = 2e-3  # where the best two channels are further apart, the type must be the same


@dataclass(frozen=True)
class Case:
    kernel: str
    grid: tuple[int, int]  # rows, columns
    size: tuple[int, int]  # rows, columns of the map
    sigma: float = 0.0
    types: int = 4
    batch: int = 2
    align_corners: bool = True

    def __str__(self) -> str:
        (h, w), (height, width) = self.grid, self.size
        return f"{h}x{w}-{height}x{width}-{self.types}"

    def tables(self) -> tuple[TapTable, TapTable]:
        rows, columns = (
            resample.upsample(patches, pixels, align_corners=self.align_corners, sigma=self.sigma)
            for patches, pixels in zip(self.grid, self.size, strict=True)
        )
        return rows, columns

    def probabilities(self) -> FloatArray:
        """[B, K+1, h, w], with clear and with doubtful patches."""
        rng = np.random.default_rng([*self.grid, self.types])
        probs = rng.dirichlet(np.full(self.types + 1, 0.3), (self.batch, *self.grid)).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(probs, np.float32)


CASES = [
    Case("defect_map_4", (16, 16), (61, 45), types=20),
    Case("defect_map_4", (24, 24), (60, 327), batch=1, types=1),
    Case("defect_map_4", (6, 4), (7, 5), types=64, batch=3),
    Case("defect_map_4", (2, 3), (64, 50), sigma=30.0, align_corners=False),  # far wider than the map
    Case("defect_map_any", (1, 4096), (3, 5), types=1),
    Case("defect_map_6", (7, 7), (98, 98), sigma=4.0, types=20),
    Case("defect_map_6", (5, 9), (61, 83), sigma=2.0, types=1, batch=3, align_corners=False),
    Case("defect_map_6", (37, 37), (30, 518), sigma=4.0, types=2, batch=1),
    Case("defect_map_8", (9, 9), (72, 73), sigma=4.0, types=64, batch=1),
    Case("defect_map_8", (16, 16), (7, 9)),
    Case("defect_map_8", (10, 10), (30, 31), sigma=1.5, types=20, batch=3, align_corners=False),
    Case("defect_map_any", (12, 20), (9, 31), sigma=1.5),
    Case("defect_map_any", (9, 13), (13, 9), sigma=0.6, types=64),
    Case("defect_map_any", (40, 40), (10, 10), sigma=3.0, types=1),
    Case("defect_map_any", (64, 64), (37, 43), sigma=8.0, types=20, batch=1, align_corners=False),
    # Maps of one pixel, one line, one patch
    Case("defect_map_4", (1, 1), (5, 3), types=1),
    Case("defect_map_4", (1, 1), (1, 1), types=64),
    Case("defect_map_4", (3, 3), (1, 1), sigma=2.0),
    Case("defect_map_4", (5, 7), (1, 17)),
    Case("defect_map_4", (5, 7), (17, 1)),
]


@dataclass(frozen=True, eq=False)
class Result:
    """Copies of what a run wrote, without the padding columns."""

    half: NDArray[np.float16]  # [B, H, W]
    byte: NDArray[np.uint8]
    types: NDArray[np.uint8]
    peaks: FloatArray  # [B, PEAKS]
    histogram: NDArray[np.uint32]  # [B, bins]


def results(run: Run, width: int, order: int = 0) -> Result:
    half, byte, types, peaks, histogram = (array.copy() for array in run.here(order)[:5])
    return Result(half[..., :width], byte[..., :width], types[..., :width], peaks, histogram)


def run_of(case: Case, probs: FloatArray | None = None, **options: Any) -> Run:
    return map_run(case.probabilities() if probs is None else probs, *case.tables(), **options)


def assert_same(first: Result, second: Result) -> None:
    for name in Result.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def check_histogram(histogram: NDArray[np.uint32], anomaly: FloatArray) -> None:
    bins = np.minimum((anomaly * launch.HISTOGRAM_BINS).astype(np.int64), launch.HISTOGRAM_BINS - 1)
    counts = np.bincount(bins.ravel(), minlength=launch.HISTOGRAM_BINS)
    assert histogram.sum() == anomaly.size
    # A value at a border may fall to the other side.
    assert np.abs(np.cumsum(counts.astype(np.int64)) - np.cumsum(histogram.astype(np.int64))).max() <= 3
    top = reference.image_scores("top", NOTHING, NOTHING, 1.0, anomaly[None])[0]
    assert abs(launch.top_mean(histogram, anomaly.size) - top) <= 1 / (2 * launch.HISTOGRAM_BINS) + ROUNDING


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_are_the_references(case: Case) -> None:
    probs, (rows, columns) = case.probabilities(), case.tables()
    run = run_of(case)
    assert run.launch.kernel == case.kernel
    found = results(run, case.size[1])
    maps = reference.defect_map(probs, rows, columns)
    anomaly, types = maps.anomaly, maps.types
    np.testing.assert_allclose(found.half.astype(np.float32), anomaly, rtol=0, atol=HALF)
    np.testing.assert_allclose(found.byte / 255, anomaly, rtol=0, atol=BYTE)
    shares = reference.upsample_maps(probs, rows, columns)
    best = np.sort(shares, axis=1)
    clear = best[:, -1] - best[:, -2] > MARGIN
    assert clear.any()
    np.testing.assert_array_equal(found.types[clear], types[clear])
    channels = case.types + 1
    np.testing.assert_allclose(found.peaks[:, :channels], shares.max(axis=(2, 3)), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found.peaks[:, -1], anomaly.max(axis=(1, 2)), rtol=0, atol=ROUNDING)
    assert not found.peaks[:, channels:-1].any()
    for image in range(case.batch):
        check_histogram(found.histogram[image], anomaly[image])


KERNELS = [CASES[index] for index in (0, 2, 5, 10, 12)]


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_the_order_of_threads_does_not_matter(case: Case) -> None:
    first, *others = (results(run_of(case), case.size[1], order) for order in (0, 1, 7))
    for other in others:
        assert_same(first, other)


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_channels_may_come_in_several_batches(case: Case) -> None:
    whole = results(run_of(case), case.size[1])
    for channels_at_once in (1, 3):
        run = run_of(case)
        run.job.channels_at_once = channels_at_once
        assert_same(results(run, case.size[1]), whole)


def test_many_channels_do_not_fit_at_once() -> None:
    """Otherwise the test above would be the only one of several batches."""
    assert run_of(CASES[8]).job.channels_at_once < 65


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_a_map_without_a_histogram(case: Case) -> None:
    whole, run = results(run_of(case), case.size[1]), run_of(case, with_histogram=False)
    found = results(run, case.size[1])
    assert not found.histogram.any()
    for name in ("half", "byte", "types", "peaks"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize(("absent", "index"), [("anomaly_half", 0), ("anomaly_byte", 1)])
def test_either_form_of_the_anomaly_may_be_absent(absent: str, index: int) -> None:
    case = CASES[6]
    whole, run = results(run_of(case), case.size[1]), run_of(case)
    setattr(run.job, absent, 0)
    run.buffers[index][...] = 7
    found = results(run, case.size[1])
    assert (run.buffers[index] == 7).all()
    kept = ("byte", "half")[index]
    np.testing.assert_array_equal(getattr(found, kept), getattr(whole, kept))


@pytest.mark.parametrize("width", [41, 42, 43])
def test_padding_columns_count_for_nothing(width: int) -> None:
    """Columns beyond the map have no normal share, which would be an anomaly of 1."""
    case = Case("", (5, 7), (11, width), types=2, batch=1)
    probs = np.full((1, 3, 5, 7), 0.05, np.float32)
    probs[:, 0] = 0.9
    run = run_of(case, probs)
    assert run.job.pitch == 44
    found = results(run, width)
    np.testing.assert_allclose(found.peaks[0, [0, 1, 2, -1]], [0.9, 0.05, 0.05, 0.1], rtol=0, atol=ROUNDING)
    assert np.flatnonzero(found.histogram[0]).tolist() == [204]
    assert found.histogram[0, 204] == 11 * width


@pytest.mark.parametrize("case", KERNELS, ids=str)
@pytest.mark.parametrize("channel", [0, 1])
def test_nan_reaches_the_peaks_and_no_other_image(case: Case, channel: int) -> None:
    """Where the encoder overflowed, `peaks` says so; pixels that the patch reaches don't look normal."""
    probs, (rows, columns) = case.probabilities(), case.tables()
    whole = results(run_of(case), case.size[1])
    probs[0, channel, 1, 2] = np.nan
    found = results(run_of(case, probs), case.size[1])
    assert np.isnan(found.peaks[0, channel])
    if channel == 0:
        reached = (rows.dense()[:, 1] > 0)[:, None] & (columns.dense()[:, 2] > 0)
        assert reached.any()
        assert np.isnan(found.half[0][reached]).all()
        assert np.isnan(found.peaks[0, -1])
    else:
        np.testing.assert_array_equal(found.half, whole.half)
    assert found.types.max() <= case.types
    assert found.histogram[0].sum() == found.half[0].size
    for name in Result.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name)[1:], getattr(whole, name)[1:], err_msg=name)


def test_nan_stays_near_its_patch() -> None:
    case = CASES[5]
    probs = case.probabilities()
    probs[0, 0, 0, 0] = np.nan
    found = results(run_of(case, probs), case.size[1])
    assert np.isnan(found.half[0, :10, :10]).all()
    assert not np.isnan(found.half[0, 60:, 60:]).any()


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_the_lowest_of_equals_is_the_type(case: Case) -> None:
    probs = np.full((1, case.types + 1, *case.grid), 1 / (case.types + 1), np.float32)
    assert not results(run_of(case, probs), case.size[1]).types.any()
    probs[:, [1, -1]] *= 1.25
    assert (results(run_of(case, probs), case.size[1]).types == 1).all()


def test_a_bank_of_another_size_is_swapped_under_the_same_job() -> None:
    large, small = CASES[8], Case("", (9, 9), (72, 73), sigma=4.0, types=3, batch=1)
    run = run_of(large)
    probs, bank = run.buffers[5:7]
    few = small.probabilities()
    probs.ravel()[: few.size] = few.ravel()
    bank[...] = np.frombuffer(launch.bank_bytes(np.zeros((4, 8), np.float32), 1.0), np.uint8)
    assert_same(results(run, 73), results(run_of(small), 73))


SMALL = [
    Case("defect_map_4", (3, 5), (7, 13), types=9, batch=1),
    Case("defect_map_6", (5, 8), (5, 9), types=9, batch=2),
    Case("defect_map_8", (6, 11), (5, 7), types=9, batch=1),
    Case("defect_map_any", (6, 23), (5, 7), types=9, batch=1),
]


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_sanitizers_find_nothing(case: Case, sanitizer: str) -> None:
    run = run_of(case)
    assert run.launch.kernel == case.kernel
    run.job.channels_at_once = 4
    check_sanitized(run, sanitizer)


@pytest.mark.parametrize("barrier", [name for name in BARRIERS if name.startswith("map")])
def test_without_a_barrier_threads_race(barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(SMALL[1])
    run.job.channels_at_once = 4
    check_barrier(run, barrier, monkeypatch)
