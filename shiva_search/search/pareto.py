"""The front: judged plans that no other one beats. In: records of a study. Out: rows of trials.csv and pareto.csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shiva_search.records.cost import CostEstimate
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.search.candidates import Floats, Ints, PlanCost
from shiva_search.search.study import PlanStudy

#: What pareto.csv has of a measurement, empty for plans that were not measured.
_MEASURED = ("latency_ms", "latency_ms_low", "latency_ms_high", "ratio", "energy_j", "power_w", "peak_memory_mib")


def non_dominated(errors_M: Sequence[float] | Floats, costs_M: Sequence[float] | Floats) -> list[int]:
    """Indices of the points that no other one beats in both, by ascending cost; of equal points the first.

    Args:
        errors_M, costs_M: lower is better in both.
    """
    order = sorted(range(len(errors_M)), key=lambda i: (costs_M[i], errors_M[i], i))
    front, best = [], np.inf
    for index in order:
        if errors_M[index] < best:
            front.append(index)
            best = errors_M[index]
    return front


def cost_columns(predicted: CostEstimate, dense: CostEstimate) -> dict[str, float | None]:
    """predicted_* columns of one plan."""
    columns = {f"predicted_{name}": value for name, value in predicted.as_dict().items()}
    known = predicted.latency_ms is not None and dense.latency_ms
    columns["predicted_ratio"] = predicted.latency_ms / dense.latency_ms if known else None  # type: ignore[operator]
    return columns


def constraint_columns(predicted: CostEstimate, mean_keep: float, limits: Mapping[str, float]) -> dict[str, float]:
    """constraint_* columns: predicted cost minus limit, in the limit's unit; above zero breaks it."""
    columns = {}
    for metric, limit in limits.items():
        value = mean_keep if metric == "mean_keep" else predicted.of(metric)
        if value is not None:
            columns[f"constraint_{metric}"] = value - limit
    return columns


def pareto_row(
    plan: Plan, number: int, error: float, predicted: CostEstimate, dense: CostEstimate, measured: Measurement | None
) -> dict[str, Any]:
    """A row of pareto.csv; measured_* stay None until the plan is measured."""
    row: dict[str, Any] = {
        "trial": number,
        **plan.as_columns(),
        "mean_keep": plan.mean_keep,
        "error": error,
        **cost_columns(predicted, dense),
    }
    row.update({f"measured_{name}": None if measured is None else getattr(measured, name) for name in _MEASURED})
    return row


def trial_rows(plans: PlanStudy, cost: PlanCost, plan_of: Callable[[Ints], Plan]) -> list[dict[str, Any]]:
    """Rows of trials.csv: every judged plan, feasible or not.

    Args:
        plans: the study.
        cost: predicts.
        plan_of: choice indices -> the plan.
    """
    rows = []
    limits = plans.space.limits
    for record in plans.records():
        plan = plan_of(record.plan_P)
        predicted = cost.predict(plan)
        rows.append(
            {
                "trial": record.number,
                "origin": record.origin,
                "state": "complete" if record.complete else "stopped early",
                **plan.as_columns(),
                "mean_keep": plan.mean_keep,
                "error": record.error,
                "feasible": bool(plans.space.feasible(record.plan_P[None])[0]),
                **cost_columns(predicted, cost.dense),
                **constraint_columns(predicted, plan.mean_keep, limits),
                "seconds": record.attributes.get("seconds"),
                "samples": record.attributes.get("samples"),
                "forwards": record.attributes.get("forwards"),
            }
        )
    return rows


def front_rows(
    plans: PlanStudy,
    cost: PlanCost,
    plan_of: Callable[[Ints], Plan],
    chosen_P: Ints,
    measured: Mapping[bytes, Measurement],
) -> list[dict[str, Any]]:
    """Rows of pareto.csv: the non-dominated among the plans judged in full, and the chosen one.

    Args:
        plans: the study.
        cost: predicts.
        plan_of: choice indices -> the plan.
        chosen_P: what the search returns.
        measured: by plan, its measurement.
    """
    records = [r for r in plans.records() if r.complete]
    metric = "latency_ms" if "latency_ms" in plans.space.tables else "mean_keep"
    made = [plan_of(r.plan_P) for r in records]
    predicted = [cost.predict(plan) for plan in made]
    costs = [
        p.latency_ms if metric == "latency_ms" else plan.mean_keep for p, plan in zip(predicted, made, strict=True)
    ]
    front = set(non_dominated([r.error for r in records], [float(c or 0.0) for c in costs]))
    # The chosen plan is shown even where a correction of the costs has put another one just ahead of it.
    front |= {i for i, r in enumerate(records) if np.array_equal(r.plan_P, chosen_P)}
    rows = []
    for i in sorted(front, key=lambda i: float(costs[i] or 0.0)):
        key = records[i].plan_P.tobytes()
        row = pareto_row(made[i], records[i].number, records[i].error, predicted[i], cost.dense, measured.get(key))
        rows.append({**row, "chosen": np.array_equal(records[i].plan_P, chosen_P)})
    return rows
