"""The ratio policy: additive in logits, compiled by floor, and its cost differentiable."""

from __future__ import annotations

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.selection.ratio_policy import CostTable, RatioPolicy, tokens_kept


def trained_like(layers: int = 4, target: float = 0.6) -> RatioPolicy:
    policy = RatioPolicy(layers, target)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for last in (policy.time[-1], policy.layer[-1]):
            last.weight.copy_(0.3 * torch.randn(last.weight.shape, generator=generator))
    return policy


def test_ratios_start_at_the_target_with_a_dense_first_layer():
    ratios_BL = RatioPolicy(5, 0.6)(torch.tensor([0.0, 0.3, 1.0]))
    torch.testing.assert_close(ratios_BL[:, 1:], torch.full((3, 4), 0.6))
    assert (ratios_BL[:, 0] == 1).all()


def test_time_and_layer_add_up_in_logits():
    logits_BL = torch.logit(trained_like()(torch.tensor([0.1, 0.5, 0.9]))[:, 1:])
    between_times_BL = logits_BL - logits_BL[:1]
    torch.testing.assert_close(between_times_BL, between_times_BL[:, :1].expand_as(logits_BL), atol=2e-3, rtol=0)
    assert between_times_BL.abs().max() > 0.01 and logits_BL[0].std() > 0.01


def test_logit_noise_is_seeded_and_of_unit_size():
    policy, t_B = RatioPolicy(200, 0.5), torch.rand(50)
    first = policy(t_B, torch.Generator().manual_seed(3))
    assert torch.equal(first, policy(t_B, torch.Generator().manual_seed(3)))
    assert torch.logit(first[:, 1:]).std().item() == pytest.approx(1.0, rel=0.05)
    assert (first[:, 0] == 1).all()


def test_the_table_is_the_floor_of_the_mean_ratio_in_each_segment():
    policy = trained_like()
    rows = policy.compile_rows([(0.0, 0.5), (0.5, 1.0)], tokens=100)
    for row, t in zip(rows, (0.25, 0.75), strict=True):
        around_BL = policy(torch.linspace(t - 0.25, t + 0.25, 401))
        assert row[0] == 100 and all(isinstance(k, int) and 0 <= k <= 100 for k in row)
        assert row == pytest.approx((around_BL.mean(0) * 100).tolist(), abs=1.2)
    assert rows[0] != rows[1]
    assert RatioPolicy(3, 0.75).compile_rows([(0.0, 1.0)], tokens=64) == [[64, 48, 48]]


def test_tokens_kept_is_a_floor_that_forgives_rounding():
    ratios = torch.tensor([[1.0, 0.599, 0.6, 0.001, 0.7]])
    assert tokens_kept(ratios, 10) == [[10, 5, 6, 0, 7]]


TABLE = CostTable(torch.tensor([0.0, 50.0, 100.0]), torch.tensor([[0.0, 1.0, 4.0], [0.0, 3.0, 5.0]]), fixed=1.0)


def test_cost_is_interpolated_between_grid_points():
    kept_BL = torch.tensor([[0.0, 0.0], [25.0, 100.0], [75.0, 50.0], [100.0, 100.0]])
    assert TABLE.cost(kept_BL).tolist() == pytest.approx([1.0, 6.5, 6.5, 10.0])
    assert TABLE.share(kept_BL)[-1].item() == pytest.approx(1.0)


def test_cost_has_the_slope_of_the_table():
    kept_BL = torch.tensor([[25.0, 75.0], [60.0, 10.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TABLE.cost, (kept_BL,))
    TABLE.cost(kept_BL).sum().backward()
    assert kept_BL.grad.tolist() == [pytest.approx([0.02, 0.04]), pytest.approx([0.06, 0.06])]


def test_bad_tables_and_targets_are_refused():
    with pytest.raises(InputError, match="entry per layer and grid point"):
        CostTable(torch.tensor([0.0, 1.0]), torch.zeros(2, 3))
    with pytest.raises(InputError, match="two grid points"):
        CostTable(torch.tensor([1.0]), torch.zeros(2, 1))
    for target in (0.0, 1.0, 1.5):
        with pytest.raises(InputError, match="share of tokens"):
            RatioPolicy(3, target)
