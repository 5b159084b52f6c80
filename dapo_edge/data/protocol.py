"""The protocol surfaces-v1: who sees which materials and defects, and on which seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dapo_edge.errors import RecipeError

# Every picture of the generated world has a number. Each purpose has a stretch of its own, and within it each seed.
PRETRAINING = 0  # the first stretch is shared with `make_surface` called with small numbers of one's own
TUNING, TEST, THRESHOLDS, GATE, CALIBRATION = range(1, 6)
_STRETCH, _SEED_BITS, PICTURES_PER_SEED = 2**44, 20, 2**24
FREE_FROM = 6 * _STRETCH  # numbers that no purpose uses


def first_picture(purpose: int, seed: int, count: int) -> int:
    """Number of the first of `count` pictures. Stretches of two purposes never meet; seeds repeat after 2^20.

    Raises `RecipeError` for more pictures than a seed has.
    """
    if count > PICTURES_PER_SEED:
        raise RecipeError(
            f"{count} pictures are more than one seed has", f"Use at most {PICTURES_PER_SEED}, or several seeds"
        )
    if purpose == PRETRAINING:
        return 10**9 * (1 + seed % 1000)
    return purpose * _STRETCH + seed % 2**_SEED_BITS * PICTURES_PER_SEED


@dataclass(frozen=True)
class Split:
    """Names of the generated world by the stage that may see them."""

    tuned_materials: tuple[str, ...]
    new_materials: tuple[str, ...]  # seen in pretraining, not in tuning
    unseen_materials: tuple[str, ...]  # seen nowhere
    tuned_defects: tuple[str, ...]
    novel_defects: tuple[str, ...]  # words of pretraining, not of tuning

    @property
    def pretraining_materials(self) -> tuple[str, ...]:
        """All but the unseen ones."""
        return self.tuned_materials + self.new_materials

    @property
    def defects(self) -> tuple[str, ...]:
        """All types, tuned ones first."""
        return self.tuned_defects + self.novel_defects


@cache
def surfaces_v1() -> Split:
    """The split of `surfaces-v1.yaml`."""
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "surfaces-v1.yaml").read_text(encoding="utf-8"))
    materials, defects = content["materials"], content["defects"]
    return Split(
        tuple(materials["tuned"]),
        tuple(materials["new"]),
        tuple(materials["unseen"]),
        tuple(defects["tuned"]),
        tuple(defects["novel"]),
    )
