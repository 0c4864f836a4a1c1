"""search(): ties the room together. In: model, cost model, budget. Out: a plan that holds it, the front, all trials."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage
from torch import nn

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.model import Model
from shiva_search.records.budget import Budget
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan, Planned
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.candidates import Ints, PlanCost, Space, build_space, priced
from shiva_search.search.closed_loop import Closed, close_loop, holds
from shiva_search.search.fidelity import FidelityEvaluator
from shiva_search.search.knapsack import explain, floor, solve, solve_front
from shiva_search.search.pareto import (
    choice_columns,
    constraint_columns,
    cost_columns,
    non_dominated,
    pareto_row,
)
from shiva_search.search.sensitivity import measure_effects, reduced
from shiva_search.search.study import PlanStudy, Record, create, open_storage, read_problem, share_problem
from shiva_search.search.trade_sampler import TradeSampler

Progress = Callable[[str], None]

SAMPLES, CHUNK = 64, 16
#: Plans judged anew when the closed loop changes the costs.
_REFINE = 6


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        plan: the chosen plan, with what is predicted of it, its error and the solver's gap.
        pareto: rows of pareto.csv.
        trials: rows of trials.csv.
        rounds: rounds of the closed loop, empty without `measure`.
        measurement: the last one of the chosen plan; None without `measure`.
        note: what is special, such as a dense model that fits already; None otherwise.
        cost: the cost model with the loop's corrections.
        study_name: for `shiva-search worker`.
        forwards: work spent, in forward passes of the dense model over the calibration batch.
    """

    plan: Plan
    pareto: list[dict[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    measurement: Measurement | None = None
    note: str | None = None
    cost: PlanCost | None = None
    study_name: str = ""
    forwards: float = 0.0


def check_attend(attend: str) -> None:
    """Raises InputError for an unknown attention."""
    if attend not in ("kept", "all", "free"):
        raise InputError(f"--attend is one of kept, all, free, got {attend!r}")


def variants_of(
    model: Model, cost: PlanCost, scorer: TokenScorer | str, attend: str = "free"
) -> list[list[tuple[str, int]]]:
    """What layers may do besides keeping tokens: the ranks of the scorer's bypasses, and the attentions they allow.

    Only what the cost model knows the cost of is on offer.

    Args:
        model: its layers say whether they can attend to all tokens.
        cost: names what it knows by `variants()`.
        scorer: with bypasses, or without.
        attend: "kept", "all" (where a layer can), or "free" for both.

    Raises:
        InputError: an unknown attention.
    """
    check_attend(attend)
    known = set(getattr(cost, "variants", lambda: ())())
    ranks = [0, *(rank for rank in getattr(scorer, "ranks", ()) if rank and f"rank {rank}" in known)]
    found = []
    for layer in model.layers:
        everyone = layer.attends_all and "all" in known and attend != "kept"
        modes = (["kept"] if attend != "all" or not everyone else []) + (["all"] if everyone else [])
        found.append([(mode, rank) for mode in modes for rank in ranks])
    return found


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


def search(
    model: Model,
    cost: PlanCost,
    budget: Budget,
    *,
    trials: int = 100,
    seed: int = 0,
    scorer: TokenScorer | str = "stride",
    measure: Callable[[Plan], Measurement] | None = None,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    min_keep: float | None = None,
    segments: int = 1,
    sampler: str = "trade",
    attend: str = "free",
    folder: str | Path | None = None,
    samples: int = SAMPLES,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the tokens kept per layer with the least output error that hold the budget.

    Args:
        model: the dense model; judged on its calibration inputs.
        cost: predicts what plans cost.
        budget: limits that hold together.
        trials: plans to judge; those of an earlier, interrupted search of the same problem count.
        seed: same seed and same profile, same plan (one process).
        scorer: ranks tokens while plans are judged.
        measure: measures a plan on the device next to the dense model, closing the loop; None trusts the cost model.
        storage: any Optuna storage, a URL or a journal file; None: a journal in `folder`, or memory without one.
        study_name: None: from the problem.
        min_keep: smallest share of tokens a layer may keep; rules out skipping blocks.
        segments: timestep segments with a row of tokens kept each.
        sampler: trade, tpe, nsga2, nsga3, gp, cmaes or random.
        attend: whose keys kept tokens see where the cost model knows both: kept, all, or free to choose by layer.
        folder: where the journal is kept.
        samples, chunk: calibration inputs and how many run in one forward.
        progress: told short lines.

    Raises:
        InfeasibleBudgetError: no plan holds the budget; names floor and limit.
        BudgetBrokenError: none holds it as measured.
        InputError, UnavailableError: bad options, storage not there.
    """
    say = progress or (lambda line: None)
    if trials < 1:
        raise InputError(f"--trials must be at least 1, got {trials}")
    variants = variants_of(model, cost, scorer, attend)
    space = build_space(model, cost, budget, min_keep=min_keep, segments=segments, variants=variants)
    check_budget(model, cost, budget, min_keep=min_keep, segments=segments)
    dense = _dense_if_it_fits(model, cost, budget, space, measure, say)
    if dense is not None:
        return dense

    evaluator = evaluator_for(model, scorer, space, seed, samples, chunk)
    digest = _digest(model, scorer, space, samples, chunk, seed)
    if storage is None and folder is not None:
        storage = f"journal:{Path(folder) / '.search.journal'}"
    name = study_name or f"shiva-{digest[:12]}"
    study = create(name, open_storage(storage), 1 if sampler == "cmaes" else 2, digest)
    settings = {
        "seed": seed, "sampler": sampler, "trials": trials, "samples": samples, "chunk": chunk,
        "model": model.fingerprint(), "scorer": scorer_identity(scorer),
    }  # fmt: skip
    known = read_problem(study)
    if known is None:
        whole = measure_effects(evaluator, space, progress=progress)
        share_problem(study, *reduced(space, whole), settings)
        known = read_problem(study)
        assert known is not None
    elif study.user_attrs["settings"] != settings:
        study.set_user_attr("settings", settings)  # more trials, or another sampler on the same problem
    space, effects = priced(known[0], cost, space.limits), known[1]
    if storage is not None:
        say(f"study {study.study_name}; others may join with `shiva-search worker --study {study.study_name}`")
    plans = PlanStudy(study, space, effects, evaluator, settings, progress)
    exact = solve(space, effects.errors_PC)
    enqueue_start(plans, exact.plan_P, trials)
    plans.run(trials)

    pool = Pool(plans, seed)
    solver = {"optimality_gap": exact.gap, "status": "optimal" if exact.gap == 0 else "best found in time"}

    def plan_of(plan_P: Ints) -> Plan:
        kind = getattr(scorer, "bypass_kind", "affine")
        return Plan.from_rows(model, space.rows(plan_P), bypass_kind=kind, workload=model.workload.as_dict())

    closed: Closed | None = None
    if measure is None:
        chosen = pool.choose(space, frozenset())
        assert chosen is not None  # the exact solution holds all limits
        plan_P, error = chosen
    else:
        closed = close_loop(
            pool, cost, budget, measure, plan_of=plan_of, progress=progress,
            space_of=lambda corrected, scale: _scaled(space, corrected, budget, scale),
        )  # fmt: skip
        cost, plan_P, error = closed.cost, closed.plan_P, closed.error
    plan = plan_of(plan_P).with_(
        budget=budget.resolve(cost.dense).as_dict() | ({"shares": dict(budget.shares)} if budget.shares else {}),
        predicted=cost.predict(plan_of(plan_P)).as_dict(),
        fidelity={"error": error, "samples": samples, "split": "calibration", "scorer": scorer_identity(scorer)},
        solver=solver,
    )
    measured = closed.measured if closed else {}
    return SearchResult(
        plan=plan,
        pareto=_pareto(plans, cost, plan_of, plan_P, measured),
        trials=_trials(plans, cost, plan_of),
        rounds=closed.rounds if closed else [],
        measurement=closed.measurement if closed else None,
        cost=cost,
        study_name=study.study_name,
        forwards=evaluator.forwards,
    )


def join_study(
    storage: str | BaseStorage,
    study_name: str,
    model: Model,
    *,
    scorer: TokenScorer | str = "stride",
    trials: int | None = None,
    wait_s: float = 60.0,
    progress: Progress | None = None,
) -> int:
    """Judge plans of a search that another process started, until it has as many as it asked for.

    Args:
        storage: where the study is.
        study_name: as the search says it.
        model: the same model.
        scorer: the same scorer.
        trials: stop after this many here; None: when the study is complete.
        wait_s: how long the study may take to appear.
        progress: told short lines.

    Returns:
        Trials finished here.

    Raises:
        UnavailableError: no such study, or not prepared in time.
        InputError: another model or scorer than the study's.
    """
    opened = open_storage(storage)
    assert opened is not None  # None only where no storage is named
    until = time.monotonic() + wait_s
    while True:
        try:
            study: optuna.Study | None = optuna.load_study(study_name=study_name, storage=opened)
        except KeyError:
            study = None
        known = None if study is None else read_problem(study)
        if study is not None and known is not None:
            break
        if time.monotonic() > until:
            state = "is not prepared yet" if study is not None else "does not exist"
            raise UnavailableError(f"study {study_name!r} {state} in this storage; start the search first")
        time.sleep(min(1.0, wait_s))
    space, effects, settings = known
    differing = [
        name
        for name in ("architecture", "config_hash", "layers", "tokens", "weights_hash")
        if settings["model"].get(name) != model.fingerprint().get(name)
    ]
    if differing:
        raise InputError(f"this study is about another model ({', '.join(differing)} differ); load the same one")
    if settings["scorer"] != scorer_identity(scorer):
        raise InputError(
            f"this study judges with scorer {settings['scorer']}, not {scorer_identity(scorer)}; pass the same one"
        )
    evaluator = evaluator_for(model, scorer, space, settings["seed"], settings["samples"], settings["chunk"])
    # Workers that start from the same trials would propose the same plans; their seed tells them apart.
    own = {**settings, "seed": int(np.random.default_rng().integers(2**31))}
    plans = PlanStudy(study, space, effects, evaluator, own, progress)
    before = len(plans.records())
    plans.run(settings["trials"], trials)
    return len(plans.records()) - before


class Pool:
    """Chooses among judged plans, and judges a few more where costs have changed.

    Args:
        plans: the study.
        seed: of the proposals.
    """

    def __init__(self, plans: PlanStudy, seed: int) -> None:
        self.plans, self.seed, self._calls = plans, seed, 0

    def choose(self, space: Space, without: frozenset[bytes]) -> tuple[Ints, float] | None:
        """The plan of least error that holds the space's limits, with no slack left that a layer could use.

        Raises:
            InfeasibleBudgetError: no plan holds the limits.
        """
        exact = solve(space, self.plans.effects.errors_PC)
        if self._calls and exact.plan_P.tobytes() not in without:
            self.plans.judge(exact.plan_P, "corrected")
            self._refine(space, without)
        self._calls += 1
        best = self.plans.best(space, without)
        if best is None:
            best = self.plans.judge(exact.plan_P, "exact")
            if best.plan_P.tobytes() in without:
                return None
        best = self._top_up(space, best, without)
        return best.plan_P, best.error

    def _refine(self, space: Space, without: frozenset[bytes]) -> None:
        sampler = TradeSampler(space, self.plans.effects, self.seed, explore=0.0)
        rng = np.random.default_rng([self.seed, self._calls])
        for _ in range(_REFINE):
            records = self.plans.records()
            judged = [(r.plan_P, r.error, dict(r.attributes)) for r in records]
            tried = {r.plan_P.tobytes() for r in records} | without
            proposal = sampler.propose(judged, tried, rng)
            if sampler.exhausted:
                return
            self.plans.judge(proposal, "corrected")

    def _top_up(self, space: Space, record: Record, without: frozenset[bytes]) -> Record:
        """Raise single layers to their next choice while the limits hold and the judged error falls."""
        while True:
            plan_P = record.plan_P
            raised = np.repeat(plan_P[None], space.positions, axis=0) + np.eye(space.positions, dtype=np.int64)
            raised = raised[(raised < space.sizes).all(1)]
            raised = raised[space.feasible(raised)] if len(raised) else raised
            options = [self.plans.judge(row, "top-up") for row in raised if row.tobytes() not in without]
            better = min(options, key=lambda r: r.error, default=None)
            if better is None or better.error >= record.error:
                return record
            record = better


def scorer_identity(scorer: TokenScorer | str) -> str:
    """What tells two scorers apart: the name, or class and weights."""
    if isinstance(scorer, str):
        return scorer
    name = type(scorer).__name__ if not hasattr(scorer, "__qualname__") else str(scorer.__qualname__)
    if isinstance(scorer, nn.Module):
        digest = hashlib.sha256()
        for key, value in sorted(scorer.state_dict().items()):
            digest.update(key.encode() + value.detach().float().cpu().numpy().tobytes())
        return f"{name}-{digest.hexdigest()[:12]}"
    return name.lower() if not vars(scorer) else f"{name}-{sorted(vars(scorer).items())!r}"


def _dense_if_it_fits(
    model: Model,
    cost: PlanCost,
    budget: Budget,
    space: Space,
    measure: Callable[[Plan], Measurement] | None,
    say: Progress,
) -> SearchResult | None:
    if not space.feasible(space.dense[None])[0]:
        return None
    plan = Plan.from_rows(model, space.rows(space.dense), workload=model.workload.as_dict())
    measurement = None
    if measure is not None:
        measurement = measure(plan)
        if not holds(budget, measurement):
            say("the dense model should fit the budget and was measured not to; searching")
            return None
    note = "the dense model already fits the budget; the plan keeps all tokens"
    say(note)
    resolved = budget.resolve(cost.dense).as_dict() | ({"shares": dict(budget.shares)} if budget.shares else {})
    predicted = cost.predict(plan)
    plan = plan.with_(
        budget=resolved,
        predicted=predicted.as_dict(),
        fidelity={"error": 0.0, "samples": 0, "split": "calibration"},
        solver={"optimality_gap": 0.0, "status": "dense fits"},
    )
    row = pareto_row(plan, 0, 0.0, predicted, cost.dense, measurement)
    return SearchResult(plan, pareto=[{**row, "chosen": True}], measurement=measurement, note=note, cost=cost)


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


def _scaled(space: Space, cost: PlanCost, budget: Budget, scale: Mapping[str, float]) -> Space:
    """The same choices at corrected costs and scaled limits."""
    limits = budget.resolve(cost.dense).limits()
    return priced(space, cost, {metric: limit * scale.get(metric, 1.0) for metric, limit in limits.items()})


def enqueue_start(plans: PlanStudy, exact_P: Ints, trials: int) -> None:
    """The exact solution first, then exact solutions at budgets along the front."""
    plans.enqueue(exact_P, "exact")
    # A dozenth of the trials at most: the front is there for the picture and for what it teaches about other budgets.
    points = min(8, trials // 12)
    if points:
        metric = next((m for m in ("latency_ms", "energy_j", "gflops", "mean_keep") if m in plans.space.limits), None)
        metric = metric or ("latency_ms" if "latency_ms" in plans.space.tables else "mean_keep")
        for solution in solve_front(plans.space, plans.effects.errors_PC, metric, points, span=(0.05, 0.95)):
            plans.enqueue(solution.plan_P, "front")


def _trials(plans: PlanStudy, cost: PlanCost, plan_of: Callable[[Ints], Plan]) -> list[dict[str, Any]]:
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
                **choice_columns(plan),
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


def _pareto(
    plans: PlanStudy,
    cost: PlanCost,
    plan_of: Callable[[Ints], Plan],
    chosen_P: Ints,
    measured: Mapping[bytes, Measurement],
) -> list[dict[str, Any]]:
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


def _digest(model: Model, scorer: TokenScorer | str, space: Space, samples: int, chunk: int, seed: int) -> str:
    problem = [space.as_dict(), model.fingerprint(), scorer_identity(scorer), samples, chunk, seed]
    return hashlib.sha256(json.dumps(problem, sort_keys=True).encode()).hexdigest()
