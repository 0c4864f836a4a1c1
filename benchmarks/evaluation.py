"""Plans judged per second during a search, next to one plain forward per plan over the whole calibration batch.

The search shares prefixes between plans and drops hopeless ones early. Every plan it judged is judged again by plain
forwards, the two in turns of a few plans, so that both see the same machine; the best of the plans that hold the budget
has to be the one that the search chose.

    python -m benchmarks.evaluation [--trials 100] [--budget 0.6]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import optuna

from benchmarks.search_quality import AnalyticCost
from benchmarks.timing import print_result
from shiva_search.models.catalog import load_model, shipped_router
from shiva_search.records.budget import Budget
from shiva_search.search.candidates import build_space
from shiva_search.search.fidelity import FidelityEvaluator
from shiva_search.search.knapsack import solve
from shiva_search.search.sensitivity import measure_effects
from shiva_search.search.starting import enqueue_start, evaluator_for
from shiva_search.search.study import PlanStudy
from shiva_search.selection.loading import load_selector

_AT_A_TIME = 5  # plans, before it is the other's turn


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--budget", type=float, default=0.6, help="share of the dense latency")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    model = load_model(options.model)
    router = shipped_router(model)
    scorer = "stride" if router is None else load_selector(router)
    width = int(model.config["num_attention_heads"]) * int(model.config["attention_head_dim"])
    space = build_space(
        model, AnalyticCost(model.tokens, model.layer_count, width), Budget(shares={"latency_ms": options.budget})
    )
    evaluator = evaluator_for(model, scorer, space, options.seed, options.samples, options.chunk)
    begun = time.perf_counter()
    effects = measure_effects(evaluator, space)
    prepared_s = time.perf_counter() - begun
    study = optuna.create_study(directions=["minimize", "minimize"])
    settings = {"seed": options.seed, "sampler": "trade", "trials": options.trials}
    plans = PlanStudy(study, space, effects, evaluator, settings)
    enqueue_start(plans, solve(space, effects.errors_PC).plan_P, options.trials)
    batch = model.batch("calibration", options.samples, options.seed)
    plain = FidelityEvaluator(model, scorer, batch, options.chunk, memory_mib=0.0, sketch=1)
    errors: list[float] = []
    search_s = plain_s = 0.0
    while (known := len(plans.records())) < options.trials:
        begun = time.perf_counter()
        plans.run(min(known + _AT_A_TIME, options.trials))
        searched = time.perf_counter()
        errors += [plain.error(space.rows(record.plan_P)) for record in plans.records()[known:]]
        search_s, plain_s = search_s + searched - begun, plain_s + time.perf_counter() - searched
        if len(errors) < min(known + _AT_A_TIME, options.trials):
            break  # there are no more plans
    chosen, records = plans.best(), plans.records()
    assert chosen is not None

    fits = [space.feasible(record.plan_P[None])[0] for record in records]
    best = min((i for i in range(len(records)) if fits[i]), key=lambda i: errors[i])
    result = {
        "plans_per_s": len(records) / search_s,
        "forwards_per_s": len(records) / plain_s,
        "ratio": plain_s / search_s,
        "ratio_with_sensitivities": plain_s / (search_s + prepared_s),
        "same_plan": records[best].number == chosen.number,
        "error": chosen.error,
        "error_of_plain_choice": errors[best],
        "plans": len(records),
        "judged_in_full": sum(record.complete for record in records),
        "dense_forwards": evaluator.forwards,
    }
    print(
        f"{len(records)} plans: {result['plans_per_s']:.2f} a second in the search, {result['forwards_per_s']:.2f} by "
        f"a plain forward each, {result['ratio']:.2f} times as many; "
        f"{'the same' if result['same_plan'] else 'ANOTHER'} plan is best"
    )
    print_result(result)
    return result


if __name__ == "__main__":
    main()
