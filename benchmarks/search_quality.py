"""Search quality: this search against Optuna's samplers as they come, at equal work.

Work is counted in forward passes of the dense model over the calibration batch, sensitivities included; a pruned plan
counts by its predicted latency. Baselines get the same candidates and constraints and judge every plan they propose.
The Gaussian process takes seconds for a proposal, so it goes as far as --gp-seconds of proposing take it: `forwards`
says how far, and its best error by then stands for later ones.

Layers choose token counts alone, at costs that go by operations; or, with --profile, at the measured costs of a profile
all that `shiva-search optimize` lets them choose: counts, ranks of the bypasses that ship with the model, attention.

    python -m benchmarks.search_quality [--model random-24] [--forwards 1000] [--seeds 0 1 2 3 4] [--state search.jsonl]
    python -m benchmarks.search_quality --model fashion-dit --profile profiles/cpu/fashion-dit

It takes hours. With --state, what each method found for a model, budget and seed is kept there, a JSON line each, and
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

import shiva_search as ss
from benchmarks.state import begun, keep
from shiva_search.models.catalog import load_model
from shiva_search.models.families import family_of
from shiva_search.models.model import Model
from shiva_search.profiling.block_profiler import check_same
from shiva_search.records.budget import Budget
from shiva_search.records.cost import CostEstimate
from shiva_search.records.plan import Plan
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.candidates import PlanCost, Rows, Space, build_space
from shiva_search.search.fidelity import FidelityEvaluator
from shiva_search.search.knapsack import solve
from shiva_search.search.samplers import make_sampler
from shiva_search.search.sensitivity import Effects, measure_effects, reduced
from shiva_search.search.starting import enqueue_start, evaluator_for
from shiva_search.search.study import PlanStudy
from shiva_search.search.trade_sampler import distributions, from_params
from shiva_search.search.variants import variants_of

Curve = list[tuple[float, float]]
BASELINES = ("tpe", "nsga2", "gp", "random")
POINTS = (10, 20, 30, 60, 100, 300, 1000)


@dataclass(frozen=True)
class AnalyticCost:
    """Costs of a block by its operations: linear layers per token, attention by its square, a start-up per block.

    Stands in for a measured cost model where the question is about the search alone.
    """

    tokens: int
    layers: int
    width: int
    steps: int = 16

    def layer_cost(self, metric: str, layer: int, k: int) -> float | None:
        operations = 24 * k * self.width**2 + 4 * k * k * self.width
        startup = 0.05 * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width)
        known = {"latency_ms": (operations + (startup if k else 0.0)) * 1e-7, "gflops": operations * 1e-9}
        return known.get(metric)

    def fixed(self, metric: str) -> float | None:
        full = self.layer_cost(metric, 0, self.tokens)
        return None if full is None else 0.2 * full

    def candidates(self, min_keep: float | None = None) -> tuple[int, ...]:
        grid = sorted({round(self.tokens * i / self.steps) for i in range(self.steps + 1)})
        return tuple(k for k in grid if min_keep is None or k >= min_keep * self.tokens)

    def predict(self, plan: Plan) -> CostEstimate:
        def total(metric: str) -> float:
            rows = [sum(self.layer_cost(metric, i, k) or 0.0 for i, k in enumerate(row)) for row in plan.tokens_kept]
            return (self.fixed(metric) or 0.0) + sum(
                (high - low) * cost for (low, high), cost in zip(plan.segments, rows, strict=True)
            )

        return CostEstimate(total("latency_ms"), gflops=total("gflops"))

    @property
    def dense(self) -> CostEstimate:
        return self.predict(Plan(self.tokens, ((self.tokens,) * self.layers,)))

    def corrected(self, plan: Plan, measured_ratio: float) -> AnalyticCost:
        return self


def random_model(layers: int = 24, side: int = 8, width: int = 32, seed: int = 0) -> Model:
    """A DiT with random weights whose blocks matter: modulation is drawn at random instead of near zero."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    module = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=width // 2, in_channels=1, out_channels=1, num_layers=layers,
        sample_size=side, patch_size=1, num_embeds_ada_norm=10, norm_num_groups=1, activation_fn="gelu-approximate",
    ).eval().requires_grad_(False)  # fmt: skip
    for block in module.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.2)
    torch.nn.init.normal_(module.proj_out_2.weight, std=0.5)
    family = family_of("DiTTransformer2DModel")
    assert family is not None
    return Model(module, f"random-{layers}", family, family.defaults(dict(module.config)), origin="random weights")


