"""The encoder in INT8: what is quantised and what never is, the same integers in every form, and honest migration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from encoder_case import Case, described, in_openvino, learned, run, vectors
from onnx import TensorProto, helper, numpy_helper

from dapo_edge.backends.onnx_flavours import Flavour
from dapo_edge.backends.onnx_graph import read_plain
from dapo_edge.backends.onnx_linears import find_linears
from dapo_edge.backends.onnx_quantized import (
    activation_scale,
    for_cpu,
    int8_flavour,
    quantized_weight,
)
from dapo_edge.quantization import Quantization

Array = np.ndarray[Any, Any]
QDQ = ("QuantizeLinear", "DequantizeLinear")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@pytest.fixture(scope="module")
def tiny(tiny_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("quantized"), tiny_fields, learned)


def lowest_cosine(found: Array, expected: Array) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(
        ((found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)).min()
    )


def constants_of(model: bytes) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}


# What is quantised.


def forms(case: Case, quantization: Quantization) -> dict[str, bytes]:
    return {
        "cpu": for_cpu(case.model, quantization),
        "8.6": int8_flavour(case.model, quantization, case.ranges).model,
        "10": int8_flavour(case.model, quantization, case.ranges, precision="fp16").model,
    }


def test_only_the_inputs_and_weights_of_linears(tiny: Case) -> None:
    graph = read_plain(tiny.model)
    linears = {linear.node: linear for linear in find_linears(graph)}
    kept = {"block1.fc1": "asked for", "block4.out": "hurts the maps"}
    inside = {node for node, linear in linears.items() if linear.name not in kept}
    assert (len(linears), len(inside)) == (20, 18)
    for form, model in forms(tiny, described(tiny, kept)).items():
        nodes = onnx.load_from_string(model).graph.node
        added = [node for node in nodes if node.op_type in QDQ]
        assert Counter(node.op_type for node in added) == {
            "QuantizeLinear": 36 if form == "8.6" else 18,
            "DequantizeLinear": 36,
        }
        back = [node.output[0] for node in added if node.op_type == "DequantizeLinear"]
        readers = [(node.name, place) for node in nodes for place, name in enumerate(node.input) if name in back]
        assert sorted(readers) == sorted((node, place) for node in inside for place in (0, 1)), form
        sources = {node.input[0] for node in added if node.op_type == "QuantizeLinear" and "/weight/" not in node.name}
        assert sources == {linears[node].input for node in inside}
        plain = [(node.name, node.op_type, list(node.output)) for node in nodes if node.op_type not in (*QDQ, "Cast")]
        names = {"patch_tokens": "patch_tokens/fp32"} if form == "8.6" else {}
        names |= {"image_embedding": "image_embedding/fp16"} if form == "10" else {}
        expected = [(node.name, node.op_type, [names.get(name, name) for name in node.output]) for node in graph.nodes]
        assert plain == expected, "everything else is what it was, by the same names"


def test_types_of_every_form(tiny: Case) -> None:
    wanted = {"cpu": (17, "float32", "float32"), "8.6": (17, "float32", "float16"), "10": (19, "float16", "float16")}
    for form, model in forms(tiny, described(tiny)).items():
        proto = onnx.load_from_string(model)
        onnx.checker.check_model(proto, full_check=True)
        opset, floats, tokens = wanted[form]
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
        kinds = kinds_of(proto)
        assert kinds["image"] == helper.np_dtype_to_tensor_dtype(np.dtype(floats))
        assert kinds["patch_tokens"] == helper.np_dtype_to_tensor_dtype(np.dtype(tokens))
        assert kinds["image_embedding"] == TensorProto.FLOAT
        constants = constants_of(model)
        for node in proto.graph.node:
            if node.op_type in QDQ:
                check_pair(node, kinds, constants, floats)
        assert (constants["block1.fc2/weight/quantized"].dtype == np.int8) if form != "8.6" else True
        assert ("block1.fc2/weight/float" in constants) == (form == "8.6")
    assert len(forms(tiny, described(tiny))["cpu"]) < 0.5 * len(tiny.model)


def kinds_of(proto: Any) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    kinds = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return kinds | {value.name: value.type.tensor_type.elem_type for value in values}


def check_pair(node: Any, kinds: dict[str, int], constants: dict[str, Array], floats: str) -> None:
    """The rules of strongly typed networks, and of symmetric INT8 in all of them."""
    data, scale, zero = node.input
    outside = data if node.op_type == "QuantizeLinear" else node.output[0]
    assert kinds[outside] == kinds[scale] == helper.np_dtype_to_tensor_dtype(np.dtype(floats)), node.name
    assert kinds[zero] == TensorProto.INT8
    assert not constants[zero].any()
    assert constants[zero].shape == constants[scale].shape
    assert (constants[scale] >= np.float32(2**-14)).all()
    axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    assert axes == ([1] if "/weight/" in node.name else []), node.name
    assert constants[scale].ndim == len(axes)


def test_a_split_into_equal_parts_says_how_many_in_opset_19(tiny: Case) -> None:
    proto = onnx.load_from_string(tiny.model)
    for node in proto.graph.node:
        if node.op_type == "Split":
            del node.input[1]
            node.attribute.append(helper.make_attribute("num_outputs", 3))
    counted = int8_flavour(proto.SerializeToString(), described(tiny), precision="fp16")
    expected = int8_flavour(tiny.model, described(tiny), precision="fp16")
    for found, same in zip(run(counted.model, tiny.image), run(expected.model, tiny.image), strict=True):
        np.testing.assert_array_equal(found, same)


def test_names_of_what_is_quantised(tiny: Case) -> None:
    flavour = int8_flavour(tiny.model, described(tiny, {"block1.qkv": "why"}), tiny.ranges)
    assert flavour.quantized[:4] == ("block1.out", "block1.fc1", "block1.fc2", "block2.qkv")
    assert (len(flavour.quantized), flavour.attention_blocks, flavour.islands) == (19, 5, ())


# The numbers.


def test_each_linear_is_what_numpy_makes_of_it(tiny: Case) -> None:
    """x and W are rounded to int8 and back by formulas of this test; the product is in float64."""
    migrations = vectors(tiny, "qkv", "fc1", "out")
    quantization = described(tiny, migrations=migrations)
    graph = read_plain(tiny.model)
    linears = find_linears(graph)
    products = {node.name: node.output[0] for node in graph.nodes}
    weights = {name: numpy_helper.to_array(tensor) for name, tensor in graph.constants.items()}
    names = [name for linear in linears for name in (linear.input, products[linear.node])]
    found = run(for_cpu(tiny.model, quantization), tiny.image, names)
    for linear, x, product in zip(linears, found[::2], found[1::2], strict=True):
        weight = weights[linear.weight].astype(np.float64)
        weight *= migrations.get(linear.name, np.ones(len(weight)))[:, None]
        if linear.role == "qkv":
            weight[:, 2 * len(weight) :] /= migrations[linear.name.replace("qkv", "out")]
        expected = rounded(x, quantization.ranges[linear.name] / 127) @ rounded(weight, np.abs(weight).max(0) / 127)
        # Rounding the weight in float32 moves single ones by a step, which is far below what a wrong scale would do.
        np.testing.assert_allclose(product, expected, atol=2e-3 * np.abs(expected).max(), err_msg=linear.name)
        assert np.abs(product - expected).mean() < 1e-5 * np.abs(expected).max()


def rounded(x: Array, scale: Array | float) -> Array:
    """To int8 and back with the next float16 at or above `scale`."""
    candidates = np.float16(scale), np.nextafter(np.float16(scale), np.float16(np.inf))
    scale = np.where(candidates[0].astype(float) >= scale, *candidates).astype(np.float64)
    return np.clip(np.round(x.astype(np.float64) / scale), -128, 127) * scale


def test_all_forms_compute_the_same(tiny: Case) -> None:
    quantization = described(tiny, {"block2.fc2": "why"}, vectors(tiny, "qkv", "fc1", "out"))
    models = forms(tiny, quantization)
    cpu = run(models["cpu"], tiny.image)
    assert 0.99 < lowest_cosine(cpu[0], tiny.tokens) < 0.99999, "it is INT8, and still the same encoder"
    for form, limit in (("cpu", 1 - 1e-6), ("8.6", 1 - 1e-6), ("10", 0.999)):
        for tokens, embedding in (run(models[form], tiny.image), in_openvino(models[form], tiny.image)):
            assert lowest_cosine(tokens, cpu[0]) > limit, form
            assert lowest_cosine(embedding, cpu[1]) > limit, form
            assert lowest_cosine(tokens, tiny.tokens) > 0.99
            assert lowest_cosine(embedding, tiny.embedding) > 0.99
    assert forms(tiny, quantization) == models, "equal inputs, equal bytes"


def test_integers_and_scales_are_the_same_in_all_forms(tiny: Case) -> None:
    models = forms(tiny, described(tiny, migrations=vectors(tiny, "fc1")))
    cpu, ten, eight = (constants_of(models[form]) for form in ("cpu", "10", "8.6"))
    stored = [name for name in cpu if name.endswith("/weight/quantized")]
    assert len(stored) == 20
    for name, value in zip(stored, run(models["8.6"], tiny.image, stored), strict=True):
        np.testing.assert_array_equal(value, cpu[name])
        np.testing.assert_array_equal(ten[name], cpu[name])
        assert np.abs(cpu[name].astype(int)).max(axis=0).min() >= 126, "every column uses its steps"
    for name in (name for name in cpu if name.endswith("/scale")):
        assert (eight[name] == cpu[name]).all()
        assert (ten[name].astype(np.float32) == cpu[name]).all(), "float16 takes nothing from them"


@pytest.mark.parametrize(
    ("reach", "exact"), [(127, True), (1.0, False), (1e-3, False), (6e6, False), (1e7, True), (1e-45, True)]
)
def test_activation_scale(reach: float, exact: bool) -> None:
    scale = activation_scale(reach)
    assert (scale.dtype, scale.shape) == (np.float32, ())
    if reach < 1e-40:
        assert scale == 1, "what is as good as zero needs no scale of its own"
        return
    step = reach / 127
    is_half = step >= 2**-14 and step < 65504
    assert step * (1 - 1e-7) <= scale <= step * (1 + (2**-10 if is_half else 1e-7))
    assert (np.float32(np.float16(scale)) == scale) if is_half else (scale == np.float32(step))


def test_quantized_weight() -> None:
    weight = np.array([[1, 0, 1e-3, -2e-42], [-0.5, 0, -1e-3, 0], [0.1, 0, 2e-4, 0]], np.float32)
    found = quantized_weight(weight)
    assert (found.values.dtype, found.scales.dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(found.values, [[127, 0, 127, 0], [-63, 0, -127, 0], [13, 0, 25, 0]])
    np.testing.assert_array_equal(found.scales[[1, 3]], 1)
    np.testing.assert_allclose(found.values * found.scales, weight, atol=1 / 254 + 1e-4)
    lowest = quantized_weight(np.array([[-1.0], [0.999]], np.float32)).values
    assert lowest.min() == -127, "-128 is no weight"


# Islands.


def whole_linear(name: str) -> set[str]:
    steps = ("input/QuantizeLinear", "input/DequantizeLinear", "weight/DequantizeLinear")
    return {f"{name}/{step}" for step in steps}


def check_float_types(flavour: Flavour) -> None:
    """Every operator has one float type: float32 for islands, float16 for all others."""
    proto = onnx.load_from_string(flavour.model)
    kinds = kinds_of(proto)
    for node in proto.graph.node:
        if node.op_type != "Cast":
            found = {kinds[name] for name in (*node.input, *node.output) if kinds[name] in FLOATS}
            assert found == {TensorProto.FLOAT if node.name in flavour.islands else TensorProto.FLOAT16}, node.name


def test_small_scales_make_an_island_and_zeros_do_not(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    def edit(method: Any) -> None:
        blocks = method.clip.visual.transformer.resblocks
        blocks[1].mlp.c_fc.weight[3] *= 1e-4  # a column of the exported weight
        blocks[2].mlp.c_fc.weight[3] = 0

    case = Case(tmp_path, tiny_fields, edit)
    quantization = described(case)
    flavour = int8_flavour(case.model, quantization, case.ranges, precision="fp16")
    check_float_types(flavour)
    assert set(flavour.islands) == {*whole_linear("block2.fc1"), "/encoder/mlp/c_fc_1/MatMul"}
    constants = constants_of(flavour.model)
    assert constants["block2.fc1/weight/scale/fp32"].min() < 2**-14
    assert constants["block3.fc1/weight/scale"][3] == 1
    assert not constants["block3.fc1/weight/quantized"][:, 3].any()
    cpu = run(for_cpu(case.model, quantization), case.image)
    for tokens, _ in (run(flavour.model, case.image), in_openvino(flavour.model, case.image)):
        assert lowest_cosine(tokens, cpu[0]) > 0.999
    eight = int8_flavour(case.model, quantization, case.ranges)
    assert eight.islands == (), "8.6 keeps every scale in float32"


def test_islands_around_values_beyond_float16(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    def edit(method: Any) -> None:
        mlp = method.clip.visual.transformer.resblocks[2].mlp
        mlp.c_fc.weight.mul_(1e5)
        mlp.c_proj.weight.mul_(1e-5)

    case = Case(tmp_path, tiny_fields, edit)
    flavour = int8_flavour(case.model, described(case), case.ranges, precision="fp16")
    check_float_types(flavour)
    assert set(flavour.islands) == {
        *whole_linear("block3.fc1"),
        *whole_linear("block3.fc2"),
        *(f"/encoder/mlp/{name}" for name in ("c_fc_2/MatMul", "c_fc_2/Add", "c_proj_2/MatMul")),
        *(f"/encoder/mlp/gelu_2/{name}" for name in ("Mul", "Sigmoid", "Mul_1")),
    }
    tokens, _ = run(flavour.model, case.image)
    assert lowest_cosine(tokens, case.tokens) > 0.99
    eight = int8_flavour(case.model, described(case), case.ranges)
    assert eight.islands == tuple(name for name in flavour.islands if "Linear" not in name)
    assert kinds_of(onnx.load_from_string(eight.model))["/encoder/mlp/c_fc_2/MatMul_output_0"] == TensorProto.FLOAT
