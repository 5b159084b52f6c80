"""What goes wrong on a GPU, and what is missing: errors at once, nothing leaked, nothing wrong in silence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_cuda import FakeGpu
from made_packages import with_batch

from dapo_edge import Inspector, targets
from dapo_edge.backends.cuda import Cuda
from dapo_edge.backends.tensorrt import TensorRtBackend
from dapo_edge.errors import BackendError, DependencyMissing, PackageDamaged, PackageIncompatible
from dapo_edge.kernels.compile import Cubin
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank

pytest_plugins = ["fake_machine"]


def test_plain_launches_only_where_allowed_and_named(
    compiled: EnginePackage, fake_gpu: FakeGpu, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu.fails["cuStreamBeginCapture_v2"] = 803
    with (
        TensorRtBackend.open(compiled, map_size="model") as backend,
        pytest.raises(BackendError, match=r"can't be captured.*unsupported display driver.*DAPO_EDGE_CUDA_GRAPH=off"),
    ):
        backend.infer([picture])
    monkeypatch.setenv("DAPO_EDGE_CUDA_GRAPH", "off")
    with Inspector(compiled, backend="tensorrt") as inspector:
        assert inspector.inspect(picture).score >= 0
        assert inspector.backend.device.endswith("plain launches")
    assert "graph" not in fake_gpu.log


@pytest.mark.parametrize("lost", ["upload", "preprocess", "engine", "patch_probabilities", "defect_map_4"])
def test_a_graph_that_leaves_something_out_is_refused(
    lost: str,
    compiled: EnginePackage,
    fake_gpu: FakeGpu,
    sharp: PromptBank,
    picture: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would repeat what the plain launch left in memory: right for this frame, and for none that follows."""
    instantiate = FakeGpu._cuGraphInstantiateWithFlags

    def forgetful(self: FakeGpu, executable: Any, graph: Any, flags: Any) -> None:
        work = self.objects[graph.value]
        (place, *_) = [place for place, run in enumerate(work) if run.__closure__ and _name_of(run) == lost]
        del work[place]
        instantiate(self, executable, graph, flags)

    monkeypatch.setattr(FakeGpu, "_cuGraphInstantiateWithFlags", forgetful)
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.set_bank(sharp)
        for _ in range(3):
            with pytest.raises(BackendError, match="gives another map"):
                backend.infer([picture])


def _name_of(run: Any) -> str:
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, str))


def test_a_lost_gpu_is_an_error_at_once_and_closes_cleanly(
    compiled: EnginePackage, fake_gpu: FakeGpu, picture: Any
) -> None:
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.infer([picture])
        fake_gpu.broken = "cuStreamSynchronize failed: an illegal memory access was encountered"
        for _ in range(2):
            with pytest.raises(BackendError, match=r"illegal memory access.*start the process again"):
                backend.infer([picture])
    assert fake_gpu.log[-1] == "detached"


def test_too_little_memory_says_what_for(compiled: EnginePackage, fake_gpu: FakeGpu) -> None:
    fake_gpu.memory_left = 1000
    with pytest.raises(BackendError, match=r"no 0.1 MB left for the encoder's input .0.0 of 1024 MB are free.*smaller"):
        TensorRtBackend.open(compiled, map_size="model")
    assert fake_gpu.live == {}


def test_too_little_memory_for_one_size_leaves_the_others(
    backend: TensorRtBackend, fake_gpu: FakeGpu, picture: Any
) -> None:
    before = backend.infer([picture])
    held = len(fake_gpu.live), len(fake_gpu.objects)
    for share in (20_000, 60_000, 100_000):
        left, fake_gpu.memory_left = fake_gpu.memory_left, share
        with pytest.raises(BackendError, match=r"MB left for (frames|maps|map tables|resampling tables)"):
            backend.infer([np.zeros((200, 160, 3), np.uint8)])
        fake_gpu.memory_left = left
        assert (len(fake_gpu.live), len(fake_gpu.objects)) == held
    np.testing.assert_array_equal(backend.infer([picture]).anomaly, before.anomaly)


