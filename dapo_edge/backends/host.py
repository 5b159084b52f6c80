"""The parts of the frame path that run on the host: Pillow's resize before the encoder, the map arithmetic after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch, View
from dapo_edge.device import usable_cores
from dapo_edge.kernels import reference
from dapo_edge.kernels.blas import one_thread
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import pillow_bicubic
from dapo_edge.prompt_bank import PromptBank

if TYPE_CHECKING:
    from PIL import Image

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_BAND_BYTES = 5 << 18  # of a picture: what Pillow makes of a band is memory that the next one uses again


def resize_view(view: View, size: int) -> NDArray[np.uint8]:
    """Resize [H, W, 3] to [size, size, 3]; channel order is kept, the aspect ratio is not (as in DAPO).

    A camera's own bytes become BGR. Box reduction, then antialiased bicubic, columns first: Pillow's
    `resize(BICUBIC, reducing_gap=2.0)`, three times as fast as plain bicubic, equal to it on smooth pictures. Every
    phase (tuning, calibration, evaluation, run time) uses this one resize, so its choice costs no accuracy. Large
    pictures are taken in bands of rows, by two threads where there are two cores: the same pixels in less time.
    """
    from PIL import Image

    if isinstance(view, PixelView):
        view = view.bgr()
    height, width = view.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(view)
    across, down = pillow_bicubic(width, size).factor, pillow_bicubic(height, size).factor
    narrow = _on_two_threads(lambda band: _narrowed(band, size, across, down), _bands(view, down))
    image = narrow[0] if len(narrow) == 1 else Image.fromarray(np.concatenate([np.asarray(part) for part in narrow]))
    # A call of its own, because from version 13 on Pillow begins with the rows of tall pictures: other pixels.
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(0, 0, size, height / down)))


def _bands(view: NDArray[np.uint8], down: int) -> list[NDArray[np.uint8]]:
    """A picture's rows in parts of about `_BAND_BYTES`, cut between boxes of `down` rows."""
    boxes = -(-len(view) // down)
    count = min(boxes, max(1, view.nbytes // _BAND_BYTES))
    edges = [boxes * number // count * down for number in range(count)]
    return [view[start:end] for start, end in zip(edges, [*edges[1:], len(view)], strict=True)]


def _narrowed(band: NDArray[np.uint8], size: int, across: int, down: int) -> Image.Image:
    """Box reduction in both directions, then the columns: [H, W, 3] to a picture of size x ceil(H / down)."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(band))
    if across * down > 1:
        image = image.reduce((across, down))
    box = (0, 0, band.shape[1] / across, image.height)
    return image.resize((size, image.height), Image.Resampling.BICUBIC, box=box)


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
