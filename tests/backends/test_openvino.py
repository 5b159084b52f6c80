"""The CPU engine against the eager reference, and the contract that both keep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banks import has_fast_type, sharp_bank

from dapo_edge import Inspector, cache
from dapo_edge.backends.base import backend_class
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.errors import BackendError, PackageDamaged, RecipeError
from dapo_edge.models.eager import EagerBackend
from dapo_edge.outputs.events import frame_json
from dapo_edge.package import EnginePackage, Threshold, Thresholds
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan


@pytest.fixture(scope="module")
def sharp(package: EnginePackage) -> PromptBank:
    return sharp_bank(package)


@pytest.mark.parametrize("map_size", ["model", "frame", (33, 70)])
def test_equals_eager(package: EnginePackage, sharp: PromptBank, picture: Any, map_size: Any) -> None:
    with (
        OpenVinoBackend.open(package, map_size=map_size) as compiled,
        EagerBackend.open(package, map_size=map_size) as eager,
    ):
        for backend in (compiled, eager):
            backend.set_bank(sharp)
        tokens, reference = compiled.encode([picture])[0], eager.encode([picture])[0]
        got, expected = compiled.infer([picture]), eager.infer([picture])
    cosine = (tokens * reference).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(reference, axis=-1)
    assert cosine.min() >= 0.99999
    height, width = {"model": (96, 96), "frame": picture.shape[:2]}.get(str(map_size), (70, 33))
    assert got.anomaly.shape == got.types.shape == (1, height, width)
    assert np.abs(got.anomaly - expected.anomaly).max() <= 1e-3
    assert (got.types == expected.types).mean() >= 0.999
    np.testing.assert_allclose(got.patch_probs, expected.patch_probs, atol=1e-4)
    np.testing.assert_allclose(got.image_scores, expected.image_scores, atol=1e-4)
    np.testing.assert_allclose(got.type_scores, expected.type_scores, atol=1e-4)
    assert got.type_scores.shape == (1, 3)
    assert expected.anomaly.std() > 0.05, "a flat map would agree with anything"
    assert len(np.unique(expected.types)) > 1
    assert set(got.stage_ms) == set(expected.stage_ms) == {"preprocess", "encode", "map"}


@pytest.mark.skipif(not has_fast_type(), reason="this CPU computes no float type faster than fp32")
def test_fast_type_is_named_and_close(package: EnginePackage, sharp: PromptBank, picture: Any) -> None:
    with (
        OpenVinoBackend.open(package, map_size="model", precision="fp16") as fast,
        OpenVinoBackend.open(package, map_size="model") as exact,
    ):
        for backend in (fast, exact):
            backend.set_bank(sharp)
        assert exact.precision == "fp32"
        assert fast.precision in ("bf16", "fp16")
        difference = np.abs(fast.infer([picture]).anomaly - exact.infer([picture]).anomaly).max()
    assert 0 < difference < 0.05, "0 would mean that both ran the same arithmetic"


def test_a_cpu_without_a_fast_type_says_so(package: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_edge.backends.openvino.FAST_TYPES", {})
    with pytest.raises(BackendError, match=r"no float type faster than fp32.*--precision fp32"):
        OpenVinoBackend.open(package, map_size="model", precision="fp16")


def test_threads_with_own_backends_leave_numpy_as_it_was(package: EnginePackage, picture: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_info

    def blas_threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    def work(index: int) -> float:
        with OpenVinoBackend.open(package, map_size="model") as backend:
            return max(float(backend.infer([picture]).anomaly.max()) for _ in range(30))

    before = blas_threads()
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(work, range(3)))) == 1
    assert blas_threads() == before


def test_bank_is_swapped_between_calls(package: EnginePackage, sharp: PromptBank, picture: Any) -> None:
    with OpenVinoBackend.open(package, map_size="model") as backend:
        before = backend.infer([picture]).anomaly
        backend.set_bank(sharp)
        after = backend.infer([picture]).anomaly
        backend.set_bank(package.bank())
        assert np.abs(before - after).max() > 0.01
        np.testing.assert_array_equal(backend.infer([picture]).anomaly, before)
        with pytest.raises(RecipeError, match="has 7 dimensions, the engine package 48"):
            backend.set_bank(PromptBank(("normal", "a"), np.eye(2, 7, dtype=np.float32)))


def test_results_outlive_the_next_call(package: EnginePackage, picture: Any) -> None:
    """The runtime's output buffers are reused; what was handed out must not change."""
    with OpenVinoBackend.open(package, map_size="model") as backend:
        first = backend.infer([picture])
        kept = {name: getattr(first, name).copy() for name in ("anomaly", "types", "patch_probs", "image_scores")}
        backend.infer([255 - picture])
        for name, value in kept.items():
            np.testing.assert_array_equal(getattr(first, name), value)


