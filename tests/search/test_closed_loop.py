"""The loop on scripted devices: off by a share, noisy, hopeless; and what counts as holding a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest

from shiva_search.errors import BudgetBrokenError
from shiva_search.records.budget import Budget
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.search import search
from shiva_search.search.closed_loop import _rescaled, holds, usage


def measurement(ratio: float = 0.6, width: float = 0.01, **known) -> Measurement:
    latency = known.pop("dense_latency_ms", 10.0)
    defaults = {
        "tokens_kept": ((64, 32, 0, 32),),
        "latency_ms": ratio * latency,
        "latency_ms_low": (ratio - width) * latency,
        "latency_ms_high": (ratio + width) * latency,
        "dense_latency_ms": latency,
        "ratio": ratio,
        "ratio_low": ratio - width,
        "ratio_high": ratio + width,
        "samples": 20,
    }
    return Measurement(**{**defaults, **known})


@pytest.mark.parametrize(
    ("budget", "known", "verdict"),
    [
        # A share is judged by the upper end of the ratio's interval, whatever the machine's speed is today.
        (Budget(shares={"latency_ms": 0.62}), {}, True),
        (Budget(shares={"latency_ms": 0.605}), {}, False),
        (Budget(shares={"latency_ms": 0.62}), {"dense_latency_ms": 99.0}, True),
        # An absolute limit is judged by the measured latency.
        (Budget(latency_ms=6.05), {}, True),
        (Budget(latency_ms=5.95), {}, False),
        (Budget(latency_ms=6.05), {"dense_latency_ms": 99.0}, False),
        (Budget(latency_ms=6.05, energy_j=1.0), {"energy_j": 1.1}, False),
        (Budget(latency_ms=6.05, energy_j=1.0), {"energy_j": 0.9}, True),
        (Budget(energy_j=1.0), {"energy_j": None}, True),  # not measured: nothing is known to be broken
        (Budget(power_w=100.0), {"power_w": 101.0}, False),
        (Budget(memory_mib=100.0), {"peak_memory_mib": 101.0}, False),
        # The few bytes that any plan holds during a forward break no budget of all that dense blocks need.
        (Budget(memory_mib=1.0), {"peak_memory_mib": 1.0 + 9 / 2**20}, True),
        (Budget(shares={"memory_mib": 1.0}), {"peak_memory_mib": 1.0 + 9 / 2**20, "dense_peak_memory_mib": 1.0}, True),
        (Budget(shares={"memory_mib": 1.0}), {"peak_memory_mib": 1.0 + 2 / 2**10, "dense_peak_memory_mib": 1.0}, False),
        (Budget(gflops=1.0), {"gflops": 0.9}, True),
        (Budget(mean_keep=0.5), {}, True),
        (Budget(mean_keep=0.49), {}, False),
        (Budget(shares={"energy_j": 0.5}), {"energy_j": 0.6, "dense_energy_j": 1.0}, False),
        (Budget(shares={"energy_j": 0.5}), {"energy_j": 0.4, "dense_energy_j": 1.0}, True),
        # Both forms of one limit hold together.
        (Budget(latency_ms=6.5, shares={"latency_ms": 0.5}), {}, False),
        (Budget(latency_ms=5.5, shares={"latency_ms": 0.7}), {}, False),
    ],
)
def test_holds(budget: Budget, known: dict, verdict: bool) -> None:
    assert holds(budget, measurement(**known)) is verdict


def test_usage_is_the_share_of_the_limit() -> None:
    assert usage(Budget(latency_ms=12.0), measurement()) == {"latency_ms": pytest.approx(0.5)}
    assert usage(Budget(latency_ms=12.0), measurement(), cautious=True) == {"latency_ms": pytest.approx(0.61 * 10 / 12)}


class OnePlan:
    """A space of one plan, predicted to use nine tenths of each limit."""

    limits: ClassVar = {"latency_ms": 10.0, "memory_mib": 100.0, "mean_keep": 0.5}

    def total(self, metric: str, plans: np.ndarray) -> np.ndarray:
        return np.full(len(plans), 0.9 * self.limits[metric])


def test_missing_a_limit_twice_tightens_that_limit_by_no_more_than_it_was_missed() -> None:
    def scale(**missed: list[float]) -> dict[str, float]:
        used = {"latency_ms": 1.002, "memory_mib": 0.9, "mean_keep": 0.9}
        return _rescaled({}, OnePlan(), np.zeros(3, dtype=int), used, missed)  # type: ignore[arg-type]

    assert scale() == scale(latency_ms=[0.03]) == pytest.approx({"latency_ms": 0.8964, "memory_mib": 1.0}, rel=1e-4)
    assert scale(latency_ms=[0.03, 0.002]) == pytest.approx({"latency_ms": 0.8946, "memory_mib": 1.0}, rel=1e-4)
    assert scale(latency_ms=[0.03, 0.02]) == pytest.approx({"latency_ms": 0.8919, "memory_mib": 1.0}, rel=1e-4)


# ---- the loop --------------------------------------------------------------------------------------------------------


class ScriptedDevice:
    """Answers like the synthetic cost model, with pruned layers `off` times as slow and a little noise."""

    def __init__(self, cost, off: Callable[[Plan], float] | float, width: float = 0.004, seed: int = 0) -> None:
        self.cost, self.off, self.width = cost, off, width
        self.rng = np.random.default_rng(seed)
        self.asked: list[Plan] = []

    def true_ratio(self, plan: Plan) -> float:
        factor = self.off(plan) if callable(self.off) else self.off
        dense = self.cost.dense.latency_ms
        pruned = self.cost.predict(plan).latency_ms
        return pruned / dense if plan.is_dense else factor * pruned / dense

    def __call__(self, plan: Plan) -> Measurement:
        self.asked.append(plan)
        ratio = self.true_ratio(plan) + self.rng.normal(0, self.width / 4)
        return measurement(ratio, self.width, dense_latency_ms=self.cost.dense.latency_ms, tokens_kept=plan.tokens_kept)


def run(model, cost, budget: Budget, device: ScriptedDevice, **options):
    return search(
        model, cost, budget, measure=device, **{"trials": 20, "samples": 8, "chunk": 4, "sampler": "trade", **options}
    )


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("off", [1.15, 0.85])
def test_a_device_that_is_15_percent_off_is_met_within_the_budget(model, make_cost, off: float, deaf: bool) -> None:
    cost = make_cost(64, 5, deaf=deaf)
    device = ScriptedDevice(cost, off)
    budget = Budget(shares={"latency_ms": 0.6})
    result = run(model, cost, budget, device)
    assert holds(budget, result.measurement)
    assert device.true_ratio(result.plan) <= 0.6
    assert result.measurement.tokens_kept == result.plan.tokens_kept
    assert len(device.asked) == len(result.rounds) <= 8
    assert result.rounds[-1]["round"] == len(result.rounds)
    first = result.rounds[0]
    assert first["holds"] is (off < 1)
    assert first["measured_ratio"] / first["predicted_ratio"] == pytest.approx(off, rel=0.02)
    # Where the device is faster than predicted, the slack is spent on quality; where slower, little is left unused.
    assert device.true_ratio(result.plan) > 0.6 * 0.93
    if off < 1:
        chosen_first = next(t for t in result.trials if t["tokens_kept"] == first["tokens_kept"])
        assert result.plan.fidelity["error"] < chosen_first["error"]


def test_no_layer_can_take_its_next_choice_within_the_budget_for_the_better(model, cost) -> None:
    device = ScriptedDevice(cost, 1.1)
    result = run(model, cost, Budget(shares={"latency_ms": 0.7}), device)
    known = {str(t["tokens_kept"]): t["error"] for t in result.trials}
    grid, dense = cost.grid, cost.dense.latency_ms
    for layer in range(1, 5):
        row = list(result.plan.tokens_kept[0])
        if row[layer] == 64:
            continue
        row[layer] = grid[grid.index(row[layer]) + 1]
        fits = result.cost.predict(Plan(64, (tuple(row),))).latency_ms <= 0.7 * dense * 0.99
        assert not fits or known[str([row])] >= result.plan.fidelity["error"]


def test_absolute_budgets_are_met_too(model, cost) -> None:
    device = ScriptedDevice(cost, 1.12)
    limit = 0.55 * cost.dense.latency_ms
    result = run(model, cost, Budget(latency_ms=limit), device)
    assert result.measurement.latency_ms <= limit
    assert device.true_ratio(result.plan) * cost.dense.latency_ms <= limit


def test_a_second_budget_that_breaks_is_met_by_choosing_again(model, cost) -> None:
    energy = {"dense_energy_j": cost.dense.energy_j}

    class Hungry(ScriptedDevice):
        def __call__(self, plan: Plan) -> Measurement:
            timed = super().__call__(plan)
            from dataclasses import replace

            return replace(timed, energy_j=1.1 * cost.predict(plan).energy_j, **energy)

    budget = Budget(shares={"latency_ms": 0.9, "energy_j": 0.6})
    result = run(model, cost, budget, Hungry(cost, 1.0))
    assert holds(budget, result.measurement)
    assert not result.rounds[0]["holds"] and result.rounds[0]["used"]["energy_j"] > 1


def test_a_device_on_which_nothing_fits_is_refused_with_figures(model, cost) -> None:
    device = ScriptedDevice(cost, lambda plan: 3.0)
    with pytest.raises(
        BudgetBrokenError, match=r"of the latency budget of 45.0% of dense \(.* ms, .*% of dense"
    ) as refusal:
        run(model, cost, Budget(shares={"latency_ms": 0.45}), device)
    assert refusal.value.exit_code == 5
    # What came nearest comes with the refusal, judged and measured.
    nearest = refusal.value.nearest
    assert nearest is not None and nearest.measurement is not None
    least = min(nearest.rounds, key=lambda row: row["measured_ratio_high"])
    assert nearest.plan.as_columns().items() <= least.items()
    assert 0 < nearest.plan.fidelity["error"] < 10
    # The floor itself was tried: every layer but the first skipped.
    assert any(plan.tokens_kept == ((64, 0, 0, 0, 0),) for plan in device.asked)


def test_a_dense_model_that_fits_is_returned_as_it_is(model, cost) -> None:
    device = ScriptedDevice(cost, 1.0)
    result = run(model, cost, Budget(latency_ms=2 * cost.dense.latency_ms), device)
    assert result.plan.is_dense and "dense model already fits" in result.note
    assert result.plan.fidelity["error"] == 0.0
    assert [row["chosen"] for row in result.pareto] == [True]
    assert holds(Budget(latency_ms=2 * cost.dense.latency_ms), result.measurement)


def test_a_dense_model_that_only_seemed_to_fit_is_searched(model, cost) -> None:
    dense = cost.dense.latency_ms

    class Slow(ScriptedDevice):
        def __call__(self, plan: Plan) -> Measurement:
            self.asked.append(plan)
            ratio = self.true_ratio(plan)
            return measurement(ratio, 0.004, dense_latency_ms=1.2 * dense, tokens_kept=plan.tokens_kept)

    budget = Budget(latency_ms=1.01 * dense)
    result = run(model, cost, budget, Slow(cost, 1.0))
    assert not result.plan.is_dense and result.note is None
    assert result.measurement.latency_ms <= 1.01 * dense
