"""The GPU engine from a camera's bytes to the map, on a GPU made of Python objects that runs the real kernels."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
from banks import contrasting_bank
from fake_cuda import FakeGpu

from dapo_edge import Inspector, targets
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.backends.tensorrt import MAX_PATHS, TensorRtBackend
from dapo_edge.backends.tensorrt_compile import compile_package
from dapo_edge.errors import BackendError, DependencyMissing, PackageDamaged, PackageIncompatible, RecipeError
from dapo_edge.kernels.compile import Cubin, source_digest
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def tensorrt(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake tensorrt of a machine with the fake GPU; kernels are compiled in name only."""
    cubin = Cubin(fake_cuda.CUBIN, "sm_90", "nvcc 12.6", source_digest(), {}, ())
    monkeypatch.setattr("dapo_edge.backends.tensorrt_compile.compile_kernels", lambda *_, **__: cubin)
    monkeypatch.setattr("dapo_edge.backends.tensorrt.compile_kernels", lambda *_, **__: cubin)
    return fake_cuda.install(monkeypatch, gpu)


@pytest.fixture(scope="module")
def compiled_path(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared package, compiled in fp32 and fp16 for the fake GPU; not to be changed."""
    path = Path(shutil.copytree(package.path, tmp_path_factory.mktemp("compiled") / "tiny.dapo"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        cubin = Cubin(fake_cuda.CUBIN, "sm_90", "nvcc 12.6", source_digest(), {}, ())
        monkeypatch.setattr("dapo_edge.backends.tensorrt_compile.compile_kernels", lambda *_, **__: cubin)
        fake_cuda.install(monkeypatch, FakeGpu())
        for precision in ("fp32", "fp16"):
            compile_package(EnginePackage.open(path), precision=precision)
    return path


@pytest.fixture
def compiled(compiled_path: Path, tensorrt: Any) -> EnginePackage:
    return EnginePackage.open(compiled_path)


@pytest.fixture(scope="module")
def sharp(package: EnginePackage) -> PromptBank:
    rng = np.random.default_rng(2)
    with OpenVinoBackend.open(package, map_size="model") as backend:
        tokens, _ = backend.encode([rng.integers(0, 256, (96, 96, 3), np.uint8)])
    return contrasting_bank(package.bank().names, tokens)


@pytest.fixture
def backend(compiled: EnginePackage, sharp: PromptBank) -> Iterator[TensorRtBackend]:
    with TensorRtBackend.open(compiled, map_size="model") as opened:
        opened.set_bank(sharp)
        yield opened


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("map_size", ["model", "frame", (33, 70)])
def test_equals_the_cpu_engine(
    compiled: EnginePackage, sharp: PromptBank, picture: Any, map_size: Any, precision: str
) -> None:
    with (
        TensorRtBackend.open(compiled, map_size=map_size, precision=precision) as backend,
        OpenVinoBackend.open(compiled, map_size=map_size) as cpu,
    ):
        assert (backend.precision, backend.device) == (precision, "NVIDIA H200, TensorRT 10.3.0")
        for engine in (backend, cpu):
            engine.set_bank(sharp)
        expected = cpu.infer([picture])
        for _ in ("plain, captured and replayed", "replayed"):
            got = backend.infer([picture])
            assert np.abs(got.anomaly - expected.anomaly).max() <= 0.01
            assert (got.types == expected.types).mean() >= 0.995
            np.testing.assert_allclose(got.patch_probs, expected.patch_probs, atol=0.02)
            np.testing.assert_allclose(got.image_scores, expected.image_scores, atol=0.01)
            np.testing.assert_allclose(got.type_scores, expected.type_scores, atol=0.01)
            np.testing.assert_allclose(got.patch_probs.sum(axis=1), 1, atol=1e-5)
        assert set(got.stage_ms) == {"upload", "preprocess", "encode", "map", "download"}
    assert expected.anomaly.std() > 0.05, "a flat map would agree with anything"


@pytest.mark.parametrize("score", ["image", "max", "top"])
def test_every_score_rule(
    package: EnginePackage, compiled: EnginePackage, sharp: PromptBank, picture: Any, score: str, gpu: FakeGpu
) -> None:
    manifest = compiled.manifest.model_copy(
        update={"map": type(compiled.manifest.map)(**{**vars(compiled.manifest.map), "score": score})}
    )
    ruled = EnginePackage(compiled.path, manifest)
    with (
        TensorRtBackend.open(ruled, map_size="model") as backend,
        OpenVinoBackend.open(ruled, map_size="model", cache=False) as cpu,
    ):
        for engine in (backend, cpu):
            engine.set_bank(sharp)
        np.testing.assert_allclose(backend.infer([picture]).image_scores, cpu.infer([picture]).image_scores, atol=2e-3)


def test_a_frame_is_one_graph_launch(backend: TensorRtBackend, gpu: FakeGpu, picture: Any) -> None:
    backend.infer([picture])
    gpu.log.clear()
    memory = gpu.memory_left, len(gpu.live), len(gpu.objects)
    for _ in range(5):
        backend.infer([255 - picture])
    assert gpu.log.count("graph") == gpu.log.count("engine") == 5
    assert [name for name in gpu.log if not name.startswith(("event", "clear"))][:9] == [
        "graph", "upload", "preprocess", "engine", "patch_probabilities", "defect_map_4", "download", "download",
        "download",
    ]  # fmt: skip
    assert (gpu.memory_left, len(gpu.live), len(gpu.objects)) == memory, "nothing is allocated per frame"


def test_a_bank_is_swapped_without_a_new_capture(
    backend: TensorRtBackend, gpu: FakeGpu, sharp: PromptBank, picture: Any
) -> None:
    before = backend.infer([picture])
    graphs = len(gpu.objects)
    fewer = PromptBank(sharp.names[:2], sharp.rows[[1, 0]])
    backend.set_bank(fewer)
    swapped = backend.infer([picture])
    assert swapped.patch_probs.shape[1] == 2
    assert swapped.bank is fewer
    many = np.random.default_rng(0).standard_normal((65, sharp.dimensions)).astype(np.float32)
    backend.set_bank(
        PromptBank(("normal", *(f"type {k}" for k in range(64))), many / np.linalg.norm(many, axis=1)[:, None])
    )
    assert backend.infer([picture]).patch_probs.shape[1] == 65
    backend.set_bank(sharp)
    np.testing.assert_array_equal(backend.infer([picture]).anomaly, before.anomaly)
    assert len(gpu.objects) == graphs


def test_more_types_than_the_kernels_hold_are_refused(backend: TensorRtBackend, sharp: PromptBank) -> None:
    rows = np.eye(66, sharp.dimensions, dtype=np.float32)
    rows[sharp.dimensions :, 0] = 1
    with pytest.raises(RecipeError, match=r"1 to 64 defect types, not 65.*openvino"):
        backend.set_bank(PromptBank(("normal", *map(str, range(65))), rows))
    assert backend.bank is sharp


def test_cameras_of_different_formats_and_sizes_share_a_batch(
    package: EnginePackage, tensorrt: Any, sharp: PromptBank, picture: Any, tmp_path: Path
) -> None:
    batched = _with_batch(package, 3, tmp_path)
    compile_package(batched)
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (80, 200, 3), np.uint8)
    views = [
        picture,
        wide[10:70, 20:150],  # a part of a larger frame, as a tile is
        PixelView(rng.integers(0, 256, (91, 130), np.uint8), "BayerRG8", 121, 91, (3, 5, 100, 80)),
        PixelView(rng.integers(0, 256, (150, 128), np.uint8), "NV12", 120, 100),
        PixelView(rng.integers(0, 256, (64, 96), np.uint8), "GRAY8", 96, 64),
    ]
    with (
        TensorRtBackend.open(batched, map_size="model") as backend,
        OpenVinoBackend.open(package, map_size="model") as cpu,
    ):
        for engine in (backend, cpu):
            engine.set_bank(sharp)
        expected = [cpu.infer([view]) for view in views]
        for count in (5, 1, 3):
            got = backend.infer(views[:count])
            assert got.anomaly.shape == (count, 96, 96)
            for index in range(count):
                assert np.abs(got.anomaly[index] - expected[index].anomaly[0]).max() <= 0.02
                assert abs(got.image_scores[index] - expected[index].image_scores[0]) <= 0.01
        tokens, embedding = backend.encode(views)
        assert (len(tokens), len(embedding)) == (5, 5)


def test_results_outlive_the_next_call(backend: TensorRtBackend, picture: Any) -> None:
    first = backend.infer([picture])
    kept = {name: getattr(first, name).copy() for name in ("anomaly", "types", "patch_probs", "image_scores")}
    backend.infer([255 - picture])
    for name, value in kept.items():
        np.testing.assert_array_equal(getattr(first, name), value)


def test_frames_of_many_sizes_do_not_fill_the_memory(backend: TensorRtBackend, gpu: FakeGpu) -> None:
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (40 + index, 64, 3), np.uint8) for index in range(3 * MAX_PATHS)]
    for frame in frames[:MAX_PATHS]:
        backend.infer([frame])
    full = len(gpu.live), len(gpu.objects)
    for frame in frames[MAX_PATHS:]:
        backend.infer([frame])
    assert (len(gpu.live), len(gpu.objects)) == full


def test_everything_is_given_back(compiled: EnginePackage, gpu: FakeGpu, picture: Any) -> None:
    before = gpu.memory_left
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.infer([picture])
        backend.encode([picture])
    assert (gpu.live, gpu.objects, gpu.memory_left, gpu.current.depth) == ({}, {}, before, 0)
    backend.close()
    with pytest.raises(BackendError, match="this GPU is closed"):
        backend.infer([picture])


def test_another_thread_may_use_it(backend: TensorRtBackend, picture: Any) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(backend.infer([picture])))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0].anomaly, backend.infer([picture]).anomaly)


def test_plain_launches_only_where_allowed_and_named(
    compiled: EnginePackage, gpu: FakeGpu, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.fails["cuStreamBeginCapture_v2"] = 803
    with (
        TensorRtBackend.open(compiled, map_size="model") as backend,
        pytest.raises(BackendError, match=r"can't be captured.*unsupported display driver.*DAPO_EDGE_CUDA_GRAPH=off"),
    ):
        backend.infer([picture])
    monkeypatch.setenv("DAPO_EDGE_CUDA_GRAPH", "off")
    with Inspector(compiled, backend="tensorrt") as inspector:
        assert inspector.inspect(picture).score >= 0
        assert inspector.backend.device.endswith("plain launches")
    assert "graph" not in gpu.log


def test_a_graph_that_computes_something_else_is_refused(
    compiled: EnginePackage, gpu: FakeGpu, sharp: PromptBank, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = FakeGpu._cuGraphInstantiateWithFlags

    def drop_the_upload(self: FakeGpu, executable: Any, graph: Any, flags: Any) -> None:
        del self.objects[graph.value][1]
        for content in self.live.values():
            content[:] = 0 if content.nbytes == picture.nbytes else content
        forgetful(self, executable, graph, flags)

    monkeypatch.setattr(FakeGpu, "_cuGraphInstantiateWithFlags", drop_the_upload)
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.set_bank(sharp)
        with pytest.raises(BackendError, match="gives another map"):
            backend.infer([picture])


def test_a_lost_gpu_is_an_error_at_once_and_closes_cleanly(compiled: EnginePackage, gpu: FakeGpu, picture: Any) -> None:
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.infer([picture])
        gpu.broken = "cuStreamSynchronize failed: an illegal memory access was encountered"
        for _ in range(2):
            with pytest.raises(BackendError, match=r"illegal memory access.*start the process again"):
                backend.infer([picture])
    assert gpu.log[-1] == "detached"


def test_too_little_memory_says_what_for(compiled: EnginePackage, gpu: FakeGpu) -> None:
    gpu.memory_left = 1000
    with pytest.raises(BackendError, match=r"no 0.1 MB left for the encoder's input .0.0 of 1024 MB are free.*smaller"):
        TensorRtBackend.open(compiled, map_size="model")
    assert gpu.live == {}


def test_too_little_memory_for_one_size_leaves_the_others(backend: TensorRtBackend, gpu: FakeGpu, picture: Any) -> None:
    before = backend.infer([picture])
    held = len(gpu.live), len(gpu.objects)
    for share in (20_000, 60_000, 100_000):
        left, gpu.memory_left = gpu.memory_left, share
        with pytest.raises(BackendError, match=r"MB left for (frames|maps|map tables|resampling tables)"):
            backend.infer([np.zeros((200, 160, 3), np.uint8)])
        gpu.memory_left = left
        assert (len(gpu.live), len(gpu.objects)) == held
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
    missing: str, package: EnginePackage, compiled: EnginePackage, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

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
        gpu.gpus = ()
    with pytest.raises(expected[0], match=expected[1]):
        TensorRtBackend.open(package if missing == "target" else compiled, map_size="model")
    assert gpu.live == {}


def test_a_plan_that_was_changed_is_never_loaded(
    compiled_path: Path, tensorrt: Any, tmp_path: Path, gpu: FakeGpu
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
    assert gpu.live == {}


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
    other = _with_batch(package, 2, tmp_path)
    found = targets.best(compiled, targets.fingerprint_here())
    from dapo_edge.backends.cuda import Cuda

    plan = targets.read_plan(found.folder, found.target)
    with Cuda.open() as cuda, pytest.raises(PackageDamaged, match="the plan's tensors are not this package's"):
        TensorRtBackend(other, cuda, fake_cuda.CUBIN, plan, map_size="model", precision="fp32")


def test_integrated_gpus_read_the_frame_where_it_lies(
    package: EnginePackage, monkeypatch: pytest.MonkeyPatch, tensorrt: Any, tmp_path: Path, picture: Any
) -> None:
    orin = FakeGpu(**{"name": b"Orin", "memory": 65_000_000_000})
    orin.gpus[0][18] = 1
    fake_cuda.install(monkeypatch, orin)
    path = Path(shutil.copytree(package.path, tmp_path / "x.dapo"))
    compile_package(EnginePackage.open(path))
    with (
        TensorRtBackend.open(EnginePackage.open(path), map_size="model") as backend,
        OpenVinoBackend.open(package, map_size="model") as cpu,
    ):
        orin.log.clear()
        difference = backend.infer([picture]).anomaly - cpu.infer([picture]).anomaly
    assert "upload" not in orin.log
    assert np.abs(difference).max() <= 0.01


def _with_batch(package: EnginePackage, batch: int, folder: Path) -> EnginePackage:
    """The same package with an encoder of another batch size."""
    from dapo_edge.config import parse_recipe
    from dapo_edge.engine.build import build

    return build(parse_recipe({**package.manifest.recipe, "batch": batch}), folder / "batch.dapo")
