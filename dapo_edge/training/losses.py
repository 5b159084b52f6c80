"""DAPO's tuning loss (methods 1.4): focal and two dice terms on every layer's map, cross-entropy on the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_SMOOTH = 1e-5
MAP_WEIGHT, IMAGE_WEIGHT = 4.0, 1.0


def focal(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Mean over B, H, W of `-(1 - p_t)² · ln p_t`; probabilities [B, C, H, W], ids [B, H, W] in 0..C-1.

    `p_t = Σ_c y_c · U_c + s` with labels smoothed by s: `1 - s` for the true class, `s / (C - 1)` for each other.
    """
    channels = probabilities.shape[1]
    true = probabilities.gather(1, ids[:, None])[:, 0]
    others = probabilities.sum(dim=1) - true
    p_t = (1 - FOCAL_SMOOTH) * true + FOCAL_SMOOTH / (channels - 1) * others + FOCAL_SMOOTH
    return (-((1 - p_t) ** 2) * p_t.log()).mean()


def dice(probability: Tensor, target: Tensor) -> Tensor:
    """Mean over B of `1 - (2 Σ p·t + 1) / (Σ p + Σ t + 1)`, sums over all pixels; both [B, H, W] in [0, 1]."""
    overlap = (probability * target).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def map_loss(maps: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Sum over feature layers; each map is [B, K+1, H, W] of probabilities, ids [B, H, W] with 0 for good."""
    defective = (ids > 0).to(maps[0].dtype)
    terms = [focal(m, ids) + dice(m[:, 0], 1 - defective) + dice(m[:, 1:].sum(dim=1), defective) for m in maps]
    return torch.stack(terms).sum()


def image_loss(embedding: Tensor, rows: Tensor, defective: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of `[z · t_good, z · t_A] / T`; embedding [B, D], unit rows [K+1, D], defective [B] bool."""
    pair = torch.stack([rows[0], F.normalize(rows[1:].mean(dim=0), dim=0)])
    logits = F.normalize(embedding, dim=-1) @ pair.T / temperature
    return F.cross_entropy(logits, defective.long())


def dapo_loss(
    maps: Sequence[Tensor], embedding: Tensor, rows: Tensor, ids: Tensor, defective: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The map term and the image term, each with its published weight; their sum is the loss.

    `defective` [B] bool is the label of the whole image: a small defect may have vanished from `ids`.
    """
    return MAP_WEIGHT * map_loss(maps, ids), IMAGE_WEIGHT * image_loss(embedding, rows, defective, temperature)
