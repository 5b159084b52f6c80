"""INT8 from recipe to package: what is searched, what is given back, and what happens when the gate refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import has_fast_type
from PIL import Image

from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.calibration.run import calibrate
from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.data.surfaces import make_surface
from dapo_edge.data.synth import write_dataset
from dapo_edge.engine.build import REFUSED, build
from dapo_edge.engine.int8 import fewest
from dapo_edge.errors import GateError, RecipeError
from dapo_edge.models.method import Method, method_of
from dapo_edge.package import ENCODER_INT8, QUANTIZATION, REPORT_PAGE, EnginePackage, PackageWriter
from dapo_edge.quantization import Quantization

# Seeded weights: probabilities are nearly equal everywhere, so the type of a pixel follows the smallest difference.
LOOSE = {"count": 6, "min_type_agreement": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _no_plots() -> Iterator[None]:
    """Drawing takes a fifth of a small build; test_package_report.py looks at what is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dapo_edge.engine.package_plots.as_svg", lambda *figure, **options: "<svg></svg>")
        yield


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small pictures: drawing large ones takes longer than all that is done with them."""
    found = {}
    for purpose, first, count in (("calibration", 0, 8), ("gate", 100, 6)):
        folder = tmp_path_factory.mktemp(purpose)
        for number in range(first, first + count):
            picture = make_surface(number, (120, 90), good_share=0.5).image
            Image.fromarray(picture[..., ::-1]).save(folder / f"{number}.png")
        found[purpose] = str(folder)
    return found


@pytest.fixture(scope="module")
def int8_fields(tiny_fields: dict[str, Any], frames: dict[str, str]) -> dict[str, Any]:
    return {
        **tiny_fields,
        "precision": "int8",
        "calibration": {"frames": frames["calibration"], "count": 8, "estimator": "percentile", "migration": 0.5},
        "thresholds": {"frames": frames["calibration"]},
        "gate": {**LOOSE, "frames": frames["gate"]},
    }


@pytest.fixture(scope="module")
def quantized(int8_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    return build(parse_recipe(int8_fields), tmp_path_factory.mktemp("int8") / "tiny.dapo")


@pytest.mark.parametrize("needed", [*range(9), None])
def test_as_few_blocks_as_needed_are_given_back(needed: int | None) -> None:
    tried: list[int] = []

    def passes(count: int) -> bool:
        tried.append(count)
        return needed is not None and count >= needed

    assert fewest(8, passes) == needed
    assert len(tried) == len(set(tried)) <= 7
    assert all(0 <= count <= 8 for count in tried)


def test_a_package_in_int8(quantized: EnginePackage) -> None:
    manifest, quantization = quantized.manifest, quantized.quantization()
    assert manifest.precision == "int8"
    assert len(quantization.ranges) == 4 * 5
    assert set(quantization.migrations) == {f"block{b}.{role}" for b in range(1, 6) for role in ("qkv", "out", "fc1")}
    assert quantized.encoder_path("int8").stat().st_size < 0.5 * quantized.encoder_path("fp32").stat().st_size
    report = quantized.report()
    assert list(report["precisions"]) == ["fp32", *["fp16"] * has_fast_type(), "int8"]
    found = report["precisions"]["int8"]
    assert found["runs_as"].startswith("int8+")
    assert 0 < found["map_difference_max"] < 0.3
    assert found["failed"] == []
    assert report["quantization"]["attempts"] == [{"given_back": 0, "failed": []}]
    assert len(report["quantization"]["candidates"]) == 3
    assert [entry["block"] for entry in report["quantization"]["sensitivity"]] == [1, 2, 3, 4, 5]
    assert report["quantization"]["emulation_difference"] < 1e-3
    never = {entry["what"]: entry["count"] for entry in report["quantization"]["left_in_float"]}
    assert never == {
        "patch embedding": 1,
        "residual sums": 10,
        "LayerNorms": 12,
        "softmaxes": 5,
        "attention products": 10,
        "adapters and projection": 4,
    }
    page = (quantized.path / REPORT_PAGE).read_text(encoding="utf-8")
    assert "block1" in page
    assert "<svg" in page


def test_it_runs_in_every_precision_of_the_cpu(quantized: EnginePackage, picture: Any) -> None:
    with (
        OpenVinoBackend.open(quantized, map_size="model") as own,
        OpenVinoBackend.open(quantized, map_size="model", precision="fp32") as fp32,
    ):
        assert (own.precision.split("+")[0], fp32.precision) == ("int8", "fp32")
        difference = np.abs(own.infer([picture]).anomaly - fp32.infer([picture]).anomaly)
    assert 0 < difference.max() < 0.1


def test_a_package_without_int8_says_so(package: EnginePackage) -> None:
    with pytest.raises(RecipeError, match=r"holds no INT8 encoder.*precision: int8, or auto"):
        OpenVinoBackend.open(package, map_size="model", precision="int8")
    with pytest.raises(RecipeError, match="holds no INT8 encoder"):
        package.quantization()


@pytest.mark.slow
def test_same_recipe_gives_the_same_int8(quantized: EnginePackage, int8_fields: dict[str, Any], tmp_path: Path) -> None:
    again = build(parse_recipe(int8_fields), tmp_path / "again.dapo")
    for name in (ENCODER_INT8, QUANTIZATION):
        assert again.manifest.files[name] == quantized.manifest.files[name], name


def test_ranges_from_a_file_are_not_measured_again(
    quantized: EnginePackage, int8_fields: dict[str, Any], tmp_path: Path
) -> None:
    recipe = parse_recipe(int8_fields)
    path = calibrate(recipe).write(tmp_path / "tiny.ranges.json")
    steps: list[str] = []
    fields = {**int8_fields, "calibration": {**int8_fields["calibration"], "ranges": str(path)}}
    built = build(parse_recipe(fields), tmp_path / "x.dapo", lambda step, done, of: steps.append(step))
    assert "measuring activations" not in steps
    assert built.manifest.files[ENCODER_INT8] == quantized.manifest.files[ENCODER_INT8]
    with pytest.raises(RecipeError, match="image size 96 px, the encoder has 64 px"):
        build(parse_recipe({**fields, "image_size": 64}), tmp_path / "y.dapo")
    content = json.loads(path.read_text())
    content["linears"]["block1.qkv"]["estimates"]["max"] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="were edited or cut off"):
        build(parse_recipe(fields), tmp_path / "y.dapo")
    assert not (tmp_path / "y.dapo").exists()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, "names no calibration frames"),
        ({"frames": "synthetic", "keep": ["block6"]}, "'block6', which the encoder has not.*block1 to block5"),
        ({"frames": "synthetic", "keep": [f"block{b}" for b in range(1, 6)]}, "leaves nothing to quantise"),
        ({"frames": "/nowhere"}, "do not exist"),
        ({"frames": "synthetic", "ranges": "/nowhere.json"}, "can't be read"),
    ],
)
def test_recipes_that_cannot_be_calibrated(
    int8_fields: dict[str, Any], calibration: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = {**int8_fields, "calibration": {"count": 8, "estimator": "max", "migration": 0.0, **calibration}}
    with pytest.raises(RecipeError, match=message):
        build(parse_recipe(fields), tmp_path / "x.dapo")
    assert not list(tmp_path.iterdir())


def test_kept_linears_stay_in_float(int8_fields: dict[str, Any], tmp_path: Path) -> None:
    calibration = {**int8_fields["calibration"], "estimator": "max", "migration": 0.0}
    fields = {**int8_fields, "calibration": {**calibration, "keep": ["block2", "block4.fc1"]}}
    quantization = build(parse_recipe(fields), tmp_path / "x.dapo").quantization()
    assert set(quantization.kept) == {"block2.qkv", "block2.out", "block2.fc1", "block2.fc2", "block4.fc1"}
    assert set(quantization.kept.values()) == {"asked for in the recipe"}
    assert len(quantization.ranges) == 15


def test_what_the_gate_refuses_leaves_its_report_only(
    int8_fields: dict[str, Any], package_copy: Path, quantized: EnginePackage
) -> None:
    impossible = {**int8_fields, "gate": {**int8_fields["gate"], "max_map_difference": 1e-7}}
    before = EnginePackage.open(package_copy).digest
    with pytest.raises(GateError, match=r"precision int8 failed .*blocks that INT8 hurts most") as caught:
        build(parse_recipe(impossible), package_copy)
    assert caught.value.exit_code == 4
    page = package_copy.with_name(package_copy.name + REFUSED)
    assert str(page) in str(caught.value)
    assert "map difference" in page.read_text(encoding="utf-8")
    assert EnginePackage.open(package_copy).digest == before
    assert sorted(path.name for path in package_copy.parent.iterdir()) == [package_copy.name, page.name]
    build(parse_recipe({**int8_fields, "precision": "fp32"}), package_copy)
    assert not page.exists(), "the report of an older refusal would mislead"


def test_harmful_blocks_are_given_back_until_the_gate_passes(
    int8_fields: dict[str, Any], quantized: EnginePackage, tmp_path: Path
) -> None:
    """A limit between what all blocks and what fewer blocks in INT8 do to the mean of the map."""
    whole = quantized.report()["precisions"]["int8"]["map_difference_mean"]
    fields = {**int8_fields, "gate": {**int8_fields["gate"], "max_mean_map_difference": 0.8 * whole}}
    package = build(parse_recipe(fields), tmp_path / "x.dapo")
    report, quantization = package.report(), package.quantization()
    section = report["quantization"]
    assert section["attempts"][0]["failed"], "with all blocks it must fail"
    assert 1 <= len(section["given_back"]) <= 4
    with OpenVinoBackend.open(package, map_size="model"):
        pass  # few frames, near the limit: the first start on this machine must not refuse what the build let pass
    harms = {entry["block"]: entry["harm"] for entry in section["sensitivity"]}
    assert section["given_back"] == sorted(harms, key=lambda block: -harms[block])[: len(section["given_back"])]
    assert {name.split(".")[0] for name in quantization.kept} == {f"block{block}" for block in section["given_back"]}
    assert report["precisions"]["int8"]["map_difference_mean"] <= 0.8 * whole


def test_auto_takes_what_is_fastest_of_what_passes(
    int8_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**int8_fields, "precision": "auto"}
    milliseconds = {"fp32": 10.0, "fp16": 9.0, "int8": 5.0}

    def measured(backends: Any, view: Any) -> dict[str, float]:
        return {name: milliseconds[name] for name in backends}

    monkeypatch.setattr("dapo_edge.engine.build.encode_latencies", measured)
    fast = build(parse_recipe(fields), tmp_path / "fast.dapo")
    assert fast.manifest.precision == "int8"
    milliseconds["int8"] = 9.9
    slow = build(parse_recipe(fields), tmp_path / "slow.dapo")
    assert slow.manifest.precision == ("fp16" if has_fast_type() else "fp32"), "9.9 is not 5 % less than 9 or 10"
    assert ENCODER_INT8 in slow.manifest.files, "it passed: another device may find it faster"
    milliseconds["int8"] = 1.0
    strict = {**fields, "gate": {**int8_fields["gate"], "max_map_difference": 1e-5}}
    refused = build(parse_recipe(strict), tmp_path / "refused.dapo")
    assert refused.manifest.precision == "fp32"
    assert ENCODER_INT8 not in refused.manifest.files
    assert refused.report()["precisions"]["int8"]["failed"]
    if has_fast_type():
        with pytest.raises(GateError, match=r"precision fp16 of .*, when it was built, failed .*--precision fp32"):
            OpenVinoBackend.open(refused, map_size="model", precision="fp16")


def test_a_cpu_that_computes_int8_otherwise_is_found_out(quantized: EnginePackage, tmp_path: Path) -> None:
    """A saturating CPU's stand-in: the encoder of other scales, in a package that still says what the right one did."""
    quantization = quantized.quantization()
    wrong = Quantization(
        {name: 0.2 * reach for name, reach in quantization.ranges.items()}, {}, {}, quantization.weights, {}
    )
    with PackageWriter(tmp_path / "wrong.dapo") as writer:
        for name in quantized.manifest.files:
            writer.write(name, (quantized.path / name).read_bytes())
        writer.write(ENCODER_INT8, for_cpu(quantized.encoder_bytes(), wrong))
        package = writer.commit(quantized.manifest.model_dump(exclude={"files", "format"}))
    for _ in range(2):  # nothing that was refused is kept as compiled
        with pytest.raises(GateError, match=r"INT8 on this CPU .* failed .*--precision fp32"):
            OpenVinoBackend.open(package, map_size="model")
    with OpenVinoBackend.open(package, map_size="model", precision="fp32"):
        pass


