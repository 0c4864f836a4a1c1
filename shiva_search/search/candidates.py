"""The space of plans. In: a model's shape, a cost model, a budget. Out: choices per position with their additive costs.

A position is a (segment, layer) pair, numbered segment by segment. A plan in this room is a vector of choice indices,
one per position, so that costs and constraints of many plans are one table look-up.

Legend: M plans, P positions, C choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shiva_search.errors import InputError, UnavailableError
from shiva_search.records.budget import Budget
from shiva_search.records.cost import CostEstimate
from shiva_search.records.plan import PLAIN, Kept, Plan, Planned, row_as_json, row_from_json

Rows = tuple[tuple[int, ...], ...]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Metrics that add up over layers; power is energy over latency, memory is a maximum.
SUMS = ("latency_ms", "energy_j", "gflops", "mean_keep")
#: Metric -> the name of its constraint in studies and in trials.csv.
CONSTRAINT_NAMES = {
    "latency_ms": "latency",
    "energy_j": "energy",
    "power_w": "power",
    "memory_mib": "memory",
    "gflops": "flops",
    "mean_keep": "mean_keep",
}
#: A limit is held when it is not passed by more than this share: the noise of summing floats in another order.
TOLERANCE = 1e-9


class PlanCost(Protocol):
    """What the search asks of a cost model (cost.CostModel is one)."""

    @property
    def dense(self) -> CostEstimate: ...

    def predict(self, plan: Plan) -> CostEstimate: ...

    def layer_cost(self, metric: str, layer: int, k: int) -> float | None: ...

    def fixed(self, metric: str) -> float | None: ...

    def candidates(self, min_keep: float | None = None) -> tuple[int, ...]: ...

    def corrected(self, plan: Plan, measured_ratio: float) -> PlanCost: ...


@dataclass(frozen=True)
class Space:
    """All plans that may be chosen, what they cost and what they must not exceed.

    Attributes:
        tokens: image tokens N.
        layers: number of layers L.
        weights: share of time of each segment, adding up to 1.
        choices: what layer l may do, dearest last, which keeps all tokens; the first layer has this alone.
        cost: by metric (SUMS and "memory_mib"), by layer: cost of each choice.
        fixed: by metric: what no choice changes.
        limits: absolute limits by budget metric.
        spread: by metric: low and high end of a prediction's interval, as shares of the prediction, where known. Said
            with a floor; it decides nothing, so it is no part of the problem (as_dict).
    """

    tokens: int
    layers: int
    weights: tuple[float, ...]
    choices: tuple[tuple[int, ...], ...]
    cost: Mapping[str, tuple[tuple[float, ...], ...]]
    fixed: Mapping[str, float]
    limits: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)

    @property
    def segments(self) -> int:
        """Number of timestep segments."""
        return len(self.weights)

    @property
    def positions(self) -> int:
        """Number of (segment, layer) pairs P."""
        return self.segments * self.layers

    @cached_property
    def sizes(self) -> Ints:
        """Number of choices at each position [P]."""
        return np.array([len(self.choices[p % self.layers]) for p in range(self.positions)])

    @cached_property
    def free(self) -> Ints:
        """Positions with more than one choice."""
        return np.flatnonzero(self.sizes > 1)

    @cached_property
    def kept(self) -> Ints:
        """Tokens kept by position and choice [P, C]; unused cells repeat the last choice."""
        width = int(self.sizes.max())
        rows = [[*c, *[c[-1]] * (width - len(c))] for c in self.choices]
        return np.tile(np.array(rows), (self.segments, 1))

    def table(self, metric: str) -> Floats:
        """What a choice at a position adds to an additive metric [P, C], mean over segments; unused cells: infinity."""
        table = np.full(self.kept.shape, np.inf)
        for position in range(self.positions):
            segment, layer = divmod(position, self.layers)
            costs = self.cost[metric][layer]
            table[position, : len(costs)] = self.weights[segment] * np.asarray(costs)
        return table

    @cached_property
    def tables(self) -> dict[str, Floats]:
        """`table` of every metric that is known."""
        return {metric: self.table(metric) for metric in self.cost}

    @cached_property
    def rows_of_constraints(self) -> dict[str, tuple[Floats, float]]:
        """The linear constraints: by budget metric, coefficients [P, C] and the limit on their sum.

        Power is energy <= power * latency, which is linear too; for memory see `too_big`.
        """
        rows = {}
        for metric, limit in self.limits.items():
            if metric in SUMS:
                rows[metric] = (self.tables[metric], limit - self.fixed[metric])
            elif metric == "power_w":
                # 1 W for 1 ms is 1e-3 J.
                slack = limit * self.fixed["latency_ms"] * 1e-3 - self.fixed["energy_j"]
                with np.errstate(invalid="ignore"):
                    table = self.tables["energy_j"] - limit * 1e-3 * self.tables["latency_ms"]
                rows[metric] = (np.where(np.isnan(table), np.inf, table), slack)
        return rows

    @cached_property
    def too_big(self) -> NDArray[np.bool_]:
        """Choices that alone pass the memory limit [P, C]."""
        if "memory_mib" not in self.limits:
            return np.zeros(self.kept.shape, dtype=bool)
        return self.fixed["memory_mib"] + self.tables["memory_mib"] > self.limits["memory_mib"] * (1 + TOLERANCE)

    def total(self, metric: str, plans_MP: Ints) -> Floats:
        """A metric of each plan [M]; power is derived from energy and latency."""
        if metric == "power_w":
            return self.total("energy_j", plans_MP) / (1e-3 * self.total("latency_ms", plans_MP))
        if metric == "memory_mib":
            return self.fixed[metric] + pick(self.tables[metric], plans_MP).max(axis=-1)
        return self.fixed[metric] + pick(self.tables[metric], plans_MP).sum(axis=-1)

    def excess(self, plans_MP: Ints) -> dict[str, Floats]:
        """By constraint name: the share by which each plan passes the limit [M]; zero or less holds it."""
        return {
            CONSTRAINT_NAMES[metric]: self.total(metric, plans_MP) / limit - 1.0 - TOLERANCE
            for metric, limit in self.limits.items()
        }

    def feasible(self, plans_MP: Ints) -> NDArray[np.bool_]:
        """Whether each plan holds all limits [M]."""
        verdict = np.ones(len(plans_MP), dtype=bool)
        for value in self.excess(plans_MP).values():
            verdict &= value <= 0
        return verdict

    @cached_property
    def dense(self) -> Ints:
        """The plan that keeps all tokens [P]."""
        return self.sizes - 1

    def rows(self, plan_P: Sequence[int] | Ints) -> Rows:
        """Choice indices to tokens kept, a row per segment."""
        kept = [self.choices[p % self.layers][int(c)] for p, c in enumerate(plan_P)]
        return tuple(tuple(kept[s * self.layers : (s + 1) * self.layers]) for s in range(self.segments))

    def indices(self, rows: Sequence[Sequence[int]]) -> Ints | None:
        """Tokens kept to choice indices [P]; None where a value is not among the choices."""
        try:
            found = [self.choices[layer].index(k) for row in rows for layer, k in enumerate(row)]
        except ValueError:
            return None
        return np.array(found) if len(found) == self.positions else None

    def only(self, keep: Sequence[Sequence[int]]) -> Space:
        """This space with some choices of each layer, by index, in that order."""

        def cut(rows: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
            return tuple(tuple(row[i] for i in kept) for row, kept in zip(rows, keep, strict=True))

        cost = {metric: cut(table) for metric, table in self.cost.items()}
        return replace(self, choices=cut(self.choices), cost=cost)

    def with_limits(self, **limits: float) -> Space:
        """This space under other limits (by metric)."""
        return replace(self, limits=dict(limits))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, so that every worker of a study has the same space."""
        return {
            "tokens": self.tokens,
            "layers": self.layers,
            "weights": list(self.weights),
            "choices": [row_as_json(c) for c in self.choices],
            "cost": {metric: [list(c) for c in table] for metric, table in self.cost.items()},
            "fixed": dict(self.fixed),
            "limits": dict(self.limits),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """Inverse of as_dict."""
        return cls(
            tokens=values["tokens"],
            layers=values["layers"],
            weights=tuple(values["weights"]),
            choices=tuple(map(row_from_json, values["choices"])),
            cost={metric: tuple(tuple(c) for c in table) for metric, table in values["cost"].items()},
            fixed=dict(values["fixed"]),
            limits=dict(values["limits"]),
        )


def pick(table_PC: Floats, plans_MP: Ints) -> Floats:
    """The chosen cell of each position [M, P]."""
    plans_MP = np.atleast_2d(plans_MP)
    return table_PC[np.arange(plans_MP.shape[1]), plans_MP]


def check_layout(min_keep: float | None, segments: int) -> None:
    """Refuse what no space can be laid out with.

    Raises:
        InputError: min_keep or segments out of range.
    """
    if min_keep is not None and not 0 < min_keep <= 1:
        raise InputError(f"--min-keep is a share of tokens in (0, 1], got {min_keep}; write for example 0.1")
    if segments < 1:
        raise InputError(f"--segments must be at least 1, got {segments}")


def build_space(
    model: Planned,
    cost: PlanCost,
    budget: Budget,
    *,
    min_keep: float | None = None,
    segments: Sequence[tuple[float, float]] | int = 1,
    variants: Sequence[Sequence[tuple[str, int]]] = (),
) -> Space:
    """Lay out the choices of every layer and what each costs.

    Args:
        model: tokens and layer count.
        cost: additive costs by layer and tokens kept.
        budget: limits, absolute or as shares of `cost.dense`; an empty one limits nothing.
        min_keep: smallest share of tokens a layer may keep, in (0, 1]; also rules out skipping a block (k = 0).
        segments: timestep segments as intervals of [0, 1], or how many equal ones.
        variants: by layer, what its choices may do besides keeping tokens, as (attend, bypass rank); none: plain ones.

    Raises:
        InputError: min_keep or segments out of range.
        UnavailableError: a limit is on a quantity this profile lacks.
    """
    check_layout(min_keep, segments if isinstance(segments, int) else len(segments))
    if isinstance(segments, int):
        segments = [(i / segments, (i + 1) / segments) for i in range(segments)]
    floor = 0 if min_keep is None else min_keep * model.tokens
    variants = variants or [[PLAIN]] * model.layer_count
    known = sorted({k for k in cost.candidates(min_keep) if floor <= k <= model.tokens} | {model.tokens})
    space = Space(
        tokens=model.tokens,
        layers=model.layer_count,
        weights=tuple(high - low for low, high in segments),
        choices=((model.tokens,), *(_choices(known, model.tokens, row) for row in variants[1:])),
        cost={},
        fixed={},
    )
    return priced(space, cost, budget.resolve(cost.dense).limits())


def _choices(counts: Sequence[int], tokens: int, variants: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """Every count in every variant that differs there, by count; all tokens alone come last."""
    pruned = [
        Kept(k, rank, attend)
        for k in counts
        for attend, rank in variants
        if k < tokens and not (k == 0 and attend == "all")  # where no token is kept, none attends
    ]
    return (*pruned, Kept(tokens))


def priced(space: Space, cost: PlanCost, limits: Mapping[str, float]) -> Space:
    """The same choices with the costs of a cost model, under the given absolute limits.

    Raises:
        UnavailableError: the cost model knows a metric only of some layers.
    """
    tables = {"mean_keep": tuple(tuple(int(k) / (space.tokens * space.layers) for k in ks) for ks in space.choices)}
    fixed = {"mean_keep": 0.0}
    for metric in ("latency_ms", "energy_j", "gflops", "memory_mib"):
        rest = cost.fixed(metric)
        if rest is not None and cost.layer_cost(metric, 0, space.tokens) is not None:
            fixed[metric] = rest
            tables[metric] = tuple(
                tuple(_known(cost, metric, layer, k) for k in ks) for layer, ks in enumerate(space.choices)
            )
    return replace(space, cost=tables, fixed=fixed, limits=dict(limits), spread=_spread(cost.dense))


def _spread(dense: CostEstimate) -> dict[str, tuple[float, float]]:
    if not dense.latency_ms or dense.latency_ms_low is None or dense.latency_ms_high is None:
        return {}
    return {"latency_ms": (dense.latency_ms_low / dense.latency_ms, dense.latency_ms_high / dense.latency_ms)}


def _known(cost: PlanCost, metric: str, layer: int, k: int) -> float:
    value = cost.layer_cost(metric, layer, k)
    if value is None:
        raise UnavailableError(
            f"the profile knows no {metric} of layer {layer} at {k} tokens; run `shiva-search profile` again"
        )
    return value
