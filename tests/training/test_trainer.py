"""The trainer: it learns, it learns only what it is told to, and a killed run ends with the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from easy import (
    SIDE,
    TWO_STAGES,
    WORDS,
    Squares,
    assert_same_bits,
    assert_same_files,
    fresh,
    histories,
    plan_of,
    tensors_of,
    trainer_of,
)

from dapo_edge.config import PARTS, Part
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation import features as features_module
from dapo_edge.models import checkpoints
from dapo_edge.models.clip import load_clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.training import trainer as trainer_module
from dapo_edge.training.trainer import BEST, LATEST, STATE, Features, Run, split_pictures
from dapo_edge.training.views import ViewStore


def losses_of(run: Run) -> list[float]:
    return [epoch.map_loss + epoch.image_loss for epoch in run.history]


def test_a_run_learns_an_easy_world(easy_config: Path) -> None:
    method = fresh(easy_config)
    trainer = trainer_of(method, plan_of((PARTS, 8)), pictures=Squares(36))
    untuned = trainer_module.metrics_of(
        method, trainer._features, trainer._validation, WORDS, "object", trainer._spec
    ).pixel_auroc
    run = trainer.tune()
    losses = losses_of(run)
    assert losses[-1] < 0.75 * losses[0]
    assert np.isfinite(losses).all()
    assert run.best.validation.pixel_auroc > max(0.9, untuned + 0.1)
    assert [epoch.epoch for epoch in run.history] == list(range(1, 9))


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (4,), (1, 2, 3)], ids=str)
def test_stopped_and_resumed_is_bit_equal(
    uninterrupted: tuple[Run, Dapo, Path], easy_config: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Within a stage, at the boundary of two (2), and at the end (4); each part in a new trainer on a new method."""
    whole, tuned, folder = uninterrupted
    for stop in stops:
        part = trainer_of(fresh(easy_config), plan_of(*TWO_STAGES), tmp_path).tune(stop_after=stop)
        assert len(part.history) == stop
    method = fresh(easy_config)
    resumed = trainer_of(method, plan_of(*TWO_STAGES), tmp_path).tune()
    assert histories(resumed) == histories(whole)
    assert resumed.best_epoch == whole.best_epoch
    assert_same_bits(tensors_of(method), tensors_of(tuned))
    for name in (BEST, LATEST):
        assert_same_files(tmp_path / name, folder / name)
    assert {path.name for path in tmp_path.iterdir()} == {BEST, LATEST, STATE}


