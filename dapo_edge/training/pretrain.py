"""Contrastive image-caption pretraining of the reference CLIP on the generated world: no masks, images and words only.

Two terms. *Global*: the class token against the caption, softmax over the batch both ways, where every caption that is
true of an image is a positive (CLIP, arXiv 2103.00020, with shared positives). *Local*: the same for the patches of an
image that fit a caption best (fine-grained contrast, FILIP, arXiv 2111.07783), among the defective pictures only,
because most patches of a defective picture are flawless. The run is seeded and resumable, and the same on every machine
up to rounding.

    python -m dapo_edge.training.pretrain OUT --images 300000
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dapo_edge.data import protocol
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.errors import DapoEdgeError, RecipeError
from dapo_edge.files import write_atomically
from dapo_edge.models.clip import Clip, load_clip, resize_position, run_block
from dapo_edge.models.prompts import encode_sentences
from dapo_edge.sections import Section
from dapo_edge.training.views import WorldView, world_view

STATE, LOG, WEIGHTS = "state.pt", "log.csv", "weights.safetensors"
MAX_SCALE = 100.0  # of the logits, as CLIP clips it


class Phase(Section):
    """A stretch of the run at one image size, with a share of the patches kept."""

    share: float = Field(gt=0, le=1, description="of all images")
    image_size: int = Field(ge=16, le=1024)
    keep: float = Field(1.0, gt=0, le=1, description="share of the patches that the encoder sees")


class Pretraining(Section):
    """Settings of a run; the defaults are those of the shipped weights but for the number of images."""

    model: str = "surface-tiny"
    images: int = Field(300_000, ge=1, description="pictures seen, each once")
    batch: int = Field(128, ge=2, le=65_536)
    learning_rate: float = Field(1.5e-3, gt=0)
    warmup: int = Field(200, ge=0, description="steps")
    weight_decay: float = Field(0.05, ge=0)
    local_weight: float = Field(1.0, ge=0, description="of the local term")
    local_patches: float = Field(0.03, gt=0, le=1, description="share of the patches that have to fit the caption")
    phases: tuple[Phase, ...] = (
        Phase(share=0.6, image_size=96),
        Phase(share=0.4, image_size=144, keep=0.5),
    )
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _whole(self) -> Pretraining:
        if not self.phases or abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ValueError("the shares of the phases must add up to 1")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.images / self.batch)

    def phase_at(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        end = 0.0
        for phase in self.phases:
            end += phase.share
            if step < round(end * self.steps):
                return phase
        return self.phases[-1]


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures and their captions."""

    images: Tensor  # [B, 3, S, S] uint8 RGB
    ids: Tensor  # [B, T] token ids
    positive: Tensor  # [B, B] bool: caption j is true of image i
    defective: Tensor  # [B] bool


