"""The backend contract: views in, defect maps out. One file per backend; a fake for tests fits in 20 lines."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge.errors import RecipeError, did_you_mean
from dapo_edge.kernels.map_spec import MapSize
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank

View = NDArray[np.uint8] | PixelView  # [H, W, 3] BGR, or a camera's own bytes


@dataclass(frozen=True, eq=False)
class MapBatch:
    """Results of one `infer` call, in the order of its views. The arrays are the caller's own."""

    anomaly: NDArray[np.float32]  # [B, H, W] in [0, 1]
    types: NDArray[np.uint8]  # [B, H, W] index into the bank's names
    patch_probs: NDArray[np.float32]  # [B, K+1, h, w], sum 1 per patch
    type_scores: NDArray[np.float32]  # [B, K] in [0, 1], highest probability of each defect type on the map
    image_scores: NDArray[np.float32]  # [B] in [0, 1], by the package's score rule
    bank: PromptBank  # the one bank that all of the batch was compared with
    stage_ms: Mapping[str, float]  # preprocess, encode, map: milliseconds of the whole batch


class Backend(Protocol):
    """What the runtime needs from an engine. Backends are context managers.

    At most `concurrency` threads may be inside `infer` at a time; everything else is called while nobody is.
    """

    name: str
    device: str  # in words
    precision: str  # the arithmetic that really runs: fp32, bf16, fp16 ...
    bank: PromptBank
    concurrency: int  # calls of `infer` that run at once and gain by it
    takes_camera_bytes: bool  # a `PixelView` costs no more than BGR, so nobody needs to convert it before

    @classmethod
    def open(
        cls, package: EnginePackage, *, map_size: MapSize, precision: str | None = None, throughput: bool = False
    ) -> Self:
        """Load the package's encoder. Raises `DependencyMissing`, `PackageError` or `BackendError`.

        `throughput`: the most frames per second of several cameras, at the cost of the single frame's latency.
        """
        ...

    def infer(self, views: Sequence[View], *, map_size: MapSize | None = None) -> MapBatch:
        """Inspect views of any size and pixel format; with a map of the frame's size they must all have one size.

        `map_size` overrides, for this call, the one that the backend was opened with.
        """
        ...

    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens [B, L, N, D] and image embeddings [B, D], the caller's own: what the accuracy gate compares."""
        ...

    def set_bank(self, bank: PromptBank) -> None:
        """Use another bank from the next call on."""
        ...

    def close(self) -> None:
        """Free everything; the backend can't be used afterwards."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


BACKENDS: dict[str, str] = {
    "openvino": "dapo_edge.backends.openvino:OpenVinoBackend",
    "tensorrt": "dapo_edge.backends.tensorrt:TensorRtBackend",
}


def backend_class(name: str) -> type[Backend]:
    """Look a backend up and import its file. Raises `RecipeError` naming the nearest."""
    if name not in BACKENDS:
        valid = f"Valid backends: {', '.join(sorted(BACKENDS))}"
        raise RecipeError(f"unknown backend '{name}'", did_you_mean(str(name), BACKENDS) + valid)
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def map_pixels(map_size: MapSize, image_size: int, views: Sequence[View]) -> tuple[int, int]:
    """Width and height of the maps of one batch of views."""
    if map_size == "model":
        return image_size, image_size
    if map_size != "frame":
        return map_size
    sizes = {view.shape[:2] for view in views}
    if len(sizes) > 1:
        raise RecipeError(
            f"a map of the frame's size needs views of one size, not {sorted(sizes)}",
            "Inspect frames of different size one by one, or set map.size to [width, height]",
        )
    height, width = sizes.pop()
    return width, height


def type_scores(batch: MapBatch) -> dict[str, float]:
    """How high each defect type reaches on the map of a batch's first view, by name."""
    return dict(zip(batch.bank.names[1:], map(float, batch.type_scores[0]), strict=True))


def check_bank(bank: PromptBank, dimensions: int) -> None:
    """Refuse a bank that belongs to another encoder."""
    if bank.dimensions != dimensions:
        raise RecipeError(
            f"the prompt bank has {bank.dimensions} dimensions, the engine package {dimensions}",
            "Use a bank that was made with the same backbone",
        )
    if len(bank.names) > 256:
        raise RecipeError(f"a type map holds 255 defect types, not {len(bank.names) - 1}", "Use fewer words")
