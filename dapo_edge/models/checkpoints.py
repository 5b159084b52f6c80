"""Files of tuned DAPO parameters: our safetensors format, and the released `.pth` format (methods 1.5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt
from pydantic import ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from dapo_edge.errors import RecipeError
from dapo_edge.files import write_atomically
from dapo_edge.models.clip import first_sentence

FORMAT = "dapo-edge dapo 1"

# Axes whose length the file decides; every other axis must fit the backbone.
FREE_AXES = {
    "normal_context": {0, 1},
    "abnormal_context": {0, 1},
    "text_tokens": {0, 1},
    "visual_tokens": {1},
    "adapter_weight": set(),
    "adapter_bias": set(),
}

# The released trainer and the released tester spell the same parts differently.
RELEASED_KEYS = {
    "prompts": ("prompt_learner", "prompt_learner_state_dict"),
    "visual": ("visual_prompt", "visual_prompt_state_dict"),
    "adapter": ("linear_adapter", "trainable_adapter_state_dict"),
}


@dataclass(frozen=True, eq=False)
class DapoTensors:
    """All learnable parameters of DAPO, float32."""

    normal_context: Tensor  # [E, l, W]
    abnormal_context: Tensor  # [E, l, W]
    text_tokens: Tensor  # [depth, n, W]
    visual_tokens: Tensor  # [layers, n, width]
    adapter_weight: Tensor  # [L, D, width]
    adapter_bias: Tensor  # [L, D]


@checked_dataclass(frozen=True)
class Tuning:
    """What the parameters belong to. None: the file does not say, as the released ones."""

    readout: Literal["eot", "release"]
    temperature: Annotated[float, Gt(0)] | None = None
    feature_layers: tuple[int, ...] | None = None
    image_size: Annotated[int, Gt(0)] | None = None
    backbone: str | None = None
    fingerprint: str | None = None  # of the backbone's weights, see `Clip.fingerprint`


@dataclass(frozen=True, eq=False)
class Tuned:
    """The content of a tuned file."""

    tensors: DapoTensors
    tuning: Tuning


def read(path: Path) -> Tuned:
    """Read tuned parameters of either format. Raises `RecipeError`."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise RecipeError(f"the tuned file '{path}' {what}", "Check 'prompts.tuned' in the recipe")
    tuned = _read_released(path) if path.suffix in (".pth", ".pt") else _read_safetensors(path)
    normal, abnormal = tuned.tensors.normal_context.shape, tuned.tensors.abnormal_context.shape
    if normal != abnormal or len(normal) != 3 or normal[0] < 1:
        raise RecipeError(
            f"'{path}' has normal context {list(normal)} and abnormal context {list(abnormal)}",
            "Both need the same shape [groups, tokens, width] with at least one group; tune again",
        )
    for field in fields(DapoTensors):
        if not torch.isfinite(getattr(tuned.tensors, field.name)).all():
            raise RecipeError(
                f"{field.name} in '{path}' holds values that are not numbers", "Take an earlier checkpoint"
            )
    return tuned


def write(path: Path, tensors: DapoTensors, tuning: Tuning) -> None:
    """Write tuned parameters as safetensors. Raises `OutputError`."""
    from safetensors.torch import save

    # safetensors writes several keys of metadata in random order: one key makes equal contents equal files.
    metadata = {"dapo": json.dumps({"format": FORMAT, "tuning": asdict(tuning)})}
    write_atomically(path, save({name: getattr(tensors, name).contiguous() for name in FREE_AXES}, metadata))


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Names tensors by their content."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_safetensors(path: Path) -> Tuned:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = _metadata(file.metadata() or {})
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"the tuned file '{path}' can't be read ({error})", "Copy it again") from error
    if metadata.get("format") != FORMAT or set(found) != set(FREE_AXES):
        raise RecipeError(
            f"'{path}' holds no tuned DAPO parameters of this version (format {metadata.get('format', 'unknown')!r})",
            "Give a file that dapo-edge wrote, or a released .pth",
        )
    try:
        tuning = Tuning(**metadata["tuning"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise RecipeError(
            f"'{path}' does not say rightly what it was tuned for ({type(error).__name__})", "Tune again"
        ) from error
    return Tuned(DapoTensors(**{name: tensor.float() for name, tensor in found.items()}), tuning)


def _metadata(raw: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = json.loads(raw["dapo"])
    except (KeyError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_released(path: Path) -> Tuned:
    # The released files carry two numpy float64 scalars; nothing else that is not a tensor is let in.
    scalar: Any = getattr(np, "_core", None) or np.core
    scalar = scalar.multiarray.scalar
    harmless: list[Any] = [
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        parts = {part: _first_of(saved, keys) for part, keys in RELEASED_KEYS.items()}
        prompts, visual, adapter = parts["prompts"], parts["visual"], parts["adapter"]
        tensors = DapoTensors(
            normal_context=prompts["learnable_normal_tokens"].float(),
            abnormal_context=prompts["learnable_abnormal_tokens"].float(),
            text_tokens=_stacked(prompts, "learnable_layer_tokens.{}"),
            visual_tokens=visual["learnable_visual_tokens"].float(),
            adapter_weight=_stacked(adapter, "fc.{}.weight"),
            adapter_bias=_stacked(adapter, "fc.{}.bias"),
        )
    except Exception as error:  # a pickle of unknown content fails in any way it likes
        raise RecipeError(
            f"'{path}' is not a released DAPO checkpoint ({first_sentence(error)})",
            "It needs the parts prompt_learner, visual_prompt and linear_adapter, and nothing but tensors inside",
        ) from error
    return Tuned(tensors, Tuning(readout="release"))


def _first_of(saved: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Tensor]:
    for key in keys:
        if key in saved:
            return saved[key]
    raise KeyError(f"none of {', '.join(keys)}")


def _stacked(part: Mapping[str, Tensor], pattern: str) -> Tensor:
    rows: list[Tensor] = []
    while pattern.format(len(rows)) in part:
        rows.append(part[pattern.format(len(rows))].float())
    if not rows:
        raise KeyError(pattern.format(0))
    return torch.stack(rows)
