"""What one block in INT8 does to the maps, against the arithmetic written out."""

from __future__ import annotations

import numpy as np
import pytest
from int8_parts import Parts, parts_of

from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.engine.block_chain import BlockChain
from dapo_edge.engine.quantize import quantization_of
from dapo_edge.engine.sensitivity import (
    BlockSensitivity,
    MapDifference,
    MapMeter,
    block_sensitivities,
    give_back_order,
)
from dapo_edge.errors import GateError
from dapo_edge.kernels import reference
from dapo_edge.package import EnginePackage

LAYERS = (2, 4, 5)


@pytest.fixture(scope="module")
def parts(package: EnginePackage) -> Parts:
    return parts_of(package)


@pytest.fixture(scope="module")
def meter(parts: Parts) -> MapMeter:
    chain = BlockChain(parts.graph, parts.images(100, 3))
    quantization = quantization_of(parts.graph, parts.ranges(), "max", 0.0, keep=["block3"])
    chain.set_int8(for_cpu(parts.encoder, quantization))
    return MapMeter(chain, parts.bank, parts.spec)


def anomaly(parts: Parts, tokens: np.ndarray) -> np.ndarray:
    probs = reference.patch_probabilities(tokens, parts.bank.rows, parts.spec.temperature, parts.spec.grid)
    return reference.anomaly_map(probs, *parts.spec.tables((parts.spec.image_size,) * 2))


def test_differences_are_those_of_the_maps(parts: Parts, meter: MapMeter) -> None:
    found = meter.difference([1, 2])
    tokens, plain = meter.chain.encode([1, 2])[0], meter.chain.encode()[0]
    for layer in range(len(LAYERS)):
        part = slice(layer, layer + 1)
        expected = np.abs(anomaly(parts, tokens[:, part]) - anomaly(parts, plain[:, part])).mean()
        assert found.layers[layer] == pytest.approx(expected, rel=1e-3)
    whole = np.abs(anomaly(parts, tokens) - anomaly(parts, plain))
    assert found.combined == pytest.approx(whole.mean(), rel=1e-3)
    assert found.largest == pytest.approx(whole.max(), rel=1e-3)
    assert found.harm == pytest.approx(sum(found.layers) / 3)
    assert 0 < found.combined < found.largest <= 1


def test_a_block_moves_the_layers_behind_it_alone(meter: MapMeter) -> None:
    steps: list[tuple[int, int]] = []
    found = block_sensitivities(meter, lambda done, of: steps.append((done, of)))
    assert [item.block for item in found] == [1, 2, 4, 5], "block 3 was kept"
    for item in found:
        for layer, difference in zip(LAYERS, item.difference.layers, strict=True):
            assert (difference > 0) == (layer >= item.block)
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert meter.difference([3]) == MapDifference((0.0, 0.0, 0.0), 0.0, 0.0)


def test_the_most_harmful_comes_first() -> None:
    def sensitivity(block: int, *layers: float) -> BlockSensitivity:
        return BlockSensitivity(block, MapDifference(layers, 0.0, 0.0))

    found = [sensitivity(1, 0.1, 0.1), sensitivity(2, 0.0, 0.4), sensitivity(3, 0.1, 0.1), sensitivity(4, 0.3, 0.0)]
    assert give_back_order(found) == (2, 4, 1, 3)
    assert give_back_order([]) == ()


def test_a_float_encoder_without_numbers_is_refused(parts: Parts) -> None:
    images = parts.images(100, 2)
    images[1, 0, 5, 5] = np.nan
    with pytest.raises(GateError, match=r"float encoder's maps hold NaN.*weights"):
        MapMeter(BlockChain(parts.graph, images), parts.bank, parts.spec)


def test_nan_in_int8_is_as_wrong_as_can_be(parts: Parts, meter: MapMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, embedding = meter.chain.encode()
    broken = np.full_like(tokens, np.nan)
    monkeypatch.setattr(meter.chain, "encode", lambda int8: (broken, embedding))
    assert meter.difference([1]) == MapDifference((1.0, 1.0, 1.0), 1.0, 1.0)
