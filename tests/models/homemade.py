"""Small transformers that nobody has written an adapter for: some treat tokens as a set, some do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Self-attention with rotary tables (cos, sin), each [N, E], where they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, rotary: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        if rotary is not None:
            cos, sin = (table[None, :, None, :] for table in rotary)
            q, k = (
                part * cos + torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2) * sin for part in (q, k)
            )
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        bias = None if mask is None else mask[:, None] if mask.ndim == 3 else mask[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, modulated by the condition. Subclasses do what a gather does not survive, or does."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """What else happens to normalised tokens."""
        return x

    def forward(
        self, x: torch.Tensor, cond: torch.Tensor, rotary: Any = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        inside = self.mixed(self.norm(x) + self.modulation(cond)[:, None])
        x = x + self.attention(inside, rotary, mask)
        return x + self.mlp(self.norm(x))


class ConvBlock(Block):
    """A convolution over the token grid behind a gate that starts at zero, as new layers often do."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.side = int(tokens**0.5)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.gate = nn.Parameter(torch.zeros(1))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        grid = x.transpose(1, 2).unflatten(2, (-1, self.side))
        return x + self.gate * self.conv(grid).flatten(2).transpose(1, 2)


class AlongBlock(Block):
    """A convolution along the sequence: it runs on any number of tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class PositionBlock(Block):
    """Positions made inside, from the length of what it gets."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.linspace(-1, 1, x.shape[1])[None, :, None]


class MixerBlock(Block):
    """A linear layer over the tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.across = nn.Linear(tokens, tokens)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.across(x.transpose(1, 2)).transpose(1, 2)


class BatchBlock(Block):
    """Samples that look at each other."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.mean(dim=(0, 1), keepdim=True)


class HalvesOnlyBlock(Block):
    """Insists on a number of tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self.tokens:
            raise ValueError(f"this block is for {self.tokens} tokens")
        return x


class Denoiser(nn.Module):
    """An image [B, 4, side, side] in patches of two, a noise level and a bias on keys; the blocks lie one level down.

    Args:
        block: class of the blocks.
        rotary: positions are rotary tables handed to every block, not added at the input.
        skips: the second half of the blocks gets its input plus what the first half gave, last come first served.
        bias: attention bias for some image tokens.
        pairs: attention bias for pairs of image tokens, as of their distance.
    """

    def __init__(
        self,
        block: type[Block],
        *,
        rotary: bool = False,
        skips: bool = False,
        bias: bool = False,
        pairs: bool = False,
        side: int = 8,
    ) -> None:
        super().__init__()
        tokens = (side // 2) ** 2
        self.embed, self.time, self.head = nn.Linear(16, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 16)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(block(tokens) for _ in range(4))
        self.positions = nn.Parameter(torch.randn(tokens, WIDTH))
        self.rotary, self.skips, self.bias, self.pairs = rotary, skips, bias, pairs

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        side = x.shape[-1] // 2
        tokens = x.unflatten(3, (side, 2)).unflatten(2, (side, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens, cond = self.embed(tokens), self.time(t[:, None].float())
        rotary = mask = None
        if self.rotary:
            angle = self.positions[:, : WIDTH // HEADS]
            rotary = (angle.cos(), angle.sin())
        else:
            tokens = tokens + self.positions
        if self.bias:
            mask = torch.linspace(-1, 1, tokens.shape[1]).expand(len(x), -1)
        if self.pairs:
            mask = -torch.cdist(self.positions, self.positions)[None]
        kept = []
        for place, layer in enumerate(self.body.layers):
            if self.skips and place >= 2:
                tokens = tokens + kept.pop()
            tokens = layer(tokens, cond, rotary=rotary, mask=mask)
            if place < 2:
                kept.append(tokens)
        tokens = self.head(tokens).unflatten(1, (side, side)).unflatten(3, (4, 2, 2))
        return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def denoiser(block: type[Block] = Block, seed: int = 0, **options: Any) -> Denoiser:
    """A model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(block, **options).eval().requires_grad_(False)


def example(batch: int = 2, seed: int = 0, side: int = 8) -> dict[str, torch.Tensor]:
    """Inputs of one forward."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 4, side, side, generator=generator),
        "t": torch.rand(batch, generator=generator),
    }
