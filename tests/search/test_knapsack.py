"""The exact solver against trying everything, and what it says when nothing fits."""

from __future__ import annotations

import ctypes
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_search.errors import InfeasibleBudgetError, InputError, UnavailableError
from shiva_search.records.budget import Budget, option_name
from shiva_search.search import knapsack
from shiva_search.search.candidates import Space, build_space
from shiva_search.search.knapsack import cheapest, explain, floor, solve, solve_front


@st.composite
def instances(draw: st.DrawFn) -> tuple[Space, np.ndarray]:
    """A small space with random costs, up to three limits somewhere between its cheapest and dearest plan."""
    layers, width, segments = draw(st.integers(2, 4)), draw(st.integers(2, 4)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ks = tuple(int(k) for k in sorted(rng.choice(np.arange(0, 63), width - 1, replace=False))) + (64,)
    choices = ((64,), *[ks] * (layers - 1))
    cost = {
        metric: tuple(tuple(map(float, np.round(rng.uniform(0.1, 5.0, len(c)), 3))) for c in choices)
        for metric in ("latency_ms", "energy_j", "gflops", "memory_mib")
    }
    cost["mean_keep"] = tuple(tuple(k / (64 * layers) for k in c) for c in choices)
    fixed = {"latency_ms": 0.5, "energy_j": 0.25, "gflops": 0.0, "mean_keep": 0.0, "memory_mib": 1.0}
    weights = (1.0,) if segments == 1 else (0.25, 0.75)
    space = Space(64, layers, weights, choices, cost, fixed)
    every = all_plans(space)
    limits = {}
    for metric in draw(
        st.sets(st.sampled_from(["latency_ms", "energy_j", "power_w", "gflops", "mean_keep", "memory_mib"]), max_size=3)
    ):
        values = space.total(metric, every)
        share = draw(st.floats(-0.1, 1.1))
        limit = float(values.min() + share * (values.max() - values.min()))
        if limit > 0:
            limits[metric] = limit
    return space.with_limits(**limits), rng.uniform(0.0, 1.0, space.kept.shape)


def all_plans(space: Space) -> np.ndarray:
    return np.array(list(itertools.product(*[range(n) for n in space.sizes])))


@given(instances())
@settings(max_examples=60)
def test_equals_brute_force(instance: tuple[Space, np.ndarray]) -> None:
    space, errors = instance
    every = all_plans(space)
    fits = every[space.feasible(every)]
    if not len(fits):
        with pytest.raises(InfeasibleBudgetError):
            solve(space, errors)
        return
    best = errors[np.arange(space.positions), fits].sum(1).min()
    solution = solve(space, errors)
    assert solution.error == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert space.feasible(solution.plan_P[None])[0]
    assert solution.gap == 0.0


@given(instances(), st.sampled_from(["latency_ms", "energy_j", "power_w", "mean_keep", "memory_mib"]))
@settings(max_examples=30)
def test_floor_is_the_least_value_and_is_feasible(instance: tuple[Space, np.ndarray], metric: str) -> None:
    space, _ = instance
    others = space.with_limits(**{m: limit for m, limit in space.limits.items() if m != metric})
    every = all_plans(space)
    fits = every[others.feasible(every)]
    plan_P = cheapest(space, metric)
    if not len(fits):
        assert plan_P is None
        return
    assert plan_P is not None
    least = space.total(metric, fits).min()
    assert floor(space, metric) == pytest.approx(least, rel=1e-6)
    assert others.with_limits(**others.limits, **{metric: float(least)}).feasible(plan_P[None])[0]


def test_the_first_layer_is_dense_in_every_segment(model, cost) -> None:
    space = build_space(model, cost, Budget(shares={"latency_ms": 0.5}), segments=3)
    solution = solve(space, np.random.default_rng(0).uniform(size=space.kept.shape))
    assert [row[0] for row in space.rows(solution.plan_P)] == [64, 64, 64]
    assert len(space.rows(solution.plan_P)) == 3


def test_what_the_solver_prints_is_kept_from_stdout(model, cost, monkeypatch, capfd) -> None:
    libc, milp = ctypes.CDLL(None), knapsack.milp

    def chatty(*args, **kwargs):
        libc.printf(b"tmpSolver.run();\n")
        return milp(*args, **kwargs)

    monkeypatch.setattr(knapsack, "milp", chatty)
    space = build_space(model, cost, Budget(shares={"latency_ms": 0.6}))
    solve(space, np.ones(space.kept.shape))
    print("the answer", flush=True)
    libc.fflush(None)
    assert capfd.readouterr() == ("the answer\n", "tmpSolver.run();\n")


def test_57_layers_of_32_choices_are_solved_to_optimality(make_cost) -> None:
    class Shape:
        tokens, layer_count = 4096, 57

    grid = tuple(range(0, 4096, 132))[:31] + (4096,)
    cost = make_cost(4096, 57, grid=grid)
    space = build_space(Shape(), cost, Budget(shares={"latency_ms": 0.55, "energy_j": 0.6}))
    rng = np.random.default_rng(1)
    curve = (1 - np.array(grid) / 4096) ** 1.5
    errors = rng.lognormal(0, 1, (57, 1)) * curve * rng.uniform(0.9, 1.1, (57, 32))
    solution = solve(space, errors)
    assert solution.gap == 0.0
    assert space.feasible(solution.plan_P[None])[0]


def test_front_runs_from_floor_to_dense_and_never_rises(model, cost) -> None:
    space = build_space(model, cost, Budget(latency_ms=8.0))
    errors = np.random.default_rng(2).uniform(size=space.kept.shape) * (space.kept < 64)
    front = solve_front(space, errors, points=12)
    latency = [float(space.total("latency_ms", s.plan_P[None])[0]) for s in front]
    assert latency == sorted(latency)
    assert [s.error for s in front] == sorted((s.error for s in front), reverse=True)
    assert latency[0] == pytest.approx(floor(space, "latency_ms"))
    assert front[-1].error == 0.0


# ---- when nothing fits -----------------------------------------------------------------------------------------------


def named_floor(message: str) -> float:
    found = re.search(r"floor of ([\d.]+)", message)
    assert found is not None, message
    return float(found[1])


def test_the_message_names_budget_floor_and_option_and_the_named_floor_is_feasible(model, cost) -> None:
    space = build_space(model, cost, Budget(latency_ms=1.0))
    with pytest.raises(InfeasibleBudgetError) as refusal:
        solve(space, np.zeros(space.kept.shape))
    message = str(refusal.value)
    assert "latency budget 1.000 ms is below this model's floor of" in message
    assert "every layer but the first at 0 tokens" in message and "--max-latency" in message
    assert refusal.value.exit_code == 3
    again = build_space(model, cost, Budget(latency_ms=named_floor(message)))
    assert solve(again, np.zeros(again.kept.shape)).error == 0.0


def test_a_predicted_floor_says_so_with_its_interval(model, cost) -> None:
    def refusal(**limit: float) -> str:
        return str(explain(build_space(model, cost, Budget(**limit))))

    # 0.5 ms beside the blocks, 2.2992 ms the first block; the interval is 3 % wide on each side.
    assert "floor of 2.800 ms, 19.9 % of dense (predicted, 90 % interval 2.715 ms to 2.883 ms; every" in refusal(
        latency_ms=1.0
    )
    assert "(predicted; every layer" in refusal(energy_j=0.001)
    assert "predicted" not in refusal(mean_keep=0.1)
    assert "predicted" not in refusal(gflops=0.01)


@pytest.mark.parametrize(
    ("min_keep", "limit", "helps"),
    [
        (None, {"latency_ms": 1.0}, False),  # nothing is excluded that could be allowed
        (0.5, {"latency_ms": 5.0}, True),
        (0.5, {"latency_ms": 2.0}, False),  # the first layer, which keeps all, is above it alone
        (0.5, {"memory_mib": 20.0}, False),
        (0.5, {"mean_keep": 0.3}, True),
        (0.5, {"mean_keep": 0.1}, False),
    ],
)
def test_fewer_tokens_are_advised_only_where_they_can_help(model, cost, min_keep, limit, helps) -> None:
    message = str(explain(build_space(model, cost, Budget(**limit), min_keep=min_keep)))
    assert ("--min-keep" in message) is helps
    assert message.endswith(f". Raise {option_name(*limit)}{' or allow fewer tokens with a lower --min-keep' * helps}.")


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        (Budget(energy_j=0.001, latency_ms=8.0), "energy budget"),
        (Budget(power_w=1.0, latency_ms=8.0), "power budget"),
        (Budget(memory_mib=20.0), "memory budget"),
        (Budget(gflops=0.02), "FLOP budget"),
        (Budget(mean_keep=0.1), "mean keep budget"),
    ],
)
def test_the_budget_that_binds_is_named(model, cost, budget: Budget, named: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=named) as refusal:
        space = build_space(model, cost, budget)
        solve(space, np.zeros(space.kept.shape))
    assert named_floor(str(refusal.value)) > 0


