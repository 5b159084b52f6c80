"""The TensorRT layer against a fake TensorRT on the CPU: building, running, refusing."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import install, make
from numpy.typing import NDArray
from tiny_onnx import tiny_onnx

from dapo_edge.backends import trt_api, trt_progress
from dapo_edge.backends.trt_api import BuildOptions, TensorRT, build_plan, load, open_engine
from dapo_edge.backends.trt_report import Attention, Layer, attention_fused
from dapo_edge.errors import BackendError, DependencyMissing, RecipeError


def expected(image: NDArray[Any]) -> NDArray[np.float64]:
    wide = image.astype(np.float64)
    scores = np.exp(0.5 * wide @ wide.transpose(0, 2, 1))
    return scores / scores.sum(-1, keepdims=True) @ wide


@pytest.fixture(params=(8, 10, 11))
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(make(request.param), monkeypatch)


@pytest.fixture
def fake_10(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(make(10), monkeypatch)


# ---- load ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_tensorrt_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_edge.device.cuda_device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it would say DependencyMissing
    monkeypatch.setattr("dapo_edge.device.driver_problem", lambda: None)
    with pytest.raises(BackendError, match=r"no CUDA driver here.*--backend openvino"):
        load()
    monkeypatch.setattr("dapo_edge.device.driver_problem", lambda: "system has unsupported display driver")
    with pytest.raises(BackendError, match="offers no GPU, system has unsupported display driver"):
        load()


def test_without_tensorrt_it_says_where_that_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_edge.device.cuda_device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyMissing, match=r"python3-libnvinfer.*--system-site-packages.*pip install tensorrt"):
        load()


def test_load_decides_on_the_version_once(fake: Any) -> None:
    trt = load()
    assert trt.version == fake.__version__
    assert trt.major == int(fake.__version__.split(".")[0])
    assert load() is trt, "TensorRT keeps the first logger that it sees"


def test_versions_out_of_range(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    old, new = make(8), make(11)
    old.__version__, new.__version__ = "8.5.3.1", "12.0.1"
    install(old, monkeypatch)
    with pytest.raises(BackendError, match=r"8\.5\.3\.1 is too old.*Install TensorRT 8\.6"):
        load()
    install(new, monkeypatch)
    assert load().major == 12
    assert "12.0.1 is newer than every version this was tested with" in caplog.text


# ---- build and run ------------------------------------------------------------------------------------------------


def run(trt: TensorRT, plan: bytes, image: NDArray[Any], stream: int = 7) -> NDArray[Any]:
    out = np.zeros_like(image)
    with open_engine(trt, plan) as engine:
        engine.set_address("image", image.ctypes.data)
        engine.set_address("out", out.ctypes.data)
        engine.enqueue(stream)
    return out


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_build_and_run(fake: Any, precision: str, dtype: type) -> None:
    trt = load()
    built = build_plan(trt, tiny_onnx(dtype), BuildOptions(precision, workspace_bytes=2**28))
    image = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(dtype)
    out = run(trt, built.plan, image)
    np.testing.assert_allclose(out, expected(image), atol=1e-5 if dtype is np.float32 else 2e-3)
    with open_engine(trt, built.plan) as engine:
        name = np.dtype(dtype).name
        assert engine.tensors == {
            "image": trt_api.Tensor("image", (2, 3, 4), name, True),
            "out": trt_api.Tensor("out", (2, 3, 4), name, False),
        }
        assert engine.device_memory_bytes == 2 * 2 * 3 * 4 * 4
    assert built.seconds > 0
    assert built.peak_device_bytes == 64 * 2**20
    assert built.timing_cache.endswith(b"timings")


def test_options_reach_the_config(fake: Any) -> None:
    trt = load()
    for precision in ("fp32", "fp16", "int8"):
        dtype = np.float16 if precision == "fp16" else np.float32
        model = tiny_onnx(dtype, quantized=precision == "int8")
        build_plan(trt, model, BuildOptions(precision, workspace_bytes=123456, optimization_level=5))
    configs, flags = fake.control.configs, fake.BuilderFlag
    assert [config.get_memory_pool_limit(fake.MemoryPoolType.WORKSPACE) for config in configs] == [123456] * 3
    assert {config.builder_optimization_level for config in configs} == {5}
    assert [config.get_flag(flags.TF32) for config in configs] == [False, True, True]
    kinds = fake.NetworkDefinitionCreationFlag
    if trt.major < 10:
        assert [config.get_flag(flags.FP16) for config in configs] == [False, True, True]
        assert [config.get_flag(flags.INT8) for config in configs] == [False, False, True]
        jit, edge = fake.TacticSource.JIT_CONVOLUTIONS, fake.TacticSource.EDGE_MASK_CONVOLUTIONS
        assert {config.get_tactic_sources() for config in configs} == {1 << jit | 1 << edge}
        assert set(fake.control.network_flags) == {1 << kinds.EXPLICIT_BATCH}
    else:
        assert set(fake.control.network_flags) == ({1 << kinds.STRONGLY_TYPED} if trt.major == 10 else {0})


@pytest.mark.parametrize(
    ("options", "pinned"),
    [
        (BuildOptions("fp32"), {"Mul", "Transpose", "MatMul", "Softmax", "MatMul_1"}),
        (BuildOptions("fp16"), set()),
        (BuildOptions("fp16", fp32_nodes=("/attn/Softmax",)), {"Softmax"}),
        # TensorRT calls the second layer of a node "node_1", so a namesake can't be told from it.
        (BuildOptions("int8", fp32_nodes=("/attn/MatMul",)), {"MatMul", "MatMul_1"}),
    ],
)
def test_a_weakly_typed_network_is_told_what_stays_fp32(
    options: BuildOptions, pinned: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(make(8), monkeypatch)
    model = tiny_onnx(quantized=options.precision == "int8", half_out=True)
    build_plan(load(), model, options)
    (config,), (network,) = fake.control.configs, fake.control.networks
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    assert {layer.name.removeprefix("/attn/") for layer in layers if layer.precision is not None} == pinned
    for layer in layers:
        assert (layer.precision, layer._typed) in [(None, {}), (fake.DataType.FLOAT, {0: fake.DataType.FLOAT})]
    flags = fake.BuilderFlag
    assert config.get_flag(flags.OBEY_PRECISION_CONSTRAINTS) == bool(pinned)
    assert config.get_flag(flags.FP16), "without it TensorRT 8 makes no float16 output"


def test_a_typed_network_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for major in (10, 11):
        fake = install(make(major), monkeypatch)
        build_plan(load(), tiny_onnx(half_out=True), BuildOptions("fp32", fp32_nodes=("/attn/Softmax",)))
        assert not hasattr(fake, "ILayer"), "touching a layer would have failed"
        assert fake.control.configs[0]._flags == set()


def test_without_a_workspace_the_limit_stays_tensorrts(fake_10: Any) -> None:
    build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    assert fake_10.control.configs[0].get_memory_pool_limit(fake_10.MemoryPoolType.WORKSPACE) == 2**40


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "int4"}, "unknown precision 'int4'. Use one of: fp32, fp16, int8"),
        ({"precision": "fp16", "workspace_bytes": 0}, "a workspace of 0 bytes"),
        ({"precision": "fp16", "optimization_level": 6}, "unknown optimization level 6"),
    ],
)
def test_bad_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        BuildOptions(**fields)


def test_the_timing_cache_comes_back_and_a_foreign_one_is_not_used(fake: Any, caplog: pytest.LogCaptureFixture) -> None:
    trt, options = load(), BuildOptions("fp32")
    first = build_plan(trt, tiny_onnx(), options)
    again = build_plan(trt, tiny_onnx(), options, timing_cache=first.timing_cache)
    assert again.plan == first.plan
    assert "timing cache" not in caplog.text
    build_plan(trt, tiny_onnx(), options, timing_cache=b"of another GPU")
    assert "the timing cache is of another device" in caplog.text


def test_progress(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_progress, "POLL_S", 0.01)
    fake.control.steps, fake.control.step_s = 12, 0.1
    seen: list[tuple[str, int, int]] = []
    threads = set()
    build_plan(
        load(),
        tiny_onnx(),
        BuildOptions("fp32"),
        on_progress=lambda *news: (seen.append(news), threads.add(threading.current_thread())),  # type: ignore[func-returns-value]
    )
    assert threads == {threading.current_thread()}
    if load().major < 10:
        assert [done for _, done, _ in seen] == [0, 1], "once per second"
        assert seen[-1][0].startswith("Autotuning step")
        assert seen[-1][2] == 0
    else:
        steps = [done for phase, done, total in seen if (phase, total) == ("Timing graph nodes", 12)]
        assert steps == sorted(set(steps))
        assert len(steps) >= 8


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.fixture
def listens() -> Iterator[None]:
    """A run that was started in the background of a script ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens")
