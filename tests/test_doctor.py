"""What `doctor` says about machines and packages, as a user meets it and on machines that are not here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from driver_fakes import H200, NO_DRIVER, ORIN, FakeLibcuda, use
from made_targets import compile_target, edit
from rich.console import Console

from dapo_edge.doctor import Check, Diagnosis, diagnose
from dapo_edge.errors import DependencyMissing
from dapo_edge.fingerprint import Fingerprint, fingerprint_here
from dapo_edge.package import REFERENCE, EnginePackage, Manifest
from dapo_edge.tables import doctor_table

NOT_NEEDED = Check("TensorRT", True, "not needed without a GPU")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU and without a device key."""
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "device.key"))
    use(monkeypatch, NO_DRIVER)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Fingerprint:
    """An H200 with everything that it needs."""
    use(monkeypatch, FakeLibcuda(H200))
    tensorrt = ModuleType("tensorrt")
    tensorrt.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setattr("dapo_edge.doctor.find_spec", lambda name: name)
    compiler = SimpleNamespace(name="nvcc 12.4", path="/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr("dapo_edge.kernels.compile.find_compiler", lambda sm, driver_cuda: compiler)
    found = fingerprint_here()
    assert found is not None
    return found


def check_of(diagnosis: Diagnosis, what: str) -> Check:
    found = [check for check in diagnosis.checks if check.what.startswith(what)]
    assert len(found) == 1, diagnosis.checks
    return found[0]


def table_of(diagnosis: Diagnosis) -> str:
    page = io.StringIO()
    Console(file=page, width=400).print(doctor_table(diagnosis))
    return page.getvalue()


def test_the_command(package: EnginePackage) -> None:
    command = [sys.executable, "-m", "dapo_edge", "doctor", str(package.path)]
    document = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=120).stdout
    doctor = json.loads(document)
    assert doctor["schema"] == "dapo-edge doctor 1"
    assert doctor["ready"] is True
    assert doctor["targets"] == []
    on_the_cpu = [check for check in doctor["checks"] if check["what"].startswith(("OpenVINO", "OpenCV", "package"))]
    assert [check["ok"] for check in on_the_cpu] == [True, True, True]
    table = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "loads and runs: openvino fp32" in table


def test_a_machine_without_a_gpu(package: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing any of these would raise
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "dapo_edge.kernels.compile", None)
    diagnosis = diagnose(package.path)
    assert all(check.fine for check in diagnosis.checks)
    assert check_of(diagnosis, "CUDA driver").finding == "no GPU; the CPU is used"
    assert check_of(diagnosis, "TensorRT") == NOT_NEEDED
    assert diagnosis.problem is None


def test_a_driver_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeLibcuda(H200, cuInit=803))
    diagnosis = diagnose()
    driver = check_of(diagnosis, "CUDA driver")
    assert not driver.fine
    assert "it refuses, so the CPU is used: system has unsupported display driver" in driver.finding
    assert "restart the machine" in driver.finding
    assert check_of(diagnosis, "TensorRT") == NOT_NEEDED
    assert diagnosis.problem is None, "the CPU can inspect"


def test_a_gpu_with_all_that_it_needs(gpu: Fingerprint, package: EnginePackage) -> None:
    diagnosis = diagnose(package.path)
    assert check_of(diagnosis, "CUDA driver").finding == "CUDA 12.6, 1 GPU(s): NVIDIA H200 (sm 9.0, 140 GiB)"
    assert check_of(diagnosis, "TensorRT") == Check("TensorRT", True, "10.3.0")
    assert check_of(diagnosis, "CUDA kernels compiler").finding == "nvcc 12.4, /usr/local/cuda/bin/nvcc"
    assert check_of(diagnosis, "targets").finding == f"none for this GPU yet: dapo-edge compile {package.path}"
    assert all(check.fine for check in diagnosis.checks)
    [found] = diagnosis.as_json()["device"]["gpus"]
    assert (found["name"], found["sm"]) == ("NVIDIA H200", "9.0")
    assert "NVIDIA H200" in table_of(diagnosis).splitlines()[0]


