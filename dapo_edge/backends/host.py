"""The parts of the frame path that run on the host: the resize before the encoder, the map arithmetic after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch, View
from dapo_edge.extras import require
from dapo_edge.kernels import reference
from dapo_edge.kernels.blas import one_thread
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.pixels import PixelView, reduce_boxes, to_levels
from dapo_edge.kernels.resample import pillow_bicubic
from dapo_edge.prompt_bank import PromptBank


def resize_view(view: View, size: int) -> NDArray[np.uint8]:
    """Resize [H, W, 3] to [size, size, 3]; channel order is kept, the aspect ratio is not (as in DAPO).

    A camera's own bytes become BGR. Box reduction, then antialiased bicubic, columns first, rounded after each, as
    `pixels.preprocess` defines: Pillow's `resize(BICUBIC, reducing_gap=2.0)` to a grey level (3 on noise), much faster
    than plain bicubic and equal to it on smooth pictures. Every phase (tuning, calibration, evaluation, run time) uses
    this one resize, so its choice costs no accuracy.
    """
    if isinstance(view, PixelView):
        view = view.bgr()
    height, width = view.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(view)
    cv2 = require("cv2")
    columns, rows = pillow_bicubic(width, size), pillow_bicubic(height, size)
    means = _box_means(cv2, view, columns.factor, rows.factor)
    planes = np.empty((3, *means.shape[:2]), np.float32)
    for plane, channel in zip(planes, cv2.split(means), strict=True):
        plane[...] = channel
    with one_thread():
        narrow = to_levels(columns.table.apply(planes, axis=2))
        small = to_levels(rows.table.apply(narrow, axis=1))
    resized: NDArray[np.uint8] = cv2.merge(list(small.astype(np.uint8)))
    return resized


def _box_means(cv2: ModuleType, view: NDArray[np.uint8], across: int, down: int) -> NDArray[np.uint8]:
    """`reduce_boxes`, [H, W, 3] to [ceil(H / down), ceil(W / across), 3], by OpenCV wherever boxes are full.

    A mean may be a level off. OpenCV rounds halves to even: in boxes of 8 pixels one of 16 is lower. And it divides,
    where the reciprocal of `reduce_boxes` falls short: in boxes of 3 pixels one of 3 is higher.
    """
    view = view if view.strides[0] > 0 else np.ascontiguousarray(view)  # OpenCV takes no rows that go backwards
    if across * down == 1:
        return view
    height, width = view.shape[:2]
    tall, wide = height // down, width // across  # boxes that are full
    means = np.empty((-(-height // down), -(-width // across), 3), np.uint8)
    if tall and wide:
        full = view[: tall * down, : wide * across]
        means[:tall, :wide] = cv2.resize(full, (wide, tall), interpolation=cv2.INTER_AREA)
    if tall * down < height:
        means[tall:] = reduce_boxes(view[tall * down :], down, across)
    if wide * across < width:
        means[:, wide:] = reduce_boxes(view[:, wide * across :], down, across)
    return means


@dataclass(frozen=True, eq=False)
class HostMaps:
    """The arrays of a `MapBatch`, as the host makes them."""

    anomaly: NDArray[np.float32]
    types: NDArray[np.uint8]
    patch_probs: NDArray[np.float32]
    type_scores: NDArray[np.float32]
    image_scores: NDArray[np.float32]

    def batch(self, bank: PromptBank, stage_ms: Mapping[str, float]) -> MapBatch:
        """With what else belongs to a batch."""
        return MapBatch(**vars(self), bank=bank, stage_ms=stage_ms)


def make_maps(
    tokens: NDArray[np.float32], embedding: NDArray[np.float32], bank: PromptBank, spec: MapSpec, size: tuple[int, int]
) -> HostMaps:
    """Patch tokens [B, L, N, D] and embeddings [B, D] to maps of `size` = (width, height) and their scores."""
    with one_thread():
        probs = reference.patch_probabilities(tokens, bank.rows, spec.temperature, spec.grid)
        maps = reference.defect_map(probs, *spec.tables(size))
        scores = reference.image_scores(spec.score, embedding, bank.rows, spec.temperature, maps.anomaly)
    return HostMaps(maps.anomaly, maps.types, probs, maps.peaks[:, 1:], scores)


def all_channels(probs: NDArray[np.float32], spec: MapSpec, size: tuple[int, int]) -> NDArray[np.float32]:
    """The defect map that a `MapBatch` leaves out for speed: patch_probs [B, K+1, h, w] to [B, K+1, H, W] in [0, 1]."""
    with one_thread():
        maps: NDArray[np.float32] = reference.upsample_maps(probs, *spec.tables(size))
    return np.clip(maps, 0, 1, out=maps)
