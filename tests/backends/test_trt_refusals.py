"""What TensorRT refuses, and what the error then says: TensorRT's own words, and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_tensorrt import install, make
from tiny_onnx import tiny_onnx

from dapo_edge.backends.trt_api import BuildOptions, build_plan, load, open_engine
from dapo_edge.errors import BackendError

MAJORS = (8, 10, 11)


@pytest.fixture(params=(8, 10, 11))
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(make(request.param), monkeypatch)


@pytest.fixture
def fake_10(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(make(10), monkeypatch)


def test_a_node_that_cannot_be_parsed_is_named(fake: Any) -> None:
    fake.control.parse_error = ("/blocks.3/attn/Gelu", "Assertion failed: no importer for Gelu")
    with pytest.raises(BackendError) as caught:
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    node = "number 7" if load().major < 10 else "/blocks.3/attn/Gelu"
    assert f"TensorRT {fake.__version__} can't parse the encoder (node {node}: Assertion failed" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no ONNX", tiny_onnx()[:-20]])
def test_what_is_no_model_is_refused(fake: Any, content: bytes) -> None:
    with pytest.raises(BackendError, match="can't parse the encoder"):
        build_plan(load(), content, BuildOptions("fp32"))


def test_dynamic_shapes_are_refused(fake: Any) -> None:
    with pytest.raises(BackendError, match=r"input 'image' has the dynamic shape \(-1, 3, 4\)"):
        build_plan(load(), tiny_onnx(batch="N"), BuildOptions("fp32"))


def test_a_failed_build_says_why(fake: Any) -> None:
    fake.control.build_fails = True
    fake.control.build_log = [
        ("WARNING", "a remark"),
        ("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node /attn/Softmax.)"),
    ]
    with pytest.raises(BackendError, match=r"can't build a plan from the encoder \(Error Code 10.*node /attn/Softmax"):
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    fake.control.build_log = []
    with pytest.raises(BackendError, match="it gave no reason"):
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))


def test_a_precision_that_is_not_the_models_is_refused_by_tensorrt_8(monkeypatch: pytest.MonkeyPatch) -> None:
    install(make(8), monkeypatch)
    with pytest.raises(BackendError, match="INT8 flag is not set"):
        build_plan(load(), tiny_onnx(quantized=True), BuildOptions("fp16"))


OUT_OF_MEMORY = [
    (
        [
            ("ERROR", "2: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory"),
            ("WARNING", "Requested amount of GPU memory (17179869184 bytes) could not be allocated."),
        ],
        "largest request 16.0 GiB, workspace allowed 256 MiB",
    ),
    (
        [
            ("WARNING", "Tactic Device request: 600MB Available: 302MB. Device memory is insufficient to use tactic."),
            (
                "WARNING",
                "UNSUPPORTED_STATE: Skipping tactic 33 due to insufficient memory on requested size of 629145600",
            ),
            ("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node /attn/MatMul.)"),
        ],
        "largest request 600 MiB, 302 MiB were free, workspace allowed 256 MiB",
    ),
    ([("ERROR", "1: [defaultAllocator.cpp::allocate::20] Cuda Runtime (out of memory)")], "workspace allowed 256 MiB"),
]


@pytest.mark.parametrize(("lines", "facts"), OUT_OF_MEMORY)
def test_too_little_memory_is_recognised(fake: Any, lines: list[tuple[str, str]], facts: str) -> None:
    fake.control.build_fails, fake.control.build_log = True, lines
    with pytest.raises(BackendError) as caught:
        build_plan(load(), tiny_onnx(), BuildOptions("fp32", workspace_bytes=2**28))
    assert f"the GPU has too little memory ({facts}, " in caught.value.cause
    assert "Lower the workspace" in caught.value.remedy


def test_an_internal_error_2_is_not_taken_for_too_little_memory(fake_10: Any) -> None:
    fake_10.control.build_fails = True
    fake_10.control.build_log = [("ERROR", "Error Code 2: Internal Error (Assertion !mRegion failed.)")]
    with pytest.raises(BackendError, match=r"\(Error Code 2: Internal Error") as caught:
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    assert "memory" not in str(caught.value)


def test_a_builder_that_does_not_start(fake: Any) -> None:
    fake.control.builder_fails = True
    with pytest.raises(BackendError, match=r"can't start \(CUDA initialization failure with error: 35\)"):
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))


@pytest.fixture
def plan(fake_10: Any) -> bytes:
    return build_plan(load(), tiny_onnx(), BuildOptions("fp32")).plan


@pytest.mark.parametrize("major", MAJORS)
def test_a_plan_of_another_version_is_refused(plan: bytes, major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(make(major), monkeypatch)
    if major == 10:
        open_engine(load(), plan).close()
        return
    with pytest.raises(BackendError, match=r"refuses the plan \(.*Version tag does not match.*dapo-edge compile PKG"):
        open_engine(load(), plan)


def test_a_plan_of_another_gpu_or_no_plan_is_refused(fake_10: Any, plan: bytes) -> None:
    fake_10.control.gpu = "another GPU"
    with pytest.raises(BackendError, match="incompatible device, please rebuild"):
        open_engine(load(), plan)
    with pytest.raises(BackendError, match="Magic tag does not match"):
        open_engine(load(), b"no plan")


def test_a_context_that_does_not_fit(fake_10: Any, plan: bytes) -> None:
    fake_10.control.context_fails = True
    with pytest.raises(BackendError, match="can't make the plan ready to run: the GPU has too little memory"):
        open_engine(load(), plan)


def test_a_run_that_fails_is_an_error(fake_10: Any, plan: bytes) -> None:
    trt, memory = load(), np.zeros((2, 3, 4), np.float32)
    with open_engine(trt, plan) as engine:
        with pytest.raises(BackendError, match="refuses memory for the tensor 'nope'"):
            engine.set_address("nope", memory.ctypes.data)
        engine.set_address("image", memory.ctypes.data)
        with pytest.raises(BackendError, match=r"failed to run the plan.*no address for \['out'\]"):
            engine.enqueue(1)
        engine.set_address("out", memory.ctypes.data)
        fake_10.control.enqueue_fails = True
        with pytest.raises(BackendError, match="failed to run the plan"):
            engine.enqueue(1)
    with pytest.raises(BackendError, match="closed"):
        engine.enqueue(1)
    engine.close()


def test_an_error_does_not_quote_an_earlier_one(fake_10: Any, plan: bytes) -> None:
    fake_10.control.build_fails, fake_10.control.build_log = True, OUT_OF_MEMORY[0][0]
    with pytest.raises(BackendError, match="too little memory"):
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    with pytest.raises(BackendError, match=r"refuses the plan \(Error Code 1") as caught:
        open_engine(load(), b"no plan")
    assert "emory" not in str(caught.value)
    fake_10.control.build_log = []
    with pytest.raises(BackendError, match="it gave no reason"):
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
