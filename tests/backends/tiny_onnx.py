"""An ONNX model of a few bytes, for tests of what compiles and runs models."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def tiny_onnx(
    dtype: type = np.float32, *, opset: int = 17, batch: Any = 2, quantized: bool = False, half_out: bool = False
) -> bytes:
    """image [2, 3, 4] → one attention block without heads → out [2, 3, 4], all of one type but for `half_out`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = [batch, 3, 4]
    scale = numpy_helper.from_array(np.asarray(0.5, dtype), "scale")
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["q"], "/attn/Mul"),
        helper.make_node("Transpose", ["image"], ["k"], "/attn/Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["scores"], "/attn/MatMul"),
        helper.make_node("Softmax", ["scores"], ["weights"], "/attn/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "image"], ["out"], "/attn/MatMul_1"),
    ]
    initializers = [scale]
    if quantized:
        initializers.append(numpy_helper.from_array(np.asarray(0.01, np.float32), "step"))
        initializers.append(numpy_helper.from_array(np.asarray(0, np.int8), "zero"))
        nodes[0].input[0] = "dequantized"
        nodes[:0] = [
            helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["quantized"], "/Q"),
            helper.make_node("DequantizeLinear", ["quantized", "step", "zero"], ["dequantized"], "/DQ"),
        ]
    if half_out:
        nodes[-1].output[0] = "wide"
        nodes.append(helper.make_node("Cast", ["wide"], ["out"], "out/to_fp16", to=TensorProto.FLOAT16))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT16 if half_out else kind, shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model.SerializeToString()
