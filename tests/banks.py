"""Prompt banks with contrast: seeded text towers alone give maps that are flat, and flat maps agree with anything."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank


def contrasting_bank(names: tuple[str, ...], tokens: NDArray[np.float32]) -> PromptBank:
    """Rows drawn around real patch tokens [1, L, N, D], as far apart as those are."""
    patches = tokens[0].reshape(-1, tokens.shape[-1])
    picked = np.random.default_rng(2).choice(len(patches), len(names), replace=False)
    rows = patches[picked] - patches.mean(axis=0)
    return PromptBank(names, rows / np.linalg.norm(rows, axis=1, keepdims=True))


def sharp_bank(package: EnginePackage) -> PromptBank:
    """A bank for a package, around the tokens of one random picture."""
    rng = np.random.default_rng(2)
    with OpenVinoBackend.open(package, map_size="model") as backend:
        tokens, _ = backend.encode([rng.integers(0, 256, (96, 96, 3), np.uint8)])
    return contrasting_bank(package.bank().names, tokens)


def has_fast_type() -> bool:
    """Whether this CPU computes a float type faster than fp32."""
    import openvino

    return bool({"BF16", "FP16"} & set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