class Captioned(Dataset[WorldView]):
    """Pictures of the pretraining world by number; the size follows the phase that the number falls into."""

    def __init__(self, settings: Pretraining) -> None:
        self._settings = settings
        self._first = protocol.first_picture(protocol.PRETRAINING, settings.seed, len(self))

    def __len__(self) -> int:
        return self._settings.steps * self._settings.batch

    def __getitem__(self, index: int) -> WorldView:
        split = surfaces_v1()
        size = self._settings.phase_at(index // self._settings.batch).image_size
        return world_view(self._first + index, size, split.pretraining_materials, split.defects, max_defects=2)


def pretrain(
    settings: Pretraining,
    folder: Path,
    *,
    device: str = "cpu",
    workers: int = 1,
    on_step: Callable[[int, int, float], None] = lambda step, of, loss: None,
    save_every: int = 200,
    stop_at: int | None = None,
) -> Path:
    """Run, or go on with, a pretraining in `folder`; returns the FP16 weights (safetensors).

    `stop_at` ends early after that many steps, as a kill would, but saved. Raises `RecipeError` for a folder of other
    settings, `DapoEdgeError` when the loss is no number: the last good state stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clip = load_clip(settings.model, seed=settings.seed)
    model = clip.text.to(device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(_groups(model, settings), lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6)
    step = _restore(folder / STATE, settings, model, optimizer)
    last = min(settings.steps, stop_at or settings.steps)
    started, recent = time.monotonic(), []
    for batch in _batches(settings, clip, step, last, workers):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss = _loss(clip, batch, settings, step, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):  # before they reach the weights
            raise DapoEdgeError(
                f"the loss is {float(loss.detach())} and its gradient {float(norm)} long at step {step}",
                f"Go on from the last saved state in '{folder}' with a lower learning rate",
            )
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_SCALE))
        step += 1
        recent.append(float(loss.detach()))
        on_step(step, settings.steps, recent[-1])
        if step % save_every == 0 or step == last:
            _save(folder, settings, model, optimizer, step)
            _log(folder / LOG, step, settings, float(np.mean(recent)), model, time.monotonic() - started)
            recent.clear()
    return save_weights(model, folder / WEIGHTS)


def save_weights(model: torch.nn.Module, path: Path) -> Path:
    """Write every tensor of a CLIP in FP16, as open_clip reads it."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    return write_atomically(path, save(tensors))


def encode_views(clip: Clip, images: Tensor, keep: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normalised RGB [B, 3, S, S] to unit vectors: of the images [B, D] and of the kept patches [B, n, D]."""
    visual = clip.visual
    x = visual.conv1(images)
    position = resize_position(visual.positional_embedding, (x.shape[2], x.shape[3]))
    x = x.flatten(2).transpose(1, 2) + position[1:]
    if keep < 1:
        count = max(1, round(keep * x.shape[1]))
        kept = torch.rand(x.shape[:2], generator=generator).argsort(dim=1)[:, :count].to(x.device)
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    first = (visual.class_embedding + position[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first, x], dim=1))
    for block in visual.transformer.resblocks:
        x = run_block(block, x)
    x = F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)
    return x[:, 0], x[:, 1:]


def contrast(similarity: Tensor, positive: Tensor) -> Tensor:
    """Symmetric cross-entropy of similarities [B, B] against all positives of a row or column, shared evenly."""
    target = positive.float()
    rows = -(target / target.sum(1, keepdim=True) * similarity.log_softmax(1)).sum(1).mean()
    columns = -(target / target.sum(0, keepdim=True) * similarity.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def best_patches(patches: Tensor, texts: Tensor, count: int) -> Tensor:
    """Mean similarity [B, P] of the `count` patches of [B, n, D] that fit each text of [P, D] best."""
    return (patches @ texts.T).topk(count, dim=1).values.mean(dim=1)


def _loss(clip: Clip, batch: Batch, settings: Pretraining, step: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.mean, clip.std))
    images = (batch.images.to(device).float() / 255 - mean) / std
    positive, defective = batch.positive.to(device), batch.defective.to(device)
    with torch.autocast(device, torch.bfloat16):
        vectors, patches = encode_views(clip, images, settings.phase_at(step).keep, generator)
        texts = F.normalize(encode_sentences(clip, batch.ids.to(device)), dim=-1)
        scale = clip.text.logit_scale.exp()
        loss = contrast((scale * (vectors @ texts.T)).float(), positive)
        if settings.local_weight and defective.any():
            count = max(1, round(settings.local_patches * patches.shape[1]))
            local = best_patches(patches[defective], texts[defective], count)
            among = positive[defective][:, defective]
            loss = loss + settings.local_weight * contrast((scale * local).float(), among)
    return loss


def _batches(settings: Pretraining, clip: Clip, first: int, last: int, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        Captioned(settings),
        batch_size=settings.batch,
        sampler=range(first * settings.batch, last * settings.batch),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=_Collate(clip.tokenizer),
        worker_init_fn=_one_thread,
    )
    yield from loader


def _one_thread(worker: int) -> None:
    from dapo_edge.data.brushes import cv2

    torch.set_num_threads(1)
    cv2().setNumThreads(1)


class _Collate:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, views: Sequence[WorldView]) -> Batch:
        ids = self._tokenizer([view.caption.text for view in views])
        ids = ids[:, : int((ids != 0).sum(1).max())]
        true = [
            [
                caption.defects == view.caption.defects and caption.material in (None, view.material)
                for caption in (other.caption for other in views)
            ]
            for view in views
        ]
        images = np.stack([view.image[..., ::-1].transpose(2, 0, 1) for view in views])
        defective = torch.tensor([bool(view.caption.defects) for view in views])
        return Batch(torch.from_numpy(images), ids, torch.tensor(true), defective)


def _groups(model: torch.nn.Module, settings: Pretraining) -> list[dict[str, Any]]:
    """Matrices decay; embeddings do not, because a word that no caption holds would fade away."""
    decaying: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim < 2 or "embedding" in name else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _learning_rate(settings: Pretraining, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    rising = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def _save(folder: Path, settings: Pretraining, model: Any, optimizer: Any, step: int) -> None:
    state = {
        "settings": settings.model_dump_json(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    buffer = io.BytesIO()  # a full disk makes torch.save fail with an error of its own
    torch.save(state, buffer)
    write_atomically(folder / STATE, buffer.getvalue())


def _restore(path: Path, settings: Pretraining, model: Any, optimizer: Any) -> int:
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] == settings.model_dump_json():
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return int(state["step"])
    except Exception as error:  # a damaged archive fails in any way it likes, and so do tensors of another shape
        raise RecipeError(
            f"the state of an earlier run, '{path}', can't be read ({type(error).__name__})",
            "Name another folder, or delete the file to begin again",
        ) from error
    raise RecipeError(f"'{path}' belongs to a run with other settings", "Name another folder, or the same settings")


def _log(path: Path, step: int, settings: Pretraining, loss: float, model: Any, seconds: float) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["step", "images", "loss", "logit_scale", "learning_rate", "seconds"])
        rate, scale = _learning_rate(settings, step - 1), float(model.logit_scale.detach().exp())
        writer.writerow([step, step * settings.batch, f"{loss:.4f}", f"{scale:.2f}", f"{rate:.2e}", f"{seconds:.0f}"])


def main() -> None:
    """Parse the command line and run."""
    import click

    @click.command(help=(__doc__ or "").partition("\n\n")[0])
    @click.argument("folder", type=click.Path(path_type=Path))
    @click.option("--images", default=Pretraining().images, show_default=True, type=click.IntRange(min=1))
    @click.option("--batch", default=Pretraining().batch, show_default=True, type=click.IntRange(min=2))
    @click.option("--learning-rate", default=Pretraining().learning_rate, show_default=True)
    @click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
    @click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
    @click.option("--workers", default=1, show_default=True, type=click.IntRange(min=0))
    @click.option("--stop-at", type=click.IntRange(min=1), help="End after this many steps, to be gone on with later.")
    def run(folder: Path, device: str, workers: int, stop_at: int | None, **chosen: Any) -> None:
        from dapo_edge.terminal import say

        settings = Pretraining(**chosen)
        started = time.monotonic()

        def show(step: int, of: int, loss: float) -> None:
            if step % 20 == 0 or step == of:
                say(f"step {step}/{of}  loss {loss:.3f}  {time.monotonic() - started:.0f} s")

        try:
            weights = pretrain(settings, folder, device=device, workers=workers, on_step=show, stop_at=stop_at)
        except DapoEdgeError as error:
            raise click.ClickException(str(error)) from error
        say(str(weights))

    run()


if __name__ == "__main__":
    main()
