"""A small exported encoder with random weights, and ways to run what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dapo_edge.backends.onnx_flavours import Flavour
from dapo_edge.backends.onnx_graph import PlainGraph, read_plain
from dapo_edge.backends.onnx_linears import Linear, find_linears, weights_digest
from dapo_edge.config import parse_recipe
from dapo_edge.engine.export import export_encoder
from dapo_edge.engine.range_probe import RangeProbe
from dapo_edge.models.method import method_of
from dapo_edge.quantization import Quantization

Array = np.ndarray[Any, Any]


class LayerNormalization(OpRun):
    """With statistics in float32, as stash_type=1 says; onnx's own takes them in the type of X."""

    op_domain = ""

    def _run(self, x: Array, gain: Array, bias: Array, axis: int, epsilon: float, stash_type: int) -> tuple[Array]:
        assert (axis, stash_type, x.dtype) == (-1, 1, gain.dtype)
        wide = x.astype(np.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
        return (normal.astype(x.dtype) * gain + bias,)


class QuantizeLinear(OpRun):
    """onnx's own begins with opset 19."""

    op_domain = ""

    def _run(self, x: Array, scale: Array, zero: Array, axis: int | None = None, **_: Any) -> tuple[Array]:
        assert (x.dtype, zero.dtype) == (scale.dtype, np.int8)
        steps = np.rint(x.astype(np.float32) / _along(scale, x, axis).astype(np.float32)) + _along(zero, x, axis)
        return (np.clip(steps, -128, 127).astype(np.int8),)


class DequantizeLinear(OpRun):
    """onnx's own begins with opset 19."""

    op_domain = ""

    def _run(self, x: Array, scale: Array, zero: Array, axis: int | None = None, **_: Any) -> tuple[Array]:
        assert x.dtype == zero.dtype == np.int8
        steps = x.astype(np.float32) - _along(zero, x, axis)
        return ((steps * _along(scale, x, axis).astype(np.float32)).astype(scale.dtype),)


def _along(values: Array, x: Array, axis: int | None) -> Array:
    """One value for all, or one per place of an axis."""
    if values.ndim == 0:
        return values
    assert axis is not None
    return values.reshape([-1 if place == axis else 1 for place in range(x.ndim)])


OPERATORS = [LayerNormalization, QuantizeLinear, DequantizeLinear]


class Case:
    """An exported encoder, eager torch's answer, and the ranges of one image."""

    def __init__(self, folder: Path, fields: dict[str, Any], edit: Callable[[Any], None] = lambda method: None) -> None:
        method: Any = method_of(parse_recipe(fields))
        with torch.no_grad():
            edit(method)
        export_encoder(method, folder / "encoder.onnx")
        self.model = (folder / "encoder.onnx").read_bytes()
        size = method.image_size
        self.image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
        with torch.inference_mode():
            tokens, embedding = method(torch.from_numpy(self.image))
        self.tokens, self.embedding = tokens.numpy(), embedding.numpy()
        probe = RangeProbe(self.model)
        probe.observe(self.image)
        self.ranges = probe.ranges

    def cosine(self, tokens: Array, embedding: Array) -> float:
        """The lowest one of all patches and the embedding; NaN when anything is no number."""
        assert (tokens.dtype, embedding.dtype) == (np.float16, np.float32)
        pairs = ((tokens.astype(np.float32), self.tokens), (embedding, self.embedding))
        lengths = [(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1) for a, b in pairs]
        return float(min(length.min() for length in lengths))

    def in_true_float16(self, flavour: Flavour) -> tuple[Array, Array]:
        """Operator by operator in NumPy, each in exactly the type that the file says."""
        kind = np.float16 if flavour.precision == "fp16" else np.float32
        evaluator = ReferenceEvaluator(onnx.load_from_string(flavour.model), new_ops=OPERATORS)
        with np.errstate(all="ignore"):
            tokens, embedding = evaluator.run(None, {"image": self.image.astype(kind)})
        return tokens, embedding

    def in_openvino(self, flavour: Flavour) -> tuple[Array, Array]:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(flavour.model, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = compiled([self.image.astype(np.float16 if flavour.precision == "fp16" else np.float32)])
        return result[0], result[1]


def reach_of(graph: PlainGraph, case: Case, linear: Linear) -> float:
    """The range of a Linear's input, or of what it was reshaped from."""
    makers = {name: node for node in graph.nodes for name in node.output}
    name = linear.input
    while name not in case.ranges:
        name = makers[name].input[0]
    return case.ranges[name]


def described(
    case: Case, kept: Mapping[str, str] | None = None, migrations: Mapping[str, Array] | None = None
) -> Quantization:
    """Every Linear but the kept ones in INT8, with the ranges of the case's image; migration may triple them."""
    graph = read_plain(case.model)
    kept, migrations = kept or {}, migrations or {}
    ranges = {
        linear.name: reach_of(graph, case, linear) * (3 if linear.name in migrations else 1)
        for linear in find_linears(graph)
        if linear.name not in kept
    }
    return Quantization(ranges, migrations, kept, weights_digest(graph))


def vectors(case: Case, *roles: str) -> dict[str, Array]:
    """Migrations of 0.4 to 2.5 for every Linear of these roles."""
    graph, rng = read_plain(case.model), np.random.default_rng(5)
    return {
        linear.name: np.exp(rng.uniform(-0.9, 0.9, graph.constants[linear.weight].dims[0])).astype(np.float32)
        for linear in find_linears(graph)
        if linear.role in roles
    }


def run(model: bytes, image: Array, names: list[str] | None = None) -> list[Array]:
    """Operator by operator in NumPy, each in exactly the type that the file says; `names` are any tensors."""
    proto = onnx.load_from_string(model)
    kind = helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(proto, new_ops=OPERATORS).run(names, {"image": image.astype(kind)})


def in_openvino(model: bytes, image: Array) -> tuple[Array, Array]:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kind = helper.tensor_dtype_to_np_dtype(onnx.load_from_string(model).graph.input[0].type.tensor_type.elem_type)
    result = compiled([image.astype(kind)])
    return result[0].astype(np.float32), result[1].astype(np.float32)


def learned(method: Any) -> None:
    """Gains and biases of the norms and Linears as training leaves them, where a new model has ones and zeros."""
    rng = np.random.default_rng(7)
    for block in method.clip.visual.transformer.resblocks:
        for gain in (block.ln_1.weight, block.ln_2.weight):
            gain.copy_(torch.from_numpy(rng.uniform(0.5, 2, gain.shape)))
        biases = (block.ln_1, block.ln_2, block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)
        for bias in (block.attn.in_proj_bias, *(part.bias for part in biases)):
            bias.copy_(torch.from_numpy(rng.normal(0, 0.2, bias.shape)))
