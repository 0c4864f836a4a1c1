"""What a cheap path for rejected tokens is worth: the best plans with and without it, at the same measured latency.

For each share of the dense latency a plan is searched anew for each variant, within the budget as measured: rejected
tokens that stand still, ranked by the warmed-up router (the paper's method), against bypasses fit in closed form and
ranked by what they miss. Errors are on held-out images, before and after the same number of training steps. With
--attend, plans whose kept tokens may attend to all are held against plans whose may not, both with bypasses.

    python -m benchmarks.bypass [--shares 0.8 0.6 0.4] [--train-steps 60] [--attend 0.65 0.5] [--samples 2000]
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch

import shiva_search as ss
from benchmarks.fidelity import GUIDANCE_SCALE, SAMPLER_STEPS
from benchmarks.timing import print_result
from shiva_search.cost import CostModel, fit_cost_model
from shiva_search.devices import open_device
from shiva_search.models.model import Model
from shiva_search.models.reference.evaluation import sample, score_samples, velocity_of
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.budget import Budget
from shiva_search.records.plan import Plan
from shiva_search.runtime.selector import Selector
from shiva_search.search.fidelity import fidelity
from shiva_search.selection.closed_form import fit_bypasses
from shiva_search.selection.loading import load_selector
from shiva_search.selection.training import tune

IMAGES = 256


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


class Bench:
    """One model on one device, with a cost model for each selector.

    Args:
        model: with real calibration inputs.
        device_name: where it is measured.
        seconds: of each profile.
        trials: plans judged in each search.
        seed: of everything.
    """

    def __init__(self, model: Model, device_name: str, seconds: float, trials: int, seed: int) -> None:
        self.model, self.device = model, open_device(device_name)
        self.seconds, self.trials, self.seed = seconds, trials, seed

    def cost(self, selector: Selector) -> CostModel:
        """A cost model from a new profile in which this selector selects."""
        found = profile_model(self.model, self.device, seconds=self.seconds, seed=self.seed, scorer=selector)
        return fit_cost_model(found)

    def plan(self, selector: Selector, cost: CostModel, share: float, attend: str) -> Plan:
        """The best plan that holds the share of the dense latency as measured."""

        def measure(plan: Plan) -> Any:
            return measure_plans(
                self.model, [plan], self.device, scorer_for=lambda _: selector, seconds=8.0, seed=self.seed
            )[0]

        return ss.search(
            self.model, cost, Budget(shares={"latency_ms": share}), trials=self.trials, seed=self.seed,
            scorer=selector, measure=measure, attend=attend,
        ).plan  # fmt: skip

    def shares(self, plans: list[Plan], selectors: list[Selector]) -> list[float]:
        """Measured shares of the dense latency, all interleaved."""
        by_plan = {id(plan): selector for plan, selector in zip(plans, selectors, strict=True)}
        found = measure_plans(
            self.model, plans, self.device, scorer_for=lambda plan: by_plan[id(plan)], seconds=20.0, seed=self.seed
        )
        return [item.ratio for item in found]

    def error(self, plan: Plan, selector: Selector) -> float:
        """On held-out images."""
        return fidelity(self.model, plan, selector, split="evaluation", samples=IMAGES, seed=self.seed)

    def trained(self, plan: Plan, selector: Selector, steps: int) -> Selector:
        """A copy of the selector, tuned at the plan."""
        return tune(self.model, copy.deepcopy(selector), plan, steps=steps, seed=self.seed, progress=tell)[0]

    def images(self, plan: Plan, selector: Selector, samples: int) -> dict[str, float]:
        """Frechet distance and classifier agreement of generated images."""
        labels, generator = torch.arange(samples) % 10, torch.Generator().manual_seed(self.seed)
        with ss.apply_plan(self.model, plan, selector, guidance=True):
            drawn = sample(velocity_of(self.model.module), labels, SAMPLER_STEPS, GUIDANCE_SCALE, generator)
        return score_samples(drawn, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--attend", nargs="*", type=float, default=[], help="shares at which attention is compared")
    parser.add_argument("--bypass", type=Path, help="fitted bypasses; fit now otherwise")
    parser.add_argument("--fit-samples", type=int, default=384)
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=0, help="generated images per trained row")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two profiles")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = ss.load_model()
    bench = Bench(model, options.device, options.seconds, options.trials, options.seed)
    bank: Selector
    if options.bypass is not None:
        bank = load_selector(options.bypass)
    else:
        bank = fit_bypasses(model, samples=options.fit_samples, seed=options.seed, progress=tell)[0]
    with_bypass = bench.cost(bank)
    rows: list[dict[str, Any]] = []
    if options.shares:
        router: Selector = ss.warm_up(model)
        without = bench.cost(router)
    for share in options.shares:
        plans = [bench.plan(router, without, share, "kept"), bench.plan(bank, with_bypass, share, "free")]
        measured = bench.shares(plans, [router, bank])
        row: dict[str, Any] = {
            "latency_share": share,
            "identity": bench.error(plans[0], router), "affine": bench.error(plans[1], bank),
            "identity_share": measured[0], "affine_share": measured[1],
            "identity_plan": str(plans[0].rows), "affine_plan": str(plans[1].rows),
        }  # fmt: skip
        if options.train_steps:
            for name, plan, selector in (("identity", plans[0], router), ("affine", plans[1], bank)):
                tuned = bench.trained(plan, selector, options.train_steps)
                row[f"{name}_trained"] = bench.error(plan, tuned)
                if options.samples:
                    row |= {f"{name}_{key}": value for key, value in bench.images(plan, tuned, options.samples).items()}
        rows.append(row)
        tell(str(row))
    attention = []
    for share in options.attend:
        found = {mode: bench.plan(bank, with_bypass, share, mode) for mode in ("kept", "free")}
        measured = bench.shares(list(found.values()), [bank, bank])
        attention.append(
            {
                "latency_share": share,
                **{mode: bench.error(plan, bank) for mode, plan in found.items()},
                **{f"{mode}_share": value for mode, value in zip(found, measured, strict=True)},
                **{f"{mode}_plan": str(plan.rows) for mode, plan in found.items()},
            }
        )
        tell(str(attention[-1]))
    for row in rows:
        print("  ".join(f"{name} {value:.4f}" for name, value in row.items() if isinstance(value, float)))
    print_result({"rows": rows, "attend": attention, "train_steps": options.train_steps})


if __name__ == "__main__":
    main()
