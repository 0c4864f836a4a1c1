"""Proposals: on the budget, never twice, better than chance; and the pieces they are made of."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_search.records.budget import Budget
from shiva_search.search.candidates import Space, build_space, pick
from shiva_search.search.knapsack import solve
from shiva_search.search.moves import fill, neighbours, repair, trades
from shiva_search.search.sensitivity import Effects, knots_of, measure_effects
from shiva_search.search.sketches import decode, encode
from shiva_search.search.surrogate import Surrogate
from shiva_search.search.trade_sampler import TradeSampler, distributions, from_params, to_params


def small_space(seed: int, layers: int = 6, width: int = 5, share: float = 0.6) -> tuple[Space, Effects]:
    """Random effects that interact: each choice moves the output along directions that layers have in common.

    The limit is a share of the dense latency, or the cheapest plan's latency where that is more.
    """
    rng = np.random.default_rng(seed)
    ks = tuple(int(k) for k in np.linspace(0, 64, width))
    choices = ((64,), *[ks] * (layers - 1))
    latency = tuple(tuple(0.1 * (k > 0) + rng.uniform(0.01, 0.03) * k for k in c) for c in choices)
    cost = {"latency_ms": latency, "mean_keep": tuple(tuple(k / (64 * layers) for k in c) for c in choices)}
    space = Space(64, layers, (1.0,), choices, cost, {"latency_ms": 0.3, "mean_keep": 0.0})
    floor, dense = space.total("latency_ms", np.stack([np.zeros_like(space.dense), space.dense]))
    dropped = 1 - space.kept / 64
    directions = rng.normal(size=(layers, 1, 12))
    vectors = 0.2 * dropped[:, :, None] * (directions + 0.5 * rng.normal(size=(*space.kept.shape, 12)))
    return space.with_limits(latency_ms=max(share * dense, floor)), Effects((vectors**2).sum(-1), vectors)


def truth(space: Space, effects: Effects, seed: int):
    """An objective that the effects describe only to first order."""
    rng = np.random.default_rng(seed + 1000)
    extra = rng.normal(size=(space.positions, space.positions, 12)) * 0.05

    def vector(plan_P: np.ndarray) -> np.ndarray:
        size = 1 - pick(space.kept / 64, plan_P)[0]
        return effects.vectors_PCS[np.arange(space.positions), plan_P].sum(0) + np.einsum(
            "i,j,ijs->s", size, size, extra
        )

    return vector


@given(st.integers(0, 10**6), st.floats(0.3, 0.95))
@settings(max_examples=8)
def test_proposals_hold_the_budget_and_never_repeat(seed: int, share: float) -> None:
    space, effects = small_space(seed, share=share)
    sampler = TradeSampler(space, effects, seed, explore=0.3)
    vector = truth(space, effects, seed)
    rng, judged, tried = np.random.default_rng(seed), [], set()
    for _ in range(20):
        plan_P = sampler.propose(judged, tried, rng)
        if sampler.exhausted:
            break
        assert space.feasible(plan_P[None])[0]
        assert plan_P.tobytes() not in tried
        change = vector(plan_P)
        tried.add(plan_P.tobytes())
        judged.append((plan_P, float(change @ change), {"sketch": encode(change)}))


def test_a_study_with_the_sampler_never_repeats_a_plan_and_is_reproducible() -> None:
    space, effects = small_space(1)
    vector = truth(space, effects, 1)

    def run() -> list[tuple[int, ...]]:
        def objective(trial: optuna.Trial) -> float:
            for name, known in distributions(space).items():
                trial.suggest_int(name, known.low, known.high)
            change = vector(from_params(space, trial.params))
            trial.set_user_attr("sketch", encode(change))
            return float(change @ change)

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=TradeSampler(space, effects, seed=3))
        study.optimize(objective, n_trials=25)
        return [tuple(from_params(space, t.params)) for t in study.trials]

    plans = run()
    assert len(set(plans)) == 25
    assert space.feasible(np.array(plans)).all()
    assert run() == plans


def test_finds_interactions_that_the_exact_solution_does_not_see() -> None:
    gains = []
    for seed in range(4):
        space, effects = small_space(seed)
        vector = truth(space, effects, seed)
        every = np.array(np.meshgrid(*[np.arange(n) for n in space.sizes])).reshape(space.positions, -1).T
        every = every[space.feasible(every)]
        size = 1 - pick(space.kept / 64, every)
        rng = np.random.default_rng(seed + 1000)
        extra = rng.normal(size=(space.positions, space.positions, 12)) * 0.05
        changes = effects.vectors_PCS[np.arange(space.positions), every].sum(1)
        changes = changes + np.einsum("mi,mj,ijs->ms", size, size, extra)
        best = (changes**2).sum(1).min()
        start = solve(space, effects.errors_PC).plan_P
        first = vector(start) @ vector(start)
        judged, tried, sampler = [], set(), TradeSampler(space, effects, seed)
        judged.append((start, float(first), {"sketch": encode(vector(start))}))
        tried.add(start.tobytes())
        for number in range(30):
            plan_P = sampler.propose(judged, tried, np.random.default_rng(number))
            tried.add(plan_P.tobytes())
            change = vector(plan_P)
            judged.append((plan_P, float(change @ change), {"sketch": encode(change)}))
        found = min(error for _, error, _ in judged)
        gains.append((found - best) / (first - best + 1e-12))
        assert found <= first
    # 31 of about two thousand feasible plans are judged; most of what can be gained over the start is gained.
    assert np.mean(gains) < 0.1


def test_forcing_a_layer_finds_what_takes_three_changes() -> None:
    """Layers 1 and 2 undo each other's errors, and only both together save as much as layer 3, which is dropped."""
    layers, ks = 9, (0, 16, 32, 48, 64)
    units = (4.0, 1.0, 1.0, 2.0, *[1.5] * 5)
    latency = tuple(tuple(unit * k / 64 for k in (ks if layer else (64,))) for layer, unit in enumerate(units))
    space = Space(64, layers, (1.0,), ((64,), *[ks] * 8), {"latency_ms": latency}, {"latency_ms": 0.0})
    space = space.with_limits(latency_ms=sum(units) - 2.0)
    dropped = 1 - space.kept / 64
    vectors = np.zeros((*dropped.shape, layers))
    for layer in range(3, layers):
        vectors[layer, :, layer] = 0.3 * dropped[layer] if layer == 3 else 3.0 * dropped[layer]
    vectors[1, :, 0], vectors[2, :, 0] = dropped[1], -dropped[2]
    vectors[2, :, 3] = 0.2 * dropped[2]  # so that there is no way over plans that drop all three
    start, best = space.dense.copy(), space.dense.copy()
    start[3], best[[1, 2]] = 0, 0

    def error_of(plan_P: np.ndarray) -> float:
        return float((vectors[np.arange(layers), plan_P].sum(0) ** 2).sum())

    assert error_of(best) < error_of(start)
    sampler, tried = TradeSampler(space, Effects((vectors**2).sum(-1), vectors)), {start.tobytes()}
    # No trade of two layers is an improvement, and a sampler that trusts what it knows stays where it is.
    seen = np.concatenate([plans for plans, _ in sampler._around(start, curiosity=0.0)])
    assert min(map(error_of, seen)) == error_of(start)
    found = [sampler._forced([start], tried, np.random.default_rng(seed)) for seed in range(8)]
    assert all(space.feasible(plan[None])[0] and not np.array_equal(plan, start) for plan in found)
    assert any(np.array_equal(plan, best) for plan in found)


