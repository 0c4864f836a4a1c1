"""Losses against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.selection.losses import (
    BudgetLoss,
    diffusion_loss,
    distillation_loss,
    distilled_layers,
    feature_distance,
    relative_error,
)


def test_relative_error_is_pooled_over_the_batch():
    dense = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    output = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert relative_error(output, dense).item() == pytest.approx((1 + 4) / 25)
    assert relative_error(dense, dense).item() == 0.0


def test_relative_error_of_half_precision_is_taken_in_float32():
    dense = torch.full((4096,), 16.0, dtype=torch.bfloat16)
    assert relative_error(dense * 1.5, dense).item() == pytest.approx(0.25)


def test_every_fourth_block_is_compared():
    assert distilled_layers(8) == (3, 7)
    assert distilled_layers(10) == (3, 7)
    assert distilled_layers(3) == ()


def test_feature_distance_ignores_scale_and_shift_and_is_2_for_unrelated_features():
    x_BND = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0))
    other_BND = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(1))
    assert feature_distance(7 * x_BND + 3, x_BND).item() == pytest.approx(0, abs=1e-5)
    assert feature_distance(x_BND, other_BND).item() == pytest.approx(2, rel=0.02)
    assert feature_distance(-x_BND, x_BND).item() == pytest.approx(4, rel=1e-3)


def test_distillation_adds_output_and_the_mean_over_layers():
    generator = torch.Generator().manual_seed(0)
    dense, output = torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    student = {layer: torch.randn(2, 3, 8, generator=generator) for layer in (3, 7)}
    teacher = {layer: torch.randn(2, 3, 8, generator=generator) for layer in (3, 7)}
    distances = [feature_distance(student[layer], teacher[layer]).item() for layer in (3, 7)]
    expected = relative_error(output, dense).item() + 0.5 * sum(distances) / 2
    assert distillation_loss(output, dense, student, teacher, 0.5).item() == pytest.approx(expected)
    assert distillation_loss(output, dense, {}, {}).item() == pytest.approx(relative_error(output, dense).item())
    with pytest.raises(InputError, match="same layers"):
        distillation_loss(output, dense, student, {3: teacher[3]})


def test_diffusion_loss_leaves_a_predicted_variance_out():
    target = torch.zeros(2, 4, 3, 3)
    output = torch.cat([torch.full((2, 4, 3, 3), 2.0), torch.full((2, 4, 3, 3), 9.0)], dim=1)
    assert diffusion_loss(output, target).item() == 4.0
    assert diffusion_loss(output[:, :4], target).item() == 4.0


def test_budget_loss_follows_the_running_mean():
    loss = BudgetLoss(target=0.5, weight=3.0, beta=0.2)
    for spent, mean in ((0.9, 0.9), (0.4, 0.8), (0.1, 0.66)):
        spent_B = torch.tensor([spent, spent], requires_grad=True)
        value = loss(spent_B)
        assert loss.mean.item() == pytest.approx(mean)
        assert value.item() == pytest.approx(3.0 * spent * 2 * (mean - 0.5), rel=1e-5)
        value.backward()
        # The running mean decides the push, also where this batch alone is below the target.
        assert spent_B.grad.tolist() == pytest.approx([3.0 * (mean - 0.5)] * 2, rel=1e-5)


def test_budget_loss_goes_on_from_a_checkpoint():
    loss = BudgetLoss(0.5)
    loss(torch.tensor([0.9]))
    again = BudgetLoss(0.5)
    again.load_state_dict(loss.state_dict())
    assert again(torch.tensor([0.4])).item() == loss(torch.tensor([0.4])).item()


@pytest.mark.parametrize(("target", "beta"), [(0.0, 0.2), (1.2, 0.2), (0.5, 0.0)])
def test_budgets_outside_their_range_are_refused(target, beta):
    with pytest.raises(InputError, match="shares in"):
        BudgetLoss(target, beta=beta)
