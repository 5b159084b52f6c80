"""What ships: the reference model is as small as promised, and really sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dapo_edge
from dapo_edge.config import load_recipe, parse_recipe
from dapo_edge.data import protocol
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.engine.build import map_spec
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation.features import Features, metrics_of
from dapo_edge.models.clip import Clip, load_clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.training.views import ViewStore, World

ASSETS = Path(dapo_edge.__file__).parent / "assets"
WEIGHTS, TUNED = ASSETS / "surface-tiny-surfaces-v1.safetensors", ASSETS / "surface-tiny-dapo.safetensors"


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("surface-tiny", pretrained="surfaces-v1")


def test_the_reference_model_is_small(clip: Clip) -> None:
    assert WEIGHTS.stat().st_size <= 25e6
    parameters = sum(parameter.numel() for parameter in clip.visual.parameters())
    assert parameters <= 6e6
    tokens = 1 + (clip.image_size // clip.patch_size) ** 2
    # The products of a block with its 12 width² weights, and of queries with keys and weights with values.
    per_block = 12 * tokens * clip.width**2 + 2 * tokens**2 * clip.width
    assert clip.layers * per_block + tokens * 3 * clip.patch_size**2 * clip.width <= 3e9
    assert clip.trained


def test_another_tag_is_refused_and_the_bundled_one_named() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'surfaces-v1'"):
        load_clip("surface-tiny", pretrained="surface-v1")


def test_bundled_prompts_go_by_their_name(tmp_path: Path) -> None:
    copy = tmp_path / "own.yaml"
    copy.write_text((ASSETS / "surface-tiny.yaml").read_text())
    assert load_recipe(copy).prompts.tuned == TUNED
    assert load_recipe(ASSETS / "surface-tiny.yaml").prompts.tuned == TUNED


def test_the_demo_recipe_names_all_types_tuned_ones_first() -> None:
    names = tuple(defect.name for defect in load_recipe(ASSETS / "surface-tiny.yaml").prompts.defects)
    split = surfaces_v1()
    assert set(names) == set(DEFECTS)
    assert set(names[:12]) == set(split.tuned_defects)


def test_the_reference_model_sees_new_materials_and_novel_types(clip: Clip) -> None:
    recipe = load_recipe(ASSETS / "surface-tiny.yaml")
    method = Dapo.from_recipe(recipe, clip)
    split = surfaces_v1()
    first = protocol.FREE_FROM + 7
    for defects, least in ((split.tuned_defects, 0.9), (split.novel_defects, 0.85)):
        world = World(first, 48, clip.image_size, split.new_materials, defects)
        features = Features(method, ViewStore(world, clip.image_size), frozen=False)
        found = metrics_of(method, features, range(48), defects, "object", map_spec(recipe, method))
        assert found.pixel_auroc > least
        assert found.image_auroc > least
        assert found.type_accuracy > 2 * found.type_chance


def test_seeded_weights_are_still_to_be_had() -> None:
    recipe = parse_recipe(
        {"name": "x", "backbone": {"model": "surface-tiny", "pretrained": None}, "prompts": {"defects": ["hole"]}}
    )
    seeded = load_clip(recipe.backbone.model, seed=0)
    assert not seeded.trained
    assert not torch.equal(seeded.visual.proj, load_clip("surface-tiny", pretrained="surfaces-v1").visual.proj)
    assert np.isfinite(seeded.visual.proj.detach().numpy()).all()
