"""The torch reference: the same contract as every compiled backend, the arithmetic written out independently.

Slow on purpose: the map is made by `interpolate` and an explicit Gaussian, so that it can judge the folded tap tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from dapo_edge.backends.base import MapBatch, MapSize, View, check_bank, map_pixels
from dapo_edge.backends.host import resize_view
from dapo_edge.config import packaged_recipe
from dapo_edge.errors import RecipeError
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.method import Method, method_of
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank


class EagerBackend:
    """Runs a method's modules directly, in float32."""

    name = "eager"
    device = "torch"
    concurrency = 1
    takes_camera_bytes = False
    precision = "fp32"

    def __init__(self, method: Method, bank: PromptBank, spec: MapSpec, map_size: MapSize = "model") -> None:
        check_bank(bank, method.clip.dimensions)
        self.method = method
        self.bank = bank
        self._spec = spec
        self._map_size = map_size
        self._mean = torch.tensor(method.clip.mean).view(3, 1, 1)
        self._std = torch.tensor(method.clip.std).view(3, 1, 1)

    @classmethod
    def open(
        cls, package: EnginePackage, *, map_size: MapSize, precision: str | None = None, throughput: bool = False
    ) -> Self:
        """Make the method again from the recipe that the package carries."""
        if precision not in (None, "fp32"):
            raise RecipeError(f"the eager reference computes in fp32, not '{precision}'", "Leave the precision out")
        method = method_of(packaged_recipe(package.manifest.recipe))
        return cls(method, package.bank(), package.manifest.map, map_size)

    @torch.inference_mode()
    def infer(self, views: Sequence[View], *, map_size: MapSize | None = None) -> MapBatch:
        """Inspect views of any size."""
        bank = self.bank
        size = map_pixels(map_size or self._map_size, self.method.image_size, views)
        started = time.perf_counter()
        image = self.preprocess(views)
        prepared = time.perf_counter()
        tokens, embedding = self.method(image)
        encoded = time.perf_counter()
        anomaly, types, probs, peaks = self._maps(tokens, bank, size)
        scores = self._scores(embedding, bank, anomaly)
        finished = time.perf_counter()
        stages = {
            "preprocess": (prepared - started) * 1e3,
            "encode": (encoded - prepared) * 1e3,
            "map": (finished - encoded) * 1e3,
        }
        return MapBatch(
            anomaly=anomaly.numpy(),
            types=types.numpy(),
            patch_probs=probs.numpy(),
            type_scores=peaks[:, 1:].numpy(),
            image_scores=scores.numpy(),
            bank=bank,
            stage_ms=stages,
        )

    @torch.inference_mode()
    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens [B, L, N, D] and image embeddings [B, D]."""
        tokens, embedding = self.method(self.preprocess(views))
        return tokens.numpy(), embedding.numpy()

    def preprocess(self, views: Sequence[View]) -> Tensor:
        """BGR uint8 views to normalised RGB [B, 3, S, S]."""
        resized = np.stack([resize_view(view, self.method.image_size) for view in views])[..., ::-1]
        image = torch.from_numpy(resized.copy()).permute(0, 3, 1, 2).float() / 255
        return (image - self._mean) / self._std

    def set_bank(self, bank: PromptBank) -> None:
        """Use another bank from the next call on."""
        check_bank(bank, self.method.clip.dimensions)
        self.bank = bank

    def close(self) -> None:
        """Nothing is held beyond the modules themselves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _maps(self, tokens: Tensor, bank: PromptBank, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = torch.from_numpy(bank.rows)
        logits = F.normalize(tokens, dim=-1) @ rows.T / self._spec.temperature
        probs = logits.softmax(dim=-1).mean(dim=1).transpose(1, 2).unflatten(2, self._spec.grid)  # [B, K+1, h, w]
        width, height = size
        upsampled = F.interpolate(probs, size=(height, width), mode="bilinear", align_corners=self._spec.align_corners)
        scale = self._spec.smoothing_px / self._spec.image_size
        smooth = _gaussian(_gaussian(upsampled, scale * height, dim=2), scale * width, dim=3)
        return 1 - smooth[:, 0], smooth.argmax(dim=1).to(torch.uint8), probs, smooth.amax(dim=(2, 3)).clamp(max=1)

    def _scores(self, embedding: Tensor, bank: PromptBank, anomaly: Tensor) -> Tensor:
        pixels = anomaly.flatten(1)
        if self._spec.score == "max":
            return pixels.amax(dim=1)
        if self._spec.score == "top":
            return pixels.topk(max(1, pixels.shape[1] // 100), dim=1).values.mean(dim=1)
        rows = torch.from_numpy(bank.rows)
        pair = torch.stack([rows[0], F.normalize(rows[1:].mean(dim=0), dim=0)])
        return (F.normalize(embedding, dim=-1) @ pair.T / self._spec.temperature).softmax(dim=-1)[:, 1]


def _gaussian(x: Tensor, sigma: float, dim: int) -> Tensor:
    """Gaussian along one axis, cut at 4 sigma, mirrored at the border with the edge pixel repeated."""
    if sigma == 0:
        return x
    radius, size = int(4 * sigma + 0.5), x.shape[dim]
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    places = torch.arange(-radius, size + radius) % (2 * size)
    mirrored = x.index_select(dim, torch.where(places < size, places, 2 * size - 1 - places))
    shape = [1, 1, 1, 1]
    shape[dim] = len(offsets)
    kernel = (weights / weights.sum()).view(shape).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(mirrored, kernel, groups=x.shape[1])
