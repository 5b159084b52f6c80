"""Tuning: prompts, deep tokens and adapters learn from labelled pictures while CLIP stays frozen (methods 1.4).

A run is a folder. Its state is written after every epoch, and a run that was killed goes on from there to exactly the
weights that it would have reached: pictures, their order and the arithmetic depend on the seed and the epoch alone.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dapo_edge
from dapo_edge.config import Stage, TuningPlan
from dapo_edge.errors import DapoEdgeError, RecipeError
from dapo_edge.evaluation.features import Features, metrics_of
from dapo_edge.evaluation.metrics import Summary
from dapo_edge.files import write_atomically
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.checkpoints import digest_of
from dapo_edge.models.method import Method
from dapo_edge.structures import NORMAL
from dapo_edge.training.losses import dapo_loss
from dapo_edge.training.views import ViewStore

STATE, LATEST, BEST = "state.pt", "latest.safetensors", "best.safetensors"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Epoch:
    """One line of a run's history."""

    epoch: int  # counts from 1
    stage: int  # counts from 1
    map_loss: float
    image_loss: float
    quality: float  # of the validation pictures, see `quality_of`
    validation: Summary
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One flat mapping."""
        return {**{k: v for k, v in asdict(self).items() if k != "validation"}, **self.validation.as_json()}


def quality_of(summary: Summary) -> float:
    """What the best epoch is chosen by: mean of pixel, image and type AUROC and AUPRO, as far as they are defined."""
    metrics = (summary.pixel_auroc, summary.image_auroc, summary.type_pixel_auroc, summary.aupro)
    known = [metric for metric in metrics if not math.isnan(metric)]
    if not known:
        raise _no_defect(summary.images)
    return float(np.mean(known))


def _no_defect(pictures: int) -> RecipeError:
    return RecipeError(
        f"the {pictures} validation pictures show no defect, so no epoch is better than another",
        "Tune with more pictures, or raise 'tuning.validation'",
    )


@dataclass(eq=False)
class Run:
    """A tuning run: its history, and the best epoch's learnable tensors by part."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, list[Tensor]] = field(default_factory=dict)
    restored: int = 0  # epochs that an earlier run had done already

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are kept."""
        return self.history[self.best_epoch - 1]


class Trainer:
    """Tunes a method in place; afterwards it holds the weights of the best epoch."""

    def __init__(
        self,
        method: Method,
        store: ViewStore,
        phrases: Sequence[str],
        noun: str,
        plan: TuningPlan,
        *,
        spec: MapSpec,
        folder: Path | None = None,
        save: Callable[[Path], None] | None = None,
        on_progress: Progress = lambda step, done, of: None,
        on_epoch: Callable[[Run], None] = lambda run: None,
    ) -> None:
        """`phrases` belong to `store.names[1:]`; without `folder` nothing is written. Raises `RecipeError`."""
        if len(phrases) != len(store.names) - 1:
            raise ValueError(f"{len(phrases)} phrases for the names {store.names}")
        self._method, self._store, self._plan, self._spec = method, store, plan, spec
        self._phrases, self._noun = tuple(phrases), noun
        self._folder, self._save = folder, save
        self._progress, self._on_epoch = on_progress, on_epoch
        self._training, self._validation = split_pictures(store, plan)
        learning = {part for stage in plan.stages for part in stage.learn}
        self._parts = {part: parameters for part, parameters in method.learnables().items() if part in learning}
        for number, stage in enumerate(plan.stages, 1):
            if not any(self._parts.get(part) for part in stage.learn):
                raise RecipeError(
                    f"in stage {number} nothing is left to learn",
                    "Name a part in 'tuning.stages' that 'options' did not remove",
                )
        self._start = digest_of(itertools.chain(*method.learnables().values()))
        frozen = not self._parts.get("visual_tokens")
        self._features = Features(method, store, precision=plan.precision, frozen=frozen)
        # What is judged is what a package computes, whatever the precision of learning.
        is_exact = plan.precision == "fp32"
        self._checked = self._features if is_exact else Features(method, store, frozen=frozen)

    def tune(self, stop_after: int | None = None) -> Run:
        """Learn until the plan's end, or `stop_after` epochs in all; goes on where an earlier run in `folder` ended.

        Raises `DapoEdgeError` when the loss is no number; the best weights so far stay in the folder.
        """
        run, pending = Run(), None
        if self._folder and (self._folder / STATE).exists():
            run, pending = self._restore(self._folder / STATE)
            self._write(LATEST)
        else:
            self._check_validation()
        epoch = 0
        for number, stage in enumerate(self._plan.stages):
            optimizer = self._optimizer(stage)
            for _ in range(stage.epochs):
                epoch += 1
                if epoch <= len(run.history):
                    continue
                if pending is not None:  # of the stage that the interrupted run was in
                    if pending["stage"] == number:
                        optimizer.load_state_dict(pending["optimizer"])
                    pending = None
                if stop_after is not None and epoch > stop_after:
                    return run
                self._one_epoch(run, epoch, number, optimizer)
        self._load(run.best_weights)
        if run.restored:
            self._write(BEST)  # somebody may have moved it away or damaged it
        return run

    def _check_validation(self) -> None:
        """Before the first step: an epoch that nothing can be judged by would be in vain."""
        for start in range(0, len(self._validation), self._plan.batch):
            batch = self._validation[start : start + self._plan.batch]
            if self._store.fetch(batch)[1].any():
                return
        raise _no_defect(len(self._validation))

    def _one_epoch(self, run: Run, epoch: int, stage: int, optimizer: torch.optim.Optimizer) -> None:
        started = time.monotonic()
        losses = [self._step(batch, optimizer, epoch) for batch in self._shuffled(epoch)]
        if not all(torch.isfinite(p).all() for p in itertools.chain(*self._parts.values())):
            raise self._no_number("a weight is no number after the last step of", epoch)
        summary = metrics_of(self._method, self._checked, self._validation, self._phrases, self._noun, self._spec)
        map_loss, image_loss = np.mean(losses, axis=0).tolist()
        seconds = time.monotonic() - started
        run.history.append(Epoch(epoch, stage + 1, map_loss, image_loss, quality_of(summary), summary, seconds))
        if not run.best_epoch or run.history[-1].quality > run.best.quality:
            run.best_epoch, run.best_weights = epoch, self._weights()
            self._write(BEST)
        self._write(LATEST)
        self._write_state(run, stage, optimizer)
        self._on_epoch(run)

    def _step(self, batch: list[int], optimizer: torch.optim.Optimizer, epoch: int) -> tuple[float, float]:
        taps, embedding, types = self._features.fetch(batch)
        rows = self._method.rows(self._phrases, self._noun)
        maps = self._maps(self._method.adapt(taps), rows)
        ids = F.interpolate(types[:, None].float(), size=maps[0].shape[2:], mode="nearest-exact")[:, 0].long()
        defective = (types > 0).flatten(1).any(dim=1)
        map_loss, image_loss = dapo_loss(maps, embedding, rows, ids, defective, self._method.temperature)
        loss = map_loss + image_loss
        if not torch.isfinite(loss):
            shown = ", ".join(self._store.title(index) for index in batch[:3])
            raise self._no_number(f"the loss is {float(loss.detach())} in", epoch, f", with {shown} ...")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(map_loss.detach()), float(image_loss.detach())

    def _no_number(self, what: str, epoch: int, where: str = "") -> DapoEdgeError:
        remedy = "Lower 'learning_rate' in the recipe's tuning stages; nothing was saved"
        if self._folder and (self._folder / BEST).exists():
            best = (self._folder / BEST).resolve()
            remedy = f"Tune into another folder with a lower 'learning_rate'; start from 'prompts.tuned: {best}'"
        elif getattr(self._method, "tuned", False):
            remedy += "; if it happens at any rate, 'prompts.tuned' is no start to learn from"
        return DapoEdgeError(f"{what} epoch {epoch}{where}", remedy)

    def _maps(self, tokens: Tensor, rows: Tensor) -> list[Tensor]:
        """Tokens [B, L, N, D] to probabilities [B, K+1, P, P] of each layer, at the loss's own size."""
        logits = F.normalize(tokens, dim=-1) @ rows.T / self._method.temperature
        probabilities = logits.softmax(dim=-1).transpose(2, 3).unflatten(3, self._method.grid)  # [B, L, K+1, h, w]
        side = self._plan.loss_px or self._method.image_size
        return [
            F.interpolate(layer, size=(side, side), mode="bilinear", align_corners=self._method.align_corners)
            for layer in probabilities.unbind(1)
        ]

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        learning = [p for part in stage.learn for p in self._parts.get(part, [])]
        for parameter in itertools.chain(*self._method.learnables().values()):
            parameter.requires_grad_(False)
        for parameter in learning:
            parameter.requires_grad_(True)
        return torch.optim.Adam(learning, lr=stage.learning_rate, betas=(0.5, 0.999))

    def _shuffled(self, epoch: int) -> Iterator[list[int]]:
        rng = np.random.default_rng([self._plan.seed, epoch])
        order = rng.permutation(self._training).tolist()
        for start in range(0, len(order), self._plan.batch):
            self._progress("tuning", (epoch - 1) * len(order) + start, self._epochs * len(order))
            yield order[start : start + self._plan.batch]
        self._progress("tuning", epoch * len(order), self._epochs * len(order))

    @property
    def _epochs(self) -> int:
        return sum(stage.epochs for stage in self._plan.stages)

    def _weights(self) -> dict[str, list[Tensor]]:
        return {part: [p.detach().clone() for p in parameters] for part, parameters in self._parts.items()}

    @torch.no_grad()
    def _load(self, weights: dict[str, list[Tensor]]) -> None:
        for part, tensors in weights.items():
            for parameter, tensor in zip(self._parts[part], tensors, strict=True):  # type: ignore[index]
                if parameter.shape != tensor.shape:
                    raise ValueError(f"{part} is {list(tensor.shape)}, not {list(parameter.shape)}")
                parameter.copy_(tensor)

    def _write(self, name: str) -> None:
        if self._folder and self._save:
            self._save(self._folder / name)

    def _write_state(self, run: Run, stage: int, optimizer: torch.optim.Optimizer) -> None:
        if not self._folder:
            return
        state = {
            "identity": self._identity(),
            "history": json.dumps([asdict(epoch) for epoch in run.history]),
            "best_epoch": run.best_epoch,
            "best_weights": run.best_weights,
            "weights": self._weights(),
            "stage": stage,
            "optimizer": optimizer.state_dict(),
        }
        buffer = io.BytesIO()  # a full disk makes torch.save fail with an error of its own
        torch.save(state, buffer)
        write_atomically(self._folder / STATE, buffer.getvalue())

    def _identity(self) -> str:
        """Everything that the result depends on; a run goes on only where it is the same."""
        shapes = {part: [list(p.shape) for p in parameters] for part, parameters in self._parts.items()}
        return json.dumps(
            {
                # Where the pictures lie, and how their folder is read, shows in the pictures themselves.
                **self._plan.model_dump(mode="json", exclude={"data", "layout", "categories"}),
                "phrases": self._phrases,
                "names": self._store.names,
                "noun": self._noun,
                "pictures": self._store.identity,
                "versions": [dapo_edge.__version__, torch.__version__],
                "maps": asdict(self._spec),
                "feature_layers": self._method.feature_layers,
                "readout": getattr(self._method, "readout", None),
                "backbone": self._method.clip.fingerprint,
                "shapes": shapes,
                "device": next(self._method.encoder_tensors()).device.type,
                "starting weights": self._start,
            }
        )

    def _restore(self, path: Path) -> tuple[Run, dict[str, Any]]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            differing = _differing(state["identity"], self._identity())
            if not differing:
                history = [
                    Epoch(**{**entry, "validation": Summary(**entry["validation"])})
                    for entry in json.loads(state["history"])
                ]
                self._load(state["weights"])
                return Run(history, int(state["best_epoch"]), state["best_weights"], len(history)), state
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged archive fails in any way it likes
            raise RecipeError(
                f"the state of an earlier run, '{path}', can't be read ({type(error).__name__})",
                "Delete the file to begin again",
            ) from error
        raise RecipeError(
            f"'{path}' belongs to another run: {', '.join(differing)} differ",
            "Tune into another folder (--output); to go on from its prompts, name a copy of them in 'prompts.tuned'",
        )


