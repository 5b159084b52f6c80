"""Tap tables against the libraries whose formulas they restate: Pillow, torch, SciPy and OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from dapo_edge.kernels import resample
from dapo_edge.kernels.resample import TapTable, compose

FloatArray = NDArray[np.float32]

# Images are in [0, 1]. Tables and libraries both round to float32: a few units in the last place of 1.
ROUNDING = 1e-6

# (width, height) in, (width, height) out
RESIZES = [
    ((1920, 1080), (224, 224)),
    ((1080, 777), (518, 301)),
    ((101, 90), (224, 224)),
    ((225, 224), (224, 225)),
    ((64, 48), (64, 48)),
    ((3001, 700), (97, 336)),
    ((1, 5), (9, 1)),
    ((37, 1), (1, 7)),
    ((2, 3), (1, 1)),
]

sizes = st.integers(min_value=1, max_value=40)
sigmas = st.floats(min_value=0, max_value=30)


def picture(width: int, height: int) -> FloatArray:
    """Noise, the hardest input for a resampler: [height, width] in [0, 1]."""
    return np.random.default_rng(width * 10_000 + height).random((height, width), dtype=np.float32)


def apply_both(rows: TapTable, columns: TapTable, image: FloatArray) -> FloatArray:
    return columns.apply(rows.apply(image, axis=0), axis=1)


@pytest.mark.parametrize(("size_in", "size_out"), RESIZES)
def test_bicubic_is_pillows(size_in: tuple[int, int], size_out: tuple[int, int]) -> None:
    image = picture(*size_in)
    columns, rows = (resample.bicubic(i, o) for i, o in zip(size_in, size_out, strict=True))
    pillow = np.asarray(Image.fromarray(image).resize(size_out, Image.Resampling.BICUBIC))
    np.testing.assert_allclose(apply_both(rows, columns, image), pillow, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("size_in", "size_out"), RESIZES)
@pytest.mark.parametrize("gap", [1.0, 2.0, 3.0])
def test_pillow_bicubic_is_pillows_with_reducing_gap(
    size_in: tuple[int, int], size_out: tuple[int, int], gap: float
) -> None:
    image = picture(*size_in)
    columns, rows = (resample.pillow_bicubic(i, o, gap) for i, o in zip(size_in, size_out, strict=True))
    reduced = np.asarray(Image.fromarray(image).reduce((columns.factor, rows.factor)))
    pillow = np.asarray(Image.fromarray(image).resize(size_out, Image.Resampling.BICUBIC, reducing_gap=gap))
    np.testing.assert_allclose(apply_both(rows.table, columns.table, reduced), pillow, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("size_in", "size_out"), RESIZES)
def test_bilinear_is_torchs(size_in: tuple[int, int], size_out: tuple[int, int], align_corners: bool) -> None:
    """In float64, because torch's own float32 positions are off by 1e-7 of the size."""
    image = picture(*size_in)
    columns, rows = (resample.bilinear(i, o, align_corners) for i, o in zip(size_in, size_out, strict=True))
    tensor = torch.from_numpy(image).double()[None, None]
    theirs = torch.nn.functional.interpolate(tensor, size_out[::-1], mode="bilinear", align_corners=align_corners)
    np.testing.assert_allclose(apply_both(rows, columns, image), theirs[0, 0].numpy(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("size", "sigma"), [(50, 0.1), (50, 0.7), (51, 4.0), (336, 4.0), (7, 30.0), (1, 3.0), (2, 500)]
)
def test_gaussian_is_scipys_and_opencvs(size: int, sigma: float) -> None:
    """SciPy on float64; OpenCV sums in float32, over as many as 4001 taps."""
    image = picture(size + 3, size)
    ours = apply_both(resample.gaussian(size, sigma), resample.gaussian(size + 3, sigma), image)
    scipy = gaussian_filter(image.astype(np.float64), sigma, mode="reflect", truncate=4)
    np.testing.assert_allclose(ours, scipy, rtol=0, atol=ROUNDING)
    kernel = 2 * int(4 * sigma + 0.5) + 1
    opencv = cv2.GaussianBlur(image, (kernel, kernel), sigma, borderType=cv2.BORDER_REFLECT)
    np.testing.assert_allclose(ours, opencv, rtol=0, atol=5e-6)


def test_gaussian_of_zero_is_the_identity() -> None:
    np.testing.assert_array_equal(resample.gaussian(9, 0).dense(), np.eye(9, dtype=np.float32))


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsample_is_interpolation_then_smoothing(align_corners: bool) -> None:
    image = picture(24, 18)
    rows = resample.upsample(18, 240, align_corners=align_corners, sigma=4.0)
    columns = resample.upsample(24, 336, align_corners=align_corners, sigma=5.0)
    tensor = torch.from_numpy(image).double()[None, None]
    large = torch.nn.functional.interpolate(tensor, (240, 336), mode="bilinear", align_corners=align_corners)
    expected = gaussian_filter(large[0, 0].numpy(), (4.0, 5.0), mode="reflect", truncate=4)
    np.testing.assert_allclose(apply_both(rows, columns, image), expected, rtol=0, atol=ROUNDING)
    assert rows.taps <= 5  # the band stays narrow: that is why one pass is enough


def test_upsample_is_made_once() -> None:
    first = resample.upsample(14, 224, align_corners=True, sigma=4.0)
    assert resample.upsample(14, 224, align_corners=True, sigma=4.0) is first
    assert first.dense() is first.dense()


def test_arrays_are_read_only() -> None:
    table = resample.bicubic(9, 4)
    for array in (table.starts, table.weights, table.dense()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def check_table(table: TapTable, size_in: int, size_out: int) -> None:
    assert (table.size_in, table.size_out) == (size_in, size_out)
    assert (table.starts.dtype, table.weights.dtype, table.dense().dtype) == (np.int32, np.float32, np.float32)
    assert table.starts.min() >= 0
    assert table.starts.max() + table.taps <= size_in
    np.testing.assert_allclose(table.weights.sum(axis=1, dtype=np.float64), 1, rtol=0, atol=ROUNDING)
    image = picture(3, size_in)
    direct = np.stack([w @ image[s : s + table.taps] for s, w in zip(table.starts, table.weights, strict=True)])
    np.testing.assert_allclose(table.apply(image, 0), direct, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(table.dense() @ image, direct, rtol=0, atol=ROUNDING)


@settings(max_examples=40, deadline=None)
@given(size_in=sizes, size_out=sizes, sigma=sigmas, align_corners=st.booleans())
def test_every_table_is_well_formed(size_in: int, size_out: int, sigma: float, align_corners: bool) -> None:
    check_table(resample.bicubic(size_in, size_out), size_in, size_out)
    reduced = resample.pillow_bicubic(size_in, size_out)
    check_table(reduced.table, -(-size_in // reduced.factor), size_out)
    check_table(resample.bilinear(size_in, size_out, align_corners), size_in, size_out)
    check_table(resample.gaussian(size_in, sigma), size_in, size_in)
    check_table(resample.upsample(size_in, size_out, align_corners=align_corners, sigma=sigma), size_in, size_out)


@settings(max_examples=40, deadline=None)
@given(first=sizes, second=sizes, third=sizes)
def test_a_composition_is_one_after_the_other(first: int, second: int, third: int) -> None:
    inner, outer = resample.bicubic(first, second), resample.bilinear(second, third, True)
    image = picture(first, 3)
    both = compose(outer, inner)
    np.testing.assert_array_equal(both.dense(), (outer @ inner).dense())
    # Bicubic weights reach beyond [0, 1], so the intermediate values do too.
    np.testing.assert_allclose(both.apply(image, 1), outer.apply(inner.apply(image, 1), 1), rtol=0, atol=2 * ROUNDING)


@settings(max_examples=40, deadline=None)
@given(size_in=sizes, size_out=sizes)
def test_bicubic_of_any_size_is_pillows(size_in: int, size_out: int) -> None:
    image = picture(size_in, 3)
    pillow = Image.fromarray(image).resize((size_out, 3), Image.Resampling.BICUBIC, reducing_gap=2.0)
    ours = resample.pillow_bicubic(size_in, size_out)
    reduced = np.asarray(Image.fromarray(image).reduce((ours.factor, 1)))
    np.testing.assert_allclose(ours.table.apply(reduced, axis=1), np.asarray(pillow), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("sizes_given", [(0, 4), (4, 0), (-1, 4)])
def test_sizes_below_one_are_refused(sizes_given: tuple[int, int]) -> None:
    for build in (resample.bicubic, resample.pillow_bicubic):
        with pytest.raises(ValueError, match="1 or more"):
            build(*sizes_given)
    with pytest.raises(ValueError, match="1 or more"):
        resample.bilinear(*sizes_given, align_corners=True)
    with pytest.raises(ValueError, match="1 or more"):
        resample.gaussian(0, 1.0)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_a_meaningless_sigma_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be"):
        resample.gaussian(8, sigma)


def test_a_gap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="reducing_gap"):
        resample.pillow_bicubic(8, 4, 0.5)


def test_a_table_applies_along_any_axis_of_any_memory_layout() -> None:
    """Windows that fall from one row to the next among them."""
    falling = TapTable(np.arange(37, dtype=np.int32)[::-1].copy(), np.full((37, 3), 1 / 3, np.float32), size_in=39)
    array = np.random.default_rng(0).random((5, 78, 39), np.float32)[:, ::-2].transpose(1, 0, 2)  # [39, 5, 39]
    for table in (falling, resample.pillow_bicubic(39, 50).table):
        for axis in (0, 2, -1, -3):
            direct = np.moveaxis(np.tensordot(table.dense(), array, axes=(1, axis)), 0, axis)
            np.testing.assert_allclose(table.apply(array, axis), direct, rtol=0, atol=1e-6)
        np.testing.assert_allclose(table.apply(array[:, 0, 0], 0), table.dense() @ array[:, 0, 0], rtol=0, atol=1e-6)


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="reads 8 values, the inner one makes 7"):
        compose(resample.gaussian(8, 1.0), resample.bicubic(4, 7))
    with pytest.raises(ValueError, match="not of size 8"):
        resample.gaussian(8, 1.0).apply(picture(8, 9), axis=0)
    with pytest.raises(ValueError, match="leaves the input"):
        TapTable(np.array([0, 3], np.int32), np.full((2, 2), 0.5, np.float32), size_in=4)
    with pytest.raises(ValueError, match="are not"):
        TapTable(np.array([0], np.int32), np.full((2, 2), 0.5, np.float32), size_in=4)
