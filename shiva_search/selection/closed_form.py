"""Fit bypasses in closed form. In: a model and its training inputs. Out: a BypassBank, and what each layer explains.

A pass runs the dense model over the inputs once, block by block: a sample of each block's tokens goes into normal
equations in float64, and nothing else is kept. From the second pass on some tokens of each layer leave by the bypass
of the pass before, so that a layer learns from tokens as they are behind pruned layers, not as in the dense model.

Updates: ridge regression of f = block(x) - x on [n(x), x, n(c)], then reduced rank (Izenman 1975): the directions of
the fitted values that carry most. Scores: ridge regression of log |f - bypass|^2 on [n(x), x], both less their mean
over the sample's tokens, since only the order within a sample counts.

Legend: B samples, N tokens, M of them drawn, D width, C condition width, P features, R rank, V ranks, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from shiva_search.errors import InputError
from shiva_search.models.model import Layer, Model
from shiva_search.runtime.bypass import AffineBypass, BypassBank
from shiva_search.runtime.places import Attached, StandIn
from shiva_search.runtime.token_ops import gather_tokens, top_k
from shiva_search.selection.router import widths_of

RANKS = (16, 32)
_RIDGE = 1e-4  # of each standardised feature
_MISS_FLOOR = 1e-3  # of the mean squared miss: tokens below are all alike
_KEEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of tokens that stay with the block, drawn by layer and chunk


@dataclass
class _Sums:
    """Normal equations of one layer and segment, float64, on the model's device."""

    features_PP: torch.Tensor
    updates_PD: torch.Tensor
    within_PP: torch.Tensor
    misses_PV: torch.Tensor
    squared: torch.Tensor  # of the updates, then of what each rank misses: [1 + V]
    rows: int = 0

    @classmethod
    def empty(cls, width: int, condition_width: int, ranks: int, device: torch.device) -> _Sums:
        features = 2 * width + condition_width + 1

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        tokens = 2 * width
        return cls(
            zeros(features, features), zeros(features, width), zeros(tokens, tokens), zeros(tokens, ranks),
            zeros(1 + ranks),
        )  # fmt: skip


@dataclass
class FitReport:
    """How well bypasses explain updates.

    Attributes:
        missed: by layer and rank, the share of the squared update that is left over, on inputs of the last pass,
            which the bypass judged there had not been fit on.
    """

    missed: dict[int, dict[int, float]] = field(default_factory=dict)


