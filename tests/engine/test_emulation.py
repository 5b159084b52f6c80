"""The NumPy emulation against ONNX's own definition, and against OpenVINO on the model that ships."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from int8_parts import Parts, parts_of, plain_bytes, run_openvino, surface_tiny
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dapo_edge.backends.onnx_graph import EMBEDDING, IMAGE, OPERATORS, TOKENS
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.engine import emulation
from dapo_edge.engine.emulation import MAX_DIFFERENCE, emulate, emulation_difference, erf, integer_product, quantize
from dapo_edge.engine.quantize import quantization_of
from dapo_edge.errors import BackendError
from dapo_edge.package import EnginePackage


@pytest.fixture(scope="module")
def parts(package: EnginePackage) -> Parts:
    return parts_of(package)


@pytest.fixture(scope="module")
def shipped_int8() -> bytes:
    parts = surface_tiny()
    return for_cpu(parts.encoder, quantization_of(parts.graph, parts.ranges(), "max", 0.5))


# The arithmetic.


@pytest.mark.parametrize("inner", [1, 777, 3072, 20_000])
def test_products_of_integers_are_exact(inner: int) -> None:
    rng = np.random.default_rng(inner)
    left, right = (rng.integers(-128, 128, shape, np.int8) for shape in ((2, 5, inner), (inner, 7)))
    expected = left.astype(np.int64) @ right.astype(np.int64)
    np.testing.assert_array_equal(integer_product(left, right), expected)
    lowest = np.full((1, inner), -128, np.int8)
    assert integer_product(lowest, lowest.T).item() == 2**14 * inner, "the largest sum that there is"
    assert 2**14 * inner < 2**53


def test_the_error_function() -> None:
    x = np.concatenate([np.linspace(-6, 6, 20_001), [0.0, 1e-8, 1e4, -1e4]]).astype(np.float32)
    expected = np.array([math.erf(value) for value in x.tolist()])
    assert np.abs(erf(x) - expected).max() <= 1e-6
    np.testing.assert_array_equal(erf(-x), -erf(x))


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = np.array([-1e9, -64.4, -64.0, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 63.4, 63.75, 1e9], np.float32)
    found = quantize(x, np.float32(0.5), np.int8(0))
    assert found.dtype == np.int8
    assert found.tolist() == [-128, -128, -128, -2, -2, 0, 0, 2, 2, 127, 127, 127]
    assert quantize(x, np.float32(0.5), np.int8(-3)).tolist()[5:7] == [-3, -3]


def model_of(nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...]) -> bytes:
    """image → nodes → patch_tokens, with the image itself as the embedding."""
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", [IMAGE], [EMBEDDING])],
        "test",
        [helper.make_tensor_value_info(IMAGE, floats, shape)],
        [helper.make_tensor_value_info(TOKENS, floats, None), helper.make_tensor_value_info(EMBEDDING, floats, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def single(operator: str, shape: tuple[int, ...], *constants: Any, **options: Any) -> tuple[bytes, tuple[int, ...]]:
    names = ["" if value is None else f"c{place}" for place, value in enumerate(constants)]
    node = helper.make_node(operator, [IMAGE, *names], [TOKENS], **options)
    given = {name: value for name, value in zip(names, constants, strict=True) if name}
    return model_of([node], given, shape), shape


def half_of_split(*sizes: Any) -> tuple[bytes, tuple[int, ...]]:
    inputs = [IMAGE, "sizes"] if sizes else [IMAGE]
    node = helper.make_node("Split", inputs, ["left", TOKENS], axis=2)
    return model_of([node], {"sizes": np.array(sizes[0])} if sizes else {}, (2, 3, 4)), (2, 3, 4)


RNG = np.random.default_rng(7)
CASES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "Add": single("Add", (2, 3, 4), RNG.standard_normal(4).astype(np.float32)),
    "Sub": single("Sub", (2, 3, 4), RNG.standard_normal((3, 1)).astype(np.float32)),
    "Mul": single("Mul", (2, 3, 4), np.float32(0.3)),
    "Div": single("Div", (2, 3, 4), np.float32(1.4)),
    "Erf": single("Erf", (2, 3, 4)),
    "Sigmoid": single("Sigmoid", (2, 3, 4)),
    "Tanh": single("Tanh", (2, 3, 4)),
    "Softmax": single("Softmax", (2, 3, 4), axis=1),
    "Identity": single("Identity", (2, 3)),
    "Concat": single("Concat", (2, 3), np.ones((2, 5), np.float32), axis=-1),
    "Conv padded": single(
        "Conv",
        (1, 3, 7, 9),
        RNG.standard_normal((4, 3, 3, 2)).astype(np.float32),
        RNG.standard_normal(4).astype(np.float32),
        pads=[1, 0, 2, 1],
        strides=[2, 3],
    ),
    "Conv patches": single("Conv", (2, 3, 8, 8), RNG.standard_normal((5, 3, 4, 4)).astype(np.float32), strides=[4, 4]),
    "Expand": single("Expand", (1, 3, 1), np.array([2, 1, 4])),
    "Gather": single("Gather", (2, 3, 4), np.array(1), axis=1),
    "Gather many": single("Gather", (2, 3, 4), np.array([2, -3]), axis=1),
    "Gemm": single(
        "Gemm",
        (2, 3),
        RNG.standard_normal((5, 3)).astype(np.float32),
        np.ones(5, np.float32),
        transB=1,
        alpha=0.5,
        beta=2.0,
    ),
    "Gemm turned": single("Gemm", (3, 2), RNG.standard_normal((3, 5)).astype(np.float32), transA=1),
    "LayerNormalization": single(
        "LayerNormalization",
        (2, 3, 4),
        RNG.standard_normal(4).astype(np.float32),
        RNG.standard_normal(4).astype(np.float32),
        epsilon=1e-3,
    ),
    "LayerNormalization of two axes": single("LayerNormalization", (2, 3, 4), np.ones((3, 4), np.float32), axis=1),
    "MatMul": single("MatMul", (2, 3, 4), RNG.standard_normal((4, 5)).astype(np.float32)),
    "Reshape": single("Reshape", (2, 3, 4), np.array([0, 2, -1])),
    "Slice": single("Slice", (2, 7, 4), np.array([1, -3]), np.array([2**31 - 1, -1]), np.array([1, 2])),
    "Slice backwards": single("Slice", (2, 7), np.array([5]), np.array([0]), np.array([1]), np.array([-2])),
    "Slice of the first axes": single("Slice", (4, 7), np.array([1, 2]), np.array([3, 5])),
    "Split": half_of_split([1, 3]),
    "Split evenly": half_of_split(),
    "Squeeze": single("Squeeze", (1, 3, 1), np.array([-1])),
    "Squeeze all": single("Squeeze", (1, 3, 1)),
    "Transpose": single("Transpose", (2, 3, 4), perm=[1, 2, 0]),
    "Transpose backwards": single("Transpose", (2, 3, 4)),
    "Unsqueeze": single("Unsqueeze", (2, 3), np.array([0, 3])),
}


def test_every_operator_of_the_encoders_is_there() -> None:
    assert emulation._OPERATORS.keys() == OPERATORS | {"QuantizeLinear", "DequantizeLinear"}
    assert {name.split()[0] for name in CASES} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES)
def test_operators_are_those_of_onnx(case: str) -> None:
    model, shape = CASES[case]
    image = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    tokens, same = emulate(model, image)
    expected, _ = ReferenceEvaluator(onnx.load_from_string(model)).run(None, {IMAGE: image})
    assert (tokens.shape, tokens.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(same, image)


def of_opset_19(model: bytes) -> bytes:
    """The same operators; the evaluator has Q/DQ from there on."""
    later = onnx.load_from_string(model)
    later.opset_import[0].version = 19
    return later.SerializeToString()


@pytest.mark.parametrize("zero", [0, 5])
def test_a_quantised_product_is_that_of_onnx(zero: int) -> None:
    rng = np.random.default_rng(3)
    constants = {
        "scale": np.float32(0.02),
        "zero": np.int8(zero),
        "weight": rng.integers(-127, 128, (16, 6), np.int8),
        "scales": rng.uniform(0.001, 0.1, 6).astype(np.float32),
        "zeros": np.zeros(6, np.int8),
        "shift": rng.standard_normal(6).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", [IMAGE, "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "shift"], [TOKENS]),
    ]
    model = model_of(nodes, constants, (2, 4, 16))
    image = rng.standard_normal((2, 4, 16)).astype(np.float32) * 2  # some values saturate
    tokens, _ = emulate(model, image)
    expected, _ = ReferenceEvaluator(onnx.load_from_string(of_opset_19(model))).run(None, {IMAGE: image})
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
    direct = model_of([nodes[2], helper.make_node("Add", [IMAGE, "w"], [TOKENS])], constants, (16, 6))
    image = np.zeros((16, 6), np.float32)
    np.testing.assert_allclose(emulate(direct, image)[0], constants["weight"] * constants["scales"], rtol=1e-6)


# Whole encoders.


def test_float_encoders_compute_what_openvino_computes(parts: Parts) -> None:
    for each in (parts, surface_tiny()):
        model, images = plain_bytes(each.graph), each.images(100, 2)
        expected = run_openvino(model, images)
        for image, tokens, embedding in zip(images, *expected, strict=True):
            found = emulate(model, image[None])
            assert np.abs(found[0][0] - tokens).max() <= 1e-4 * np.abs(tokens).max()
            assert np.abs(found[1][0] - embedding).max() <= 1e-4 * np.abs(embedding).max()


def test_int8_gives_the_same_map_as_in_openvino(shipped_int8: bytes) -> None:
    parts = surface_tiny()
    difference = emulation_difference(shipped_int8, parts.images(100, 4), parts.bank, parts.spec)
    assert 0 < difference <= MAX_DIFFERENCE / 10


def test_a_fault_of_the_runtime_is_told_from_quantisation(shipped_int8: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO gets one weight with a wrong scale; what the file really says is emulated."""
    parts = surface_tiny()
    model = onnx.load_from_string(shipped_int8)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "block1.fc1/weight/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.3), scale.name))
    faulty = model.SerializeToString()
    monkeypatch.setattr(emulation, "emulate", lambda model, image: emulate(shipped_int8, image))
    images = parts.images(100, 2)
    assert emulation_difference(shipped_int8, images, parts.bank, parts.spec) < MAX_DIFFERENCE / 10
    assert emulation_difference(faulty, images, parts.bank, parts.spec) > MAX_DIFFERENCE


