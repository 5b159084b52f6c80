"""DAPO: defect-aware prompt optimisation (arXiv 2512.09446; methods 1.2 and 1.3).

One text row per defect type, hybrid prompts, deep prompt tokens in both towers, one linear adapter per feature layer.
Differences from the released code, on purpose: the map is the mean over feature layers (not the sum), and text is
encoded once. `readout: release` keeps the released code's text read-out, for checkpoints tuned with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from dapo_edge.config import DefectType, Part, Recipe
from dapo_edge.errors import RecipeError
from dapo_edge.models import checkpoints
from dapo_edge.models.clip import Clip, ImageEncoder
from dapo_edge.models.prompts import HybridPrompts, Readout
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.sections import Section, parse_section
from dapo_edge.structures import NORMAL


class DapoOptions(Section):
    """`options:` of a recipe with `method: dapo`; the defaults are the released configuration."""

    groups: int = Field(10, ge=1, le=256, description="E, prompts that are averaged per row")
    context_tokens: int = Field(5, ge=0, le=64, description="l, learnable tokens in front of the words")
    text_depth: int = Field(12, ge=0, description="text blocks with deep tokens; capped at the tower's blocks")
    text_tokens: int = Field(4, ge=0, le=64, description="deep tokens per text block")
    visual_tokens: int = Field(4, ge=0, le=64, description="deep tokens per image block")
    temperature: float = Field(0.07, ge=1e-3, le=10)


class Dapo(nn.Module):
    """The method; its forward is what gets exported."""

    align_corners = True
    prompts: HybridPrompts
    encoder: ImageEncoder
    adapters: nn.ModuleList

    def __init__(
        self,
        clip: Clip,
        tuned: checkpoints.Tuned | None = None,
        *,
        options: DapoOptions | None = None,
        image_size: int | None = None,
        feature_layers: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        """Untuned parameters are drawn with `seed`; `tuned` replaces all of them. Raises `RecipeError` on a misfit."""
        super().__init__()
        options = options or DapoOptions()
        tuning = tuned.tuning if tuned else checkpoints.Tuning(readout="eot")
        self.clip = clip
        self.tuned = tuned is not None
        self.readout: Readout = tuning.readout
        self.temperature = tuning.temperature or options.temperature
        self.image_size = image_size or tuning.image_size or clip.image_size
        self.feature_layers = _checked_layers(feature_layers or tuning.feature_layers, clip)
        tensors = _draw(clip, options, len(self.feature_layers), seed)
        if tuned:
            _check_fit(tuned, tensors, clip, self.feature_layers)
            _check_options(tuned, options)
            tensors = tuned.tensors
        self.prompts = HybridPrompts(tensors.normal_context, tensors.abnormal_context, tensors.text_tokens)
        self.adapters = nn.ModuleList(
            _linear(weight, bias) for weight, bias in zip(tensors.adapter_weight, tensors.adapter_bias, strict=True)
        )
        self.visual_tokens = nn.Parameter(tensors.visual_tokens)
        inserted = self.visual_tokens if self.visual_tokens.numel() else None
        self.encoder = ImageEncoder(clip.visual, self.image_size, self.feature_layers, inserted)
        self.grid = self.encoder.grid
        self.eval()

    @classmethod
    def from_recipe(cls, recipe: Recipe, clip: Clip) -> Dapo:
        """Make the method that a recipe asks for. Raises `RecipeError`."""
        tuned = None if recipe.prompts.tuned is None else checkpoints.read(recipe.prompts.tuned)
        wanted = recipe.prompts.readout
        if tuned and wanted not in (None, tuned.tuning.readout):
            raise RecipeError(
                f"'{recipe.prompts.tuned}' was tuned with readout '{tuned.tuning.readout}', the recipe says '{wanted}'",
                "Remove 'prompts.readout' from the recipe: the two give different text vectors",
            )
        method = cls(
            clip,
            tuned,
            options=parse_section(DapoOptions, recipe.options, "recipe options"),
            image_size=recipe.image_size,
            feature_layers=recipe.feature_layers,
            seed=recipe.seed,
        )
        method.readout = wanted or method.readout
        return method

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised RGB [B, 3, S, S] to patch tokens after the adapters [B, L, N, D] and image embedding [B, D]."""
        taps, embedding = self.encoder(image)
        return self.adapt(taps), embedding

    def adapt(self, taps: Sequence[Tensor]) -> Tensor:
        """Raw patch tokens [B, N, width] of every feature layer to tokens in the words' space [B, L, N, D]."""
        return torch.stack([adapter(tap) for adapter, tap in zip(self.adapters, taps, strict=True)], dim=1)

    def rows(self, phrases: Sequence[str], noun: str) -> Tensor:
        """Unit rows [K+1, D] of the normal prompt and of each phrase, with gradients."""
        return self.prompts(self.clip, phrases, noun, self.readout)

    def learnables(self) -> dict[Part, list[nn.Parameter]]:
        """Everything that tuning may change, by part; a part that was switched off is empty."""
        context = [self.prompts.normal_context, self.prompts.abnormal_context]
        parts: dict[Part, list[nn.Parameter]] = {
            "context": context,
            "text_tokens": [self.prompts.text_tokens],
            "visual_tokens": [self.visual_tokens],
            "adapters": list(self.adapters.parameters()),
        }
        return {part: [p for p in parameters if p.numel()] for part, parameters in parts.items()}

    def _apply(self, fn: Any, recurse: bool = True) -> Dapo:
        """Take the text tower along to another device or type; it is no submodule, because it is never exported."""
        self.clip.text._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def encoder_tensors(self) -> Iterator[Tensor]:
        """Every weight that the exported encoder holds."""
        yield from self.encoder.parameters()
        yield from self.adapters.parameters()

    @torch.no_grad()
    def bank(self, defects: Sequence[DefectType], noun: str) -> PromptBank:
        """Encode words into unit rows: one per defect type, after the normal one."""
        phrases = [defect.phrase for defect in defects]
        rows = self.rows(phrases, noun)
        if not torch.isfinite(rows).all():
            raise RecipeError(
                "the text vectors of the words are not numbers",
                "The tuned file or the backbone's weights hold values that are too large",
            )
        return PromptBank(
            names=(NORMAL, *(defect.name for defect in defects)),
            rows=rows.float().cpu().numpy(),
            phrases=("flawless", *phrases),
            origin={
                "method": "dapo",
                "backbone": self.clip.name,
                "weights": self.clip.weights,
                "object": noun,
                "readout": self.readout,
                "tuned": "yes" if self.tuned else "no",
            },
        )

    def tensors(self) -> checkpoints.DapoTensors:
        """Everything that tuning learns, detached."""
        linears = [cast(nn.Linear, adapter) for adapter in self.adapters]
        return checkpoints.DapoTensors(
            normal_context=self.prompts.normal_context.detach(),
            abnormal_context=self.prompts.abnormal_context.detach(),
            text_tokens=self.prompts.text_tokens.detach(),
            visual_tokens=self.visual_tokens.detach(),
            adapter_weight=torch.stack([adapter.weight.detach() for adapter in linears]),
            adapter_bias=torch.stack([adapter.bias.detach() for adapter in linears]),
        )

    def save(self, path: Path) -> None:
        """Write the tuned parameters as safetensors."""
        tuning = checkpoints.Tuning(
            readout=self.readout,
            temperature=self.temperature,
            feature_layers=self.feature_layers,
            image_size=self.image_size,
            backbone=self.clip.name,
            fingerprint=self.clip.fingerprint,
        )
        checkpoints.write(path, self.tensors(), tuning)


