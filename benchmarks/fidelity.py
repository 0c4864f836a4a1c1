"""How well each way of choosing tokens keeps fashion-dit's output, on images that nothing was trained or searched on.

    python -m benchmarks.fidelity --run reports/demo [--tune-steps 60] [--samples 200]

In: the built-in model, its warmed-up router, and a run with a searched plan. Out: a row per method at uniform keep 0.6
and at the plan, with its measured share of the dense latency. The last line is `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from shiva_search.api import warm_up
from shiva_search.cost.cost_model import load_cost_model
from shiva_search.devices import open_device
from shiva_search.models.catalog import load_model
from shiva_search.models.model import Model
from shiva_search.models.reference.evaluation import sample, score_samples, velocity_of
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.budget import Budget
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import SCORERS, TokenScorer
from shiva_search.search import fidelity, search
from shiva_search.search.whole_blocks import WholeBlocks
from shiva_search.selection.router import load_selector
from shiva_search.selection.training import tune


def say(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def score(model: Model, plan: Plan, scorer: TokenScorer | str, samples: int, steps: int) -> dict[str, float | None]:
    """Classifier agreement and Frechet distance of samples under a plan; None where no samples are asked for."""
    if samples == 0:
        return {"frechet": None, "agreement": None}
    labels = torch.arange(samples) % 10
    with torch.no_grad(), AppliedPlan(model, plan, scorer, guidance=True):
        generator = torch.Generator().manual_seed(0)
        return dict(score_samples(sample(velocity_of(model.module), labels, steps, 2.5, generator), labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("reports/demo"), help="folder of a run on fashion-dit")
    parser.add_argument("--tune-steps", type=int, default=60, help="steps of tuning at uniform keep 0.6")
    parser.add_argument("--images", type=int, default=512, help="held-out images behind each error")
    parser.add_argument("--samples", type=int, default=0, help="images to draw for agreement and Frechet distance")
    parser.add_argument("--steps", type=int, default=14, help="sampler steps of those")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the latency shares")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, device = load_model(), open_device("cpu")
    planned, uniform = Plan.from_file(args.run), Plan.uniform(model, 0.6)
    cost = load_cost_model(args.run)
    router = warm_up(model)
    say("tuning a copy of the router at uniform keep 0.6")
    tuned, _ = tune(model, warm_up(model), uniform, steps=args.tune_steps, seed=args.seed, progress=say)
    say("searching the best plan that only skips whole blocks at the plan's latency")
    target = Budget(latency_ms=cost.predict(planned).latency_ms)
    skipping = search(model, WholeBlocks(cost), target, trials=60, seed=args.seed, scorer="stride").plan
    cases: list[tuple[str, str, Plan, TokenScorer | str]] = []
    for where, plan, selector in (("uniform 0.6", uniform, tuned), ("searched plan", planned, load_selector(args.run))):
        cases += [(f"{where}, {name}", where, plan, name) for name in SCORERS]
        cases += [(f"{where}, router", where, plan, router), (f"{where}, tuned router", where, plan, selector)]
    cases.append(("whole blocks skipped", "skip", skipping, "stride"))
    copies = [plan.with_() for _, _, plan, _ in cases]
    scorers = {id(copy): case[3] for copy, case in zip(copies, cases, strict=True)}
    measured = measure_plans(
        model, copies, device, scorer_for=lambda plan: scorers[id(plan)], seconds=args.seconds, seed=args.seed
    )
    rows: list[dict[str, Any]] = []
    for (name, _, plan, scorer), found in zip(cases, measured, strict=True):
        error = fidelity(model, plan, scorer, split="evaluation", samples=args.images, seed=args.seed)
        figures = score(model, plan, scorer, args.samples, args.steps)
        rows.append({"method": name, "latency_share": found.ratio, "error": error, **figures, "plan": plan.tokens_kept})
        say(f"{name:<32} {found.ratio:6.1%} of dense  error {error:.4f}")
    gains = {}
    for where in ("uniform 0.6", "searched plan"):
        errors = {row["method"]: row["error"] for row in rows if row["method"].startswith(where)}
        best = min(errors[f"{where}, {name}"] for name in SCORERS)
        gains[where] = 1 - errors[f"{where}, tuned router"] / best
    print("RESULT " + json.dumps({"rows": rows, "gain_over_best_untrained": gains, "images": args.images}))


if __name__ == "__main__":
    main()
