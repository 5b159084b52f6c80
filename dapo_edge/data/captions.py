"""Captions of generated pictures, in varied wording. All words stand in `captions.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# Half of the captions say the plain word, so that it is learnt best; the other half is spread over its synonyms.
_PLAIN_SHARE = 0.5
# Captions that leave the material open teach the defect's word on its own.
_OPEN_SHARE = 0.4


@dataclass(frozen=True)
class Caption:
    """A sentence, and what it claims: it is true of every picture with this material and exactly these defects."""

    text: str
    material: str | None  # None: the sentence leaves it open
    defects: tuple[str, ...]  # () for a good part

    def __str__(self) -> str:
        return self.text


def write_caption(rng: np.random.Generator, material: str, defects: Sequence[str]) -> Caption:
    """A caption of a picture of `material` with `defects`."""
    words = vocabulary()
    is_open = rng.random() < _OPEN_SHARE
    thing = str(rng.choice(words["objects"])) if is_open else _synonym(rng, words["materials"][material])
    phrases = [_synonym(rng, words["defects"][defect]) for defect in defects]
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))
    template = str(rng.choice(words["defective" if defects else "good"]))
    return Caption(template.format(m=thing, d=listed), None if is_open else material, tuple(defects))


def _synonym(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    return phrases[0] if rng.random() < _PLAIN_SHARE else str(rng.choice(phrases[1:]))


@cache
def vocabulary() -> dict[str, Any]:
    """The content of `captions.yaml`."""
    text = (Path(__file__).parent / "captions.yaml").read_text(encoding="utf-8")
    words: dict[str, Any] = yaml.safe_load(text)
    return words
