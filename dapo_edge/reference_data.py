"""What the encoder must compute on this package's own frames: the yardstick that travels with it.

A device that compiles the encoder has no torch to compare with. The package therefore brings a few views and what
eager torch made of them in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import PackageDamaged, PackageIncompatible

_FORMAT = "dapo-edge reference 1"
_REBUILD = "Copy the package again from where it was built, or build it again: dapo-edge build RECIPE"


@dataclass(frozen=True, eq=False)
class ReferenceData:
    """Views, their encodings and the encoder's activation ranges.

    Tokens are rounded to float16, which moves each number by up to 5e-4 of itself: a comparison can't be finer.
    """

    views: NDArray[np.uint8]  # [F, S, S, 3] BGR, resized already
    tokens: NDArray[np.float16]  # [F, L, N, D], of eager torch in float32
    embeddings: NDArray[np.float32]  # [F, D], not of unit length
    ranges: Mapping[str, float]  # largest |value| per tensor of the encoder, over all frames of the gate

    def __post_init__(self) -> None:
        problem = _problem(self.views, self.tokens, self.embeddings, self.ranges)
        if problem:
            raise ValueError(problem)

    def to_bytes(self) -> bytes:
        """The data as a safetensors file; equal data are equal files."""
        from safetensors.numpy import save

        words = {"format": _FORMAT, "ranges": dict(self.ranges)}
        # One key, because safetensors writes several in random order.
        metadata = {"reference": json.dumps(words, ensure_ascii=False, allow_nan=False)}
        tensors = {"views": self.views, "tokens": self.tokens, "embeddings": self.embeddings}
        return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata=metadata)

    @classmethod
    def read(cls, path: str | Path) -> ReferenceData:
        """Read the data. Raises `PackageDamaged`, or `PackageIncompatible` for another format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                words = json.loads((file.metadata() or {}).get("reference", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise PackageDamaged(f"the reference '{path}' can't be read ({error})", _REBUILD) from error
        found = words.get("format", "unknown") if isinstance(words, dict) else "unknown"
        if found != _FORMAT:
            raise PackageIncompatible(
                f"'{path}' is not a reference of this version (format {found!r:.40})",
                "Build the package again with this dapo-edge",
            )
        try:
            return cls(tensors["views"], tensors["tokens"], tensors["embeddings"], words["ranges"])
        except (KeyError, ValueError) as error:
            raise PackageDamaged(f"the reference '{path}' contradicts itself ({error})", _REBUILD) from error

    def check_fit(self, path: Path, image_size: int, tokens: tuple[int, int, int]) -> ReferenceData:
        """These data, if they belong to an encoder of this input size and tokens [L, N, D].

        Raises `PackageDamaged`.
        """
        found, expected = (self.views.shape[1], *self.tokens.shape[1:]), (image_size, *tokens)
        if found != expected:
            raise PackageDamaged(
                f"the reference '{path}' has image size, layers, patches and dimensions {found}, its manifest "
                f"{expected}",
                _REBUILD,
            )
        return self


def _problem(
    views: NDArray[np.uint8],
    tokens: NDArray[np.float16],
    embeddings: NDArray[np.float32],
    ranges: Mapping[str, float],
) -> str | None:
    if views.dtype != np.uint8 or views.ndim != 4 or views.shape[1:] != (views.shape[1], views.shape[1], 3):
        return f"views must be uint8 [F, S, S, 3], not {views.dtype} {list(views.shape)}"
    if tokens.dtype != np.float16 or tokens.ndim != 4:
        return f"tokens must be float16 [F, L, N, D], not {tokens.dtype} {list(tokens.shape)}"
    if embeddings.dtype != np.float32 or embeddings.shape != (tokens.shape[0], tokens.shape[3]):
        wanted = [tokens.shape[0], tokens.shape[3]]
        return f"embeddings must be float32 {wanted}, not {embeddings.dtype} {list(embeddings.shape)}"
    if not len(views) == len(tokens) >= 1:
        return f"{len(views)} views need as many encodings, at least one, not {len(tokens)}"
    if not (np.isfinite(tokens).all() and np.isfinite(embeddings).all()):
        return "tokens and embeddings must be numbers"
    if not isinstance(ranges, Mapping) or not all(_is_range(value) for value in ranges.values()):
        return "ranges must be numbers from 0 on, by tensor name"
    return None


def _is_range(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]
