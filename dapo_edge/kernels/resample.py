"""Resizing and smoothing as 1-D tap tables: for each output row a start index and a few weights.

Every step here is linear and separable, so a chain of them is `A_y · image · A_xᵀ` with banded matrices, and two steps
compose into one table by multiplication. The CPU multiplies the dense form; the CUDA kernels read starts and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

# What float64 leaves where a weight is zero on paper; real weights are many orders of magnitude above it.
_NOISE = 1e-12
_PILLOWS_STEP = 2.0**-22  # of its fixed-point weights for bytes (PRECISION_BITS in Resample.c), which float32 holds
_BAND = 16  # rows of one product: fewer cost calls, more multiply zeros


@dataclass(frozen=True, eq=False)
class TapTable:
    """A banded `[size_out, size_in]` matrix that maps one axis: `out[i] = sum_t weights[i, t] · in[starts[i] + t]`.

    The window never leaves the input (`0 <= starts` and `starts + taps <= size_in`), so a kernel needs no border test.
    Each row sums to 1. Both arrays are read-only. Raises `ValueError` where shapes or windows don't fit.
    """

    starts: NDArray[np.int32]  # [size_out]
    weights: FloatArray  # [size_out, taps]
    size_in: int

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.starts.shape != self.weights.shape[:1] or self.weights.size == 0:
            raise ValueError(f"starts {self.starts.shape} and weights {self.weights.shape} are not [n] and [n, taps]")
        if self.starts.min() < 0 or self.starts.max() + self.taps > self.size_in:
            raise ValueError(f"a window of {self.taps} taps leaves the input of size {self.size_in}")
        # Tables are shared through caches: a caller that writes into one would change every later frame.
        self.starts.setflags(write=False)
        self.weights.setflags(write=False)

    @property
    def size_out(self) -> int:
        """Number of output rows."""
        return self.weights.shape[0]

    @property
    def taps(self) -> int:
        """Number of weights per output row."""
        return self.weights.shape[1]

    def dense(self) -> FloatArray:
        """The same matrix with its zeros, `[size_out, size_in]` float32, read-only, computed once per table."""
        return self._dense

    @cached_property
    def _dense(self) -> FloatArray:
        matrix = np.zeros((self.size_out, self.size_in), np.float32)  # [size_out, size_in]
        np.put_along_axis(matrix, self.starts[:, None] + np.arange(self.taps), self.weights, axis=1)
        matrix.setflags(write=False)
        return matrix

    @cached_property
    def _bands(self) -> list[Span]:
        return parts(self, _BAND)

    def apply(self, array: FloatArray, axis: int) -> FloatArray:
        """Resample one axis of `array` [., .] or more: its length `size_in` becomes `size_out`. Float32 in and out."""
        if array.shape[axis] != self.size_in:
            raise ValueError(f"axis {axis} of an array {array.shape} is not of size {self.size_in}")
        if axis in (-1, array.ndim - 1):
            wide = np.empty((*array.shape[:-1], self.size_out), np.float32)
            for band in self._bands:
                np.matmul(array[..., band.read], self.dense()[band.made, band.read].T, out=wide[..., band.made])
            return wide
        upright = np.moveaxis(array, axis, -2)
        tall = np.empty((*upright.shape[:-2], self.size_out, upright.shape[-1]), np.float32)
        for band in self._bands:
            np.matmul(self.dense()[band.made, band.read], upright[..., band.read, :], out=tall[..., band.made, :])
        return np.moveaxis(tall, -2, axis)

    def __matmul__(self, inner: TapTable) -> TapTable:
        return compose(self, inner)


@dataclass(frozen=True)
class Span:
    """Part of what a table makes, and the part of its input that this is made of."""

    made: slice
    read: slice


def spans(table: TapTable, starts: Sequence[int]) -> list[Span]:
    """What a table makes, cut before each of `starts`, the first of which is 0."""
    found = []
    for start, end in zip(starts, [*starts[1:], table.size_out], strict=True):
        first = table.starts[start:end]
        found.append(Span(slice(start, end), slice(int(first.min()), int(first.max()) + table.taps)))
    return found


def parts(table: TapTable, step: int) -> list[Span]:
    """What a table makes, cut into parts of `step`; the last one may be smaller.

    A product with `dense()[made, read]` leaves out most of a banded matrix' zeros.
    """
    return spans(table, range(0, table.size_out, step))


def compose(outer: TapTable, inner: TapTable) -> TapTable:
    """The table that applies `inner`, then `outer` (also written `outer @ inner`): a banded matrix product.

    Multiplied in float64 and trimmed to the real support. Raises `ValueError` if `inner` doesn't fill `outer`.
    """
    if outer.size_in != inner.size_out:
        raise ValueError(f"the outer table reads {outer.size_in} values, the inner one makes {inner.size_out}")
    middle = outer.starts[:, None] + np.arange(outer.taps)  # [size_out, outer.taps], rows of `inner`
    reached = inner.starts[middle]  # [size_out, outer.taps], where each of those rows starts to read
    starts = reached.min(axis=1)
    offsets = reached - starts[:, None]
    product = np.zeros((outer.size_out, int(offsets.max()) + inner.taps))  # [size_out, width] float64
    every_row = np.arange(outer.size_out)[:, None]
    # One outer tap at a time: a dense product of two frame-sized tables would need hundreds of megabytes.
    for tap in range(outer.taps):
        weights = outer.weights[:, tap, None].astype(np.float64) * inner.weights[middle[:, tap]]
        product[every_row, offsets[:, tap, None] + np.arange(inner.taps)] += weights
    return _pack(starts, product, inner.size_in)


def bicubic(size_in: int, size_out: int) -> TapTable:
    """Antialiased bicubic with a = -0.5: what Pillow's `Image.resize(size, BICUBIC)` does to one axis.

    Source: Keys' cubic convolution kernel (https://ieeexplore.ieee.org/document/1163711), windowed as in Pillow's
    `precompute_coeffs` (https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c): the support grows
    with the downscale factor, is cut at the borders and normalised. Raises `ValueError` for sizes below 1.
    """
    _check_sizes(size_in, size_out)
    return _bicubic(size_in, float(size_in), size_out, 0)


@dataclass(frozen=True, eq=False)
class ReducedTable:
    """How Pillow shrinks one axis: means of `factor` neighbours (the last cell of what is left), then a tap table."""

    factor: int
    table: TapTable  # from ceil(size_in / factor)


@lru_cache(maxsize=64)
def pillow_bicubic(size_in: int, size_out: int, reducing_gap: float = 2.0) -> ReducedTable:
    """Box reduction, then bicubic: one axis of Pillow's `Image.resize(size, BICUBIC, reducing_gap=reducing_gap)`.

    Source: `Image.resize` (https://github.com/python-pillow/Pillow/blob/main/src/PIL/Image.py): the reduction factor is
    `int(size_in / size_out / reducing_gap) or 1`, and bicubic reads the box `[0, size_in / factor]`, which ends inside
    the last reduced value when the factor doesn't divide the size. On 8-bit images Pillow rounds after the reduction of
    both axes, and clips and rounds after each of the two passes. Code that wants its pixels must do the same: where a
    clip is left out, black-and-white edges differ by up to 20 grey levels. Raises `ValueError` for sizes or a gap
    below 1.
    """
    _check_sizes(size_in, size_out)
    if not (math.isfinite(reducing_gap) and reducing_gap >= 1):
        raise ValueError(f"reducing_gap must be a number of 1 or more, not {reducing_gap}")
    factor = int(size_in / size_out / reducing_gap) or 1
    # Pillow hands its box over as C floats.
    extent = float(np.float32(size_in / factor))
    return ReducedTable(factor, _bicubic(-(-size_in // factor), extent, size_out, _PILLOWS_STEP))


def bilinear(size_in: int, size_out: int, align_corners: bool) -> TapTable:
    """Linear interpolation without antialiasing: torch's `interpolate(mode="bilinear", align_corners=...)` on one axis.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.interpolate.html; with `align_corners`
    the outermost samples coincide, without it the outermost pixel edges do and positions are clamped to the first and
    last sample. Raises `ValueError` for sizes below 1.
    """
    _check_sizes(size_in, size_out)
    output = np.arange(size_out)
    if align_corners:
        position = output * ((size_in - 1) / max(size_out - 1, 1))
    else:
        position = np.clip((output + 0.5) * (size_in / size_out) - 0.5, 0, size_in - 1)
    starts = np.minimum(position.astype(np.int64), max(size_in - 2, 0))  # [size_out]
    fraction = position - starts
    return _pack(starts, np.stack([1 - fraction, fraction], axis=1), size_in)


def gaussian(size: int, sigma: float) -> TapTable:
    """Gaussian smoothing, cut at 4 sigma, with the edge repeated in the mirror (d c b a | a b c d | d c b a).

    `sigma` is in samples of this axis; 0 is the identity. Source: `scipy.ndimage.gaussian_filter(mode="reflect",
    truncate=4)` (https://docs.scipy.org/doc/scipy/reference/generated/scipy.ndimage.gaussian_filter.html), which is
    OpenCV's `BORDER_REFLECT`. Raises `ValueError` for a size below 1 or a sigma that is negative or not finite.
    """
    _check_sizes(size)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be 0 or a positive number, not {sigma}")
    radius = int(4 * sigma + 0.5)
    distance = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (distance / sigma) ** 2) if radius else np.ones(1)  # [2 · radius + 1]
    # The mirrored signal repeats every 2 · size samples, so folding the kernel to one period covers any radius.
    period = 2 * size
    folded = np.bincount(distance % period, weights=kernel, minlength=period)  # [period]
    taps = min(len(kernel), size)
    row = np.arange(size)[:, None]
    starts = np.clip(row[:, 0] - radius, 0, size - taps)  # [size]
    column = starts[:, None] + np.arange(taps)  # [size, taps]
    return _pack(starts, folded[(column - row) % period] + folded[(-1 - column - row) % period], size)


@lru_cache(maxsize=64)
def upsample(size_in: int, size_out: int, *, align_corners: bool, sigma: float) -> TapTable:
    """From the patch grid to the map in one table: `gaussian(size_out, sigma) @ bilinear(size_in, size_out)`.

    `sigma` is in pixels of the map. Source: see `gaussian` and `bilinear`, and their errors too.
    """
    return gaussian(size_out, sigma) @ bilinear(size_in, size_out, align_corners)


def blend(piece: TapTable, starts: Sequence[int], size_out: int) -> TapTable:
    """Overlapping pieces as one axis: from the samples of all pieces side by side, `[len(starts) · piece.size_in]`.

    Each piece makes `piece.size_out` values from `starts[i]` on. Where pieces overlap, each one's weight falls linearly
    to 0 over the overlap with its neighbour (feathering: Szeliski, Image Alignment and Stitching, section 6,
    https://doi.org/10.1561/0600000009). Raises `ValueError` where starts go backwards or leave gaps.
    """
    length, each = piece.size_out, piece.size_in
    ends = [start + length for start in starts]
    steps = np.diff(starts)
    if starts[0] != 0 or ends[-1] != size_out or (steps <= 0).any() or (steps > length).any():
        raise ValueError(f"pieces of {length} at {list(starts)} don't cover an axis of {size_out}")
    first = np.zeros(size_out, np.int64)  # per output row: the first column that any piece gives it
    last = np.zeros(size_out, np.int64)
    for number, start in reversed(list(enumerate(starts))):
        first[start : start + length] = number * each + piece.starts
    for number, start in enumerate(starts):
        last[start : start + length] = number * each + piece.starts + piece.taps
    weights = np.zeros((size_out, int((last - first).max())))  # [size_out, taps] float64
    overlaps = [0, *(length - steps), 0]  # of each piece with the one before it
    for number, start in enumerate(starts):
        share = np.minimum(_rising(length, overlaps[number]), _rising(length, overlaps[number + 1])[::-1])
        rows = np.arange(start, start + length)[:, None]
        columns = number * each + piece.starts[:, None] + np.arange(piece.taps) - first[rows]
        weights[rows, columns] += share[:, None] * piece.weights
    return _pack(first, weights, len(starts) * each)


def _rising(length: int, overlap: int) -> NDArray[np.float64]:
    """Rises linearly over the first `overlap` of `length` samples, then stays at 1."""
    return np.minimum(1, (np.arange(length) + 0.5) / max(overlap, 0.5))


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"sizes and factors must be 1 or more, not {min(sizes)}")


def _bicubic(size_in: int, extent: float, size_out: int, step: float) -> TapTable:
    """Bicubic of the part `[0, extent]` of an axis with `size_in` samples."""
    scale = extent / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(size_out) + 0.5) * scale  # [size_out]
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), size_in)
    column = first[:, None] + np.arange(int((end - first).max()))  # [size_out, taps]
    x = np.abs((column - centre[:, None] + 0.5) / stretch)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weights[(x >= 2) | (column >= end[:, None])] = 0
    return _pack(first, weights, size_in, step)


def _pack(starts: NDArray[np.integer], weights: NDArray[np.float64], size_in: int, step: float = 0) -> TapTable:
    """Normalise the rows, trim them to the widest real support and slide the windows into `[0, size_in)`.

    With a `step`, weights become multiples of it. No window starts before that of the row above: a kernel's tile of
    rows reads from the first start on.
    """
    used = np.abs(weights) > _NOISE  # [size_out, width]
    first = starts + used.argmax(axis=1)
    last = starts + weights.shape[1] - 1 - used[:, ::-1].argmax(axis=1)
    # A row whose outer weights happen to be zero must not start later than the next one.
    packed_starts = np.minimum.accumulate(first[::-1])[::-1]
    taps = int((last - packed_starts).max()) + 1
    packed_starts = np.minimum(packed_starts, size_in - taps)  # [size_out]
    column = packed_starts[:, None] + np.arange(taps)  # [size_out, taps]
    source = column - starts[:, None]  # columns of `weights`
    inside = (column >= first[:, None]) & (column <= last[:, None])
    packed = np.where(inside, np.take_along_axis(weights, np.where(inside, source, 0), axis=1), 0)
    packed /= packed.sum(axis=1, keepdims=True)
    if step:
        packed = np.rint(packed / step) * step
    return TapTable(packed_starts.astype(np.int32), packed.astype(np.float32), size_in)
