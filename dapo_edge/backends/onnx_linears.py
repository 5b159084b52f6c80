"""The Linear layers of an encoder's blocks, found by the shape of the graph: what INT8 may touch, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dapo_edge.backends.onnx_graph import PlainGraph
from dapo_edge.errors import BackendError
from dapo_edge.extras import require

Role = Literal["qkv", "out", "fc1", "fc2"]
ROLES: tuple[Role, ...] = ("qkv", "out", "fc1", "fc2")  # in the order of execution

_FOREIGN = "Build the package again with the versions of constraints.txt"


@dataclass(frozen=True)
class Linear:
    """One MatMul of activations [..., in] with a weight [in, out]."""

    block: int  # counted from 1, as feature layers are
    role: Role
    node: str  # name of the MatMul
    input: str  # tensor
    weight: str  # constant [in, out]
    bias: str | None  # constant [out], added behind it
    norm: str | None  # name of the LayerNormalization that its input comes from; None behind attention and activation

    @property
    def name(self) -> str:
        """What reports, recipes and range files call it, e.g. `block3.fc1`."""
        return f"{block_name(self.block)}.{self.role}"


def block_name(block: int) -> str:
    """What reports and recipes call a block, counted from 1."""
    return f"block{block}"


def find_linears(graph: PlainGraph) -> tuple[Linear, ...]:
    """QKV, attention-out, FC1 and FC2 of every block, in the order of execution.

    Adapters, projection and patch embedding are none of them. Raises `BackendError` for an encoder of another build.
    """
    producers = {name: node for node in graph.nodes for name in node.output}
    biases = _biases(graph)
    depth = sum(node.op_type == "Softmax" for node in graph.nodes)
    weighted = [node for node in graph.nodes if node.op_type == "MatMul" and node.input[1] in graph.constants]
    found = []
    for place, node in enumerate(weighted[: depth * len(ROLES)]):
        source = producers.get(node.input[0])
        found.append(
            Linear(
                block=1 + place // len(ROLES),
                role=ROLES[place % len(ROLES)],
                node=node.name,
                input=node.input[0],
                weight=node.input[1],
                bias=biases.get(node.output[0]),
                norm=source.name if source is not None and source.op_type == "LayerNormalization" else None,
            )
        )
    _check(graph, found, depth)
    return tuple(found)


def weights_digest(graph: PlainGraph) -> str:
    """Names the encoder's weights: equal weights have equal digests, whatever their tensors are called."""
    onnx = require("onnx")
    digest = hashlib.sha256()
    digest.update(str(graph.shapes["image"]).encode())
    for node in graph.nodes:
        for name in node.input:
            tensor = graph.constants.get(name)
            if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT:
                digest.update(onnx.numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()[:32]


def _biases(graph: PlainGraph) -> dict[str, str]:
    """The constant vector that is added to a tensor, by the tensor's name."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type == "Add":
            for tensor, constant in (node.input, reversed(node.input)):
                if constant in graph.constants and len(graph.constants[constant].dims) == 1:
                    found[tensor] = constant
    return found


def _check(graph: PlainGraph, found: list[Linear], depth: int) -> None:
    """Roles were given by order; the shapes must bear them out."""
    sizes = [tuple(graph.constants[linear.weight].dims) for linear in found]
    fits = depth > 0 and len(found) == depth * len(ROLES)
    for linear, size in zip(found, sizes, strict=True):
        width = sizes[0][0]
        expected: dict[Role, Iterable[Any]] = {
            "qkv": (width, 3 * width, True),
            "out": (width, width, False),
            "fc1": (width, size[-1], True),
            "fc2": (size[0], width, False),
        }
        fits = fits and (*size, linear.norm is not None) == tuple(expected[linear.role])
    if not fits:
        raise BackendError("the encoder's blocks are not QKV, attention-out, FC1 and FC2, each a Linear", _FOREIGN)
