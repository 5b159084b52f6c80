"""What DAPO is compared with, on the same CLIP: hand-written prompts, two learnable prompts, adapters alone.

Each is the idea of a published method rather than its code: WinCLIP and APRIL-GAN's prompt ensemble, AnomalyCLIP's
object-agnostic pair of prompts, MultiADS' adapters under a multi-type ensemble. They are for the comparison table; no
recipe names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from dapo_edge.config import Part
from dapo_edge.errors import RecipeError
from dapo_edge.models.clip import Clip
from dapo_edge.models.dapo import Dapo, DapoOptions
from dapo_edge.models.prompts import encode_sentences

_PLAIN = DapoOptions(groups=1, context_tokens=0, text_depth=0, text_tokens=0, visual_tokens=0)


class _Baseline(Dapo):
    """A part of DAPO switched off or replaced; it has no file format of its own."""

    def save(self, path: Path) -> None:
        """Refused: as a DAPO file it would mean something else."""
        raise RecipeError("a baseline can't be saved", "Tune 'dapo' to get a file for a package")


class _WrittenPrompts(_Baseline):
    """The ensemble at the temperature that CLIP was trained with: its constant rows can't be spread by learning."""

    def __init__(self, clip: Clip, *, feature_layers: tuple[int, ...] | None = None, seed: int = 0) -> None:
        temperature = 1 / float(clip.text.logit_scale.detach().exp())
        options = _PLAIN.model_copy(update={"temperature": temperature})
        super().__init__(clip, options=options, feature_layers=feature_layers, seed=seed)
        self._known: dict[tuple[tuple[str, ...], str], Tensor] = {}

    def rows(self, phrases: Sequence[str], noun: str) -> Tensor:
        """Unit rows [K+1, D], constant."""
        words = (tuple(phrases), noun)
        if words not in self._known:
            self._known[words] = ensemble_rows(self.clip, *words)
        return self._known[words]


class Handcrafted(_WrittenPrompts):
    """No tuning at all: an ensemble of written prompts, and patches through CLIP's own head."""

    def __init__(self, clip: Clip, *, feature_layers: tuple[int, ...] | None = None, seed: int = 0) -> None:
        """By default the last block alone is tapped: CLIP's head was made for it."""
        super().__init__(clip, feature_layers=feature_layers or (clip.layers,), seed=seed)

    def adapt(self, taps: Sequence[Tensor]) -> Tensor:
        """Raw taps to tokens [B, L, N, D] by CLIP's final norm and projection."""
        return head_tokens(self.clip, taps)

    def learnables(self) -> dict[Part, list[nn.Parameter]]:
        """Nothing."""
        return {}


class AdaptersOnly(_WrittenPrompts):
    """MultiADS-like: the written prompts, one for each type, and a learnable adapter per feature layer."""

    def learnables(self) -> dict[Part, list[nn.Parameter]]:
        """The adapters."""
        return {"adapters": super().learnables()["adapters"]}


class TwoPrompts(_Baseline):
    """AnomalyCLIP-like: one normal and one abnormal prompt, learnt, for any object; the last block through CLIP's head.

    Its attention is CLIP's own: AnomalyCLIP's V-V attention is left out.
    """

    def __init__(self, clip: Clip, *, seed: int = 0) -> None:
        options = DapoOptions(groups=1, context_tokens=12, text_tokens=4, visual_tokens=0)
        super().__init__(clip, options=options, feature_layers=(clip.layers,), seed=seed)

    def adapt(self, taps: Sequence[Tensor]) -> Tensor:
        """Raw taps to tokens [B, L, N, D] by CLIP's final norm and projection."""
        return head_tokens(self.clip, taps)

    def learnables(self) -> dict[Part, list[nn.Parameter]]:
        """The two prompts and the deep text tokens."""
        parts = super().learnables()
        return {"context": parts["context"], "text_tokens": parts["text_tokens"]}


class FixedAdapters(_Baseline):
    """DAPO without learnable adapters: every feature layer through CLIP's own head."""

    def adapt(self, taps: Sequence[Tensor]) -> Tensor:
        """Raw taps to tokens [B, L, N, D] by CLIP's final norm and projection."""
        return head_tokens(self.clip, taps)

    def learnables(self) -> dict[Part, list[nn.Parameter]]:
        """All but the adapters."""
        return {part: parameters for part, parameters in super().learnables().items() if part != "adapters"}


def head_tokens(clip: Clip, taps: Sequence[Tensor]) -> Tensor:
    """Raw taps [B, N, width] of some layers to [B, L, N, D] in the words' space, as the class token gets there."""
    return torch.stack([clip.visual.ln_post(tap) @ clip.visual.proj for tap in taps], dim=1)


@torch.no_grad()
def ensemble_rows(clip: Clip, phrases: tuple[str, ...], noun: str) -> Tensor:
    """Unit rows [K+1, D]: for normal and for each phrase the mean of unit vectors over all states and templates."""
    words = _ensemble()
    rows = [_mean_vector(clip, [state.format(o=noun) for state in words["normal"]])]
    for phrase in phrases:
        rows.append(_mean_vector(clip, [state.format(o=noun, d=phrase) for state in words["defective"]]))
    return torch.stack(rows)


def _mean_vector(clip: Clip, states: Sequence[str]) -> Tensor:
    sentences = [template.format(s=state) for state in states for template in _ensemble()["templates"]]
    device = clip.text.positional_embedding.device
    vectors = F.normalize(encode_sentences(clip, clip.tokenizer(sentences).to(device)), dim=-1)
    return F.normalize(vectors.mean(dim=0), dim=0)


@cache
def _ensemble() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "ensemble.yaml").read_text(encoding="utf-8"))
    return content
