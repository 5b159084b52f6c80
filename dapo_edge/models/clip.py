"""CLIP towers from open_clip, opened up for dense inspection.

open_clip's modules hold the weights; the forward passes here add what DAPO needs: tapped feature layers, deep prompt
tokens that are blended into every block, and an attention without a weights tensor, so that it fuses when compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapo_edge.errors import DependencyMissing, RecipeError, did_you_mean
from dapo_edge.models.open_clip_import import import_open_clip
from dapo_edge.package import Preprocessing

BUNDLED_CONFIGS = Path(__file__).parent / "configs"
BUNDLED_WEIGHTS = Path(__file__).parent.parent / "assets"  # <model>-<tag>.safetensors

# A deep prompt position keeps this much of the previous block's output (DAPO, methods 1.2).
PREVIOUS_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Clip:
    """A loaded CLIP: both towers and what their inputs look like."""

    name: str
    weights: str  # where the weights come from, in words
    trained: bool  # False for a seeded initialisation
    visual: Any  # open_clip's VisionTransformer
    text: Any  # open_clip's CLIP or TextTransformer: whatever holds the text tower's parts
    tokenizer: Any  # open_clip's SimpleTokenizer: list of str -> ids [P, T]
    image_size: int  # side in px that the weights were made for
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]

    @property
    def fingerprint(self) -> str:
        """Names these weights: a hash of both projections, which every training changes."""
        digest = hashlib.sha256()
        for projection in (self.visual.proj, getattr(self.text, "text_projection", None)):
            for tensor in projection.parameters() if isinstance(projection, nn.Module) else [projection]:
                if tensor is not None:
                    digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def preprocessing(self) -> Preprocessing:
        """How a camera's view becomes the image tower's input."""
        return Preprocessing(mean=self.mean, std=self.std, resize="pillow-bicubic")

    @property
    def patch_size(self) -> int:
        """Side of a patch in px."""
        return int(self.visual.patch_size[0])

    @property
    def layers(self) -> int:
        """Number of blocks of the image tower."""
        return len(self.visual.transformer.resblocks)

    @property
    def width(self) -> int:
        """Channels of the image tower."""
        return int(self.visual.conv1.out_channels)

    @property
    def dimensions(self) -> int:
        """Length D of the shared embedding."""
        return int(self.visual.proj.shape[1])

    @property
    def context_length(self) -> int:
        """Tokens that the text tower reads at once."""
        return int(self.text.positional_embedding.shape[0])


def load_clip(model: str, *, pretrained: str | None = None, checkpoint: Path | None = None, seed: int = 0) -> Clip:
    """Load a CLIP ViT by open_clip name, bundled name or config file.

    Without `pretrained` and `checkpoint` the weights are a seeded initialisation, equal on every machine. Raises
    `RecipeError` for an unknown or unsuitable model and `DependencyMissing` when weights can't be downloaded.
    """
    open_clip = import_open_clip()
    name = _register(open_clip, model)
    bundled = BUNDLED_WEIGHTS / f"{name}-{pretrained}.safetensors"
    if pretrained and not bundled.is_file():
        _check_tag(open_clip, name, pretrained)
        _check_activation(open_clip, name, pretrained)
    if checkpoint is not None and not checkpoint.is_file():
        raise RecipeError(f"the checkpoint '{checkpoint}' does not exist", "Check 'backbone.checkpoint' in the recipe")
    with _seeded(seed), _quiet():  # the weights' origin is in the result; open_clip would warn about it on stderr
        clip_model = _create(open_clip, name, pretrained, bundled if bundled.is_file() else checkpoint)
    clip_model.eval().requires_grad_(False)
    text = clip_model.text if hasattr(clip_model, "text") else clip_model
    tokenizer = _tokenizer(open_clip, name)
    _check_architecture(name, clip_model.visual, text)
    return Clip(
        name=name,
        weights=pretrained or (checkpoint.name if checkpoint else f"seeded ({seed})"),
        trained=bool(pretrained or checkpoint),
        visual=clip_model.visual,
        text=text,
        tokenizer=tokenizer,
        image_size=int(clip_model.visual.image_size[0]),
        mean=_triple(getattr(clip_model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN),
        std=_triple(getattr(clip_model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD),
    )


class ImageEncoder(nn.Module):
    """Image tower with taps and deep visual prompt tokens, for one fixed image size."""

    position: Tensor  # [1 + N, width]

    def __init__(
        self, visual: Any, image_size: int, feature_layers: Sequence[int], visual_tokens: Tensor | None
    ) -> None:
        """`feature_layers` count from 1; `visual_tokens` is [layers, n, width] or None."""
        super().__init__()
        self.visual = visual
        self.feature_layers = tuple(feature_layers)
        self.visual_tokens = visual_tokens
        self.grid = _grid(visual, image_size)
        self.register_buffer("position", resize_position(visual.positional_embedding.detach(), self.grid))

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Normalised RGB [B, 3, S, S] to raw patch tokens [B, N, width] per feature layer, and the embedding [B, D].

        The taps are hidden states without ln_post and projection; the embedding is not yet of unit length.
        """
        visual = self.visual
        x = visual.conv1(image).flatten(2).transpose(1, 2)  # [B, N, width]
        x = torch.cat([visual.class_embedding.expand(_fixed(x)[0], 1, -1), x], dim=1)
        x = visual.ln_pre(x + self.position)
        inserted = 0 if self.visual_tokens is None else self.visual_tokens.shape[1]
        taps = []
        for depth, block in enumerate(visual.transformer.resblocks):
            if self.visual_tokens is not None:
                x = write_tokens(x, self.visual_tokens[depth], insert=depth == 0)
            x = run_block(block, x)
            if depth + 1 in self.feature_layers:
                taps.append(x[:, 1 + inserted :])
        return taps, visual.ln_post(x[:, 0]) @ visual.proj


