"""What is evaluated: packages on their backends, recipes, and what tells two subjects apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painted import write_folder

from dapo_edge.config import load_recipe, parse_recipe
from dapo_edge.engine.build import build
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation.evaluate import DataSet, evaluate
from dapo_edge.evaluation.subject import Subject
from dapo_edge.models.method import method_of
from dapo_edge.package import EnginePackage


def test_backends_of_a_package_agree_and_words_can_be_the_data_sets(package: EnginePackage, tmp_path: Path) -> None:
    data = DataSet.read("folder", write_folder(tmp_path))
    with Subject.open(package.path) as compiled, Subject.open(package.path, backend="eager") as eager:
        pair = [compiled, eager]
        own = evaluate(pair, data)
        for a, b in zip(own[0]["nut"].images, own[1]["nut"].images, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-5)
            assert a.highest == pytest.approx(b.highest, abs=1e-5)
            assert a.verdict == b.verdict == "unsure", "seeded weights decide nothing"
        assert own[0]["nut"].unnamed == {"rust": 3, "stain": 3}
        theirs = evaluate(pair, data, words="dataset")
        assert compiled.names == ("normal", "rust", "stain")
        assert not theirs[0]["nut"].unnamed
        assert np.sum(theirs[0]["nut"].confusion) == 6
        compiled.use_words(None)
        assert compiled.names == package.bank().names


def test_a_recipe_has_one_precision(tiny_config: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "x.yaml"
    recipe.write_text(f"name: x\nbackbone: {{model: {tiny_config}}}\nprompts: {{defects: [rust]}}\n")
    with pytest.raises(RecipeError, match="Build a package first"):
        Subject.open(recipe, precision="fp16")
    with Subject.open(recipe) as opened:
        assert opened.as_json()["backend"] == "eager"
        assert opened.as_json()["thresholds"] == {"image": None, "pixel": None}


def test_other_weights_are_another_subject(tiny_config: Path, tmp_path: Path) -> None:
    """Also where the words' rows stay the same: in tuning's first stage only adapters learn."""
    recipe = tmp_path / "x.yaml"
    text = f"name: x\nbackbone: {{model: {tiny_config}}}\nprompts: {{defects: [rust], tuned: t.safetensors}}\n"
    recipe.write_text(text.replace(", tuned: t.safetensors", ""))
    method = method_of(load_recipe(recipe))
    method.save(tmp_path / "t.safetensors")
    recipe.write_text(text)
    data = DataSet.read("folder", write_folder(tmp_path / "set", good=2, bad=1))
    with Subject.open(recipe) as before:
        first = evaluate([before], data, folder=tmp_path / "report")[0]["nut"]
    with torch.no_grad():
        for parameter in method.learnables()["adapters"]:
            parameter += 0.5
    method.save(tmp_path / "t.safetensors")
    with Subject.open(recipe) as after:
        assert after.digest != before.digest
        second = evaluate([after], data, folder=tmp_path / "report")[0]["nut"]
    assert not second.restored
    assert [image.highest for image in first.images] != [image.highest for image in second.images]


def test_new_words_need_the_prompts_that_the_package_was_built_with(
    tiny_fields: dict[str, Any], tmp_path: Path
) -> None:
    fields = {**tiny_fields, "gate": {"count": 1}, "thresholds": {"frames": None}}
    method = method_of(parse_recipe(fields))
    method.save(tmp_path / "t.safetensors")
    fields = {key: value for key, value in fields.items() if key != "options"}
    prompts = {**fields["prompts"], "tuned": str(tmp_path / "t.safetensors")}
    built = build(parse_recipe({**fields, "prompts": prompts}), tmp_path / "x.dapo")
    with Subject.open(built.path) as opened:
        opened.use_words(["rust"])
    with Subject.open(built.path, backend="eager") as eager:
        before = eager.digest
    with torch.no_grad():
        for parameter in method.learnables()["adapters"]:
            parameter += 0.5
    method.save(tmp_path / "t.safetensors")
    with Subject.open(built.path, backend="eager") as eager:
        assert eager.digest != before, "its adapters are not in the package"
    with torch.no_grad():
        for parameter in method.learnables()["context"]:
            parameter += torch.randn_like(parameter)
    method.save(tmp_path / "t.safetensors")
    with Subject.open(built.path) as opened, pytest.raises(RecipeError, match=r"is not what .* was built with"):
        opened.use_words(["rust"])
