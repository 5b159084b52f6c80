"""A method's features of labelled pictures, encoded once where that is possible, and the metrics that follow from them.

This is what tuning looks at; `evaluate.py` is for packages and data sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dapo_edge.evaluation.metrics import Evaluation, ImageMetrics, Summary
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.method import Method
from dapo_edge.training.views import ViewStore

FEATURE_BYTES = 4 << 30  # that features of a frozen encoder may take; the rest is computed again whenever it is needed
_BATCH = 32


class Features:
    """What a method's encoder gives for pictures; computed once where the encoder is frozen and memory allows it."""

    def __init__(self, method: Method, store: ViewStore, *, precision: str = "fp32", frozen: bool = True) -> None:
        self.store = store
        self._method = method
        self._is_mixed = precision == "bf16"
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (method.clip.mean, method.clip.std))
        per_picture = len(method.feature_layers) * method.grid[0] * method.grid[1] * method.clip.width * 4
        self._room = FEATURE_BYTES // per_picture if frozen else 0
        self._kept: dict[int, tuple[list[Tensor], Tensor]] = {}
        self._is_frozen = frozen

    def fetch(self, batch: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Raw taps [B, N, width] of every feature layer, embedding [B, D], both float32, and true types [B, S, S]."""
        images, types = self.store.fetch(batch)
        device = next(self._method.encoder.parameters()).device
        truth = torch.from_numpy(types).to(device)
        if not self._is_frozen:
            return *self._encode(images, device), truth
        # One picture at a time: the result must not depend on which pictures share its batch.
        found = [self._kept_or_encoded(index, images[n : n + 1], device) for n, index in enumerate(batch)]
        taps = [torch.stack(layer).to(device) for layer in zip(*(taps for taps, _ in found), strict=True)]
        return taps, torch.stack([embedding for _, embedding in found]).to(device), truth

    @torch.no_grad()
    def _kept_or_encoded(
        self, index: int, image: NDArray[np.uint8], device: torch.device
    ) -> tuple[list[Tensor], Tensor]:
        if index in self._kept:
            return self._kept[index]
        taps, embedding = self._encode(image, device)
        features = [tap[0].cpu() for tap in taps], embedding[0].cpu()
        if len(self._kept) < self._room:
            self._kept[index] = features
        return features

    def _encode(self, images: NDArray[np.uint8], device: torch.device) -> tuple[list[Tensor], Tensor]:
        rgb = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=self._is_mixed):
            taps, embedding = self._method.encoder(((rgb - self._mean) / self._std).to(device))
        return [tap.float() for tap in taps], embedding.float()


@torch.no_grad()
def metrics_of(
    method: Method, features: Features, indices: Sequence[int], phrases: Sequence[str], noun: str, spec: MapSpec
) -> Summary:
    """Metrics of pictures, with maps and scores by the arithmetic of a package."""
    rows = method.rows(phrases, noun)
    evaluation = Evaluation(features.store.names)
    for taps, embedding, types in _batches(features, indices):
        _add_maps(evaluation, method.adapt(taps), embedding, rows, types, spec)
    return evaluation.summary()


@torch.no_grad()
def score_images(
    method: Method, features: Features, indices: Sequence[int], phrases: Sequence[str], noun: str, spec: MapSpec
) -> ImageMetrics:
    """Image scores alone, by the rule of `spec`."""
    rows = method.rows(phrases, noun).cpu().numpy()
    metrics = ImageMetrics()
    for taps, embedding, types in _batches(features, indices):
        tokens = method.adapt(taps).cpu().numpy()
        share = reference.patch_probabilities(tokens, rows, spec.temperature, spec.grid)
        anomaly = reference.anomaly_map(share, *spec.tables((types.shape[2], types.shape[1])))
        scores = reference.image_scores(spec.score, embedding.cpu().numpy(), rows, spec.temperature, anomaly)
        for score, defective in zip(scores.tolist(), (types > 0).flatten(1).any(dim=1).tolist(), strict=True):
            metrics.add(score, defective)
    return metrics


def _batches(features: Features, indices: Sequence[int]) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    for start in range(0, len(indices), _BATCH):
        yield features.fetch(indices[start : start + _BATCH])


def _add_maps(
    evaluation: Evaluation, tokens: Tensor, embedding: Tensor, rows: Tensor, types: Tensor, spec: MapSpec
) -> None:
    """Count pictures in `evaluation`: maps and scores by the reference arithmetic, at the size of `types` [B, H, W].

    A method with one row for all defects gives every type the same share of it.
    """
    bank = rows.cpu().numpy()
    probabilities = reference.patch_probabilities(tokens.cpu().numpy(), bank, spec.temperature, spec.grid)
    kinds = evaluation.types.types
    if probabilities.shape[1] == 2 < kinds + 1:
        probabilities = np.concatenate([probabilities[:, :1], probabilities[:, 1:].repeat(kinds, axis=1) / kinds], 1)
    height, width = types.shape[1:]
    maps = np.clip(reference.upsample_maps(probabilities, *spec.tables((width, height))), 0, 1)
    scores = reference.image_scores(spec.score, embedding.cpu().numpy(), bank, spec.temperature, 1 - maps[:, 0])
    for channels, score, truth in zip(maps, scores.tolist(), types.cpu().numpy(), strict=True):
        evaluation.add(channels, score, truth)
