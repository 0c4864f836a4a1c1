"""What a search starts from. In: a space. Out: an evaluator for it, and the first plans to judge."""

from __future__ import annotations

import numpy as np

from shiva_search.models.model import Model
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.candidates import Ints, Space
from shiva_search.search.fidelity import FidelityEvaluator
from shiva_search.search.knapsack import solve, solve_front
from shiva_search.search.study import PlanStudy

#: Powers of the first-order errors whose exact solutions are judged as well: below 1 few layers pay, above 1 many.
BENDS = (0.25, 3.0, 0.5, 2.0)


def evaluator_for(
    model: Model, scorer: TokenScorer | str, space: Space, seed: int, samples: int, chunk: int
) -> FidelityEvaluator:
    """The evaluator of a search: work is counted by predicted latency where there is one."""
    edges = np.concatenate([[0.0], np.cumsum(space.weights)])
    edges[-1] = 1.0
    segments = [(float(low), float(high)) for low, high in zip(edges, edges[1:], strict=False)]
    table = space.cost.get("latency_ms")
    costs = None if table is None else [dict(zip(space.choices[i], table[i], strict=True)) for i in range(space.layers)]

    def layer_cost(layer: int, k: int) -> float:
        assert costs is not None
        known = costs[layer]
        return known[k] if k in known else known[max(known)] * k / max(known)

    return FidelityEvaluator(
        model,
        scorer,
        model.batch("calibration", samples, seed),
        chunk,
        segments=segments,
        layer_cost=None if costs is None else layer_cost,
        fixed_cost=space.fixed.get("latency_ms", 0.0),
    )


def enqueue_start(plans: PlanStudy, exact_P: Ints, trials: int, *, front: bool = True) -> None:
    """The exact solution first, then those for bent errors, then exact solutions at budgets along the front.

    Errors of single layers add up only while they are small, and where much is pruned nothing says beforehand whether
    a plan had better give up a few layers or thin out many: among the solutions for powers of the errors there may be
    one that is a far better start.
    """
    plans.enqueue(exact_P, "exact")
    # One for every six trials: a short search has little to spend on where to begin.
    for power in BENDS[: trials // 6]:
        plans.enqueue(solve(plans.space, plans.effects.errors_PC**power).plan_P, "exact")
    if not front:
        return
    # A dozenth of the trials at most: the front is there for the picture and for what it teaches about other budgets.
    points = min(8, trials // 12)
    if points:
        metric = next((m for m in ("latency_ms", "energy_j", "gflops", "mean_keep") if m in plans.space.limits), None)
        metric = metric or ("latency_ms" if "latency_ms" in plans.space.tables else "mean_keep")
        for solution in solve_front(plans.space, plans.effects.errors_PC, metric, points, span=(0.05, 0.95)):
            plans.enqueue(solution.plan_P, "front")
