"""The FP16 and FP32 flavours of the encoder: right types, right numbers, and islands where float16 ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from encoder_case import Case
from onnx import TensorProto, helper, numpy_helper

import dapo_edge
from dapo_edge.backends.onnx_flavours import RANGE_LIMIT, Flavour, fp16_flavour, fp32_flavour, measured_tensors
from dapo_edge.backends.onnx_graph import read_plain
from dapo_edge.config import load_recipe, parse_recipe
from dapo_edge.engine.export import export_encoder
from dapo_edge.errors import BackendError
from dapo_edge.models.method import method_of
from dapo_edge.package import EnginePackage

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
OUTLIERS = (5, 6)  # the channels of planted outliers, of opposite signs, so that they do not shift the mean


def check_types(flavour: Flavour) -> None:
    """The rule of strongly typed networks: the float inputs and outputs of an operator have one type, Cast excepted."""
    model = onnx.load_from_string(flavour.model)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    kinds = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    kinds |= {value.name: value.type.tensor_type.elem_type for value in values}
    islands = set(flavour.islands)
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    for node in model.graph.node:
        if node.op_type == "Cast":
            ends = [makers.get(node.input[0]), readers.get(node.output[0])]
            at_island = any(end is not None and end.name in islands for end in ends)
            assert at_island or node.output[0] in ("patch_tokens", "image_embedding"), node.name
            assert kinds[node.input[0]] != kinds[node.output[0]]
            assert "Cast" not in [end.op_type for end in ends if end is not None]
        else:
            found = {kinds[name] for name in (*node.input, *node.output) if kinds[name] in FLOATS}
            is_single = flavour.precision == "fp32" or node.name in islands
            assert found == {TensorProto.FLOAT if is_single else TensorProto.FLOAT16}, node.name
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) == flavour.nodes + flavour.casts
    assert len(casts) == flavour.casts
    ends = [kinds[value.name] for value in (*model.graph.input, *model.graph.output)]
    assert ends[1:] == [TensorProto.FLOAT16, TensorProto.FLOAT]
    assert ends[0] == (TensorProto.FLOAT16 if flavour.precision == "fp16" else TensorProto.FLOAT)


def operators(flavour: Flavour) -> dict[str, str]:
    return {node.name: node.op_type for node in onnx.load_from_string(flavour.model).graph.node}


@pytest.fixture(scope="module")
def tiny(tiny_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("flavours"), tiny_fields)


def test_fp16_flavour_is_fp16_throughout(tiny: Case) -> None:
    flavour = fp16_flavour(tiny.model, tiny.ranges)
    check_types(flavour)
    assert (flavour.precision, flavour.islands, flavour.casts) == ("fp16", (), 1)
    assert len(flavour.model) < 0.55 * len(tiny.model)
    found = list(operators(flavour).values())
    assert found.count("LayerNormalization") == 12
    assert found.count("Softmax") == 5
    assert not {"Shape", "Constant", "Expand", "Where", "Identity"} & set(found), "what is constant is computed already"
    assert tiny.cosine(*tiny.in_true_float16(flavour)) >= 0.999
    assert tiny.cosine(*tiny.in_openvino(flavour)) >= 0.999
    assert fp16_flavour(tiny.model, tiny.ranges) == fp16_flavour(tiny.model) == flavour, "equal inputs, equal bytes"


def test_fp32_flavour_is_exact_but_for_the_tokens_last_rounding(tiny: Case) -> None:
    flavour = fp32_flavour(tiny.model)
    check_types(flavour)
    assert (flavour.precision, flavour.islands, flavour.casts) == ("fp32", (), 1)
    for tokens, embedding in (tiny.in_true_float16(flavour), tiny.in_openvino(flavour)):
        np.testing.assert_allclose(embedding, tiny.embedding, atol=2e-5)
        np.testing.assert_allclose(tokens, tiny.tokens, rtol=1e-3, atol=2e-5)
    assert fp32_flavour(tiny.model) == flavour


def large_residual(method: Any) -> None:
    """From the first block to the fourth two channels of the residual are beyond float16, as CLIP's outliers are."""
    blocks = method.clip.visual.transformer.resblocks
    for block, step in zip(blocks, (6e4, 6e4, -6e4, -6e4), strict=False):
        block.mlp.c_proj.bias[list(OUTLIERS)] += torch.tensor([step, -step])
    outliers = torch.zeros(len(blocks[0].ln_1.weight), dtype=torch.bool)
    outliers[list(OUTLIERS)] = True
    for block in blocks[1:4]:  # gains as big models learn them: the outliers must not hide the other channels
        for norm in (block.ln_1, block.ln_2):
            norm.weight[outliers] = 1e-4
            norm.weight[~outliers] *= 1e4
    for adapter in method.adapters:
        adapter.weight[:, outliers] = 0


