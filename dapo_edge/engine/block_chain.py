"""The encoder cut at its blocks, so that any mixture of float and INT8 blocks runs without compiling anything again.

Asking what one block in INT8 does to the maps would take as many whole encoders as there are blocks. Here each block is
a small model of its own, in float and in INT8, and the frames' activations in float wait at every cut: a block in INT8
costs the blocks from it on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_graph import EMBEDDING, IMAGE, IR_VERSION, OPSET, TOKENS, PlainGraph
from dapo_edge.backends.onnx_linears import find_linears
from dapo_edge.errors import BackendError
from dapo_edge.extras import require

FRAMES = 16  # enough to tell estimators and blocks apart
CACHE_BYTES = 1_500_000_000

_REBUILD = "Build the package again with the versions of constraints.txt"
_FLOAT_ONLY = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}  # beside INT8, which files ask for

FloatArray = NDArray[np.float32]


class BlockChain:
    """An encoder over some fixed images, one compiled model per block and form.

    Everything that is not INT8 computes in float32, so that a difference is the quantisation's alone. Holds one float32
    activation per image and cut, 130 MB for 16 images of ViT-B/16 at 224 px: `frames_that_fit` says how many images
    stay below `CACHE_BYTES`. The compiled blocks come on top, about the encoder's own size.
    """

    def __init__(self, graph: PlainGraph, images: FloatArray) -> None:
        """`images` are normalised RGB, [F, 3, S, S] float32, F >= 1.

        Raises `BackendError` for an encoder that can't be cut into blocks.
        """
        self._graph = graph
        self._cuts = block_cuts(graph)
        self._batch = graph.shapes[IMAGE][0]
        parts = _Parts(graph.nodes, graph.constants, graph.shapes, self._cuts)
        self._float = [_Compiled(parts.block(number)) for number in range(1, self.depth + 1)]
        self._int8 = list(self._float)
        tail = parts.tail()
        self._tail = _Compiled(tail)
        self._taps = [self._cuts.index(name) for name in tail.inputs]
        (stream,) = _Compiled(parts.head()).run([images], self._batch)
        self._streams = [stream]  # in float, by cut
        for block in self._float:
            (stream,) = block.run([stream], self._batch)
            self._streams.append(stream)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._cuts) - 1

    @property
    def quantized_blocks(self) -> tuple[int, ...]:
        """Blocks, counted from 1, that have an INT8 form of their own."""
        pairs = zip(self._float, self._int8, strict=True)
        return tuple(number for number, (plain, int8) in enumerate(pairs, start=1) if plain is not int8)

    def set_int8(self, model: bytes) -> None:
        """Take the INT8 form of the blocks from this quantised encoder, the portable one in float32 and Q/DQ.

        Raises `BackendError` for one whose blocks do not begin and end where this encoder's do.
        """
        onnx = require("onnx")
        graph = onnx.load_from_string(model).graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        parts = _Parts(graph.node, constants, self._graph.shapes, self._cuts)
        self._int8 = []
        for number, plain in enumerate(self._float, start=1):
            part = parts.block(number)
            quantized = any(node.op_type == "QuantizeLinear" for node in part.nodes)
            self._int8.append(_Compiled(part) if quantized else plain)

    def encode(self, int8: Collection[int] = ()) -> tuple[FloatArray, FloatArray]:
        """Patch tokens [F, L, N, D] and embeddings [F, D] with these blocks, counted from 1, in INT8 and the others in
        float.

        Raises `ValueError` for a block that is not there.
        """
        if not set(int8) <= set(range(1, self.depth + 1)):
            raise ValueError(f"blocks are counted from 1 to {self.depth}, not {sorted(int8)}")
        first = min(int8, default=self.depth + 1)
        stream = self._streams[first - 1]
        tapped = {cut: self._streams[cut] for cut in self._taps if cut < first}
        for number in range(first, self.depth + 1):
            form = self._int8 if number in int8 else self._float
            (stream,) = form[number - 1].run([stream], self._batch)
            if number in self._taps:
                tapped[number] = stream
        tokens, embedding = self._tail.run([tapped[cut] for cut in self._taps], self._batch)
        return tokens, embedding


def block_cuts(graph: PlainGraph) -> tuple[str, ...]:
    """Names of the residual stream before block 1 and behind each block: depth + 1 tensors, in order.

    Prompt tokens that are blended into the stream between two blocks belong to the second one. Raises `BackendError`
    for an encoder without such blocks.
    """
    linears = find_linears(graph)
    places = {node.name: place for place, node in enumerate(graph.nodes)}
    norm = linears[0].norm
    if norm is None:
        raise BackendError("the encoder's first block has no LayerNormalization before it", _REBUILD)
    cuts = [graph.nodes[places[norm]].input[0]]
    for linear in linears:
        if linear.role == "fc2":
            behind = graph.nodes[places[linear.node] + 1 :]
            sums = (node.output[0] for node in behind if node.op_type == "Add" and not _adds_constant(graph, node))
            cut = next(sums, None)
            if cut is None:
                raise BackendError(f"the encoder's block {linear.block} ends without a residual sum", _REBUILD)
            cuts.append(cut)
    return tuple(cuts)


def frames_that_fit(graph: PlainGraph, wanted: int = FRAMES, limit: int = CACHE_BYTES) -> int:
    """How many images a `BlockChain` holds within `limit` bytes of activations: at most `wanted`, at least 1."""
    batch = graph.shapes[IMAGE][0]
    values = sum(int(np.prod(graph.shapes[cut])) for cut in block_cuts(graph)) // batch
    return max(1, min(wanted, limit // (4 * values)))


@dataclass(frozen=True, eq=False)
class _Part:
    """A stretch of the encoder between named activations."""

    nodes: Sequence[Any]
    constants: Sequence[Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def model(self) -> bytes:
        onnx = require("onnx")
        float32 = onnx.TensorProto.FLOAT
        ends = {
            name: onnx.helper.make_tensor_value_info(name, float32, self.shapes[name])
            for name in (*self.inputs, *self.outputs)
        }
        graph = onnx.helper.make_graph(
            self.nodes, "part", [ends[name] for name in self.inputs], [ends[name] for name in self.outputs]
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        model.graph.initializer.extend(self.constants)  # last, because each of the helpers copies what it is given
        return model.SerializeToString()


class _Parts:
    """Cuts a graph; INT8 and float encoders have the same activations at the cuts, because migration stays inside of
    a block.
    """

    def __init__(
        self,
        nodes: Iterable[Any],
        constants: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        cuts: Sequence[str],
    ) -> None:
        self._nodes = tuple(nodes)
        self._constants = constants
        self._shapes = shapes
        self._cuts = cuts

    def head(self) -> _Part:
        return self._between([IMAGE], [self._cuts[0]])

    def block(self, number: int) -> _Part:
        return self._between([self._cuts[number - 1]], [self._cuts[number]])

    def tail(self) -> _Part:
        """Adapters, their stacking and the embedding: whatever hangs on the residual stream beside the blocks."""
        return self._between(self._cuts, [TOKENS, EMBEDDING])

    def _between(self, sources: Sequence[str], targets: Sequence[str]) -> _Part:
        needed, nodes = set(targets), []
        ends = {*self._cuts, IMAGE}.difference(targets)
        for node in reversed(self._nodes):
            if (needed - ends).intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        made = {name for node in nodes for name in node.output}
        entering = needed - made - self._constants.keys() - {""}
        if not (set(targets) <= made and entering <= set(sources)):
            missing = sorted({*entering, *targets} - made - set(sources))
            raise BackendError(f"the encoder can't be cut into blocks: '{missing[0]}' crosses a cut", _REBUILD)
        return _Part(
            nodes=nodes[::-1],
            constants=[self._constants[name] for name in sorted(needed & self._constants.keys())],
            inputs=tuple(name for name in sources if name in entering),
            outputs=tuple(targets),
            shapes=self._shapes,
        )


class _Compiled:
    """A part, ready to run in batches of the encoder's own size."""

    def __init__(self, part: _Part) -> None:
        ov = require("openvino")
        core = ov.Core()
        try:
            model = core.compile_model(core.read_model(part.model(), b""), "CPU", _FLOAT_ONLY)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO can't compile a part of the encoder ({str(error)[:200]})", _REBUILD
            ) from error
        self._request = model.create_infer_request()
        self._outputs = len(part.outputs)

    def run(self, inputs: Sequence[FloatArray], batch: int) -> list[FloatArray]:
        """Arrays [F, ...] in, arrays [F, ...] out; a last batch that is not full is filled up with its own images."""
        count = len(inputs[0])
        results: list[list[FloatArray]] = [[] for _ in range(self._outputs)]
        for start in range(0, count, batch):
            rows = np.minimum(np.arange(start, start + batch), count - 1)
            self._request.infer([np.ascontiguousarray(array[rows]) for array in inputs], share_inputs=True)
            for place, result in enumerate(results):
                result.append(self._request.get_output_tensor(place).data[: count - start].copy())
        return [np.concatenate(result) for result in results]


def _adds_constant(graph: PlainGraph, node: Any) -> bool:
    return any(name in graph.constants for name in node.input)