def _differing(one: str, other: str) -> list[str]:
    """What two identities do not share."""
    first, second = json.loads(one), json.loads(other)
    return sorted(key for key in {*first, *second} if first.get(key) != second.get(key))


def split_pictures(store: ViewStore, plan: TuningPlan) -> tuple[list[int], list[int]]:
    """Indices to learn from and to validate on, drawn by the plan's seed. Raises `RecipeError` for too few.

    Where kinds are known, each gives its share, and both sides get good and defective pictures.
    """
    order = np.random.default_rng([plan.seed, 0]).permutation(len(store)).tolist()
    if store.kinds is None:
        count = max(1, round(plan.validation * len(order)))
        held_out = order[:count]
    else:
        held_out = _share_of_each(order, store.kinds, plan.validation)
    left = set(held_out)
    training = [index for index in order if index not in left]
    if not training:
        raise RecipeError(f"{len(order)} pictures are too few to tune with", "Give at least two, better hundreds")
    return training, held_out


def _share_of_each(order: Sequence[int], kinds: Sequence[tuple[str, str]], share: float) -> list[int]:
    """A share of the pictures, spread evenly over the kinds (systematic sampling of the list sorted by kind)."""
    by_kind = sorted(order, key=lambda index: kinds[index])
    held_out = {
        index for place, index in enumerate(by_kind) if int((place + 1) * share + 0.5) > int(place * share + 0.5)
    }
    for is_good in (True, False):
        members = [index for index in order if (kinds[index][1] == NORMAL) == is_good]
        if len(members) < 2:
            what = "good" if is_good else "defective"
            raise RecipeError(
                f"{len(members)} {what} pictures are too few to tune with", "Give at least two, better hundreds"
            )
        if not held_out & {*members}:
            held_out.add(members[0])
        if {*members} <= held_out:
            held_out.remove(members[-1])
    return [index for index in order if index in held_out]