def fit_bypasses(
    model: Model,
    kind: str = "affine",
    ranks: Sequence[int] = RANKS,
    *,
    samples: int = 256,
    passes: int = 3,
    tokens_per_sample: int = 96,
    chunk: int = 16,
    segments: int = 1,
    memory_mib: float = 2048.0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[BypassBank, FitReport]:
    """Fit a bypass for every layer but the first, and scores of what it misses.

    Args:
        model: the model; its "train" split is drawn from, anew for each pass.
        kind: "mean" (the same update for all tokens) or "affine".
        ranks: on offer to plans; 0, standing still, is added.
        samples: inputs per pass.
        passes: at least 2: the first one sees the dense model alone.
        tokens_per_sample: tokens drawn from each input, in each layer.
        chunk: inputs per forward.
        segments: timestep segments with a bypass each.
        memory_mib: for normal equations; where all layers do not fit, a pass runs the model several times.
        seed: same seed, same bypass.
        progress: told short lines.

    Raises:
        InputError: bad settings.
    """
    if passes < 2 or samples < 1 or segments < 1:
        raise InputError(
            f"a fit takes at least 2 passes, 1 sample and 1 segment, got {passes}, {samples} and {segments}"
        )
    say = progress or (lambda line: None)
    offered = offered_ranks(kind, ranks)
    width, condition_width = widths_of(model)
    size_mib = 8 * ((2 * width + condition_width) ** 2 + (2 * width) ** 2) * segments / 2**20
    at_once = max(1, int(memory_mib / size_mib))
    device = next(model.module.parameters()).device
    bank: BypassBank | None = None
    report = FitReport()
    for index in range(passes):
        made = BypassBank(model.layer_count, width, condition_width, kind, offered, segments).to(device)
        layers = list(range(1, model.layer_count))
        for first in range(0, len(layers), at_once):
            wanted = layers[first : first + at_once]
            sums = {
                layer: [_Sums.empty(width, condition_width, len(offered), device) for _ in range(segments)]
                for layer in wanted
            }
            run = _Pass(model, bank, sums, tokens_per_sample, torch.Generator().manual_seed(seed * 1009 + index))
            run.over(samples, chunk, seed * passes + index)
            for layer in wanted:
                for segment, found in enumerate(sums[layer]):
                    _solve(made.bypasses[layer], found, segment)
                if bank is not None:
                    total = torch.stack([found.squared for found in sums[layer]]).sum(0)
                    report.missed[layer] = {
                        rank: float(total[1 + place] / total[0]) for place, rank in enumerate(offered)
                    }
        bank = made
        say(f"bypasses: pass {index + 1} of {passes} over {samples} inputs")
    assert bank is not None
    bank.model = model.fingerprint()
    missed = {str(layer): {str(rank): left for rank, left in row.items()} for layer, row in report.missed.items()}
    bank.origin = {"stage": "closed form", "samples": samples, "passes": passes, "seed": seed, "missed": missed}
    return bank.eval().requires_grad_(False), report


def offered_ranks(kind: str, ranks: Sequence[int] = RANKS) -> tuple[int, ...]:
    """Ranks a plan may ask for, 0 (rejected tokens stand still) among them; a mean bypass is on or off."""
    return tuple(sorted({0, *ranks})) if kind == "affine" else (0, 1)


def untrained_bypasses(
    model: Model, kind: str = "affine", ranks: Sequence[int] = RANKS, segments: int = 1, seed: int = 0
) -> BypassBank:
    """Bypasses with small random weights, on the model's device: what they cost does not depend on what was learned."""
    offered = offered_ranks(kind, ranks)
    bank = BypassBank(model.layer_count, *widths_of(model), kind, offered, segments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
    bank.model = model.fingerprint()
    device = next(model.module.parameters()).device
    return (bank if device.type == "meta" else bank.to(device)).eval().requires_grad_(False)


class _Pass:
    """One run of the model over its inputs, with every block watched."""

    def __init__(
        self,
        model: Model,
        bank: BypassBank | None,
        sums: dict[int, list[_Sums]],
        drawn: int,
        generator: torch.Generator,
    ) -> None:
        self.model, self.bank, self.sums = model, bank, sums
        self.drawn, self.generator = min(drawn, model.tokens), generator
        self.segment_B = torch.zeros(0, dtype=torch.int64)

    def over(self, samples: int, chunk: int, seed: int) -> None:
        """Run it; the model is as before afterwards."""
        watched = [Attached(layer.module, partial(_Watch, self, layer)) for layer in self.model.layers]
        try:
            with torch.no_grad():
                for batch in self.model.batch("train", samples, seed).chunks(chunk):
                    segments = len(next(iter(self.sums.values())))
                    self.segment_B = (batch.t_B.cpu() * segments).long().clamp(max=segments - 1)
                    self.model.predict(batch.inputs)
        finally:
            for block in reversed(watched):
                block.take_off()

    def see(self, layer: int, x_BND: torch.Tensor, out_BND: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        """Add up what a block did, and return its tokens as a pruned layer would leave them."""
        batch, tokens, _ = x_BND.shape
        bypass = None if self.bank is None else self.bank.bypasses[layer]
        hidden_BNQ = None if bypass is None else self._by_segment(bypass, x_BND, condition_BC)
        if layer in self.sums:
            drawn_BM = torch.rand(batch, tokens, generator=self.generator).topk(self.drawn, dim=1).indices
            drawn_BM = drawn_BM.to(x_BND.device)
            x_BMD, f_BMD = gather_tokens(x_BND, drawn_BM), gather_tokens(out_BND - x_BND, drawn_BM)
            hidden_BMQ = None if hidden_BNQ is None else gather_tokens(hidden_BNQ, drawn_BM)
            for segment, sums in enumerate(self.sums[layer]):
                rows = torch.nonzero(self.segment_B == segment).flatten().to(x_BND.device)
                if len(rows):
                    _add(
                        sums, x_BMD[rows], f_BMD[rows], condition_BC[rows], bypass,
                        None if hidden_BMQ is None else hidden_BMQ[rows], segment,
                    )  # fmt: skip
        if bypass is None or hidden_BNQ is None:
            return out_BND
        keep = _KEEPS[int(torch.randint(len(_KEEPS), (), generator=self.generator))]
        rank = bypass.ranks[int(torch.randint(len(bypass.ranks), (), generator=self.generator))]
        scores_BN = bypass.scores(hidden_BNQ, rank)
        kept_BN = torch.zeros_like(scores_BN, dtype=torch.bool)
        kept_BN.scatter_(1, top_k(scores_BN, int(keep * tokens)), True)
        moved_BND = self._moved(bypass, x_BND, hidden_BNQ, rank) if rank else x_BND
        return torch.where(kept_BN[..., None], out_BND, moved_BND)

    def _by_segment(self, bypass: AffineBypass, x_BND: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        if bypass.segments == 1:
            return bypass.read(x_BND, condition_BC)
        rows = [bypass.read(x_BND[i : i + 1], condition_BC[i : i + 1], int(s)) for i, s in enumerate(self.segment_B)]
        return torch.cat(rows)

    def _moved(self, bypass: AffineBypass, x_BND: torch.Tensor, hidden_BNQ: torch.Tensor, rank: int) -> torch.Tensor:
        if bypass.segments == 1:
            return bypass.move(x_BND, hidden_BNQ, rank)
        rows = [
            bypass.move(x_BND[i : i + 1], hidden_BNQ[i : i + 1], rank, int(s)) for i, s in enumerate(self.segment_B)
        ]
        return torch.cat(rows)


class _Watch(StandIn):
    """Stands in for a block: runs it whole, shows the pass what it did, hands on what a pruned layer would."""

    def __init__(self, run: _Pass, layer: Layer, forward: Callable[..., Any]) -> None:
        super().__init__(forward)
        self.run, self.layer = run, layer

    def stand_in(self, *args: Any, **kwargs: Any) -> Any:
        layer, adapter = self.layer, self.layer.adapter
        kwargs.update(zip(layer.arguments, args, strict=False))
        if layer.index == 0:  # dense in every plan
            return self.forward(**kwargs)
        forward = adapter.apart(self.forward)

        def watched(**split: Any) -> Any:
            out_BND, context = adapter.unpack(forward(**split))
            condition_BC = adapter.condition(layer.module, split)
            return adapter.pack(self.run.see(layer.index, split[adapter.tokens], out_BND, condition_BC), context)

        return adapter.around(watched, layer.arguments, self.run.model.tokens)(**kwargs)


def _add(
    sums: _Sums,
    x_BMD: torch.Tensor,
    f_BMD: torch.Tensor,
    condition_BC: torch.Tensor,
    bypass: AffineBypass | None,
    hidden_BMQ: torch.Tensor | None,
    segment: int,
) -> None:
    x_BMD, f_BMD = x_BMD.double(), f_BMD.double()
    tokens_BMP = torch.cat([F.layer_norm(x_BMD, x_BMD.shape[-1:]), x_BMD], dim=-1)
    condition_BC = F.layer_norm(condition_BC.double(), condition_BC.shape[-1:])
    condition_BMC = condition_BC[:, None].expand(-1, x_BMD.shape[1], -1)
    all_BMP = torch.cat([tokens_BMP, condition_BMC, torch.ones_like(x_BMD[..., :1])], dim=-1)
    all_nP, f_nD = all_BMP.flatten(0, 1), f_BMD.flatten(0, 1)
    sums.features_PP += all_nP.T @ all_nP
    sums.updates_PD += all_nP.T @ f_nD
    sums.rows += len(all_nP)
    square_BM = f_BMD.square().sum(-1)
    if bypass is None or hidden_BMQ is None:
        missed_BMV = square_BM[..., None].expand(-1, -1, sums.misses_PV.shape[1])
    else:
        parts = [square_BM]
        for rank in bypass.ranks[1:]:
            moved_BMD = bypass.move(x_BMD, hidden_BMQ, rank, segment)
            parts.append((f_BMD - (moved_BMD - x_BMD)).square().sum(-1))
        missed_BMV = torch.stack(parts, dim=-1)
    sums.squared += torch.cat([square_BM.sum()[None], missed_BMV.sum((0, 1))])
    logs_BMV = (missed_BMV + _MISS_FLOOR * missed_BMV.mean((0, 1)) + 1e-30).log()
    within_BMP = tokens_BMP - tokens_BMP.mean(1, keepdim=True)
    logs_BMV = logs_BMV - logs_BMV.mean(1, keepdim=True)
    within_nP = within_BMP.flatten(0, 1)
    sums.within_PP += within_nP.T @ within_nP
    sums.misses_PV += within_nP.T @ logs_BMV.flatten(0, 1)


def _solve(bypass: AffineBypass, sums: _Sums, segment: int) -> None:
    """Write the solution of the normal equations into a bypass."""
    mean_P = sums.features_PP[-1, :-1] / sums.rows
    mean_D = sums.updates_PD[-1] / sums.rows
    covariance_PP = sums.features_PP[:-1, :-1] / sums.rows - mean_P[:, None] * mean_P
    cross_PD = sums.updates_PD[:-1] / sums.rows - mean_P[:, None] * mean_D
    width = bypass.mean.shape[-1]
    with torch.no_grad():
        bypass.mean[segment] = mean_D
        if bypass.rank:
            weights_PD = ridge(covariance_PP, cross_PD)
            directions_DR = _leading(weights_PD.T @ covariance_PP @ weights_PD, bypass.rank)
            hidden_PR = weights_PD @ directions_DR
            bypass.over_normed[segment, : bypass.rank] = hidden_PR[:width].T
            bypass.over_tokens[segment, : bypass.rank] = hidden_PR[width : 2 * width].T
            bypass.over_condition[segment] = hidden_PR[2 * width :].T
            bypass.hidden[segment] = -mean_P @ hidden_PR
            bypass.out[segment] = directions_DR.T
        scores_PV = ridge(sums.within_PP / sums.rows, sums.misses_PV / sums.rows)
        bypass.over_normed[segment, bypass.rank :] = scores_PV[:width].T
        bypass.over_tokens[segment, bypass.rank :] = scores_PV[width:].T


def ridge(covariance_PP: torch.Tensor, cross_PD: torch.Tensor, strength: float = _RIDGE) -> torch.Tensor:
    """Weights [P, D] of a ridge regression in which every feature has unit variance; constant features get none.

    Args:
        covariance_PP: of the features, float64.
        cross_PD: of features and targets.
        strength: of the penalty.
    """
    scale_P = covariance_PP.diagonal().clamp_min(0.0).sqrt()
    inverse_P = torch.where(scale_P > 1e-9 * scale_P.max(), 1.0 / scale_P.clamp_min(1e-300), 0.0)
    standard_PP = covariance_PP * inverse_P[:, None] * inverse_P
    standard_PP.diagonal().add_(strength)
    return inverse_P[:, None] * torch.linalg.solve(standard_PP, inverse_P[:, None] * cross_PD)


def _leading(symmetric_DD: torch.Tensor, count: int) -> torch.Tensor:
    """Eigenvectors [D, count] of the largest eigenvalues, largest first; zero columns where there are no more."""
    _, vectors = torch.linalg.eigh((symmetric_DD + symmetric_DD.T) / 2)
    found = vectors.flip(1)[:, :count]
    return F.pad(found, (0, count - found.shape[1]))
