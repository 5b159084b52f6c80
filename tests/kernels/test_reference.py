"""The NumPy definition of the map against plain torch transcriptions of the published formulas."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dapo_edge.kernels import reference, resample
from dapo_edge.kernels.resample import TapTable

FloatArray = NDArray[np.float32]
F = torch.nn.functional

# Probabilities are in [0, 1]; sums of float32 in another order differ by a few units in the last place.
ROUNDING = 2e-6
TEMPERATURE = 0.07


class Scene(NamedTuple):
    """Two images of random tokens on a grid of 5 x 7 patches, three layers, six bank rows, a map of 61 x 83."""

    tokens: FloatArray  # [2, 3, 35, 32]
    embedding: FloatArray  # [2, 32]
    bank: FloatArray  # [6, 32]
    probs: FloatArray  # [2, 6, 5, 7]
    rows: TapTable
    columns: TapTable


@pytest.fixture(scope="module")
def scene() -> Scene:
    rng = np.random.default_rng(7)
    tokens = rng.normal(0, 3, (2, 3, 35, 32)).astype(np.float32)
    bank = reference.normalise(rng.normal(size=(6, 32)).astype(np.float32))
    return Scene(
        tokens,
        rng.normal(size=(2, 32)).astype(np.float32),
        bank,
        reference.patch_probabilities(tokens, bank, TEMPERATURE, (5, 7)),
        resample.upsample(5, 61, align_corners=True, sigma=3.0),
        resample.upsample(7, 83, align_corners=True, sigma=3.0),
    )


def random_probabilities(batch: int, channels: int, h: int, w: int) -> FloatArray:
    scores = np.random.default_rng(channels).gumbel(size=(batch, channels, h, w))
    return torch.from_numpy(scores).float().softmax(dim=1).numpy()


def test_normalise() -> None:
    x = np.array([[3, 0, 4], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(reference.normalise(x), [[0.6, 0, 0.8], [0, 0, 0]], rtol=0, atol=1e-7)
    np.testing.assert_allclose(reference.normalise(x, axis=0)[:, 0], [1, 0], rtol=0, atol=1e-7)
    assert reference.normalise(x).dtype == np.float32


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_patch_probabilities_are_the_published_formula(scene: Scene, temperature: float) -> None:
    """Bound 1e-6 / temperature: a cosine's rounding error is divided by the temperature inside the exponential."""
    ours = reference.patch_probabilities(scene.tokens, scene.bank, temperature, (5, 7))
    unit = F.normalize(torch.from_numpy(scene.tokens).double(), dim=-1)
    per_layer = (unit @ torch.from_numpy(scene.bank).double().T / temperature).softmax(dim=-1)
    theirs = per_layer.mean(dim=1).transpose(1, 2).reshape(2, 6, 5, 7)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6 / temperature)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous


def test_patch_probabilities_sum_to_one(scene: Scene) -> None:
    np.testing.assert_allclose(scene.probs.sum(axis=1), 1, rtol=0, atol=ROUNDING)


def test_patch_probabilities_leave_their_input_alone(scene: Scene) -> None:
    tokens, bank = scene.tokens.copy(), scene.bank.copy()
    reference.patch_probabilities(tokens, bank, TEMPERATURE, (5, 7))
    np.testing.assert_array_equal(tokens, scene.tokens)
    np.testing.assert_array_equal(bank, scene.bank)


def test_a_zero_token_is_undecided(scene: Scene) -> None:
    probs = reference.patch_probabilities(np.zeros((1, 1, 6, 32), np.float32), scene.bank, 0.01, (2, 3))
    np.testing.assert_allclose(probs, 1 / 6, rtol=0, atol=1e-7)


def test_the_length_of_a_token_does_not_matter(scene: Scene) -> None:
    longer = reference.patch_probabilities(scene.tokens * np.float32(1000), scene.bank, TEMPERATURE, (5, 7))
    np.testing.assert_allclose(longer, scene.probs, rtol=0, atol=1e-5)


