"""`dapo-edge compile` on a machine whose GPU, driver and TensorRT are made of Python objects."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from fake_cuda import FakeGpu
from made_packages import with_int8

from dapo_edge import targets
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.backends.recorded import RecordedBackend
from dapo_edge.backends.tensorrt import TensorRtBackend
from dapo_edge.backends.tensorrt_compile import compile_package
from dapo_edge.cli import commands
from dapo_edge.doctor import diagnose
from dapo_edge.errors import (
    BackendError,
    DapoEdgeError,
    DependencyMissing,
    GateError,
    PackageDamaged,
    PackageIncompatible,
    RecipeError,
)
from dapo_edge.kernels.compile import Cubin
from dapo_edge.package import REFERENCE, EnginePackage


@pytest.fixture(params=[8, 10, 11])
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def machine(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake TensorRT 10; kernels are compiled in name only."""
    fake_cuda.compile_in_name(monkeypatch)
    return fake_cuda.install(monkeypatch, gpu)


@pytest.fixture
def opened(package_copy: Path) -> EnginePackage:
    return EnginePackage.open(package_copy)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_tensorrt_makes_a_target_that_loads(
    opened: EnginePackage,
    gpu: FakeGpu,
    machine: Any,
    major: int,
    precision: str,
    picture: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cuda.install(monkeypatch, gpu, major)
    steps: list[str] = []
    compiled = compile_package(opened, precision=precision, on_progress=lambda step, done, of: steps.append(step))
    target = compiled.target
    assert compiled.folder.name == f"nvidia-h200-sm90-trt{target.fingerprint.tensorrt}-{precision}"
    assert target.gate["token_cosine_min"] > 0.9999
    assert target.gate["runs_as"] == precision
    assert (target.attention.of, target.precision, target.batch) == (5, precision, 1)
    assert {path.name for path in compiled.folder.iterdir()} == {
        "encoder.plan", "kernels.cubin", "timing.cache", "target.json",
    }  # fmt: skip
    told = list(dict.fromkeys(step.partition(":")[0] for step in steps))
    assert told[:3] == ["compiling the kernels", "preparing the encoder", "building the plan"]
    assert told[3:] == ["accuracy gate", "checking the kernels", "writing the target"]
    assert (gpu.live, gpu.objects) == ({}, {})
    EnginePackage.open(opened.path)  # the package itself is what it was
    with (
        TensorRtBackend.open(opened, map_size="model") as backend,
        OpenVinoBackend.open(opened, map_size="model") as cpu,
    ):
        assert np.abs(backend.infer([picture]).anomaly - cpu.infer([picture]).anomaly).max() < 0.01


@pytest.fixture(scope="module")
def quantised(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    return with_int8(package, tmp_path_factory.mktemp("int8"), kept=("block1.qkv", "block5.fc2"))


@pytest.fixture
def opened_int8(quantised: EnginePackage, tmp_path: Path) -> EnginePackage:
    return EnginePackage.open(shutil.copytree(quantised.path, tmp_path / "int8.dapo"))


def test_int8_on_every_tensorrt(
    opened_int8: EnginePackage, gpu: FakeGpu, machine: Any, major: int, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = fake_cuda.install(monkeypatch, gpu, major)
    compiled = compile_package(opened_int8)  # the package's own precision
    target = compiled.target
    assert compiled.folder.name == f"nvidia-h200-sm90-trt{target.fingerprint.tensorrt}-int8"
    assert (target.precision, target.layers["int8_linears"], target.islands) == ("int8", 18, ())
    assert target.encoder_sha256 == opened_int8.manifest.files["encoder.int8.onnx"].sha256
    assert 0.99 < target.gate["token_cosine_min"] < 0.99999
    [network] = api.control.networks
    model = network._model
    halves = sum(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    assert (model.opset_import[0].version, halves > 0) == ((17, False) if major == 8 else (19, True))
    allowed = {flag for flag in ("FP16", "INT8") if flag in api.control.configs[0]._flags}
    assert allowed == ({"FP16", "INT8"} if major == 8 else set())
    with (
        TensorRtBackend.open(opened_int8, map_size="model") as backend,
        OpenVinoBackend.open(opened_int8, map_size="model", precision="int8") as cpu,
        OpenVinoBackend.open(opened_int8, map_size="model", precision="fp32") as exact,
    ):
        assert backend.precision == "int8"
        found, expected = backend.infer([picture]).anomaly, cpu.infer([picture]).anomaly
        assert np.abs(found - expected).mean() < 0.01
        assert np.abs(found - exact.infer([picture]).anomaly).max() > 1e-4, "it is no float plan by another name"


def test_int8_pins_large_values_where_types_are_hints(
    opened_int8: EnginePackage, gpu: FakeGpu, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = fake_cuda.install(monkeypatch, gpu, 8)
    reference = opened_int8.reference()
    assert reference is not None
    large = "/encoder/mlp/c_fc_2/Add_output_0"
    ranges = {**reference.ranges, large: 1e5}
    monkeypatch.setattr(EnginePackage, "reference", lambda self: replace(reference, ranges=ranges))
    target = compile_package(opened_int8).target
    assert "/encoder/mlp/c_fc_2/Add" in target.islands
    single = api.DataType.FLOAT
    pinned = {layer.name for layer in api.control.networks[0]._layers if layer.precision == single}
    assert pinned == set(target.islands)
    assert "OBEY_PRECISION_CONSTRAINTS" in api.control.configs[0]._flags


def test_int8_of_a_package_without(opened: EnginePackage, machine: Any, package_copy: Path) -> None:
    steps: list[str] = []
    with pytest.raises(RecipeError, match=r"holds no INT8 encoder.*precision: int8, or auto"):
        compile_package(opened, precision="int8", on_progress=lambda step, done, of: steps.append(step))
    assert steps == []
    assert not (opened.path / "targets").exists()
    result = CliRunner().invoke(commands, ["compile", str(package_copy), "--precision", "int8"])
    assert isinstance(result.exception, RecipeError)


def test_a_damaged_quantization_shows_before_minutes_are_spent(opened_int8: EnginePackage, machine: Any) -> None:
    (opened_int8.path / "quantization.safetensors").write_bytes(b"no safetensors")
    steps: list[str] = []
    with pytest.raises(PackageDamaged, match=r"quantization\.safetensors' was replaced"):
        compile_package(opened_int8, on_progress=lambda step, done, of: steps.append(step))
    assert steps == []


def test_the_next_build_starts_with_what_was_timed(
    opened: EnginePackage, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[bytes] = []
    create = machine.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(
        machine.IBuilderConfig,
        "create_timing_cache",
        lambda self, content: given.append(content) or create(self, content),
    )
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path))
    first, second = (compile_package(opened) for _ in range(2))
    assert given[0] == b"" != given[1]
    assert given[1] == targets.read_file(first.folder, first.target, targets.TIMING)
    assert first.folder == second.folder
    assert len(list(first.folder.parent.iterdir())) == 1


def test_a_wrong_plan_never_becomes_a_target(
    opened: EnginePackage, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_package(opened)
    before = {path: path.read_bytes() for path in opened.path.rglob("*") if path.is_file()}
    import dapo_edge.backends.onnx_flavours as flavours

    honest = flavours.fp32_flavour

    def damaged(model: bytes) -> Any:
        content = onnx.load_from_string(honest(model).model)
        for tensor in content.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), tensor.name))
        return replace(honest(model), model=content.SerializeToString())

    monkeypatch.setattr(flavours, "fp32_flavour", damaged)
    with pytest.raises(GateError, match=r"the plan in fp32 failed the accuracy gate.*No target was written"):
        compile_package(opened)
    assert {path: path.read_bytes() for path in opened.path.rglob("*") if path.is_file()} == before


def test_kernels_that_misread_a_camera_never_become_a_target(
    opened: EnginePackage, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's own views are BGR and of the encoder's size: they would not show it."""
    from dapo_edge.kernels import launch

    monkeypatch.setattr(launch, "FORMATS", ("BGR8", "RGB8", "BayerRG8", "GRAY8", "NV12"))
    with pytest.raises(GateError, match=r"the preprocess kernel is off by .* for GRAY8 1280 x 720 px"):
        compile_package(opened)
    assert not (opened.path / "targets").exists()


def test_a_bad_key_shows_before_minutes_are_spent(
    opened: EnginePackage, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "short").write_bytes(b"31 bytes")
    (tmp_path / "short").chmod(0o600)
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "short"))
    steps: list[str] = []
    with pytest.raises(DapoEdgeError, match="key"):
        compile_package(opened, on_progress=lambda step, done, of: steps.append(step))
    assert steps == []


def test_interrupted_builds_leave_nothing(opened: EnginePackage, machine: Any, gpu: FakeGpu) -> None:
    def stop(step: str, done: int, of: int) -> None:
        if step.startswith("building the plan:") or step == "accuracy gate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_package(opened, on_progress=stop)
    assert not (opened.path / "targets").exists()
    assert (gpu.live, gpu.objects) == ({}, {})


def test_out_of_memory_says_what_to_lower(opened: EnginePackage, machine: Any) -> None:
    machine.control.build_fails = True
    machine.control.build_log = [("ERROR", "1: [defaultAllocator.cpp::allocate::20] Cuda Runtime (out of memory)")]
    with pytest.raises(BackendError, match=r"too little memory.*1 MiB.*Lower the workspace"):
        compile_package(opened, workspace_bytes=1 << 20)
    assert not (opened.path / "targets").exists()


def test_unfused_attention_is_told(opened: EnginePackage, machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        target = compile_package(opened).target
    if target.attention.known and target.attention.fused < target.attention.of:
        assert "attention fused: 0/5; a block that is not runs several times slower: --precision fp16" in caplog.text
    else:
        assert "does not tell" in caplog.text


@pytest.mark.parametrize("missing", ["gpu", "tensorrt", "pycuda", "compiler"])
def test_what_is_missing_is_named_before_anything_is_written(
    missing: str, opened: EnginePackage, machine: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: tuple[type[Exception], str] = {
        "gpu": (BackendError, "no CUDA driver on this machine"),
        "tensorrt": (DependencyMissing, "'tensorrt' can't be imported"),
        "pycuda": (DependencyMissing, "'pycuda' can't be imported"),
        "compiler": (DependencyMissing, "no CUDA compiler"),
    }[missing]
    if missing == "gpu":
        gpu.gpus = ()
    elif missing == "compiler":

        def none_here(*_: Any, **__: Any) -> Cubin:
            raise DependencyMissing("there is no CUDA compiler here", "Install one")

        monkeypatch.setattr("dapo_edge.backends.tensorrt_compile.compile_kernels", none_here)
    else:
        monkeypatch.setitem(sys.modules, {"tensorrt": "tensorrt", "pycuda": "pycuda.driver"}[missing], None)
    with pytest.raises(expected[0], match=expected[1]):
        compile_package(opened)
    assert not (opened.path / "targets").exists()


def test_packages_without_a_reference_are_sent_back(opened: EnginePackage, machine: Any) -> None:
    files = {name: entry for name, entry in opened.manifest.files.items() if name != REFERENCE}
    old = EnginePackage(opened.path, opened.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageIncompatible, match=r"before packages carried a reference.*Build it again"):
        compile_package(old)
    with pytest.raises(PackageIncompatible, match="carries no reference"):
        RecordedBackend.open(old, map_size="model")


def test_limits_of_the_kernels_show_at_once(opened: EnginePackage, machine: Any) -> None:
    huge = opened.manifest.model_copy(update={"batch": 33})
    with pytest.raises(RecipeError, match="1 to 32 views per batch, not 33"):
        compile_package(EnginePackage(opened.path, huge))
    with pytest.raises(RecipeError, match="unknown precision 'int4'"):
        compile_package(opened, precision="int4")


def test_the_recorded_reference_is_eager(opened: EnginePackage) -> None:
    from dapo_edge.models.eager import EagerBackend

    reference = opened.reference()
    assert reference is not None
    views = list(reference.views)
    with (
        RecordedBackend.open(opened, map_size="model") as recorded,
        EagerBackend.open(opened, map_size="model") as eager,
    ):
        np.testing.assert_allclose(recorded.infer(views).anomaly, eager.infer(views).anomaly, atol=2e-3)
        np.testing.assert_allclose(recorded.encode(views)[1], eager.encode(views)[1], atol=1e-4)
        with pytest.raises(KeyError):
            recorded.encode([255 - views[0]])


def test_from_the_command_line(package_copy: Path, machine: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    result = runner.invoke(commands, ["compile", str(package_copy), "--precision", "fp16", "--workspace-mb", "256"])
    assert result.exit_code == 0, result.output
    assert "against eager torch: map difference" in result.output
    assert "-fp16" in result.output
    document = json.loads(runner.invoke(commands, ["compile", str(package_copy), "--json"]).stdout)
    assert document["schema"] == "dapo-edge compile 1"
    assert document["options"] == {"workspace_bytes": None, "optimization_level": 3}
    line = runner.invoke(
        commands, ["run", str(package_copy), "synthetic://96x96?frames=2", "--backend", "tensorrt", "--json"]
    )
    assert line.exit_code == 0, line.output
    assert json.loads(line.stdout.splitlines()[-1])["summary"]["device"] == "NVIDIA H200, TensorRT 10.3.0"
    diagnosis = diagnose(package_copy)
    assert [target.verdict for target in diagnosis.targets] == ["load", "load"]
    assert "loads and runs: tensorrt fp32" in diagnosis.checks[-1].finding

    def without_openvino(module: str) -> Any:
        if module == "openvino":
            raise DependencyMissing("no openvino", "Install it")
        return importlib.import_module(module)

    monkeypatch.setattr("dapo_edge.doctor.require", without_openvino)
    assert diagnose(package_copy).problem is None, "the GPU inspects"
    assert isinstance(diagnose().problem, DependencyMissing)


def test_without_a_gpu_the_command_says_so(package_copy: Path) -> None:
    if targets.fingerprint_here() is not None:
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "dapo_edge", "compile", str(package_copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is no CUDA driver on this machine, or no GPU. A CPU runs")
    assert not (package_copy / "targets").exists()


def test_a_rebuilt_package_says_compile_again(opened: EnginePackage, machine: Any) -> None:
    compiled = compile_package(opened)
    entry = opened.manifest.files["encoder.onnx"].model_copy(update={"sha256": "0" * 64})
    manifest = opened.manifest.model_copy(update={"files": {**opened.manifest.files, "encoder.onnx": entry}})
    judged = targets.judge(compiled.folder, EnginePackage(opened.path, manifest), targets.fingerprint_here())
    assert (judged.verdict, judged.reason) == ("compile again", "made from another build of this package")
    shutil.rmtree(compiled.folder)
