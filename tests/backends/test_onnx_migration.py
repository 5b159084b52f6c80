"""Migration keeps the float function as it is; descriptions that do not fit the encoder are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from encoder_case import Case, described, in_openvino, learned, run, vectors
from onnx import numpy_helper

from dapo_edge.backends.onnx_flavours import typed_flavour
from dapo_edge.backends.onnx_graph import read_plain
from dapo_edge.backends.onnx_linears import find_linears, weights_digest
from dapo_edge.backends.onnx_quantized import for_cpu, int8_flavour, migrated
from dapo_edge.errors import BackendError


@pytest.fixture(scope="module")
def tiny(tiny_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("migrated"), tiny_fields, learned)


@pytest.mark.parametrize("roles", [("qkv",), ("fc1",), ("out",), ("qkv", "out", "fc1")])
def test_migration_changes_nothing_but_where_outliers_are(tiny: Case, roles: tuple[str, ...]) -> None:
    graph = read_plain(tiny.model)
    moved = migrated(graph, described(tiny, migrations=vectors(tiny, *roles)))
    assert weights_digest(moved) != weights_digest(graph)
    assert moved.shapes == graph.shapes
    assert [node.output for node in moved.nodes] == [node.output for node in graph.nodes]
    before, after = (typed_flavour(one, "fp32", tokens="fp32").model for one in (graph, moved))
    for compute in (run, in_openvino):
        for found, expected in zip(compute(after, tiny.image), compute(before, tiny.image), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    linears = find_linears(graph)
    inputs = [linear.input for linear in linears]
    pairs = zip(linears, run(before, tiny.image, inputs), run(after, tiny.image, inputs), strict=True)
    for linear, old, new in pairs:
        factors = vectors(tiny, *roles).get(linear.name, np.ones(1))
        np.testing.assert_allclose(new * factors, old, rtol=1e-3, atol=1e-4, err_msg=linear.name)


def test_without_migration_the_graph_is_what_it_was(tiny: Case) -> None:
    graph = read_plain(tiny.model)
    same = migrated(graph, described(tiny))
    assert same.nodes == graph.nodes
    assert same.constants == graph.constants


def test_constants_that_nodes_share(tiny: Case) -> None:
    """Equal gains of several norms are one constant in an export: only the migrated one may change."""

    def share(proto: Any) -> None:
        norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
        for norm in norms[1:]:
            norm.input[1:] = norms[0].input[1:]

    case = copy_of(tiny, edited(tiny.model, share))
    graph = read_plain(case.model)
    moved = migrated(graph, described(case, migrations={"block1.qkv": vectors(case, "qkv")["block1.qkv"]}))
    before, after = (run(typed_flavour(one, "fp32").model, case.image)[0] for one in (graph, moved))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


# What is refused.


def edited(model: bytes, edit: Callable[[Any], None]) -> bytes:
    proto = onnx.load_from_string(model)
    edit(proto)
    return proto.SerializeToString()


def copy_of(case: Case, model: bytes) -> Case:
    copy = Case.__new__(Case)
    copy.__dict__.update({**case.__dict__, "model": model})
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "0" * 32}, "made for another encoder"),
        ({"ranges": {"block9.fc1": 1.0}}, "names 'block9.fc1', which the encoder does not have"),
        ({"kept": {"block1.head": "why"}}, "names 'block1.head', which the encoder does not have"),
        ({"migrations": {"block1.qkv": np.ones(63, np.float32)}}, "block1.qkv has 63 channels, its input has 64"),
        ({"migrations": {"block1.out": np.ones(65, np.float32)}}, "block1.out has 65 channels, its input has 64"),
        ({"migrations": {"block2.fc2": np.ones(256, np.float32)}}, "block2.fc2 can't be migrated: nothing can be"),
        ({"migrations": {"block1.fc1": np.full(64, 1e-39, np.float32)}}, "'/encoder/ln_2/LayerNorm.*beyond float32"),
        ({"ranges": {"block1.fc1": 1e300}}, "range of block1.fc1 is no finite float32"),
    ],
)
def test_descriptions_that_do_not_fit(tiny: Case, changes: dict[str, Any], message: str) -> None:
    quantization = replace(described(tiny), **changes)
    for convert in (for_cpu, int8_flavour):
        with pytest.raises(BackendError, match=rf"{message}.*dapo-edge build"):
            convert(tiny.model, quantization)


def test_ranges_of_another_encoder(tiny: Case) -> None:
    fewer = {name: value for name, value in tiny.ranges.items() if "ln_2" not in name}
    with pytest.raises(BackendError, match="they belong to another encoder"):
        int8_flavour(tiny.model, described(tiny), fewer, precision="fp16")


def test_weights_that_are_no_numbers(tiny: Case) -> None:
    def damage(proto: Any) -> None:
        name = find_linears(read_plain(tiny.model))[3].weight
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(np.nan), name))

    case = copy_of(tiny, edited(tiny.model, damage))
    with pytest.raises(BackendError, match=r"weight or the range of block1\.fc2 is no finite float32"):
        for_cpu(case.model, described(case))


def test_a_norm_that_others_read_is_not_migrated(tiny: Case) -> None:
    def read_twice(proto: Any) -> None:
        norm = next(node for node in proto.graph.node if node.op_type == "LayerNormalization" and "ln_2" in node.name)
        residual = next(node for node in proto.graph.node if node.op_type == "Add" and norm.input[0] in node.input)
        residual.input[list(residual.input).index(norm.input[0])] = norm.output[0]

    case = copy_of(tiny, edited(tiny.model, read_twice))
    with pytest.raises(BackendError, match=r"block1\.fc1 can't be migrated: it does not sit alone behind"):
        for_cpu(case.model, described(case, migrations=vectors(case, "fc1")))
    assert for_cpu(case.model, described(case)), "without migration it can be quantised"


def test_another_order_of_heads_is_not_migrated(tiny: Case) -> None:
    graph = read_plain(tiny.model)
    qkv = find_linears(graph)[0]
    product = next(node for node in graph.nodes if node.name == qkv.node)
    summed = next(node for node in graph.nodes if product.output[0] in node.input)
    reshaped = next(node for node in graph.nodes if summed.output[0] in node.input).output[0]
    *outer, three, heads, head = graph.shapes[reshaped]
    assert (three, heads * head) == (3, 64)
    other = replace(graph, shapes={**graph.shapes, reshaped: (*outer, heads, three, head)})
    with pytest.raises(BackendError, match=r"block1\.out can't be migrated: block1\.qkv is not read as"):
        migrated(other, described(tiny, migrations=vectors(tiny, "out")))
