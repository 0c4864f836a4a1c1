"""Least squares for a bypass, streamed. In: tokens, updates and features of images. Out: the weights of a bypass.

Updates f = block(x) - x: within images, ridge regression of f on t = [n(x), x] and on g_j t for every gate, all less
their means over the image's tokens; between images, of the mean f less what that gives for the mean t, on
z = [n(c), n(mean x)], with the penalty that generalised cross-validation finds (Golub, Heath, Wahba 1979), since there
are only as many samples as images. Then reduced rank (Izenman 1975): the directions of the fitted values that carry
most. Scores: ridge regression of log |f - bypass|^2 on the same features within images, since only the order within a
sample counts. Gates are the leading principal components of n(c), of unit variance, as the pass before saw it.

Legend: B samples, M tokens drawn of each, D width, C condition width, E features of images, J gates, T features of
tokens (2 D (1 + J)), G of images, token means and 1 (E + T + 1), R rank, V ranks, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shiva_search.runtime.bypass import AffineBypass

_RIDGE = 1e-4  # of each standardised feature
_ROUNDING = 1e-8  # of a sum of squares
_FEWEST_IMAGES = 4  # from which a cross-validated penalty means anything
_PENALTIES = tuple(10.0**power for power in (-5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
_MISS_FLOOR = 1e-3  # of the mean squared miss: tokens below are all alike


@dataclass
class NormalEquations:
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
    def empty(cls, width: int, condition_width: int, ranks: int, gates: int, device: torch.device) -> NormalEquations:
        tokens = 2 * width * (1 + gates)
        all_means = tokens + width + condition_width + 1

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(tokens, tokens), zeros(tokens, width), zeros(tokens, ranks),
            zeros(all_means, all_means), zeros(all_means, width), zeros(), zeros(1 + ranks),
        )  # fmt: skip

    def add(
        self,
        x_BMD: torch.Tensor,
        f_BMD: torch.Tensor,
        image_BE: torch.Tensor,
        gates_BJ: torch.Tensor,
        bypass: AffineBypass | None = None,
        hidden_BMQ: torch.Tensor | None = None,
        segment: int = 0,
    ) -> None:
        """Add up some samples.

        Args:
            x_BMD: tokens.
            f_BMD: their updates.
            image_BE: features of each image.
            gates_BJ: values of its gates.
            bypass: of the pass before, whose misses are scored; None: those of standing still.
            hidden_BMQ: what it read of the tokens, for all ranks.
            segment: of its weights.
        """
        x_BMD, f_BMD = x_BMD.double(), f_BMD.double()
        tokens_BMt = torch.cat([F.layer_norm(x_BMD, x_BMD.shape[-1:]), x_BMD], dim=-1)  # t: 2 D, before gates
        gates_BJ = F.pad(gates_BJ.double(), (1, 0), value=1.0)
        mean_Bt, mean_BD = tokens_BMt.mean(1), f_BMD.mean(1)
        within_BtM = (tokens_BMt - mean_Bt[:, None]).transpose(1, 2)
        # A gate is the same for all tokens of an image, so it scales what the image adds.
        outer_BJJ = gates_BJ[:, :, None] * gates_BJ[:, None]
        self.within_TT += torch.einsum("bij,btu->itju", outer_BJJ, within_BtM @ within_BtM.mT).reshape_as(
            self.within_TT
        )
        self.updates_TD += _gated(gates_BJ, within_BtM @ (f_BMD - mean_BD[:, None])).sum(0)
        mean_BT = _gated(gates_BJ, mean_Bt[..., None])[..., 0]
        means_BG = torch.cat([image_BE.double(), mean_BT, torch.ones_like(mean_BT[:, :1])], dim=-1)
        self.images_GG += means_BG.T @ means_BG
        self.means_GD += means_BG.T @ mean_BD
        self.mean_square += mean_BD.square().sum()
        self.rows += within_BtM.shape[0] * within_BtM.shape[2]
        self.images += len(x_BMD)
        square_BM = f_BMD.square().sum(-1)
        if bypass is None or hidden_BMQ is None:
            missed_BMV = square_BM[..., None].expand(-1, -1, self.misses_TV.shape[1])
        else:
            parts = [square_BM]
            for rank in bypass.ranks[1:]:
                moved_BMD = bypass.move(x_BMD, hidden_BMQ, rank, segment)
                parts.append((f_BMD - (moved_BMD - x_BMD)).square().sum(-1))
            missed_BMV = torch.stack(parts, dim=-1)
        self.squared += torch.cat([square_BM.sum()[None], missed_BMV.sum((0, 1))])
        logs_BMV = (missed_BMV + _MISS_FLOOR * missed_BMV.mean((0, 1)) + 1e-30).log()
        logs_BMV = logs_BMV - logs_BMV.mean(1, keepdim=True)
        self.misses_TV += _gated(gates_BJ, within_BtM @ logs_BMV).sum(0)


def _gated(gates_BJ: torch.Tensor, of_BtX: torch.Tensor) -> torch.Tensor:
    """Something of the features before gates, times each gate [B, T, X]."""
    return (gates_BJ[:, :, None, None] * of_BtX[:, None]).flatten(1, 2)


def set_gates(bypass: AffineBypass, sums: Sequence[NormalEquations], before: AffineBypass | None) -> None:
    """Principal components of the condition of unit variance; those of the pass before where there was one."""
    if not bypass.gates:
        return
    with torch.no_grad():
        if before is not None:
            bypass.over_condition.copy_(before.over_condition)
            bypass.gate.copy_(before.gate)
            return
        condition = slice(0, bypass.over_condition.shape[1])
        images_GG = torch.stack([found.images_GG for found in sums]).sum(0)
        mean_C = images_GG[-1, condition] / images_GG[-1, -1]
        covariance_CC = images_GG[condition, condition] / images_GG[-1, -1] - mean_C[:, None] * mean_C
        main_CJ = _leading(covariance_CC, bypass.gates)
        variance_J = (main_CJ * (covariance_CC @ main_CJ)).sum(0)
        square = images_GG[condition, condition].trace() / images_GG[-1, -1]
        known_J = variance_J > _ROUNDING * square  # or no condition differs from another in this way
        scale_J = torch.where(known_J, variance_J.clamp_min(1e-300).rsqrt(), 0.0)
        bypass.over_condition.copy_((main_CJ * scale_J).T)
        bypass.gate.copy_(-(mean_C @ main_CJ) * scale_J)


def solve(bypass: AffineBypass, sums: NormalEquations, segment: int) -> None:
    """Write the solution of the normal equations into a bypass."""
    count = sums.images
    centre_G = sums.images_GG[-1] / count
    covariance_GG = sums.images_GG / count - centre_G[:, None] * centre_G
    mean_D = sums.means_GD[-1] / count
    cross_GD = sums.means_GD / count - centre_G[:, None] * mean_D
    within_TT = sums.within_TT / sums.rows
    images = slice(0, len(centre_G) - len(within_TT) - 1)
    tokens = slice(images.stop, images.stop + len(within_TT))
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
            _write(bypass, segment, slice(0, bypass.rank), hidden_TR)
            bypass.over_image[segment] = hidden_ER.T
            bypass.hidden[segment] = -centre_G[images] @ hidden_ER - centre_G[tokens] @ hidden_TR
            bypass.out[segment] = directions_DR.T
        scores_TV = ridge(within_TT, sums.misses_TV / sums.rows)
        _write(bypass, segment, slice(bypass.rank, None), scores_TV)


def _write(bypass: AffineBypass, segment: int, rows: slice, weights_TQ: torch.Tensor) -> None:
    """Weights over [n(x), x], and over the same times each gate where the equations held those, into some rows."""
    width = bypass.mean.shape[-1]
    for place, of_tQ in enumerate(weights_TQ.split(2 * width)):
        normed_QD, tokens_QD = of_tQ[:width].T, of_tQ[width:].T
        if place == 0:
            bypass.over_normed[segment, rows], bypass.over_tokens[segment, rows] = normed_QD, tokens_QD
        else:
            bypass.gated_normed[segment, place - 1, rows] = normed_QD
            bypass.gated_tokens[segment, place - 1, rows] = tokens_QD


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
