"""How an encoder is quantised: which Linears, with which scales, and why the others were kept. A file of the package.

The portable FP32 encoder and this description give every INT8 form of it: the one for OpenVINO travels in the package,
those for TensorRT are made where they are compiled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import PackageDamaged, PackageIncompatible

_FORMAT = "dapo-edge quantization 1"
_LENGTH = 8  # bytes in front of a safetensors file's header, which hold its length
_REBUILD = "Copy the package again from where it was built, or build it again: dapo-edge build RECIPE"


@dataclass(frozen=True, eq=False)
class Quantization:
    """INT8 for the inputs and weights of some Linears; everything else stays as it is.

    A Linear computes q(x / m) · q(m · W): x is its input, m its migration, q rounds to int8 with a symmetric scale, one
    per tensor for activations, one per output channel for weights. Dividing by m happens at build time, in the weights
    of the layer before (SmoothQuant, Xiao et al. 2023, section 4).
    """

    ranges: Mapping[str, float]  # by Linear: largest |value| of its migrated input that int8 reaches; scale = it / 127
    migrations: Mapping[str, NDArray[np.float32]]  # by Linear, > 0 per input channel; others are not migrated
    kept: Mapping[str, str]  # Linears that stay in float, and why, in words
    weights: str  # digest of the encoder that it was made for (onnx_linears.weights_digest)
    settings: Mapping[str, Any] = field(default_factory=dict)  # how the ranges were found, for people

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def without(self, names: Mapping[str, str]) -> Quantization:
        """The same, but that further Linears (and why) are kept in float."""
        inside = {name: value for name, value in self.ranges.items() if name not in names}
        migrated = {name: value for name, value in self.migrations.items() if name not in names}
        return Quantization(inside, migrated, {**self.kept, **names}, self.weights, self.settings)

    def to_bytes(self) -> bytes:
        """The description as a safetensors file; equal descriptions are equal files."""
        from safetensors.numpy import save

        words = {
            "format": _FORMAT,
            "ranges": dict(self.ranges),
            "kept": dict(self.kept),
            "weights": self.weights,
            "settings": dict(self.settings),
        }
        # One key, because safetensors writes several in random order.
        metadata = {"quantization": json.dumps(words, ensure_ascii=False, allow_nan=False)}
        return save({name: np.ascontiguousarray(m) for name, m in self.migrations.items()}, metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Quantization:
        """Read a description's file; `origin` names it. Raises `PackageDamaged`, or `PackageIncompatible`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            header = json.loads(data[_LENGTH : _LENGTH + int.from_bytes(data[:_LENGTH], "little")])
            words = json.loads(header["__metadata__"]["quantization"])
            migrations = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PackageDamaged(f"the quantization '{origin}' can't be read ({error})", _REBUILD) from error
        found = words.get("format", "unknown") if isinstance(words, dict) else "unknown"
        if found != _FORMAT:
            raise PackageIncompatible(
                f"'{origin}' is not a quantization of this version (format {found!r:.40})",
                "Build the package again with this dapo-edge",
            )
        try:
            return cls(words["ranges"], migrations, words["kept"], words["weights"], words["settings"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PackageDamaged(f"the quantization '{origin}' contradicts itself ({error})", _REBUILD) from error

    def _problem(self) -> str | None:
        for value in self.ranges.values():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                return "ranges must be numbers above 0"
        stray = (self.migrations.keys() - self.ranges.keys()) | (self.kept.keys() & self.ranges.keys())
        if stray:
            return f"'{min(stray)}' is quantised and kept, or migrated and not quantised"
        for name, migration in self.migrations.items():
            is_vector = migration.dtype == np.float32 and migration.ndim == 1
            if not is_vector or not (np.isfinite(migration) & (migration > 0)).all():
                return f"the migration of '{name}' must be float32 numbers above 0, one per channel"
        return None
