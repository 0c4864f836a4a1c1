"""What reusing the updates of earlier steps is worth to rejected tokens, at the end of sampling.

On fashion-dit with guidance: mean squared difference of the images' pixels (in [-1, 1]) to the dense model's from the
same noise, at uniform keep with rejected tokens that stand still, with a bypass, and at a given plan; and how much
longer sampling takes than without reuse, drawn in turns.

    python -m benchmarks.reuse [--steps 10 30] [--reuse 1 2] [--plan reports/demo]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shiva_search as ss
from benchmarks.timing import print_result
from shiva_search.models.reference.evaluation import sample, velocity_of
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.selector import Selector

KEEP, GUIDANCE_SCALE = 0.6, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 30], help="of the sampler")
    parser.add_argument("--reuse", nargs="+", type=int, default=[1, 2], help="steps old an update may be, beside 0")
    parser.add_argument("--plan", type=Path, help="a run's folder, beside uniform keep")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="of drawing in turns, for the time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ss.keep_freed_memory()
    model = ss.load_model()
    router, bank = ss.warm_up(model), ss.fit_bypasses(model)
    k = int(KEEP * model.tokens)
    with_bypass = [model.tokens, *[Kept(k, bank.ranks[1])] * (model.layer_count - 1)]
    ways: dict[str, tuple[Plan, Selector]] = {
        f"uniform {KEEP}": (Plan.uniform(model, KEEP), router),
        f"uniform {KEEP}, bypass": (Plan.from_rows(model, [with_bypass]), bank),
    }
    if options.plan is not None:
        ways["given"] = (Plan.from_file(options.plan / "plan.json"), ss.load_selector(options.plan))
    labels = torch.arange(options.images) % 10

    def draw(steps: int, way: tuple[Plan, Selector] | None = None, reuse: int = 0) -> tuple[torch.Tensor, float]:
        generator, begun = torch.Generator().manual_seed(options.seed), time.perf_counter()
        if way is None:
            return sample(velocity_of(model.module), labels, steps, GUIDANCE_SCALE, generator), 0.0
        with ss.apply_plan(model, *way, guidance=True, reuse_updates=reuse):
            images = sample(velocity_of(model.module), labels, steps, GUIDANCE_SCALE, generator)
        return images, time.perf_counter() - begun

    reuses = sorted({0, *options.reuse})
    rows: list[dict[str, Any]] = []
    for steps in options.steps:
        dense, _ = draw(steps)
        for name, way in ways.items():
            drawn: list[dict[int, tuple[torch.Tensor, float]]] = []
            for turn in range(options.rounds):  # each comes first in its turn
                order = [reuses[(turn + place) % len(reuses)] for place in range(len(reuses))]
                drawn.append({reuse: draw(steps, way, reuse) for reuse in order})
            for reuse in reuses:
                row = {
                    "plan": name,
                    "steps": steps,
                    "reuse": reuse,
                    "difference": float((drawn[0][reuse][0] - dense).square().mean()),
                    "time_ratio": float(np.median([turn[reuse][1] / turn[0][1] for turn in drawn])),
                }
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print_result({"rows": rows, "images": options.images})


if __name__ == "__main__":
    main()
