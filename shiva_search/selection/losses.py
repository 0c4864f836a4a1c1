"""What training minimises. In: outputs and features of the dense teacher and the pruned student. Out: scalars.

Legend: B samples, N tokens, D width, L layers. Equation numbers are those of Shiva-DiT, arXiv 2602.05605.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from shiva_search.errors import InputError

DISTILL_EVERY = 4  # blocks


def distilled_layers(layers: int, every: int = DISTILL_EVERY) -> tuple[int, ...]:
    """Indices of the layers whose outputs are compared: every 4th block (eq. 31)."""
    return tuple(range(every - 1, layers, every))


def relative_error(output: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Normalised squared error of a batch: sum |output - dense|^2 / sum |dense|^2, float32, a scalar.

    The figure by which plans are judged, so the one that distillation uses at the output: an output of a single
    channel has no LayerNorm.
    """
    output, dense = output.float(), dense.float()
    return (output - dense).square().sum() / dense.square().sum().clamp_min(1e-12)


def feature_distance(student_BND: torch.Tensor, teacher_BND: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between LayerNorm-ed features (eq. 31), a scalar: 0 alike, 2 unrelated."""
    student_BND, teacher_BND = (F.layer_norm(x.float(), x.shape[-1:]) for x in (student_BND, teacher_BND))
    return F.mse_loss(student_BND, teacher_BND)


def distillation_loss(
    output: torch.Tensor,
    dense: torch.Tensor,
    student: Mapping[int, torch.Tensor],
    teacher: Mapping[int, torch.Tensor],
    feature_weight: float = 1.0,
) -> torch.Tensor:
    """Distance to the dense teacher: at the output, plus the mean over the compared layers (eq. 31).

    Args:
        output: the student's output.
        dense: the teacher's output.
        student: tokens [B, N, D] behind the compared layers, by layer.
        teacher: likewise; the same layers.
        feature_weight: of the layers beside the output.

    Raises:
        InputError: student and teacher hold different layers.
    """
    if student.keys() != teacher.keys():
        raise InputError(f"student and teacher compare the same layers, got {[*student]} and {[*teacher]}")
    loss = relative_error(output, dense)
    if student and feature_weight:
        distances = [feature_distance(student[layer], teacher[layer]) for layer in student]
        loss = loss + feature_weight * torch.stack(distances).mean()
    return loss


def diffusion_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error to what the model was trained to predict (noise or velocity), a scalar.

    Models that also predict a variance have twice the target's channels; only the first half is compared.
    """
    if output.ndim == 4 and output.shape[1] == 2 * target.shape[1]:
        output = output[:, : target.shape[1]]
    return F.mse_loss(output.float(), target.float())


class BudgetLoss(nn.Module):
    """Holds a running mean of what is spent at the target (eq. 13): mu <- beta m + (1 - beta) mu, loss 2 m sg[mu - R].

    The mean may be a ratio of tokens or a cost as a share of the dense model's: the target has the same unit.
    One batch sees few timesteps, so its own mean says little; the running mean decides the direction of the push.

    Attributes:
        target: R, in (0, 1].
        weight: lambda.
        beta: weight of the newest batch.
        mean: mu, a buffer so that a checkpoint carries it; not a number before the first batch.
    """

    mean: torch.Tensor

    def __init__(self, target: float, weight: float = 1.0, beta: float = 0.2) -> None:
        super().__init__()
        if not 0 < target <= 1 or not 0 < beta <= 1:
            raise InputError(f"a budget's target and beta are shares in (0, 1], got {target} and {beta}")
        self.target, self.weight, self.beta = target, weight, beta
        self.register_buffer("mean", torch.tensor(float("nan")))

    def forward(self, spent_B: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            spent_B: ratio or share of cost per sample, differentiable.
        """
        spent = spent_B.mean()
        now = spent.detach()
        self.mean = torch.where(self.mean.isnan(), now, self.beta * now + (1 - self.beta) * self.mean)
        return self.weight * spent * 2.0 * (self.mean - self.target)
