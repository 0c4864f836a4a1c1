"""Whether any plan can hold a budget. In: a cost model and a budget. Out: nothing, or a refusal that says why."""

from __future__ import annotations

from shiva_search.records.budget import Budget
from shiva_search.records.plan import Planned
from shiva_search.search.candidates import PlanCost, build_space
from shiva_search.search.knapsack import explain, floor


def check_budget(
    model: Planned,
    cost: PlanCost,
    budget: Budget,
    *,
    min_keep: float | None = None,
    segments: int = 1,
) -> None:
    """Refuse a budget that no plan can hold, before any work is done.

    Raises:
        InfeasibleBudgetError: names the floor and the budget that binds.
        UnavailableError: a limit is on a quantity this profile lacks.
    """
    space = build_space(model, cost, budget, min_keep=min_keep, segments=segments)
    metric = "latency_ms" if "latency_ms" in space.tables else "mean_keep"
    # The floor of any metric under all limits exists exactly where a plan does.
    limited = space.with_limits(**{**space.limits, metric: space.limits.get(metric, float("inf"))})
    least = floor(limited, metric)
    if least is None or least > limited.limits[metric] * (1 + 1e-9):
        raise explain(space)
