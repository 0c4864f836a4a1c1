"""The runtime's Gate for training. In: a recipe and how far training is. Out: noise, inclusion scores, gates.

    update, literal   the straight-through estimators of gates.py: forward values as in inference, to the bit
    soft              the update is scaled by its inclusion score, y_i = x_i + pi_i f_i, forward and backward

A straight-through gate is read where it is fully open. There, a loss that measures the distance to the dense model is
nearly flat in it, since the token was processed as the dense model would have: what is left is how tokens make up for
each other. The soft gate is half open at the k-th token, and for a quadratic loss the slope half way is exactly the
difference between the two ends, keeping the token and passing it over. Inference keeps the hard choice; temperatures
fall, so the two meet. Layers then process a margin of tokens beyond k, so that the boundary is seen from both sides.

Legend: B samples, N tokens, K kept tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from shiva_search.errors import InputError
from shiva_search.records.plan import Kept
from shiva_search.selection.gates import ESTIMATORS, Estimator, UpdateGated
from shiva_search.selection.soft_topk import inclusion, perturb, soft_rank


class SoftGated(UpdateGated):
    """y_i = x_i + pi_i f_i in the forward pass too; for training alone, since values differ from the hard choice."""

    def leave(self, x_kept_BKD: torch.Tensor, out_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor:
        """The mixture, in the dtype of the block's output."""
        mixed_BKD = x_kept_BKD + pi_kept_BK.unsqueeze(-1) * (out_kept_BKD - x_kept_BKD)
        return mixed_BKD.to(out_kept_BKD.dtype)


TRAINING_ESTIMATORS: Mapping[str, Estimator] = {**ESTIMATORS, "soft": SoftGated()}


@dataclass(frozen=True)
class Recipe:
    """What the stages of training have in common.

    Attributes:
        estimator: "soft", "update" or "literal".
        lr: peak learning rate of the router.
        sigma: standard deviation of the noise on scores, in units of score.
        tau_rank: temperature of the soft rank at the first and at the last step; geometric in between.
        tau_sel: likewise of the inclusion score.
        margin: tokens beyond k that a pruned layer processes while training, as a share of N; for "soft" alone.
        feature_weight: of the compared layers beside the output in the distillation loss.
        diffusion_weight: of the diffusion loss, where targets are known.
        relative: losses count by the inverse of the error, so that light pruning, whose errors are small, counts as
            much as heavy pruning.

    Raises:
        InputError: an unknown estimator, or a margin outside [0, 1).
    """

    estimator: str = "soft"
    lr: float = 5e-3
    sigma: float = 0.1
    tau_rank: tuple[float, float] = (0.2, 0.05)
    tau_sel: tuple[float, float] = (0.1, 0.05)
    margin: float = 0.05
    feature_weight: float = 0.5
    diffusion_weight: float = 0.1
    relative: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in TRAINING_ESTIMATORS:
            known = ", ".join(TRAINING_ESTIMATORS)
            raise InputError(f"estimator must be one of {known}, got {self.estimator!r}. Choose one of these.")
        if not 0 <= self.margin < 1:
            raise InputError(f"margin is a share of tokens in [0, 1), got {self.margin}")

    def gate(self, tokens: int, seed: int, progress: float) -> TrainingGate:
        """The gate of one step, at a share of the way in [0, 1]."""
        rank, sel = ((first * (last / first) ** progress) for first, last in (self.tau_rank, self.tau_sel))
        estimator = TRAINING_ESTIMATORS[self.estimator]
        margin = int(self.margin * tokens) if isinstance(estimator, SoftGated) else 0
        generator = torch.Generator().manual_seed(seed)
        return TrainingGate(estimator, tokens, rank, sel, self.sigma, margin, generator)


@dataclass
class TrainingGate:
    """An estimator with temperatures and noise in force.

    Attributes:
        estimator: how dL/dpi is found.
        tokens: N.
        tau_rank, tau_sel, sigma: temperatures and noise.
        margin: tokens beyond k that pruned layers process.
        generator: source of the noise.
        soft_k: tokens kept by layer as a real-valued tensor, [] or [B, 1], where k learns (eq. 24).
        row: tokens kept by layer, for all other layers.
    """

    estimator: Estimator
    tokens: int
    tau_rank: float
    tau_sel: float
    sigma: float
    margin: int
    generator: torch.Generator
    soft_k: Mapping[int, torch.Tensor] = field(default_factory=dict)
    row: tuple[int, ...] = ()

    def aim_at(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """Take a row of tokens kept as the goal; returns the row to run: with the margin where a layer selects."""
        self.row = row
        return tuple(self._with_margin(Kept.of(k)) for k in row)

    def _with_margin(self, k: Kept) -> Kept:
        run = int(k) if int(k) in (0, self.tokens) else min(k + self.margin, self.tokens - 1)
        return Kept(run, k.rank, k.attend)

    def perturb(self, scores_BN: torch.Tensor) -> torch.Tensor:
        """Noisy scores."""
        return perturb(scores_BN, self.sigma, self.generator)

    def inclusion(self, scores_BN: torch.Tensor, k: int, layer: int) -> torch.Tensor:
        """Inclusion scores [B, N] of one layer, one half at the k-th rank of the row aimed at (k has the margin)."""
        ranks_BN = soft_rank(scores_BN, self.tau_rank)
        return inclusion(ranks_BN, self.soft_k.get(layer, self.row[layer]), self.tau_sel, self.tokens)

    def enter(self, x_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor:
        """See Estimator."""
        return self.estimator.enter(x_kept_BKD, pi_kept_BK)

    def leave(self, x_kept_BKD: torch.Tensor, out_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor:
        """See Estimator."""
        return self.estimator.leave(x_kept_BKD, out_kept_BKD, pi_kept_BK)

    def stay(self, x_BND: torch.Tensor, pi_BN: torch.Tensor) -> torch.Tensor:
        """See Estimator. The runtime hands over all tokens; the kept ones are overwritten, so they add no gradient."""
        return self.estimator.stay(x_BND, pi_BN) if self.estimator.gates_rejected else x_BND
