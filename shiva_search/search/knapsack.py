"""The exact core: with additive cost and separable error, the best plan is a multiple-choice knapsack, solved by HiGHS.

In: a space and an error for each (position, choice). Out: the plan of least error that holds every limit, with its
proven gap; or the floor and the limit that binds. Legend: P positions, C choices.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack

from shiva_search.errors import InfeasibleBudgetError, ShivaError
from shiva_search.records.budget import option_name
from shiva_search.search.candidates import Floats, Ints, Space

_ONE_AT_A_TIME = threading.Lock()  # stdout is the whole process's
#: metric -> (what to call it, unit)
_SAID = {
    "latency_ms": ("latency", "ms"),
    "energy_j": ("energy", "J"),
    "power_w": ("power", "W"),
    "memory_mib": ("memory", "MiB"),
    "gflops": ("FLOP", "GFLOP"),
    "mean_keep": ("mean keep", ""),
}
#: What the profile measured and the cost model predicts; operations and tokens are counted.
_PREDICTED = ("latency_ms", "energy_j", "power_w", "memory_mib")
#: What a user may well have asked for as a share of the dense model.
_SHARED = ("latency_ms", "energy_j", "gflops")
#: HiGHS holds constraints to 1e-6 in absolute terms; in these units that is far below the tolerance of the space.
_SCALE = 1e4


@dataclass(frozen=True)
class Solution:
    """A solved knapsack.

    Attributes:
        plan_P: choice indices by position.
        error: sum of the chosen errors.
        gap: proven relative distance to the optimum; 0 is optimal.
    """

    plan_P: Ints
    error: float
    gap: float


def solve(space: Space, errors_PC: Floats, *, time_limit_s: float = 60.0) -> Solution:
    """The plan of least total error that holds all limits of the space.

    Args:
        space: choices, costs, limits.
        errors_PC: error added by each choice [P, C], any finite number; cells beyond a position's choices are ignored.
        time_limit_s: HiGHS stops here with the best plan found and its gap.

    Raises:
        InfeasibleBudgetError: no plan fits; names the floor and the limit that binds.
    """
    found = _solve(space, errors_PC, time_limit_s)
    if found is None:
        raise explain(space)
    return found


def solve_front(
    space: Space,
    errors_PC: Floats,
    metric: str = "latency_ms",
    points: int = 16,
    span: tuple[float, float] = (0.0, 1.0),
) -> list[Solution]:
    """The exact front of error against one metric: solved again along limits from the floor to the dense model.

    Args:
        space: other limits of the space hold as well.
        errors_PC: as in `solve`.
        metric: an additive metric.
        points: limits to try; equal solutions are returned once.
        span: the part of the way from floor (0) to dense (1).
    """
    others = {name: limit for name, limit in space.limits.items() if name != metric}
    free = space.with_limits(**others)
    low = floor(free, metric)
    if low is None:
        return []
    high = float(space.total(metric, space.dense[None])[0])
    solutions: dict[bytes, Solution] = {}
    for share in np.linspace(*span, points):
        limited = space.with_limits(**others, **{metric: (low + share * (high - low)) * (1 + 1e-9)})
        found = _solve(limited, errors_PC, 60.0)
        if found is not None:
            solutions.setdefault(found.plan_P.tobytes(), found)
    return list(solutions.values())


def cheapest(space: Space, metric: str) -> Ints | None:
    """The plan of least `metric` that holds the other limits [P]; None where these alone cannot be held."""
    others = space.with_limits(**{name: limit for name, limit in space.limits.items() if name != metric})
    if metric == "power_w":
        return _least_power(others)
    if metric == "memory_mib":
        return _least_memory(others)
    found = _solve(others, space.tables[metric], 60.0)
    return None if found is None else found.plan_P


def floor(space: Space, metric: str) -> float | None:
    """The least value of `metric` under the other limits; None where these alone cannot be held."""
    plan_P = cheapest(space, metric)
    return None if plan_P is None else float(space.total(metric, plan_P[None])[0])


def explain(space: Space) -> InfeasibleBudgetError:
    """Why no plan fits: the limit that cannot be held alone, else the one that the others push out of reach."""
    for metric in space.limits:
        alone = space.with_limits(**{metric: space.limits[metric]})
        plan_P = cheapest(alone, metric)
        assert plan_P is not None  # nothing else is limited
        if alone.excess(plan_P[None]).popitem()[1][0] > 0:
            return infeasible(space, metric, plan_P, describe(space, plan_P))
    for metric in space.limits:
        plan_P = cheapest(space, metric)
        if plan_P is not None:
            others = ", ".join(_SAID[name][0] for name in space.limits if name != metric)
            return infeasible(space, metric, plan_P, f"{describe(space, plan_P)}, with the budget on {others} held")
    named = ", ".join(f"{_SAID[metric][0]} {said(metric, limit)}" for metric, limit in space.limits.items())
    return InfeasibleBudgetError(f"no plan holds these budgets together: {named}; raise two of them or drop one")


def infeasible(space: Space, metric: str, plan_P: Ints, where: str) -> InfeasibleBudgetError:
    """The refusal that names budget, floor and next step.

    Args:
        plan_P: the plan at the floor [P].
        where: that plan in words.
    """
    least = float(space.total(metric, plan_P[None])[0])
    dense = float(space.total(metric, space.dense[None])[0])
    share = f", {math.ceil(1000 * least / dense) / 10:.1f} % of dense" if metric in _SHARED and dense else ""
    if metric in space.spread:
        low, high = (said(metric, least * share) for share in space.spread[metric])
        where = f"predicted, 90 % interval {low} to {high}; {where}"
    elif metric in _PREDICTED:
        where = f"predicted; {where}"
    more = " or allow fewer tokens with a lower --min-keep" if _fewer_may_do(space, metric) else ""
    return InfeasibleBudgetError(
        f"{_SAID[metric][0]} budget {said(metric, space.limits[metric])} is below this model's floor of "
        f"{said(metric, least, up=True)}{share} ({where}). Raise {option_name(metric)}{more}."
    )


def _fewer_may_do(space: Space, metric: str) -> bool:
    """Whether only a --min-keep rules out skipping blocks, and skipping all that may be would hold the limit."""
    if not len(space.free) or (space.kept[space.free, 0] == 0).any():
        return False
    held = np.flatnonzero(space.sizes == 1)

    def left(name: str) -> float:
        costs = space.tables[name][held, 0]
        return space.fixed[name] + float(costs.max() if name == "memory_mib" else costs.sum())

    least = 1e3 * left("energy_j") / left("latency_ms") if metric == "power_w" else left(metric)
    return least <= space.limits[metric]


def said(metric: str, value: float, up: bool = False) -> str:
    """A value with its unit, four digits; rounded up where a floor is named, so that the named figure is feasible."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    step = 10.0**-digits
    # Within the tolerance of the space, so that 10 does not become 10.01 by a rounding in the last bit.
    shown = math.ceil(value / step * (1 - 1e-10)) * step if up else value
    return f"{shown:.{max(digits, 0)}f} {_SAID[metric][1]}".strip()


