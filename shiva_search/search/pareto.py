"""The front: judged plans that no other one beats. In: records of a study. Out: rows of trials.csv and pareto.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shiva_search.records.cost import CostEstimate
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.search.candidates import Floats

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
        **choice_columns(plan),
        "mean_keep": plan.mean_keep,
        "error": error,
        **cost_columns(predicted, dense),
    }
    row.update({f"measured_{name}": None if measured is None else getattr(measured, name) for name in _MEASURED})
    return row


def choice_columns(plan: Plan) -> dict[str, list[list[Any]]]:
    """What each layer does, a list per timestep segment."""
    return {
        "tokens_kept": [list(row) for row in plan.tokens_kept],
        "bypass_ranks": [[choice.rank for choice in row] for row in plan.rows],
        "attend": [list(row) for row in plan.attend],
    }
