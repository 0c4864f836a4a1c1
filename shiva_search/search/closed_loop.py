"""The closed loop: the plan is measured, the error of the prediction fed back, until the budget holds as measured.

In: judged plans, a cost model, a budget, a way to measure. Out: a plan whose measurement holds the budget, with every
round on record. What the measurement leaves unused is then spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shiva_search.errors import InfeasibleBudgetError
from shiva_search.records.budget import Budget
from shiva_search.records.cost import COST_FIELD
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.search.candidates import CONSTRAINT_NAMES, Ints, PlanCost, Space
from shiva_search.search.knapsack import cheapest, said

#: Rounds until the budget holds, and rounds to spend what is left.
MOST_ROUNDS, SPEND_ROUNDS = 8, 3
#: Slack below this share of the limit is not worth another measurement.
SLACK = 0.01
#: Aimed for below the limit, so that a fresh measurement holds it as well: of what is judged by an interval; of energy
#: and power, which are known to a hundredth or two after a few seconds; and of memory, the same each time: a limit of
#: what the dense blocks need is one that they hold.
_MARGIN, _MARGINS = 0.002, {"energy_j": 0.01, "power_w": 0.01, "memory_mib": 0.0}
#: Memory up to this much over a limit is as much as the limit: what any plan holds during a forward (its times and a
#: flag, two blocks of an allocator that gives 512 bytes at least).
_SAME_MIB = 2**-10
#: What each round that missed a limit adds for that limit, at most, but for the first: it tells of the prediction,
#: which is corrected, not of the clock.
_TIGHTER = 0.005


class Chooser(Protocol):
    """Picks plans under changed costs (pool.Pool)."""

    def choose(self, space: Space, without: frozenset[bytes]) -> tuple[Ints, float] | None:
        """The best known plan that holds the space's limits and cannot be topped up, and its error."""
        ...

    def error_of(self, plan_P: Ints) -> float:
        """Error of a plan, judged now where it is not known."""
        ...


@dataclass
class Closed:
    """What the loop came to.

    Attributes:
        plan_P, error: the plan.
        cost: with all corrections.
        space: costs and limits as corrected: what the plan was last chosen by.
        measurement: the one that holds the budget; where none did, the one that came nearest.
        rounds: every round: round, tokens_kept, predicted_ratio, measured_ratio, holds, ...
        measured: by plan, its measurement.
        broken: where no plan held the budget, what there is to say of that; None otherwise.
    """

    plan_P: Ints
    error: float
    cost: PlanCost
    space: Space
    measurement: Measurement
    rounds: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[bytes, Measurement] = field(default_factory=dict)
    broken: str | None = None


def holds(budget: Budget, measurement: Measurement) -> bool:
    """Whether a plan holds its budget as measured.

    Shares of the dense model's latency are judged by the upper end of the measured ratio's interval, other shares by
    the measured values of both, absolute limits by the measured value; memory to a KiB. What could not be measured
    breaks nothing.
    """
    return all(used <= 1.0 for used in usage(budget, measurement).values())


def usage(budget: Budget, measurement: Measurement, *, cautious: bool = False) -> dict[str, float]:
    """By metric: the share of the limit that a measured plan uses; above 1 breaks it.

    Args:
        budget: shares and absolute limits; a metric with both counts by the tighter.
        measurement: of the plan.
        cautious: take the upper end of the latency's interval for absolute limits as well.
    """
    used: dict[str, float] = {}
    for metric, limit in budget.limits().items():
        if metric == "mean_keep":
            rows = measurement.tokens_kept
            value: float | None = sum(map(sum, rows)) / (len(rows) * len(rows[0]) * rows[0][0])
        elif metric == "latency_ms" and cautious:
            value = max(measurement.latency_ms, measurement.latency_ms_high)
        else:
            value = getattr(measurement, COST_FIELD[metric])
        if value is not None:
            used[metric] = _part(metric, value, limit)
    for metric, share in budget.shares.items():
        if metric == "latency_ms":
            value, dense = measurement.ratio_high, 1.0
        else:
            value = getattr(measurement, COST_FIELD[metric])
            dense = getattr(measurement, f"dense_{COST_FIELD[metric]}")
        if value is not None and dense:
            used[metric] = max(used.get(metric, 0.0), _part(metric, value, share * dense))
    return used


def _part(metric: str, value: float, limit: float) -> float:
    """What a value uses of a limit; of memory, exactly 1 up to a KiB over it."""
    return 1.0 if metric == "memory_mib" and 0 < value - limit <= _SAME_MIB else value / limit