def describe(space: Space, plan_P: Sequence[int] | Ints) -> str:
    """A plan in words."""
    rows = space.rows(plan_P)
    rest = {k for row in rows for k in row[1:]}
    if len(rest) == 1:
        return f"every layer but the first at {rest.pop()} tokens"
    return "tokens kept " + " / ".join(", ".join(map(str, row)) for row in rows)


def _solve(space: Space, errors_PC: Floats, time_limit_s: float) -> Solution | None:
    """`solve`, with None for infeasible. HiGHS rounds, so a plan that passes a limit by a hair is solved away."""
    margin = 0.0
    for _ in range(4):
        found = _solve_once(space, errors_PC, time_limit_s, margin)
        if found is None or space.feasible(found.plan_P[None])[0]:
            return found
        margin = 2 * margin + 1e-9
    return None


def _solve_once(space: Space, errors_PC: Floats, time_limit_s: float, margin: float) -> Solution | None:
    # One binary variable per cell; cells that pass the memory limit by themselves never enter.
    used = (np.arange(errors_PC.shape[1]) < space.sizes[:, None]) & ~space.too_big
    if not used.any(axis=1).all():
        return None
    rows = space.rows_of_constraints
    position, choice = np.nonzero(used)
    count = len(position)
    objective = errors_PC[position, choice].astype(float)
    # Only differences within a position matter; in units of the largest one HiGHS's absolute gap of 1e-6 is harmless.
    least_P = np.where(used, errors_PC, np.inf).min(axis=1)
    relative = objective - least_P[position]
    span = float(relative.max()) or 1.0
    one_each = coo_array((np.ones(count), (position, np.arange(count))), shape=(space.positions, count))
    constraints = [LinearConstraint(csr_array(one_each), 1, 1)]
    lines, limits = [], []
    for coefficients_PC, limit in rows.values():
        line = coefficients_PC[position, choice]
        # The least choice of each position is taken off, so that the row is about what is really to be decided.
        base_P = np.where(used, coefficients_PC, np.inf).min(axis=1)
        line, room = line - base_P[position], limit - base_P.sum()
        scale = _SCALE / max(float(line.max()), 1e-300)
        allowance = 1e-9 * abs(limit) - margin * abs(limit)
        if room + 1e-9 * abs(limit) < 0:
            return None
        lines.append(csr_array(line[None] * scale))
        limits.append((room + allowance) * scale)
    if lines:
        constraints.append(LinearConstraint(vstack(lines, format="csr"), -np.inf, np.array(limits)))
    with _ONE_AT_A_TIME, _printing_to_stderr():
        result = milp(
            relative / span * _SCALE,
            integrality=np.ones(count, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
    if result.status == 2:
        return None
    if result.x is None:
        raise ShivaError(f"the exact solver stopped without a plan: {result.message}; try again or drop a budget")
    plan_P = np.zeros(space.positions, dtype=np.int64)
    picked = np.asarray(result.x).reshape(-1)
    for p in range(space.positions):
        cells = np.flatnonzero(position == p)
        plan_P[p] = choice[cells[np.argmax(picked[cells])]]
    error = float(errors_PC[np.arange(space.positions), plan_P].sum())
    bound = float(result.mip_dual_bound) * span / _SCALE + float(least_P.sum())
    gap = max(0.0, (error - bound) / max(abs(error), 1e-12))
    return Solution(plan_P, error, gap if gap > 1e-7 else 0.0)


def _least_power(space: Space) -> Ints | None:
    """Least energy per latency: Dinkelbach's iteration on energy - power * latency, which ends in a few steps."""
    power_w, best = math.inf, None
    energy_PC, latency_PC = (
        np.where(np.isfinite(t), t, 0.0) for t in (space.tables["energy_j"], space.tables["latency_ms"])
    )
    for _ in range(50):
        weight = 1e-3 * (power_w if best is not None else 0.0)
        found = _solve(space, energy_PC - weight * latency_PC, 60.0)
        if found is None:
            return None
        reached = float(space.total("power_w", found.plan_P[None])[0])
        if best is not None and reached >= power_w * (1 - 1e-12):
            return best
        power_w, best = reached, found.plan_P
    return best


def _least_memory(space: Space) -> Ints | None:
    """Least peak: the smallest of the peaks that occur at which a plan still fits, by bisection."""
    table = space.tables["memory_mib"]
    peaks = np.unique(table[np.isfinite(table)]) + space.fixed["memory_mib"]
    low, high, best = 0, len(peaks) - 1, None
    while low <= high:
        middle = (low + high) // 2
        found = _solve(space.with_limits(**space.limits, memory_mib=float(peaks[middle])), np.zeros_like(table), 60.0)
        if found is None:
            low = middle + 1
        else:
            high, best = middle - 1, found.plan_P
    return best


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Sends what C code prints to stderr: stdout is for answers, and HiGHS prints lines even if silenced.

    See https://github.com/jump-dev/HiGHS.jl/issues/312.
    """
    flush = ctypes.CDLL(None).fflush
    try:
        os.fstat(2)
        stdout = os.dup(1)
    except OSError:  # one of them is closed
        yield
        return
    try:
        flush(None)
        os.dup2(2, 1)
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
