"""The opened towers against open_clip's own forward passes, and the models that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from dapo_edge.errors import DependencyMissing, RecipeError
from dapo_edge.models.clip import Clip, ImageEncoder, load_clip, resize_position


@pytest.fixture(scope="module")
def clip(tiny_config: Path) -> Clip:
    return load_clip(str(tiny_config), seed=1)


@torch.no_grad()
def test_image_tower_equals_open_clip(clip: Clip) -> None:
    encoder = ImageEncoder(clip.visual, clip.image_size, (2, 5), None)
    image = torch.randn(2, 3, 64, 64)
    taps, embedding = encoder(image)
    theirs = clip.visual.forward_intermediates(image, indices=[1, 4], output_fmt="NLC", normalize_intermediates=False)
    assert torch.allclose(embedding, theirs["image_features"], atol=1e-5)
    for mine, other in zip(taps, theirs["image_intermediates"], strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


@torch.no_grad()
def test_text_tower_equals_open_clip(clip: Clip) -> None:
    from dapo_edge.models.prompts import HybridPrompts

    width = clip.text.token_embedding.weight.shape[1]
    plain = HybridPrompts(torch.zeros(1, 0, width), torch.zeros(1, 0, width), torch.zeros(0, 4, width))
    rows = plain(clip, ["scratch"], "object", "eot")
    theirs = clip.text.encode_text(clip.tokenizer(["flawless object", "scratch anomaly object"]), normalize=True)
    assert torch.allclose(rows, theirs, atol=1e-5)


def test_seeded_weights_are_repeatable(tiny_config: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (load_clip(str(tiny_config), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.visual.proj, same.visual.proj)
    assert not torch.equal(one.visual.proj, other.visual.proj)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random numbers were disturbed"


def test_position_embedding_is_kept_at_its_own_size_and_resized_elsewhere() -> None:
    position = torch.randn(1 + 16, 8)
    assert torch.equal(resize_position(position, (4, 4)), position)
    larger = resize_position(position, (6, 6))
    assert larger.shape == (37, 8)
    assert torch.equal(larger[0], position[0])


def test_a_local_checkpoint_is_loaded(tiny_config: Path, tmp_path: Path) -> None:
    import open_clip

    source = load_clip(str(tiny_config), seed=9)
    torch.save(source.text.state_dict(), tmp_path / "weights.pt")
    loaded = load_clip(str(tiny_config), checkpoint=tmp_path / "weights.pt", seed=1)
    assert torch.equal(loaded.visual.proj, source.visual.proj)
    assert (loaded.weights, loaded.trained, source.trained) == ("weights.pt", True, False)
    assert "tiny-test-clip" in open_clip.list_models()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-61", "Did you mean 'ViT-B-16'"),
        ("RN50", "not a ViT"),
        ("coca_ViT-B-32", "pools by attention"),
    ],
)
def test_unsuitable_models_are_refused(model: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_clip(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"no_causal_mask": True}}, "does not read causally"),
        ({"text_cfg": {"pool_type": "last"}}, "not read at the end-of-text token"),
        ({"text_cfg": {"pool_type": "eos"}}, "not read at the end-of-text token"),
        ({"text_cfg": {"hf_tokenizer_name": "someone/tokenizer"}}, "needs a tokenizer from a model hub"),
        ({"vision_cfg": {"image_size": [64, 96]}}, "not square"),
        ({"vision_cfg": {"pool_type": "avg"}}, "not the class token"),
    ],
)
def test_towers_that_would_be_computed_wrongly(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = {**TINY, **{part: {**TINY[part], **keys} for part, keys in change.items()}}
    path = tmp_path / f"refused-{abs(hash(str(change)))}.json"
    path.write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=message):
        load_clip(str(path))


@pytest.mark.parametrize(
    ("model", "pretrained", "remedy"),
    [("ViT-B-32", "openai", "ViT-B-32-quickgelu"), ("ViT-L-14-336-quickgelu", "openai", None)],
)
def test_weights_of_another_activation(
    model: str, pretrained: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They load without a word and compute nonsense (methods 2.0, trap 1)."""
    import open_clip

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    expected = "no network" if remedy is None else f"trained with QuickGELU, the model {model} has GELU.*{remedy}"
    with pytest.raises((RecipeError, DependencyMissing), match=expected):
        load_clip(model, pretrained=pretrained)


def test_unknown_weights_name_the_tags() -> None:
    with pytest.raises(RecipeError, match=r"no pretrained weights 'opnai'.*openai"):
        load_clip("ViT-B-16", pretrained="opnai")


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(DependencyMissing, match=r"can't be downloaded \(Name or service not known\).*checkpoint"):
        load_clip("ViT-B-16-quickgelu", pretrained="openai")


def test_checkpoints_that_do_not_fit(tiny_config: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_clip(str(tiny_config), checkpoint=tmp_path / "none.pt")
    torch.save({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(RecipeError, match="does not fit"):
        load_clip(str(tiny_config), checkpoint=tmp_path / "other.pt")


def test_broken_model_config(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(json.dumps({"embed_dim": 3}))
    with pytest.raises(RecipeError, match="not an open_clip model config"):
        load_clip(str(tmp_path / "broken.json"))


def test_image_size_must_hold_whole_patches(clip: Clip) -> None:
    with pytest.raises(RecipeError, match="Use 96 or 112"):
        ImageEncoder(clip.visual, 100, (5,), None)
