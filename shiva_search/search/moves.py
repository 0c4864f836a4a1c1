"""Moves between plans. In: a plan, a space, a way to predict errors. Out: plans that hold the limits.

Legend: M plans, P positions, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shiva_search.search.candidates import Floats, Ints, Space, pick

#: Choice indices [M, P] -> predicted errors [M].
Predict = Callable[[Ints], Floats]


def neighbours(space: Space, plan_P: Ints, held: Collection[int] = ()) -> Ints:
    """All plans that differ from this one in a single position, which is none of those held [M, P]."""
    rows = []
    for p in space.free:
        if p in held:
            continue
        others = np.delete(np.arange(space.sizes[p]), plan_P[p])
        block = np.repeat(plan_P[None], len(others), axis=0)
        block[:, p] = others
        rows.append(block)
    return np.concatenate(rows) if rows else np.zeros((0, space.positions), dtype=np.int64)


def burden(space: Space, plans_MP: Ints) -> Floats:
    """By how much plans pass their limits, added up over the constraints [M]; 0 where all hold."""
    total = np.zeros(len(plans_MP))
    for name, value in space.excess(plans_MP).items():
        if name != "memory":
            total += np.maximum(value, 0.0)
    # The peak alone would not show that one of two positions above the limit has been dealt with.
    return total + pick(space.too_big.astype(float), plans_MP).sum(1)


def repair(space: Space, plan_P: Ints, predict: Predict, held: Collection[int] = ()) -> Ints | None:
    """Move a plan onto the budget: the change that costs the least error per excess removed, until all limits hold.

    Args:
        space: the limits.
        plan_P: where to start.
        predict: what changes do.
        held: positions that stay as they are.

    Returns:
        A feasible plan [P], or None where single changes lead nowhere.
    """
    plan_P = plan_P.copy()
    for _ in range(4 * space.positions):
        over = float(burden(space, plan_P[None])[0])
        if over <= 0:
            return plan_P
        options = neighbours(space, plan_P, held)
        relief = over - burden(space, options)
        options, relief = options[relief > 1e-12], relief[relief > 1e-12]
        if not len(options):
            return None
        # More than what is needed is worth nothing.
        harm = predict(options) - predict(plan_P[None])[0]
        rate = np.where(harm > 0, harm / relief, harm)
        plan_P = options[int(np.argmin(rate))]
    return plan_P if burden(space, plan_P[None])[0] <= 0 else None


def fill(space: Space, plan_P: Ints, predict: Predict, steps: int = 32) -> Ints:
    """Spend slack: the one change that lowers the predicted error most and still holds the limits, until none does."""
    plan_P = plan_P.copy()
    current = float(predict(plan_P[None])[0])
    for _ in range(steps):
        options = neighbours(space, plan_P)
        options = options[space.feasible(options)]
        if not len(options):
            break
        errors = predict(options)
        best = int(np.argmin(errors))
        if errors[best] >= current * (1 - 1e-9):
            break
        plan_P, current = options[best], float(errors[best])
    return plan_P


def trades(
    space: Space,
    plan_P: Ints,
    change_MS: NDArray[np.floating[Any]],
    options_MP: Ints,
    base_S: NDArray[np.floating[Any]],
    most: int,
) -> Ints:
    """Pairs of single changes, one paying for the other, with the least first-order error that hold the limits.

    Args:
        space: the limits.
        plan_P: the plan to start from.
        change_MS: what each single change in `options_MP` does to the output.
        options_MP: neighbours of the plan.
        base_S: the plan's own change of the output.
        most: how many to return.

    Returns:
        Plans [<= most, P], best first.
    """
    position_M = np.argmax(options_MP != plan_P, axis=1)
    gram = change_MS @ change_MS.T
    single_M = 2 * change_MS @ base_S + np.diag(gram)
    pair_MM = single_M[:, None] + single_M[None, :] + 2 * gram
    allowed = position_M[:, None] < position_M[None, :]
    for coefficients_PC, limit in space.rows_of_constraints.values():
        start = float(pick(coefficients_PC, plan_P).sum())
        with np.errstate(invalid="ignore"):
            delta_M = pick(coefficients_PC, options_MP).sum(1) - start
            allowed &= start + delta_M[:, None] + delta_M[None, :] <= limit + 1e-9 * abs(limit)
    pair_MM = np.where(allowed, pair_MM, np.inf)
    flat = pair_MM.ravel()
    count = min(most, int(np.isfinite(flat).sum()))
    if not count:
        return np.zeros((0, space.positions), dtype=np.int64)
    order = np.argpartition(flat, count - 1)[:count]
    order = order[np.argsort(flat[order], kind="stable")]
    first, second = np.unravel_index(order, pair_MM.shape)
    plans = options_MP[first].copy()
    plans[np.arange(count), position_M[second]] = options_MP[second, position_M[second]]
    return plans[space.feasible(plans)]
