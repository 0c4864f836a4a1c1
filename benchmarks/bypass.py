"""What a cheap path for rejected tokens is worth: the best plans with and without it, at the same measured latency.

For each share of the dense latency a plan is searched anew for each variant, within the budget as measured: rejected
tokens that stand still, ranked by the warmed-up router (the paper's method), against affine bypasses, as the closed
form gives them (no step of training), and warmed up. Errors are on held-out images, before any training at the plan
and, but for the closed form, after the same number of steps of it; `identity_untrained` is the best scorer that was
never trained, at the router's plan. With --attend, plans whose kept tokens may attend to all are held against plans
whose may not, both with bypasses, and the error of every block pruned alone is printed over the tokens it keeps.

With --samples, images are drawn and scored for each trained row and for the dense model. What is found is kept in the
folder --out; the same command again does only what is missing there.

    python -m benchmarks.bypass --out DIR [--shares 0.8 0.6 0.4] [--train-steps 60] [--attend 0.65 0.5] [--samples 2000]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shiva_search as ss
from benchmarks.fidelity import GUIDANCE_SCALE
from benchmarks.timing import print_result
from shiva_search.cost import CostModel, fit_cost_model
from shiva_search.devices import open_device
from shiva_search.models.model import Model
from shiva_search.models.reference.evaluation import sample, score_samples, velocity_of
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.budget import Budget
from shiva_search.records.files import read_json, write_json
from shiva_search.records.plan import Kept, Plan
from shiva_search.records.profile import load_profile
from shiva_search.runtime.selector import Selector
from shiva_search.search.fidelity import fidelity
from shiva_search.search.sensitivity import Effects
from shiva_search.selection.closed_form import RANKS, fit_bypasses
from shiva_search.selection.loading import load_selector
from shiva_search.selection.training import tune
from shiva_search.workflow.optimize import AIM, MEASURE_SECONDS

IMAGES = 256
SAMPLER_STEPS = 10
VARIANTS = ("identity", "affine")
#: Shares of the tokens that a block pruned alone keeps.
CURVE = (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
UNTRAINED = ("stride", "random", "norm", "residual")


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


class Notes:
    """What was found so far, by name, in a JSON file that is written after each finding."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = read_json(path, "findings") if path.is_file() else {}

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is known by this name, found now where it is not."""
        if name not in self.found:
            self.found[name] = find()
            tell(f"{name}: {self.found[name]}")
            write_json(self.path, self.found)
        return self.found[name]


class Bench:
    """One model on one device, with a cost model for each selector.

    Args:
        model: with real calibration inputs.
        device_name: where it is measured.
        seconds: of each profile.
        trials: plans judged in each search.
        seed: of everything.
        folder: where plans are saved.
    """

    def __init__(self, model: Model, device_name: str, seconds: float, trials: int, seed: int, folder: Path) -> None:
        self.model, self.device = model, open_device(device_name)
        self.seconds, self.trials, self.seed, self.folder = seconds, trials, seed, folder
        self.effects: dict[str, Effects] = {}  # sensitivities, which are the same for all budgets

    def cost(self, name: str, selector: Selector) -> CostModel:
        """A cost model from a profile in which this selector selects."""
        kept = self.folder / f"profile-{name}"
        if not kept.is_dir():
            profile_model(self.model, self.device, seconds=self.seconds, seed=self.seed, scorer=selector).save(kept)
        return fit_cost_model(load_profile(kept))

    def plan(self, selector: Selector, cost: CostModel, share: float, attend: str) -> Plan:
        """The best plan that holds the share of the dense latency as measured."""

        def measure(plan: Plan) -> Any:
            return measure_plans(
                self.model, [plan], self.device, scorer_for=lambda _: selector, seconds=MEASURE_SECONDS, seed=self.seed
            )[0]

        known = f"{id(selector)} {attend}"
        found = ss.search(
            self.model, cost, Budget(shares={"latency_ms": AIM * share}), trials=self.trials, seed=self.seed,
            scorer=selector, measure=measure, attend=attend, effects=self.effects.get(known),
        )  # fmt: skip
        if found.effects is not None:
            self.effects[known] = found.effects
        return found.plan

    def shares(self, plans: list[Plan], selectors: list[Selector]) -> list[float]:
        """Measured shares of the dense latency, all interleaved."""
        by_plan = {id(plan): selector for plan, selector in zip(plans, selectors, strict=True)}
        found = measure_plans(
            self.model,
            plans,
            self.device,
            scorer_for=lambda plan: by_plan[id(plan)],
            seconds=MEASURE_SECONDS * len(plans),
            seed=self.seed,
        )
        return [item.ratio for item in found]

    def error(self, plan: Plan, selector: Selector | str) -> float:
        """On held-out images."""
        return fidelity(self.model, plan, selector, split="evaluation", samples=IMAGES, seed=self.seed)

    def trained(self, plan: Plan, selector: Selector, steps: int) -> Selector:
        """A copy of the selector, tuned at the plan."""
        return tune(self.model, copy.deepcopy(selector), plan, steps=steps, seed=self.seed, progress=tell)[0]

    def images(self, plan: Plan, selector: Selector | str, samples: int) -> dict[str, float]:
        """Frechet distance and classifier agreement of generated images."""
        labels, generator = torch.arange(samples) % 10, torch.Generator().manual_seed(self.seed)
        with ss.apply_plan(self.model, plan, selector, guidance=True):
            drawn = sample(velocity_of(self.model.module), labels, SAMPLER_STEPS, GUIDANCE_SCALE, generator)
        return score_samples(drawn, labels)

    def compare(self, share: float, selectors: dict[str, Selector], cost: Callable[[str], CostModel]) -> dict[str, Any]:
        """Errors and measured shares of the best plan of each selector, before training at the plan."""
        plans = {
            name: self.plan(
                selector, cost("identity" if name == "identity" else "affine"), share,
                "kept" if name == "identity" else "free",
            )
            for name, selector in selectors.items()
        }  # fmt: skip
        measured = self.shares(list(plans.values()), [selectors[name] for name in plans])
        row: dict[str, Any] = {"latency_share": share}
        for (name, plan), found in zip(plans.items(), measured, strict=True):
            row |= {name: self.error(plan, selectors[name]), f"{name}_share": found, f"{name}_plan": str(plan.rows)}
            plan.save(self.folder / f"{name}-{share}.json")
        row["identity_untrained"] = min(self.error(plans["identity"], name) for name in UNTRAINED)
        return row

    def attention(self, share: float, bank: Selector, cost: Callable[[str], CostModel]) -> dict[str, Any]:
        """The best plan with and without attention to all tokens, both with bypasses."""
        plans = {mode: self.plan(bank, cost("affine"), share, mode) for mode in ("kept", "free")}
        measured = self.shares(list(plans.values()), [bank, bank])
        return {
            "latency_share": share,
            **{mode: self.error(plan, bank) for mode, plan in plans.items()},
            **{f"{mode}_share": value for mode, value in zip(plans, measured, strict=True)},
            **{f"{mode}_plan": str(plan.rows) for mode, plan in plans.items()},
        }

    def curves(self, selector: Selector, attend: str) -> dict[str, list[float]]:
        """Error of each block pruned alone to a sixteenth, an eighth, ... of the tokens and upwards, and skipped."""
        tokens, layers = self.model.tokens, self.model.layer_count
        found: dict[str, list[float]] = {}
        for layer in range(1, layers):
            rows = [[Kept(tokens)] * layers for _ in CURVE]
            for row, share in zip(rows, CURVE, strict=True):
                k = round(share * tokens)
                row[layer] = Kept(k, max(getattr(selector, "ranks", (0,))), attend if k else "kept")
            plans = [Plan.from_rows(self.model, [row]) for row in rows]
            found[str(layer)] = [fidelity(self.model, plan, selector, samples=64, seed=self.seed) for plan in plans]
        return found


def rises(errors: list[float], tolerance: float = 0.02) -> bool:
    """Whether an error ever grows, by more than the tolerance, as more tokens are kept."""
    return any(later > earlier * (1 + tolerance) for earlier, later in pairwise(errors))


def at_same_cost(cost: CostModel, layer: int, tokens: int, curves: dict[str, dict[str, list[float]]]) -> list[float]:
    """Error with attention to all over that of a block that keeps more tokens and attends to these, at equal latency.

    Args:
        cost: of blocks with bypasses.
        layer: index.
        tokens: N.
        curves: by attention and layer, errors over CURVE.

    Returns:
        A ratio for each share of the curve above 0; below 1 where attention to all is the better use of the time.
    """

    def known(k: int, attend: str) -> float:
        found = cost.layer_cost("latency_ms", layer, Kept(k, max(RANKS), attend))
        assert found is not None
        return found

    counts = [round(share * tokens) for share in CURVE]
    kept_ms = [known(k, "kept") for k in counts]
    ratios = []
    for k, error in zip(counts[1:], curves["all"][str(layer)][1:], strict=True):
        other = np.exp(np.interp(known(k, "all"), kept_ms, np.log(curves["kept"][str(layer)])))
        ratios.append(error / float(other))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--attend", nargs="*", type=float, default=[], help="shares at which attention is compared")
    parser.add_argument("--fit-samples", type=int, default=2304, help="calibration images of the closed form")
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=0, help="generated images per trained row")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two profiles")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of what was found so far")
    options = parser.parse_args()
    model = ss.load_model()
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, options.device, options.seconds, options.trials, options.seed, folder)
    notes = Notes(folder / "found.json")
    selectors: dict[str, Selector] = {"identity": ss.warm_up(model), "affine": ss.fit_bypasses(model)}
    costs: dict[str, CostModel] = {}

    def cost(name: str) -> CostModel:
        if name not in costs:
            costs[name] = bench.cost(name, selectors[name])
        return costs[name]

    fitted = folder / "closed-form.safetensors"
    if not fitted.is_file():
        fit_bypasses(model, samples=options.fit_samples, seed=options.seed, progress=tell)[0].save(fitted)
    compared = {**selectors, "closed_form": load_selector(fitted)}
    for share in options.shares:
        notes.once(f"compare {share}", partial(bench.compare, share, compared, cost))
    for share in options.attend:
        notes.once(f"attend {share}", partial(bench.attention, share, selectors["affine"], cost))
    curves = {
        mode: notes.once(f"curves {mode}", partial(bench.curves, selectors["affine"], mode))
        for mode in (("kept", "all") if options.attend else ())
    }
    for share in options.shares if options.train_steps else ():
        for name in VARIANTS:
            plan, path = Plan.from_file(folder / f"{name}-{share}.json"), folder / f"{name}-{share}.safetensors"
            if not path.is_file():
                bench.trained(plan, selectors[name], options.train_steps).save(path)
            tuned = load_selector(path)
            notes.once(f"trained {name} {share}", partial(bench.error, plan, tuned))
    if options.samples:
        notes.once("images dense", partial(bench.images, Plan.dense(model), "stride", options.samples))
        for share in options.shares:
            for name in VARIANTS:
                plan = Plan.from_file(folder / f"{name}-{share}.json")
                tuned = load_selector(folder / f"{name}-{share}.safetensors")
                notes.once(f"images {name} {share}", partial(bench.images, plan, tuned, options.samples))
    rows = []
    for share in options.shares:
        row = dict(notes.found[f"compare {share}"])
        for name in VARIANTS:
            row[f"{name}_trained"] = notes.found.get(f"trained {name} {share}")
            row |= {f"{name}_{key}": value for key, value in notes.found.get(f"images {name} {share}", {}).items()}
        rows.append(row)
    attention = [notes.found[f"attend {share}"] for share in options.attend]
    for mode, found_curves in curves.items():
        for layer, errors in found_curves.items():
            shape = "rises somewhere" if rises(errors) else "falls"
            print(f"attend {mode}, block {layer}: {' '.join(f'{error:.4f}' for error in errors)}  {shape}")
    same_cost = {
        layer: at_same_cost(cost("affine"), int(layer), model.tokens, curves) for layer in curves.get("all", {})
    }
    for layer, ratios in same_cost.items():
        print(f"attend all over kept at the same cost, block {layer}: {' '.join(f'{ratio:.2f}' for ratio in ratios)}")
    for row in [*rows, *attention, notes.found.get("images dense", {})]:
        print("  ".join(f"{name} {value:.4f}" for name, value in row.items() if isinstance(value, float)))
    print_result(
        {
            "rows": rows,
            "attend": attention,
            "curves": curves,
            "same_cost": same_cost,
            "train_steps": options.train_steps,
        }
    )


if __name__ == "__main__":
    main()