def test_a_grid_that_does_not_hold_the_patches_is_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match="a grid of 5 x 8 doesn't hold 35 patches"):
        reference.patch_probabilities(scene.tokens, scene.bank, TEMPERATURE, (5, 8))


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsampled_maps_are_torchs(align_corners: bool) -> None:
    probs = random_probabilities(2, 4, 5, 7)
    tables = [resample.upsample(i, o, align_corners=align_corners, sigma=0) for i, o in ((5, 61), (7, 83))]
    theirs = F.interpolate(torch.from_numpy(probs), (61, 83), mode="bilinear", align_corners=align_corners)
    np.testing.assert_allclose(reference.upsample_maps(probs, *tables), theirs.numpy(), rtol=0, atol=ROUNDING)


def test_the_mean_over_layers_commutes_with_upsampling(scene: Scene) -> None:
    """As published, each layer is upsampled first; here once, after the mean."""
    layers = [reference.patch_probabilities(scene.tokens[:, [i]], scene.bank, TEMPERATURE, (5, 7)) for i in range(3)]
    published = np.mean([reference.upsample_maps(p, scene.rows, scene.columns) for p in layers], axis=0)
    ours = reference.upsample_maps(scene.probs, scene.rows, scene.columns)
    np.testing.assert_allclose(ours, published, rtol=0, atol=ROUNDING)


def test_the_anomaly_map_is_what_the_defect_channels_sum_to(scene: Scene) -> None:
    maps = reference.upsample_maps(scene.probs, scene.rows, scene.columns)
    anomaly = reference.anomaly_map(scene.probs, scene.rows, scene.columns)
    assert anomaly.shape == (2, 61, 83)
    np.testing.assert_allclose(anomaly, 1 - maps[:, 0], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(anomaly, maps[:, 1:].sum(axis=1), rtol=0, atol=ROUNDING)


def test_the_anomaly_map_stays_in_range() -> None:
    """Certain patches: rounding must not leave [0, 1]."""
    tables = [resample.upsample(i, o, align_corners=False, sigma=2.0) for i, o in ((3, 50), (4, 70))]
    for normal in (0, 1):
        probs = np.full((1, 2, 3, 4), normal, np.float32)
        anomaly = reference.anomaly_map(probs, *tables)
        assert 0 <= anomaly.min() <= anomaly.max() <= 1
        np.testing.assert_allclose(anomaly, 1 - normal, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("channels", "size"), [(2, (61, 83)), (6, (61, 83)), (21, (224, 224)), (256, (120, 90))])
def test_the_type_map_is_the_argmax(channels: int, size: tuple[int, int]) -> None:
    """Exact but for pixels where two channels differ by rounding; there the chosen one is as high as the highest."""
    probs = random_probabilities(2, channels, 5, 7)
    tables = [resample.upsample(i, o, align_corners=True, sigma=2.0) for i, o in zip((5, 7), size, strict=True)]
    types = reference.type_map(probs, *tables)
    maps = reference.upsample_maps(probs, *tables)
    assert (types.shape, types.dtype) == ((2, *size), np.uint8)
    assert (types == maps.argmax(axis=1)).mean() > 0.999
    chosen = np.take_along_axis(maps, types[:, None].astype(np.int64), axis=1)[:, 0]
    np.testing.assert_allclose(chosen, maps.max(axis=1), rtol=0, atol=ROUNDING)


def test_ties_go_to_the_lowest_index() -> None:
    probs = np.zeros((1, 4, 2, 2), np.float32)
    probs[:, [1, 3]] = 0.5
    tables = [resample.upsample(2, 9, align_corners=True, sigma=0)] * 2
    assert (reference.type_map(probs, *tables) == 1).all()


def test_more_channels_than_a_byte_counts_are_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match="256 channels at most, not 257"):
        reference.type_map(random_probabilities(1, 257, 5, 7), scene.rows, scene.columns)