def test_layers_that_are_held_stay_as_they_are() -> None:
    space, effects = small_space(3)
    start = space.dense
    surrogate = Surrogate(space, effects)
    assert all((plan[[1, 4]] == start[[1, 4]]).all() for plan in neighbours(space, start, {1, 4}))
    assert len(neighbours(space, start, {1, 4})) == len(neighbours(space, start)) - int((space.sizes[[1, 4]] - 1).sum())
    moved = repair(space, start, surrogate.errors, {1, 4})
    assert moved is not None and space.feasible(moved[None])[0] and (moved[[1, 4]] == start[[1, 4]]).all()
    assert repair(space, start, surrogate.errors, set(map(int, space.free))) is None


def test_a_space_with_nothing_left_is_exhausted() -> None:
    space, effects = small_space(0, layers=3, width=3, share=0.7)
    sampler, tried = TradeSampler(space, effects, 0), set()
    every = np.array(np.meshgrid(*[np.arange(n) for n in space.sizes])).reshape(space.positions, -1).T
    fits = {plan.tobytes() for plan in every[space.feasible(every)]}
    judged = []
    for _ in range(len(fits) + 1):
        plan_P = sampler.propose(judged, tried, np.random.default_rng(0))
        if sampler.exhausted:
            break
        tried.add(plan_P.tobytes())
        judged.append((plan_P, 1.0, {}))
    assert sampler.exhausted
    assert tried <= fits
    assert len(tried) >= 0.8 * len(fits)


