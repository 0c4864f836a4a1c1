"""`shiva-search compare`: the plan against the alternatives a user has. In: a run's folder. Out: compare.csv."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shiva_search.cost.cost_model import CostModel, load_cost_model
from shiva_search.errors import InfeasibleBudgetError
from shiva_search.models.model import Model
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.budget import Budget
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Kept, Plan
from shiva_search.reporting import tables
from shiva_search.reporting.html import build_report
from shiva_search.runtime.bypass import Accompanied, BypassBank
from shiva_search.runtime.scorers import SCORERS, TokenScorer, scorer_by_name
from shiva_search.search import holds, search
from shiva_search.search.fidelity import fidelity
from shiva_search.search.whole_blocks import WholeBlocks
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.outcome import EVALUATION_SAMPLES
from shiva_search.workflow.runs import open_run


def compare_command(path: Path, *, seconds: float, seed: int, progress: Progress) -> Answer:
    """`shiva-search compare RUN`: the plan against the alternatives a user has, on one device in one run."""
    run = open_run(path)
    model, plan, budget = run.model, run.plan, run.budget
    cost = load_cost_model(path)
    trained = run.scorer()
    rows: list[tuple[str, Plan, TokenScorer | str]] = [("searched plan, trained selector", plan, trained)]
    if not _selects(plan):
        progress("the plan selects no tokens: what ranks them makes no difference")
    for name in SCORERS if _selects(plan) else ():
        untrained: TokenScorer | str = name
        if isinstance(trained, BypassBank):  # the plan asks for a bypass, whatever ranks the tokens
            untrained = Accompanied(scorer_by_name(name), trained)
        rows.append((f"searched plan, {name}", plan, untrained))
    progress("choosing plans predicted to be as fast: uniform keep, and whole blocks skipped")
    ranks = trained.ranks[1:] if isinstance(trained, BypassBank) else ()
    rank = next((rank for rank in ranks if f"rank {rank}" in cost.variants()), 0)
    uniforms = [
        ("uniform keep, trained selector", _uniform_like(model, cost, plan, rank), trained),
        ("uniform keep, stride", _uniform_like(model, cost, plan), "stride"),
    ]
    for name, uniform, its_scorer in uniforms:
        if uniform is None:
            progress(f"no {name}, is as fast: even one token in each layer takes longer")
        else:
            rows.append((name, uniform, its_scorer))
    target = Budget(latency_ms=cost.predict(plan).latency_ms)
    try:
        skipping = search(
            model, WholeBlocks(cost), target, trials=40, seed=seed, scorer="stride", progress=progress
        ).plan
        rows.append(("whole blocks skipped", skipping, "stride"))
    except InfeasibleBudgetError:
        progress("no plan that only skips whole blocks is as fast")
    rows.append(("dense", Plan.dense(model), "stride"))
    progress(f"measuring {len(rows)} alternatives for {seconds:.0f} s")
    copies = [candidate.with_() for _, candidate, _ in rows]
    scorer_of = {id(copy): scorer for copy, (_, _, scorer) in zip(copies, rows, strict=True)}
    measured = measure_plans(
        model, copies, run.device, scorer_for=lambda p: scorer_of[id(p)], seconds=seconds, seed=seed
    )
    table = []
    for (name, candidate, scorer), found in zip(rows, measured, strict=True):
        error = fidelity(model, candidate, scorer, split="evaluation", samples=EVALUATION_SAMPLES, seed=seed)
        settings = candidate.as_columns()
        progress(f"{name}: {found.ratio:.1%} of dense, error {error:.4f}")
        table.append(
            {
                "method": name,
                "settings": settings.pop("tokens_kept"),
                **settings,
                **{
                    field: getattr(found, field)
                    for field in ("latency_ms", "latency_ms_low", "latency_ms_high", "ratio")
                },
                "error": error,
                "note": _note(candidate, budget, found),
            }
        )
    tables.write_compare(run.folder.compare, table)
    build_report(path)
    lines = [
        f"{row['method']:<34} {found.ratio:7.1%} (at most {found.ratio_high:.1%})  "
        f"error {row['error']:.4f}  {row['note']}"
        for row, found in zip(table, measured, strict=True)
    ]
    return Answer({"run": str(path), "alternatives": table}, lambda: "\n".join(lines))


def _selects(plan: Plan) -> bool:
    """Whether some layer keeps some tokens and rejects others."""
    return any(0 < k < plan.tokens for row in plan.tokens_kept for k in row)


def _note(plan: Plan, budget: Budget, found: Measurement) -> str:
    if plan.is_dense:
        return "timed against itself: what differs from 100 % is noise"
    if holds(budget, found):
        return "holds the budget"
    # A share of the latency is judged by the upper end of the ratio's interval.
    if holds(budget, replace(found, ratio_high=found.ratio)):
        return "too noisy to tell whether it holds the budget: more --seconds"
    return "breaks the budget"


def _uniform_like(model: Model, cost: CostModel, plan: Plan, rank: int = 0) -> Plan | None:
    """The uniform plan with the most tokens that is predicted to be no slower than a plan; None where none is.

    Args:
        rank: of the bypass of rejected tokens.
    """
    limit_ms = cost.predict(plan).latency_ms or 0.0

    def uniform(k: int) -> Plan:
        return Plan.from_rows(model, [[model.tokens, *[Kept(k, rank)] * (model.layer_count - 1)]])

    plans = (uniform(k) for k in range(model.tokens - 1, 0, -1))
    return next((found for found in plans if (cost.predict(found).latency_ms or 0.0) <= limit_ms), None)
