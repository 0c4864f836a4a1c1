"""How many tokens each layer keeps at each time, as a learnable function. In: times. Out: ratios, and a plan's rows.

Legend: B samples, L layers, G grid points of a cost table. Equation numbers are those of Shiva-DiT, arXiv 2602.05605.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.selection.router import sinusoid


class RatioPolicy(nn.Module):
    """r(t, l) = sigmoid(Phi_time(t) + Phi_layer(e_l) + b): time and depth add up in logits (eq. 10, 11).

    The first layer is dense whatever the weights say. Both parts start at zero, so that every ratio starts at target.

    Attributes:
        layers: L.
        target: where the ratios start, in (0, 1).

    Raises:
        InputError: target outside (0, 1).
    """

    def __init__(self, layers: int, target: float, *, hidden: int = 256, features: int = 64, seed: int = 0) -> None:
        super().__init__()
        if not 0 < target < 1:
            raise InputError(f"a ratio policy starts at a share of tokens in (0, 1), got {target}")
        self.layers, self.target, self.features = layers, target, features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.time = _two_layers(features, hidden)
            self.layer = _two_layers(features, hidden)
            self.embedding = nn.Embedding(layers, features)
        self.bias = nn.Parameter(torch.tensor(math.log(target / (1 - target))))

    def forward(self, t_B: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
        """Ratios r [B, L] in (0, 1], 1 in the first layer.

        Args:
            t_B: normalised time in [0, 1], 1 is noise.
            noise: source of the N(0, 1) noise on the logits (eq. 29); None leaves it out.
        """
        logits_BL = self.time(sinusoid(t_B.float(), self.features)) + self.layer(self.embedding.weight).T + self.bias
        if noise is not None:
            drawn_BL = torch.randn(logits_BL.shape, generator=noise, device=noise.device)
            logits_BL = logits_BL + drawn_BL.to(logits_BL.device)
        ratios_BL = torch.sigmoid(logits_BL)
        return torch.cat([torch.ones_like(ratios_BL[:, :1]), ratios_BL[:, 1:]], dim=1)

    @torch.no_grad()
    def compile_rows(self, segments: Sequence[tuple[float, float]], tokens: int, points: int = 256) -> list[list[int]]:
        """The look-up table for inference: k = floor(N r), a row per segment, an entry per layer (eq. 12).

        Args:
            segments: [low, high) intervals of normalised time.
            tokens: N.
            points: times averaged over in each segment.
        """
        device = self.bias.device
        rows = []
        for low, high in segments:
            t_P = low + (high - low) * (torch.arange(points, device=device) + 0.5) / points
            rows.append(tokens_kept(self(t_P).mean(0, keepdim=True), tokens)[0])
        return rows


def tokens_kept(ratios_BL: torch.Tensor, tokens: int) -> list[list[int]]:
    """Whole tokens k = floor(N r) per sample and layer (eq. 12), decided once, on the host."""
    kept_BL = (ratios_BL.detach().double() * tokens + 1e-6).floor().clamp(0, tokens)
    rows: list[list[int]] = kept_BL.long().tolist()
    return rows


@dataclass(frozen=True)
class CostTable:
    """What each layer costs at each token count, measured or counted, as tensors.

    Attributes:
        grid_G: token counts, strictly ascending, the last one all tokens; at least two.
        cost_LG: cost of each layer at each of them, in any unit (milliseconds, joules, MiB, FLOPs).
        fixed: cost of what is no layer, same unit.

    Raises:
        InputError: shapes that do not fit.
    """

    grid_G: torch.Tensor
    cost_LG: torch.Tensor
    fixed: float = 0.0

    def __post_init__(self) -> None:
        points = len(self.grid_G)
        if points < 2 or self.cost_LG.ndim != 2 or self.cost_LG.shape[1] != points:
            raise InputError(
                "a cost table has an entry per layer and grid point, and two grid points or more, "
                f"got {list(self.cost_LG.shape)} for {points} points"
            )

    def cost(self, kept_BL: torch.Tensor) -> torch.Tensor:
        """Cost [B] of real-valued tokens kept [B, L]; piecewise linear, the outermost slopes go on."""
        grid_G, cost_LG = self.grid_G.to(kept_BL), self.cost_LG.to(kept_BL)
        right_BL = torch.searchsorted(grid_G, kept_BL.detach().contiguous()).clamp(1, len(grid_G) - 1)
        left_BL = right_BL - 1
        layer_L = torch.arange(kept_BL.shape[1], device=kept_BL.device)
        share_BL = (kept_BL - grid_G[left_BL]) / (grid_G[right_BL] - grid_G[left_BL])
        return torch.lerp(cost_LG[layer_L, left_BL], cost_LG[layer_L, right_BL], share_BL).sum(dim=1) + self.fixed

    def share(self, kept_BL: torch.Tensor) -> torch.Tensor:
        """Cost [B] as a share of the dense model's."""
        return self.cost(kept_BL) / (self.cost_LG[:, -1].sum() + self.fixed)


def _two_layers(features: int, hidden: int) -> nn.Sequential:
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), last)
