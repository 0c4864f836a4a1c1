"""How well the cost model predicts plans it has not seen, relative to the dense model, as measured.

Each run takes a new profile, fits, then measures random plans (some layers skipped, some dense) interleaved with the
dense model. RESULT holds the worst run's figures; `runs` has them all. With --searched it measures the plans on the
front of a finished run instead: a search picks what the cost model underrates, if there is such a thing.

    python -m benchmarks.prediction [--runs 5] [--model wide]
    python -m benchmarks.prediction --searched reports/demo
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import shiva_search as ss
from benchmarks.timing import (
    MEASURE_SECONDS,
    MODELS,
    PROFILE_SECONDS,
    errors_of,
    held_out,
    model_named,
    print_result,
    random_plans,
    searched_plans,
    worst,
)
from shiva_search.cost import fit_cost_model
from shiva_search.devices import open_device
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.selection.router import Router


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="profiles, each followed by its own measurements")
    parser.add_argument("--pause", type=float, default=60.0, help="seconds between runs")
    parser.add_argument("--model", choices=MODELS, default="fashion-dit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plans", type=int, default=40, help="held-out plans per run")
    parser.add_argument("--searched", type=Path, help="the folder of a run whose plans to measure")
    parser.add_argument("--seconds", type=float, help="of each profile")
    parser.add_argument("--measure-seconds", type=float, help="of measuring the held-out plans of a run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seconds = options.seconds or PROFILE_SECONDS[options.model]
    measure_seconds = options.measure_seconds or MEASURE_SECONDS[options.model]
    model, device = model_named(options.model), open_device(options.device)
    model.module.to(device.torch_device)
    scorer = Router.for_model(model, seed=0) if options.searched is None else ss.fit_bypasses(model)
    runs = []
    for run in range(options.runs):
        if run:
            time.sleep(options.pause)
        seed = options.seed + run
        begun = time.perf_counter()
        profile = profile_model(model, device, seconds=seconds, seed=seed, scorer=scorer)
        took_s = time.perf_counter() - begun
        cost = fit_cost_model(profile)
        if options.searched is None:
            plans = random_plans(model, options.plans, seed + 1000)
        else:
            plans = searched_plans(model, options.searched)
        predicted, measured, widths, dense_ms = held_out(
            model, cost, device, plans, measure_seconds, seed + 1000, scorer
        )
        figures = errors_of(predicted, measured, widths, cost.interval)
        runs.append({**figures, "profile_s": took_s, "interval": cost.interval})
        print(
            f"run {run + 1}: profile {took_s:.0f} s, dense {cost.dense.latency_ms:.1f} ms, then {dense_ms:.1f}; "
            f"median error {figures['median_error']:.2%}, 95th percentile {figures['p95_error']:.2%}, "
            f"bias {figures['bias']:+.2%}, Spearman {figures['spearman']:.4f}; 90 % interval +-{cost.interval:.1%} "
            f"held {figures['coverage']:.0%}, "
            f"with the measured one {figures['coverage_of_both']:.0%}; measured to +-{float(np.median(widths)):.1%}",
            flush=True,
        )
    print_result({"model": options.model, "plans": len(plans), **worst(runs), "runs": runs})


if __name__ == "__main__":
    main()
