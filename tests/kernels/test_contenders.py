"""What is left out of large maps changes nothing: bounds that hold, and maps that are the plain formula's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dapo_edge.kernels import reference, resample
from dapo_edge.kernels.contenders import contenders, is_worth_it
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.resample import TapTable

FloatArray = NDArray[np.float32]

ROUNDING = 2e-6  # of float32 sums of probabilities


def probabilities(seed: int, channels: int, grid: tuple[int, int], spread: float, normal: float) -> FloatArray:
    """Softmax of noise, `normal` ahead by that much: flat for a small spread, mostly normal with few defects else."""
    scores = np.random.default_rng(seed).normal(0, spread, (channels, *grid))
    scores[0] += normal
    shares = np.exp(scores - scores.max(axis=0))
    return (shares / shares.sum(axis=0)).astype(np.float32)


def tables(grid: tuple[int, int], size: tuple[int, int], sigma: float, align: bool = True) -> tuple[TapTable, TapTable]:
    rows, columns = (
        resample.upsample(patches, pixels, align_corners=align, sigma=sigma)
        for patches, pixels in zip(grid, size, strict=True)
    )
    return rows, columns


def check_against_the_formula(
    probs: FloatArray, rows: TapTable, columns: TapTable, inside: NDArray[np.bool_] | None = None
) -> None:
    channels = reference.upsample_maps(probs[None], rows, columns)[0]
    maps = reference.defect_map(probs[None], rows, columns, inside)
    shown = np.ones(channels.shape[1:], np.bool_) if inside is None else inside
    np.testing.assert_allclose(maps.anomaly[0], (1 - channels[0]) * shown, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(maps.peaks[0, 1:], (channels[1:] * shown).max(axis=(1, 2)), rtol=0, atol=ROUNDING)
    chosen = np.take_along_axis(channels, maps.types.astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(chosen[shown], channels.max(axis=0)[shown], rtol=0, atol=ROUNDING)
    assert not maps.types[0][~shown].any()
    if len(channels) > 1:
        second, first = np.sort(channels, axis=0)[-2:]
        clear = shown & (first - second > 2 * ROUNDING)
        np.testing.assert_array_equal(maps.types[0][clear], channels.argmax(axis=0)[clear])


large_maps = {
    "seed": st.integers(0, 10**6),
    "grid": st.tuples(st.integers(1, 6), st.integers(1, 6)),
    "per_patch": st.tuples(st.integers(25, 90), st.integers(25, 90)),
    "channels": st.integers(1, 9),
    "sigma": st.sampled_from([0.0, 3.0, 15.0, 60.0]),
    "spread": st.sampled_from([0.01, 1.0, 4.0]),
    "normal": st.sampled_from([0.0, 6.0]),
}


@settings(max_examples=60, deadline=None)
@given(align=st.booleans(), masked=st.booleans(), **large_maps)
def test_a_large_map_is_the_plain_formulas(
    seed: int,
    grid: tuple[int, int],
    per_patch: tuple[int, int],
    channels: int,
    sigma: float,
    spread: float,
    normal: float,
    align: bool,
    masked: bool,
) -> None:
    size = (grid[0] * per_patch[0] + seed % 7, grid[1] * per_patch[1] + seed % 11)
    rows, columns = tables(grid, size, sigma, align)
    assert is_worth_it(rows, columns)
    rng = np.random.default_rng(seed)
    inside = rng.random(size) < rng.choice([0.001, 0.5]) if masked else None
    check_against_the_formula(probabilities(seed, channels, grid, spread, normal), rows, columns, inside)


@settings(max_examples=40, deadline=None)
@given(**large_maps)
def test_the_bounds_hold(
    seed: int,
    grid: tuple[int, int],
    per_patch: tuple[int, int],
    channels: int,
    sigma: float,
    spread: float,
    normal: float,
) -> None:
    size = (grid[0] * per_patch[0], grid[1] * per_patch[1])
    rows, columns = tables(grid, size, sigma)
    probs = probabilities(seed, channels, grid, spread, normal)
    need = contenders(probs, rows, columns, None)
    every = reference.upsample_maps(probs[None], rows, columns)[0]
    assert (need.reached <= every.max(axis=(1, 2)) + ROUNDING).all()
    covered = np.zeros(size, np.int64)
    for i, down in enumerate(need.down):
        for j, right in enumerate(need.right):
            covered[down.made, right.made] += 1
            block = every[:, down.made, right.made]
            assert (block.max(axis=(1, 2)) <= need.bound[:, i, j]).all()
            assert need.may_win[np.unique(block.argmax(axis=0)), i, j].all()
    assert (covered == 1).all()


def test_most_of_a_normal_map_is_left_out() -> None:
    probs = probabilities(1, 21, (14, 14), 0.5, 6.0)
    probs[:, 4, 9] = 0
    probs[7, 4, 9] = 1
    rows, columns = tables((14, 14), (1080, 1920), 10.0)
    need = contenders(probs, rows, columns, None)
    assert need.may_win[0].mean() > 0.95
    assert 1 <= need.may_win[7].sum() <= 12
    assert not need.may_win[[*range(1, 7), *range(8, 21)]].any()
    assert (need.bound > need.reached[:, None, None]).sum(axis=(1, 2))[1:].max() <= 12
    check_against_the_formula(probs, rows, columns)


def test_ties_go_to_the_lowest_index_on_a_large_map_too() -> None:
    probs = np.full((6, 3, 4), 0.01, np.float32)
    probs[[2, 4]] = 0.48
    assert (reference.type_map(probs[None], *tables((3, 4), (150, 300), 4.0)) == 2).all()


def test_equal_channels_are_all_contenders() -> None:
    probs = np.full((8, 3, 3), 1 / 8, np.float32)
    assert contenders(probs, *tables((3, 3), (200, 200), 2.0), None).may_win.all()


def test_values_that_are_no_numbers_show_in_the_anomaly_map() -> None:
    probs = probabilities(0, 4, (3, 4), 1.0, 0.0)
    probs[:, 1, 2] = np.nan
    maps = reference.defect_map(probs[None], *tables((3, 4), (150, 300), 4.0))
    assert np.isnan(maps.anomaly.max())


@pytest.mark.parametrize(("size", "worth"), [((224, 224), False), ((1080, 1920), True), ((1080, 200), False)])
def test_small_patches_are_not_worth_it(size: tuple[int, int], worth: bool) -> None:
    assert is_worth_it(*tables((14, 14), size, 0.0)) == worth


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    size=st.tuples(st.integers(3, 300), st.integers(1, 300)),
    sigma=st.floats(0, 30),
    align=st.booleans(),
)
def test_tables_of_maps_hold_what_the_bounds_need(
    grid: tuple[int, int], size: tuple[int, int], sigma: float, align: bool
) -> None:
    spec = MapSpec(image_size=100, grid=grid, temperature=0.07, align_corners=align, smoothing_px=sigma, score="max")
    whole = spec.tables(size)
    tiled = spec.tiled_tables((size[0] * 2, size[1]), size, (0, size[0] - size[0] // 3, size[0]), (0,))
    for table in (*whole, *tiled):
        assert table.weights.min() >= 0
        np.testing.assert_allclose(table.weights.sum(axis=1), 1, rtol=0, atol=ROUNDING)
        assert (np.diff(table.starts) >= 0).all()
