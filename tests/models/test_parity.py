"""DAPO against a literal transcription of the published mathematics (methods.md 1.2 and 1.3) that shares no code.

The transcription computes with plain matrix products on the state dict, the released sum over feature layers divided by
their number, and no smoothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dapo_edge.backends.host import make_maps
from dapo_edge.config import parse_recipe
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.clip import Clip, load_clip
from dapo_edge.models.dapo import Dapo, DapoOptions
from dapo_edge.models.eager import EagerBackend

PHRASES = ["scratch", "missing part", "discoloration"]
SIZE, MAP = 96, (75, 50)  # px; the map is (width, height) and not square


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def transformer_block(x: Tensor, w: dict[str, Tensor], prefix: str, heads: int, causal: bool) -> Tensor:
    y = layer_norm(x, w[f"{prefix}.ln_1.weight"], w[f"{prefix}.ln_1.bias"])
    q, k, v = (y @ w[f"{prefix}.attn.in_proj_weight"].T + w[f"{prefix}.attn.in_proj_bias"]).chunk(3, dim=-1)
    width = q.shape[-1] // heads
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        mixed.append(torch.softmax(scores, -1) @ v[..., part])
    x = x + torch.cat(mixed, -1) @ w[f"{prefix}.attn.out_proj.weight"].T + w[f"{prefix}.attn.out_proj.bias"]
    y = layer_norm(x, w[f"{prefix}.ln_2.weight"], w[f"{prefix}.ln_2.bias"])
    y = y @ w[f"{prefix}.mlp.c_fc.weight"].T + w[f"{prefix}.mlp.c_fc.bias"]
    y = y * torch.sigmoid(1.702 * y)  # QuickGELU
    return x + y @ w[f"{prefix}.mlp.c_proj.weight"].T + w[f"{prefix}.mlp.c_proj.bias"]


def text_vectors(clip: Clip, dapo: Dapo, release: bool) -> Tensor:
    """T [K+1, D]: one prompt at a time, as the published template says."""
    w = {name: tensor.float() for name, tensor in clip.text.state_dict().items()}
    layers, heads = len(clip.text.transformer.resblocks), clip.text.transformer.resblocks[0].attn.num_heads
    normal, abnormal = dapo.prompts.normal_context, dapo.prompts.abnormal_context
    deep = dapo.prompts.text_tokens
    count = normal.shape[1]
    rows = []
    for state in ["flawless", *(f"{phrase} anomaly" for phrase in PHRASES)]:
        ids = clip.tokenizer([" ".join(["X"] * count) + f" {state} object"])[0]
        end = int((ids == 49407).nonzero()[0])
        vectors = []
        for group in range(normal.shape[0]):
            x = w["token_embedding.weight"][ids].clone()
            x[1 : 1 + count] = normal[group] if state == "flawless" else abnormal[group]
            x = (x + w["positional_embedding"])[None]
            inserted = 0
            for i in range(layers):
                if i == 0 and len(deep):
                    x = torch.cat([x[:, :1], deep[0][None], x[:, 1:]], 1)
                    inserted = deep.shape[1]
                elif i < len(deep):
                    x[:, 1 : 1 + inserted] = 0.01 * x[:, 1 : 1 + inserted] + 0.99 * deep[i]
                x = transformer_block(x, w, f"transformer.resblocks.{i}", heads, causal=not release)
                if release and i == len(deep) and inserted:
                    x = torch.cat([x[:, :1], x[:, 1 + inserted :]], 1)
                    inserted = 0
            x = layer_norm(x, w["ln_final.weight"], w["ln_final.bias"])
            vectors.append(x[0, end if release else end + inserted] @ w["text_projection"])
        mean = torch.stack(vectors).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def vision(clip: Clip, dapo: Dapo, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """Taps [N, width] after every feature layer, and z [D]."""
    w = {name: tensor.float() for name, tensor in clip.visual.state_dict().items()}
    patch, layers = clip.patch_size, clip.layers
    heads = clip.visual.transformer.resblocks[0].attn.num_heads
    side = SIZE // patch
    patches = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).reshape(side * side, -1)
    x = patches @ w["conv1.weight"].flatten(1).T
    old = round(math.sqrt(len(w["positional_embedding"]) - 1))
    grid = w["positional_embedding"][1:].reshape(old, old, -1).permute(2, 0, 1)[None]
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    position = torch.cat([w["positional_embedding"][:1], grid[0].permute(1, 2, 0).reshape(side * side, -1)])
    x = torch.cat([w["class_embedding"][None], x]) + position
    x = layer_norm(x, w["ln_pre.weight"], w["ln_pre.bias"])[None]
    tokens = dapo.visual_tokens
    inserted = tokens.shape[1]
    taps = []
    for i in range(layers):
        if inserted and i == 0:
            x = torch.cat([x[:, :1], tokens[0][None], x[:, 1:]], 1)
        elif inserted:
            x = x.clone()
            x[:, 1 : 1 + inserted] = 0.01 * x[:, 1 : 1 + inserted] + 0.99 * tokens[i]
        x = transformer_block(x, w, f"transformer.resblocks.{i}", heads, causal=False)
        if i + 1 in dapo.feature_layers:
            taps.append(x[0, 1 + inserted :])
    z = layer_norm(x[:, 0], w["ln_post.weight"], w["ln_post.bias"])[0] @ w["proj"]
    return taps, z / z.norm()


def transcribed_map(clip: Clip, dapo: Dapo, image: Tensor, release: bool) -> tuple[Tensor, Tensor, float]:
    """Anomaly map [H, W], type map [H, W] and image score."""
    table = text_vectors(clip, dapo, release)
    taps, z = vision(clip, dapo, image)
    side = SIZE // clip.patch_size
    summed: Any = 0
    for tap, adapter in zip(taps, dapo.adapters, strict=True):
        features = tap @ adapter.weight.T + adapter.bias
        features = features / features.norm(dim=-1, keepdim=True)
        probabilities = torch.softmax(features @ table.T / 0.07, dim=-1)
        planes = probabilities.T.reshape(1, len(table), side, side)
        summed = summed + torch.nn.functional.interpolate(
            planes, size=(MAP[1], MAP[0]), mode="bilinear", align_corners=True
        )
    mean = summed[0] / len(taps)
    abnormal = table[1:].mean(0)
    pair = torch.stack([z @ table[0], z @ (abnormal / abnormal.norm())]) / 0.07
    return mean[1:].sum(0), mean.argmax(0), float(torch.softmax(pair, 0)[1])


def trained_looking(dapo: Dapo) -> Dapo:
    """Adapters as tuning leaves them: away from the projection, with a bias."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in dapo.adapters:
            adapter.weight.add_(torch.randn(adapter.weight.shape, generator=generator) * 0.1)
            adapter.bias.add_(torch.randn(adapter.bias.shape, generator=generator) * 0.1)
    return dapo


