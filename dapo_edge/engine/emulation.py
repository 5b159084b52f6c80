"""INT8 computed a second time, by nobody's runtime: NumPy, integer products, the rounding that ONNX defines.

When a compiled INT8 encoder gives other maps than the float one, either quantisation is to blame, then this emulation
shows the same maps, or the runtime is, then it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.host import make_maps
from dapo_edge.backends.onnx_graph import EMBEDDING, IMAGE, TOKENS
from dapo_edge.errors import BackendError
from dapo_edge.extras import require
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.prompt_bank import PromptBank

MAX_DIFFERENCE = 1e-3  # mean difference of anomaly maps beyond which a runtime computes something else

_REBUILD = "Build the package again with the versions of constraints.txt"

Array = NDArray[Any]
FloatArray = NDArray[np.float32]


def emulate(model: bytes, image: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Run a plain encoder, in float32 or with Q/DQ, on normalised RGB images [B, 3, S, S] float32.

    Returns patch tokens [B, L, N, D] and embeddings [B, D], float32. Raises `BackendError` for a file that is no such
    encoder or has operators that are not emulated, and for images of another shape.
    """
    onnx = require("onnx")
    try:
        graph = onnx.load_from_string(model).graph
    except Exception as error:  # protobuf has errors of its own, other ones in each of its implementations
        raise BackendError(f"the encoder is not an ONNX file ({error})", _REBUILD) from error
    _check(graph, image)
    values: dict[str, Any] = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values[IMAGE] = image
    last_use = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last_use |= dict.fromkeys((TOKENS, EMBEDDING), len(graph.node))
    for place, node in enumerate(graph.node):
        options = {option.name: onnx.helper.get_attribute_value(option) for option in node.attribute}
        inputs = [values[name] if name else None for name in node.input]
        if node.op_type not in _TAKES_INTEGERS:
            inputs = [value.numbers() if isinstance(value, Dequantized) else value for value in inputs]
        results = _OPERATORS[node.op_type](inputs, options, len(node.output))
        values.update(zip(node.output, results, strict=True))
        for name in set(node.input):
            if last_use[name] == place:  # the attention weights of a large encoder would fill gigabytes
                values.pop(name, None)
    return values[TOKENS], values[EMBEDDING]


