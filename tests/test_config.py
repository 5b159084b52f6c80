"""Recipes: every mistake is named, with the nearest valid key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapo_edge.config import PARTS, load_recipe, parse_recipe, recipe_schema
from dapo_edge.errors import RecipeError
from dapo_edge.sections import parse_yaml

VALID: dict[str, Any] = {"name": "a", "backbone": {"model": "ViT-B-16"}, "prompts": {"defects": ["scratch"]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methd": "dapo"}, r"unknown key 'methd' \(did you mean 'method'\?\)"),
        (
            {"backbone": {"model": "x", "pretraned": "y"}},
            r"unknown key 'backbone.pretraned' \(did you mean 'pretrained'",
        ),
        ({"image_size": "large"}, "'image_size' is 'large': input should be a valid integer"),
        ({"precision": "int4"}, "'precision' is 'int4'"),
        ({"name": "a/b"}, "'name' is 'a/b'"),
        ({"prompts": {"defects": []}}, "'prompts.defects'"),
        ({"prompts": {"defects": ["a", "a"]}}, "given twice: a"),
        ({"prompts": {"defects": ["normal"]}}, "'normal' is the name of the bank's first row"),
        ({"prompts": {"defects": [3]}}, "'prompts.defects.0' is 3"),
        ({"map": {"size": [640, 0]}}, "must lie in 1"),
        ({"map": {"smoothing_px": -1}}, "'map.smoothing_px' is -1"),
        ({"backbone": {"model": "x", "pretrained": "y", "checkpoint": "z"}}, "not both"),
        ({"backbone": None}, "'backbone' is None"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**VALID, **change})


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"seed.*methd"):
        parse_recipe({**VALID, "methd": 1, "seed": -1})


def test_missing_keys_are_named() -> None:
    with pytest.raises(RecipeError, match="the key 'prompts' is missing"):
        parse_recipe({"name": "a", "backbone": {"model": "x"}})


def test_defects_take_words_and_phrases() -> None:
    recipe = parse_recipe({**VALID, "prompts": {"defects": [" cut ", {"glue": "dried glue"}]}})
    assert [(defect.name, defect.phrase) for defect in recipe.prompts.defects] == [
        ("cut", "cut"),
        ("glue", "dried glue"),
    ]


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: a\nbackbone: {model: own.json, checkpoint: w/x.pt}\nprompts: {defects: [a], tuned: t.safetensors}\n"
        "thresholds: {frames: good}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.backbone.model == str(tmp_path / "own.json")
    assert recipe.backbone.checkpoint == tmp_path / "w/x.pt"
    assert recipe.prompts.tuned == tmp_path / "t.safetensors"
    assert recipe.thresholds.frames == str(tmp_path / "good")
    assert recipe.gate.frames == "synthetic"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no keys"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"- 1", "holds no keys"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / "none.yaml")


def test_merge_keys_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    text = (
        "name: a\nbackbone: {model: x}\nprompts: {defects: [größe]}\n"
        "map:\n  <<: {smoothing_px: 2, score: max}\n  score: top\n"
    )
    (tmp_path / "r.yaml").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.map.smoothing_px, recipe.map.score) == (2.0, "top")
    assert recipe.prompts.defects[0].name == "größe"


def test_yaml_as_people_mean_it(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: a\nbackbone: {model: x}\nprompts: {defects: [2024-01-01, {cut: 2024-01-02}]}\n"
        "thresholds: {false_reject_rate: 1e-2}\noptions:\nmap:\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.thresholds.false_reject_rate == 0.01
    assert [defect.phrase for defect in recipe.prompts.defects] == ["2024-01-01", "2024-01-02"]
    for text in ("a: !!binary aGVsbG8=", "? [1]\n: x", "a: &a [*a]", "= : 1", "seed: 0x" + "f" * 6000):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError):
            load_recipe(tmp_path / "r.yaml")


def test_schema_describes_every_key() -> None:
    schema = json.loads(recipe_schema())
    assert {"name", "method", "backbone", "prompts", "map", "gate"} <= schema["properties"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": "518"}, "'image_size' is '518': input should be a valid integer"),
        ({"batch": 2.5}, "'batch' is 2.5"),
        ({"seed": True}, "'seed' is True"),
        ({"prompts": {"defects": [{"a": " "}]}}, "it holds no word"),
        ({"prompts": {"defects": ["cut <end_of_text>"]}}, "can't contain '<'"),
        ({"map": {"smoothing_px": float("inf")}}, "'map.smoothing_px'"),
        ({"map": {"smoothing_px": float("nan")}}, "'map.smoothing_px'"),
    ],
)
def test_values_that_only_look_right(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**VALID, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "the key name is given twice"),
        ("name: 2020-13-45\n", "the key 'backbone' is missing"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply|not valid YAML"),
        ("name: a\nbackbone: {model: x}\nprompts: {defects: [a], tuned: ~nosuchuser/x}\n", None),
    ],
)
def test_odd_yaml(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "r.yaml").write_text(text)
    if message is None:
        assert load_recipe(tmp_path / "r.yaml").prompts.tuned is not None
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def doubled(times: int) -> str:
    """A list of two to the power of `times` ones, as aliases of aliases."""
    return "a0: &a0 1\n" + "".join(
        f"a{number + 1}: &a{number + 1} [*a{number}, *a{number}]\n" for number in range(times)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (doubled(60), "it stands for more than 50000 values (line "),
        ("seed: &a [" + "1, " * 20 + "]\nx: [" + "*a, " * 3000 + "]\n", "it stands for more than 50000 values (line 2"),
        ("x: [" + "1," * 400_000 + "]\n", "it stands for more than 50000 values (line 1"),
        ("name: &a [*a]\n", "it contains itself (line 1, column 11)"),
        ("&a\nname: x\nprompts: *a\n", "it contains itself (line 3, column 10)"),
        ("&a\n<<: *a\nname: x\n", "it contains itself (line 2, column 5)"),
        ("x: " + "[" * 120 + "]" * 120, "it is nested too deeply (line 1, column 10"),
        (f"a: &a {'[' * 60}1{']' * 60}\nb: {'[' * 60}*a{']' * 60}", "it is nested too deeply (line 2"),
        ("".join(f"key{number}: 1\n" for number in range(10_000)), "'key40' (valid keys are"),
    ],
)
def test_bombs_are_refused_at_once_in_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    started = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert time.perf_counter() - started < 10
    assert message in str(caught.value)
    assert len(str(caught.value)) < 20_000
    assert caught.value.exit_code == 2


def test_aliases_are_fine_where_they_stand_for_little(tmp_path: Path) -> None:
    text = "name: a\nbackbone: &b {model: x}\nprompts: {defects: &d [cut, dent]}\n"
    (tmp_path / "r.yaml").write_text(text + "map: &m {smoothing_px: 2}\n")
    assert len(load_recipe(tmp_path / "r.yaml").prompts.defects) == 2
    assert parse_yaml(doubled(10))["a10"][0] == parse_yaml(doubled(9))["a9"]


def test_of_many_mistakes_the_first_are_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'k0'.*; and 153 more\. See the valid keys"):
        parse_recipe({**VALID, **{f"k{number}": 1 for number in range(203)}})


def test_a_tuning_plan_has_a_default_for_everything() -> None:
    plan = parse_recipe(VALID).tuning
    assert parse_recipe({**VALID, "tuning": {}}).tuning == parse_recipe({**VALID, "tuning": None}).tuning == plan
    assert (plan.data, plan.layout, plan.precision) == ("synthetic", "folder", "fp32")
    assert [stage.learn for stage in plan.stages] == [PARTS], "everything learns at once, as published"
    assert plan.stages[0].learning_rate == 1e-3


def test_a_wrong_item_is_not_counted_as_a_missing_one() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**VALID, "tuning": {"stages": [{"epoch": 2}]}})
    assert caught.value.cause == "recipe: unknown key 'tuning.stages.0.epoch' (did you mean 'epochs'?)"


def test_a_stage_table() -> None:
    stages = [{"learn": ["context"], "epochs": 2}, {"learn": ["adapters", "visual_tokens"], "learning_rate": 1e-4}]
    plan = parse_recipe({**VALID, "tuning": {"stages": stages}}).tuning
    assert [(stage.learn, stage.epochs, stage.learning_rate) for stage in plan.stages] == [
        (("context",), 2, 1e-3),
        (("adapters", "visual_tokens"), 5, 1e-4),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, r"unknown key 'tuning.epochs'"),
        ({"bach": 3}, r"unknown key 'tuning.bach' \(did you mean 'batch'"),
        ({"stages": []}, r"'tuning.stages' is \[\]: list should have at least 1 item"),
        ({"stages": [{"learn": []}]}, "'tuning.stages.0.learn'"),
        ({"stages": [{"learn": ["context", "context"]}]}, "a part is named twice"),
        ({"stages": [{}, {"learn": ["adaptors"]}]}, "'tuning.stages.1.learn.0' is 'adaptors'"),
        ({"stages": [{"epochs": 0}]}, "'tuning.stages.0.epochs' is 0"),
        ({"stages": [{"learning_rate": 0}]}, "'tuning.stages.0.learning_rate' is 0"),
        ({"stages": [{"learning_rate": float("nan")}]}, "'tuning.stages.0.learning_rate'"),
        ({"stages": [{"learning_rate": 2}]}, "'tuning.stages.0.learning_rate' is 2"),
        ({"stages": [{"epoch": 2}]}, r"unknown key 'tuning.stages.0.epoch' \(did you mean 'epochs'"),
        ({"validation": 0}, "'tuning.validation' is 0"),
        ({"validation": 0.9}, "'tuning.validation' is 0.9"),
        ({"images": 7}, "'tuning.images' is 7"),
        ({"precision": "fp16"}, "'tuning.precision' is 'fp16'"),
        ({"categories": []}, "'tuning.categories'"),
        ({"categories": "bottle"}, "'tuning.categories' is 'bottle'"),
        ({"data": ""}, "'tuning.data'"),
        ({"loss_px": 4}, "'tuning.loss_px' is 4"),
        ({"seed": -1}, "'tuning.seed' is -1"),
    ],
    ids=str,
)
def test_mistakes_in_a_tuning_plan(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**VALID, "tuning": change})


def test_pictures_to_tune_on_lie_relative_to_the_recipe(tmp_path: Path) -> None:
    text = "name: a\nbackbone: {model: x}\nprompts: {defects: [a]}\ntuning: {data: %s}\n"
    for written, read in (("pictures", str(tmp_path / "pictures")), ("synthetic", "synthetic"), ("/data", "/data")):
        (tmp_path / "r.yaml").write_text(text % written)
        assert load_recipe(tmp_path / "r.yaml").tuning.data == read


@pytest.mark.parametrize("noun", ["object <end_of_text>", "   ", "a\tb\x07"])
def test_the_object_is_words_too(noun: str) -> None:
    with pytest.raises(RecipeError, match=r"prompts\.object"):
        parse_recipe(VALID | {"prompts": {"defects": ["scratch"], "object": noun}})


def test_two_names_for_the_same_words_are_refused() -> None:
    with pytest.raises(RecipeError, match="nothing could tell them apart"):
        parse_recipe(VALID | {"prompts": {"defects": ["scratch", {"kratzer": "scratch"}]}})


def test_a_folder_may_be_called_synthetic_something(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(VALID | {"tuning": {"data": "synthetic-parts"}}))
    assert load_recipe(tmp_path / "r.yaml").tuning.data == str(tmp_path / "synthetic-parts")
    with pytest.raises(RecipeError, match="use 'synthetic' or a folder"):
        parse_recipe(VALID | {"tuning": {"data": "synthetic://640x480"}})
