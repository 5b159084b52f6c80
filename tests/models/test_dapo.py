"""The method: words in, bank out; files of tuned parameters in both formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_edge.config import parse_recipe
from dapo_edge.errors import RecipeError
from dapo_edge.models import checkpoints
from dapo_edge.models.clip import Clip, load_clip
from dapo_edge.models.dapo import Dapo, DapoOptions
from dapo_edge.models.method import METHODS, method_class
from dapo_edge.prompt_bank import PromptBank


@pytest.fixture(scope="module")
def clip(tiny_config: Path) -> Clip:
    return load_clip(str(tiny_config), seed=1)


@pytest.fixture(scope="module")
def dapo(clip: Clip) -> Dapo:
    return Dapo(clip, options=DapoOptions(groups=2), feature_layers=(2, 5), seed=3)


def released_checkpoint(dapo: Dapo, keys: int) -> dict[str, Any]:
    """The published file: numpy scalars beside the tensors, a dead meta_net, either spelling of the parts."""
    own = dapo.tensors()
    prompts = {
        "learnable_normal_tokens": own.normal_context,
        "learnable_abnormal_tokens": own.abnormal_context,
        **{f"learnable_layer_tokens.{i}": tokens for i, tokens in enumerate(own.text_tokens)},
        "meta_net.0.weight": torch.zeros(2, 2),
    }
    adapter = {f"fc.{i}.weight": weight for i, weight in enumerate(own.adapter_weight)}
    adapter |= {f"fc.{i}.bias": bias for i, bias in enumerate(own.adapter_bias)}
    return {
        "epoch": 0,
        checkpoints.RELEASED_KEYS["prompts"][keys]: prompts,
        checkpoints.RELEASED_KEYS["visual"][keys]: {"learnable_visual_tokens": own.visual_tokens},
        checkpoints.RELEASED_KEYS["adapter"][keys]: adapter,
        "train_loss": np.float64(2.19),
        "train_image_loss": np.float64(0.34),
    }


def bank_of(dapo: Dapo, fields: dict[str, Any]) -> PromptBank:
    prompts = parse_recipe(fields).prompts
    return dapo.bank(prompts.defects, prompts.object)


def assert_same(a: checkpoints.DapoTensors, b: checkpoints.DapoTensors) -> None:
    for name in checkpoints.FREE_AXES:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_bank_binds_rows_to_names(dapo: Dapo, tiny_fields: dict[str, Any]) -> None:
    words = ["scratch", {"glue": "dried glue strip"}, "wrong place"]
    bank = bank_of(dapo, {**tiny_fields, "prompts": {"defects": words}})
    turned = bank_of(dapo, {**tiny_fields, "prompts": {"defects": words[::-1]}})
    assert bank.names == ("normal", "scratch", "glue", "wrong place")
    assert bank.phrases == ("flawless", "scratch", "dried glue strip", "wrong place")
    np.testing.assert_allclose(bank.rows[1:], turned.rows[:0:-1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(bank.rows, axis=1), 1, atol=1e-6)


def test_a_word_longer_than_the_context_is_refused(dapo: Dapo, tiny_fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"has \d+ tokens, the text tower of tiny-test-clip reads 77"):
        bank_of(dapo, {**tiny_fields, "prompts": {"defects": ["very long defect " * 30]}})


def test_own_file_round_trip(dapo: Dapo, clip: Clip, tmp_path: Path) -> None:
    dapo.save(tmp_path / "tuned.safetensors")
    tuned = checkpoints.read(tmp_path / "tuned.safetensors")
    assert_same(tuned.tensors, dapo.tensors())
    assert (tuned.tuning.readout, tuned.tuning.feature_layers) == ("eot", (2, 5))
    assert (tuned.tuning.temperature, tuned.tuning.image_size) == (0.07, 64)
    loaded = Dapo(clip, tuned, seed=99)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image)[0], dapo(image)[0])
    assert loaded.tuned


@pytest.mark.parametrize("spelling", [0, 1])
def test_released_file_of_both_spellings(dapo: Dapo, tmp_path: Path, spelling: int) -> None:
    torch.save(released_checkpoint(dapo, spelling), tmp_path / "epoch_1.pth")
    tuned = checkpoints.read(tmp_path / "epoch_1.pth")
    assert_same(tuned.tensors, dapo.tensors())
    assert (tuned.tuning.readout, tuned.tuning.feature_layers) == ("release", None)


def test_a_pickle_with_code_inside_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"prompt_learner": Trap()}, tmp_path / "epoch_1.pth")
    with pytest.raises(RecipeError, match="not a released DAPO checkpoint"):
        checkpoints.read(tmp_path / "epoch_1.pth")
    assert not (tmp_path / "sprung").exists()


def test_damaged_and_foreign_files_are_refused(dapo: Dapo, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        checkpoints.read(tmp_path / "none.safetensors")
    dapo.save(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-100])
    with pytest.raises(RecipeError, match="can't be read"):
        checkpoints.read(tmp_path / "cut.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match="no tuned DAPO parameters"):
        checkpoints.read(tmp_path / "other.safetensors")


def test_tuned_file_must_fit_backbone_layers_and_readout(
    dapo: Dapo, clip: Clip, tiny_fields: dict[str, Any], tmp_path: Path
) -> None:
    dapo.save(tmp_path / "tuned.safetensors")
    tuned = checkpoints.read(tmp_path / "tuned.safetensors")
    with pytest.raises(RecipeError, match=r"belongs to feature layers \[2, 5\], not \[1, 5\]"):
        Dapo(clip, tuned, feature_layers=(1, 5))
    small = load_clip("surface-tiny")
    with pytest.raises(RecipeError, match="belongs to tiny-test-clip with other weights than surface-tiny"):
        Dapo(small, tuned)
    with pytest.raises(RecipeError, match=r"other weights than tiny-test-clip, seeded \(8\)"):
        Dapo(load_clip(clip.name, seed=8), tuned)
    unnamed = checkpoints.Tuned(tuned.tensors, checkpoints.Tuning(readout="eot"))
    with pytest.raises(RecipeError, match=r"does not fit surface-tiny: .*visual_tokens is \[5, 4, 64\]"):
        Dapo(small, unnamed)
    fields = {**tiny_fields, "feature_layers": None, "options": {}}
    fields["prompts"] = {"defects": ["a"], "tuned": str(tmp_path / "tuned.safetensors"), "readout": "release"}
    with pytest.raises(RecipeError, match="was tuned with readout 'eot', the recipe says 'release'"):
        Dapo.from_recipe(parse_recipe(fields), clip)


def test_options_beside_a_tuned_file_must_be_its_own(dapo: Dapo, clip: Clip, tmp_path: Path) -> None:
    dapo.save(tmp_path / "tuned.safetensors")
    tuned = checkpoints.read(tmp_path / "tuned.safetensors")
    assert Dapo(clip, tuned, options=DapoOptions(groups=2)).temperature == 0.07
    with pytest.raises(RecipeError, match="the recipe's option groups is 9, the tuned file has 2"):
        Dapo(clip, tuned, options=DapoOptions(groups=9))


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ([], "does not say rightly"),
        ({"readout": "last"}, "does not say rightly"),
        ({"readout": "eot", "feature_layers": "2, 5"}, "does not say rightly"),
        ({}, "does not say rightly"),
    ],
)
def test_tuned_files_of_odd_content(dapo: Dapo, tmp_path: Path, tuning: object, message: str) -> None:
    from safetensors.torch import save_file

    tensors = {name: getattr(dapo.tensors(), name).contiguous() for name in checkpoints.FREE_AXES}

    def metadata(tuning: object) -> dict[str, str]:
        return {"dapo": json.dumps({"format": checkpoints.FORMAT, "tuning": tuning})}

    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata(tuning))
    with pytest.raises(RecipeError, match=message):
        checkpoints.read(tmp_path / "x.safetensors")
    fine = metadata({"readout": "eot"})
    broken = {**tensors, "adapter_bias": torch.full((2, 48), float("nan"))}
    save_file(broken, tmp_path / "x.safetensors", metadata=fine)
    with pytest.raises(RecipeError, match=r"adapter_bias in .* holds values that are not numbers"):
        checkpoints.read(tmp_path / "x.safetensors")
    save_file({**tensors, "normal_context": torch.zeros(3, 5, 32)}, tmp_path / "x.safetensors", metadata=fine)
    with pytest.raises(RecipeError, match="normal context"):
        checkpoints.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layers", [(0, 2), (2, 9), (3, 3), (4, 2)])
def test_impossible_feature_layers(clip: Clip, layers: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="not rising block numbers"):
        Dapo(clip, feature_layers=layers)


def test_unknown_option_and_method(clip: Clip, tiny_fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'grups' \(did you mean 'groups'\?\)"):
        Dapo.from_recipe(parse_recipe({**tiny_fields, "options": {"grups": 3}}), clip)
    with pytest.raises(RecipeError, match="Did you mean 'dapo'"):
        method_class("dappo")
    assert set(METHODS) == {"dapo"}


def test_no_visual_tokens_is_the_plain_tower(clip: Clip) -> None:
    plain = Dapo(clip, options=DapoOptions(visual_tokens=0), feature_layers=(5,))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(plain(image)[1], clip.visual(image), atol=1e-5)


def test_the_text_tower_follows_to_another_type(tiny_config: Path) -> None:
    method = Dapo(load_clip(str(tiny_config)), options=DapoOptions(groups=1)).double()
    assert method.clip.text.token_embedding.weight.dtype == torch.float64
    assert method.clip.visual.proj.dtype == torch.float64
    rows = method.prompts(method.clip, ["hole"], "object", "eot")
    assert rows.dtype == torch.float64
