"""The protocol surfaces-v1: who sees which materials and defects, and on which seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

# Generated pictures are numbered; the ranges of two purposes never meet.
PRETRAINING_SEED = 10**9
TUNING_SEED = 10**7
VALIDATION_SEED = 2 * 10**7
TEST_SEED = 3 * 10**7


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
