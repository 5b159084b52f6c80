"""Hybrid prompts: learnable context and fixed words, read by the text tower with deep prompt tokens (methods 1.2).

Prompts do not depend on the image, so they are encoded once at build time into the rows of the prompt bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapo_edge.errors import RecipeError
from dapo_edge.models.clip import Clip, run_block, write_tokens

Readout = Literal["eot", "release"]
PROMPTS_AT_ONCE = 64  # bounds the memory of the text tower, not the number of words


class HybridPrompts(nn.Module):
    """The learnable part: E groups of context tokens, and deep tokens for the first blocks of the text tower."""

    def __init__(self, normal_context: Tensor, abnormal_context: Tensor, text_tokens: Tensor) -> None:
        """Contexts are [E, l, W] (l may be 0), text tokens [depth, n, W] (depth or n may be 0)."""
        super().__init__()
        self.normal_context = nn.Parameter(normal_context)
        self.abnormal_context = nn.Parameter(abnormal_context)
        self.text_tokens = nn.Parameter(text_tokens)

    @classmethod
    def drawn(
        cls,
        clip: Clip,
        *,
        groups: int,
        context_tokens: int,
        text_depth: int,
        text_tokens: int,
        generator: torch.Generator,
    ) -> HybridPrompts:
        """Draw every token like a word: randn * std + mean of the vocabulary's embeddings, per channel."""
        table = clip.text.token_embedding.weight
        std, mean = torch.std_mean(table.detach().float(), dim=0)

        def words(*shape: int) -> Tensor:
            return torch.randn(*shape, table.shape[1], generator=generator) * std + mean

        return cls(words(groups, context_tokens), words(groups, context_tokens), words(text_depth, text_tokens))

    def forward(self, clip: Clip, phrases: Sequence[str], noun: str, readout: Readout) -> Tensor:
        """Unit rows [K+1, D]: normal, then one per phrase; each the direction of the mean over E raw vectors."""
        ids = self._token_ids(clip, phrases, noun)  # [K+1, T]
        groups, context = self.normal_context.shape[:2]
        words = clip.text.token_embedding(ids)  # [K+1, T, W]
        learnt = torch.stack([self.normal_context, *[self.abnormal_context] * len(phrases)])  # [K+1, E, l, W]
        words = words[:, None].expand(-1, groups, -1, -1)
        words = torch.cat([words[:, :, :1], learnt.to(words.dtype), words[:, :, 1 + context :]], dim=2)
        ends = end_positions(clip, ids)
        vectors = [
            encode_words(clip, part, end, readout, self.text_tokens)
            for part, end in zip(
                words.flatten(0, 1).split(PROMPTS_AT_ONCE),
                ends.repeat_interleave(groups).split(PROMPTS_AT_ONCE),
                strict=True,
            )
        ]
        return F.normalize(torch.cat(vectors).unflatten(0, (-1, groups)).mean(dim=1), dim=-1)

    def _token_ids(self, clip: Clip, phrases: Sequence[str], noun: str) -> Tensor:
        """Tokenise the templates; X marks the places of the learnable context."""
        places = "X " * self.normal_context.shape[1]
        prompts = [f"{places}flawless {noun}", *(f"{places}{phrase} anomaly {noun}" for phrase in phrases)]
        room = clip.context_length
        for prompt, phrase in zip(prompts, ["flawless", *phrases], strict=True):
            length = len(clip.tokenizer.encode(prompt)) + 2
            if length > room:
                raise RecipeError(
                    f"the prompt for '{phrase:.60}' has {length} tokens, the text tower of {clip.name} reads {room}",
                    "Use fewer words for this defect type or for 'prompts.object'",
                )
        return clip.tokenizer(prompts)[:, :room].to(self.normal_context.device)


def encode_words(
    clip: Clip, words: Tensor, ends: Tensor, readout: Readout = "eot", deep: Tensor | None = None
) -> Tensor:
    """Token embeddings [P, T, W] and end-of-text positions [P] to text vectors [P, D], not normalised.

    `deep` are the tokens [depth, n, W] of the first blocks. `eot` masks causally and reads at the end-of-text token,
    wherever the deep tokens moved it; the sequence is cut after the last one, which changes nothing under that mask.
    `release` reproduces the published code: no mask, the padding takes part, and while the deep tokens stay in to the
    end the read-out position is not moved with them.
    """
    text = clip.text
    if readout == "eot":
        words = words[:, : int(ends.max()) + 1]
    x = words + text.positional_embedding[: words.shape[1]]
    depth, count = (0, 0) if deep is None else deep.shape[:2]
    depth = depth if count else 0
    inside = 0  # deep tokens that are in the sequence now
    for index, block in enumerate(text.transformer.resblocks):
        if deep is not None and index < depth:
            x = write_tokens(x, deep[index].to(x.dtype), insert=index == 0)
            inside = count
        x = run_block(block, x, _causal_mask(x) if readout == "eot" else None)
        if readout == "release" and inside and index == depth:
            x = torch.cat([x[:, :1], x[:, 1 + inside :]], dim=1)
            inside = 0
    place = ends + inside if readout == "eot" else ends
    x = text.ln_final(x)[torch.arange(len(x), device=x.device), place]
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def encode_sentences(clip: Clip, ids: Tensor) -> Tensor:
    """Token ids [P, T] to text vectors [P, D], not normalised: the text tower as it was pretrained."""
    return encode_words(clip, clip.text.token_embedding(ids), end_positions(clip, ids))


def end_positions(clip: Clip, ids: Tensor) -> Tensor:
    """Where each row of token ids [P, T] ends its text, [P]."""
    return (ids == clip.tokenizer.eot_token_id).int().argmax(dim=1)


def _causal_mask(x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
