"""Tuning: prompts, deep tokens and adapters learn from labelled pictures while CLIP stays frozen (methods 1.4).

A run is a folder. Its state is written after every epoch, and a run that was killed goes on from there to exactly the
weights that it would have reached: pictures, their order and the arithmetic depend on the seed and the epoch alone.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dapo_edge.config import Stage, TuningPlan
from dapo_edge.errors import DapoEdgeError, RecipeError
from dapo_edge.evaluation.metrics import Evaluation, Summary
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.method import Method
from dapo_edge.package import writing_to
from dapo_edge.training.losses import dapo_loss
from dapo_edge.training.views import ViewStore

STATE, LATEST, BEST = "state.pt", "latest.safetensors", "best.safetensors"
FEATURE_BYTES = 4 << 30  # features of a frozen encoder above this are computed again in every epoch
_EVALUATION_BATCH = 32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Epoch:
    """One line of a run's history."""

    epoch: int  # counts from 1
    stage: int
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
    return float(np.nanmean(metrics))


@dataclass(eq=False)
class Run:
    """A tuning run: its history and the best state so far. `weights` hold the learnable tensors by part."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, list[Tensor]] = field(default_factory=dict)

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
    ) -> None:
        """`phrases` belong to `store.names[1:]`; without `folder` nothing is written. Raises `RecipeError`."""
        if len(phrases) != len(store.names) - 1:
            raise ValueError(f"{len(phrases)} phrases for the names {store.names}")
        self._method, self._store, self._plan, self._spec = method, store, plan, spec
        self._phrases, self._noun = tuple(phrases), noun
        self._folder, self._save, self._progress = folder, save, on_progress
        self._training, self._validation = split(store, plan)
        learning = {part for stage in plan.stages for part in stage.learn}
        self._parts = {part: parameters for part, parameters in method.learnables().items() if part in learning}
        if not any(self._parts.values()):
            raise RecipeError(
                "nothing is left to learn", "Name a part in 'tuning.stages' that 'options' did not remove"
            )
        frozen = not self._parts.get("visual_tokens")
        self._features = Features(method, store, precision=plan.precision, frozen=frozen)

    def tune(self, stop_after: int | None = None) -> Run:
        """Learn until the plan's end, or `stop_after` epochs in all; goes on where an earlier run in `folder` ended.

        Raises `DapoEdgeError` when the loss is no number; the best weights so far stay in the folder.
        """
        run, pending = Run(), None
        if self._folder and (self._folder / STATE).exists():
            run, pending = self._restore(self._folder / STATE)
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
        return run

    def _one_epoch(self, run: Run, epoch: int, stage: int, optimizer: torch.optim.Optimizer) -> None:
        started = time.monotonic()
        losses = [self._step(batch, optimizer, epoch) for batch in self._shuffled(epoch)]
        summary = evaluate(self._method, self._features, self._validation, self._phrases, self._noun, self._spec)
        map_loss, image_loss = np.mean(losses, axis=0).tolist()
        seconds = time.monotonic() - started
        run.history.append(Epoch(epoch, stage, map_loss, image_loss, quality_of(summary), summary, seconds))
        if not run.best_epoch or run.history[-1].quality > run.best.quality:
            run.best_epoch, run.best_weights = epoch, self._weights()
            self._write(BEST)
        self._write(LATEST)
        self._write_state(run, stage, optimizer)

    def _step(self, batch: list[int], optimizer: torch.optim.Optimizer, epoch: int) -> tuple[float, float]:
        taps, embedding, types = self._features.fetch(batch)
        rows = self._method.rows(self._phrases, self._noun)
        maps = self._maps(self._method.adapt(taps), rows)
        ids = F.interpolate(types[:, None].float(), size=maps[0].shape[2:], mode="nearest-exact")[:, 0].long()
        map_loss, image_loss = dapo_loss(maps, embedding, rows, ids, self._method.temperature)
        loss = map_loss + image_loss
        if not torch.isfinite(loss):
            raise DapoEdgeError(
                f"the loss is {float(loss)} in epoch {epoch} (pictures {', '.join(map(str, batch[:8]))}...)",
                "Lower 'learning_rate' in the recipe's tuning stages; "
                + ("the best weights so far are in " + str(self._folder) if self._folder else "nothing was saved"),
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(map_loss.detach()), float(image_loss.detach())

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
            self._progress(f"epoch {epoch}", start, len(order))
            yield order[start : start + self._plan.batch]
        self._progress(f"epoch {epoch}", len(order), len(order))

    def _weights(self) -> dict[str, list[Tensor]]:
        return {part: [p.detach().clone() for p in parameters] for part, parameters in self._parts.items()}

    @torch.no_grad()
    def _load(self, weights: dict[str, list[Tensor]]) -> None:
        for part, tensors in weights.items():
            for parameter, tensor in zip(self._parts[part], tensors, strict=True):  # type: ignore[index]
                parameter.copy_(tensor)

    def _write(self, name: str) -> None:
        if self._folder and self._save:
            with writing_to(self._folder / name):
                self._folder.mkdir(parents=True, exist_ok=True)
                beside = self._folder / f"{name}.new"
                self._save(beside)
                beside.replace(self._folder / name)

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
        with writing_to(self._folder / STATE):
            self._folder.mkdir(parents=True, exist_ok=True)
            beside = self._folder / f"{STATE}.new"
            beside.write_bytes(buffer.getvalue())
            beside.replace(self._folder / STATE)

    def _identity(self) -> str:
        """Everything that the result depends on; a run goes on only where it is the same."""
        shapes = {part: [list(p.shape) for p in parameters] for part, parameters in self._parts.items()}
        return json.dumps(
            {
                "plan": self._plan.model_dump(mode="json"),
                "phrases": self._phrases,
                "names": self._store.names,
                "noun": self._noun,
                "pictures": len(self._store),
                "image_size": self._method.image_size,
                "backbone": self._method.clip.fingerprint,
                "parts": shapes,
            }
        )

    def _restore(self, path: Path) -> tuple[Run, dict[str, Any]]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:  # a damaged archive fails in any way it likes
            raise RecipeError(
                f"the state of an earlier run, '{path}', can't be read ({type(error).__name__})",
                "Delete the file to begin again",
            ) from error
        if identity != self._identity():
            raise RecipeError(
                f"'{path}' belongs to a run with other settings, words, pictures or weights",
                "Tune into another folder (--output), or delete this one to begin again",
            )
        history = [
            Epoch(**{**entry, "validation": Summary(**entry["validation"])}) for entry in json.loads(state["history"])
        ]
        self._load(state["weights"])
        return Run(history, int(state["best_epoch"]), state["best_weights"]), state


class Features:
    """What a method's encoder gives for pictures; computed once where the encoder is frozen and memory allows it."""

    def __init__(self, method: Method, store: ViewStore, *, precision: str = "fp32", frozen: bool = True) -> None:
        self.store = store
        self._method = method
        self._is_mixed = precision == "bf16"
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (method.clip.mean, method.clip.std))
        per_picture = len(method.feature_layers) * method.grid[0] * method.grid[1] * method.clip.width * 4
        self._keeps = frozen and len(store) * per_picture <= FEATURE_BYTES
        self._kept: dict[int, tuple[list[Tensor], Tensor]] = {}

    def fetch(self, batch: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Raw taps [B, N, width] of every feature layer, embedding [B, D], both float32, and true types [B, S, S]."""
        images, types = self.store.fetch(batch)
        device = next(self._method.encoder.parameters()).device
        truth = torch.from_numpy(types).to(device)
        if not self._keeps:
            return *self._encode(images, device), truth
        for place, index in enumerate(batch):
            if index not in self._kept:
                # One picture at a time: the result must not depend on which pictures share its batch.
                with torch.no_grad():
                    taps, embedding = self._encode(images[place : place + 1], device)
                self._kept[index] = ([tap[0] for tap in taps], embedding[0])
        kept = [self._kept[index] for index in batch]
        taps = [torch.stack(layer) for layer in zip(*(taps for taps, _ in kept), strict=True)]
        return taps, torch.stack([embedding for _, embedding in kept]), truth

    def _encode(self, images: NDArray[np.uint8], device: torch.device) -> tuple[list[Tensor], Tensor]:
        rgb = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=self._is_mixed):
            taps, embedding = self._method.encoder(((rgb - self._mean) / self._std).to(device))
        return [tap.float() for tap in taps], embedding.float()


@torch.no_grad()
def evaluate(
    method: Method, features: Features, indices: Sequence[int], phrases: Sequence[str], noun: str, spec: MapSpec
) -> Summary:
    """Metrics of pictures, with maps and scores as the built package would make them."""
    rows = method.rows(phrases, noun)
    evaluation = Evaluation(features.store.names)
    for start in range(0, len(indices), _EVALUATION_BATCH):
        taps, embedding, types = features.fetch(indices[start : start + _EVALUATION_BATCH])
        _add_maps(evaluation, method.adapt(taps), embedding, rows, types, spec)
    return evaluation.summary()


def _add_maps(
    evaluation: Evaluation, tokens: Tensor, embedding: Tensor, rows: Tensor, types: Tensor, spec: MapSpec
) -> None:
    """Count pictures in `evaluation`: maps and scores by the reference arithmetic, at the size of `types` [B, H, W].

    A method with one row for all defects gives every type the same share of it.
    """
    bank = rows.cpu().numpy()
    probabilities = reference.patch_probabilities(tokens.cpu().numpy(), bank, spec.temperature, spec.grid)
    kinds = evaluation.types.types
    if probabilities.shape[1] == 2 < kinds + 1:
        probabilities = np.concatenate([probabilities[:, :1], probabilities[:, 1:].repeat(kinds, axis=1) / kinds], 1)
    height, width = types.shape[1:]
    maps = np.clip(reference.upsample_maps(probabilities, *spec.tables((width, height))), 0, 1)
    scores = reference.image_scores(spec.score, embedding.cpu().numpy(), bank, spec.temperature, 1 - maps[:, 0])
    for channels, score, truth in zip(maps, scores.tolist(), types.cpu().numpy(), strict=True):
        evaluation.add(channels, score, truth)


def split(store: ViewStore, plan: TuningPlan) -> tuple[list[int], list[int]]:
    """Indices to learn from and to validate on, drawn by the plan's seed. Raises `RecipeError` for too few."""
    order = np.random.default_rng([plan.seed, 0]).permutation(len(store)).tolist()
    held_out = max(1, round(plan.validation * len(order)))
    if len(order) - held_out < 1:
        raise RecipeError(f"{len(order)} pictures are too few to tune with", "Give at least two, better hundreds")
    return order[held_out:], order[:held_out]
