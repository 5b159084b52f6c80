"""The GPU engine from a camera's bytes to the map, on a GPU made of Python objects that runs the real kernels."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_cuda import FakeGpu
from made_packages import with_batch

from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.backends.tensorrt import TensorRtBackend
from dapo_edge.backends.tensorrt_compile import compile_package
from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank

pytest_plugins = ["fake_machine"]


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
    package: EnginePackage, compiled: EnginePackage, sharp: PromptBank, picture: Any, score: str, fake_gpu: FakeGpu
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


def test_a_frame_is_one_graph_launch(backend: TensorRtBackend, fake_gpu: FakeGpu, picture: Any) -> None:
    backend.infer([picture])
    fake_gpu.log.clear()
    memory = fake_gpu.memory_left, len(fake_gpu.live), len(fake_gpu.objects)
    for _ in range(5):
        backend.infer([255 - picture])
    assert fake_gpu.log.count("graph") == fake_gpu.log.count("engine") == 5
    once = [name for name in fake_gpu.log if name not in ("event", "clear", "download")][:7]
    assert once == ["graph", "upload", "upload", "preprocess", "engine", "patch_probabilities", "defect_map_4"]
    assert (fake_gpu.memory_left, len(fake_gpu.live), len(fake_gpu.objects)) == memory, "nothing is allocated per frame"


def test_a_bank_is_swapped_without_a_new_capture(
    backend: TensorRtBackend, fake_gpu: FakeGpu, sharp: PromptBank, picture: Any
) -> None:
    before = backend.infer([picture])
    graphs = len(fake_gpu.objects)
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
    assert len(fake_gpu.objects) == graphs


def test_more_types_than_the_kernels_hold_are_refused(backend: TensorRtBackend, sharp: PromptBank) -> None:
    rows = np.eye(66, sharp.dimensions, dtype=np.float32)
    rows[sharp.dimensions :, 0] = 1
    with pytest.raises(RecipeError, match=r"1 to 64 defect types, not 65.*openvino"):
        backend.set_bank(PromptBank(("normal", *map(str, range(65))), rows))
    assert backend.bank is sharp


def test_cameras_of_different_formats_and_sizes_share_a_batch(
    package: EnginePackage, tensorrt: Any, sharp: PromptBank, picture: Any, tmp_path: Path
) -> None:
    batched = with_batch(package, 3, tmp_path)
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


def test_frames_of_many_sizes_do_not_fill_the_memory(
    backend: TensorRtBackend, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (40 + index, 64, 3), np.uint8) for index in range(8)]
    backend.infer([frames[0]])
    one = next(iter(backend._paths.values())).nbytes
    monkeypatch.setattr("dapo_edge.backends.tensorrt.MAX_PATH_BYTES", 3 * one)
    for frame in frames[:4]:
        backend.infer([frame])
    full = len(fake_gpu.live), len(fake_gpu.objects)
    for frame in frames[4:] * 2:
        backend.infer([frame])
    assert len(fake_gpu.live) <= full[0] + 2
    assert len(fake_gpu.objects) <= full[1] + 2
    assert caplog.text.count("frames of so many sizes") == 1


def test_a_crop_may_wander(
    backend: TensorRtBackend, fake_gpu: FakeGpu, compiled: EnginePackage, sharp: PromptBank
) -> None:
    """A tracked part is looked at wherever it lies: no new graph, and only its own bytes are copied."""
    rng = np.random.default_rng(3)
    for pixel_format, row_bytes in (("BayerRG8", 300), ("GRAY8", 300), ("BGR8", 900)):
        data = rng.integers(0, 256, (200, row_bytes), np.uint8)
        objects = None
        with OpenVinoBackend.open(compiled, map_size="model") as cpu:
            cpu.set_bank(sharp)
            for left, top in ((50, 60), (101, 31), (150, 7), (33, 90)):
                view = PixelView(data, pixel_format, 300, 200, (left, top, 96, 80))
                difference = backend.infer([view]).anomaly - cpu.infer([view]).anomaly
                assert np.abs(difference).max() <= 0.02
                if pixel_format != "BayerRG8":  # whose rim depends on the phase: four kinds of buffers at most
                    assert objects in (None, len(fake_gpu.objects))
                objects = len(fake_gpu.objects)
        newest = next(reversed(backend._paths.values()))
        assert newest.view_input.nbytes < data.nbytes


def test_everything_is_given_back(compiled: EnginePackage, fake_gpu: FakeGpu, picture: Any) -> None:
    before = fake_gpu.memory_left
    with TensorRtBackend.open(compiled, map_size="model") as backend:
        backend.infer([picture])
        backend.encode([picture])
    assert (fake_gpu.live, fake_gpu.objects, fake_gpu.memory_left, fake_gpu.current.depth) == ({}, {}, before, 0)
    backend.close()
    with pytest.raises(BackendError, match="this GPU is closed"):
        backend.infer([picture])


def test_another_thread_may_use_it(backend: TensorRtBackend, picture: Any) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(backend.infer([picture])))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0].anomaly, backend.infer([picture]).anomaly)


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
        backend.infer([picture])
        orin.log.clear()
        difference = backend.infer([picture]).anomaly - cpu.infer([picture]).anomaly
    assert "upload" not in orin.log
    assert np.abs(difference).max() <= 0.01
