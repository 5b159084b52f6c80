"""The parts of the frame path that run on the host: Pillow's resize before the encoder, the map arithmetic after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch, View
from dapo_edge.device import usable_cores
from dapo_edge.extras import require
from dapo_edge.kernels import reference
from dapo_edge.kernels.blas import one_thread
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import pillow_bicubic
from dapo_edge.prompt_bank import PromptBank

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_INTER_AREA = 3  # OpenCV's number of the mean over boxes
_BICUBIC_REACH = 2  # pixels to either side, of what is made smaller: times its scale
_WORTH_A_THREAD_BYTES = 1 << 20  # of a picture


def resize_view(view: View, size: int) -> NDArray[np.uint8]:
    """Resize [H, W, 3] to [size, size, 3]; channel order is kept, the aspect ratio is not (as in DAPO).

    A camera's own bytes become BGR. Box reduction, then antialiased bicubic, columns first: Pillow's
    `resize(BICUBIC, reducing_gap=2.0)` to one grey level, much faster than plain bicubic and equal to it on smooth
    pictures. Every phase (tuning, calibration, evaluation, run time) uses this one resize, so its choice costs no
    accuracy. Of large pictures two threads make half of the columns each.
    """

    if isinstance(view, PixelView):
        view = view.bgr()
    height, width = view.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(view)
    halves = [(0, size)] if view.nbytes < _WORTH_A_THREAD_BYTES else [(0, size // 2), (size // 2, size)]
    parts = _on_two_threads(lambda columns: _resized_columns(view, size, *columns), halves)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _resized_columns(view: NDArray[np.uint8], size: int, first: int, last: int) -> NDArray[np.uint8]:
    """Columns `first` up to `last` of the resized picture, [size, n, 3], from those boxes that they see."""
    from PIL import Image

    height, width = view.shape[:2]
    across, down = pillow_bicubic(width, size).factor, pillow_bicubic(height, size).factor
    scale = width / size / across  # boxes per column
    margin = _BICUBIC_REACH * max(1, scale) + 1
    start, end = max(0, int(first * scale - margin)), int(np.ceil(last * scale + margin))
    part = view[:, start * across : end * across]
    image = Image.fromarray(_box_means(part, across, down, full=width % across == 0 and height % down == 0))
    bicubic, count = Image.Resampling.BICUBIC, last - first
    # Two calls, because from version 13 on Pillow begins with the rows of tall pictures, which gives other pixels.
    box = (first * scale - start, 0, last * scale - start, image.height)
    return np.asarray(
        image.resize((count, image.height), bicubic, box=box).resize(
            (count, size), bicubic, box=(0, 0, count, height / down)
        )
    )


def _box_means(view: NDArray[np.uint8], across: int, down: int, *, full: bool) -> NDArray[np.uint8]:
    """Means over boxes, [H, W, 3] to [ceil(H / down), ceil(W / across), 3]; `full`: also at the picture's border."""
    from PIL import Image

    height, width = view.shape[:2]
    if across * down == 1:
        return np.ascontiguousarray(view)
    if not full:
        return np.asarray(Image.fromarray(np.ascontiguousarray(view)).reduce((across, down)))
    # Takes half of Pillow's time. Halves are rounded to even, not up: a level in one of 16 pixels of boxes of 8.
    means: NDArray[np.uint8] = require("cv2").resize(
        view if view.strides[0] > 0 else np.ascontiguousarray(view),
        (width // across, height // down),
        interpolation=_INTER_AREA,
    )
    return means


def _on_two_threads(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`work` on each item, here and on a second thread at once. A new one each time: no pool lives through a fork."""
    if len(items) == 1 or usable_cores() == 1:
        return [work(item) for item in items]
    done: dict[int, _Result] = {}
    failures: list[BaseException] = []
    left = iter(list(enumerate(items)))  # whose next() no other thread interrupts

    def take() -> None:
        try:
            for number, item in left:
                done[number] = work(item)
        except BaseException as error:  # raised again below, where someone sees it
            failures.append(error)

    helper = threading.Thread(target=take, name="resize")
    helper.start()
    take()
    helper.join()
    if failures:
        raise failures[0]
    return [done[number] for number in range(len(items))]


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
