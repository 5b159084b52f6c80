"""The prompt bank: one unit vector per defect type and one for normal, with their names.

It is a small file beside the engine, so a new word costs seconds and a running line can change banks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import PackageDamaged, PackageIncompatible
from dapo_edge.structures import NORMAL

_UNIT_TOLERANCE = 1e-3
_FORMAT = "dapo-edge prompt bank 1"


@dataclass(frozen=True, eq=False)
class PromptBank:
    """Names, phrases and prompt embeddings. Row 0 is normal, rows 1..K are the defect types."""

    names: tuple[str, ...]  # K + 1, names[0] == "normal"
    rows: NDArray[np.float32]  # [K + 1, D], unit length
    phrases: tuple[str, ...] = ()  # K + 1, what the text encoder read
    origin: Mapping[str, str] = field(default_factory=dict)  # how it was made: method, readout, tuned file ...

    def __post_init__(self) -> None:
        problem = _problem(self.names, self.rows, self.phrases)
        if problem:
            raise ValueError(problem)

    @property
    def dimensions(self) -> int:
        """Length D of a row."""
        return int(self.rows.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and rows: thresholds are valid for one bank only."""
        return hashlib.sha256(json.dumps(self.names).encode() + self.rows.tobytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The bank as a safetensors file."""
        from safetensors.numpy import save

        words = {"format": _FORMAT, "names": self.names, "phrases": self.phrases, "origin": dict(self.origin)}
        # One key, because safetensors writes several in random order, and equal banks shall be equal files.
        metadata = {"bank": json.dumps(words, ensure_ascii=False, sort_keys=True)}
        return save({"rows": np.ascontiguousarray(self.rows)}, metadata=metadata)

    @classmethod
    def read(cls, path: str | Path) -> PromptBank:
        """Read a bank. Raises `PackageDamaged` or `PackageIncompatible`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                words = json.loads((file.metadata() or {}).get("bank", "{}"))
                rows = file.get_tensor("rows") if "rows" in file.keys() else None  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise PackageDamaged(
                f"the prompt bank '{path}' can't be read ({error})", "Copy it again, or build the package again"
            ) from error
        if words.get("format") != _FORMAT or rows is None:
            raise PackageIncompatible(
                f"'{path}' is not a prompt bank of this version (format {words.get('format', 'unknown')!r})",
                "Build the package again with this dapo-edge",
            )
        try:
            return cls(tuple(words["names"]), rows, tuple(words["phrases"]), words["origin"])
        except (KeyError, TypeError, ValueError) as error:
            raise PackageDamaged(
                f"the prompt bank '{path}' contradicts itself ({error})", "Build the package again"
            ) from error


def _problem(names: Sequence[str], rows: NDArray[np.float32], phrases: Sequence[str]) -> str | None:
    if rows.ndim != 2 or rows.dtype != np.float32 or rows.shape[0] < 2:
        return f"rows must be float32 [K+1, D] with K >= 1, not {rows.dtype} {list(rows.shape)}"
    if len(names) != rows.shape[0] or names[0] != NORMAL or len(set(names)) != len(names):
        return f"{rows.shape[0]} rows need as many distinct names, the first '{NORMAL}', not {list(names)}"
    if phrases and len(phrases) != len(names):
        return f"{len(names)} names need as many phrases, not {len(phrases)}"
    lengths = np.linalg.norm(rows, axis=1)
    if not np.all(np.abs(lengths - 1) < _UNIT_TOLERANCE):  # also refuses NaN
        return f"every row must have length 1, not {np.round(lengths, 3).tolist()}"
    return None