@pytest.mark.parametrize("broken", [BEST, LATEST, STATE])
def test_killed_between_two_files_is_bit_equal(
    uninterrupted: tuple[Run, Dapo, Path],
    easy_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    """The kill lands on the rename of one file: the files then are of different epochs."""
    whole, tuned, folder = uninterrupted
    rename, counts = Path.replace, itertools.count(1)
    fatal = {BEST: 1, LATEST: whole.best_epoch, STATE: 2}[broken]

    def killed(self: Path, target: Path) -> Path:
        if target.name == broken and next(counts) == fatal:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(fresh(easy_config), plan_of(*TWO_STAGES), tmp_path).tune()
    monkeypatch.undo()
    method = fresh(easy_config)
    resumed = trainer_of(method, plan_of(*TWO_STAGES), tmp_path).tune()
    assert histories(resumed) == histories(whole)
    assert_same_bits(tensors_of(method), tensors_of(tuned))
    assert_same_files(tmp_path / BEST, folder / BEST)


def test_a_finished_run_is_not_repeated(
    uninterrupted: tuple[Run, Dapo, Path], easy_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tuned, folder = uninterrupted
    before = (folder / STATE).read_bytes()
    method = fresh(easy_config)
    again = trainer_of(method, plan_of(*TWO_STAGES), folder).tune()
    assert [epoch.as_json() for epoch in again.history] == [epoch.as_json() for epoch in whole.history]
    assert_same_bits(tensors_of(method), tensors_of(tuned))
    assert (folder / STATE).read_bytes() == before


def test_the_seed_decides(uninterrupted: tuple[Run, Dapo, Path], easy_config: Path) -> None:
    whole, _, _ = uninterrupted
    again = trainer_of(fresh(easy_config), plan_of(*TWO_STAGES)).tune(stop_after=1)
    other = trainer_of(fresh(easy_config), plan_of(*TWO_STAGES, seed=1)).tune(stop_after=1)
    assert losses_of(again)[0] == losses_of(whole)[0], "without a folder the same happens"
    assert losses_of(other)[0] != losses_of(whole)[0]


@pytest.mark.parametrize("learn", [(part,) for part in PARTS], ids=str)
def test_only_the_named_part_learns(easy_config: Path, learn: tuple[Part, ...]) -> None:
    method = fresh(easy_config)
    frozen = {name: t.detach().clone() for name, t in method.clip.text.state_dict().items()}
    before = tensors_of(method)
    trainer_of(method, plan_of((learn, 1))).tune()
    after = tensors_of(method)
    for name, tensor in before.items():
        changed = not np.array_equal(tensor, after[name])
        assert changed == name.startswith(learn[0]), name
    for name, tensor in method.clip.text.state_dict().items():
        assert torch.equal(tensor, frozen[name]), f"CLIP's {name} stays as it is"


def test_the_stage_table_decides_what_learns_when(easy_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: Any = ((("text_tokens",), 1), (("context", "visual_tokens"), 2), (("adapters",), 1))
    method = fresh(easy_config)
    trainer = trainer_of(method, plan_of(*stages))
    seen = [tensors_of(method)]
    metrics_of = trainer_module.metrics_of

    def watched(*arguments: Any) -> Any:
        seen.append(tensors_of(method))
        return metrics_of(*arguments)

    monkeypatch.setattr(trainer_module, "metrics_of", watched)
    run = trainer.tune()
    assert [epoch.stage for epoch in run.history] == [1, 2, 2, 3]
    changes = [
        {name.split()[0] for name in a if not np.array_equal(a[name], b[name])} for a, b in itertools.pairwise(seen)
    ]
    assert changes == [{"text_tokens"}, {"context", "visual_tokens"}, {"context", "visual_tokens"}, {"adapters"}]


@pytest.mark.parametrize(
    ("option", "part"), [("context_tokens", "context"), ("text_tokens", "text_tokens"), ("visual_tokens",) * 2]
)
def test_parts_that_options_removed_are_absent(easy_config: Path, tmp_path: Path, option: str, part: Part) -> None:
    method = fresh(easy_config, **{option: 0})
    assert not method.learnables()[part]
    before = tensors_of(method)
    run = trainer_of(method, plan_of((PARTS, 1)), tmp_path).tune()
    assert not run.best_weights[part]
    assert all(not np.array_equal(tensor, before[name]) for name, tensor in tensors_of(method).items())
    loaded = Dapo(load_clip(str(easy_config), seed=1), checkpoints.read(tmp_path / BEST))
    assert_same_bits(tensors_of(loaded), tensors_of(method))
    with pytest.raises(RecipeError, match=r"nothing is left to learn.*'tuning.stages'"):
        trainer_of(fresh(easy_config, **{option: 0}), plan_of(((part,), 1)))


def test_a_stage_with_nothing_to_learn_beside_one_that_learns(easy_config: Path) -> None:
    plan = plan_of((("visual_tokens",), 1), (("adapters",), 1))
    with pytest.raises(RecipeError, match=r"in stage 1 nothing is left"):
        trainer_of(fresh(easy_config, visual_tokens=0), plan)


def test_the_best_epoch_is_kept(easy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qualities are dictated, so that the best epoch is neither the first nor the last."""
    method = fresh(easy_config)
    trainer = trainer_of(method, plan_of((PARTS, 4)), tmp_path)
    qualities, after_epoch = [0.3, 0.8, 0.5, 0.8], []

    def dictated(summary: object) -> float:
        after_epoch.append(tensors_of(method))
        return qualities[len(after_epoch) - 1]

    monkeypatch.setattr(trainer_module, "quality_of", dictated)
    run = trainer.tune()
    assert (run.best_epoch, run.best.quality) == (2, 0.8), "of equal ones the first"
    assert_same_bits(tensors_of(method), after_epoch[1])

    loaded = Dapo(load_clip(str(easy_config), seed=1), checkpoints.read(tmp_path / BEST), seed=99)
    latest = Dapo(load_clip(str(easy_config), seed=1), checkpoints.read(tmp_path / LATEST), seed=99)
    assert_same_bits(tensors_of(loaded), after_epoch[1])
    assert_same_bits(tensors_of(latest), after_epoch[3])
    image = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.rows(WORDS, "object"), method.rows(WORDS, "object"))
        assert torch.equal(loaded(image)[0], method(image)[0])
        assert torch.equal(loaded(image)[1], method(image)[1])


def test_quality_is_what_a_summary_defines(uninterrupted: tuple[Run, Dapo, Path]) -> None:
    for epoch in uninterrupted[0].history:
        found = epoch.validation
        known = [found.pixel_auroc, found.image_auroc, found.type_pixel_auroc, found.aupro]
        assert epoch.quality == pytest.approx(sum(known) / 4)
    assert uninterrupted[0].best.quality == max(epoch.quality for epoch in uninterrupted[0].history)


@pytest.mark.parametrize("room", [0, 30_000])
def test_cached_features_change_nothing(easy_config: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Bit for bit: a frozen encoder sees one picture at a time, whether all, some or none of them are kept."""
    plan = plan_of((("context", "adapters"), 2))
    cached, uncached = fresh(easy_config), fresh(easy_config)
    keeping = trainer_of(cached, plan)
    monkeypatch.setattr(features_module, "FEATURE_BYTES", room)
    again = trainer_of(uncached, plan)
    assert histories(again.tune()) == histories(keeping.tune())
    assert_same_bits(tensors_of(uncached), tensors_of(cached))
    assert len(keeping._features._kept) == 24
    assert (len(again._features._kept) > 0) == (room > 0)
    assert len(again._features._kept) < 24


def test_batched_encoding_is_the_same_up_to_rounding(easy_config: Path) -> None:
    """Where visual tokens learn, pictures are encoded together: matrix products round by their shape."""
    method = fresh(easy_config)
    store = ViewStore(Squares(), SIDE)
    alone, together = (Features(method, store, frozen=frozen).fetch([3, 0, 5]) for frozen in (True, False))
    for one, other in zip([*alone[0], *alone[1:]], [*together[0], *together[1:]], strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)


def test_cached_features_do_not_depend_on_their_batch(easy_config: Path) -> None:
    method = fresh(easy_config)
    one, other = (Features(method, ViewStore(Squares(), SIDE)) for _ in range(2))
    one.fetch(range(8))
    alone = other.fetch([3])
    among = one.fetch([1, 3])
    assert torch.equal(alone[1][0], among[1][1])
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone[0], among[0], strict=True))


def test_features_are_not_cached_where_visual_tokens_learn(easy_config: Path) -> None:
    """Also when they learn in a later stage only."""

    def keeps(method: Dapo, *stages: Any) -> bool:
        features = trainer_of(method, plan_of(*stages))._features
        features.fetch([0, 1])
        return bool(features._kept)

    assert not keeps(fresh(easy_config), (("context",), 1), (("visual_tokens",), 1))
    assert keeps(fresh(easy_config), (("context", "adapters"), 1))
    assert keeps(fresh(easy_config, visual_tokens=0), (PARTS, 1))


def test_mixed_precision_learns_too_and_resumes(easy_config: Path, tmp_path: Path) -> None:
    plan = plan_of((PARTS, 2), precision="bf16")
    whole, resumed = fresh(easy_config), fresh(easy_config)
    run = trainer_of(whole, plan).tune()
    trainer_of(fresh(easy_config), plan, tmp_path).tune(stop_after=1)
    assert histories(trainer_of(resumed, plan, tmp_path).tune()) == histories(run)
    assert_same_bits(tensors_of(whole), tensors_of(resumed))
    assert all(tensor.dtype == np.float32 for tensor in tensors_of(whole).values())
    plain = trainer_of(fresh(easy_config), plan_of((PARTS, 1))).tune()
    assert losses_of(plain)[0] != losses_of(run)[0]
    assert losses_of(plain)[0] == pytest.approx(losses_of(run)[0], rel=0.05)


def test_the_split_is_drawn_once() -> None:
    store = ViewStore(Squares(50), SIDE)
    training, validation = split_pictures(store, plan_of((PARTS, 1), validation=0.2))
    assert len(validation) == 10
    assert sorted(training + validation) == list(range(50))
    assert split_pictures(store, plan_of((PARTS, 3), validation=0.2)) == (training, validation)
    assert split_pictures(store, plan_of((PARTS, 1), validation=0.2, seed=1)) != (training, validation)
    with pytest.raises(RecipeError, match="1 pictures are too few"):
        split_pictures(ViewStore(Squares(1), SIDE), plan_of((PARTS, 1)))


@pytest.mark.parametrize("share", [0.01, 0.15, 0.5, 0.89])
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_is_split_and_both_sides_see_good_and_bad(share: float, seed: int) -> None:
    kinds = [("nut", "normal")] * 40 + [("nut", "hole")] * 12 + [("pin", "normal")] * 8 + [("pin", "stain")] * 2
    held_out = trainer_module._share_of_each(np.random.default_rng(seed).permutation(62).tolist(), kinds, share)
    left = set(range(62)) - set(held_out)
    assert abs(len(held_out) - share * 62) <= 2
    for side in (held_out, left):
        assert {kinds[index][1] == "normal" for index in side} == {True, False}
    for kind in set(kinds):
        count = kinds.count(kind)
        assert abs(sum(kinds[index] == kind for index in held_out) - share * count) <= 1.01
    with pytest.raises(RecipeError, match="1 defective pictures are too few"):
        trainer_module._share_of_each([0, 1, 2], [("nut", "normal"), ("nut", "normal"), ("nut", "hole")], share)


def test_every_picture_is_seen_once_an_epoch(easy_config: Path) -> None:
    trainer = trainer_of(fresh(easy_config), plan_of((PARTS, 1)))
    one, other = list(trainer._shuffled(1)), list(trainer._shuffled(2))
    assert sorted(itertools.chain(*one)) == sorted(itertools.chain(*other)) == sorted(trainer._training)
    assert one != other
    assert [len(batch) for batch in one] == [5, 5, 5, 1], "the last, smaller one counts too"


def test_a_validation_without_any_defect(easy_config: Path) -> None:
    """No metric is defined then: better said than a first epoch that is kept whatever comes."""
    good = Squares(12)
    good.__class__ = type("Good", (Squares,), {"__getitem__": lambda self, i: Squares.__getitem__(self, 2 * i)})
    with pytest.raises(RecipeError, match=r"validation"):
        trainer_of(fresh(easy_config), plan_of((PARTS, 1)), pictures=good).tune()