def test_budgets_that_exclude_each_other_are_named_together() -> None:
    # What is fast needs energy, and the other way round: each limit alone can be held.
    choices = ((4,), (0, 4), (0, 4))
    cost = {"latency_ms": ((0.0,), (1.0, 5.0), (1.0, 5.0)), "energy_j": ((0.0,), (5.0, 1.0), (5.0, 1.0))}
    space = Space(
        4, 3, (1.0,), choices, cost, {"latency_ms": 0.0, "energy_j": 0.0}, {"latency_ms": 3.0, "energy_j": 3.0}
    )
    message = str(explain(space))
    assert "latency budget 3.000 ms" in message and "floor of 10.00 ms" in message and "energy held" in message


# ---- the space -------------------------------------------------------------------------------------------------------


def test_memory_is_a_limit_on_the_largest_layer(model, cost) -> None:
    class Heavier(type(cost)):
        def layer_cost(self, metric, layer, k):
            known = super().layer_cost(metric, layer, k)
            return known + 10.0 if metric == "memory_mib" and layer > 1 else known

    # 10 MiB + 0.5 per token: 64 tokens need 42, which the first layer must have; later layers need 10 more.
    space = build_space(model, Heavier(64, 5), Budget(memory_mib=42.0, latency_ms=11.0))
    assert space.rows(solve(space, -space.kept.astype(float)).plan_P) == ((64, 64, 40, 40, 40),)
    assert [space.feasible(space.indices([row])[None])[0] for row in [(64, 64, 40, 0, 0), (64, 0, 48, 0, 0)]] == [
        True,
        False,
    ]
    assert float(space.total("memory_mib", space.indices([(64, 0, 48, 0, 0)])[None])[0]) == 44.0
    with pytest.raises(
        InfeasibleBudgetError, match=r"memory budget 41.00 MiB is below this model's floor of 42.00 MiB"
    ):
        solve(space.with_limits(memory_mib=41.0), -space.kept.astype(float))


