"""Building: what the package holds, the gate that refuses, and interruptions that leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from banks import has_fast_type
from PIL import Image

from dapo_edge.config import parse_recipe
from dapo_edge.engine.build import build
from dapo_edge.engine.export import export_encoder
from dapo_edge.errors import BackendError, GateError, OutputError, RecipeError
from dapo_edge.package import EnginePackage


def test_exported_graph_is_what_compilers_want(package: EnginePackage) -> None:
    model = onnx.load(str(package.encoder_path()))
    operators = [node.op_type for node in model.graph.node]
    assert model.opset_import[0].version >= 17
    assert operators.count("LayerNormalization") == 2 * 5 + 2  # two per block, ln_pre, ln_post
    assert operators.count("Softmax") == 5
    assert [output.name for output in model.graph.output] == ["patch_tokens", "image_embedding"]
    shapes = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in model.graph.output]
    assert shapes == [[1, 3, 36, 48], [1, 48]]


def test_manifest_and_report(package: EnginePackage) -> None:
    manifest = package.manifest
    assert (manifest.image_size, manifest.map.grid, manifest.feature_layers) == (96, (6, 6), (2, 4, 5))
    assert (manifest.trained, manifest.tuned, manifest.weights) == (False, False, "seeded (0)")
    drift = package.report()["precisions"]["fp32"]
    assert drift["token_cosine_min"] >= 0.99999
    assert drift["map_difference_max"] <= 1e-3
    assert drift["type_agreement"] >= 0.999
    thresholds = package.thresholds()
    assert thresholds.image is not None
    assert thresholds.image.false_reject_rate == 0


def test_same_recipe_gives_the_same_files(package: EnginePackage, tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    again = build(parse_recipe(tiny_fields), tmp_path / "again.dapo")
    for name in ("encoder.onnx", "prompts.safetensors", "reference.safetensors"):
        assert again.manifest.files[name] == package.manifest.files[name], name


@pytest.mark.skipif(not has_fast_type(), reason="this CPU computes no float type faster than fp32")
def test_fp16_goes_through_the_gate_too(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {**tiny_fields, "precision": "fp16", "thresholds": {}, "gate": {"count": 1, "max_map_difference": 0.2}}
    report = build(parse_recipe(fields), tmp_path / "fast.dapo").report()
    assert set(report["precisions"]) == {"fp32", "fp16"}
    assert report["precisions"]["fp32"]["runs_as"] == "fp32"
    assert report["precisions"]["fp16"]["runs_as"] in ("bf16", "fp16")
    assert report["precisions"]["fp16"]["flips"] is None, "without thresholds there are no verdicts"


@pytest.mark.parametrize("part", ["adapters.0.weight", "encoder.visual.proj", "encoder.visual.ln_pre.weight"])
def test_an_export_of_other_weights_is_caught_and_not_shipped(
    tiny_fields: dict[str, Any], package_copy: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor of the exported encoder is slightly off; eager still has the right one."""

    def wrong(method: Any, path: Path, batch: int) -> None:
        tensor = dict(method.named_parameters())[part].data
        right = tensor.clone()
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * 0.1 * right.std())
        tensor[..., 0] *= 1.5
        export_encoder(method, path, batch)
        tensor.copy_(right)

    monkeypatch.setattr("dapo_edge.engine.build.export_encoder", wrong)
    with pytest.raises(GateError, match="the exported FP32 encoder failed the accuracy gate") as caught:
        build(parse_recipe({**tiny_fields, "name": "other"}), package_copy)
    assert caught.value.exit_code == 4
    assert EnginePackage.open(package_copy).manifest.name == "tiny"
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


@pytest.mark.parametrize(
    "step", ["exporting the encoder", "calibrating thresholds", "reference", "accuracy gate of fp32"]
)
def test_ctrl_c_at_any_step_leaves_the_previous_package(
    tiny_fields: dict[str, Any], package_copy: Path, step: str
) -> None:
    def interrupt(now: str, done: int, of: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(parse_recipe({**tiny_fields, "name": "other"}), package_copy, interrupt)
    assert EnginePackage.open(package_copy).manifest.name == "tiny"
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


def test_disk_full_during_export(
    tiny_fields: dict[str, Any], package_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
        build(parse_recipe(tiny_fields), package_copy)
    assert EnginePackage.open(package_copy).manifest.name == "tiny"


def test_a_torch_that_exports_otherwise_is_noticed(
    tiny_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decomposed(self: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias

    monkeypatch.setattr("open_clip.transformer.LayerNorm.forward", decomposed)
    with pytest.raises(BackendError, match="0 LayerNormalization operators, not 12"):
        build(parse_recipe(tiny_fields), tmp_path / "x.dapo")
    assert not list(tmp_path.iterdir())


def test_thresholds_from_a_folder_of_good_parts(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    rng = np.random.default_rng(0)
    for index in range(9):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(good / f"{index}.png")
    fields = {**tiny_fields, "thresholds": {"frames": str(good)}, "gate": {"frames": str(good), "count": 1}}
    thresholds = build(parse_recipe(fields), tmp_path / "x.dapo").thresholds()
    assert (thresholds.frames, thresholds.source) == (9, str(good))
    for path in sorted(good.iterdir())[:4]:
        path.unlink()
    with pytest.raises(RecipeError, match="holds 5 frames of good parts, thresholds need 8"):
        build(parse_recipe(fields), tmp_path / "y.dapo")
    with pytest.raises(RecipeError, match="does not exist"):
        build(parse_recipe({**fields, "thresholds": {"frames": str(tmp_path / "none")}}), tmp_path / "y.dapo")


def test_batched_package(tiny_fields: dict[str, Any], package: EnginePackage, tmp_path: Path, picture: Any) -> None:
    from dapo_edge.backends.openvino import OpenVinoBackend

    batched = build(parse_recipe({**tiny_fields, "batch": 2, "thresholds": {}}), tmp_path / "x.dapo")
    views = [picture, picture[::-1], picture[:, ::-1]]
    with OpenVinoBackend.open(batched, map_size="model") as two, OpenVinoBackend.open(package, map_size="model") as one:
        together = two.infer(views)
        single = [one.infer([view]) for view in views]
    assert together.anomaly.shape == (3, 96, 96)
    for index, batch in enumerate(single):
        np.testing.assert_allclose(together.anomaly[index], batch.anomaly[0], atol=1e-5)
        assert together.image_scores[index] == pytest.approx(batch.image_scores[0], abs=1e-5)
