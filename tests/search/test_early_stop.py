"""Estimates from part of a batch: exact at its end, right as often as they say, tighter with plans that are alike."""

from __future__ import annotations

import numpy as np
import pytest

from shiva_search.search.early_stop import expected, is_worse


def like_plans(rng: np.random.Generator, plans: int, samples: int = 64, own: float = 0.3) -> np.ndarray:
    """Squared errors [plans, samples]: samples are hard or easy for all plans, and each plan has a part of its own."""
    hard_N = rng.gamma(2.0, size=samples)
    return hard_N * rng.uniform(0.5, 2.0, (plans, 1)) * rng.gamma(1 / own**2, own**2, (plans, samples))


@pytest.mark.parametrize("like", [1, 2, 3])
def test_the_whole_batch_leaves_no_doubt(like: int) -> None:
    plans = like_plans(np.random.default_rng(0), like + 1)
    error, deviation, _ = expected(plans[0], plans[1:])
    assert error == pytest.approx(float(plans[0].mean()), rel=1e-12)
    assert deviation == 0.0
    assert is_worse(error, deviation, 60, rival=0.99 * error, doubt=0.02)
    assert not is_worse(error, deviation, 60, rival=1.01 * error, doubt=0.02)


@pytest.mark.parametrize("seen", [16, 32, 48])
def test_a_plan_as_good_as_its_rival_is_rarely_stopped(seen: int) -> None:
    rng = np.random.default_rng(seen)
    stopped = []
    for _ in range(2000):
        plans = like_plans(rng, 4)
        error, deviation, freedom = expected(plans[0, :seen], plans[1:])
        stopped.append(is_worse(error, deviation, freedom, rival=float(plans[0].mean()), doubt=0.02))
    # Asked for 2 %; samples drawn without strata from a skewed distribution are the hard case.
    assert np.mean(stopped) < 0.05


def test_plans_that_are_alike_tell_what_is_left() -> None:
    rng = np.random.default_rng(1)
    off_with, off_without = [], []
    for _ in range(300):
        plans = like_plans(rng, 4)
        whole = float(plans[0].mean())
        off_with.append(expected(plans[0, :16], plans[1:])[0] / whole - 1)
        off_without.append(float(plans[0, :16].mean()) / whole - 1)
    assert np.std(off_with) < 0.6 * np.std(off_without)
    assert abs(np.mean(off_with)) < 0.02


def test_few_samples_take_few_plans() -> None:
    plans = like_plans(np.random.default_rng(2), 4, samples=16)
    assert expected(plans[0, :4], plans[1:])[2] == 3  # one plan
    assert expected(plans[0, :10], plans[1:])[2] == 8  # two


def test_one_sample_stops_nothing() -> None:
    error, deviation, freedom = expected(np.array([5.0]), np.ones((1, 8)))
    assert not is_worse(error, deviation, freedom, rival=1.0, doubt=0.02)
