"""What every inspection method offers to the build: an image encoder, a prompt bank, and how a map is made of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from typing_extensions import Self

from dapo_edge.config import DefectType, Part, Recipe
from dapo_edge.errors import RecipeError, did_you_mean
from dapo_edge.models.clip import Clip, load_clip
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

    @property
    def encoder(self) -> nn.Module:
        """Normalised RGB [B, 3, S, S] to raw taps [B, N, width] per feature layer and embedding [B, D]."""
        ...

    @classmethod
    def from_recipe(cls, recipe: Recipe, clip: Clip) -> Method:
        """Make the method that a recipe asks for. Raises `RecipeError`."""
        ...

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised RGB [B, 3, S, S] to patch tokens after the adapters [B, L, N, D] and image embedding [B, D]."""
        ...

    def to(self, device: str) -> Self:
        """Move every parameter, those of the text tower too."""
        ...

    def adapt(self, taps: Sequence[Tensor]) -> Tensor:
        """Raw taps to tokens [B, L, N, D]."""
        ...

    def rows(self, phrases: Sequence[str], noun: str) -> Tensor:
        """Unit rows [K+1, D] of the normal prompt and of each phrase, with gradients."""
        ...

    def learnables(self) -> dict[Part, list[nn.Parameter]]:
        """What tuning may change, by part; a part that is switched off is empty."""
        ...

    def encoder_tensors(self) -> Iterator[Tensor]:
        """Every weight that the exported encoder holds."""
        ...

    def bank(self, defects: Sequence[DefectType], noun: str) -> PromptBank:
        """Encode words: one row per defect type, after the normal one."""
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
        valid = f"Valid methods: {', '.join(sorted(METHODS))}"
        raise RecipeError(f"unknown method '{name}'", did_you_mean(name, METHODS) + valid)
    return METHODS[name]


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe asks for, on its backbone. Raises `RecipeError` and what loading weights raises."""
    backbone = recipe.backbone
    clip = load_clip(backbone.model, pretrained=backbone.pretrained, checkpoint=backbone.checkpoint, seed=recipe.seed)
    return method_class(recipe.method).from_recipe(recipe, clip)
