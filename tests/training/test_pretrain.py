"""Pretraining on images and captions: the terms, the batches, and a run that goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from easy import CONFIG, PATCH

from dapo_edge.data.captions import vocabulary
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.errors import DapoEdgeError, OutputError, RecipeError
from dapo_edge.models.clip import load_clip
from dapo_edge.training import pretrain as module
from dapo_edge.training.pretrain import (
    LOG,
    STATE,
    WEIGHTS,
    Captioned,
    Phase,
    Pretraining,
    best_patches,
    contrast,
    encode_views,
    pretrain,
)


@pytest.fixture(scope="module")
def settings(easy_config: Path) -> Pretraining:
    """Six steps of four pictures, three in each of two phases."""
    phases = (Phase(share=0.5, image_size=16), Phase(share=0.5, image_size=32, keep=0.5))
    return Pretraining(model=str(easy_config), images=24, batch=4, warmup=2, phases=phases, local_patches=0.2)


@pytest.fixture(scope="module")
def whole(settings: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    assert pretrain(settings, folder, workers=0) == folder / WEIGHTS
    return folder


def literal_contrast(similarity: np.ndarray, positive: np.ndarray) -> float:
    """Of every row and every column the mean over its positives of -ln softmax; half of both means."""
    count, sums = len(similarity), [0.0, 0.0]
    for side, (scores, true) in enumerate(((similarity, positive), (similarity.T, positive.T))):
        for i in range(count):
            among = sum(math.exp(score) for score in scores[i])
            terms = [-math.log(math.exp(scores[i][j]) / among) for j in range(count) if true[i][j]]
            sums[side] += sum(terms) / len(terms) / count
    return sum(sums) / 2


@pytest.mark.parametrize("shared", [0, 0.4])
def test_contrast_is_as_written(shared: float) -> None:
    rng = np.random.default_rng(3)
    similarity = rng.normal(0, 3, (5, 5))
    positive = (rng.random((5, 5)) < shared) | np.eye(5, dtype=bool)
    tensor = torch.tensor(similarity, requires_grad=True)
    loss = contrast(tensor, torch.tensor(positive))
    assert loss.item() == pytest.approx(literal_contrast(similarity, positive), rel=1e-6)
    loss.backward()
    assert torch.isfinite(tensor.grad).all()
    if not shared:
        targets = torch.arange(5)
        clip_loss = (F.cross_entropy(tensor, targets) + F.cross_entropy(tensor.T, targets)) / 2
        assert loss.item() == pytest.approx(clip_loss.item(), rel=1e-6), "CLIP's own loss where nothing is shared"


def test_best_patches_are_the_ones_that_fit() -> None:
    rng = np.random.default_rng(4)
    patches, texts = rng.normal(size=(3, 7, 5)), rng.normal(size=(4, 5))
    found = best_patches(torch.tensor(patches), torch.tensor(texts), 2)
    for image in range(3):
        for text in range(4):
            fits = sorted((float(patch @ texts[text]) for patch in patches[image]), reverse=True)
            assert found[image, text].item() == pytest.approx((fits[0] + fits[1]) / 2)


def test_phases_change_at_their_steps() -> None:
    plan = Pretraining(images=1000, batch=100)
    assert plan.steps == 10
    assert [plan.phase_at(step).image_size for step in range(10)] == [96] * 6 + [144] * 4
    assert [plan.phase_at(step).keep for step in (0, 5, 6, 9)] == [1.0, 1.0, 0.5, 0.5]
    assert Pretraining(images=1001, batch=100).steps == 11
    thirds = tuple(Phase(share=1 / 3, image_size=16 * n) for n in (1, 2, 3))
    plan = Pretraining(images=9, batch=2, phases=thirds)
    assert [plan.phase_at(step).image_size for step in range(plan.steps)] == [16, 16, 32, 48, 48]


def test_phases_make_up_the_whole_run() -> None:
    for phases in ((), (Phase(share=0.5, image_size=16),), (Phase(share=0.7, image_size=16),) * 2):
        with pytest.raises(ValueError, match="must add up to 1"):
            Pretraining(phases=phases)


def test_batches_follow_the_phases(settings: Pretraining) -> None:
    clip = load_clip(settings.model)
    batches = list(module._batches(settings, clip, 0, settings.steps, 0))
    assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 16, 16)] * 3 + [(4, 3, 32, 32)] * 3
    pictures = Captioned(settings)
    for number, batch in enumerate(batches):
        for place in range(4):
            view = pictures[4 * number + place]
            rgb = view.image[..., ::-1].transpose(2, 0, 1)
            np.testing.assert_array_equal(batch.images[place].numpy(), rgb)
            tokens = clip.tokenizer([view.caption.text])[0]
            assert torch.equal(batch.ids[place], tokens[: batch.ids.shape[1]])
            assert not tokens[batch.ids.shape[1] :].any(), "only padding is cut"
            assert bool(batch.defective[place]) == bool(view.caption.defects)
    later = list(module._batches(settings, clip, 4, 6, 0))
    assert torch.equal(later[0].images, batches[4].images), "a resumed run sees the pictures that come next"


def test_positives_are_the_captions_that_are_true(settings: Pretraining) -> None:
    small = settings.model_copy(update={"phases": (Phase(share=1, image_size=16),), "images": 40})
    views = [Captioned(small)[index] for index in range(40)]
    batch = module._Collate(load_clip(settings.model).tokenizer)(views)
    assert batch.positive.diagonal().all()
    words = vocabulary()
    for i, view in enumerate(views):
        for j, other in enumerate(views):
            named = other.caption.material
            is_true = {*other.caption.defects} == {*view.caption.defects} and (not named or named == view.material)
            assert bool(batch.positive[i, j]) == is_true
            if is_true and named:
                assert any(word in other.caption.text for word in words["materials"][view.material])
            if is_true:
                for defect in view.caption.defects:
                    assert any(word in other.caption.text for word in words["defects"][defect])
    assert batch.positive.sum() > 40, "some captions are shared"
    assert not batch.positive.all()


def test_it_sees_what_the_protocol_allows(settings: Pretraining) -> None:
    split = surfaces_v1()
    views = [Captioned(settings)[index] for index in range(24)]
    assert {view.material for view in views} <= set(split.pretraining_materials)
    assert not {view.material for view in views} & set(split.unseen_materials)
    other = Captioned(settings.model_copy(update={"seed": 1}))
    assert other[0].image.tobytes() != views[0].image.tobytes()


def test_the_whole_picture_is_encoded_as_clip_does(easy_config: Path) -> None:
    clip = load_clip(str(easy_config))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors, patches = encode_views(clip, image, 1.0, torch.Generator())
        torch.testing.assert_close(vectors, F.normalize(clip.visual(image), dim=-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patches.norm(dim=-1), torch.ones(2, 16))
        larger, _ = encode_views(clip, torch.randn(2, 3, 48, 48), 1.0, torch.Generator())
    assert larger.shape == (2, 32)


def test_dropped_patches_are_other_ones_every_time(easy_config: Path) -> None:
    """What is kept keeps its place: a run of no blocks shows it, each patch as it was without the dropping."""
    clip = load_clip(str(easy_config))
    clip.visual.transformer.resblocks = torch.nn.ModuleList()
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, every = encode_views(clip, image, 1.0, torch.Generator())
        _, kept = encode_views(clip, image, 0.3, torch.Generator().manual_seed(5))
        _, again = encode_views(clip, image, 0.3, torch.Generator().manual_seed(5))
        _, other = encode_views(clip, image, 0.3, torch.Generator().manual_seed(6))
    assert kept.shape == (2, round(0.3 * (32 // PATCH) ** 2), 32)
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)
    for picture in range(2):
        distance = torch.cdist(kept[picture], every[picture])
        assert distance.min(dim=1).values.max() < 1e-3
        assert len(set(distance.argmin(dim=1).tolist())) == kept.shape[1], "no patch twice"


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / STATE, weights_only=True)


def assert_same_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (one["step"], one["settings"]) == (other["step"], other["settings"])
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    a, b = one["optimizer"]["state"], other["optimizer"]["state"]
    assert a.keys() == b.keys()
    for place, entry in a.items():
        assert all(torch.equal(value, b[place][name]) for name, value in entry.items()), place


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 4, 5)], ids=str)
def test_stopped_and_resumed_is_bit_equal(
    settings: Pretraining, whole: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Also where the phases change (3)."""
    for stop in stops:
        pretrain(settings, tmp_path, workers=0, stop_at=stop)
        assert state_of(tmp_path)["step"] == stop
    pretrain(settings, tmp_path, workers=0)
    assert_same_states(state_of(tmp_path), state_of(whole))
    assert (tmp_path / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    with (tmp_path / LOG).open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [*stops, 6]
    assert int(lines[-1]["images"]) == 24


def test_a_finished_run_is_not_repeated(settings: Pretraining, whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    pretrain(settings, whole, workers=0)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_every_tensor_learns(settings: Pretraining, whole: Path) -> None:
    untrained = load_clip(settings.model, seed=settings.seed).text.state_dict()
    for name, tensor in state_of(whole)["model"].items():
        assert torch.isfinite(tensor).all()
        assert not torch.equal(tensor, untrained[name]), name


def test_words_that_no_caption_holds_stay(settings: Pretraining, whole: Path) -> None:
    """No weight decay on the embedding, or unused words would fade."""
    untrained = load_clip(settings.model, seed=settings.seed).text.token_embedding.weight
    trained = state_of(whole)["model"]["token_embedding.weight"]
    changed = (untrained != trained).any(dim=1)
    assert 10 < changed.sum() < 1000
    unused = load_clip(settings.model).tokenizer.encode("zebra")
    assert not changed[unused].any()


def test_a_longer_run_learns(easy_config: Path, tmp_path: Path) -> None:
    phases = (Phase(share=1, image_size=16),)
    settings = Pretraining(model=str(easy_config), images=480, batch=16, warmup=2, phases=phases, learning_rate=3e-3)
    losses: list[float] = []
    pretrain(settings, tmp_path, workers=0, on_step=lambda step, of, loss: losses.append(loss))
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Pretraining(images=10_000, batch=100, warmup=10, learning_rate=0.01)
    rates = [module._learning_rate(plan, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.001, rel=0.01)
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert np.argmax(rates) == 9
    assert 0 < rates[-1] < 1e-5


def test_the_weights_load_as_a_checkpoint(settings: Pretraining, whole: Path) -> None:
    clip = load_clip(settings.model, checkpoint=whole / WEIGHTS)
    assert clip.trained
    loaded = clip.text.state_dict()
    trained = state_of(whole)["model"]
    assert loaded.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name].float(), tensor.half().float()), name
        assert loaded[name].dtype == torch.float32, name


def test_a_folder_of_other_settings_is_refused(settings: Pretraining, whole: Path) -> None:
    before = (whole / STATE).read_bytes()
    for change in ({"learning_rate": 1e-2}, {"images": 28}, {"seed": 1}, {"phases": settings.phases[::-1]}):
        with pytest.raises(RecipeError, match=r"belongs to a run with other settings.*another folder"):
            pretrain(settings.model_copy(update=change), whole, workers=0)
    assert (whole / STATE).read_bytes() == before


def test_damaged_and_foreign_states_are_refused(settings: Pretraining, whole: Path, tmp_path: Path) -> None:
    state = (whole / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(state[:-1000])
    with pytest.raises(RecipeError, match=r"can't be read.*delete the file"):
        pretrain(settings, tmp_path, workers=0)
    torch.save([1], tmp_path / STATE)
    with pytest.raises(RecipeError, match=r"can't be read.*delete the file"):
        pretrain(settings, tmp_path, workers=0)


def test_a_state_of_another_architecture_is_refused(settings: Pretraining, whole: Path, tmp_path: Path) -> None:
    """The model's file was edited in between: the same name, other shapes."""
    (tmp_path / "wide.json").write_text(json.dumps({**CONFIG, "embed_dim": 48}))
    other = settings.model_copy(update={"model": str(tmp_path / "wide.json")})
    torch.save({**state_of(whole), "settings": other.model_dump_json()}, tmp_path / STATE)
    with pytest.raises(RecipeError, match=r"can't be read \(RuntimeError\)"):
        pretrain(other, tmp_path, workers=0)


def test_a_loss_that_is_no_number_keeps_the_last_state(
    settings: Pretraining, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = module._loss

    def spoilt(clip: Any, batch: Any, settings: Any, step: int, device: str) -> torch.Tensor:
        factor = float("nan") if step == 3 else 1.0
        return loss(clip, batch, settings, step, device) * factor

    monkeypatch.setattr(module, "_loss", spoilt)
    with pytest.raises(DapoEdgeError, match=r"the loss is nan .*at step 3\. Go on from the last saved state"):
        pretrain(settings, tmp_path, workers=0, save_every=1)
    assert state_of(tmp_path)["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state_of(tmp_path)["model"].values())
    monkeypatch.undo()
    pretrain(settings, tmp_path, workers=0)
    assert_same_states(state_of(tmp_path), state_of(whole))


def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    settings: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is a number, its slope is not: sqrt at 0."""
    loss = module._loss

    def spoilt(clip: Any, batch: Any, settings: Any, step: int, device: str) -> torch.Tensor:
        found = loss(clip, batch, settings, step, device)
        return found + (found - found.detach()).abs().sqrt() if step == 2 else found

    monkeypatch.setattr(module, "_loss", spoilt)
    with pytest.raises(DapoEdgeError, match=r"gradient (nan|inf) long at step 2"):
        pretrain(settings, tmp_path, workers=0, save_every=1)
    assert all(torch.isfinite(tensor).all() for tensor in state_of(tmp_path)["model"].values())


def test_an_absurd_learning_rate_stops(settings: Pretraining, tmp_path: Path) -> None:
    with pytest.raises(DapoEdgeError, match="with a lower learning rate"):
        pretrain(settings.model_copy(update={"learning_rate": 1e30, "warmup": 0}), tmp_path, workers=0)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_keeps_the_last_state(settings: Pretraining, whole: Path, tmp_path: Path) -> None:
    pretrain(settings, tmp_path, workers=0, stop_at=2)
    before = (tmp_path / STATE).read_bytes()
    (tmp_path / f".{STATE}.new").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"state.pt' can't be written \(No space left on device\)"):
        pretrain(settings, tmp_path, workers=0)
    assert (tmp_path / STATE).read_bytes() == before
    assert not (tmp_path / f".{STATE}.new").is_symlink(), "what could not be written takes no room"
    pretrain(settings, tmp_path, workers=0)
    assert_same_states(state_of(tmp_path), state_of(whole))


def test_good_pictures_alone_have_no_local_term(settings: Pretraining) -> None:
    clip = load_clip(settings.model)
    batch = next(iter(module._batches(settings, clip, 0, 1, 0)))
    good = module.Batch(batch.images, batch.ids, batch.positive, torch.zeros(4, dtype=torch.bool))
    without = settings.model_copy(update={"local_weight": 0.0})
    with torch.no_grad():
        assert torch.equal(module._loss(clip, good, settings, 0, "cpu"), module._loss(clip, batch, without, 0, "cpu"))
        if batch.defective.any():
            assert module._loss(clip, batch, settings, 0, "cpu") > module._loss(clip, batch, without, 0, "cpu")
