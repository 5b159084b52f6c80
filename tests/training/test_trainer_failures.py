"""What goes wrong while tuning: losses that are no numbers, full disks, states of other runs and damaged ones."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from easy import (
    OPTIONS,
    TWO_STAGES,
    Squares,
    assert_same_bits,
    assert_same_files,
    fresh,
    histories,
    plan_of,
    tensors_of,
    trainer_of,
)

from dapo_edge.config import PARTS
from dapo_edge.errors import DapoEdgeError, OutputError, RecipeError
from dapo_edge.models import checkpoints
from dapo_edge.models.clip import load_clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.training import trainer as trainer_module
from dapo_edge.training.trainer import BEST, LATEST, STATE, Run


def poisoned_at(method: Dapo, epoch: int, epochs: int) -> Any:
    """A progress callback that spoils one frozen weight when that epoch begins."""

    def spoil(step: str, done: int, of: int) -> None:
        if done * epochs == (epoch - 1) * of:
            method.clip.text.positional_embedding.data[0, 0] = float("nan")

    return spoil


def test_a_loss_that_is_no_number_stops_and_keeps_the_best(
    uninterrupted: tuple[Run, Dapo, Path], easy_config: Path, tmp_path: Path
) -> None:
    trainer_of(fresh(easy_config), plan_of(*TWO_STAGES), tmp_path).tune(stop_after=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    method = fresh(easy_config)
    trainer = trainer_of(method, plan_of(*TWO_STAGES), tmp_path, on_progress=poisoned_at(method, 2, 4))
    with pytest.raises(
        DapoEdgeError, match=r"the loss is nan in epoch 2, with square .*lower 'learning_rate'.*prompts.tuned"
    ) as error:
        trainer.tune()
    assert str(tmp_path / BEST) in str(error.value)
    assert error.value.exit_code == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    checkpoints.read(tmp_path / BEST)

    whole, tuned, _ = uninterrupted
    mended = fresh(easy_config)
    assert histories(trainer_of(mended, plan_of(*TWO_STAGES), tmp_path).tune()) == histories(whole)
    assert_same_bits(tensors_of(mended), tensors_of(tuned))


def test_a_loss_that_is_no_number_from_the_start(easy_config: Path, tmp_path: Path) -> None:
    method = fresh(easy_config)
    with pytest.raises(DapoEdgeError, match="the loss is nan in epoch 1"):
        trainer_of(method, plan_of((PARTS, 1)), tmp_path, on_progress=poisoned_at(method, 1, 1)).tune()
    assert list(tmp_path.iterdir()) == []
    method = fresh(easy_config)
    with pytest.raises(DapoEdgeError, match="nothing was saved"):
        trainer_of(method, plan_of((PARTS, 1)), on_progress=poisoned_at(method, 1, 1)).tune()


def test_weights_that_become_no_numbers_in_the_last_step_are_not_kept(easy_config: Path, tmp_path: Path) -> None:
    """The loss before the step was fine; nothing of that epoch may be saved."""
    method = fresh(easy_config)

    def spoil(step: str, done: int, of: int) -> None:
        if done == of:
            method.learnables()["adapters"][0].data[0, 0] = float("nan")

    with pytest.raises(DapoEdgeError, match=r"a weight is no number .*epoch 1.*learning_rate"):
        trainer_of(method, plan_of((PARTS, 1)), tmp_path, on_progress=spoil).tune()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [BEST, LATEST, STATE])
def test_a_full_disk_keeps_the_older_files(
    uninterrupted: tuple[Run, Dapo, Path],
    easy_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The system refuses every file above some bytes, in the middle of writing it, as a full disk does."""
    trainer_of(fresh(easy_config), plan_of(*TWO_STAGES), tmp_path).tune(stop_after=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if name == BEST:
        monkeypatch.setattr(trainer_module, "quality_of", lambda summary: 2.0)  # so that the second epoch is the best
    method = fresh(easy_config)
    trainer = trainer_of(method, plan_of(*TWO_STAGES), tmp_path)
    write = {BEST: trainer._write, LATEST: trainer._write, STATE: trainer._write_state}[name]

    def full(*arguments: Any) -> None:
        if name == STATE or arguments == (name,):
            with full_disk(1000):
                write(*arguments)
        else:
            write(*arguments)

    monkeypatch.setattr(trainer, "_write_state" if name == STATE else "_write", full)
    with pytest.raises(OutputError, match=rf"{name}' can't be written \(.*File too large"):
        trainer.tune()
    monkeypatch.undo()
    assert (tmp_path / name).read_bytes() == before[name]
    assert (tmp_path / STATE).read_bytes() == before[STATE]
    checkpoints.read(tmp_path / BEST)

    whole, tuned, folder = uninterrupted
    method = fresh(easy_config)
    assert histories(trainer_of(method, plan_of(*TWO_STAGES), tmp_path).tune()) == histories(whole)
    assert_same_bits(tensors_of(method), tensors_of(tuned))
    assert_same_files(tmp_path / BEST, folder / BEST)


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_says_what_to_do(easy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = trainer_of(fresh(easy_config), plan_of((("context",), 1)), tmp_path)
    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OutputError, match=r"can't be written \(No space left on device\)\. Free some space"):
        trainer.tune()


def test_a_folder_that_is_none(easy_config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        trainer_of(fresh(easy_config), plan_of((PARTS, 1)), tmp_path / "file" / "run").tune()


def test_a_state_of_other_settings_is_refused(easy_config: Path, tmp_path: Path) -> None:
    plan = plan_of((("context", "adapters"), 1))
    trainer_of(fresh(easy_config), plan, tmp_path).tune()
    before = (tmp_path / STATE).read_bytes()
    other_clip = Dapo(load_clip(str(easy_config), seed=2), options=OPTIONS, seed=3)
    kept = fresh(easy_config)
    cases: dict[str, tuple[Dapo, dict[str, Any]]] = {
        "seed": (kept, {"plan": plan.model_copy(update={"seed": 1})}),
        "learning rate": (kept, {"plan": plan_of((("context", "adapters"), 1), learning_rate=0.02)}),
        "parts": (kept, {"plan": plan_of((("context",), 1))}),
        "pictures": (kept, {"pictures": Squares(25)}),
        "shape": (fresh(easy_config, context_tokens=3), {}),
        "backbone": (other_clip, {}),
        "temperature": (fresh(easy_config, temperature=0.05), {}),
        "parts that do not learn": (fresh(easy_config, seed=4), {}),
        "their shape": (fresh(easy_config, visual_tokens=1), {}),
        "feature layers": (layers_of(easy_config, (1, 3)), {}),
    }
    assert layers_of(easy_config, (1, 3)).feature_layers != kept.feature_layers
    for name, (method, changes) in cases.items():
        used = changes.pop("plan", plan)
        with pytest.raises(RecipeError, match=r"belongs to another run: .*differ.*another folder"):
            trainer_of(method, used, tmp_path, **changes).tune()
            pytest.fail(name)
    assert (tmp_path / STATE).read_bytes() == before


def layers_of(config: Path, layers: tuple[int, ...]) -> Dapo:
    """Other feature layers than the default, as many."""
    return Dapo(load_clip(str(config), seed=1), options=OPTIONS, feature_layers=layers, seed=3)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "list", "no identity"])
