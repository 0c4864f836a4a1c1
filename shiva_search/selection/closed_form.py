"""Fit bypasses in closed form. In: a model and its training inputs. Out: a BypassBank, and what each layer explains.

A pass runs the dense model over the inputs once, block by block: a sample of each block's tokens goes into normal
equations in float64, and nothing else is kept. From the second pass on some tokens of each layer leave by the bypass
of the pass before, so that a layer learns from tokens as they are behind pruned layers, not as in the dense model.

Updates f = block(x) - x: within images, ridge regression of f on t = [n(x), x], both less their means over the image's
tokens; between images, of the mean f less what that gives for the mean t, on z = [n(c), n(mean x)], with the penalty
that generalised cross-validation finds (Golub, Heath, Wahba 1979), since there are only as many samples as images. Then
reduced rank (Izenman 1975): the directions of the fitted values that carry most. Scores: ridge regression of
log |f - bypass|^2 on t within images, since only the order within a sample counts.

Legend: B samples, N tokens, M of them drawn, D width, C condition width, E features of images, T features of tokens
(2 D), R rank, V ranks, S segments.
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
from shiva_search.runtime.bypass import AffineBypass, BypassBank, image_features
from shiva_search.runtime.places import Attached, StandIn
from shiva_search.runtime.token_ops import gather_tokens, top_k
from shiva_search.selection.router import widths_of

RANKS = (16, 32)
_RIDGE = 1e-4  # of each standardised feature
_ROUNDING = 1e-8  # of a sum of squares
_FEWEST_IMAGES = 4  # from which a cross-validated penalty means anything
_PENALTIES = tuple(10.0**power for power in (-5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
_MISS_FLOOR = 1e-3  # of the mean squared miss: tokens below are all alike
_KEEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of tokens that stay with the block, drawn by layer and chunk


@dataclass
class _Sums:
    """Normal equations of one layer and segment, float64, on the model's device.

    Within images, of tokens' features and their updates; between images, of [z, mean t, 1] and the mean update.
    """

    within_TT: torch.Tensor
    updates_TD: torch.Tensor
    misses_TV: torch.Tensor
    images_GG: torch.Tensor
    means_GD: torch.Tensor
    mean_square: torch.Tensor  # of the mean updates
    squared: torch.Tensor  # of the updates, then of what each rank misses: [1 + V]
    rows: int = 0
    images: int = 0

    @classmethod
    def empty(cls, width: int, condition_width: int, ranks: int, device: torch.device) -> _Sums:
        tokens, all_means = 2 * width, 3 * width + condition_width + 1

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(tokens, tokens), zeros(tokens, width), zeros(tokens, ranks),
            zeros(all_means, all_means), zeros(all_means, width), zeros(), zeros(1 + ranks),
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
    size_mib = 8 * ((3 * width + condition_width) ** 2 + (2 * width) ** 2) * segments / 2**20
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
            image_BE = image_features(x_BND, condition_BC)
            for segment, sums in enumerate(self.sums[layer]):
                rows = torch.nonzero(self.segment_B == segment).flatten().to(x_BND.device)
                if len(rows):
                    _add(
                        sums, x_BMD[rows], f_BMD[rows], image_BE[rows], bypass,
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
    image_BE: torch.Tensor,
    bypass: AffineBypass | None,
    hidden_BMQ: torch.Tensor | None,
    segment: int,
) -> None:
    x_BMD, f_BMD = x_BMD.double(), f_BMD.double()
    tokens_BMT = torch.cat([F.layer_norm(x_BMD, x_BMD.shape[-1:]), x_BMD], dim=-1)
    mean_BT, mean_BD = tokens_BMT.mean(1), f_BMD.mean(1)
    within_nT = (tokens_BMT - mean_BT[:, None]).flatten(0, 1)
    sums.within_TT += within_nT.T @ within_nT
    sums.updates_TD += within_nT.T @ (f_BMD - mean_BD[:, None]).flatten(0, 1)
    means_BG = torch.cat([image_BE.double(), mean_BT, torch.ones_like(mean_BT[:, :1])], dim=-1)
    sums.images_GG += means_BG.T @ means_BG
    sums.means_GD += means_BG.T @ mean_BD
    sums.mean_square += mean_BD.square().sum()
    sums.rows += len(within_nT)
    sums.images += len(x_BMD)
    square_BM = f_BMD.square().sum(-1)
    if bypass is None or hidden_BMQ is None:
        missed_BMV = square_BM[..., None].expand(-1, -1, sums.misses_TV.shape[1])
    else:
        parts = [square_BM]
        for rank in bypass.ranks[1:]:
            moved_BMD = bypass.move(x_BMD, hidden_BMQ, rank, segment)
            parts.append((f_BMD - (moved_BMD - x_BMD)).square().sum(-1))
        missed_BMV = torch.stack(parts, dim=-1)
    sums.squared += torch.cat([square_BM.sum()[None], missed_BMV.sum((0, 1))])
    logs_BMV = (missed_BMV + _MISS_FLOOR * missed_BMV.mean((0, 1)) + 1e-30).log()
    logs_BMV = logs_BMV - logs_BMV.mean(1, keepdim=True)
    sums.misses_TV += within_nT.T @ logs_BMV.flatten(0, 1)


def _solve(bypass: AffineBypass, sums: _Sums, segment: int) -> None:
    """Write the solution of the normal equations into a bypass."""
    width, count = bypass.mean.shape[-1], sums.images
    centre_G = sums.images_GG[-1] / count
    covariance_GG = sums.images_GG / count - centre_G[:, None] * centre_G
    mean_D = sums.means_GD[-1] / count
    cross_GD = sums.means_GD / count - centre_G[:, None] * mean_D
    within_TT = sums.within_TT / sums.rows
    images = slice(0, len(centre_G) - 2 * width - 1)
    tokens = slice(images.stop, images.stop + 2 * width)
    with torch.no_grad():
        bypass.mean[segment] = mean_D
        if bypass.rank:
            weights_TD = ridge(within_TT, sums.updates_TD / sums.rows)
            # What is left of the mean update, less what the tokens' weights make of the mean token.
            left_ED = cross_GD[images] - covariance_GG[images, tokens] @ weights_TD
            square = (
                sums.mean_square / count - mean_D.square().sum()
                - 2 * (weights_TD * cross_GD[tokens]).sum()
                + (weights_TD * (covariance_GG[tokens, tokens] @ weights_TD)).sum()
            )  # fmt: skip
            covariance_EE = covariance_GG[images, images]
            weights_ED = cross_validated_ridge(covariance_EE, left_ED, float(square), count)
            between_GD = torch.cat([weights_ED, weights_TD])
            fitted_DD = weights_TD.T @ within_TT @ weights_TD + between_GD.T @ covariance_GG[:-1, :-1] @ between_GD
            directions_DR = _leading(fitted_DD, bypass.rank)
            hidden_TR, hidden_ER = weights_TD @ directions_DR, weights_ED @ directions_DR
            bypass.over_normed[segment, : bypass.rank] = hidden_TR[:width].T
            bypass.over_tokens[segment, : bypass.rank] = hidden_TR[width:].T
            bypass.over_image[segment] = hidden_ER.T
            bypass.hidden[segment] = -centre_G[images] @ hidden_ER - centre_G[tokens] @ hidden_TR
            bypass.out[segment] = directions_DR.T
        scores_TV = ridge(within_TT, sums.misses_TV / sums.rows)
        bypass.over_normed[segment, bypass.rank :] = scores_TV[:width].T
        bypass.over_tokens[segment, bypass.rank :] = scores_TV[width:].T


def cross_validated_ridge(
    covariance_EE: torch.Tensor, cross_ED: torch.Tensor, square: float, count: int
) -> torch.Tensor:
    """Ridge regression with the penalty that generalised cross-validation finds best.

    Args:
        covariance_EE: of the features, float64.
        cross_ED: of features and targets.
        square: mean squared norm of the targets, about their mean.
        count: samples.

    Returns:
        Weights [E, D].
    """
    scale_E, standard_EE = _standardised(covariance_EE)
    values_E, vectors_EE = torch.linalg.eigh(standard_EE)
    values_E = values_E.clamp_min(0.0)
    turned_ED = vectors_EE.T @ (scale_E[:, None] * cross_ED)
    energy_E = turned_ED.square().sum(1)
    best = (float("inf"), 0.0)
    for strength in _PENALTIES:
        # What is left may not fall below what rounding leaves of it, or an interpolating fit would look best.
        left = square - float((energy_E * (values_E + 2 * strength) / (values_E + strength).square()).sum())
        freedom = 1.0 + float((values_E / (values_E + strength)).sum())
        if freedom < count:
            best = min(best, (max(left, _ROUNDING * square) / (1 - freedom / count) ** 2, strength))
    if not best[1] or count < _FEWEST_IMAGES:
        return torch.zeros_like(cross_ED)
    return scale_E[:, None] * (vectors_EE @ (turned_ED / (values_E + best[1])[:, None]))


def _standardised(covariance_PP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What brings each feature to unit variance, 0 for constant ones, and the covariance of the features so brought."""
    scale_P = covariance_PP.diagonal().clamp_min(0.0).sqrt()
    inverse_P = torch.where(scale_P > 1e-9 * scale_P.max(), 1.0 / scale_P.clamp_min(1e-300), 0.0)
    return inverse_P, covariance_PP * inverse_P[:, None] * inverse_P


def ridge(covariance_PP: torch.Tensor, cross_PD: torch.Tensor, strength: float = _RIDGE) -> torch.Tensor:
    """Weights [P, D] of a ridge regression in which every feature has unit variance; constant features get none.

    Args:
        covariance_PP: of the features, float64.
        cross_PD: of features and targets.
        strength: of the penalty.
    """
    inverse_P, standard_PP = _standardised(covariance_PP)
    standard_PP.diagonal().add_(strength)
    return inverse_P[:, None] * torch.linalg.solve(standard_PP, inverse_P[:, None] * cross_PD)


def _leading(symmetric_DD: torch.Tensor, count: int) -> torch.Tensor:
    """Eigenvectors [D, count] of the largest eigenvalues, largest first; zero columns where there are no more."""
    _, vectors = torch.linalg.eigh((symmetric_DD + symmetric_DD.T) / 2)
    found = vectors.flip(1)[:, :count]
    return F.pad(found, (0, count - found.shape[1]))
