"""Tables that blend tiles, their maps in parts, and BLAS on one thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_edge.kernels import blas, contenders, reference, resample
from dapo_edge.kernels.map_spec import MapSpec


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 40), st.data())
def test_blended_pieces_are_their_weighted_mean(each: int, length: int, data: st.DataObject) -> None:
    """Against the mean with triangular or trapezoid weights, computed sample by sample."""
    steps = data.draw(st.lists(st.integers(1, length), max_size=5))
    starts = [0, *np.cumsum(steps).tolist()]
    size = starts[-1] + length
    piece = resample.bilinear(each, length, align_corners=False)
    values = np.random.default_rng(each).random((len(starts), each))
    expected, total = np.zeros(size), np.zeros(size)
    for number, start in enumerate(starts):
        before = starts[number - 1] + length - start if number else 0
        after = start + length - starts[number + 1] if number + 1 < len(starts) else 0
        made = piece.dense() @ values[number]
        for place in range(length):
            rising = (place + 0.5) / before if before else 1
            falling = (length - place - 0.5) / after if after else 1
            weight = min(1, rising, falling)
            expected[start + place] += weight * made[place]
            total[start + place] += weight
    table = resample.blend(piece, starts, size)
    assert (np.diff(table.starts) >= 0).all()
    np.testing.assert_allclose(table.dense() @ values.ravel(), expected / total, atol=1e-5)
    np.testing.assert_allclose(table.weights.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("starts", "size"), [([1, 5], 15), ([0, 5], 14), ([0, 11], 21), ([0, 5, 5], 15), ([0, 9, 5], 15)]
)
def test_pieces_that_do_not_cover_the_axis(starts: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="don't cover an axis"):
        resample.blend(resample.bilinear(4, 10, align_corners=False), starts, size)


def test_one_tile_has_the_ordinary_tables() -> None:
    spec = MapSpec(image_size=96, grid=(6, 8), temperature=0.07, align_corners=True, smoothing_px=2, score="max")
    rows, columns = spec.tiled_tables((90, 70), (90, 70), (0,), (0,))
    ordinary_rows, ordinary_columns = spec.tables((90, 70))
    assert rows is ordinary_rows
    assert columns is ordinary_columns


@pytest.mark.parametrize("size", [(1700, 300), (5100, 900)])
def test_a_map_of_tiles_is_the_plain_formulas(size: tuple[int, int]) -> None:
    """Both where patches are small on the map and where they are large."""
    width, height = size
    spec = MapSpec(image_size=96, grid=(6, 8), temperature=0.07, align_corners=True, smoothing_px=2, score="max")
    lefts, tops = tuple(width * share // 17 for share in (0, 4, 8, 12)), tuple(height * n // 30 for n in (0, 9, 18))
    rows, columns = spec.tiled_tables(size, (width * 5 // 17, height * 12 // 30), lefts, tops)
    assert contenders.is_worth_it(rows, columns) == (width > 2000)
    scores = np.random.default_rng(0).gumbel(size=(1, 5, 18, 32)).astype(np.float32)
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    channels = reference.upsample_maps(probs, rows, columns)
    maps = reference.defect_map(probs, rows, columns)
    np.testing.assert_allclose(maps.anomaly, 1 - channels[:, 0], atol=2e-6)
    np.testing.assert_allclose(maps.peaks, channels.max(axis=(2, 3)), atol=2e-6)
    assert (maps.types == channels.argmax(axis=1)).mean() > 0.9999
    inside = np.random.default_rng(1).random((height, width)) < 0.5
    masked = reference.defect_map(probs, rows, columns, inside)
    np.testing.assert_array_equal(masked.anomaly, np.where(inside, maps.anomaly, 0))
    np.testing.assert_array_equal(masked.types, np.where(inside, maps.types, 0))
    np.testing.assert_allclose(masked.peaks[:, 1:], (channels[:, 1:] * inside).max(axis=(2, 3)), atol=2e-6)


def test_blas_has_one_thread_inside_and_its_own_number_again_after() -> None:
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController().select(user_api="blas")

    def threads() -> set[int]:
        return {int(library["num_threads"]) for library in controller.info()}

    def inside(_: object) -> set[int]:
        with blas.one_thread():
            return threads()

    before = threads()
    assert inside(None) == {1}
    assert threads() == before
    with ThreadPoolExecutor(4) as pool:
        assert all(found == {1} for found in pool.map(inside, range(200)))
    assert threads() == before
    with pytest.raises(RuntimeError, match="inside"), blas.one_thread():
        raise RuntimeError("inside")
    assert threads() == before
