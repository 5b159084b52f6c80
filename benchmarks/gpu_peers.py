"""What the GPU benchmark compares with: a ViT in plain torch, and pre- and post-processing as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gpu_measure import EncoderShape
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] to the same."""
        _, tokens, width = x.shape
        split = self.qkv(self.norm_1(x)).reshape(-1, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(-1, tokens, width))
        hidden = self.up(self.norm_2(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))


class Encoder(nn.Module):
    """CLIP's ViT with seeded weights, its tapped blocks through one linear adapter each."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape = shape
        width, tokens = shape.width, shape.grid**2 + 1
        self.embed = nn.Conv2d(3, width, shape.patch, shape.patch, bias=False)
        self.first = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.visual_prompts = nn.Parameter(torch.randn(1, shape.prompts, width) * width**-0.5)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.blocks))
        self.adapters = nn.ModuleList(nn.Linear(width, shape.dimensions, bias=False) for _ in shape.taps)
        self.project = nn.Linear(width, shape.dimensions, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] to patch tokens [B, L, N, D] and image embeddings [B, D]."""
        batch, patches = image.shape[0], self.shape.grid**2
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(batch, -1, -1), x], 1) + self.positions
        x = self.norm_in(torch.cat([x, self.visual_prompts.expand(batch, -1, -1)], 1))
        taps: list[Tensor] = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in self.shape.taps:
                taps.append(self.adapters[len(taps)](x[:, 1 : 1 + patches]))
        return torch.stack(taps, 1), self.project(self.norm_out(x[:, 0]))


def usual_preprocess(frames: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Frames [B, H, W, 3] BGR uint8 to [B, 3, S, S] in the type of `mean` [3]: torch's antialiased bicubic."""
    pixels = frames.flip(-1).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    normalised = (small.round().clamp(0, 255) / 255 - mean.float().view(3, 1, 1)) / std.float().view(3, 1, 1)
    return normalised.to(mean.dtype)


def usual_postprocess(
    tokens: Tensor, bank: Tensor, temperature: float, grid: tuple[int, int], size: tuple[int, int], sigma: float
) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, N, D] and a bank [K+1, D] to anomaly [B, H, W] FP16 and types [B, H, W] u8; size is (H, W).

    Every channel is upsampled, then smoothed by two convolutions. Their border is torch's "reflect", which does not
    repeat the edge: there the result differs from `reference.py`.
    """
    logits = F.normalize(tokens, dim=-1) @ bank.T / temperature
    probs = logits.float().softmax(-1).mean(1).transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(probs, size=size, mode="bilinear", align_corners=True)
    radius = int(4 * sigma + 0.5)
    if radius:
        distance = torch.arange(-radius, radius + 1, device=tokens.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (distance / sigma) ** 2)
        weights = weights / weights.sum()
        flat = F.pad(maps.flatten(0, 1)[:, None], (radius,) * 4, mode="reflect")
        flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
        maps = flat[:, 0].unflatten(0, maps.shape[:2])
    return (1 - maps[:, 0]).half(), maps.argmax(1).to(torch.uint8)