def test_ctrl_c_cancels_at_the_next_step(fake_10: Any) -> None:
    fake_10.control.steps, fake_10.control.step_s = 200, 0.05
    trt, started = load(), time.monotonic()
    timer = interrupt_after(0.4)
    with pytest.raises(KeyboardInterrupt):
        build_plan(trt, tiny_onnx(), BuildOptions("fp32"))
    timer.join()
    assert time.monotonic() - started < 3, "all the steps take 10 s"
    (config,) = fake_10.control.configs
    assert not config.progress_monitor.step_complete("Timing graph nodes", 1), "TensorRT was told to stop"
    fake_10.control.steps = 1
    assert build_plan(trt, tiny_onnx(), BuildOptions("fp32")).plan, "the next build is not cancelled"


@pytest.mark.usefixtures("listens")
def test_ctrl_c_where_builds_cannot_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = install(make(8), monkeypatch)
    fake.control.steps, fake.control.step_s = 20, 0.05  # a second in all
    trt, started = load(), time.monotonic()
    timer = interrupt_after(0.3)
    with pytest.raises(KeyboardInterrupt):
        build_plan(trt, tiny_onnx(), BuildOptions("fp32"))
    timer.join()
    assert 0.9 < time.monotonic() - started < 5, "the build was left to end"
    assert "can't cancel a build" in caplog.text
    started, timers = time.monotonic(), [interrupt_after(0.2), interrupt_after(0.5)]
    fake.control.steps = 40
    with pytest.raises(KeyboardInterrupt):
        build_plan(trt, tiny_onnx(), BuildOptions("fp32"))
    assert time.monotonic() - started < 1.5, "the second Ctrl-C does not wait"
    for thread in (*timers, *(item for item in threading.enumerate() if item.name == "tensorrt-build")):
        thread.join()


