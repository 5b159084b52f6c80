"""The parts of the frame path that run on the host: Pillow's resize before the encoder, the map arithmetic after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch, View
from dapo_edge.kernels import reference
from dapo_edge.kernels.blas import one_thread
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import pillow_bicubic
from dapo_edge.prompt_bank import PromptBank


def resize_view(view: View, size: int) -> NDArray[np.uint8]:
    """Resize [H, W, 3] to [size, size, 3]; channel order is kept, the aspect ratio is not (as in DAPO).

    A camera's own bytes become BGR. Box reduction, then antialiased bicubic, columns first: Pillow's
    `resize(BICUBIC, reducing_gap=2.0)`, three times as fast as plain bicubic, equal to it on smooth pictures. Every
    phase (tuning, calibration, evaluation, run time) uses this one resize, so its choice costs no accuracy.
    """
    from PIL import Image

    if isinstance(view, PixelView):
        view = view.bgr()
    height, width = view.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(view)
    across, down = pillow_bicubic(width, size).factor, pillow_bicubic(height, size).factor
    image = Image.fromarray(np.ascontiguousarray(view))
    if across * down > 1:
        image = image.reduce((across, down))
    # Two calls, because from version 13 on Pillow begins with the rows of tall pictures, which gives other pixels.
    bicubic = Image.Resampling.BICUBIC
    narrow = image.resize((size, image.height), bicubic, box=(0, 0, width / across, image.height))
    return np.asarray(narrow.resize((size, size), bicubic, box=(0, 0, size, height / down)))


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
