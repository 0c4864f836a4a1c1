"""The gate that training hangs into the runtime."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.selection.soft_topk import inclusion, soft_rank
from shiva_search.selection.training_gate import TRAINING_ESTIMATORS, Recipe, SoftGated

B, N, D = 2, 40, 3


def scores(seed=0):
    return torch.randn(B, N, generator=torch.Generator().manual_seed(seed))


def test_temperatures_fall_geometrically():
    recipe = Recipe(tau_rank=(0.2, 0.05), tau_sel=(0.1, 0.1))
    gates = [recipe.gate(N, 0, progress) for progress in (0.0, 0.5, 1.0)]
    assert [gate.tau_rank for gate in gates] == pytest.approx([0.2, 0.1, 0.05])
    assert [gate.tau_sel for gate in gates] == pytest.approx([0.1, 0.1, 0.1])


def test_noise_comes_from_the_seed():
    recipe = Recipe(sigma=0.3)
    first, again, other = (recipe.gate(N, seed, 0.5).perturb(scores()) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first - scores()).std().item() == pytest.approx(0.3, rel=0.3)


def test_a_margin_is_run_beyond_k_where_a_layer_selects():
    assert Recipe(margin=0.1).gate(N, 0, 0).aim_at((N, 0, 20, 38, 1)) == (N, 0, 24, 39, 5)
    assert Recipe(margin=0.1, estimator="update").gate(N, 0, 0).aim_at((N, 0, 20, 38)) == (N, 0, 20, 38)


def test_inclusion_is_one_half_at_the_k_that_is_aimed_at():
    gate = Recipe(margin=0.1, tau_rank=(0.2, 0.2), tau_sel=(0.1, 0.1)).gate(N, 0, 0)
    run = gate.aim_at((N, 20, 30))
    expected = inclusion(soft_rank(scores(), 0.2), 20, 0.1, N)
    assert torch.equal(gate.inclusion(scores(), run[1], 1), expected)


def test_gradients_reach_scores_and_a_k_that_learns():
    gate = replace(Recipe(estimator="update").gate(N, 0, 0), soft_k={1: torch.tensor(20.3, requires_grad=True)})
    gate.aim_at((N, 20, 20))
    scores_BN = scores().requires_grad_()
    pi_BN = gate.inclusion(scores_BN, 20, 1)
    gate.leave(torch.zeros(B, N, D), torch.ones(B, N, D), pi_BN).sum().backward()
    assert gate.soft_k[1].grad > 0 and scores_BN.grad.abs().sum() > 0  # every update adds to the sum


@pytest.mark.parametrize("name", sorted(TRAINING_ESTIMATORS))
def test_only_the_soft_gate_changes_forward_values(name):
    gate = Recipe(estimator=name).gate(N, 0, 0)
    generator = torch.Generator().manual_seed(3)
    x_BND, out_BND = (torch.randn(B, N, D, generator=generator) for _ in range(2))
    pi_BN = torch.rand(B, N, generator=generator)
    assert torch.equal(gate.enter(x_BND, pi_BN), x_BND) and torch.equal(gate.stay(x_BND, pi_BN), x_BND)
    left_BND = gate.leave(x_BND, out_BND, pi_BN)
    if name == "soft":
        torch.testing.assert_close(left_BND, torch.lerp(x_BND, out_BND, pi_BN[..., None]))
    else:
        assert torch.equal(left_BND, out_BND)


def test_the_soft_gates_slope_half_way_is_the_difference_of_keeping_and_passing_over():
    # A quadratic loss of all tokens: the claim by which the soft gate was chosen.
    generator = torch.Generator().manual_seed(0)
    x_BND, out_BND, target_BND = (torch.randn(1, 5, D, generator=generator, dtype=torch.float64) for _ in range(3))
    mix = torch.randn(5 * D, 5 * D, generator=generator, dtype=torch.float64)

    def loss(pi_BN):
        mixed = SoftGated().leave(x_BND, out_BND, pi_BN) - target_BND
        return (mix @ mixed.flatten()).square().sum()

    pi_BN = torch.tensor([[1.0, 0.9, 0.5, 0.2, 0.0]], dtype=torch.float64, requires_grad=True)
    loss(pi_BN).backward()
    kept, passed_over = (pi_BN.detach().clone() for _ in range(2))
    kept[0, 2], passed_over[0, 2] = 1.0, 0.0
    assert pi_BN.grad[0, 2].item() == pytest.approx((loss(kept) - loss(passed_over)).item())
    assert pi_BN.grad[0, 0].item() != pytest.approx(0)


@pytest.mark.parametrize("wrong", [{"estimator": "magic"}, {"margin": 1.0}, {"margin": -0.1}])
def test_bad_recipes_are_refused(wrong):
    with pytest.raises(InputError, match="estimator must be one of|margin is a share"):
        Recipe(**wrong)
