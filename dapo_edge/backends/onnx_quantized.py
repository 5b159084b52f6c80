"""The encoder in INT8: its Linears between QuantizeLinear and DequantizeLinear, from one description for every runtime.

The integers and the scales are the same in each form. They differ in what their readers demand, as far as it is known:

- OpenVINO: float32 tensors and scales, weights stored as int8, opset 17.
- TensorRT 8.6: the same, but weights stored as float32 that a QuantizeLinear rounds to those integers. Its parser takes
  every scale for float32 (onnx-tensorrt 8.6-GA, builtin_op_importers.cpp, QuantDequantLinearHelper), and 8.x refused
  int8 constants ("invalid weights type of Int8", onnxruntime issue 11535; Optimum's guide says the same of TensorRT).
- TensorRT 10 and later: float16 tensors and scales, weights stored as int8, opset 19 (the oldest one that has float16
  scales). A strongly typed network wants a quantised tensor and its scale of one type (TensorRT's guide, "Explicit
  Quantization": stored integers need a DequantizeLinear alone).

All of them: three inputs with an int8 zero point of 0, one scale per activation, one per column (axis 1) of a weight. A
Linear has a pair of its own, since TensorRT expects one reader behind each (onnxruntime, DedicatedQDQPair).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_flavours import (
    FP16_SMALLEST_NORMAL,
    SCALED,
    Flavour,
    Precision,
    needs_fp32,
    typed_flavour,
)
from dapo_edge.backends.onnx_graph import EMBEDDING, HALF_SCALES_OPSET, OPSET, TOKENS, PlainGraph, read_plain
from dapo_edge.backends.onnx_linears import Linear, block_name, find_linears, weights_digest
from dapo_edge.errors import BackendError
from dapo_edge.extras import require
from dapo_edge.quantization import Quantization

LARGEST_INT8 = 127
_LARGEST, _SMALLEST_NORMAL = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_REBUILD = "Build the package again: dapo-edge build RECIPE"

FloatArray = NDArray[np.float32]
WeightForm = Literal["int8", "fp32"]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [in, out] as integers: it is about `values * scales`."""

    values: NDArray[np.int8]  # [in, out], -127..127
    scales: FloatArray  # [out], > 0


def activation_scale(reach: float) -> FloatArray:
    """The scale, a float32 of no dimension, whose 127 steps reach the largest |value| of an activation."""
    return _as_scale(np.asarray(reach, np.float64) / LARGEST_INT8)


def quantized_weight(weight: FloatArray) -> QuantizedWeight:
    """Round a weight [in, out] to int8 with one scale per column, whose largest |value| is 127 steps.

    A column of zeros has the scale 1, since scales must be above 0.
    """
    scales = _as_scale(np.abs(weight).max(axis=0).astype(np.float64) / LARGEST_INT8)
    steps = np.rint(weight / scales)  # half to even, as QuantizeLinear does
    return QuantizedWeight(np.clip(steps, -LARGEST_INT8, LARGEST_INT8).astype(np.int8), scales)


def migrated(graph: PlainGraph, quantization: Quantization) -> PlainGraph:
    """The same function with outliers moved from activations into weights (SmoothQuant, Xiao et al. 2023, equation 3).

    The input of a migrated Linear is divided by m, channel by channel, and the rows of its weight are multiplied by m.
    What divides is the gain and bias of the LayerNormalization before qkv and fc1, and the V part of qkv before out,
    because attention mixes tokens, not channels. Names of tensors stay. Raises `BackendError` for a quantization of
    another encoder, or one that migrates what this encoder can't.
    """
    linears = _linears_of(graph, quantization)
    rescaled = _Rescaled(graph)
    for name, linear in linears.items():
        if name in quantization.migrations:
            factors = quantization.migrations[name]
            _check_length(graph, linear, factors)
            if linear.role == "out":
                qkv = linears[f"{block_name(linear.block)}.qkv"]
                _divide_values(rescaled, graph, qkv, factors)
            else:
                _divide_norm(rescaled, graph, linear, factors)
            rescaled.multiply(linear.node, linear.weight, factors[:, None])
    return rescaled.graph()


def for_cpu(model: bytes, quantization: Quantization) -> bytes:
    """`encoder.int8.onnx`: float32 image → patch_tokens and image_embedding in float32, as encoder.onnx has them.

    `model` is the portable encoder in float32. Equal inputs give equal bytes. Raises `BackendError` for a quantization
    of another encoder.
    """
    graph = _quantized(migrated(read_plain(model), quantization), quantization, "int8").graph
    return typed_flavour(graph, "fp32", tokens="fp32").model


