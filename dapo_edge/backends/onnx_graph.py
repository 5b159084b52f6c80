"""An exported encoder made plain: constant parts are computed, copies are gone, what is left is ONNX opset 17.

Compilers then meet activations and weights only, no shape arithmetic, in an operator set that TensorRT 8.6 to 11 read.
The same nodes are valid up to opset 19, where float16 scales of INT8 begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapo_edge.errors import BackendError
from dapo_edge.extras import require

OPSET, IR_VERSION = 17, 8  # the newest opset that TensorRT 8.6 reads, and the file version that belongs to it
HALF_SCALES_OPSET = 19  # the oldest opset whose QuantizeLinear takes float16; TensorRT 10.0 reads up to 20
_IR_VERSIONS = {OPSET: IR_VERSION, HALF_SCALES_OPSET: 9}
READABLE_OPSETS = (17, 18)  # between these two the operators below differ in Split's num_outputs only
IMAGE, TOKENS, EMBEDDING = "image", "patch_tokens", "image_embedding"

# Operators whose output holds values of their inputs, so that its range is at most theirs.
CARRIERS = frozenset({"Concat", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
SELECTORS = frozenset({"Gather", "Slice", "Split"})  # also carriers, but what they leave out may be the outliers
BOUNDED = frozenset({"Erf", "Sigmoid", "Softmax", "Tanh"})  # never beyond 1
ARITHMETIC = frozenset({"Add", "Conv", "Div", "Gemm", "LayerNormalization", "MatMul", "Mul", "Sub"})
OPERATORS = CARRIERS | SELECTORS | BOUNDED | ARITHMETIC

_REBUILD = "Build the package again with the versions of constraints.txt"
_SMALL = 4096  # elements; shape inference looks into constants of this size, weights stay out of its copies
_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class PlainGraph:
    """Nodes in the order of execution, over activations of fixed shape, all float32 but for what is quantised."""

    nodes: tuple[Any, ...]  # onnx.NodeProto, each with a name of its own
    constants: Mapping[str, Any]  # onnx.TensorProto by name: weights float32 or int8, the rest whole numbers
    shapes: Mapping[str, tuple[int, ...]]  # of every activation, the input and the outputs among them


def read_plain(model: bytes) -> PlainGraph:
    """Read an encoder `image` → `patch_tokens`, `image_embedding` of opset 17 or 18.

    Raises `BackendError` for bytes that are no such encoder and for operators outside of `OPERATORS`, and
    `DependencyMissing` without the onnx package.
    """
    onnx = require("onnx")
    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf has errors of its own, other ones in each of its implementations
        raise BackendError(f"the encoder is not an ONNX file ({error})", _REBUILD) from error
    _check_kind(proto)
    types = _inferred_types(onnx, proto, proto.graph.node, proto.graph.initializer)
    nodes, constants = _without_constant_parts(onnx, proto, types)
    nodes = _reached(nodes)
    types = _inferred_types(onnx, proto, nodes, list(constants.values()))  # shapes that were computed are known now
    activations = {IMAGE, *(name for node in nodes for name in node.output)}
    for node in nodes:
        _check_operator(node)
    for name in sorted(activations):
        element, shape = types.get(name, (0, ()))
        if element != onnx.TensorProto.FLOAT or min(shape, default=1) < 1:
            raise BackendError(f"the encoder's tensor '{name}' is not float32 of a fixed shape", _REBUILD)
    used = {name for node in nodes for name in node.input}
    return PlainGraph(
        nodes=tuple(_renewed(onnx, node, index) for index, node in enumerate(nodes)),
        constants={name: _clamped(onnx, tensor) for name, tensor in constants.items() if name in used},
        shapes={name: types[name][1] for name in sorted(activations)},
    )


def assembled(
    nodes: Sequence[Any],
    constants: Sequence[Any],
    ends: Mapping[str, tuple[int, tuple[int, ...]]],
    opset: int = OPSET,
) -> bytes:
    """An encoder file of these nodes; `ends` gives element type and shape of the input, tokens and embedding.

    `opset` is `OPSET` or `HALF_SCALES_OPSET`. The same parts give the same bytes. Raises `BackendError` when an
    operator gets inputs that ONNX does not allow it, two float types at once among them.
    """
    onnx = require("onnx")
    nodes = [_of_opset(onnx, node, opset) for node in nodes]

    def model_of(inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
        values = {name: onnx.helper.make_tensor_value_info(name, *end) for name, end in ends.items()}
        graph = onnx.helper.make_graph(nodes, "encoder", [values[IMAGE], *inputs], [values[TOKENS], values[EMBEDDING]])
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", opset)],
            ir_version=_IR_VERSIONS[opset],
            producer_name="dapo-edge",
        )
        model.graph.initializer.extend(weights)  # last, because each of the helpers copies what it is given
        return model

    try:
        onnx.checker.check_model(model_of(*_weightless(onnx, constants)), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the converted encoder contradicts ONNX opset {opset} ({error})", _REBUILD) from error
    return model_of([], constants).SerializeToString(deterministic=True)


def _of_opset(onnx: Any, node: Any, opset: int) -> Any:
    """The node as a later opset wants it: since 18, a Split into equal parts says how many."""
    if node.op_type != "Split" or len(node.input) > 1 or opset == OPSET:
        return node
    counted = onnx.NodeProto()
    counted.CopyFrom(node)
    counted.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
    return counted


def _check_kind(proto: Any) -> None:
    ends = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    if ends != [IMAGE, TOKENS, EMBEDDING]:
        raise BackendError(f"the ONNX file has inputs and outputs {ends}, an encoder has other ones", _REBUILD)
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    if opsets.pop("", 0) not in READABLE_OPSETS or opsets:
        raise BackendError(f"the encoder is not of ONNX opset {' or '.join(map(str, READABLE_OPSETS))} alone", _REBUILD)


def _check_operator(node: Any) -> None:
    if node.op_type not in OPERATORS:
        raise BackendError(
            f"the encoder uses the ONNX operator {node.op_type} ('{node.name or node.output[0]}'), whose range in "
            "another float type is not known here",
            f"{_REBUILD}, or run it with the openvino backend",
        )


def _weightless(onnx: Any, constants: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Large constants as inputs, and the small ones: ONNX's own checks copy the whole model several times."""
    large = [tensor for tensor in constants if _elements(tensor) > _SMALL]
    small = [tensor for tensor in constants if _elements(tensor) <= _SMALL]
    inputs = [onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large]
    return inputs, small


