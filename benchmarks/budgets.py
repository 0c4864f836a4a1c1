"""Whether plans hold their budgets: random feasible ones searched and measured afresh, random infeasible ones refused.

Feasible: latency budgets, one in each of as many equal strata between the model's floor and the dense model; every
fourth has a second limit (mean keep, FLOPs, memory in turn). Each is a whole `optimize` without tuning, on a profile
that is taken anew where a quick check finds that its ratios no longer hold, and then a fresh interleaved measurement of
its plan with its own selector, again where the machine was not settled at any time during it (for ten times, at most;
such a row is flagged). A budget is held when every limit is held by what that measurement says; `held_with_interval`
asks the same of the upper end of the latency's interval.
Infeasible: budgets below a floor. Each has to be refused with exit code 3 and a message that names the binding budget
and its floor, and a budget at the very figure that is named has to be feasible.

    python -m benchmarks.budgets --state budgets.jsonl [--count 20] [--most 3]

With --state, what is done is kept there, a JSON line each, and the profile and the runs beside it; the same command
goes on from there. --most ends a piece after so many budgets.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.state import begun, keep
from benchmarks.timing import print_result
from shiva_search.cost.cost_model import CostModel, load_cost_model
from shiva_search.errors import InfeasibleBudgetError, ShivaError
from shiva_search.models.model import Model
from shiva_search.profiling.end_to_end import measure_plans, measure_settled
from shiva_search.records.budget import Budget, option_name
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.records.run import RunFolder
from shiva_search.search import check_budget, holds
from shiva_search.search.candidates import Space, build_space
from shiva_search.search.closed_loop import usage
from shiva_search.search.knapsack import floor
from shiva_search.selection.loading import load_selector
from shiva_search.workflow import optimize_command, profile_command
from shiva_search.workflow.opening import open_both
from shiva_search.workflow.settings import Settings

SECOND = ("mean_keep", "gflops", "memory_mib")
#: Metric -> how a limit on it is written.
_WRITTEN = {"latency_ms": "{:.6g}ms", "gflops": "{:.6g}G", "memory_mib": "{:.6g}MiB", "mean_keep": "{:.6g}"}

#: Fresh measurements of a plan, at most, until one has seen the machine settled.
_TRIES = 10

Texts = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bypass", default="affine")
    parser.add_argument("--count", type=int, default=20, help="feasible budgets")
    parser.add_argument("--infeasible", type=int, default=10)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--profile-seconds", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each fresh measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="where to keep what is done, and to go on from")
    parser.add_argument("--most", type=int, default=None, help="feasible budgets to do now")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        if options.state is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            state = folder / "state.jsonl"
        else:
            state, folder = options.state, options.state.absolute().with_suffix(".files")
        folder.mkdir(parents=True, exist_ok=True)
        return measure(options, state, folder)


def measure(options: argparse.Namespace, state: Path, folder: Path) -> dict[str, Any]:
    """The benchmark on what `folder` and `state` hold already."""
    settings = Settings(
        model=options.model, device=options.device, trials=options.trials, bypass=options.bypass, train_steps=0,
        profile_seconds=options.profile_seconds, seed=options.seed,
    )  # fmt: skip
    asked = {name: getattr(options, name) for name in ("model", "device", "bypass", "count", "trials", "seed")}
    rows = begun(state, asked)
    first = folder / "first"  # budgets stay what they are where the profile is taken anew
    if not (first / "cost_model.json").is_file():
        with chdir(folder):
            answer = profile_command(
                settings.model, settings.device, {}, seconds=options.profile_seconds, out=None,
                seed=options.seed, resume=True, progress=say, bypass=options.bypass,
            )  # fmt: skip
            load_cost_model(Path(answer.summary["folder"])).save(first)
    cost = load_cost_model(first)
    _, model = open_both(settings.model, settings.device, {}, options.seed)
    budgets = feasible_budgets(model, cost, options.count, options.seed)
    left = [index for index in range(len(budgets)) if index not in {row["index"] for row in rows}]
    for index in left[: options.most]:
        say(f"budget {index + 1} of {len(budgets)}: {budgets[index]}")
        row = {"index": index, "budget": budgets[index]}
        row |= held(replace(settings, budget=budgets[index]), folder / f"run-{index}", options.seconds)
        rows.append(row)
        keep(state, row)
    refusals = [
        refusal(model, cost, budget) for budget in infeasible_budgets(model, cost, options.infeasible, options.seed + 1)
    ]
    result = summary_of(rows, refusals)
    if len(rows) < len(budgets):
        print(f"{len(rows)} of {len(budgets)} budgets done; the same command goes on with the others")
    print_result(result)
    return result


def summary_of(rows: Sequence[dict[str, Any]], refusals: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """The figures of the README."""
    measured = [row for row in rows if row["exit_code"] == 0]
    slack = [row["slack"] for row in measured if row["held"]]
    return {
        "held": sum(row["held"] for row in measured),
        "held_with_interval": sum(row["held_with_interval"] for row in measured),
        "returned": len(measured),
        "tried": len(rows),
        "median_slack": float(np.median(slack)) if slack else None,
        "most_used": max((row["used_most"] for row in measured), default=None),
        "infeasible": len(refusals),
        "refused": sum(row["refused"] for row in refusals),
        "named_floor_feasible": sum(row["named_floor_feasible"] for row in refusals),
    }


# ---- budgets ---------------------------------------------------------------------------------------------------------


def feasible_budgets(model: Model, cost: CostModel, count: int, seed: int) -> list[Texts]:
    """Latency budgets spread over all there is, as shares of dense; every fourth with a second limit.

    Two limits hold together whenever each can be held: the plan that skips every block it may is the least of both.
    """
    rng = np.random.default_rng(seed)
    space = everything(model, cost)
    dense = space.dense[None]
    low = _least(space, "latency_ms") / float(space.total("latency_ms", dense)[0])
    budgets: list[Texts] = []
    for index in range(count):
        share = low + (1 - low) * (index + rng.random()) / count
        budget: Texts = {"latency_ms": f"{100 * share:.2f}%"}
        if index % 4 == 3:
            metric = [name for name in SECOND if name in space.tables][(index // 4) % len(SECOND)]
            least, most = _least(space, metric), float(space.total(metric, dense)[0])
            # About as tight as the latency is, more or less: the part of the way that latency has, give or take.
            part = min(1.0, (index + 0.5) / count * rng.uniform(0.6, 1.4))
            budget[metric] = written(metric, max(least + part * (most - least), 1.01 * least))
        check_budget(model, cost, Budget.parse(budget))
        budgets.append(budget)
    return budgets


def infeasible_budgets(model: Model, cost: CostModel, count: int, seed: int) -> list[Texts]:
    """Budgets below a floor: mostly latency's, the others' in turn, some beside a limit that can be held."""
    rng = np.random.default_rng(seed)
    space = everything(model, cost)
    budgets = []
    for index in range(count):
        metric = "latency_ms" if index % 2 == 0 else SECOND[(index // 2) % len(SECOND)]
        budget = {metric: written(metric, _least(space, metric) * rng.uniform(0.3, 0.98))}
        if index % 3 == 0:
            other = "gflops" if metric == "latency_ms" else "latency_ms"
            budget[other] = f"{rng.uniform(80, 100):.1f}%"
        budgets.append(budget)
    return budgets


def everything(model: Model, cost: CostModel) -> Space:
    """The space without limits."""
    return build_space(model, cost, Budget())


def written(metric: str, value: float) -> str:
    """A limit as a user writes it."""
    return _WRITTEN[metric].format(value)


def _least(space: Space, metric: str) -> float:
    found = floor(space, metric)
    assert found is not None  # nothing is limited
    return found


# ---- what becomes of them --------------------------------------------------------------------------------------------


def held(settings: Settings, out: Path, seconds: float) -> dict[str, Any]:
    """A whole run, and what a fresh measurement says of its plan."""
    try:
        with chdir(out.parent):  # where its profile is
            answer = optimize_command(settings, out=out, resume=True, progress=say)
        answer.raise_if_broken()
    except ShivaError as error:
        say(f"error: {error}")
        return {"exit_code": error.exit_code, "error": str(error)}
    run = RunFolder(out)
    plan = Plan.from_file(run.plan)
    device, model = open_both(settings.model, settings.device, settings.workload, settings.seed)
    selector = load_selector(run.selector)

    def measure() -> Measurement:
        [found] = measure_plans(
            model, [plan], device, scorer_for=lambda _: selector, seconds=seconds, seed=settings.seed + 1, progress=say
        )
        return found

    found = measure_settled(measure, say, _TRIES)
    budget = Budget.parse(settings.budget)
    used = usage(budget, replace(found, ratio_high=found.ratio))
    most = max(used.values())
    return {
        "exit_code": 0,
        "held": most <= 1.0,
        "held_with_interval": holds(budget, found),
        "used": used,
        "used_most": most,
        "slack": 1.0 - most,
        "ratio": found.ratio,
        "ratio_high": found.ratio_high,
        "flags": found.flags,
        "unsettled": found.conditions.get("unsettled"),
        "error": answer.summary["error"],
        "rounds": len(answer.summary["rounds"]),
        "seconds": answer.summary["seconds"],
    }


def refusal(model: Model, cost: CostModel, texts: Texts) -> dict[str, bool]:
    """Whether a budget is refused as it should be, and whether the floor that the refusal names can be held."""
    try:
        check_budget(model, cost, Budget.parse(texts))
    except InfeasibleBudgetError as error:
        say(f"refused {texts}: {error}")
        binding, named = next(iter(texts)), re.search(r"floor of ([\d.]+) ?(\w*)", str(error))
        says_which = re.search(rf"Raise {re.escape(option_name(binding))}\b", str(error)) is not None
        ok = error.exit_code == 3 and named is not None and says_which
        if named is None:
            return {"refused": False, "named_floor_feasible": False}
        suffix = {"gflops": "G", "mean_keep": ""}.get(binding, named[2])
        try:
            check_budget(model, cost, Budget.parse({**texts, binding: named[1] + suffix}))
        except InfeasibleBudgetError as second:
            say(f"the floor it names is refused: {second}")
            return {"refused": ok, "named_floor_feasible": False}
        return {"refused": ok, "named_floor_feasible": True}
    say(f"{texts} should have been refused")
    return {"refused": False, "named_floor_feasible": False}


def say(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