def int8_flavour(
    model: bytes,
    quantization: Quantization,
    ranges: Mapping[str, float] | None = None,
    *,
    precision: Precision = "fp32",
) -> Flavour:
    """The encoder in INT8 as TensorRT wants it: what is not INT8 is typed fp32 (for 8.6) or fp16 (from 10 on).

    `ranges` are those of `onnx_flavours.fp16_flavour`, of the encoder before migration, which rather lowers them. They
    decide about islands: typed float32 in fp16, and only named in fp32, for the weakly typed 8.6 to be told. A Linear
    of fp16 one of whose scales is below float16's smallest normal number is an island, too: there the scales are
    float32, the product is INT8 all the same. Raises `BackendError` for a quantization or ranges of another encoder.
    """
    graph = migrated(read_plain(model), quantization)
    if precision == "fp16":
        whole = _quantized(graph, quantization, "int8")
        islands, opset = _whole_linears(whole, needs_fp32(whole.graph, ranges)), HALF_SCALES_OPSET
    else:
        whole = _quantized(graph, quantization, "fp32")
        islands, opset = _without_scales(whole.graph, needs_fp32(whole.graph, ranges)), OPSET
    return replace(typed_flavour(whole.graph, precision, islands, opset=opset), quantized=tuple(whole.linears))


@dataclass(frozen=True, eq=False)
class _QuantizedGraph:
    graph: PlainGraph
    linears: Mapping[str, frozenset[str]]  # nodes of each Linear in INT8, by its name, in the order of execution


def _quantized(graph: PlainGraph, quantization: Quantization, form: WeightForm) -> _QuantizedGraph:
    """The migrated graph with the Linears of the quantization in INT8."""
    inside = {linear.node: linear for linear in find_linears(graph) if linear.name in quantization.ranges}
    nodes: list[Any] = []
    constants = dict(graph.constants)
    linears: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        linear = inside.get(node.name)
        made = [node]
        if linear is not None:
            made, new = _int8_linear(graph, node, linear, quantization.ranges[linear.name], form)
            constants |= {tensor.name: tensor for tensor in new}
            linears[linear.name] = frozenset(one.name for one in made)
        nodes += made
    return _QuantizedGraph(_graph_of(nodes, constants, graph.shapes), linears)


def _int8_linear(
    graph: PlainGraph, node: Any, linear: Linear, reach: float, form: WeightForm
) -> tuple[list[Any], list[Any]]:
    """The nodes in place of one MatMul, and their constants."""
    onnx = require("onnx")
    original = _array(graph, linear.weight)
    if not np.isfinite(original).all() or reach > _LARGEST:
        raise BackendError(f"the weight or the range of {linear.name} is no finite float32", _REBUILD)
    scale, weight = activation_scale(reach), quantized_weight(original)
    left, right = f"{linear.name}/input", f"{linear.name}/weight"
    constants = {
        f"{left}/scale": scale,
        f"{left}/zero": np.zeros((), np.int8),
        f"{right}/scale": weight.scales,
        f"{right}/zero": np.zeros(len(weight.scales), np.int8),
    }

    def step(operator: str, source: str, side: str, **options: int) -> Any:
        result = f"{side}/{'quantized' if operator == 'QuantizeLinear' else 'dequantized'}"
        inputs = [source, f"{side}/scale", f"{side}/zero"]
        return onnx.helper.make_node(operator, inputs, [result], name=f"{side}/{operator}", **options)

    nodes = [
        step("QuantizeLinear", linear.input, left),
        step("DequantizeLinear", f"{left}/quantized", left),
        step("DequantizeLinear", f"{right}/quantized", right, axis=1),
    ]
    if form == "int8":
        constants[f"{right}/quantized"] = weight.values
    else:
        constants[f"{right}/float"] = weight.values * weight.scales
        nodes.insert(2, step("QuantizeLinear", f"{right}/float", right, axis=1))
    product = onnx.NodeProto()
    product.CopyFrom(node)
    product.input[:] = [f"{left}/dequantized", f"{right}/dequantized"]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    return [*nodes, product], tensors


def _whole_linears(whole: _QuantizedGraph, islands: frozenset[str]) -> frozenset[str]:
    """Islands that hold all of a Linear or nothing: a cast between scale and product would take the INT8 away."""
    return islands.union(*(nodes for nodes in whole.linears.values() if nodes & islands))


def _without_scales(graph: PlainGraph, islands: frozenset[str]) -> frozenset[str]:
    """Islands but for the nodes of a scale, which is float32 to 8.6 in any case."""
    return islands.difference(node.name for node in graph.nodes if node.op_type in SCALED)


def _as_scale(steps: NDArray[np.float64]) -> FloatArray:
    """Rounded up to a float16 where that has full precision, so that scales are the same numbers in every form."""
    single = steps.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        half = steps.astype(np.float16)
        half = np.where(half < steps, np.nextafter(half, np.float16(np.inf)), half)
    fits = (steps >= FP16_SMALLEST_NORMAL) & np.isfinite(half)
    scales = np.where(fits, half.astype(np.float32), single)
    return np.where(steps < _SMALLEST_NORMAL, np.float32(1), scales)


