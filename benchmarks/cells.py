"""How many measurements a cost table takes: 24 like blocks at 16 counts of tokens, against one per layer and count.

Blocks with equal signatures are measured once and stand for all; a few plans from end to end correct what that misses.
The error on held-out plans is printed next to the count, since few measurements of little worth would be no gain.

    python -m benchmarks.cells
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.timing import errors_of, held_out, print_result, random_dit, random_plans
from shiva_search.cost import fit_cost_model
from shiva_search.devices import open_device
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.selection.router import Router

LAYERS, COUNTS, PLANS = 24, 16, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of the profile")
    parser.add_argument("--measure-seconds", type=float, default=180.0, help="of measuring held-out plans")
    parser.add_argument("--held-out", type=int, default=40)
    options = parser.parse_args()
    model, device = random_dit(heads=4, head_width=32, layers=LAYERS, side=20, batch=2), open_device("cpu")
    tokens = model.tokens
    inner = {int(k) for k in np.linspace(1, tokens - 1, COUNTS - 2).round()}
    counts = sorted({0, *inner, tokens})
    router = Router.for_model(model, seed=0)
    profile = profile_model(model, device, seconds=options.seconds, counts=counts, plans=PLANS, scorer=router)
    cost = fit_cost_model(profile)
    predicted, measured, widths, _ = held_out(
        model, cost, device, random_plans(model, options.held_out, 1000), options.measure_seconds, seed=1000
    )
    figures = errors_of(predicted, measured, widths, cost.interval)
    # Every figure that was measured: blocks at each count, the dense and the empty forward, plans.
    cells = len(profile.rows) + 2 + len(profile.forwards)
    exhaustive = LAYERS * len(counts)
    print(
        f"{cells} cells measured instead of {exhaustive} ({exhaustive / cells:.1f} times fewer), median error on "
        f"held-out plans {figures['median_error']:.2%}, 95th percentile {figures['p95_error']:.2%}"
    )
    print_result({"measured": cells, "exhaustive": exhaustive, **figures})


if __name__ == "__main__":
    main()