def open_model(name: str) -> Model:
    """A name such as "random-24", or whatever load_model knows."""
    if name.startswith("random-"):
        return random_model(int(name.removeprefix("random-")))
    return load_model(name)


@dataclass(frozen=True)
class Problem:
    """A model, what its plans cost, what ranks its tokens, and what its layers may do."""

    model: Model
    cost: PlanCost
    scorer: TokenScorer | str
    variants: list[list[tuple[str, int]]]

    @classmethod
    def of(cls, name: str, profile: Path | None) -> Problem:
        """Token counts alone, unless there is a profile."""
        model = open_model(name)
        if profile is not None:
            taken = ss.load_profile(profile)
            check_same(taken, model, None, f"the profile in {profile}")
            bank, measured = ss.fit_bypasses(model), ss.fit_cost_model(taken)
            return cls(model, measured, bank, variants_of(model, measured, bank))
        width = int(model.config["num_attention_heads"]) * int(model.config["attention_head_dim"])
        return cls(model, AnalyticCost(model.tokens, model.layer_count, width), "stride", [])

    def space(self, share: float) -> Space:
        """The plans within a share of the dense latency, and all others."""
        return build_space(self.model, self.cost, Budget(shares={"latency_ms": share}), variants=self.variants)

    def evaluator(self, space: Space, seed: int, samples: int, chunk: int) -> FidelityEvaluator:
        """Judges plans on the calibration inputs of a seed."""
        return evaluator_for(self.model, self.scorer, space, seed, samples, chunk)


def ours(space: Space, evaluator: FidelityEvaluator, seed: int, forwards: float, sampler: str = "trade") -> Curve:
    """The best error within the limits over work, and last all the work done."""
    space, effects = reduced(space, measure_effects(evaluator, space))
    study = optuna.create_study(directions=["minimize", "minimize"])
    plans = PlanStudy(study, space, effects, evaluator, {"seed": seed, "sampler": sampler, "trials": 10**6})
    enqueue_start(plans, solve(space, effects.errors_PC).plan_P, 10**6, front=False)
    plans.run(10**6, forwards=forwards)
    curve, best = [], np.inf
    for record in plans.records():
        if record.complete and space.feasible(record.plan_P[None])[0] and record.error < best:
            best = record.error
            curve.append((float(record.attributes["forwards"]), best))
    return [*curve, (evaluator.forwards, best)]


class InFull:
    """Errors of plans over the whole batch, in one chunk. What was judged once is known to all baselines of a seed."""

    def __init__(self, evaluator: FidelityEvaluator) -> None:
        self._evaluator = evaluator
        self._known: dict[Rows, float] = {}

    def __call__(self, rows: Rows) -> float:
        if rows not in self._known:
            self._known[rows] = self._evaluator.judge(rows).error
        return self._known[rows]


def baseline(name: str, space: Space, error_of: InFull, seed: int, forwards: float, most_s: float) -> Curve:
    """A sampler of Optuna on the error alone, with the limits as constraints; every proposal is judged in full.

    Returns:
        The best error within the limits over work, and last all the work there was time for.
    """
    dense = float(space.total("latency_ms", space.dense[None])[0])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=make_sampler(name, space, measure_nothing(space), seed))
    work, best, curve = 1.0, np.inf, []
    known = distributions(space)
    proposing_s = 0.0
    while work < forwards and proposing_s < most_s:
        begun_s = time.process_time()
        trial = study.ask(known)
        proposing_s += time.process_time() - begun_s
        plan_P = from_params(space, trial.params)
        excess = {key: float(value[0]) for key, value in space.excess(plan_P[None]).items()}
        for key, value in excess.items():
            trial.set_constraint(key, value)
        error = error_of(space.rows(plan_P))
        study.tell(trial, error)
        work += float(space.total("latency_ms", plan_P[None])[0]) / dense
        if all(value <= 0 for value in excess.values()) and error < best:
            best = error
            curve.append((work, best))
    return [*curve, (work, best)]