def test_an_old_driver_is_named(compiled: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, FakeGpu(version=11020))
    with pytest.raises(BackendError, match=r"of CUDA 11.2, which is too old.*11.4 or newer"):
        TensorRtBackend.open(compiled, map_size="model")


def test_an_engine_that_fails_is_told(backend: TensorRtBackend, tensorrt: Any, picture: Any) -> None:
    tensorrt.control.enqueue_fails = True
    with pytest.raises(BackendError, match=r"TensorRT 10.3.0 failed to run the plan"):
        backend.infer([picture])


@pytest.mark.parametrize("missing", ["pycuda", "tensorrt", "gpu", "target"])
def test_what_is_missing_is_named(
    missing: str, package: EnginePackage, compiled: EnginePackage, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:

    expected: tuple[type[Exception], str] = {
        "pycuda": (DependencyMissing, "'pycuda' can't be imported.*dapo-edge.gpu"),
        "tensorrt": (DependencyMissing, "'tensorrt' can't be imported.*python3-libnvinfer"),
        "gpu": (BackendError, "no CUDA driver on this machine.*--backend openvino"),
        "target": (PackageIncompatible, "is not compiled yet. dapo-edge compile"),
    }[missing]
    if missing == "pycuda":
        monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    elif missing == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    elif missing == "gpu":
        fake_gpu.gpus = ()
    with pytest.raises(expected[0], match=expected[1]):
        TensorRtBackend.open(package if missing == "target" else compiled, map_size="model")
    assert fake_gpu.live == {}


def test_a_plan_that_was_changed_is_never_loaded(
    compiled_path: Path, tensorrt: Any, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    path = Path(shutil.copytree(compiled_path, tmp_path / "x.dapo"))
    for plan in path.glob("targets/*/encoder.plan"):
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
    with pytest.raises(
        PackageIncompatible, match=r"encoder.plan' is not the file that was compiled.*dapo-edge compile"
    ):
        TensorRtBackend.open(EnginePackage.open(path), map_size="model")
    assert fake_gpu.live == {}


def test_a_plan_of_another_tensorrt_or_gpu_is_refused(compiled: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, major, reason in (
        (FakeGpu(), 11, "a plan of TensorRT 10 can't run with 11"),
        (FakeGpu(name=b"NVIDIA L4"), 10, "compiled for NVIDIA H200.*here is NVIDIA L4"),
    ):
        fake_cuda.install(monkeypatch, gpu, major)
        with pytest.raises(PackageIncompatible, match=reason):
            TensorRtBackend.open(compiled, map_size="model")


def test_kernels_of_an_older_version_are_compiled_again(
    compiled: EnginePackage, monkeypatch: pytest.MonkeyPatch, picture: Any
) -> None:
    asked = []

    def compile_kernels(sm: str, *, driver_cuda: Any) -> Cubin:
        asked.append((sm, driver_cuda))
        return Cubin(fake_cuda.CUBIN, sm, "nvcc 12.6", "new", {}, ())

    monkeypatch.setattr("dapo_edge.backends.tensorrt.source_digest", lambda: "new")
    monkeypatch.setattr("dapo_edge.backends.tensorrt.compile_kernels", compile_kernels)
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.infer([picture])
    assert asked == [("sm_90", (12, 6))]


def test_a_plan_with_other_tensors_is_refused(package: EnginePackage, compiled: EnginePackage, tmp_path: Path) -> None:
    other = with_batch(package, 2, tmp_path)
    found = targets.best(compiled, targets.fingerprint_here())

    plan = targets.read_plan(found.folder, found.target)
    with Cuda.open() as cuda, pytest.raises(PackageDamaged, match="the plan's tensors are not this package's"):
        TensorRtBackend(other, cuda, fake_cuda.CUBIN, plan, map_size="model", precision="fp32")