def emulation_difference(model: bytes, images: FloatArray, bank: PromptBank, spec: MapSpec) -> float:
    """Mean difference of the anomaly maps, 0..1, between this emulation and OpenVINO with float32 beside INT8.

    `images` are normalised RGB [F, 3, S, S] float32. Above `MAX_DIFFERENCE` the runtime is at fault. It is not 0: sums
    in another order make a few activations round to the other side, and each Linear passes such steps on to the next.
    Raises `BackendError` as `emulate` does, and where OpenVINO refuses the encoder.
    """
    ov = require("openvino")
    core = ov.Core()
    try:
        compiled = core.compile_model(core.read_model(model, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise BackendError(f"OpenVINO can't compile the INT8 encoder ({str(error)[:200]})", _REBUILD) from error
    request = compiled.create_infer_request()
    batch = int(compiled.input(0).shape[0])
    size = (spec.image_size, spec.image_size)
    differences = []
    for image in images:
        filled = np.repeat(image[None], batch, axis=0)
        expected = make_maps(*emulate(model, filled), bank, spec, size).anomaly
        request.infer([filled])
        tokens, embedding = (request.get_output_tensor(place).data for place in (0, 1))
        differences.append(np.abs(make_maps(tokens, embedding, bank, spec, size).anomaly - expected).mean())
    return float(np.mean(differences))


@dataclass(frozen=True, eq=False)
class Dequantized:
    """What a DequantizeLinear stands for, kept as integers until something needs the numbers."""

    integers: NDArray[np.int8]
    scale: FloatArray  # a scalar, or one per index of `axis`
    zero: NDArray[np.int8]
    axis: int

    def numbers(self) -> FloatArray:
        """(integers - zero) · scale, float32."""
        return (self.integers.astype(np.float32) - self._spread(self.zero)) * self._spread(self.scale)

    def _spread(self, parameter: Array) -> Array:
        """A parameter [C] in the shape that meets C along `axis`."""
        if parameter.size == 1:
            return parameter.reshape(()).astype(np.float32)
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return parameter.astype(np.float32).reshape(shape)


def integer_product(left: NDArray[np.int8], right: NDArray[np.int8]) -> NDArray[np.float64]:
    """The exact integer product of [..., K] and [K, N] int8, held in float64.

    Each partial sum is an integer of at most K · 2^14, and float64 holds every integer below 2^53: exact for any K
    that fits into a memory, in any order of additions, fused or not. NumPy's own integer product is 100 times slower.
    """
    return left.astype(np.float64) @ right.astype(np.float64)


def erf(x: FloatArray) -> FloatArray:
    """The error function to 2e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    size = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.copysign(1 - series * np.exp(-size * size), x).astype(np.float32)


def quantize(x: FloatArray, scale: FloatArray, zero: NDArray[np.int8]) -> NDArray[np.int8]:
    """saturate(round(x / scale) + zero) to [-128, 127], halves to even (ONNX operators, QuantizeLinear)."""
    return np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8)


def _check(graph: Any, image: FloatArray) -> None:
    ends = [value.name for value in (*graph.input, *graph.output)]
    if ends != [IMAGE, TOKENS, EMBEDDING]:
        raise BackendError(f"the ONNX file has inputs and outputs {ends}, an encoder has other ones", _REBUILD)
    strange = sorted({node.op_type for node in graph.node} - _OPERATORS.keys())
    if strange:
        raise BackendError(f"the emulation does not know the ONNX operator {strange[0]}", _REBUILD)
    shape = tuple(axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim)
    if image.shape != shape or image.dtype != np.float32:
        raise BackendError(
            f"the encoder takes float32 images of shape {list(shape)}, not {image.dtype} {list(image.shape)}",
            "Resize and normalise the frames as the package says",
        )


# The operators: inputs and attributes in, outputs out (https://onnx.ai/onnx/operators, opset 17).

_Inputs = Sequence[Any]
_Options = Mapping[str, Any]


def _quantize_linear(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    x, scale, zero = inputs
    if scale.size != 1:
        raise BackendError("the emulation knows activations of one scale per tensor only", _REBUILD)
    return [quantize(x, scale.reshape(()), zero.reshape(()))]


def _dequantize_linear(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    integers, scale, zero = inputs
    if integers.dtype != np.int8:
        raise BackendError(f"the emulation dequantises int8, not {integers.dtype}", _REBUILD)
    return [Dequantized(integers, scale, zero, options.get("axis", 1))]


def _mat_mul(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    left, right = inputs
    if isinstance(left, Dequantized) and isinstance(right, Dequantized) and _factors_out(left, right):
        scale = left.scale.astype(np.float64) * right.scale  # [] · [N]
        return [(integer_product(left.integers, right.integers) * scale).astype(np.float32)]
    left, right = (value.numbers() if isinstance(value, Dequantized) else value for value in (left, right))
    return [left @ right]


def _factors_out(left: Dequantized, right: Dequantized) -> bool:
    """Whether both scales can be taken out of the sum over K."""
    columns = right.scale.size == 1 or (right.integers.ndim == 2 and right.axis == 1)
    return left.scale.size == 1 and columns and not (left.zero.any() or right.zero.any())


def _conv(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    x, weight = inputs[:2]
    if options.get("group", 1) != 1 or set(options.get("dilations", [1])) != {1} or "auto_pad" in options:
        raise BackendError("the emulation knows plain convolutions only", _REBUILD)
    top, left, bottom, right = options.get("pads", [0, 0, 0, 0])
    down, across = options.get("strides", [1, 1])
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (1, *weight.shape[1:]))  # [B, 1, h, w, 1, C, kh, kw]
    result = np.tensordot(windows[:, 0, ::down, ::across, 0], weight, axes=((3, 4, 5), (1, 2, 3)))  # [B, h, w, out]
    result = result.transpose(0, 3, 1, 2)
    return [result if len(inputs) < 3 else result + inputs[2][:, None, None]]


def _gemm(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    left = inputs[0].T if options.get("transA") else inputs[0]
    right = inputs[1].T if options.get("transB") else inputs[1]
    product = np.float32(options.get("alpha", 1.0)) * (left @ right)
    return [product if len(inputs) < 3 else product + np.float32(options.get("beta", 1.0)) * inputs[2]]


def _layer_normalization(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    x, gain = inputs[:2]
    axes = tuple(range(options.get("axis", -1) % x.ndim, x.ndim))
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    result = centred / np.sqrt(variance + np.float32(options.get("epsilon", 1e-5))) * gain
    return [result if len(inputs) < 3 else result + inputs[2]]


def _softmax(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    axis = options.get("axis", -1)
    powers = np.exp(inputs[0] - inputs[0].max(axis=axis, keepdims=True))
    return [powers / powers.sum(axis=axis, keepdims=True)]


def _reshape(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    x, shape = inputs
    if not options.get("allowzero"):
        shape = [x.shape[place] if side == 0 else side for place, side in enumerate(shape)]
    return [x.reshape([int(side) for side in shape])]


def _slice(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    x, starts, ends = inputs[:3]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = inputs[4] if len(inputs) > 4 else [1] * len(starts)
    taken = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        taken[int(axis)] = slice(int(start), int(end), int(step))
    return [x[tuple(taken)]]


def _split(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    axis = options.get("axis", 0)
    if len(inputs) > 1:
        return np.split(inputs[0], np.cumsum(inputs[1])[:-1], axis)
    return np.array_split(inputs[0], outputs, axis)


def _squeeze(inputs: _Inputs, options: _Options, outputs: int) -> list[Any]:
    return [np.squeeze(inputs[0], tuple(int(axis) for axis in inputs[1]) if len(inputs) > 1 else None)]


def _elementwise(function: Callable[..., Any]) -> Callable[[_Inputs, _Options, int], list[Any]]:
    return lambda inputs, options, outputs: [function(*inputs)]


_OPERATORS: dict[str, Callable[[_Inputs, _Options, int], list[Any]]] = {
    "Add": _elementwise(np.add),
    "Concat": lambda inputs, options, outputs: [np.concatenate(inputs, options["axis"])],
    "Conv": _conv,
    "DequantizeLinear": _dequantize_linear,
    "Div": _elementwise(np.divide),
    "Erf": _elementwise(erf),
    "Expand": _elementwise(lambda x, shape: x * np.ones([int(side) for side in shape], x.dtype)),
    "Gather": lambda inputs, options, outputs: [np.take(inputs[0], inputs[1], options.get("axis", 0))],
    "Gemm": _gemm,
    "Identity": _elementwise(lambda x: x),
    "LayerNormalization": _layer_normalization,
    "MatMul": _mat_mul,
    "Mul": _elementwise(np.multiply),
    "QuantizeLinear": _quantize_linear,
    "Reshape": _reshape,
    "Sigmoid": _elementwise(lambda x: (1 + np.tanh(x / 2)) / 2),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Tanh": _elementwise(np.tanh),
    "Transpose": lambda inputs, options, outputs: [inputs[0].transpose(options.get("perm"))],
    "Unsqueeze": _elementwise(lambda x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes))),
}
_TAKES_INTEGERS = frozenset({"MatMul"})
