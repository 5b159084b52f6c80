"""The encoder's ONNX as TensorRT wants it: one float type per operator, casts only where the types meet.

A strongly typed network (TensorRT 10, and the only kind in 11) computes exactly the types that the file names. The FP16
flavour is float16 throughout, but for islands in float32 around values that float16 can't hold: activation ranges say
where those are. A weakly typed one (TensorRT 8.6) takes the types as hints; it must be told the islands by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_graph import (
    ARITHMETIC,
    BOUNDED,
    CARRIERS,
    EMBEDDING,
    IMAGE,
    OPSET,
    SELECTORS,
    TOKENS,
    PlainGraph,
    assembled,
    read_plain,
)
from dapo_edge.errors import BackendError
from dapo_edge.extras import require

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
# Ranges are measured on a few frames: another part may reach further, and sums pass through values beyond their end.
HEADROOM = 4
RANGE_LIMIT = FP16_MAX / HEADROOM

Precision = Literal["fp32", "fp16"]
SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})  # by their second input
_INT8_STEPS = 128  # the lowest of int8 is -128
_MEASURED = ARITHMETIC | SELECTORS
_FACTORS = {"MatMul": (0, 1), "Mul": (0, 1), "Div": (0, 1), "Gemm": (0, 1), "Conv": (1,), "LayerNormalization": (1,)}


@dataclass(frozen=True)
class Flavour:
    """An encoder for one precision, and where it leaves that precision."""

    model: bytes  # ONNX: image [B, 3, S, S] → patch_tokens [B, L, N, D] float16, image_embedding [B, D] float32
    precision: Precision  # of the image and of every operator that is no island
    islands: tuple[str, ...]  # names of the operators whose values need float32 where others get float16, in order
    nodes: int  # operators, without casts
    casts: int
    attention_blocks: int  # of the encoder
    quantized: tuple[str, ...] = ()  # names of the Linears in INT8, in the order of execution


def fp32_flavour(model: bytes) -> Flavour:
    """The encoder in float32 from a float32 image; only the patch tokens leave it as float16, as the kernels read them.

    Raises `BackendError` for anything but an encoder of this SDK's own export.
    """
    return typed_flavour(read_plain(model), "fp32")


def fp16_flavour(
    model: bytes,
    ranges: Mapping[str, float] | None = None,
    *,
    limit: float = RANGE_LIMIT,
    islands: Collection[str] = (),
) -> Flavour:
    """The encoder in float16 from a float16 image, with float32 islands.

    `ranges` is the largest |value| per tensor of `measured_tensors`; operators that read or write a tensor beyond
    `limit` become islands. Without ranges, only constants that float16 can't hold make islands. `islands` names
    further operators. Raises `BackendError` for a foreign encoder, ranges of another one, or an unknown island.
    """
    graph = read_plain(model)
    names = {node.name for node in graph.nodes}
    unknown = sorted(set(islands) - names)
    if unknown:
        raise BackendError(f"the encoder has no operator '{unknown[0]}'", "Take the names from the encoder's own graph")
    return typed_flavour(graph, "fp16", {*islands, *needs_fp32(graph, ranges, limit)})


def measured_tensors(model: bytes) -> tuple[str, ...]:
    """Names of the tensors whose range decides about islands, in the order of execution.

    They are tensors of the encoder as it was exported, too. Raises `BackendError` for a foreign encoder.
    """
    return tuple(name for node in read_plain(model).nodes if node.op_type in _MEASURED for name in node.output)


def needs_fp32(graph: PlainGraph, ranges: Mapping[str, float] | None, limit: float = RANGE_LIMIT) -> frozenset[str]:
    """Names of the nodes that read or write a tensor beyond `limit`, or hold constants that float16 can't.

    Without ranges the constants decide alone. Raises `BackendError` for ranges of another encoder.
    """
    large = frozenset() if ranges is None else _large_tensors(graph, ranges, limit)
    return frozenset(
        node.name for node in graph.nodes if large & {*node.input, *node.output} or not _constants_fit(graph, node)
    )


def typed_flavour(
    graph: PlainGraph,
    precision: Precision,
    islands: Collection[str] = (),
    *,
    tokens: Precision = "fp16",
    opset: int = OPSET,
) -> Flavour:
    """Every operator in `precision`, islands in float32; patch tokens leave as `tokens`, the embedding as float32."""
    onnx = require("onnx")
    element = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}
    typed = _TypedGraph(graph, precision)
    for node in graph.nodes:
        typed.add(node, "fp32" if node.name in islands else precision)
    leaving: dict[str, Precision] = {TOKENS: tokens, EMBEDDING: "fp32"}
    for name, wanted in leaving.items():
        typed.leave(name, wanted)
    ends = {IMAGE: precision, **leaving}
    return Flavour(
        model=assembled(
            typed.nodes,
            list(typed.constants.values()),
            {name: (element[end], graph.shapes[name]) for name, end in ends.items()},
            opset,
        ),
        precision=precision,
        islands=tuple(node.name for node in graph.nodes if node.name in islands),
        nodes=len(graph.nodes),
        casts=len(typed.nodes) - len(graph.nodes),
        attention_blocks=sum(node.op_type == "Softmax" for node in graph.nodes),
    )


def _large_tensors(graph: PlainGraph, ranges: Mapping[str, float], limit: float) -> frozenset[str]:
    """Tensors beyond the limit: measured ones by their range, carried ones when a source of theirs is."""
    large: set[str] = set()
    for node in graph.nodes:
        for name in node.output:
            if node.op_type in CARRIERS:
                beyond = any(source in large or _largest(graph, source) > limit for source in node.input)
            elif node.op_type in BOUNDED or node.op_type == "QuantizeLinear":
                beyond = False
            elif node.op_type == "DequantizeLinear":
                beyond = _INT8_STEPS * _largest(graph, node.input[1]) > limit
            elif name in ranges:
                beyond = not ranges[name] <= limit  # NaN is beyond
            else:
                raise BackendError(
                    f"the activation ranges do not name the encoder's tensor '{name}': they belong to another encoder",
                    "Build the package again: dapo-edge build RECIPE",
                )
            if beyond:
                large.add(name)
    return frozenset(large)


def _constants_fit(graph: PlainGraph, node: Any) -> bool:
    """Whether float16 holds the node's constants: none too large, no factor that would lose its digits or vanish."""
    factors = _FACTORS.get(node.op_type, ())
    if node.op_type in SCALED and _smallest(graph, node.input[1]) < FP16_SMALLEST_NORMAL:
        return False  # each scale stands for itself, no larger one beside it makes up for its digits
    for place, name in enumerate(node.input):
        largest = _largest(graph, name)
        # What is added may vanish: it is small beside 1. What is multiplied decides the size of the result.
        if largest > FP16_MAX or (place in factors and 0 < largest < FP16_SMALLEST_NORMAL):
            return False
    return True


def _largest(graph: PlainGraph, name: str) -> float:
    """Largest |value| of a constant of floats; 0 for every other tensor."""
    value = _floats(graph.constants[name]) if name in graph.constants else None
    return 0.0 if value is None else float(np.abs(value).max(initial=0))


def _smallest(graph: PlainGraph, name: str) -> float:
    """Smallest |value| of a constant of floats."""
    value = _floats(graph.constants[name])
    return 0.0 if value is None else float(np.abs(value).min())


def _floats(tensor: Any) -> NDArray[np.float32] | None:
    onnx = require("onnx")
    return onnx.numpy_helper.to_array(tensor) if tensor.data_type == onnx.TensorProto.FLOAT else None


class _TypedGraph:
    """Collects nodes, each in one float type, and adds the casts and constants that they need."""

    def __init__(self, graph: PlainGraph, precision: Precision) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}  # by the name that it has in the typed graph
        self._onnx = require("onnx")
        self._graph = graph
        self._precision = precision
        self._type_of: dict[str, Precision] = {IMAGE: precision}  # of every activation
        self._cast: set[str] = set()

    def add(self, node: Any, precision: Precision) -> None:
        """Add a node that computes in `precision`; its inputs are there already."""
        typed = self._onnx.NodeProto()
        typed.CopyFrom(node)
        typed.input[:] = [self._input(name, precision) if name else name for name in node.input]
        self.nodes.append(typed)
        self._type_of.update(dict.fromkeys(node.output, precision))

    def leave(self, name: str, precision: Precision) -> None:
        """Make the tensor an output of the graph in `precision`."""
        found = self._type_of[name]
        if found == precision:
            return
        inner = f"{name}/{found}"
        for node in self.nodes:
            node.input[:] = [inner if other == name else other for other in node.input]
            node.output[:] = [inner if other == name else other for other in node.output]
        self._append_cast(inner, name, precision)

    def _input(self, name: str, precision: Precision) -> str:
        if name in self._graph.constants:
            return self._constant(name, precision)
        if self._type_of[name] == precision:
            return name
        cast = f"{name}/{precision}"
        if cast not in self._cast:
            self._cast.add(cast)
            self._append_cast(name, cast, precision)
        return cast

    def _append_cast(self, source: str, target: str, precision: Precision) -> None:
        element = {"fp16": self._onnx.TensorProto.FLOAT16, "fp32": self._onnx.TensorProto.FLOAT}[precision]
        self.nodes.append(
            self._onnx.helper.make_node("Cast", [source], [target], name=f"{source}/to_{precision}", to=element)
        )

    def _constant(self, name: str, precision: Precision) -> str:
        tensor = self._graph.constants[name]
        value = _floats(tensor)
        typed = name if value is None or precision == self._precision else f"{name}/{precision}"
        if typed not in self.constants:
            if value is not None and precision == "fp16":
                tensor = self._onnx.numpy_helper.from_array(value.astype(np.float16), typed)
            elif typed != name:
                tensor = self._onnx.numpy_helper.from_array(value, typed)
            self.constants[typed] = tensor
        return typed
