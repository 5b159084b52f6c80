"""A data set painted on grey, and a subject that sees it: red is one type, blue another, strength is anomaly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dapo_edge.backends.base import MapBatch
from dapo_edge.backends.host import resize_view
from dapo_edge.config import parse_recipe
from dapo_edge.evaluation.subject import Subject
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.package import Threshold, Thresholds
from dapo_edge.prompt_bank import PromptBank

SIDE, GRID = 64, 16
CHANNEL = {"rust": 2, "stain": 0}  # of BGR


class Painter:
    """The engine of the subject: how far a colour stands out of grey, patch by patch."""

    name, device, precision = "painter", "none", "fp32"

    def __init__(self, spec: MapSpec, gain: float = 1.0) -> None:
        self.spec, self.gain, self.seen, self.closed = spec, gain, 0, False
        self.bank = PromptBank(("normal", "rust", "stain"), np.eye(3, dtype=np.float32))

    def infer(self, views: Sequence[NDArray[np.uint8]], *, map_size: object = None) -> MapBatch:
        self.seen += len(views)
        small = np.stack([resize_view(view, GRID) for view in views]).astype(np.float32) / 255  # [B, h, w, 3]
        grey = small.min(axis=3)
        share = np.clip(
            self.gain * np.stack([small[..., CHANNEL["rust"]] - grey, small[..., CHANNEL["stain"]] - grey]), 0, 1
        )
        share = np.clip(share, 0.001, 0.45).transpose(1, 0, 2, 3)  # [B, 2, h, w]
        probs = np.concatenate([1 - share.sum(axis=1, keepdims=True), share], axis=1).astype(np.float32)
        maps = reference.defect_map(probs, *self.spec.tables((SIDE, SIDE)))
        return MapBatch(
            maps.anomaly, maps.types, probs, maps.peaks[:, 1:], maps.anomaly.max(axis=(1, 2)), self.bank, {}
        )

    def set_bank(self, bank: PromptBank) -> None:
        self.bank = bank

    def close(self) -> None:
        self.closed = True


def subject(gain: float = 1.0, limit: float | None = 0.2, name: str = "painted") -> Subject:
    spec = MapSpec(SIDE, (GRID, GRID), 0.07, False, 0.0, "max")
    recipe = parse_recipe({"name": name, "backbone": {"model": "x.json"}, "prompts": {"defects": ["rust", "stain"]}})
    engine = Painter(spec, gain)
    found = None
    if limit is not None:
        threshold = Threshold(value=limit, false_reject_rate=0, confidence_95=(0, 0.1))
        found = Thresholds(image=threshold, pixel=threshold, source="test", frames=10, bank=engine.bank.digest)

    def no_method() -> Any:
        raise AssertionError("no other words are asked for")

    return Subject(Path(f"{name}.dapo"), engine, spec, recipe, f"{name} {gain}", thresholds=found, method=no_method)  # type: ignore[arg-type]


def paint(defect: str | None, number: int, strength: int = 120) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A grey picture [H, W, 3] BGR with a square of the defect's colour, and its mask [H, W]."""
    rng = np.random.default_rng([3, number])
    image = (100 + rng.normal(0, 3, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    if defect:
        y, x = rng.integers(4, SIDE - 24, 2)
        image[y : y + 20, x : x + 16, CHANNEL.get(defect, 0)] += np.uint8(strength)
        mask[y : y + 20, x : x + 16] = 255
    return image, mask


def write_folder(
    root: Path, categories: Sequence[str] = ("nut",), good: int = 4, bad: int = 3, strength: int = 120
) -> Path:
    """The layout "folder": good, rust and stain, with masks."""
    for category in categories:
        for kind, count in (("good", good), ("rust", bad), ("stain", bad)):
            for number in range(count):
                image, mask = paint(None if kind == "good" else kind, 100 * len(kind) + number, strength - 30 * number)
                save(root / category / kind / f"{number}.png", image[..., ::-1])
                if kind != "good":
                    save(root / category / "masks" / kind / f"{number}.png", mask)
    return root


def save(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