# ---- moves -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.25, 0.95))
@settings(max_examples=25)
def test_repair_ends_on_the_budget_and_fill_stays_there(seed: int, share: float) -> None:
    space, effects = small_space(seed, share=share)
    errors = Surrogate(space, effects).errors
    plan_P = np.random.default_rng(seed).integers(0, space.sizes)
    moved = repair(space, plan_P, errors)
    assert moved is not None and space.feasible(moved[None])[0]
    filled = fill(space, moved, errors)
    assert space.feasible(filled[None])[0]
    assert errors(filled[None])[0] <= errors(moved[None])[0]
    options = neighbours(space, filled)
    better = errors(options) < errors(filled[None])[0] * (1 - 1e-6)
    assert not (better & space.feasible(options)).any()


def test_repair_says_where_nothing_fits() -> None:
    space, effects = small_space(0)
    floor = float(space.total("latency_ms", np.zeros((1, space.positions), dtype=np.int64))[0])
    assert repair(space.with_limits(latency_ms=0.99 * floor), space.dense, Surrogate(space, effects).errors) is None


def test_trades_are_the_best_pairs_to_first_order() -> None:
    space, effects = small_space(5, layers=4, width=4)
    surrogate = Surrogate(space, effects)
    plan_P = solve(space, effects.errors_PC).plan_P
    options = neighbours(space, plan_P)
    base_S = surrogate.change(plan_P[None])[0][0]
    found = trades(space, plan_P, surrogate.change(options)[0] - base_S, options, base_S, most=5)
    every = np.array(np.meshgrid(*[np.arange(n) for n in space.sizes])).reshape(space.positions, -1).T
    pairs = every[((every != plan_P).sum(1) == 2) & space.feasible(every)]
    best = np.sort(surrogate.errors(pairs))[:5]
    assert surrogate.errors(found) == pytest.approx(best)
    assert ((found != plan_P).sum(1) == 2).all() and space.feasible(found).all()


def test_neighbours_differ_in_one_position_each_once() -> None:
    space, _ = small_space(0)
    plan_P = space.dense
    found = neighbours(space, plan_P)
    assert len(found) == sum(space.sizes - 1) == len(np.unique(found, axis=0))
    assert ((found != plan_P).sum(1) == 1).all()


# ---- surrogate, effects ----------------------------------------------------------------------------------------------


def test_the_surrogate_learns_what_is_not_first_order() -> None:
    space, effects = small_space(7)
    vector, surrogate = truth(space, effects, 7), Surrogate(space, effects)
    rng = np.random.default_rng(0)
    plans = rng.integers(0, space.sizes, (140, space.positions))
    changes = np.array([vector(p) for p in plans])
    errors = (changes**2).sum(1)
    before = np.abs(np.log(surrogate.errors(plans[100:]) / errors[100:])).mean()
    surrogate.fit(plans[:100], errors[:100], list(changes[:100]))
    after = np.abs(np.log(surrogate.errors(plans[100:]) / errors[100:])).mean()
    assert after < 0.6 * before
    predicted, spread = surrogate.predict(plans[:100])
    assert predicted == pytest.approx(errors[:100], rel=0.1)
    assert spread.mean() < surrogate.predict(plans[100:])[1].mean()


