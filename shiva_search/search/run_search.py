"""search(): ties the room together. In: model, cost model, budget. Out: a plan that holds it, the front, all trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from shiva_search.errors import BudgetBrokenError, InputError
from shiva_search.models.model import Model
from shiva_search.records.budget import Budget
from shiva_search.records.cost import CostEstimate
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.candidates import Ints, PlanCost, Space, build_space, priced
from shiva_search.search.closed_loop import Closed, close_loop, holds
from shiva_search.search.feasibility import check_budget
from shiva_search.search.identity import problem_digest, scorer_identity
from shiva_search.search.knapsack import solve
from shiva_search.search.pareto import front_rows, pareto_row, trial_rows
from shiva_search.search.pool import Pool
from shiva_search.search.sensitivity import Effects, measure_effects, reduced
from shiva_search.search.shared_problem import create, read_problem, share_problem
from shiva_search.search.starting import enqueue_start, evaluator_for
from shiva_search.search.storages import database_errors, open_storage
from shiva_search.search.study import PlanStudy
from shiva_search.search.variants import variants_of

Progress = Callable[[str], None]

SAMPLES, CHUNK = 64, 16


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
        effects: sensitivities of all choices, for another search with the same scorer; None where none were measured.
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
    effects: Effects | None = None


@database_errors()
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
    effects: Effects | None = None,
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
        effects: sensitivities found by an earlier search with the same scorer and inputs; measured where None, or where
            other choices were on offer then.
        progress: told short lines.

    Raises:
        InfeasibleBudgetError: no plan holds the budget; names floor and limit.
        BudgetBrokenError: none holds it as measured; its `nearest` is the result that came nearest.
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
    digest = problem_digest(model, scorer, space, samples, chunk, seed)
    shared = storage is not None
    if storage is None and folder is not None:
        storage = f"journal:{Path(folder) / '.search.journal'}"
    name = study_name or f"shiva-{digest[:12]}"
    study = create(name, open_storage(storage), 1 if sampler == "cmaes" else 2, digest)
    settings = {
        "seed": seed, "sampler": sampler, "trials": trials, "samples": samples, "chunk": chunk,
        "model": model.fingerprint(), "scorer": scorer_identity(scorer),
    }  # fmt: skip
    known, whole = read_problem(study), effects
    if known is None:
        if whole is None or whole.choices != space.choices:
            whole = measure_effects(evaluator, space, progress=progress)
        share_problem(study, *reduced(space, whole), settings)
        known = read_problem(study)
        assert known is not None
    elif study.user_attrs["settings"] != settings:
        study.set_user_attr("settings", settings)  # more trials, or another sampler on the same problem
    space, reduced_effects = priced(known[0], cost, space.limits), known[1]
    if shared:
        say(f"others may join with `shiva-search worker RUN --storage URL --study {study.study_name}`")
    plans = PlanStudy(study, space, reduced_effects, evaluator, settings, progress)
    exact = solve(space, reduced_effects.errors_PC)
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
        predicted=_with_dense(cost.predict(plan_of(plan_P)), cost),
        fidelity={
            "error": error,
            "samples": samples,
            "split": "calibration",
            "inputs": model.inputs_kind,
            "scorer": scorer_identity(scorer),
        },
        solver=solver,
    )
    measured = closed.measured if closed else {}
    result = SearchResult(
        plan=plan,
        pareto=front_rows(plans, cost, plan_of, plan_P, measured),
        trials=trial_rows(plans, cost, plan_of),
        rounds=closed.rounds if closed else [],
        measurement=closed.measurement if closed else None,
        cost=cost,
        study_name=study.study_name,
        forwards=evaluator.forwards,
        effects=whole,
    )
    if closed is not None and closed.broken is not None:
        refusal = BudgetBrokenError(closed.broken)
        refusal.nearest = result
        raise refusal
    return result


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
        predicted=_with_dense(predicted, cost),
        fidelity={"error": 0.0, "samples": 0, "split": "calibration", "inputs": model.inputs_kind},
        solver={"optimality_gap": 0.0, "status": "dense fits"},
    )
    row = pareto_row(plan, 0, 0.0, predicted, cost.dense, measurement)
    return SearchResult(plan, pareto=[{**row, "chosen": True}], measurement=measurement, note=note, cost=cost)


def _with_dense(predicted: CostEstimate, cost: PlanCost) -> dict[str, float | None]:
    """A prediction with the dense latency that it is relative to: a measured one is of another time."""
    return {**predicted.as_dict(), "dense_latency_ms": cost.dense.latency_ms}


def _scaled(space: Space, cost: PlanCost, budget: Budget, scale: Mapping[str, float]) -> Space:
    """The same choices at corrected costs and scaled limits."""
    limits = budget.resolve(cost.dense).limits()
    return priced(space, cost, {metric: limit * scale.get(metric, 1.0) for metric, limit in limits.items()})