def test_a_damaged_state_is_refused(easy_config: Path, tmp_path: Path, damage: str) -> None:
    state = tmp_path / STATE
    if damage == "cut":
        trainer_of(fresh(easy_config), plan_of((PARTS, 1)), tmp_path).tune()
        state.write_bytes(state.read_bytes()[:-1000])
    elif damage == "empty":
        state.touch()
    elif damage == "other":
        state.write_bytes(b"not a state")
    else:
        torch.save([1] if damage == "list" else {"a": 1}, state)
    with pytest.raises(RecipeError, match=r"state of an earlier run.*can't be read.*Delete the file"):
        trainer_of(fresh(easy_config), plan_of((PARTS, 1)), tmp_path).tune()


@pytest.mark.parametrize("change", [{"weights": "broadcast"}, {"weights": "fewer"}, {"history": "["}], ids=str)
def test_a_state_of_another_shape_is_refused(easy_config: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """The identity is right, the content is not: an edited file."""
    plan = plan_of((PARTS, 1))
    trainer_of(fresh(easy_config), plan, tmp_path).tune()
    state = torch.load(tmp_path / STATE, weights_only=True)
    shapes = {"broadcast": [torch.zeros(1, 1, 32)] * 2, "fewer": []}
    if "weights" in change:
        change = {"weights": {**state["weights"], "context": shapes[change["weights"]]}}
    torch.save({**state, **change}, tmp_path / STATE)
    with pytest.raises(RecipeError, match=r"can't be read.*Delete the file"):
        trainer_of(fresh(easy_config), plan, tmp_path).tune()


def test_no_code_runs_from_a_state(easy_config: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"identity": Trap()}, tmp_path / STATE)
    with pytest.raises(RecipeError, match="can't be read"):
        trainer_of(fresh(easy_config), plan_of((PARTS, 1)), tmp_path).tune()
    assert not (tmp_path / "sprung").exists()