def write_tokens(x: Tensor, tokens: Tensor, *, insert: bool) -> Tensor:
    """Put prompt tokens [n, width] behind the first position of x [B, T, width].

    The first block inserts them at full weight; later blocks blend them with the previous output (methods 1.2).
    """
    count = tokens.shape[0]
    new = tokens.expand(_fixed(x)[0], -1, -1)
    if insert:
        return torch.cat([x[:, :1], new, x[:, 1:]], dim=1)
    blended = PREVIOUS_SHARE * x[:, 1 : 1 + count] + (1 - PREVIOUS_SHARE) * new
    return torch.cat([x[:, :1], blended, x[:, 1 + count :]], dim=1)


def run_block(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One residual attention block of open_clip on x [B, T, width]."""
    x = x + block.ls_1(_attention(block.attn, block.ln_1(x), mask))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def resize_position(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a learnt position embedding [1 + n, width] to `grid` (rows, columns); the class row is kept.

    Bicubic, antialiased, align_corners=False, as open_clip does it at load (methods 1.2).
    """
    side = round((position.shape[0] - 1) ** 0.5)
    if (side, side) == grid:
        return position.clone()
    patches = position[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:1], patches.flatten(2)[0].T])


def _attention(attention: nn.MultiheadAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Multi-head self-attention; outside of training the attention weights never exist as a tensor."""
    batch, tokens, width = _fixed(x)
    head = width // attention.num_heads
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    heads = qkv.reshape(batch, tokens, 3, attention.num_heads, head)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
    if query.requires_grad and query.device.type == "cpu" and not torch.jit.is_tracing():
        mixed = _attend_for_training(query, key, value, mask)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=head**-0.5)
    return attention.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def _attend_for_training(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out: with torch's fused one for CPUs a training step takes twice as long."""
    with torch.autocast(query.device.type, enabled=False):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(dim=-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value


def _fixed(x: Tensor) -> list[int]:
    """The shape as plain numbers, so that the exported graph has constants where a traced shape would be operators."""
    return [int(side) for side in x.shape]


def _grid(visual: Any, image_size: int) -> tuple[int, int]:
    patch = int(visual.patch_size[0])
    if image_size % patch:
        below = image_size // patch * patch
        raise RecipeError(
            f"image_size {image_size} is not a multiple of the model's patch size {patch}",
            f"Use {below or patch} or {below + patch}",
        )
    return image_size // patch, image_size // patch


def _register(open_clip: Any, model: str) -> str:
    """Make a bundled or own config known to open_clip; return the name it goes by."""
    path = Path(model) if model.endswith(".json") else BUNDLED_CONFIGS / f"{model}.json"
    if path.is_file():
        _check_config(path)
        open_clip.add_model_config(path)
        return path.stem
    known = open_clip.list_models()
    if model not in known:
        bundled = [config.stem for config in BUNDLED_CONFIGS.glob("*.json")]
        raise RecipeError(
            f"unknown backbone model '{model}'",
            did_you_mean(model, [*bundled, *known])
            + "Valid are open_clip's model names, "
            + f"{', '.join(bundled)}, and the path of a model config (.json)",
        )
    return model


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        numbers = [config["embed_dim"], *(config["vision_cfg"][key] for key in ("layers", "width", "patch_size"))]
        numbers += [config["text_cfg"].get(key, 1) for key in ("layers", "width", "heads", "vocab_size")]
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError("its sizes must be whole numbers from 1 on")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise RecipeError(
            f"'{path}' is not an open_clip model config ({type(error).__name__}: {error})",
            "It needs embed_dim, vision_cfg with layers, width and patch_size, and text_cfg",
        ) from error


def _create(open_clip: Any, name: str, pretrained: str | None, checkpoint: Path | None) -> Any:
    try:
        return open_clip.create_model(name, pretrained=str(checkpoint) if checkpoint else pretrained)
    except Exception as error:  # open_clip, huggingface_hub, urllib and torch each raise their own kinds
        reason = first_sentence(error)
        if checkpoint:
            raise RecipeError(
                f"the checkpoint '{checkpoint}' does not fit {name} ({reason})",
                "Use weights of exactly this architecture",
            ) from error
        if pretrained:
            raise DependencyMissing(
                f"the weights '{pretrained}' of {name} can't be downloaded ({reason})",
                "Connect to the network once, copy the weights here and name them as 'backbone.checkpoint', "
                "or use pretrained: null for seeded weights",
            ) from error
        raise RecipeError(f"{name} can't be created ({reason})", "Check the model config") from error


def _check_tag(open_clip: Any, name: str, pretrained: str) -> None:
    bundled = [path.stem.removeprefix(f"{name}-") for path in BUNDLED_WEIGHTS.glob(f"{name}-*.safetensors")]
    tags = [*bundled, *open_clip.list_pretrained_tags_by_model(name)]
    if pretrained not in tags:
        raise RecipeError(
            f"{name} has no pretrained weights '{pretrained}'",
            f"{did_you_mean(pretrained, tags)}Use one of its tags ({', '.join(tags) or 'none'}), a 'checkpoint', "
            "or pretrained: null for seeded weights",
        )


def _check_activation(open_clip: Any, name: str, pretrained: str) -> None:
    """Refuse weights that were trained with another activation: they load without a word and compute nonsense."""
    trained = bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu", False))
    built = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if trained != built:
        words = {True: "QuickGELU", False: "GELU"}
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        remedy = f"Use the model {other}" if other in open_clip.list_models() else "Choose the model they belong to"
        raise RecipeError(
            f"the weights '{pretrained}' were trained with {words[trained]}, the model {name} has {words[built]}",
            remedy,
        )


def _tokenizer(open_clip: Any, name: str) -> Any:
    config = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    if config.get("hf_tokenizer_name") or config.get("hf_model_name"):
        raise RecipeError(f"the model {name} can't be used: it needs a tokenizer from a model hub", _SUITABLE)
    return open_clip.get_tokenizer(name)


_SUITABLE = "Choose a CLIP ViT with a class token, e.g. ViT-B-16 or ViT-L-14-336-quickgelu"


def _check_architecture(name: str, visual: Any, text: Any) -> None:
    """Refuse what the forward passes here would compute wrongly."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    reasons = {
        "its image tower is not a ViT": blocks is None or not hasattr(visual, "conv1"),
        "its image tower pools by attention": getattr(visual, "attn_pool", None) is not None,
        "its image embedding is not the class token": getattr(visual, "pool_type", "tok") != "tok",
        "its text tower is not a plain CLIP transformer": not all(
            hasattr(text, part) for part in ("token_embedding", "positional_embedding", "transformer", "ln_final")
        )
        or getattr(text, "cls_emb", None) is not None,
        "its text tower does not read causally": getattr(text, "attn_mask", None) is None,
        "its text vector is not read at the end-of-text token": _text_pooling(text) != "argmax",
        "its image size is not square": len(set(getattr(visual, "grid_size", (0,)))) > 1,
    }
    for block in [*(blocks or []), *getattr(getattr(text, "transformer", None), "resblocks", [])]:
        reasons["its blocks use a special attention"] = not isinstance(block.attn, nn.MultiheadAttention)
        if reasons["its blocks use a special attention"]:
            break
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise RecipeError(
            f"the model {name} can't be used: {' and '.join(found)}",
            _SUITABLE,
        )


def _text_pooling(text: Any) -> str:
    """How the text vector is picked; a CLIP with a built-in text tower calls it `text_pool_type`."""
    return str(getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None) or "argmax")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def first_sentence(error: Exception) -> str:
    """What an error of another library says first, without its colours and its own advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return re.split(r"(?<=[a-z)])\. |\n", text)[0][:160] or type(error).__name__


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
