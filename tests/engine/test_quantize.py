"""Scales and migrations by their definitions, and the search that recovers an encoder with planted outliers."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from int8_parts import Parts, parts_of, surface_tiny, with_outliers

from dapo_edge.backends.onnx_linears import ROLES, find_linears
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.calibration.histograms import ESTIMATORS
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.config import Calibration, Gate
from dapo_edge.engine.block_chain import BlockChain
from dapo_edge.engine.quantize import (
    ALPHAS,
    alphas_of,
    best_quantization,
    estimators_of,
    migrated_range,
    migration_of,
    quantization_of,
)
from dapo_edge.engine.sensitivity import MapDifference, MapMeter, block_sensitivities, give_back_order
from dapo_edge.errors import RecipeError
from dapo_edge.package import EnginePackage
from dapo_edge.quantization import Quantization

NAMES = [f"block{block}.{role}" for block in range(1, 6) for role in ROLES]


@pytest.fixture(scope="module")
def parts(package: EnginePackage) -> Parts:
    return parts_of(package)


@pytest.fixture(scope="module")
def ranges(parts: Parts) -> ActivationRanges:
    return parts.ranges()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranges_are_the_estimators(parts: Parts, ranges: ActivationRanges, estimator: str) -> None:
    found = quantization_of(parts.graph, ranges, estimator, 0.0)
    assert dict(found.ranges) == {name: ranges.linears[name].estimates[estimator] for name in NAMES}
    assert (found.migrations, found.kept) == ({}, {})
    assert found.settings == {"estimator": estimator, "alpha": 0.0}
    assert found.weights == ranges.weights


def test_everything_but_fc2_is_migrated(parts: Parts, ranges: ActivationRanges) -> None:
    graph = parts.graph
    found = quantization_of(graph, ranges, "max", 0.6, keep=["block2"])
    assert set(found.migrations) == {name for name in NAMES if not name.startswith("block2") and "fc2" not in name}
    assert found.ranges["block1.fc2"] == ranges.linears["block1.fc2"].max
    linear = find_linears(graph)[2]
    weight = onnx.numpy_helper.to_array(graph.constants[linear.weight])
    factors = [
        largest**0.6 / abs(row).max() ** 0.4
        for largest, row in zip(ranges.linears["block1.fc1"].channel_max.tolist(), weight, strict=True)
    ]
    middle = math.exp(sum(map(math.log, factors)) / len(factors))
    np.testing.assert_allclose(found.migrations["block1.fc1"], np.array(factors) / middle, rtol=1e-5)
    seen = ranges.linears["block1.fc1"]
    levelled = np.minimum(seen.channel_max, seen.max) / found.migrations["block1.fc1"]  # channels are rounded
    assert found.ranges["block1.fc1"] == pytest.approx(levelled.max(), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_quiet_channels_are_not_blown_up(alpha: float) -> None:
    channels = np.array([0.0, 1e-20, 1.0, 2.0], np.float32)
    weight = np.array([[1.0], [0.0], [1e-9], [1.0]], np.float32)
    found = migration_of(channels, weight, alpha)
    assert found.dtype == np.float32
    assert np.isfinite(found).all() and (found > 0).all()
    assert found.max() / found.min() <= 1e3**alpha * 1e3 ** (1 - alpha) * 2
    assert np.log(found).mean() == pytest.approx(0, abs=1e-5)
    np.testing.assert_array_equal(migration_of(channels, np.zeros_like(weight), alpha), np.ones(4))


def test_nothing_is_clipped_that_was_not_before() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 32)).astype(np.float32) * np.where(np.arange(32) < 3, 30, 1)
    channels = np.abs(x).max(axis=0).astype(np.float32)
    for alpha in (0.3, 0.8):
        migration = migration_of(channels, rng.standard_normal((32, 8)).astype(np.float32), alpha)
        for limit in (float(np.abs(x).max()), 20.0, 4.0, 0.5):
            reach = migrated_range(limit, channels, migration)
            clipped = np.abs(x / migration) > reach * (1 + 1e-6)
            assert (np.abs(x)[clipped] > limit).all()
            assert reach <= (channels / migration).max() * (1 + 1e-6)
        assert not (np.abs(x / migration) > migrated_range(np.inf, channels, migration) * (1 + 1e-6)).any()


def test_kept_in_the_recipe(parts: Parts, ranges: ActivationRanges) -> None:
    found = quantization_of(parts.graph, ranges, "max", 0.5, keep=["block3", "block1.fc1", "block3.qkv"])
    assert set(found.kept) == {"block1.fc1", *(f"block3.{role}" for role in ROLES)}
    assert set(found.kept.values()) == {"asked for in the recipe"}
    assert set(found.ranges) == set(NAMES) - set(found.kept)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("block6", "Did you mean 'block"),
        ("block0.fc1", "Did you mean 'block"),
        ("block3.qvk", r"Did you mean 'block3\.qkv'\?"),
        ("Block3", "Did you mean 'block3'"),
        ("adapters.0", r"Its blocks are"),
        ("", r"Its blocks are"),
    ],
)
def test_kept_names_that_are_not_there(parts: Parts, ranges: ActivationRanges, name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint) as caught:
        quantization_of(parts.graph, ranges, "max", 0.0, keep=["block1", name])
    assert f"names '{name}', which the encoder has not" in str(caught.value)
    assert "block1 to block5, each with qkv, out, fc1, fc2" in str(caught.value)


def test_what_a_recipe_leaves_open() -> None:
    assert estimators_of("auto") == ESTIMATORS
    assert estimators_of("percentile") == ("percentile_99.9", "percentile_99.99", "percentile_99.999")
    assert [estimators_of(name) for name in ("max", "entropy", "mse")] == [("max",), ("entropy",), ("mse",)]
    assert alphas_of("auto") == (0.0, *ALPHAS)
    assert [alphas_of(value) for value in (0.0, 0.55, 1)] == [(0.0,), (0.55,), (1.0,)]


@pytest.fixture(scope="module")
def meter(parts: Parts) -> MapMeter:
    return MapMeter(BlockChain(parts.graph, parts.images(100, 2)), parts.bank, parts.spec)


def test_a_recipe_that_leaves_nothing_open(parts: Parts, ranges: ActivationRanges, meter: MapMeter) -> None:
    settings = Calibration(estimator="mse", migration=0.5, keep=("block2",))
    found = best_quantization(parts.encoder, parts.graph, ranges, settings, meter)
    (trial,) = found.trials
    assert (trial.estimator, trial.alpha) == ("mse", 0.5)
    assert found.quantization.settings == {"estimator": "mse", "alpha": 0.5}
    assert set(found.quantization.kept) == {f"block2.{role}" for role in ROLES}


def test_the_least_harm_wins(parts: Parts, ranges: ActivationRanges, meter: MapMeter) -> None:
    steps: list[tuple[int, int]] = []
    found = best_quantization(
        parts.encoder, parts.graph, ranges, Calibration(), meter, lambda done, of: steps.append((done, of))
    )
    tried = [(trial.estimator, trial.alpha) for trial in found.trials]
    assert len(tried) == len(set(tried))
    assert tried[:6] == [(estimator, 0.0) for estimator in ESTIMATORS]
    assert [alpha for _, alpha in tried[6:11]] == list(ALPHAS)
    assert len(tried) in (11, 16)
    best = min(found.trials, key=lambda trial: trial.difference.harm)
    assert found.quantization.settings == {"estimator": best.estimator, "alpha": best.alpha}
    assert found.encoder == for_cpu(parts.encoder, found.quantization)
    assert meter.difference(meter.chain.quantized_blocks).harm == pytest.approx(best.difference.harm), "it is set"
    assert [done for done, _ in steps] == list(range(len(tried) + 1))
    assert all(done < of for done, of in steps[:-1])
    assert steps[-1] == (len(tried), len(tried))


@pytest.mark.slow
def test_planted_outliers_are_recovered() -> None:
    """LayerNorm gains × 30 in the first block: max calibration fails; migration, or that block in float, passes."""
    parts = surface_tiny()
    planted = with_outliers(parts, ["block1.qkv", "block1.fc1"], factor=30, channels=6)
    graph, ranges, limit = planted.graph, planted.ranges(24), Gate().max_mean_map_difference
    meter = MapMeter(BlockChain(graph, planted.images(6000, 8)), planted.bank, planted.spec)

    def difference(quantization: Quantization) -> MapDifference:
        meter.chain.set_int8(for_cpu(planted.encoder, quantization))
        return meter.difference(meter.chain.quantized_blocks)

    naive = difference(quantization_of(graph, ranges, "max", 0.0))
    assert naive.combined > 2 * limit
    assert naive.largest > 0.5
    worst, *_ = order = give_back_order(block_sensitivities(meter))
    assert (worst, len(order)) == (1, 8)
    given_back = meter.difference(set(meter.chain.quantized_blocks) - {worst})
    found = best_quantization(planted.encoder, graph, ranges, Calibration(estimator="max"), meter)
    assert found.quantization.settings["alpha"] > 0
    migrated = meter.difference(meter.chain.quantized_blocks)
    for recovered in (given_back, migrated):
        assert recovered.combined < min(0.1 * naive.combined, 0.5 * limit)
        assert recovered.largest < 0.3