def test_maps_of_frame_size_need_equal_frames(package: EnginePackage, picture: Any) -> None:
    with (
        OpenVinoBackend.open(package, map_size="frame") as backend,
        pytest.raises(RecipeError, match="needs views of one size"),
    ):
        backend.infer([picture, picture[:50]])


def test_closed_backend_and_unknown_names(package: EnginePackage, picture: Any) -> None:
    backend = OpenVinoBackend.open(package, map_size="model")
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.infer([picture])
    with pytest.raises(RecipeError, match="unknown precision 'int4'"):
        OpenVinoBackend.open(package, map_size="model", precision="int4")
    with pytest.raises(RecipeError, match="Did you mean 'openvino'"):
        backend_class("openvin")


@pytest.fixture
def cached(
    package: EnginePackage, tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, np.ndarray]:
    """A model cache of its own with one compiled model, and the map that this model made."""
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path))
    with OpenVinoBackend.open(package, map_size="model") as first:
        expected = first.infer([picture]).anomaly
    (blob,) = tmp_path.rglob("*.blob")
    return blob, expected


def test_compiled_models_are_cached(package: EnginePackage, picture: Any, cached: tuple[Path, np.ndarray]) -> None:
    blob, expected = cached
    with OpenVinoBackend.open(package, map_size="model") as again:
        np.testing.assert_array_equal(again.infer([picture]).anomaly, expected)
    assert list(blob.parent.glob("*.blob")) == [blob]


def test_a_damaged_cache_is_compiled_again_never_used(
    package: EnginePackage, picture: Any, cached: tuple[Path, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    blob, expected = cached
    content = bytearray(blob.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)
    blob.write_bytes(content)
    with OpenVinoBackend.open(package, map_size="model") as again:
        np.testing.assert_array_equal(again.infer([picture]).anomaly, expected)
    assert "is damaged: compiled again" in caplog.text


def test_no_cache_folder_is_said_not_hidden(
    package: EnginePackage, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path / "file"))
    OpenVinoBackend.open(package, map_size="model").close()
    assert "no model cache" in caplog.text


def test_a_blob_that_openvino_refuses_is_compiled_again(
    package: EnginePackage, picture: Any, cached: tuple[Path, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    blob, expected = cached
    cache.store("openvino", blob.stem, b"from another OpenVINO")
    for _ in range(2):
        with OpenVinoBackend.open(package, map_size="model") as again:
            np.testing.assert_array_equal(again.infer([picture]).anomaly, expected)
    assert caplog.text.count("refuses a model from the cache") == 1, "the second start meets the new one"


def test_an_encoder_replaced_after_opening_is_not_run(
    package: EnginePackage, package_copy: Path, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path / "cache"))
    opened = EnginePackage.open(package_copy)
    other = package_copy / "encoder.onnx"
    other.write_bytes(other.read_bytes().replace(b"image_embedding", b"image_embeddinG"))
    with pytest.raises(PackageDamaged, match="was replaced after the package was opened"):
        OpenVinoBackend.open(opened, map_size="model")
    assert not list((tmp_path / "cache").rglob("*.blob"))


def test_memory_stays_flat(package: EnginePackage) -> None:
    """A short version of the 2,000 frames that benchmarks/spine.py measures: source, inspection, regions and events."""

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with Inspector(package, map_size="frame") as inspector:
        anomaly = inspector.inspect(np.zeros((240, 320, 3), np.uint8)).anomaly_map
        limit = Threshold(value=float(np.median(anomaly)), false_reject_rate=0, confidence_95=(0, 1))
        inspector.thresholds = Thresholds(image=limit, pixel=limit)
        sizes, found = [], 0
        for outcome in Pipeline(inspector, [CameraPlan("belt", "synthetic://320x240@30?frames=600")]):
            found += len(frame_json(outcome)["defects"])
            sizes.append(resident_mb())
    assert len(sizes) == 600
    assert found > 0
    assert sizes[-1] - sizes[200] <= 10


def test_the_first_inference_of_a_process_may_come_from_several_threads(package: EnginePackage) -> None:
    code = (
        "import sys, threading, numpy as np\n"
        "from dapo_edge import Inspector\n"
        "with Inspector(sys.argv[1]) as inspector:\n"
        "    start = threading.Barrier(2)\n"
        "    def work():\n"
        "        start.wait()\n"
        "        inspector.inspect(np.zeros((64, 64, 3), np.uint8))\n"
        "    threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "    [thread.start() for thread in threads]\n"
        "    [thread.join() for thread in threads]\n"
    )
    for _ in range(5):  # without care, every fourth process hangs
        subprocess.run([sys.executable, "-c", code, str(package.path)], check=True, timeout=60)