def test_defect_map_is_both_maps(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the block size, down to one row: the blocks must leave no seam."""
    expected = reference.anomaly_map(scene.probs, scene.rows, scene.columns)
    types = reference.type_map(scene.probs, scene.rows, scene.columns)
    for size in (1, 20_000, 1 << 30):
        monkeypatch.setattr(reference, "_BLOCK_BYTES", size)
        maps = reference.defect_map(scene.probs, scene.rows, scene.columns)
        np.testing.assert_allclose(maps.anomaly, expected, rtol=0, atol=ROUNDING)
        assert (maps.types == types).mean() > 0.999
        channels = reference.upsample_maps(scene.probs, scene.rows, scene.columns)
        np.testing.assert_allclose(maps.peaks, channels.max(axis=(2, 3)), rtol=0, atol=ROUNDING)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(2, 5),
    sigma=st.floats(0, 20),
)
def test_every_pixel_is_a_distribution(
    grid: tuple[int, int], size: tuple[int, int], channels: int, sigma: float
) -> None:
    probs = random_probabilities(1, channels, *grid)
    tables = [resample.upsample(i, o, align_corners=True, sigma=sigma) for i, o in zip(grid, size, strict=True)]
    maps = reference.upsample_maps(probs, *tables)
    assert maps.shape == (1, channels, *size)
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.sum(axis=1), 1, rtol=0, atol=2 * ROUNDING)
    defects = reference.defect_map(probs, *tables)
    assert 0 <= defects.anomaly.min() <= defects.anomaly.max() <= 1
    assert defects.types.max() < channels


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_image_score_is_the_published_formula(scene: Scene, temperature: float) -> None:
    bank = torch.from_numpy(scene.bank).double()
    pair = torch.stack([bank[0], F.normalize(bank[1:].mean(dim=0), dim=0)])
    z = F.normalize(torch.from_numpy(scene.embedding).double(), dim=-1)
    expected = (z @ pair.T / temperature).softmax(dim=-1)[:, 1]
    ours = reference.image_score(scene.embedding, scene.bank, temperature)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-6 / temperature)
    assert ours.dtype == np.float32


def test_image_scores_by_rule(scene: Scene) -> None:
    anomaly = reference.anomaly_map(scene.probs, scene.rows, scene.columns)

    def score(rule: str) -> FloatArray:
        return reference.image_scores(rule, scene.embedding, scene.bank, TEMPERATURE, anomaly)

    image = reference.image_score(scene.embedding, scene.bank, TEMPERATURE)
    np.testing.assert_array_equal(score("image"), image)
    np.testing.assert_array_equal(score("max"), anomaly.max(axis=(1, 2)))
    highest = np.sort(anomaly.reshape(2, -1), axis=1)[:, -50:]  # 61 · 83 = 5063 pixels
    np.testing.assert_allclose(score("top"), highest.mean(axis=1), rtol=0, atol=ROUNDING)
    for rule in reference.SCORE_RULES:
        assert (score(rule).shape, score(rule).dtype) == ((2,), np.float32)


def test_top_takes_one_pixel_at_least(scene: Scene) -> None:
    anomaly = np.array([[[0.1, 0.7], [0.2, 0.3]]], np.float32)
    assert reference.image_scores("top", scene.embedding, scene.bank, TEMPERATURE, anomaly) == np.float32(0.7)


def test_an_unknown_score_rule_is_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"unknown score rule 'mean': use one of image, max, top"):
        reference.image_scores("mean", scene.embedding, scene.bank, TEMPERATURE, np.zeros((2, 3, 3), np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_region_probabilities_are_the_mean_over_the_mask(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((61, 83), bool)
    top, left = rng.integers(0, 50, 2)
    mask[top : top + 1 + 9 * seed, left : left + 1 + 7 * seed] = True
    mask[rng.random(mask.shape) < 0.3 * (seed > 0)] = False  # ragged, but for the region of one pixel
    ours = reference.region_probabilities(mask, scene.probs[1], scene.rows, scene.columns)
    maps = reference.upsample_maps(scene.probs, scene.rows, scene.columns)[1]
    np.testing.assert_allclose(ours, maps[:, mask].mean(axis=1), rtol=0, atol=ROUNDING)
    assert (ours.shape, ours.dtype) == ((6,), np.float32)
    assert ours.sum() == pytest.approx(1, abs=ROUNDING)


def test_a_region_may_be_given_by_its_window_alone(scene: Scene) -> None:
    mask = np.zeros((61, 83), bool)
    mask[20:31, 40:47] = np.random.default_rng(0).random((11, 7)) < 0.6
    whole = reference.region_probabilities(mask, scene.probs[0], scene.rows, scene.columns)
    window = reference.region_probabilities(mask[20:31, 40:47], scene.probs[0], scene.rows, scene.columns, (20, 40))
    np.testing.assert_allclose(window, whole, rtol=0, atol=ROUNDING)


def test_an_empty_region_is_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        reference.region_probabilities(np.zeros((61, 83), bool), scene.probs[0], scene.rows, scene.columns)