def test_islands_around_a_large_residual(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    # Deep tokens have no outlier, and the gains would lift them instead of the other channels.
    options = {**tiny_fields["options"], "visual_tokens": 0}
    case = Case(tmp_path, {**tiny_fields, "options": options}, large_residual)
    plain = fp16_flavour(case.model)
    assert plain.islands == (), "every single constant fits into float16"
    assert not np.isfinite(case.in_true_float16(plain)[0]).all(), "without an overflow this test shows nothing"
    flavour = fp16_flavour(case.model, case.ranges)
    check_types(flavour)
    assert case.cosine(*case.in_true_float16(flavour)) >= 0.999
    assert case.cosine(*case.in_openvino(flavour)) >= 0.999
    names = operators(flavour)
    assert flavour.islands[0] == "/encoder/mlp/c_proj/Add", "before the first overflow all is float16"
    assert not {"Softmax", "Sigmoid", "Conv"} & {names[name] for name in flavour.islands}
    norms = [name for name, operator in names.items() if operator == "LayerNormalization"]
    assert [name in flavour.islands for name in norms] == [False] * 3 + [True] * 6 + [False] * 3
    assert not any("out_proj" in name or "c_fc" in name for name in flavour.islands), "products stay in float16"


def test_islands_around_a_large_hidden_layer(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    def edit(method: Any) -> None:
        mlp = method.clip.visual.transformer.resblocks[2].mlp
        mlp.c_fc.weight.mul_(1e5)
        mlp.c_proj.weight.mul_(1e-5)

    case = Case(tmp_path, tiny_fields, edit)
    tokens, _ = case.in_true_float16(fp16_flavour(case.model, islands=["/encoder/mlp/c_proj_2/MatMul"]))
    assert not np.isfinite(tokens).all()
    flavour = fp16_flavour(case.model, case.ranges)
    check_types(flavour)
    assert flavour.islands == (
        "/encoder/mlp/c_fc_2/MatMul",
        "/encoder/mlp/c_fc_2/Add",
        "/encoder/mlp/gelu_2/Mul",
        "/encoder/mlp/gelu_2/Sigmoid",
        "/encoder/mlp/gelu_2/Mul_1",
        "/encoder/mlp/c_proj_2/MatMul",
    )
    assert case.cosine(*case.in_true_float16(flavour)) >= 0.999


def test_limit_decides(tiny: Case) -> None:
    everything = fp16_flavour(tiny.model, tiny.ranges, limit=0)
    check_types(everything)
    assert tiny.cosine(*tiny.in_openvino(everything)) >= 0.999
    islands = {limit: set(fp16_flavour(tiny.model, tiny.ranges, limit=limit).islands) for limit in (1, 3, RANGE_LIMIT)}
    assert set(everything.islands) > islands[1] > islands[3] > islands[RANGE_LIMIT] == set()
    check_types(fp16_flavour(tiny.model, tiny.ranges, limit=3))


@pytest.mark.parametrize(("scale", "island"), [(1e8, True), (1e-6, True), (1e-2, False)])
def test_constants_that_float16_can_not_hold(
    tiny_fields: dict[str, Any], tmp_path: Path, scale: float, island: bool
) -> None:
    def edit(method: Any) -> None:
        method.clip.visual.ln_post.weight.mul_(1 / scale)
        method.clip.visual.proj.mul_(scale)

    case = Case(tmp_path, tiny_fields, edit)
    flavour = fp16_flavour(case.model)
    check_types(flavour)
    assert ("/encoder/ln_post/LayerNormalization" in flavour.islands) == island
    assert any("MatMul" in name for name in flavour.islands) == island
    if scale > 1 or not island:  # the other way round, what is between the two is too large as well
        assert case.cosine(*case.in_true_float16(flavour)) >= (0.9 if island else 0.999)
    measured = fp16_flavour(case.model, case.ranges)
    check_types(measured)
    if scale < 1:
        assert case.cosine(*case.in_true_float16(measured)) >= 0.999


def test_a_large_constant_that_is_carried_along(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    def edit(method: Any) -> None:
        method.visual_tokens[0, :, OUTLIERS[0]] = 1e5

    case = Case(tmp_path, tiny_fields, edit)
    flavour = fp16_flavour(case.model, case.ranges)
    check_types(flavour)
    assert np.isfinite(case.in_true_float16(flavour)[0]).all()
    assert case.cosine(*case.in_true_float16(flavour)) >= 0.999


@pytest.mark.parametrize("vision", [{"ls_init_value": 1e-6}, {"head_width": 32}])
def test_other_towers(tiny_fields: dict[str, Any], tmp_path: Path, vision: dict[str, Any]) -> None:
    """GELU with Erf, with and without layer scale, whose factors are too small for float16."""
    config = {**TINY, "quick_gelu": False, "vision_cfg": {**TINY["vision_cfg"], **vision}}
    path = tmp_path / "other-tower.json"
    path.write_text(json.dumps(config))
    case = Case(tmp_path, {**tiny_fields, "backbone": {"model": str(path)}})
    flavour = fp16_flavour(case.model, case.ranges)
    check_types(flavour)
    assert list(operators(flavour).values()).count("Erf") == 5
    assert len(flavour.islands) == (10 if "ls_init_value" in vision else 0)
    assert case.cosine(*case.in_true_float16(flavour)) >= 0.999
    check_types(fp32_flavour(case.model))


def test_batched(tiny_fields: dict[str, Any], tiny: Case, tmp_path: Path) -> None:
    export_encoder(method_of(parse_recipe(tiny_fields)), tmp_path / "two.onnx", 2)
    flavour = fp16_flavour((tmp_path / "two.onnx").read_bytes())
    check_types(flavour)
    case = Case.__new__(Case)
    case.image = np.concatenate([tiny.image, tiny.image])
    tokens, embedding = case.in_openvino(flavour)
    assert (tokens.shape, embedding.shape) == ((2, 3, 36, 48), (2, 48))
    assert tiny.cosine(tokens[1:], embedding[1:]) >= 0.999


def test_bundled_model(tmp_path: Path) -> None:
    recipe = load_recipe(Path(dapo_edge.__file__).parent / "assets" / "surface-tiny.yaml")
    case = Case(tmp_path, recipe.model_dump(mode="json"))
    flavour = fp16_flavour(case.model, case.ranges)
    check_types(flavour)
    assert flavour.islands == ()
    assert case.cosine(*case.in_openvino(flavour)) >= 0.999


# What is refused, and what only looks different.


def edited(model: bytes, edit: Callable[[Any], None]) -> bytes:
    proto = onnx.load_from_string(model)
    edit(proto)
    return proto.SerializeToString()


def first(proto: Any, operator: str) -> Any:
    return next(node for node in proto.graph.node if node.op_type == operator)


def test_opset_17_and_a_split_by_count_are_the_same(tiny: Case) -> None:
    def lower(proto: Any) -> None:
        proto.opset_import[0].version = 17

    def by_count(proto: Any) -> None:
        split = first(proto, "Split")
        del split.input[1]
        split.attribute.append(helper.make_attribute("num_outputs", 3))

    assert fp16_flavour(edited(tiny.model, lower)).model == fp16_flavour(tiny.model).model
    counted = fp16_flavour(edited(tiny.model, by_count))
    check_types(counted)
    assert tiny.cosine(*tiny.in_openvino(counted)) >= 0.999


def rename_operator(proto: Any) -> None:
    first(proto, "Sigmoid").op_type = "HardSigmoid"


def quantise(proto: Any) -> None:
    node = first(proto, "Conv")
    output = node.output[0]
    node.output[0] = "loud"
    zero = (numpy_helper.from_array(np.float32(1), "scale"), numpy_helper.from_array(np.int8(0), "zero"))
    proto.graph.initializer.extend(zero)
    pair = (
        helper.make_node("QuantizeLinear", ["loud", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], [output]),
    )
    place = list(proto.graph.node).index(node) + 1
    for new in reversed(pair):
        proto.graph.node.insert(place, new)


def free_batch(proto: Any) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def lower_opset(proto: Any) -> None:
    proto.opset_import[0].version = 16


def foreign_domain(proto: Any) -> None:
    proto.opset_import.append(helper.make_opsetid("com.example", 1))


def rename_output(proto: Any) -> None:
    proto.graph.output[0].name = "logits"


def half_input(proto: Any) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_operator, r"operator HardSigmoid \('/encoder/mlp/gelu/Sigmoid'\).*openvino backend"),
        (quantise, "operator (Dequantize|Quantize)Linear"),
        (free_batch, "fixed"),
        (lower_opset, "not of ONNX opset 17 or 18 alone"),
        (foreign_domain, "not of ONNX opset 17 or 18 alone"),
        (rename_output, r"inputs and outputs \['image', 'logits', 'image_embedding'\]"),
        (half_input, "contradicts itself"),
    ],
)
@pytest.mark.parametrize("convert", [fp16_flavour, fp32_flavour, measured_tensors])
def test_foreign_encoders_are_refused(
    tiny: Case, edit: Callable[[Any], None], message: str, convert: Callable[[bytes], object]
) -> None:
    with pytest.raises(BackendError, match=message):
        convert(edited(tiny.model, edit))