def _draw(clip: Clip, options: DapoOptions, taps: int, seed: int) -> checkpoints.DapoTensors:
    """Untuned parameters. Adapters start at CLIP's own projection, which is close to the words' space."""
    generator = torch.Generator().manual_seed(seed)
    prompts = HybridPrompts.drawn(
        clip,
        groups=options.groups,
        context_tokens=options.context_tokens,
        text_depth=min(options.text_depth, len(clip.text.transformer.resblocks)),
        text_tokens=options.text_tokens,
        generator=generator,
    )
    # The bound of visual prompt tuning as DAPO uses it: 14 x 14 whatever the patch size (methods 1.2).
    bound = (6 / (3 * 14 * 14 + clip.width)) ** 0.5
    visual = torch.empty(clip.layers, options.visual_tokens, clip.width).uniform_(-bound, bound, generator=generator)
    return checkpoints.DapoTensors(
        normal_context=prompts.normal_context.detach(),
        abnormal_context=prompts.abnormal_context.detach(),
        text_tokens=prompts.text_tokens.detach(),
        visual_tokens=visual,
        adapter_weight=clip.visual.proj.detach().T.float().repeat(taps, 1, 1),
        adapter_bias=torch.zeros(taps, clip.dimensions),
    )


def _check_fit(tuned: checkpoints.Tuned, drawn: checkpoints.DapoTensors, clip: Clip, layers: tuple[int, ...]) -> None:
    """Check tuned parameters against the backbone; their own token counts are free."""
    tuning = tuned.tuning
    if tuning.backbone not in (None, clip.name) or tuning.fingerprint not in (None, clip.fingerprint):
        raise RecipeError(
            f"the tuned file belongs to {tuning.backbone} with other weights than {clip.name}, {clip.weights}",
            "Use the backbone and the weights that it was tuned with",
        )
    if tuning.feature_layers not in (None, layers):
        raise RecipeError(
            f"the tuned file belongs to feature layers {list(tuning.feature_layers or ())}, not {list(layers)}",
            "Remove 'feature_layers' from the recipe, or use the same",
        )
    problems = []
    for name, free in checkpoints.FREE_AXES.items():
        found, wanted = tuple(getattr(tuned.tensors, name).shape), tuple(getattr(drawn, name).shape)
        if len(found) != len(wanted) or any(
            a != b for axis, (a, b) in enumerate(zip(found, wanted, strict=True)) if axis not in free
        ):
            problems.append(f"{name} is {list(found)} where {list(wanted)} is expected")
    if tuned.tensors.text_tokens.shape[0] > len(clip.text.transformer.resblocks):
        problems.append("it has deep tokens for more text blocks than there are")
    if problems:
        raise RecipeError(
            f"the tuned file does not fit {clip.name}: {'; '.join(problems)}", "Use the backbone that it was tuned with"
        )