def test_what_comes_out(parts: Parts) -> None:
    model = for_cpu(parts.encoder, quantization_of(parts.graph, parts.ranges(), "max", 0.0))
    image = parts.images(100, 1)
    tokens, embedding = emulate(model, image)
    assert (tokens.shape, embedding.shape) == ((1, 3, 36, 48), (1, 48))
    assert tokens.dtype == embedding.dtype == np.float32
    plain, _ = emulate(plain_bytes(parts.graph), image)
    difference = np.abs(tokens - plain).mean() / np.abs(plain).mean()
    assert 1e-3 < difference < 0.1, "it is rounded, and no more than that"


# Bad input.


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3, 64, 64), np.float32), ((3, 96, 96), np.float32), ((1, 3, 96, 96), np.float64)]
)
def test_images_of_another_kind(parts: Parts, shape: tuple[int, ...], dtype: Any) -> None:
    with pytest.raises(BackendError, match=r"takes float32 images of shape \[1, 3, 96, 96\], not"):
        emulate(plain_bytes(parts.graph), np.zeros(shape, dtype))


def test_files_that_are_no_plain_encoder(parts: Parts) -> None:
    image = np.zeros((1, 3, 96, 96), np.float32)
    with pytest.raises(BackendError, match="not an ONNX file"):
        emulate(b"\xff" * 100, image)
    with pytest.raises(BackendError, match="does not know the ONNX operator"):
        emulate(parts.encoder, image)  # as exported, with shape arithmetic
    other = onnx.load_from_string(CASES["Add"][0])
    other.graph.input[0].name = "picture"
    with pytest.raises(BackendError, match=r"inputs and outputs \['picture'"):
        emulate(other.SerializeToString(), image)


@pytest.mark.parametrize(
    ("message", "nodes", "constants"),
    [
        (
            "one scale per tensor",
            [helper.make_node("QuantizeLinear", [IMAGE, "scales", "zeros"], [TOKENS], axis=1)],
            {"scales": np.ones(3, np.float32), "zeros": np.zeros(3, np.int8)},
        ),
        (
            "dequantises int8, not uint8",
            [helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], [TOKENS])],
            {"integers": np.zeros(3, np.uint8), "scale": np.float32(1), "zero": np.uint8(0)},
        ),
        (
            "plain convolutions only",
            [helper.make_node("Conv", [IMAGE, "kernel"], [TOKENS], group=3)],
            {"kernel": np.ones((3, 1, 1, 1), np.float32)},
        ),
    ],
)
def test_operators_in_a_form_that_is_not_emulated(message: str, nodes: list[Any], constants: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=message):
        emulate(model_of(nodes, constants, (1, 3, 4, 4)), np.zeros((1, 3, 4, 4), np.float32))