@pytest.mark.slow
def test_a_runtime_fault_refuses_int8_and_is_no_matter_for_auto(
    int8_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_edge.engine.int8.emulation_difference", lambda *arguments: 0.01)
    with pytest.raises(GateError, match=r"OpenVINO computes the INT8 encoder otherwise .* 0.01 > 0.001"):
        build(parse_recipe(int8_fields), tmp_path / "x.dapo")
    assert [path.name for path in tmp_path.iterdir()] == ["x.dapo" + REFUSED]
    package = build(parse_recipe({**int8_fields, "precision": "auto"}), tmp_path / "x.dapo")
    assert package.manifest.precision != "int8"
    assert not package.holds_int8


def test_limits_hold_for_fp32_too(tiny_fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"precision fp32 failed .*mean map difference"):
        build(
            parse_recipe({**tiny_fields, "gate": {"count": 2, "max_mean_map_difference": 1e-12}}), tmp_path / "x.dapo"
        )


def test_drops_on_labelled_frames_count(
    int8_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of a data set on the disk; the INT8 encoder is made so coarse that pixel AUROC falls."""
    write_dataset(tmp_path / "parts", "folder", 40, 0, size=(96, 96))
    labelled = {
        **LOOSE,
        "frames": str(tmp_path / "parts"),
        "layout": "folder",
        "max_auroc_drop": 0,
        "max_aupro_drop": 0,
    }
    loose = {"max_map_difference": 1, "max_score_difference": 1, "max_mean_map_difference": 1, "min_type_agreement": 0}
    fields = {**int8_fields, "gate": {**labelled, **loose, "max_flips": 1, "count": 12}}
    monkeypatch.setattr("dapo_edge.engine.quantize.migrated_range", lambda limit, channels, migration: 0.02 * limit)
    first, *_ = build(parse_recipe(fields), tmp_path / "x.dapo").report()["quantization"]["attempts"]
    assert any("AUROC drops by" in reason or "AUPRO drops by" in reason for reason in first["failed"])


@pytest.mark.slow
def test_int8_in_batches_and_with_maps_of_the_frame(
    int8_fields: dict[str, Any], quantized: EnginePackage, picture: Any, tmp_path: Path
) -> None:
    fields = {**int8_fields, "batch": 2, "map": {**int8_fields["map"], "size": "frame"}}
    package = build(parse_recipe(fields), tmp_path / "x.dapo")
    views = [picture, picture[::-1], picture[:, ::-1]]
    with (
        OpenVinoBackend.open(package, map_size="model") as two,
        OpenVinoBackend.open(quantized, map_size="model") as one,
    ):
        together = two.infer(views).anomaly
        single = np.stack([one.infer([view]).anomaly[0] for view in views])
    assert np.abs(together - single).max() < 0.02, "other ranges by a rounding, the same encoder"
    with OpenVinoBackend.open(package, map_size="frame") as backend:
        assert backend.infer([picture]).anomaly.shape[1:] == picture.shape[:2]


def test_outliers_in_one_block_are_caught_and_recovered(
    int8_fields: dict[str, Any], quantized: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LayerNorm's gain x 300 on some channels, made up for behind it: the float encoder stays what it was."""
    monkeypatch.setattr("dapo_edge.engine.build.method_of", with_outliers)
    usual = quantized.report()["precisions"]["int8"]["map_difference_mean"]
    limits = {**int8_fields["gate"], "max_mean_map_difference": 2 * usual}
    scales = {"frames": int8_fields["calibration"]["frames"], "count": 8}
    found = {}
    for name, estimator, migration in (("max", "max", 0.0), ("migration", "max", 0.5)):
        calibration = {**scales, "estimator": estimator, "migration": migration}
        package = build(parse_recipe({**int8_fields, "calibration": calibration, "gate": limits}), tmp_path / name)
        found[name] = package.report()["quantization"]
    assert found["max"]["attempts"][0]["failed"], "maximum calibration must fail"
    assert found["max"]["given_back"] == [1], "and the search must find the block"
    assert found["migration"]["attempts"] == [{"given_back": 0, "failed": []}]


def with_outliers(recipe: Recipe) -> Method:
    method = method_of(recipe)
    block = method.clip.visual.transformer.resblocks[0]
    with torch.no_grad():
        for norm, weight in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):
            norm.weight[:4] *= 300
            norm.bias[:4] *= 300
            weight[:, :4] /= 300
    return method
