"""Which tokens matter: the scorers that need no training. In: tokens and conditions. Out: scores [B, N], high is kept.

A scorer maps (x_BND, t_B, condition_BC, layer) to scores_BN. One that sets `uses_history = True` is also given
`history`, what happened to each token in the layers before; if it says `uses_update_size = False`, the sizes of updates
are left out of it, which saves a pass over all tokens in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from shiva_search.errors import InputError

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class History:
    """What happened to each token so far in this forward.

    Attributes:
        age_BN: pruned or skipped layers since the token was last processed, 0 if the layer before processed it.
        update_size_BN: norm of the update it received in the layer before, 0 if it was passed over.
    """

    age_BN: torch.Tensor
    update_size_BN: torch.Tensor


class TokenScorer(Protocol):
    """Maps tokens to importance. A plain function with the first four arguments will do."""

    def __call__(
        self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int
    ) -> torch.Tensor: ...


class Stride:
    """Evenly spread tokens by a low-discrepancy sequence (golden ratio), rotated from layer to layer."""

    def __call__(self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
        batch, tokens, _ = x_BND.shape
        return self.order(tokens, layer, x_BND.device).expand(batch, tokens)

    def order(self, tokens: int, layer: int, device: torch.device) -> torch.Tensor:
        """The scores of one sample, [N]."""
        position_N = torch.arange(tokens, device=device, dtype=torch.float64)
        return ((position_N * _GOLDEN + layer * _GOLDEN**2) % 1.0).to(torch.float32)


class Random:
    """Random tokens, drawn anew in each layer from the seed, the same for every sample and forward."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._drawn: dict[tuple[int, int, int, torch.device], torch.Tensor] = {}

    def __call__(self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
        batch, tokens, _ = x_BND.shape
        key = (layer, batch, tokens, x_BND.device)
        if key not in self._drawn:  # kept, since a CUDA graph cannot hold the way from the host
            generator = torch.Generator().manual_seed(self.seed * 1009 + layer)
            self._drawn[key] = torch.rand(batch, tokens, generator=generator).to(x_BND.device)
        return self._drawn[key]


class Norm:
    """Size of the token's features."""

    def __call__(self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
        return x_BND.float().norm(dim=-1)


class Residual:
    """Size of the update the token received in the block before."""

    uses_history = True

    def __call__(
        self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int, history: History
    ) -> torch.Tensor:
        return history.update_size_BN


SCORERS: dict[str, Callable[[], TokenScorer]] = {
    "stride": Stride,
    "random": Random,
    "norm": Norm,
    "residual": Residual,  # type: ignore[dict-item]  # takes the history as well
}


def scorer_by_name(name: str) -> TokenScorer:
    """An untrained scorer.

    Raises:
        InputError: unknown name; lists the known ones.
    """
    if name not in SCORERS:
        raise InputError(f"unknown scorer {name!r}; choose one of {', '.join(SCORERS)} or pass a callable")
    return SCORERS[name]()
