"""The whole GPU backend with the real TensorRT and pycuda: compile, gate, maps, graphs, memory. It needs no torch.

The package to compile: DAPO_EDGE_GPU_PACKAGE, else engines/surface-tiny.dapo as `make demo` leaves it.
"""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_edge.device import Gpu
from dapo_edge.errors import DapoEdgeError, DependencyMissing, PackageIncompatible

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu
pytest.importorskip("pydantic", reason="reading packages needs pydantic")

DEMO = Path(__file__).parent.parent.parent / "engines" / "surface-tiny.dapo"
PRECISIONS = ("fp32", "fp16", "int8")
# Of any pixel, score or probability, on frames that are not many: a plan with TF32 off rounds, half floats round more.
LIMITS = {"fp32": 1 / 255, "fp16": 0.02, "int8": 0.3}
CALLS = 10_000


@dataclass(frozen=True, eq=False)
class Compiled:
    """A package with targets for this GPU, and what eager torch made of its views."""

    package: Any  # EnginePackage
    targets: dict[str, Any]  # Compiled, by precision
    reference: Any  # ReferenceData

    def open(self, precision: str, map_size: Any = "model") -> Any:
        from dapo_edge.backends.tensorrt import TensorRtBackend

        return TensorRtBackend.open(self.package, map_size=map_size, precision=precision)

    def expected(self, place: int, bank: Any = None) -> Any:
        """The maps of one stored view, by the arithmetic of `reference.py`."""
        from dapo_edge.backends.host import make_maps

        spec, one = self.package.manifest.map, slice(place, place + 1)
        tokens, embedding = self.reference.tokens[one].astype(np.float32), self.reference.embeddings[one]
        return make_maps(tokens, embedding, bank or self.package.bank(), spec, (spec.image_size, spec.image_size))