def test_min_keep_rules_out_skipping(model, cost) -> None:
    space = build_space(model, cost, Budget(latency_ms=8.0), min_keep=0.2)
    assert min(min(ks) for ks in space.choices) == 16


@pytest.mark.parametrize("wrong", [{"min_keep": 0.0}, {"min_keep": 1.5}, {"segments": 0}])
def test_options_out_of_range_are_refused(model, cost, wrong: dict) -> None:
    with pytest.raises(InputError):
        build_space(model, cost, Budget(latency_ms=8.0), **wrong)


def test_a_budget_on_what_was_not_measured_is_refused(model, cost) -> None:
    class NoEnergy(type(cost)):
        def predict(self, plan):
            from dataclasses import replace

            return replace(super().predict(plan), energy_j=None, power_w=None)

    with pytest.raises(UnavailableError, match="energy"):
        build_space(model, NoEnergy(64, 5), Budget(energy_j=0.05))


def test_costs_are_those_of_the_cost_model(model, cost) -> None:
    from shiva_search.records.plan import Plan

    space = build_space(model, cost, Budget(latency_ms=8.0), segments=2)
    rng = np.random.default_rng(3)
    plans = rng.integers(0, space.sizes, (20, space.positions))
    for metric, known in [("latency_ms", "latency_ms"), ("energy_j", "energy_j"), ("power_w", "power_w")]:
        expected = [getattr(cost.predict(Plan.from_rows(model, space.rows(p))), known) for p in plans]
        assert space.total(metric, plans) == pytest.approx(expected)
    keeps = [Plan.from_rows(model, space.rows(p)).mean_keep for p in plans]
    assert space.total("mean_keep", plans) == pytest.approx(keeps)


def test_a_space_survives_json(model, cost) -> None:
    import json

    space = build_space(model, cost, Budget(latency_ms=8.0, energy_j=0.1), segments=2)
    assert Space.from_dict(json.loads(json.dumps(space.as_dict()))) == space


def test_rows_and_indices_are_inverse(model, cost) -> None:
    space = build_space(model, cost, Budget(latency_ms=8.0), segments=2)
    plan_P = np.random.default_rng(4).integers(0, space.sizes)
    assert np.array_equal(space.indices(space.rows(plan_P)), plan_P)
    assert space.indices([[64, 63, 0, 0, 0]] * 2) is None