def _elements(tensor: Any) -> int:
    count = 1
    for side in tensor.dims:
        count *= side
    return count


def _inferred_types(
    onnx: Any, proto: Any, nodes: Sequence[Any], constants: Sequence[Any]
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Element type and shape of every tensor; sides that are not fixed are 0."""
    inputs, small = _weightless(onnx, constants)
    ends = [*proto.graph.input, *inputs], proto.graph.output
    graph = onnx.helper.make_graph(nodes, "types", *ends, initializer=small)
    skeleton = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BackendError(f"the encoder's graph contradicts itself ({error})", _REBUILD) from error
    types = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in small}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        types[value.name] = (tensor.elem_type, tuple(axis.dim_value for axis in tensor.shape.dim))
    return types


def _without_constant_parts(
    onnx: Any, proto: Any, types: Mapping[str, tuple[int, tuple[int, ...]]]
) -> tuple[list[Any], dict[str, Any]]:
    """Nodes that depend on the image, and every constant that there is, computed ones too."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    fixed = set(constants)
    same: dict[str, str] = {}  # tensor: the tensor that it is a copy of
    nodes, constant_nodes = [], []
    for original in proto.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.input[:] = [same.get(name, name) for name in original.input]
        if node.op_type == "Shape" and node.input[0] not in fixed:
            constants[node.output[0]] = _shape_constant(onnx, node, types)
            fixed.add(node.output[0])
        elif _copies(node, types) and node.output[0] not in (TOKENS, EMBEDDING):
            same[node.output[0]] = node.input[0]
        elif all(name in fixed for name in node.input if name):
            constant_nodes.append(node)
            fixed.update(node.output)
        else:
            nodes.append(node)
    wanted = sorted({name for node in nodes for name in node.input if name in fixed} - set(constants))
    constants |= _computed(onnx, proto, constant_nodes, constants, wanted)
    return nodes, constants


def _copies(node: Any, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> bool:
    """Whether the output is the input; torch exports a Cast from float32 to float32 behind each LayerNorm."""
    if node.op_type == "Cast":
        return node.input[0] in types and types[node.input[0]][0] == types.get(node.output[0], (None,))[0]
    return node.op_type == "Identity"


def _shape_constant(onnx: Any, node: Any, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> Any:
    _, shape = types.get(node.input[0], (0, (0,)))
    if min(shape, default=1) < 1:
        raise BackendError(f"the shape of the encoder's tensor '{node.input[0]}' is not fixed", _REBUILD)
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    taken = shape[ends.get("start", 0) : ends.get("end", len(shape))]
    return onnx.helper.make_tensor(node.output[0], onnx.TensorProto.INT64, [len(taken)], taken)


def _computed(
    onnx: Any, proto: Any, nodes: Sequence[Any], constants: Mapping[str, Any], wanted: Sequence[str]
) -> dict[str, Any]:
    if not wanted:
        return {}
    reference = require("onnx.reference")
    used = sorted({name for node in nodes for name in node.input} & set(constants))
    graph = onnx.helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in wanted],
        initializer=[constants[name] for name in used],
    )
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    values = reference.ReferenceEvaluator(model).run(None, {})
    return {name: onnx.numpy_helper.from_array(value, name) for name, value in zip(wanted, values, strict=True)}


def _reached(nodes: Sequence[Any]) -> list[Any]:
    """The nodes that the outputs depend on."""
    wanted, reached = {TOKENS, EMBEDDING}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted.update(node.input)
            reached.append(node)
    return reached[::-1]


def _renewed(onnx: Any, node: Any, index: int) -> Any:
    """The node in opset 17, with a name: compilers name their layers after it."""
    renewed = onnx.NodeProto()
    renewed.CopyFrom(node)
    renewed.name = node.name or f"{node.op_type}_{index}"
    if node.op_type == "Split":
        kept = [attribute for attribute in node.attribute if attribute.name != "num_outputs"]
        del renewed.attribute[:]
        renewed.attribute.extend(kept)
    return renewed


def _clamped(onnx: Any, tensor: Any) -> Any:
    """Slices to the end are exported as 2^63 - 1; TensorRT counts in 32 bits and warns about each of them."""
    if tensor.data_type != onnx.TensorProto.INT64:
        return tensor
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).clip(-_INT32, _INT32), tensor.name)