@pytest.fixture(scope="module")
def compiled(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compiled once in every precision, in a copy of the package that is given INT8 where it has none."""
    from made_packages import with_int8

    from dapo_edge.backends.tensorrt_compile import compile_package
    from dapo_edge.package import EnginePackage

    for name in ("tensorrt", "pycuda.driver", "onnx", "threadpoolctl"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} can't be imported ({error})")
    source = Path(os.environ.get("DAPO_EDGE_GPU_PACKAGE", DEMO))
    if not (source / "manifest.json").is_file():
        pytest.skip(f"there is no package '{source}': make demo, or set DAPO_EDGE_GPU_PACKAGE")
    without_targets = shutil.ignore_patterns("targets")
    package = EnginePackage.open(
        shutil.copytree(source, tmp_path_factory.mktemp("gpu") / "copy.dapo", ignore=without_targets)
    )
    reference = package.reference()
    if reference is None:
        pytest.skip(f"'{source}' carries no reference: build it again")
    if not package.holds_int8:
        package = with_int8(package, tmp_path_factory.mktemp("int8"))
    try:
        targets = {precision: compile_package(package, precision=precision) for precision in PRECISIONS}
    except DependencyMissing as error:
        pytest.skip(str(error))
    return Compiled(package, targets, reference)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plan_passed_the_gate_and_says_how(compiled: Compiled, precision: str) -> None:
    target = compiled.targets[precision].target
    assert target.precision == precision
    assert target.gate["map_difference_max"] <= LIMITS[precision]
    assert target.gate["score_difference_max"] <= LIMITS[precision]
    assert target.gate["token_cosine_min"] >= (0.9999 if precision == "fp32" else 0.99)
    if precision == "int8":
        assert target.layers["int8_linears"] > 0
    assert target.attention.of > 0
    assert target.layers["count"] > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_maps_are_those_of_eager_torch(compiled: Compiled, precision: str) -> None:
    limit = LIMITS[precision]
    with compiled.open(precision) as backend:
        for place, view in enumerate(compiled.reference.views):
            for _ in range(2):  # the first call launches plainly and captures, the second replays
                got, expected = backend.infer([view]), compiled.expected(place)
                assert np.abs(got.anomaly - expected.anomaly).max() <= limit
                assert (got.types == expected.types).mean() >= 0.98
                assert np.abs(got.patch_probs - expected.patch_probs).max() <= limit
                assert np.abs(got.image_scores - expected.image_scores).max() <= limit
        assert set(got.stage_ms) == {"upload", "preprocess", "encode", "map", "download"}
        assert all(ms > 0 for ms in got.stage_ms.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_gives_what_plain_launches_give(
    compiled: Compiled, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compiled.open(precision) as backend:
        replayed = [backend.infer([view]) for view in compiled.reference.views]
        assert "plain launches" not in backend.device
    monkeypatch.setenv("DAPO_EDGE_CUDA_GRAPH", "off")
    with compiled.open(precision) as backend:
        plain = [backend.infer([view]) for view in compiled.reference.views]
        assert "plain launches" in backend.device
    for one, other in zip(replayed, plain, strict=True):
        np.testing.assert_allclose(one.anomaly, other.anomaly, rtol=0, atol=1e-3)
        np.testing.assert_allclose(one.patch_probs, other.patch_probs, rtol=0, atol=1e-3)


def test_a_large_frame_is_what_pillow_makes_of_it(compiled: Compiled) -> None:
    from dapo_edge.backends.host import resize_view
    from dapo_edge.data.surfaces import make_surface

    frame = make_surface(5, (1920, 1080), good_share=0).image
    size = compiled.package.manifest.image_size
    with compiled.open("fp32") as backend:
        ours, pillows = backend.infer([frame]), backend.infer([resize_view(frame, size)])
    assert np.abs(ours.anomaly - pillows.anomaly).mean() <= 0.01
    with compiled.open("fp32", map_size="frame") as backend:
        assert backend.infer([frame]).anomaly.shape == (1, 1080, 1920)


def test_ten_thousand_frames_keep_no_memory(compiled: Compiled) -> None:
    driver = importlib.import_module("pycuda.driver")
    views = compiled.reference.views
    with compiled.open("fp16") as backend:

        def memory() -> tuple[int, int]:
            with backend._cuda.active():
                free, _ = driver.mem_get_info()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return free, pages * os.sysconf("SC_PAGE_SIZE")

        for index in range(200):
            backend.infer([views[index % len(views)]])
        first, (free, resident) = backend.infer([views[0]]), memory()
        for index in range(CALLS):
            backend.infer([views[index % len(views)]])
        free_then, resident_then = memory()
        np.testing.assert_allclose(backend.infer([views[0]]).anomaly, first.anomaly, rtol=0, atol=1e-3)
    assert free_then >= free - (1 << 20), "device memory"
    assert resident_then <= resident + (8 << 20), "host memory"


def test_other_words_apply_from_the_next_frame_on(compiled: Compiled) -> None:
    from dapo_edge.prompt_bank import PromptBank

    view, bank = compiled.reference.views[0], compiled.package.bank()
    fewer = PromptBank(bank.names[:2], bank.rows[:2])
    turned = PromptBank(bank.names, np.roll(bank.rows, 1, axis=0))
    with compiled.open("fp32") as backend:
        for words in (bank, fewer, turned, bank):
            backend.set_bank(words)
            got, expected = backend.infer([view]), compiled.expected(0, words)
            assert got.patch_probs.shape == expected.patch_probs.shape
            assert np.abs(got.anomaly - expected.anomaly).max() <= 1 / 255


@pytest.mark.parametrize("damage", ["a bit", "the end"])
def test_a_damaged_plan_is_never_loaded(compiled: Compiled, tmp_path: Path, damage: str) -> None:
    from dapo_edge.backends.tensorrt import TensorRtBackend
    from dapo_edge.package import EnginePackage

    package = EnginePackage.open(shutil.copytree(compiled.package.path, tmp_path / "damaged.dapo"))
    for plan in package.path.glob("targets/*/encoder.plan"):
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 4
        plan.write_bytes(content if damage == "a bit" else content[:-1])
    with pytest.raises(DapoEdgeError, match=r"encoder\.plan") as caught:
        TensorRtBackend.open(package, map_size="model").close()
    assert "dapo-edge compile" in caught.value.remedy


def test_a_package_without_a_target_asks_to_be_compiled(compiled: Compiled, tmp_path: Path) -> None:
    from dapo_edge.backends.tensorrt import TensorRtBackend
    from dapo_edge.package import EnginePackage

    bare = EnginePackage.open(
        shutil.copytree(compiled.package.path, tmp_path / "bare.dapo", ignore=shutil.ignore_patterns("targets"))
    )
    with pytest.raises(PackageIncompatible, match="not compiled yet"):
        TensorRtBackend.open(bare, map_size="model").close()