def close_loop(
    pool: Chooser,
    cost: PlanCost,
    budget: Budget,
    measure: Callable[[Plan], Measurement],
    *,
    space_of: Callable[[PlanCost, Mapping[str, float]], Space],
    plan_of: Callable[[Ints], Plan],
    progress: Callable[[str], None] | None = None,
) -> Closed:
    """Measure, correct, choose again, until the budget holds; then spend the slack.

    Args:
        pool: chooses plans.
        cost: the cost model before any correction.
        budget: what was asked for.
        measure: applies a plan on the device and measures it interleaved with the dense model.
        space_of: (cost model, factor on each limit by metric) -> the space to choose in.
        plan_of: choice indices -> the plan.
        progress: told after every round.

    Returns:
        The best plan that holds the budget as measured; where the floor itself breaks it, or the rounds are used up,
        the one that came nearest, and `broken` says so.
    """
    say = progress or (lambda line: None)
    scale: dict[str, float] = {}
    failed: frozenset[bytes] = frozenset()
    missed: dict[str, list[float]] = {}  # by metric: by what share of the limit rounds missed it
    rounds: list[dict[str, Any]] = []
    measured: dict[bytes, Measurement] = {}
    held: Closed | None = None
    nearest: Closed | None = None
    least_use = float("inf")
    spent = 0
    space = space_of(cost, scale)
    while len(rounds) < MOST_ROUNDS + SPEND_ROUNDS:
        try:
            chosen = pool.choose(space, failed)
        except InfeasibleBudgetError:
            chosen = None
        if held is not None:
            better = chosen is not None and chosen[1] < held.error * (1 - 1e-9)
            if not better or spent >= SPEND_ROUNDS or chosen is None:
                break
            spent += 1
        elif chosen is None or len(failed) >= MOST_ROUNDS:
            last = _last_resort(space)
            if last.tobytes() in failed:
                break
            chosen = last, pool.error_of(last)
        plan_P, error = chosen
        plan = plan_of(plan_P)
        predicted = cost.predict(plan)
        measurement = measure(plan)
        measured[plan_P.tobytes()] = measurement
        ok = holds(budget, measurement)
        cost = cost.corrected(plan, measurement.ratio)
        rounds.append(_round(len(rounds) + 1, plan, predicted.latency_ms, cost, measurement, budget, ok))
        used = usage(budget, measurement, cautious=True)
        most = max(used, key=lambda metric: used[metric], default="latency_ms")
        how = "replayed" if measurement.replayed else "measured"
        say(
            f"round {len(rounds)}: predicted {rounds[-1]['predicted_ratio']:.1%}, {how} {measurement.ratio:.1%} of "
            f"the dense latency (at most {measurement.ratio_high:.1%}), {'holds' if ok else 'breaks'} the budget "
            f"({used.get(most, 0.0):.1%} of its {CONSTRAINT_NAMES[most].replace('_', ' ')} used at most)"
        )
        if not ok:
            failed |= {plan_P.tobytes()}
            for metric, share in used.items():
                if share > 1.0:
                    missed.setdefault(metric, []).append(share - 1.0)
            use = max(rounds[-1]["used"].values())
            if use < least_use:
                least_use, nearest = use, Closed(plan_P, error, cost, space, measurement)
        scale = _rescaled(scale, space_of(cost, {}), plan_P, used, missed)
        space = space_of(cost, scale)
        if ok and (held is None or error < held.error):
            held = Closed(plan_P, error, cost, space, measurement)
            if 1.0 - max(used.values(), default=1.0) < SLACK:
                break
    found = held or nearest
    assert (
        found is not None
    )  # the cheapest plan is always there to be tried, and a round ends with the one or the other
    found.cost, found.space, found.rounds, found.measured = cost, space, rounds, measured
    if held is None:
        found.broken = _said_of(budget, rounds)
    return found


def _rescaled(
    before: Mapping[str, float],
    space: Space,
    plan_P: Ints,
    used: Mapping[str, float],
    missed: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Factors on the limits, so that what this plan is now predicted to use of them is what it was measured to use."""
    scale = dict(before)
    for metric, measured_use in used.items():
        if metric not in space.limits or metric == "mean_keep":  # what is counted is not off
            continue
        predicted_use = float(space.total(metric, plan_P[None])[0]) / space.limits[metric]
        room = _MARGINS.get(metric, _MARGIN) + sum(min(_TIGHTER, over) for over in missed.get(metric, ())[1:])
        scale[metric] = predicted_use / max(measured_use, 1e-9) * (1 - room)
    return scale


def _last_resort(space: Space) -> Ints:
    """The cheapest plan there is: if it breaks the budget, every plan does."""
    metric = next((m for m in space.limits if m in space.tables), "latency_ms")
    plan_P = cheapest(space.with_limits(), metric)
    assert plan_P is not None  # nothing is asked of it
    return plan_P


def _round(
    number: int,
    plan: Plan,
    predicted_ms: float | None,
    cost: PlanCost,
    measurement: Measurement,
    budget: Budget,
    ok: bool,
) -> dict[str, Any]:
    dense_ms = cost.dense.latency_ms
    return {
        "round": number,
        **plan.as_columns(),
        "predicted_latency_ms": predicted_ms,
        "predicted_ratio": predicted_ms / dense_ms if predicted_ms is not None and dense_ms else float("nan"),
        "measured_latency_ms": measurement.latency_ms,
        "measured_ratio": measurement.ratio,
        "measured_ratio_high": measurement.ratio_high,
        "used": usage(budget, measurement),
        "holds": ok,
    }


def _said_of(budget: Budget, rounds: list[dict[str, Any]]) -> str:
    """One line on a budget that no measured plan held."""
    last = min(rounds, key=lambda row: max(row["used"].values(), default=0.0))
    metric = max(last["used"], key=lambda name: last["used"][name])
    limit = budget.limits().get(metric)
    asked = said(metric, limit) if limit is not None else f"{budget.shares[metric]:.1%} of dense"
    measured = "the only plan measured" if len(rounds) == 1 else f"the best of {len(rounds)} plans measured"
    name = CONSTRAINT_NAMES[metric].replace("_", " ")
    return (
        f"{measured} still uses {last['used'][metric]:.1%} of the {name} budget of {asked} "
        f"({last['measured_latency_ms']:.2f} ms, {last['measured_ratio']:.1%} of dense); "
        "raise the budget, or measure on a quieter machine"
    )