@pytest.fixture(scope="module")
def clip(tiny_config: Path) -> Clip:
    return load_clip(str(tiny_config), seed=1)


@pytest.mark.parametrize("text_depth", [0, 2, 3])  # none, part, all of the three text blocks
@pytest.mark.parametrize("readout", ["eot", "release"])
@torch.no_grad()
def test_map_equals_the_transcription(clip: Clip, tiny_fields: dict[str, Any], readout: str, text_depth: int) -> None:
    options = DapoOptions(groups=3, context_tokens=5, text_depth=text_depth)
    dapo = trained_looking(Dapo(clip, options=options, image_size=SIZE, feature_layers=(1, 3, 5), seed=4))
    dapo.readout = readout  # type: ignore[assignment]
    bank = dapo.bank(parse_recipe({**tiny_fields, "prompts": {"defects": PHRASES}}).prompts.defects, "object")
    spec = MapSpec(SIZE, dapo.grid, 0.07, dapo.align_corners, smoothing_px=0, score="image")
    rng = np.random.default_rng(0)
    view = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    eager = EagerBackend(dapo, bank, spec, MAP)
    image = eager.preprocess([view])

    anomaly, types, score = transcribed_map(clip, dapo, image[0], release=readout == "release")
    by_torch = eager.infer([view])
    tokens, embedding = (tensor.numpy() for tensor in dapo(image))
    by_numpy = make_maps(tokens, embedding, bank, spec, MAP)

    assert np.abs(by_torch.anomaly[0] - anomaly.numpy()).max() <= 1e-4
    assert np.abs(by_numpy.anomaly[0] - anomaly.numpy()).max() <= 1e-4
    assert (by_torch.types[0] == types.numpy()).mean() >= 0.999
    assert (by_numpy.types[0] == types.numpy()).mean() >= 0.999
    assert by_torch.image_scores[0] == pytest.approx(score, abs=1e-4)
    assert by_numpy.image_scores[0] == pytest.approx(score, abs=1e-4)
    assert anomaly.std() > 1e-3, "a flat map would agree with anything"


@torch.no_grad()
def test_the_two_readouts_differ(clip: Clip) -> None:
    dapo = Dapo(clip, seed=4)
    eot, release = (dapo.prompts(clip, PHRASES, "object", readout) for readout in ("eot", "release"))
    assert (eot - release).abs().max() > 0.01


@torch.no_grad()
def test_cutting_after_the_end_of_text_changes_nothing(clip: Clip) -> None:
    """`eot` reads a shortened sequence; with a longer neighbour in the same call it is cut later."""
    dapo = Dapo(clip, seed=4)
    alone = dapo.prompts(clip, ["hole"], "object", "eot")
    beside = dapo.prompts(clip, ["hole", "a very long and winding scratch along the edge"], "object", "eot")
    assert torch.allclose(alone, beside[:2], atol=1e-6)