def _check_options(tuned: checkpoints.Tuned, options: DapoOptions) -> None:
    """Options that a recipe states must be those of the tuned file, which decides."""
    tensors = tuned.tensors
    decided = {
        "groups": tensors.normal_context.shape[0],
        "context_tokens": tensors.normal_context.shape[1],
        "text_depth": tensors.text_tokens.shape[0],
        "text_tokens": tensors.text_tokens.shape[1],
        "visual_tokens": tensors.visual_tokens.shape[1],
        "temperature": tuned.tuning.temperature,
    }
    for name in sorted(options.model_fields_set):
        if decided[name] not in (None, getattr(options, name)):
            raise RecipeError(
                f"the recipe's option {name} is {getattr(options, name)}, the tuned file has {decided[name]}",
                f"Remove '{name}' from the recipe's options",
            )


def _checked_layers(layers: tuple[int, ...] | None, clip: Clip) -> tuple[int, ...]:
    if not layers:
        return tuple(sorted({max(1, clip.layers * part // 4) for part in (1, 2, 3, 4)}))
    if list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= clip.layers:
        raise RecipeError(
            f"feature_layers {list(layers)} are not rising block numbers of {clip.name}",
            f"Choose from 1 to {clip.layers}, each once, in rising order",
        )
    return tuple(layers)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear
