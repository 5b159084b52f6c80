"""What a default recipe does to an encoder: INT8 wherever a compiler takes it, scales from the largest value.

Only to be measured beside our own; public tools do this to a ViT unless they are told otherwise (residual adds,
attention products, patch embedding and projection included).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dapo_edge.backends.onnx_graph import EMBEDDING, IMAGE, TOKENS, PlainGraph, assembled, read_plain

QUANTIZED = ("Conv", "Gemm", "MatMul", "Add")
NORMALISED_IMAGE = 2.7  # |value| of the brightest pixel after CLIP's normalisation


def naive_int8(encoder: bytes, ranges: Mapping[str, float]) -> bytes:
    """Q/DQ before the inputs of every product, and sum of two activations; `ranges` are the range probe's."""
    graph = read_plain(encoder)
    known = _reach(graph, ranges)
    nodes: list[Any] = []
    constants = dict(graph.constants)
    quantized: dict[str, str] = {}
    for node in graph.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        sums_activations = not any(name in graph.constants for name in node.input)
        if node.op_type in QUANTIZED and (node.op_type != "Add" or sums_activations):
            places = range(min(2, len(node.input)))
            for place in places:
                name = node.input[place]
                if name not in quantized:
                    quantized[name] = _pair(name, node.op_type, graph, known, nodes, constants)
                copy.input[place] = quantized[name]
        nodes.append(copy)
    element = onnx.TensorProto.FLOAT
    return assembled(
        nodes,
        [tensor for name, tensor in constants.items() if any(name in node.input for node in nodes)],
        {name: (element, graph.shapes[name]) for name in (IMAGE, TOKENS, EMBEDDING)},
    )


def _pair(
    name: str, operator: str, graph: PlainGraph, known: Mapping[str, float], nodes: list[Any], constants: dict[str, Any]
) -> str:
    """Append what quantises a tensor and back; return the name of the result."""
    scale, zero, rounded, back = (f"{name}/naive_{part}" for part in ("scale", "zero", "int8", "float"))
    axis = None
    if name in graph.constants:
        value = numpy_helper.to_array(graph.constants[name])
        axis = 0 if operator == "Conv" else value.ndim - 1
        largest = np.abs(value).max(axis=tuple(other for other in range(value.ndim) if other != axis))
    else:
        largest = np.asarray(known[name])
    scales = np.maximum(largest, 1e-6).astype(np.float32) / np.float32(127)
    constants[scale] = numpy_helper.from_array(scales, scale)
    constants[zero] = numpy_helper.from_array(np.zeros(scales.shape, np.int8), zero)
    options = {} if axis is None else {"axis": axis}
    nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [rounded], name=f"{name}/naive_q", **options))
    nodes.append(
        helper.make_node("DequantizeLinear", [rounded, scale, zero], [back], name=f"{name}/naive_dq", **options)
    )
    return back


def _reach(graph: PlainGraph, ranges: Mapping[str, float]) -> dict[str, float]:
    """Largest |value| of every activation: measured, at most 1, or that of what it carries."""
    known = {IMAGE: NORMALISED_IMAGE, **ranges}
    for name, tensor in graph.constants.items():
        if tensor.data_type == onnx.TensorProto.FLOAT:
            known[name] = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
    for node in graph.nodes:
        for output in node.output:
            if output not in known:
                known[output] = 1.0 if node.op_type == "Softmax" else max(known.get(name, 0.0) for name in node.input)
    return known
