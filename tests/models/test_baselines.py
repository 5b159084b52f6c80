"""The methods that DAPO is compared with: words bound by name, and only what belongs to each may learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dapo_edge.config import Stage, TuningPlan
from dapo_edge.errors import RecipeError
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models import baselines
from dapo_edge.models.baselines import AdaptersOnly, Handcrafted, TwoPrompts, ensemble_rows, head_tokens
from dapo_edge.models.clip import Clip, load_clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.structures import NORMAL
from dapo_edge.training.trainer import Trainer
from dapo_edge.training.views import View, ViewStore

WORDS = ("scratch", "missing part", "dried glue strip")
ENSEMBLE = yaml.safe_load((Path(baselines.__file__).parent / "ensemble.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clip(tiny_config: Path) -> Clip:
    return load_clip(str(tiny_config), seed=1)


class Squares:
    """Bright and dark squares on grey."""

    identity = "squares"
    kinds = None

    def title(self, index: int) -> str:
        return f"square {index}"

    names = (NORMAL, "hole", "stain")

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> View:
        image = np.random.default_rng(index).integers(110, 140, (64, 64, 3), np.uint8)
        types = np.zeros((64, 64), np.uint8)
        if index % 3:
            image[16:40, 16:40] = 250 * (index % 3 - 1)
            types[16:40, 16:40] = index % 3
        return View(image, types)


def tuned(method: Dapo, phrases: tuple[str, ...] = ("hole", "stain")) -> set[str]:
    """Names of all tensors, CLIP's included, that one epoch changed."""
    named = {**dict(method.named_parameters()), **{f"text.{k}": v for k, v in method.clip.text.named_parameters()}}
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    plan = TuningPlan(stages=(Stage(epochs=1, learning_rate=0.01),), batch=4, validation=0.5, loss_px=16)
    spec = MapSpec(64, method.grid, method.temperature, method.align_corners, 0.0, "image")
    names = (NORMAL, *(("defect",) if len(phrases) == 1 else ("hole", "stain")))
    pictures = Squares()
    if len(phrases) == 1:
        pictures.names = names  # type: ignore[assignment]
        view = pictures.__getitem__
        pictures = type(
            "Merged",
            (Squares,),
            {"names": names, "__getitem__": lambda self, i: View(view(i).image, np.minimum(view(i).types, 1))},
        )()
    Trainer(method, ViewStore(pictures, 64), phrases, "object", plan, spec=spec).tune()
    return {name for name, tensor in named.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("make", [Handcrafted, AdaptersOnly, TwoPrompts, Dapo])
def test_rows_are_unit_and_bound_to_their_words(clip: Clip, make: Callable[[Clip], Dapo]) -> None:
    method = make(clip)
    with torch.no_grad():
        rows = method.rows(WORDS, "object")
        turned = method.rows(WORDS[::-1], "object")
        alone = method.rows(WORDS[1:2], "object")
    assert rows.shape == (4, clip.dimensions)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(turned[1:], rows[1:].flip(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(turned[0], rows[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(alone[1], rows[2], atol=1e-6, rtol=0)
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_rows_of_an_ensemble_are_a_direct_average(clip: Clip) -> None:
    """Sentence by sentence through open_clip's own text tower."""

    def mean(states: list[str]) -> np.ndarray:
        total = np.zeros(clip.dimensions)
        for state in states:
            for template in ENSEMBLE["templates"]:
                ids = clip.tokenizer([template.replace("{s}", state)])
                vector = clip.text.encode_text(ids)[0].detach().double().numpy()
                total += vector / np.linalg.norm(vector)
        return total / np.linalg.norm(total)

    noun, phrases = "bottle", WORDS[:2]
    rows = ensemble_rows(clip, phrases, noun).numpy()
    good = [state.replace("{o}", noun) for state in ENSEMBLE["normal"]]
    np.testing.assert_allclose(rows[0], mean(good), atol=2e-6)
    for row, phrase in zip(rows[1:], phrases, strict=True):
        states = [state.replace("{o}", noun).replace("{d}", phrase) for state in ENSEMBLE["defective"]]
        np.testing.assert_allclose(row, mean(states), atol=2e-6)
    assert not ensemble_rows(clip, phrases, noun).requires_grad


def test_the_ensemble_is_complete() -> None:
    assert all("{o}" in state and "{d}" not in state for state in ENSEMBLE["normal"])
    assert all("{o}" in state and "{d}" in state for state in ENSEMBLE["defective"])
    assert all(template.count("{s}") == 1 for template in ENSEMBLE["templates"])
    for states in ENSEMBLE.values():
        assert len(set(states)) == len(states) >= 5


def test_patches_go_through_clips_own_head(clip: Clip) -> None:
    taps = [torch.randn(2, 16, clip.width) for _ in range(2)]
    tokens = head_tokens(clip, taps)
    assert tokens.shape == (2, 2, 16, clip.dimensions)
    visual = clip.visual
    for layer, tap in enumerate(taps):
        one = torch.nn.functional.layer_norm(tap[1, 3], (clip.width,), visual.ln_post.weight, visual.ln_post.bias)
        torch.testing.assert_close(tokens[1, layer, 3], one @ visual.proj, atol=1e-5, rtol=1e-5)
    for make in (Handcrafted, TwoPrompts):
        assert torch.equal(make(clip).adapt(taps), tokens)


def test_the_class_token_is_clips_own(clip: Clip) -> None:
    """No baseline inserts visual tokens."""
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = clip.visual(image)
        for make in (Handcrafted, AdaptersOnly, TwoPrompts):
            torch.testing.assert_close(make(clip)(image)[1], expected, atol=1e-5, rtol=1e-5)


def test_handcrafted_taps_the_last_block_and_learns_nothing(clip: Clip) -> None:
    method = Handcrafted(clip)
    assert method.feature_layers == (clip.layers,)
    assert Handcrafted(clip, feature_layers=(2, 4)).feature_layers == (2, 4)
    assert not any(method.learnables().values())
    with pytest.raises(RecipeError, match="nothing is left to learn"):
        tuned(method)
    assert torch.equal(Handcrafted(clip, seed=5).rows(WORDS, "object"), method.rows(WORDS, "object"))


def test_adapters_only_learns_its_adapters(clip: Clip) -> None:
    method = AdaptersOnly(clip)
    changed = tuned(method)
    assert changed == {name for name, _ in method.named_parameters() if name.startswith("adapters.")}
    assert len(changed) == 2 * len(method.feature_layers)
    assert torch.equal(method.rows(WORDS, "object"), ensemble_rows(clip, WORDS, "object"))


@pytest.mark.parametrize("phrases", [("defect",), ("hole", "stain")])
def test_two_prompts_learns_context_and_text_tokens(clip: Clip, phrases: tuple[str, ...]) -> None:
    changed = tuned(TwoPrompts(clip), phrases)
    assert changed == {"prompts.normal_context", "prompts.abnormal_context", "prompts.text_tokens"}
    assert TwoPrompts(clip).learnables().keys() == {"context", "text_tokens"}


def test_one_row_for_all_defects_can_be_validated_on_several_types(clip: Clip) -> None:
    """Its share is spread over the types: the anomaly map stays as it was, the types are at chance."""
    from dapo_edge.training.trainer import Features, metrics_of

    method = TwoPrompts(clip)
    spec = MapSpec(64, method.grid, method.temperature, method.align_corners, 0.0, "image")
    several = metrics_of(method, Features(method, ViewStore(Squares(), 64)), range(12), ["defect"], "object", spec)
    merged = type("Merged", (Squares,), {"names": (NORMAL, "defect")})
    merged.__getitem__ = lambda self, i: View(  # type: ignore[method-assign]
        Squares.__getitem__(self, i).image, np.minimum(Squares.__getitem__(self, i).types, 1)
    )
    one = metrics_of(method, Features(method, ViewStore(merged(), 64)), range(12), ["defect"], "object", spec)
    assert several.pixel_auroc == pytest.approx(one.pixel_auroc, abs=1e-4)
    assert several.aupro == pytest.approx(one.aupro, abs=1e-3)
    assert several.image_auroc == one.image_auroc
    assert several.type_chance == 0.5
    assert several.type_accuracy == 0.5, "all the first of two types, which are even"
