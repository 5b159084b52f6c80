"""How far the activations of an exported encoder reach: what float16 can hold is decided by them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_flavours import measured_tensors
from dapo_edge.errors import GateError
from dapo_edge.extras import require


class RangeProbe:
    """Runs an encoder in float32 on the CPU and keeps the largest |value| of every tensor that can overflow.

    Maximum and sum are taken inside of the compiled graph, so that only two numbers per tensor come out of it: the
    activations of one ViT-L would fill gigabytes.
    """

    def __init__(self, encoder: bytes) -> None:
        """`encoder` is the portable ONNX file. Raises `BackendError` for one with unknown operators."""
        ov = require("openvino")
        self._names = measured_tensors(encoder)
        core = ov.Core()
        model = core.read_model(probed(encoder, self._names), b"")
        self._shape = [int(side) for side in model.input(0).shape]
        self._request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
        self._largest: NDArray[np.float64] = np.zeros(len(self._names))

    def observe(self, image: NDArray[np.float32]) -> None:
        """Take a normalised RGB image [1, 3, S, S] into account.

        Raises `GateError` naming the first tensor, in the order of execution, that holds Inf or NaN.
        """
        self._request.infer([np.broadcast_to(image, self._shape).copy()])
        numbers = [float(self._request.get_output_tensor(place).data) for place in range(2 * len(self._names))]
        for name, largest, total in zip(self._names, numbers[::2], numbers[1::2], strict=True):
            if not math.isfinite(largest + total):
                raise GateError(
                    f"the encoder's tensor '{name}' holds {'Inf' if math.isinf(largest) else 'NaN'} on a gate frame",
                    "Nothing was written. Check the weights of the backbone and of the tuned prompts",
                )
        self._largest = np.maximum(self._largest, numbers[::2])

    @property
    def ranges(self) -> dict[str, float]:
        """Largest |value| by tensor name, to four digits, over all images so far."""
        return {name: float(f"{value:.4g}") for name, value in zip(self._names, self._largest, strict=True)}


def probed(encoder: bytes, names: tuple[str, ...]) -> bytes:
    """The encoder with max |x| and Σ|x| of the named tensors, by turns, as its only outputs."""
    onnx = require("onnx")
    model: Any = onnx.load_from_string(encoder)
    del model.graph.output[:]
    for place, name in enumerate(names):
        size, largest, total = f"probe/{place}", f"probe/{place}/max", f"probe/{place}/sum"
        # A maximum passes over NaN, a sum does not.
        for operator, source, target, options in (
            ("Abs", name, size, {}),
            ("ReduceMax", size, largest, {"keepdims": 0}),
            ("ReduceSum", size, total, {"keepdims": 0}),
        ):
            model.graph.node.append(onnx.helper.make_node(operator, [source], [target], **options))
        scalars = (onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, []) for end in (largest, total))
        model.graph.output.extend(scalars)
    return model.SerializeToString()