def test_the_device_key(gpu: Fingerprint, package_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "device.key"
    made_later = f"{key}, made by the first dapo-edge compile"
    assert check_of(diagnose(), "device key") == Check("device key", True, made_later)
    assert not key.exists()
    compile_target(EnginePackage.open(package_copy), fingerprint=gpu)
    assert check_of(diagnose(), "device key") == Check("device key", True, str(key))
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", "/dev/null")
    diagnosis = diagnose(package_copy)
    assert not check_of(diagnosis, "device key").fine
    assert "the device key '/dev/null' is not a file. Name a file in" in check_of(diagnosis, "device key").finding
    assert [target.verdict for target in diagnosis.targets] == ["refuse"]
    assert diagnosis.problem is None, "the CPU can inspect"
    use(monkeypatch, NO_DRIVER)
    assert not [check for check in diagnose().checks if check.what == "device key"], "nothing to seal here"


def test_a_package_that_cannot_be_compiled(
    gpu: Fingerprint, package: EnginePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: entry for name, entry in package.manifest.files.items() if name != REFERENCE}
    old = EnginePackage(package.path, Manifest(**{**package.manifest.model_dump(), "files": files}))
    monkeypatch.setattr(EnginePackage, "open", lambda path: old)
    finding = check_of(diagnose(package.path), "targets").finding
    assert finding.startswith("none for this GPU yet: Build the package again with this dapo-edge")
    assert "dapo-edge compile" not in finding


def test_a_gpu_without_what_it_needs(gpu: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*what: object) -> None:
        assert what == ("sm_90", (12, 6))
        raise DependencyMissing("there is no CUDA compiler here", "Install nvcc")

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("dapo_edge.doctor.find_spec", lambda name: None)
    monkeypatch.setattr("dapo_edge.kernels.compile.find_compiler", none)
    diagnosis = diagnose()
    for what, text in {
        "TensorRT": "pip install tensorrt, or apt install python3-libnvinfer",
        "pycuda": "pip install 'dapo-edge[gpu]'",
        "CUDA kernels compiler": "there is no CUDA compiler here. Install nvcc.",
    }.items():
        assert not check_of(diagnosis, what).fine
        assert text in check_of(diagnosis, what).finding
    assert diagnosis.problem is None, "the CPU can inspect"


def test_a_jetson_takes_tensorrt_from_its_jetpack(gpu: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeLibcuda(ORIN))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("dapo_edge.device._first_line", lambda path: "# R36 (release), REVISION: 4.3, GCID: 1")
    diagnosis = diagnose()
    assert check_of(diagnosis, "TensorRT").finding.startswith("not installed: apt install python3-libnvinfer")
    assert table_of(diagnosis).splitlines()[1].startswith("Jetson Linux 36.4.3, Python 3.")


def test_targets_of_a_package(gpu: Fingerprint, package_copy: Path) -> None:
    package = EnginePackage.open(package_copy)
    compile_target(package, fingerprint=gpu)
    old = Fingerprint(**{**gpu.model_dump(), "tensorrt": "8.6.1"})
    compile_target(package, fingerprint=old)
    edit(compile_target(package, fingerprint=gpu, precision="fp32"), seconds=1)
    diagnosis = diagnose(package_copy)
    assert [(target["id"], target["verdict"]) for target in diagnosis.as_json()["targets"]] == [
        ("nvidia-h200-sm90-trt10.3.0-fp16", "load"),
        ("nvidia-h200-sm90-trt10.3.0-fp32", "refuse"),
        ("nvidia-h200-sm90-trt8.6.1-fp16", "compile again"),
    ]
    assert "can't run with 10" in diagnosis.as_json()["targets"][2]["reason"]
    assert json.loads(json.dumps(diagnosis.as_json()))["ready"] is True
    lines = [line for line in table_of(diagnosis).splitlines() if line.split()[1] == "target"]
    assert [line.split()[0] for line in lines] == ["ok", "no", "no"]
    assert "load: fp16, batch 1, TensorRT 10.3.0" in lines[0]
    assert "refuse: compiled on another device (or edited)" in lines[1]
    assert "compile again: compiled by TensorRT 8.6.1" in lines[2]


def test_a_gpu_that_can_load_none_of_the_targets(gpu: Fingerprint, package_copy: Path) -> None:
    compile_target(EnginePackage.open(package_copy), fingerprint=gpu, encoder_sha256="1" * 64)
    diagnosis = diagnose(package_copy)
    summary = check_of(diagnosis, "targets")
    assert not summary.fine
    assert summary.finding.endswith(f"dapo-edge compile {package_copy}")
    assert diagnosis.problem is None


def test_targets_on_a_machine_without_a_gpu(package_copy: Path) -> None:
    fingerprint = Fingerprint(
        gpu="Orin", sm="8.7", multiprocessors=16, tensorrt="10.3.0", driver_cuda="12.6", system="Linux aarch64"
    )
    compile_target(EnginePackage.open(package_copy), fingerprint=fingerprint)
    diagnosis = diagnose(package_copy)
    assert diagnosis.as_json()["targets"] == [
        {"id": "orin-sm87-trt10.3.0-fp16", "verdict": "refuse", "reason": "no CUDA driver on this machine"}
    ]
    assert check_of(diagnosis, "package").fine
    assert diagnosis.problem is None


def test_targets_are_judged_where_the_cpu_engine_is_missing(
    gpu: Fingerprint, package_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_target(EnginePackage.open(package_copy), fingerprint=gpu)
    monkeypatch.setitem(sys.modules, "openvino", None)
    diagnosis = diagnose(package_copy)
    assert [target.verdict for target in diagnosis.targets] == ["load"]
    assert isinstance(diagnosis.problem, DependencyMissing)


def test_targets_that_cannot_be_listed(package_copy: Path) -> None:
    (package_copy / "targets").touch()
    diagnosis = diagnose(package_copy)
    assert "can't be read" in check_of(diagnosis, "targets").finding
    assert diagnosis.problem is None


def test_a_package_that_is_none(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path / "[bold]none.dapo")
    assert diagnosis.problem is not None
    assert diagnosis.problem.exit_code == 3
    assert not check_of(diagnosis, "package").fine
    assert "[bold]none.dapo" in table_of(diagnosis)
    assert diagnosis.as_json()["ready"] is False