@pytest.mark.parametrize("data", [b"", b"no protobuf at all", b"\x08\x08"])
def test_files_that_are_no_encoder(data: bytes) -> None:
    with pytest.raises(BackendError, match=r"not an ONNX file|inputs and outputs \[\]"):
        fp16_flavour(data)


def test_ranges_and_islands_of_another_encoder(tiny: Case, package: EnginePackage) -> None:
    assert set(tiny.ranges) == set(measured_tensors(package.encoder_bytes())), "other weights, the same graph"
    fewer = dict(tiny.ranges)
    name, _ = fewer.popitem()
    with pytest.raises(BackendError, match=f"do not name the encoder's tensor '{name}'.*dapo-edge build"):
        fp16_flavour(tiny.model, fewer)
    with pytest.raises(BackendError, match="no operator 'nowhere'"):
        fp16_flavour(tiny.model, tiny.ranges, islands=["nowhere"])


def test_plain_graph_has_small_numbers_only(tiny: Case) -> None:
    """TensorRT counts in 32 bits; torch exports slices to the end with 2^63 - 1."""
    graph = read_plain(tiny.model)
    whole = [
        numpy_helper.to_array(tensor)
        for tensor in graph.constants.values()
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32)
    ]
    assert max(value.max() for value in whole if value.size) == 2**31 - 1
    assert graph.shapes["patch_tokens"] == (1, 3, 36, 48)