def test_without_sketches_errors_alone_are_learned_from() -> None:
    space, effects = small_space(7)
    vector, surrogate = truth(space, effects, 7), Surrogate(space, effects)
    plans = np.random.default_rng(0).integers(0, space.sizes, (60, space.positions))
    errors = np.array([vector(p) @ vector(p) for p in plans])
    surrogate.fit(plans, errors, [None] * 60)
    assert surrogate.errors(plans) == pytest.approx(errors, rel=0.2)


def test_separable_effects_add_up() -> None:
    space, _ = small_space(3)
    errors = np.random.default_rng(0).uniform(size=space.kept.shape)
    surrogate = Surrogate(space, Effects.separable(errors))
    plans = np.random.default_rng(1).integers(0, space.sizes, (10, space.positions))
    free = space.free
    expected = pick(errors, plans)[:, free].sum(1)
    assert surrogate.errors(plans) == pytest.approx(expected)


def test_measured_effects_are_errors_of_single_prunings(model, cost) -> None:
    from shiva_search.search.fidelity import FidelityEvaluator

    space = build_space(model, cost, Budget(latency_ms=8.0))
    evaluator = FidelityEvaluator(model, "stride", model.batch("calibration", 8), chunk=4, probe=2)
    effects = measure_effects(evaluator, space)
    for position, choice in [(1, 0), (3, 4), (4, effects.measured[4][-1])]:
        row = [64] * 5
        row[position] = space.choices[position][choice]
        assert choice in effects.measured[position]
        assert effects.errors_PC[position, choice] == pytest.approx(evaluator.error(row), rel=1e-9)
    assert (effects.errors_PC[:, -1] == 0).all() and (effects.errors_PC[1:, :-1] > 0).all()
    assert (effects.vectors_PCS**2).sum(-1) == pytest.approx(effects.errors_PC)


def test_one_dense_pass_feeds_all_choices_of_a_layer(model, cost) -> None:
    from shiva_search.search.fidelity import FidelityEvaluator

    space = build_space(model, cost, Budget(latency_ms=8.0))
    evaluator = FidelityEvaluator(model, "stride", model.batch("calibration", 8), chunk=4, probe=1)
    before = evaluator.forwards
    effects = measure_effects(evaluator, space)
    runs = sum(map(len, effects.measured))
    work = evaluator.forwards - before
    # Half the batch; on average about half of the layers are run again, none of them before the pruned one.
    layers_run = sum((space.choices[p][c] + 64 * (4 - p)) / 320 for p in range(1, 5) for c in effects.measured[p])
    assert work == pytest.approx(0.5 * (layers_run + 0.8), rel=1e-6)
    assert work < 0.5 * 0.6 * runs


def test_knots_are_spread_over_the_choices_and_hold_both_ends() -> None:
    assert knots_of(tuple(range(0, 65)), 64) == [0, 1, 8, 16, 32, 48]
    assert knots_of((64,), 64) == []
    assert knots_of((0, 64), 64) == [0]
    assert knots_of((16, 32, 48, 64), 64) == [0, 1, 2]


def test_sketches_survive_as_text() -> None:
    vector = np.random.default_rng(0).normal(size=256) * 1e-6
    again = decode(encode(vector))
    assert again @ vector / np.linalg.norm(again) / np.linalg.norm(vector) > 0.99999
    assert decode(None) is None
    assert (decode(encode(np.zeros(4))) == 0).all()


def test_params_survive() -> None:
    space, _ = small_space(0)
    plan_P = np.array([0, 1, 2, 3, 4, 0])
    assert np.array_equal(from_params(space, to_params(space, plan_P)), plan_P)
