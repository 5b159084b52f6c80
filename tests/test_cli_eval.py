"""`dapo-edge eval` as a user meets it: streams, exit codes, and the figures of step 2's protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from test_cli import dapo_edge, refused

import dapo_edge as package_of_ours
from dapo_edge.config import LayoutName, load_recipe
from dapo_edge.data.dataset import FileSet
from dapo_edge.data.layouts import LAYOUTS
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.data.synth import write_dataset
from dapo_edge.engine.build import map_spec
from dapo_edge.evaluation.evaluate import DataSet, evaluate
from dapo_edge.evaluation.features import Features, metrics_of
from dapo_edge.evaluation.subject import Subject
from dapo_edge.models.method import method_of
from dapo_edge.package import EnginePackage
from dapo_edge.terminal import LAYOUT_NAMES
from dapo_edge.training.views import ViewStore

RECIPE = Path(package_of_ours.__file__).parent / "assets" / "surface-tiny.yaml"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    write_dataset(out, "mvtec_ad", 60, 3, size=(160, 120))
    return out


def test_the_command_line_knows_every_layout() -> None:
    assert set(LAYOUT_NAMES) == set(LAYOUTS) == set(get_args(LayoutName))


def test_document_table_and_report(package: EnginePackage, generated: Path, tmp_path: Path) -> None:
    common = (
        "eval",
        package.path,
        "--dataset",
        "mvtec_ad",
        "--root",
        generated,
        "--category",
        "wood",
        "--category",
        "glass",
    )
    done = dapo_edge(*common, "--report", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "r" / "eval.json").read_text())
    assert list(found["categories"]) == ["glass", "wood"]
    assert found["schema"] == "dapo-edge eval 1"
    assert 0 <= found["mean"]["pixel_auroc"] <= 1
    assert (tmp_path / "r" / "report.html").stat().st_size > 50_000
    again = dapo_edge(*common, "--report", tmp_path / "r", "--compare", package.path, "--compare-backend", "eager")
    assert again.returncode == 0, again.stderr
    assert "no verdicts: no thresholds" in again.stdout
    assert "no verdicts to compare" in again.stdout, "seeded weights decide nothing"
    assert json.loads((tmp_path / "r" / "eval.json").read_text())["compare"]["flips"]["score_difference_max"] < 1e-4
    assert "evaluating" in again.stderr, "the second subject is new"
    assert f"report: {tmp_path / 'r' / 'report.html'}" in again.stderr


def test_what_can_not_be_evaluated_is_refused(package: EnginePackage, generated: Path, tmp_path: Path) -> None:
    common = ("eval", package.path, "--dataset", "mvtec_ad", "--root")
    refused(2, "there is no folder", result=dapo_edge(*common, tmp_path / "nowhere"))
    refused(2, "no category 'wod'. Did you mean 'wood'?", result=dapo_edge(*common, generated, "--category", "wod"))
    refused(3, "is not", result=dapo_edge("eval", generated, *common[2:], generated))
    refused(
        1, "can't be written", result=dapo_edge(*common, generated, "--report", generated / "wood/test/good/000.png")
    )
    refused(
        2,
        "eager torch, fp32, not 'openvino'",
        result=dapo_edge("eval", RECIPE, "--backend", "openvino", *common[2:], generated),
    )
    refused(2, "need a second package", result=dapo_edge(*common, generated, "--compare-precision", "fp16"))


def test_an_image_that_can_not_be_used_shows_in_the_exit_code(package: EnginePackage, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", "folder", 5, 1, size=(64, 64))
    (category,) = [path for path in (tmp_path / "set").iterdir() if path.is_dir()]
    (category / "good" / "broken.png").write_bytes(b"nothing")
    done = dapo_edge("eval", package.path, "--dataset", "folder", "--root", tmp_path / "set", "--workers", 0, "--json")
    refused(5, "1 of 6 images can't be used", "broken.png", result=done)
    found = json.loads(done.stdout)
    assert found["failed"][0]["image"].endswith("broken.png")
    assert found["mean"]["images"] == 5


def test_it_equals_the_figures_of_tuning_and_of_the_protocol(tmp_path: Path) -> None:
    """Files on disk through the package's arithmetic, against the pictures in memory through tuning's."""
    write_dataset(tmp_path / "set", "mvtec_ad", 75, 9, size=(160, 120))
    data = DataSet.read("mvtec_ad", tmp_path / "set", ["leather", "circuit_board", "glass"])
    assert {name.replace("_", " ") for name in data.categories} == set(surfaces_v1().new_materials)
    recipe = load_recipe(RECIPE)
    method = method_of(recipe)
    names = ("normal", *(defect.name for defect in recipe.prompts.defects))
    with Subject.open(RECIPE) as subject:
        results = evaluate([subject], data)[0]
    for category, samples in data.categories.items():
        store = ViewStore(FileSet(samples, names), method.image_size)
        features = Features(method, store, frozen=False)
        expected = metrics_of(
            method, features, range(len(samples)), names[1:], recipe.prompts.object, map_spec(recipe, method)
        ).as_json()
        found = results[category].metrics
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == (value if value is None else pytest.approx(value, abs=1e-3)), (category, name)


def test_help_names_what_there_is() -> None:
    from dapo_edge.cli import commands

    text = CliRunner().invoke(commands, ["eval", "--help"]).output
    for word in ("--compare", "--words", "--report", "real_iad", "PACKAGE|RECIPE"):
        assert word in text
