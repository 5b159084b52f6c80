"""What is read from TensorRT's log and from the engine inspector."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from dapo_edge.backends.trt_report import Attention, TrtLog, attention_fused, parse_layers


def test_only_the_last_errors_are_kept() -> None:
    log = TrtLog()
    for index in range(50):
        log.record(logging.ERROR, f"error {index}")
        log.record(logging.ERROR, f"error {index}")
    assert log.cause() == "error 47; error 48; error 49"


def kernels(*names: str) -> list[dict[str, str]]:
    return [{"Name": name, "LayerType": "kgen", "TacticName": re.sub("_myl0.*", "_0x95", name)} for name in names]


# Made of ONNX paths, which prove nothing about the kernel.
QKV = "/blocks/mha/attn/key/MatMul+/blocks/mha/attn/query/MatMul_myl0_16"
FUSED = {
    "Name": "_gemm_mha_v2_myl0_17",
    "LayerType": "kgen",
    "TacticName": "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a",
    "Metadata": "[ONNX Layer: /attn/MatMul][ONNX Layer: /attn/Softmax][ONNX Layer: /attn/MatMul_1]",
}
SPLIT_SOFTMAX = [
    {"Name": "__myl_MulMaxSubExpSum_myl0_3", "LayerType": "kgen", "Metadata": "[ONNX Layer: /b/Softmax]"},
    {"Name": "__myl_DivMulTra_myl0_4", "LayerType": "kgen", "Metadata": "[ONNX Layer: /b/Softmax]"},
]
OPAQUE = [{"Name": "{ForeignNode[/ln/Constant.../softmax/Softmax]}", "LayerType": "Myelin", "TacticValue": "0x0"}]


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [
        ([*kernels(QKV), FUSED], 1, Attention(1, 1, True)),
        (kernels("__mye8037_gemm_mha_v2", "_gemm_mha_v2_myl0_9", "__myl_AddMea_myl0_2"), 2, Attention(2, 2, True)),
        ([*kernels(QKV), *SPLIT_SOFTMAX], 1, Attention(0, 1, True)),
        ([FUSED, *SPLIT_SOFTMAX], 2, Attention(1, 2, True)),
        (kernels("__myl_TraMaxSubExpSum_myl0_1", "__myl_DivMul_myl0_2"), 1, Attention(0, 1, True)),
        ([{"Name": "/attn/Softmax", "LayerType": "SoftMaxV2"}], 1, Attention(0, 1, True)),
        ([{"Name": "/attn/Softmax", "LayerType": "CaskSoftMaxV2"}, FUSED], 1, Attention(0, 1, True)),
        (
            [{"Name": "x", "TacticName": "fmha_v2_flash_attention_fp16_64_64_S_64_sm90_kernel"}],
            1,
            Attention(1, 1, True),
        ),
        (["_gemm_mha_v2_myl0_17", "__myl_Add_myl0_18"], 1, Attention(1, 1, True)),
        (["/attn/Softmax", "/attn/MatMul"], 1, Attention(0, 1, True)),
        (OPAQUE, 12, Attention(0, 12, False)),
        ([OPAQUE[0]["Name"]], 1, Attention(0, 1, False)),
        ([FUSED, *OPAQUE], 2, Attention(1, 2, False)),
        (kernels(QKV), 1, Attention(0, 1, False)),
        (kernels("/blocks/fused_mha/query/MatMul_myl0_2"), 1, Attention(0, 1, False)),
        ([], 4, Attention(0, 4, False)),
        (kernels(*(f"_gemm_mha_v2_myl0_{index}" for index in range(5))), 4, Attention(4, 4, True)),
    ],
)
@pytest.mark.parametrize("tensors", ["Bindings", "I/O Tensors"])
def test_fused_attention_is_counted(layers: list[Any], blocks: int, expected: Attention, tensors: str) -> None:
    parsed = parse_layers(json.dumps({"Layers": layers, tensors: ["image"]}))
    assert len(parsed) == len(layers)
    assert attention_fused(parsed, blocks) == expected
