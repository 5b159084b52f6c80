"""Bytes that a frame's way touches outside of the encoder, counted from shapes, and a straight line through them.

Every read and every write of an array counts, wherever it is served from: a pass over an array that fits a cache is
cheaper than one over memory, so the bandwidth of a fit is between that of the caches and that of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.kernels.contenders import contenders, is_worth_it
from dapo_edge.kernels.resample import TapTable, pillow_bicubic

FLOAT = 4
# Passes over an array, as `backends.host` and `kernels.reference` make them.
LEVELS_PASSES = 8  # product, half added, floor, clip, read again
LOGIT_PASSES = 15  # product, transposed copy, division, softmax in place, mean over layers
ANOMALY_PASSES = 6  # product, clip in place, lowest value, score, highest value
TYPE_PASSES = 2
# Of each pixel of a channel that contends: product, comparison, best so far, winner.
CHANNEL_BYTES = 6 * FLOAT + 5


@dataclass(frozen=True)
class Cut:
    """What the encoder sees of a frame: so many views of one size."""

    views: int
    width: int
    height: int


def preprocess_bytes(cut: Cut, size: int) -> int:
    """Box reduction, columns, rows, and the encoder's own input of [size, size, 3]; see `host.resize_view`."""
    if (cut.width, cut.height) == (size, size):
        return cut.views * 2 * 3 * size * size
    across, down = pillow_bicubic(cut.width, size).factor, pillow_bicubic(cut.height, size).factor
    reduced = -(-cut.width // across) * -(-cut.height // down)
    narrow = size * -(-cut.height // down)
    of_frame = 3 * cut.width * cut.height if across * down > 1 else 0
    of_means = (3 * 4 + 3 * 2 * FLOAT) * reduced  # written, read as planes, written, read, written as floats, read
    of_levels = 3 * LEVELS_PASSES * FLOAT * (narrow + size * size)
    return cut.views * (of_frame + of_means + of_levels + 3 * 5 * size * size)


def probability_bytes(tokens: Sequence[int], channels: int) -> int:
    """Patch tokens [B, L, N, D] read twice, and `channels` logits of each; see `reference.patch_probabilities`."""
    batch, layers, patches, width = tokens
    each = batch * layers * patches
    return each * FLOAT * (2 * width + LOGIT_PASSES * channels)


def map_bytes(size: tuple[int, int], channel_pixels: int) -> int:
    """Anomaly and type of (width, height) pixels, and the channels that are upsampled; see `reference.defect_map`."""
    pixels = size[0] * size[1]
    return pixels * (FLOAT * ANOMALY_PASSES + TYPE_PASSES) + CHANNEL_BYTES * channel_pixels


def all_channel_pixels(size: tuple[int, int], channels: int) -> int:
    """When no channel can be left out anywhere."""
    return channels * size[0] * size[1]


def contending_pixels(probs: NDArray[np.float32], rows: TapTable, columns: TapTable) -> int:
    """Pixels of all channels [K+1, h, w] that the type map upsamples.

    On large maps only those blocks of a channel where it may win against another one; what is upsampled for a peak
    alone is not known without doing it, and left out.
    """
    if not is_worth_it(rows, columns):
        return all_channel_pixels((columns.size_out, rows.size_out), len(probs))
    need = contenders(probs, rows, columns, None)
    rivals = need.may_win.sum(axis=0)  # [blocks down, blocks right]
    heights = np.array([span.made.stop - span.made.start for span in need.down])
    widths = np.array([span.made.stop - span.made.start for span in need.right])
    return int((np.where(rivals > 1, rivals, 0) * np.outer(heights, widths)).sum())


@dataclass(frozen=True)
class Fit:
    """ms = fixed_ms + bytes / gb_per_s."""

    fixed_ms: float
    gb_per_s: float | None  # None: the time does not grow with the bytes

    def ms(self, touched: float) -> float:
        """What so many bytes should take."""
        return self.fixed_ms + (touched / self.gb_per_s / 1e6 if self.gb_per_s else 0.0)


def fitted(touched: Sequence[float], ms: Sequence[float]) -> Fit:
    """The line with the least relative deviations; neither of its two constants is negative.

    Raises `ValueError` for fewer than two points or times that are not positive.
    """
    x, y = np.asarray(touched, np.float64), np.asarray(ms, np.float64)
    if len(x) < 2 or len(x) != len(y) or not (y > 0).all():
        raise ValueError("a line needs two points at least, with times above 0")
    fixed, slope = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)[0]
    if np.ptp(x) == 0 or slope <= 0:
        return Fit(float((1 / y).sum() / np.square(1 / y).sum()), None)
    if fixed < 0:
        fixed, slope = 0.0, float((x / y).sum() / np.square(x / y).sum())
    return Fit(float(fixed), float(1 / slope / 1e6))
