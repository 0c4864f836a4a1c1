"""The cheap path of rejected tokens: an affine map of low rank per layer, and scores of what it will miss.

In: tokens and condition of a layer. Out: the tokens after the cheap path, and how much the block would have added.
Both read the same projection, so choosing tokens costs one more column of a matrix product.

For a token x of width D in a layer with condition c and mean token m (eq. of ours, beyond the paper; fit in
selection/closed_form.py):

    h    = A n(x) + B x + C [n(c), n(m)] + h0 [R], n: zero mean, unit variance (a LayerNorm without weights)
    x'   = x + U_r h_r + u                    first r of the R hidden values: ranks are nested
    s_r  = a_r . n(x) + b_r . x               log of the squared update that x' lacks, up to a constant per sample
    g    = P n(c) + p [J]                     gates: A, B, a and b are A0 + sum_j g_j A_j, and so on, of each image

Blocks scale and gate what they do by the condition, so one map for all timesteps would explain less. The maps of an
image are put together before its tokens are read, so gates cost next to nothing per token.

Legend: S timestep segments, B samples, N tokens, D width, C condition width, R rank, V ranks on offer, J gates,
Q = R + V rows read, of which one rank takes r + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shiva_search.errors import InputError
from shiva_search.runtime.derived import Derived, Tensors
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.runtime.selector import Selector

_EPS = 1e-5  # of the variance, as in nn.LayerNorm
_ALIGNED = 8  # elements of two bytes: the 16 that tensor cores load at once


def image_features(x_BND: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
    """What all tokens of an image share: [n(c), n(mean of x over tokens)], [B, C + D], float32 or wider."""
    pooled_BD = x_BND.mean(1, dtype=torch.promote_types(x_BND.dtype, torch.float32))
    condition_BC = condition_BC.to(pooled_BD.dtype)
    return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in (condition_BC, pooled_BD)], dim=-1)


class AffineBypass(nn.Module):
    """The affine bypass of one layer, with a score for each rank on offer.

    Args:
        width: D.
        condition_width: C.
        rank: R, at least 0; with 0 the update is the same for all tokens, the "mean" bypass.
        ranks: on offer, ascending, 0 first (rejected tokens stand still).
        segments: S.
        gates: J; 0: the same maps for all images.
    """

    def __init__(
        self, width: int, condition_width: int, rank: int, ranks: Sequence[int], segments: int = 1, gates: int = 0
    ) -> None:
        super().__init__()
        self.rank, self.ranks, self.segments, self.gates = rank, tuple(ranks), segments, gates
        rows = rank + len(self.ranks)
        # Rows of hidden values, then of scores. Those over n(x) have zero mean, so that x need not be centred.
        self.over_normed = nn.Parameter(torch.zeros(segments, rows, width))
        self.over_tokens = nn.Parameter(torch.zeros(segments, rows, width))
        self.over_image = nn.Parameter(torch.zeros(segments, rank, condition_width + width))
        self.hidden = nn.Parameter(torch.zeros(segments, rank))
        self.out = nn.Parameter(torch.zeros(segments, rank, width))
        self.mean = nn.Parameter(torch.zeros(segments, width))
        if gates:
            self.gated_normed = nn.Parameter(torch.zeros(segments, gates, rows, width))
            self.gated_tokens = nn.Parameter(torch.zeros(segments, gates, rows, width))
            self.over_condition = nn.Parameter(torch.zeros(gates, condition_width))
            self.gate = nn.Parameter(torch.zeros(gates))
        self._derived = Derived()

    def read(
        self, x_BND: torch.Tensor, condition_BC: torch.Tensor, row: int = 0, rank: int | None = None
    ) -> torch.Tensor:
        """What the bypass needs to know of all tokens: hidden values, then scores.

        Args:
            x_BND: tokens as they enter the layer, any floating dtype.
            condition_BC: the backbone's own embedding of timestep and condition.
            row: the plan's timestep segment.
            rank: read for this one alone, which is cheaper; 0: rejected tokens stand still.

        Returns:
            [B, N, R + V]; for one rank [B, N, r + 1], the last value its score.
        """
        row = row if self.segments > 1 else 0
        width, dtype = x_BND.shape[-1], x_BND.dtype
        wide = torch.promote_types(dtype, torch.float32)
        taken = self.rank if rank is None else min(rank, self.rank)
        rows = self.rank + len(self.ranks) if rank is None else taken + 1
        base_E, *gated = self._readings(row, rank, x_BND.device)
        if gated:
            reading_BE = torch.addmm(base_E, self.gates_of(condition_BC).to(base_E.dtype), *gated).to(dtype)
            read_BNQ = torch.bmm(x_BND, reading_BE.view(len(x_BND), -1, width).transpose(1, 2)).to(wide)
        else:
            read_BNQ = F.linear(x_BND, base_E.view(-1, width).to(dtype)).to(wide)
        mean_BN1 = read_BNQ[..., 2 * rows, None]
        square_BN1 = torch.linalg.vector_norm(x_BND, dim=-1, keepdim=True, dtype=wide).square() / width
        scale_BN1 = torch.rsqrt(torch.addcmul(square_BN1, mean_BN1, mean_BN1, value=-1).clamp_min(0.0) + _EPS)
        hidden_BNQ = torch.addcmul(read_BNQ[..., rows : 2 * rows], read_BNQ[..., :rows], scale_BN1)
        if not taken:
            return hidden_BNQ
        image_BE = image_features(x_BND, condition_BC)
        shift_BR = F.linear(image_BE, self.over_image[row, :taken].to(wide), self.hidden[row, :taken].to(wide))
        return hidden_BNQ + F.pad(shift_BR, (0, rows - taken))[:, None]

    def gates_of(self, condition_BC: torch.Tensor) -> torch.Tensor:
        """g [B, J], float32 or wider."""
        if not self.gates:
            return condition_BC[:, :0]
        wide = torch.promote_types(condition_BC.dtype, torch.float32)
        normed_BC = F.layer_norm(condition_BC.to(wide), condition_BC.shape[-1:])
        return F.linear(normed_BC, self.over_condition.to(wide), self.gate.to(wide))

    def _readings(self, row: int, rank: int | None, device: torch.device) -> Tensors:
        """What reads tokens for one rank, or all, flat: rows over n(x), rows over x, one that gives the mean [Q' * D].

        With gates also what each of them adds to it [J, Q' * D].
        """

        def taken(of_QD: torch.Tensor) -> torch.Tensor:
            if rank is None:
                return of_QD
            score = self.rank + self._place(rank)
            return torch.cat([of_QD[..., : min(rank, self.rank), :], of_QD[..., score : score + 1, :]], dim=-2)

        def reading(normed_QD: torch.Tensor, tokens_QD: torch.Tensor, mean: float) -> torch.Tensor:
            normed_QD = taken(normed_QD)
            mean_1D = torch.full_like(normed_QD[..., :1, :], mean)
            parts = [normed_QD - normed_QD.mean(-1, keepdim=True), taken(tokens_QD), mean_1D]
            return _aligned(torch.cat(parts, dim=-2), device).flatten(-2)

        def make() -> Tensors:
            base_E = reading(self.over_normed[row], self.over_tokens[row], 1.0 / self.mean.shape[-1])
            if not self.gates:
                return (base_E,)
            return base_E, reading(self.gated_normed[row], self.gated_tokens[row], 0.0)

        weights = [self.over_normed, self.over_tokens]
        weights += [self.gated_normed, self.gated_tokens] if self.gates else []
        return self._derived.get(("reading", row, rank), weights, make)

    def _out(self, row: int, rank: int, like: torch.Tensor) -> torch.Tensor:
        """From hidden values, and 1, to tokens [R', D], in their type."""

        def make() -> Tensors:
            both_RD = torch.cat([self.out[row, :rank], self.mean[row, None]])
            return (_aligned(both_RD, like.device).to(like.dtype),)

        return self._derived.get(("out", row, rank, like.dtype), [self.out, self.mean], make)[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._derived.clear()  # moved elsewhere, or to another type
        return super()._apply(fn, recurse)

    def scores(self, hidden_BNQ: torch.Tensor, rank: int) -> torch.Tensor:
        """How much each token would miss with this rank [B, N], as a log: comparable between tokens of a sample.

        Args:
            hidden_BNQ: read for all ranks.
            rank: one of them.
        """
        return hidden_BNQ[..., self.rank + self._place(rank)]

    def move(self, x_BND: torch.Tensor, hidden_BNR: torch.Tensor, rank: int, row: int = 0) -> torch.Tensor:
        """The tokens after the cheap path [B, N, D], a new tensor.

        Args:
            x_BND: tokens.
            hidden_BNR: as `read` gives them, for all ranks or for this one.
            rank: hidden values to use.
            row: the plan's timestep segment.
        """
        row, rank = (row if self.segments > 1 else 0), min(rank, self.rank)
        if not rank:
            return x_BND + self.mean[row].to(x_BND.dtype)
        # The constant travels as one more hidden value, so that the product adds up all there is in one pass.
        ones = torch.ones_like(hidden_BNR[..., :1])
        out = self._out(row, rank, x_BND)
        hidden = torch.cat([hidden_BNR[..., :rank], ones.expand(*ones.shape[:-1], len(out) - rank)], dim=-1)
        hidden = hidden.to(x_BND.dtype)
        moved = torch.addmm(x_BND.flatten(0, 1), hidden.flatten(0, 1), out).view(x_BND.shape)
        return moved.to(x_BND.dtype)  # another one under autocast

    def _place(self, rank: int) -> int:
        if rank not in self.ranks:
            raise InputError(f"this bypass has the ranks {', '.join(map(str, self.ranks))}, the plan asks for {rank}")
        return self.ranks.index(rank)


class BypassBank(Selector):
    """The bypasses of all layers but the first, and a scorer: tokens that their bypass serves worst are kept.

    Attributes:
        bypass_kind: "mean" or "affine".
        ranks: on offer; 0 is always one.
        model, origin: see Selector.
    """

    kind = "shiva-search bypass"

    def __init__(
        self,
        layers: int,
        width: int,
        condition_width: int,
        bypass_kind: str = "affine",
        ranks: Sequence[int] = (0, 8, 16, 32),
        segments: int = 1,
        gates: int = 0,
    ) -> None:
        super().__init__()
        if bypass_kind not in ("mean", "affine") or list(ranks) != sorted({0, *ranks}):
            raise InputError(
                f"a bypass is mean or affine with ascending ranks from 0, got {bypass_kind!r} and {list(ranks)}"
            )
        self.bypass_kind, self.ranks, self.segments, self.gates = bypass_kind, tuple(ranks), segments, gates
        self.widths = (width, condition_width)
        rank = max(ranks) if bypass_kind == "affine" else 0
        self.layers = nn.ModuleList(
            AffineBypass(width, condition_width, rank, ranks, segments, gates) for _ in range(layers - 1)
        )

    @property
    def shape(self) -> dict[str, Any]:
        """See Selector."""
        return {
            "layers": len(self.layers) + 1, "width": self.widths[0], "condition_width": self.widths[1],
            "bypass_kind": self.bypass_kind, "ranks": list(self.ranks), "segments": self.segments,
            "gates": self.gates,
        }  # fmt: skip

    @property
    def bypasses(self) -> Mapping[int, AffineBypass]:
        """By layer."""
        return _ByLayer(self.layers)

    def forward(self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
        """Scores [B, N] where rejected tokens stand still: the TokenScorer protocol."""
        bypass: AffineBypass = self.layers[layer - 1]  # type: ignore[assignment]
        return bypass.read(x_BND.detach(), condition_BC, rank=0)[..., -1]


class Accompanied:
    """Another scorer, with the bypasses of a bank: for telling apart what ranks tokens and what moves rejected ones.

    Args:
        scorer: ranks tokens.
        bank: moves them.
    """

    def __init__(self, scorer: TokenScorer, bank: BypassBank) -> None:
        self.scorer, self.bank = scorer, bank
        self.bypasses, self.ranks, self.bypass_kind = bank.bypasses, bank.ranks, bank.bypass_kind
        self.uses_history = getattr(scorer, "uses_history", False)
        self.uses_update_size = getattr(scorer, "uses_update_size", True)

    def __call__(
        self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int, **history: Any
    ) -> torch.Tensor:
        """Scores [B, N] of the scorer."""
        return self.scorer(x_BND, t_B, condition_BC, layer, **history)


def module_of(scorer: TokenScorer) -> nn.Module | None:
    """What has weights in a scorer, if anything."""
    found = scorer.bank if isinstance(scorer, Accompanied) else scorer
    return found if isinstance(found, nn.Module) else None


def _aligned(matrix: torch.Tensor, device: torch.device) -> torch.Tensor:
    """With rows of zeros on a GPU: half-precision products of odd sizes take five times as long there."""
    return F.pad(matrix, (0, 0, 0, -matrix.shape[-2] % _ALIGNED)) if device.type == "cuda" else matrix


class _ByLayer(Mapping[int, AffineBypass]):
    """A module list as a mapping from layers; nothing is copied, so training and moving keep both in step."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers

    def __getitem__(self, layer: int) -> AffineBypass:
        if not 1 <= layer <= len(self.layers):
            raise KeyError(layer)
        found: AffineBypass = self.layers[layer - 1]  # type: ignore[assignment]
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self.layers) + 1))

    def __len__(self) -> int:
        return len(self.layers)