def test_an_error_of_the_progress_bar_stops_the_build(fake_10: Any) -> None:
    fake_10.control.steps, fake_10.control.step_s = 200, 0.05

    def broken(*news: object) -> None:
        raise BrokenPipeError("the terminal is gone")

    started = time.monotonic()
    with pytest.raises(BrokenPipeError):
        build_plan(load(), tiny_onnx(), BuildOptions("fp32"), on_progress=broken)
    assert time.monotonic() - started < 3


def test_a_hook_takes_the_work_of_a_stream(fake_10: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(load(), tiny_onnx(), BuildOptions("fp32")).plan
    taken: list[tuple[int, Any]] = []
    monkeypatch.setattr(fake_tensorrt, "on_enqueue", lambda stream, work: taken.append((stream, work)))
    image, out, other = (np.full((2, 3, 4), value, np.float32) for value in (1, 0, 0))
    with open_engine(load(), plan) as engine:
        engine.set_address("image", image.ctypes.data)
        engine.set_address("out", out.ctypes.data)
        engine.enqueue(42)
        engine.set_address("out", other.ctypes.data)  # what was recorded keeps its addresses
    assert not out.any()
    ((stream, work),) = taken
    work()
    assert stream == 42
    np.testing.assert_allclose(out, 1)
    assert not other.any()


# ---- the log and the report ---------------------------------------------------------------------------------------


def test_warnings_pass_on_and_errors_are_kept(fake_10: Any, caplog: pytest.LogCaptureFixture) -> None:
    trt = load()
    severity = fake_10.ILogger.Severity
    with caplog.at_level(logging.DEBUG):
        trt.log.clear()
        for level in severity:
            trt.logger.log(level, f" line of {level.name} ")
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "WARNING"]
    assert trt.log.cause() == "line of INTERNAL_ERROR; line of ERROR"
    assert trt.log.phase == "line of VERBOSE"
    trt.log.clear()
    assert (trt.log.cause(), trt.log.phase, trt.log.memory()) == ("it gave no reason", "", None)


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"Bindings": []}', '{"Layers": [3]}', '{"Layers": null}'])
def test_an_unreadable_report_is_no_error(text: str, fake_10: Any, caplog: pytest.LogCaptureFixture) -> None:
    fake_10.control.inspector_text = text
    built = build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    assert built.layers == ()
    assert "this plan's layers stay unknown" in caplog.text


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_a_plan_tells_what_it_fused(fake: Any, precision: str, dtype: type) -> None:
    built = build_plan(load(), tiny_onnx(dtype), BuildOptions(precision))
    found = attention_fused(built.layers, blocks=1)
    if load().major < 10:
        assert found == Attention(0, 1, False)
    else:
        assert found == Attention(int(precision == "fp16"), 1, True)
        assert Layer("/attn/MatMul_myl0_2", "kgen", "sm80_xmma_matmul", "[ONNX Layer: /attn/MatMul]") in built.layers


def test_a_plan_that_cannot_be_opened_for_its_report_is_not_lost(
    fake_10: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Any, content: bytes) -> None:
        self._logger.log(fake_10.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory")

    monkeypatch.setattr(fake_10.Runtime, "deserialize_cuda_engine", refuse)
    built = build_plan(load(), tiny_onnx(), BuildOptions("fp32"))
    assert built.plan
    assert built.layers == ()
    assert "the new plan's layers stay unknown" in caplog.text
