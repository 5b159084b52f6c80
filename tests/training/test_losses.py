"""The loss, term by term, against methods 1.4 written down with loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dapo_edge.training.losses import dapo_loss, dice, focal, image_loss, map_loss

B, H, W, D, T = 3, 5, 4, 6, 0.07


def literal_focal(maps: np.ndarray, ids: np.ndarray) -> float:
    """Mean over B, H, W of -(1 - pt)² · ln(pt), pt = sum_c y_c · U_c + s."""
    s, total = 1e-5, 0.0
    batch, channels, height, width = maps.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                pt = s
                for c in range(channels):
                    pt += (1 - s if c == ids[b, y, x] else s / (channels - 1)) * maps[b, c, y, x]
                total += -((1 - pt) ** 2) * math.log(pt)
    return total / (batch * height * width)


def literal_dice(p: np.ndarray, t: np.ndarray) -> float:
    """Per image 1 - (2·sum(p·t) + 1)/(sum p + sum t + 1), then mean."""
    terms = [1 - (2 * np.sum(a * b) + 1) / (np.sum(a) + np.sum(b) + 1) for a, b in zip(p, t, strict=True)]
    return float(sum(terms) / len(terms))


def literal_map_loss(taps: Sequence[np.ndarray], ids: np.ndarray) -> float:
    mask = np.where(ids > 0, 1.0, 0.0)
    total = 0.0
    for maps in taps:
        abnormal = sum(maps[:, c] for c in range(1, maps.shape[1]))
        total += literal_focal(maps, ids) + literal_dice(maps[:, 0], 1 - mask) + literal_dice(abnormal, mask)
    return total


def literal_image_loss(z: np.ndarray, rows: np.ndarray, labels: Sequence[int]) -> float:
    """Batch mean of CE([z.t_good, z.tA]/0.07, label), tA = L2(mean_k t_k, k >= 1)."""
    abnormal = rows[1:].sum(axis=0) / (len(rows) - 1)
    abnormal = abnormal / math.sqrt(sum(abnormal**2))
    total = 0.0
    for vector, label in zip(z, labels, strict=True):
        unit = vector / math.sqrt(sum(vector**2))
        good, bad = math.exp(unit @ rows[0] / T), math.exp(unit @ abnormal / T)
        total += -math.log((bad if label else good) / (good + bad))
    return total / len(z)


def draw(kinds: int, content: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Two layers' maps, ids, embeddings and unit rows, float64."""
    rng = np.random.default_rng([kinds, len(content)])
    maps = [rng.dirichlet(np.full(kinds + 1, 0.5), (B, H, W)).transpose(0, 3, 1, 2) for _ in range(2)]
    ids = rng.integers(0, kinds + 1, (B, H, W))
    if content == "good":
        ids[:] = 0
    elif content == "defective":
        ids = 1 + ids % kinds
    else:
        ids[0] = 0  # a good picture among the others
    rows = rng.normal(size=(kinds + 1, D))
    return maps, ids, rng.normal(size=(B, D)), rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("content", ["mixed", "good", "defective"])
def test_every_term_is_as_written(kinds: int, content: str) -> None:
    maps, ids, z, rows = draw(kinds, content)
    labels = [int(picture.any()) for picture in ids]
    taps = [torch.tensor(m, requires_grad=True) for m in maps]
    embedding, bank = torch.tensor(z, requires_grad=True), torch.tensor(rows, requires_grad=True)
    truth = torch.tensor(ids)
    mask = torch.tensor((ids > 0).astype(float))

    assert focal(taps[0], truth).item() == pytest.approx(literal_focal(maps[0], ids), rel=1e-10)
    assert dice(taps[0][:, 0], mask).item() == pytest.approx(literal_dice(maps[0][:, 0], ids > 0), rel=1e-10)
    assert map_loss(taps, truth).item() == pytest.approx(literal_map_loss(maps, ids), rel=1e-10)
    assert image_loss(embedding, bank, torch.tensor(labels) > 0, T).item() == pytest.approx(
        literal_image_loss(z, rows, labels), rel=1e-10
    )
    of_maps, of_images = dapo_loss(taps, embedding, bank, truth, torch.tensor(labels) > 0, T)
    assert of_maps.item() == pytest.approx(4 * literal_map_loss(maps, ids), rel=1e-10)
    assert of_images.item() == pytest.approx(1 * literal_image_loss(z, rows, labels), rel=1e-10)

    (of_maps + of_images).backward()
    for tensor in (*taps, embedding, bank):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0


def test_certain_probabilities_give_finite_gradients() -> None:
    """Wrong with certainty: probability exactly 0 for what is true, on good and on defective pictures."""
    ids = torch.zeros(2, H, W, dtype=torch.long)
    ids[1] = 2
    maps = torch.zeros(2, 4, H, W)
    maps[:, 1] = 1
    maps.requires_grad_(True)
    loss = map_loss([maps], ids)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(literal_map_loss([maps.detach().double().numpy()], ids.numpy()), rel=1e-4)
    assert torch.isfinite(maps.grad).all()


def test_the_label_of_a_picture_holds_where_its_defect_vanished() -> None:
    """A speck may be lost at the size of the loss; the picture stays defective."""
    maps, ids, z, rows = draw(3, "good")
    labels = [0, 1, 0]
    _, of_images = dapo_loss(
        [torch.tensor(maps[0])], torch.tensor(z), torch.tensor(rows), torch.tensor(ids), torch.tensor(labels) > 0, T
    )
    assert of_images.item() == pytest.approx(literal_image_loss(z, rows, labels), rel=1e-10)


def test_the_right_answer_costs_least() -> None:
    ids = torch.tensor(draw(3, "mixed")[1])
    right = torch.nn.functional.one_hot(ids, 4).permute(0, 3, 1, 2).float()
    wrong = right.roll(1, dims=1)
    assert map_loss([right], ids).item() == pytest.approx(0, abs=1e-4)
    assert map_loss([wrong], ids).item() > 10
