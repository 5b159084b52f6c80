"""A tiny random CLIP, and an easy world of bright and dark squares on grey, for tests of training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from dapo_edge.config import PARTS, Part, Stage, TuningPlan
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models import checkpoints
from dapo_edge.models.clip import load_clip
from dapo_edge.models.dapo import Dapo, DapoOptions
from dapo_edge.structures import NORMAL
from dapo_edge.training.trainer import BEST, LATEST, Run, Trainer
from dapo_edge.training.tune import LOG
from dapo_edge.training.views import View, ViewStore

SIDE, PATCH = 32, 8
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 32, "head_width": 16, "patch_size": PATCH},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
OPTIONS = DapoOptions(groups=2, context_tokens=2, text_depth=2, text_tokens=2, visual_tokens=2)
WORDS = ("hole", "stain")
EIGHT = list(DEFECTS)[:8]
TWO_STAGES: Any = ((("context", "adapters"), 2), (PARTS, 2))


def write_config(folder: Path) -> Path:
    path = folder / "easy-clip.json"
    path.write_text(json.dumps(CONFIG))
    return path


class Squares:
    """Half of the pictures good; the others with a bright hole or a dark stain."""

    names = (NORMAL, *WORDS)

    def __init__(self, count: int = 24) -> None:
        self.count = count
        self.identity = f"{count} squares"
        self.kinds = None

    def title(self, index: int) -> str:
        return f"square {index}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> View:
        rng = np.random.default_rng([7, index])
        image = (128 + rng.normal(0, 4, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
        types = np.zeros((SIDE, SIDE), np.uint8)
        if index % 2:
            kind = 1 + index // 2 % 2
            y, x = PATCH * rng.integers(0, 3, 2)
            image[y : y + 12, x : x + 12] = 250 if kind == 1 else 10
            types[y : y + 12, x : x + 12] = kind
        return View(image, types)


def fresh(config: Path, seed: int = 3, **changes: Any) -> Dapo:
    """A newly made method on a newly made CLIP, as another process would have it."""
    return Dapo(load_clip(str(config), seed=1), options=OPTIONS.model_copy(update=changes), seed=seed)


def plan_of(*stages: tuple[tuple[Part, ...], int], learning_rate: float = 0.01, **changes: Any) -> TuningPlan:
    table = tuple(Stage(learn=learn, epochs=epochs, learning_rate=learning_rate) for learn, epochs in stages)
    return TuningPlan(**{"stages": table, "validation": 0.34, "loss_px": 16, "batch": 5, "images": 8, **changes})


def trainer_of(
    method: Dapo, plan: TuningPlan, folder: Path | None = None, *, pictures: Any = None, **changes: Any
) -> Trainer:
    spec = MapSpec(SIDE, method.grid, method.temperature, method.align_corners, 2.0, "image")
    arguments: dict[str, Any] = {"spec": spec, "folder": folder, "save": method.save, **changes}
    return Trainer(method, ViewStore(pictures or Squares(), SIDE), WORDS, "object", plan, **arguments)


def tensors_of(method: Dapo) -> dict[str, np.ndarray]:
    """Copies of all learnable tensors by part and place."""
    return {
        f"{part} {place}": tensor.detach().numpy().copy()
        for part, tensors in method.learnables().items()
        for place, tensor in enumerate(tensors)
    }


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.view(np.uint32), other[name].view(np.uint32), err_msg=name)


def histories(run: Run) -> list[dict[str, Any]]:
    """Everything but the time it took."""
    return [{**epoch.as_json(), "seconds": 0.0} for epoch in run.history]


def assert_same_files(one: Path, other: Path) -> None:
    assert one.read_bytes() == other.read_bytes()


def assert_same_runs(one: Path, other: Path) -> None:
    for name in (BEST, LATEST):
        a, b = checkpoints.read(one / name), checkpoints.read(other / name)
        assert a.tuning == b.tuning
        assert_same_bits(
            *({field: getattr(file.tensors, field).numpy() for field in checkpoints.FREE_AXES} for file in (a, b))
        )
    assert lines_of(one / LOG, but="seconds") == lines_of(other / LOG, but="seconds")


def lines_of(path: Path, but: str = "") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in line.items() if key != but} for line in csv.DictReader(file)]
