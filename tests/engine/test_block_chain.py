"""An encoder cut into blocks computes what the whole one does, in any mixture of forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_parts import Parts, parts_of, run_openvino
from made_packages import with_batch

from dapo_edge.backends.onnx_graph import IMAGE, read_plain
from dapo_edge.backends.onnx_linears import ROLES
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.engine.block_chain import BlockChain, block_cuts, frames_that_fit
from dapo_edge.engine.quantize import quantization_of
from dapo_edge.errors import BackendError
from dapo_edge.package import EnginePackage
from dapo_edge.quantization import Quantization

DEPTH = 5


@pytest.fixture(scope="module")
def parts(package: EnginePackage) -> Parts:
    return parts_of(package)


@pytest.fixture(scope="module")
def quantization(parts: Parts) -> Quantization:
    return quantization_of(parts.graph, parts.ranges(), "max", 0.5)


def only(quantization: Quantization, blocks: set[int]) -> Quantization:
    others = set(range(1, DEPTH + 1)) - blocks
    return quantization.without({f"block{block}.{role}": "test" for block in others for role in ROLES})


def test_cuts_are_the_residual_stream(parts: Parts) -> None:
    graph = parts.graph
    cuts = block_cuts(graph)
    assert len(cuts) == DEPTH + 1
    assert {graph.shapes[cut] for cut in cuts} == {(1, 41, 64)}, "class, 4 prompt tokens and 36 patches, width 64"
    makers = {node.output[0]: node for node in graph.nodes}
    assert [makers[cut].op_type for cut in cuts] == ["Concat"] + ["Add"] * DEPTH


@pytest.mark.parametrize("int8", [set(), {1}, {5}, {2, 4}, {1, 2, 3, 4, 5}])
def test_any_mixture_is_the_whole_encoder_with_those_blocks(
    parts: Parts, quantization: Quantization, int8: set[int]
) -> None:
    images = parts.images(100, 3)
    chain = BlockChain(parts.graph, images)
    chain.set_int8(for_cpu(parts.encoder, quantization))
    assert chain.quantized_blocks == (1, 2, 3, 4, 5)
    tokens, embeddings = chain.encode(int8)
    expected = run_openvino(for_cpu(parts.encoder, only(quantization, int8)), images)
    scale = [np.abs(array).max() for array in expected]
    # A rounding that falls to the other side moves one value by a step, and what follows by less.
    assert np.abs(tokens - expected[0]).max() <= 5e-3 * scale[0]
    assert np.abs(embeddings - expected[1]).max() <= 5e-3 * scale[1]
    plain, _ = chain.encode()
    assert (np.abs(tokens - plain).mean() > 0) == bool(int8)
    np.testing.assert_array_equal(chain.encode(int8)[0], tokens)


def test_without_int8_every_block_is_float(parts: Parts) -> None:
    images = parts.images(100, 2)
    chain = BlockChain(parts.graph, images)
    assert chain.quantized_blocks == ()
    tokens, embeddings = chain.encode(range(1, DEPTH + 1))
    expected = run_openvino(parts.encoder, images)
    np.testing.assert_allclose(tokens, expected[0], atol=1e-5 * np.abs(expected[0]).max())
    np.testing.assert_allclose(embeddings, expected[1], atol=1e-5 * np.abs(expected[1]).max())


def test_kept_blocks_have_no_form_of_their_own(parts: Parts, quantization: Quantization) -> None:
    chain = BlockChain(parts.graph, parts.images(100, 1))
    chain.set_int8(for_cpu(parts.encoder, only(quantization, {2, 3})))
    assert chain.quantized_blocks == (2, 3)
    np.testing.assert_array_equal(chain.encode([1, 4, 5])[0], chain.encode()[0])
    chain.set_int8(for_cpu(parts.encoder, only(quantization, {5})))
    assert chain.quantized_blocks == (5,), "the next INT8 encoder replaces all of the last one"


def test_batches_that_are_not_full(package: EnginePackage, parts: Parts, tmp_path: Path) -> None:
    images = parts.images(100, 3)
    of_two = read_plain(with_batch(package, 2, tmp_path).encoder_bytes())
    assert of_two.shapes[IMAGE][0] == 2
    tokens, embeddings = BlockChain(of_two, images).encode()
    expected_tokens, expected_embeddings = BlockChain(parts.graph, images).encode()
    np.testing.assert_allclose(tokens, expected_tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(embeddings, expected_embeddings, rtol=1e-4, atol=1e-4)
    assert frames_that_fit(of_two) == frames_that_fit(parts.graph) == 16


def test_frames_stay_within_the_memory(parts: Parts) -> None:
    frame = (DEPTH + 1) * 41 * 64 * 4  # bytes
    assert frames_that_fit(parts.graph, limit=10 * frame) == 10
    assert frames_that_fit(parts.graph, limit=10 * frame - 1) == 9
    assert frames_that_fit(parts.graph, wanted=4) == 4
    assert frames_that_fit(parts.graph, limit=1) == 1, "one at least"


@pytest.mark.parametrize("block", [0, 6, -1])
def test_blocks_that_are_not_there(parts: Parts, block: int) -> None:
    chain = BlockChain(parts.graph, parts.images(100, 1))
    with pytest.raises(ValueError, match="counted from 1 to 5"):
        chain.encode([2, block])


def test_an_int8_encoder_of_another_graph(parts: Parts, quantization: Quantization) -> None:
    chain = BlockChain(parts.graph, parts.images(100, 1))
    model = onnx.load_from_string(for_cpu(parts.encoder, quantization))
    cut = block_cuts(parts.graph)[3]
    for node in model.graph.node:
        node.input[:] = ["other" if name == cut else name for name in node.input]
        node.output[:] = ["other" if name == cut else name for name in node.output]
    with pytest.raises(BackendError, match=rf"can't be cut into blocks: '({cut}|other)' crosses a cut"):
        chain.set_int8(model.SerializeToString())


def test_a_graph_whose_blocks_reach_past_each_other(parts: Parts) -> None:
    graph = parts.graph
    cuts = block_cuts(graph)
    nodes = []
    for node in graph.nodes:
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        if node.output[0] == cuts[3]:
            changed.input[0] = cuts[1]
        nodes.append(changed)
    with pytest.raises(BackendError, match=f"'{cuts[1]}' crosses a cut"):
        BlockChain(replace(graph, nodes=tuple(nodes)), parts.images(100, 1))
