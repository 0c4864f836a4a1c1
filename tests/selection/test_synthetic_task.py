"""The paper's synthetic check (A.3): router and k, learned together, find how many tokens matter.

Task: N = 100 tokens of D = 16 features, all N(0, 1), of which S signal tokens have 10 added to every feature. A linear
router s_i = <w, x_i> scores them; w starts at zero, so that the first selections are drawn by the score noise. The
block doubles a token, so its update is f_i = x_i.

Objective, with E = D * (10^2 + 1) the mean squared length of a signal token:

    L = sum_i |y_i - T_i|^2 / (2 E) + lambda * k,    T_i = 3 x_i for signal tokens, x_i for noise tokens

so the block takes half of the way that a signal token has to go (as one block of many does) and should leave noise
tokens alone. Keeping a signal token lowers L by 3/2 - lambda on average, keeping a noise token raises it by
1/202 + lambda: the least L keeps the S signal tokens and nothing else, whatever S is. Learning sees L only through the
hard selection and the update-gated estimator. The half way matters: were T_i the block's own output, L would be
stationary in every kept token and the estimator would rightly report no gradient.

Where k settles: at the boundary the expected gradient is lambda - v * (share of pi's slope on kept signal tokens), with
v = 1 the slope of L in pi of a signal token. It vanishes at k = S + 1/2 + tau_sel * N * ln(v / lambda - 1): a little
above S, by an amount that falls with tau_sel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shiva_search.selection.gates import ESTIMATORS
from shiva_search.selection.soft_topk import hard_top_k, inclusion, perturb, soft_rank

N, D, MEAN = 100, 16, 10.0
LAMBDA, NOISE_STD = 0.1, 0.1
WARM_UP, STEPS, LAST = 100, 700, 100
TAU_RANK, TAU_SEL = (0.2, 0.02), (0.1, 0.005)  # first and last, annealed geometrically


class Settled(NamedTuple):
    """Over the last 100 steps."""

    k: float  # mean
    k_low: float
    k_high: float
    signal_kept: float  # mean share of the signal tokens


def draw_tokens(signals: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_BND [1, N, D] and signal_BN [1, N], 1.0 where a token carries signal."""
    places_BS = torch.randperm(N, generator=generator)[None, :signals]
    signal_BN = torch.zeros(1, N).scatter(1, places_BS, 1.0)
    return torch.randn(1, N, D, generator=generator) + MEAN * signal_BN[..., None], signal_BN


def task_error(y_BND: Tensor, x_BND: Tensor, signal_BN: Tensor) -> Tensor:
    target_BND = x_BND * (1 + 2 * signal_BN[..., None])
    return (y_BND - target_BND).square().sum() / (2 * D * (MEAN**2 + 1))


def learn(k_start: float, seed: int, signals: int, tau_sel: tuple[float, float] = TAU_SEL) -> Settled:
    """Adam lr 0.1 for the router alone in the warm-up, then SGD lr 2.0 for k with it."""
    generator = torch.Generator().manual_seed(seed)
    estimator = ESTIMATORS["update"]
    w_D = torch.zeros(D, requires_grad=True)
    k = torch.tensor(k_start, requires_grad=True)
    router_optimizer, k_optimizer = torch.optim.Adam([w_D], lr=0.1), torch.optim.SGD([k], lr=2.0)
    ks, shares = [], []
    for step in range(WARM_UP + STEPS):
        done = step / (WARM_UP + STEPS)
        tau_rank_now, tau_sel_now = (first * (last / first) ** done for first, last in (TAU_RANK, tau_sel))
        x_BND, signal_BN = draw_tokens(signals, generator)
        scores_BN = perturb(x_BND @ w_D, NOISE_STD, generator)
        kept_BK = hard_top_k(scores_BN, int(k.item()))
        pi_BN = inclusion(soft_rank(scores_BN, tau_rank_now), k, tau_sel_now, N)
        rows_BKD, pi_kept_BK = kept_BK[..., None].expand(-1, -1, D), pi_BN.gather(1, kept_BK)
        x_kept_BKD = estimator.enter(x_BND.gather(1, rows_BKD), pi_kept_BK)
        y_BND = x_BND.scatter(1, rows_BKD, estimator.leave(x_kept_BKD, 2 * x_kept_BKD, pi_kept_BK))
        loss = task_error(y_BND, x_BND, signal_BN) + LAMBDA * k
        router_optimizer.zero_grad()
        k_optimizer.zero_grad()
        loss.backward()
        router_optimizer.step()
        if step >= WARM_UP:
            k_optimizer.step()
            with torch.no_grad():
                k.clamp_(1, N)
        ks.append(k.item())
        shares.append(signal_BN.gather(1, kept_BK).sum().item() / signals)
    last = ks[-LAST:]
    return Settled(sum(last) / LAST, min(last), max(last), sum(shares[-LAST:]) / LAST)


@pytest.mark.parametrize("signals", [20, 35])
def test_the_objective_is_least_at_the_signal_tokens(signals: int) -> None:
    """By counting, without any estimator: the best k of the hard objective under a perfect ranking is S."""
    x_BND, signal_BN = draw_tokens(signals, torch.Generator().manual_seed(0))
    losses = []
    for k in range(N + 1):
        kept_BN1 = torch.zeros(1, N).scatter(1, hard_top_k(signal_BN, k), 1.0)[..., None]
        losses.append(task_error(x_BND * (1 + kept_BN1), x_BND, signal_BN).item() + LAMBDA * k)
    assert losses.index(min(losses)) == signals


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k_start", [50.0, 10.0])
def test_k_settles_at_the_twenty_signal_tokens(k_start: float, seed: int) -> None:
    """From above and from below; the paper reports k near 18 with about 95 % of the signal kept."""
    settled = learn(k_start, seed, signals=20)
    assert settled.k == pytest.approx(20, abs=3)
    assert settled.k_low > 17
    assert settled.k_high < 23
    assert settled.signal_kept >= 0.95


def test_k_follows_the_number_of_signal_tokens() -> None:
    """Nothing but the data changes: twenty is in the task, not in the method."""
    settled = learn(20.0, seed=0, signals=35)
    assert settled.k == pytest.approx(35, abs=3)
    assert settled.signal_kept >= 0.95


@pytest.mark.parametrize("last_tau_sel", [0.002, 0.02])
def test_the_offset_of_k_is_the_predicted_one(last_tau_sel: float) -> None:
    """tau_sel has to be annealed: what is left of it keeps tokens that pay nothing back."""
    settled = learn(20.0, seed=0, signals=20, tau_sel=(0.1, last_tau_sel))
    offset = 0.5 + last_tau_sel * N * math.log(1 / LAMBDA - 1)
    assert settled.k == pytest.approx(20 + offset, abs=0.5)
