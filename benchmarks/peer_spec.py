"""What the peers' orchestration and a contender's process tell each other.

Standard library only: a contender may live in an environment of its own, in which dapo-edge is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """How a process becomes a contender. All paths are absolute."""

    loader: str  # "module:function", called with this
    precision: str  # that is asked for
    package: str
    bank: str  # safetensors, as `PromptBank.to_bytes` gives them
    frames: str  # .npz: "raw" [n, H, W, 3] u8 BGR, and "jpeg0" ... [bytes] u8
    cache: str  # folder for what takes long to make
    threads: int

    def to_text(self) -> str:
        """The form that fits on a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Spec:
        """Raises `ValueError` and `TypeError` for anything else."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Loaded:
    """A contender that is ready."""

    inspect: Callable[[Any], tuple[Any, Any]]  # BGR [H, W, 3] u8 → anomaly map f32, type map u8 or None
    runs_as: str  # fp32, bf16, fp16, int8+bf16 ...
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reference: Callable[[Any], tuple[Any, Any]] | None = None  # of a contender that is another model: its own