def measure_nothing(space: Space) -> Any:
    """Effects for samplers that do not look at them."""
    return Effects.separable(np.zeros(space.kept.shape))


def at(curve: Curve, forwards: float) -> float:
    """Best error after so much work; infinite before the first feasible plan."""
    return min((error for work, error in curve if work <= forwards), default=float("inf"))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", nargs="+", default=["fashion-dit", "random-24"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--forwards", type=float, default=1000.0)
    parser.add_argument("--ours-forwards", type=float, default=300.0)
    parser.add_argument("--methods", nargs="+", default=["ours", *BASELINES], choices=["ours", *BASELINES, "nsga3"])
    parser.add_argument("--gp-seconds", type=float, default=60.0, help="of proposing, for the Gaussian process")
    parser.add_argument("--profile", type=Path, help="folder of measured costs; layers may then do all they can")
    parser.add_argument("--state", type=Path, help="where to keep what is done, and to go on from")
    options = parser.parse_args(arguments)

    asked = {name: getattr(options, name) for name in ("samples", "chunk", "forwards", "ours_forwards", "gp_seconds")}
    asked |= {"profile": None if options.profile is None else str(options.profile)}
    done = begun(options.state, asked)
    known = {(row["model"], row["budget"], row["seed"], row["method"]): row for row in done}
    rows = []
    for name in options.model:
        problem = Problem.of(name, options.profile)
        spaces = {share: problem.space(share) for share in options.budgets}
        for seed in options.seeds:
            in_full = InFull(problem.evaluator(spaces[options.budgets[0]], seed, options.samples, options.samples))
            for share, space in spaces.items():
                judged: dict[str, Any] = {}
                for method in options.methods:
                    if (name, share, seed, method) not in known:
                        if method == "ours":
                            evaluator = problem.evaluator(space, seed, options.samples, options.chunk)
                            curve = ours(space, evaluator, seed, options.ours_forwards)
                        else:
                            most_s = options.gp_seconds if method == "gp" else np.inf
                            curve = baseline(method, space, in_full, seed, options.forwards, most_s)
                        row = {"model": name, "budget": share, "seed": seed, "method": method}
                        row |= {"forwards": round(curve[-1][0], 1)}
                        row |= {f"after_{point}": at(curve, point) for point in POINTS}
                        keep(options.state, row)
                        known[name, share, seed, method] = row
                    judged[method] = known[name, share, seed, method]
                rows.append(
                    {"model": name, "budget": share, "seed": seed}
                    | {
                        key: {method: row[key] for method, row in judged.items()}
                        for key in ("forwards", *(f"after_{point}" for point in POINTS))
                    }
                )
    result = summarise(rows, [method for method in options.methods if method != "ours"])
    print("RESULT " + json.dumps(result))
    return result


def summarise(rows: list[dict[str, Any]], baselines: Sequence[str]) -> dict[str, Any]:
    """Geometric means over models, budgets and seeds; the best other is chosen for each row by itself.

    Empty where this search was not among the methods.
    """
    if not all("ours" in row["forwards"] for row in rows):
        return {}

    def mean(values: list[float]) -> float | None:
        finite = [value for value in values if np.isfinite(value)]
        return float(np.exp(np.mean(np.log(np.maximum(finite, 1e-12))))) if finite else None

    def best(row: dict[str, Any], point: int) -> tuple[float, str]:
        return min(((row[f"after_{point}"][name], name) for name in baselines), default=(float("inf"), ""))

    wins = [best(row, 1000)[1] for row in rows]
    return {
        "ours_100": mean([row["after_100"]["ours"] for row in rows]),
        "ours_300": mean([row["after_300"]["ours"] for row in rows]),
        "best_other_300": mean([best(row, 300)[0] for row in rows]),
        "best_other_1000": mean([best(row, 1000)[0] for row in rows]),
        "best_other": max(set(wins), key=wins.count) if wins else "",
        "never_worse_at_100": all(row["after_100"]["ours"] <= best(row, 1000)[0] for row in rows),
        "most_of_best_at_300": max((row["after_300"]["ours"] / best(row, 300)[0] for row in rows), default=None),
        "forwards_of_gp": [row["forwards"].get("gp") for row in rows],
        "rows": len(rows),
    }


if __name__ == "__main__":
    main()
