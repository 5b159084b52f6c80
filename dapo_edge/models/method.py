"""What every inspection method offers to the build: an image encoder, a prompt bank, and how a map is made of both."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dapo_edge.config import Recipe
from dapo_edge.errors import RecipeError
from dapo_edge.models.clip import Clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.prompt_bank import PromptBank


class Method(Protocol):
    """The contract. A method is an `nn.Module` whose forward is exactly what gets exported."""

    clip: Clip
    tuned: bool  # whether its learnable parameters were tuned
    image_size: int  # side of the square input in px
    grid: tuple[int, int]  # patch rows, patch columns
    feature_layers: tuple[int, ...]  # tapped blocks, counted from 1
    temperature: float
    align_corners: bool  # how patch probabilities are upsampled

    @classmethod
    def from_recipe(cls, recipe: Recipe, clip: Clip) -> Method:
        """Make the method that a recipe asks for. Raises `RecipeError`."""
        ...

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised RGB [B, 3, S, S] to patch tokens after the adapters [B, L, N, D] and image embedding [B, D]."""
        ...

    def encoder_tensors(self) -> Iterator[Tensor]:
        """Every weight that the exported encoder holds."""
        ...

    def bank(self, recipe: Recipe) -> PromptBank:
        """Encode the recipe's words."""
        ...

    def save(self, path: Path) -> None:
        """Write the tuned parameters as safetensors."""
        ...


METHODS: dict[str, type[Method]] = {
    "dapo": Dapo,
}


def method_class(name: str) -> type[Method]:
    """Look a method up. Raises `RecipeError` naming the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)
        raise RecipeError(
            f"unknown method '{name}'", f"Did you mean '{near[0]}'? Valid methods: {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]