class _Rescaled:
    """A graph under way in which constants are multiplied, each for one node alone: nodes may share constants."""

    def __init__(self, graph: PlainGraph) -> None:
        self._onnx = require("onnx")
        self._graph = graph
        self._constants = dict(graph.constants)
        self._renamed: dict[tuple[str, str], str] = {}  # what a node reads instead of a constant

    def multiply(self, node: str, constant: str, factors: FloatArray) -> None:
        """Let `node` read `constant` times `factors`. Raises `BackendError` for numbers beyond float32."""
        name = self._renamed.setdefault((node, constant), f"{constant}/of {node}")
        tensor = self._constants[name if name in self._constants else constant]
        with np.errstate(over="ignore", invalid="ignore"):
            value = (self._onnx.numpy_helper.to_array(tensor) * factors).astype(np.float32)
        if not np.isfinite(value).all():
            raise BackendError(f"a migration multiplies the constants of '{node}' beyond float32", _REBUILD)
        self._constants[name] = self._onnx.numpy_helper.from_array(value, name)

    def graph(self) -> PlainGraph:
        """What has come of it."""
        nodes = [self._renewed(node) for node in self._graph.nodes]
        return _graph_of(nodes, self._constants, self._graph.shapes)

    def _renewed(self, node: Any) -> Any:
        inputs = [self._renamed.get((node.name, name), name) for name in node.input]
        if inputs == list(node.input):
            return node
        renewed = self._onnx.NodeProto()
        renewed.CopyFrom(node)
        renewed.input[:] = inputs
        return renewed


def _divide_norm(rescaled: _Rescaled, graph: PlainGraph, linear: Linear, factors: FloatArray) -> None:
    readers = [node.name for node in _readers(graph, linear.input)]
    if linear.norm is None or readers != [linear.node] or linear.input in (TOKENS, EMBEDDING):
        raise BackendError(
            f"{linear.name} can't be migrated: it does not sit alone behind a LayerNormalization", _REBUILD
        )
    for constant in dict.fromkeys(_node(graph, linear.norm).input[1:]):
        if constant:
            rescaled.multiply(linear.norm, constant, _inverse(factors))


def _divide_values(rescaled: _Rescaled, graph: PlainGraph, qkv: Linear, factors: FloatArray) -> None:
    """Divide V, the last third of qkv's columns; the heads lie in the same order in V and behind the attention."""
    width = len(factors)
    share = np.ones(3 * width, np.float32)
    share[2 * width :] = _inverse(factors)
    rescaled.multiply(qkv.node, qkv.weight, share)
    readers = _readers(graph, _node(graph, qkv.node).output[0])
    if qkv.bias is not None and len(readers) == 1:
        rescaled.multiply(readers[0].name, qkv.bias, share)
        readers = _readers(graph, readers[0].output[0])
    shape = graph.shapes[readers[0].output[0]][-3:] if [node.op_type for node in readers] == ["Reshape"] else ()
    if len(shape) != 3 or (shape[0], shape[1] * shape[2]) != (3, width):
        raise BackendError(
            f"{block_name(qkv.block)}.out can't be migrated: {qkv.name} is not read as [3, heads, head]", _REBUILD
        )


def _inverse(factors: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.float32(1) / factors


def _node(graph: PlainGraph, name: str) -> Any:
    return next(node for node in graph.nodes if node.name == name)


def _readers(graph: PlainGraph, tensor: str) -> list[Any]:
    return [node for node in graph.nodes if tensor in node.input]


def _linears_of(graph: PlainGraph, quantization: Quantization) -> dict[str, Linear]:
    """The encoder's Linears by name. Raises `BackendError` unless the quantization was made for them."""
    linears = {linear.name: linear for linear in find_linears(graph)}
    if quantization.weights != weights_digest(graph):
        raise BackendError("the quantization was made for another encoder than this one", _REBUILD)
    unknown = [name for name in (*quantization.ranges, *quantization.kept) if name not in linears]
    if unknown:
        raise BackendError(f"the quantization names '{unknown[0]}', which the encoder does not have", _REBUILD)
    return linears


def _check_length(graph: PlainGraph, linear: Linear, factors: FloatArray) -> None:
    inputs = graph.constants[linear.weight].dims[0]
    if linear.role == "fc2":
        raise BackendError(
            f"{linear.name} can't be migrated: nothing can be divided before its activation function", _REBUILD
        )
    if len(factors) != inputs:
        raise BackendError(
            f"the migration of {linear.name} has {len(factors)} channels, its input has {inputs}", _REBUILD
        )


def _graph_of(nodes: Iterable[Any], constants: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> PlainGraph:
    """The constants that nodes read, and the shapes of the float graph, which Q/DQ leaves as they are."""
    nodes = tuple(nodes)
    used = {name for node in nodes for name in node.input}
    return PlainGraph(nodes, {name: tensor for name, tensor in constants.items() if name in used}, shapes)


def _array(graph: PlainGraph, constant: str) -> FloatArray:
    value: FloatArray = require("onnx").numpy_helper.to_array(graph.constants[constant])
    return value
