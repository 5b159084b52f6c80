"""An engine that reads a smooth field of anomaly at the centres of its patches, wherever in the frame a view lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank

Field = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]  # x [1, n], y [m, 1] in px of the frame -> [m, n]
SPEC = MapSpec(image_size=96, grid=(24, 24), temperature=0.07, align_corners=True, smoothing_px=2.0, score="max")


def waves(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Between 0.1 and 0.6, longer than any tile."""
    return 0.35 + 0.25 * np.sin(x / 640) * np.cos(y / 480 + 0.3)


def with_spec(package: EnginePackage, spec: MapSpec = SPEC) -> EnginePackage:
    """The same package with other numbers for its map, as if its weights were more than a seeded initialisation."""
    return replace(package, manifest=package.manifest.model_copy(update={"map": spec, "trained": True}))


class FieldBackend:
    """Where a view lies follows from its memory, so it must be a part of `frame`, not a copy."""

    name, device, precision = "field", "none", "fp32"
    concurrency, takes_camera_bytes = 1, False

    def __init__(
        self, package: EnginePackage, frame: NDArray[np.uint8], field: Field = waves, bias: Sequence[float] = (0.0,)
    ) -> None:
        """`bias`: added to the field by turns, view by view."""
        self.bank = package.bank()
        self.spec = package.manifest.map
        self.frame = frame
        self.field = field
        self.bias = bias
        self.boxes: list[tuple[int, int, int, int]] = []  # of every view so far
        self.calls: list[int] = []  # views of each call

    def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
        self.calls.append(len(views))
        probs = np.stack([self._probs(view) for view in views])
        scores = np.array([view_probs[1].max() for view_probs in probs], np.float32)
        maps, types = np.zeros((len(views), 1, 1), np.float32), np.zeros((len(views), 1, 1), np.uint8)
        peaks = probs[:, 1:].max(axis=(2, 3))
        return MapBatch(maps, types, probs, peaks, scores, self.bank, {"encode": 10.0 * len(views)})

    def _probs(self, view: NDArray[np.uint8]) -> NDArray[np.float32]:
        offset = view.__array_interface__["data"][0] - self.frame.__array_interface__["data"][0]
        top, left = divmod(offset // 3, self.frame.shape[1])
        assert np.shares_memory(view, self.frame[top, left])
        height, width = view.shape[:2]
        rows, columns = self.spec.grid
        x = left + (np.arange(columns)[None] + 0.5) * width / columns
        y = top + (np.arange(rows)[:, None] + 0.5) * height / rows
        anomaly = self.field(x, y) + self.bias[len(self.boxes) % len(self.bias)]
        self.boxes.append((left, top, width, height))
        probs = np.zeros((len(self.bank.names), rows, columns), np.float32)
        probs[0], probs[1] = 1 - anomaly, anomaly
        return probs

    def encode(self, views: Sequence[Any]) -> Any:
        raise AssertionError("the runtime never asks for tokens")

    def set_bank(self, bank: PromptBank) -> None:
        self.bank = bank

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FieldBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
