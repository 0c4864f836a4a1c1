"""What the choice of tokens is worth: output error of scorers at the same plans, against skipping whole blocks.

On fashion-dit and its held-out "evaluation" images, at uniform keep 0.6 with rejected tokens that stand still, at the
same with a bypass, and at a given plan: the untrained scorers, the choice by each token's true update ("oracle": it
runs every block in full first), the selector that ships, and tuned at the plan; then skipping whole blocks at no more
than the same latency, the best set by error on "calibration" images. Where a plan asks for a bypass, all scorers have
the one that ships. Latency is measured, all rows interleaved with the dense model; the oracle has none. With
--samples, images are generated and scored by the shipped classifier.

    python -m benchmarks.fidelity [--plan reports/demo] [--tune-steps 100] [--samples 1000]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shiva_search as ss
from benchmarks.timing import print_result
from shiva_search.devices import open_device
from shiva_search.models.catalog import load_model
from shiva_search.models.model import Model
from shiva_search.models.reference.evaluation import sample, score_samples, velocity_of
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.bypass import Accompanied, BypassBank
from shiva_search.runtime.scorers import SCORERS, TokenScorer
from shiva_search.runtime.selector import Selector
from shiva_search.search.fidelity import FidelityEvaluator
from shiva_search.selection.training import tune

KEEP = 0.6
GUIDANCE_SCALE, SAMPLER_STEPS = 2.5, 25
#: More sets of blocks than this are not tried one by one.
MOST_SETS = 200


class Oracle:
    """Ranks tokens by the update the block would give them if it saw all of them; as dear as the dense block."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seen: dict[int, dict[str, Any]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what each block is called with."""
        hooks = []
        for layer in self.model.layers:

            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: Any = layer) -> None:
                self.seen[layer.index] = {**kwargs, **dict(zip(layer.arguments, args, strict=False))}

            hooks.append(layer.module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
        """Sizes of the updates [B, N]."""
        block = self.model.layers[layer]
        inputs = {**self.seen[layer], block.adapter.tokens: x_BND}
        with torch.no_grad():
            out_BND, _ = block.adapter.unpack(type(block.module).forward(block.module, **inputs))
        return (out_BND - x_BND).float().norm(dim=-1)


@dataclass
class Entry:
    """One row: a way to choose, at a plan.

    Attributes:
        method: how tokens (or blocks) are chosen.
        name: of the plan it is compared at.
        plan, scorer: what runs.
        figures: error, latency_share, frechet, agreement; None where unknown.
    """

    method: str
    name: str
    plan: Plan
    scorer: TokenScorer | str
    figures: dict[str, float | None] = field(default_factory=dict)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def skip_only(model: Model, limit: float, shares: Mapping[int, float], batch_size: int, seed: int) -> Plan:
    """The best plan without token selection whose latency share is within `limit`, by error on calibration images.

    Args:
        shares: measured share of the dense latency by number of blocks skipped.
    """
    count = min((skipped for skipped, share in shares.items() if share <= limit), default=max(shares))
    sets = list(itertools.islice(itertools.combinations(range(1, model.layer_count), count), MOST_SETS))
    judge = FidelityEvaluator(model, "stride", model.batch("calibration", batch_size, seed))
    rows = [[0 if layer in out else model.tokens for layer in range(model.layer_count)] for out in sets]
    return Plan.from_rows(model, [min(rows, key=judge.error)], workload=model.workload.as_dict())


def skip_shares(model: Model, device_name: str, seconds: float) -> dict[int, float]:
    """Measured share of the dense latency by number of blocks skipped; which ones makes no difference to it."""
    layers = model.layer_count
    counts = range(1, layers)
    plans = [
        Plan.from_rows(model, [[model.tokens] * (layers - count) + [0] * count], workload=model.workload.as_dict())
        for count in counts
    ]
    found = measure_plans(model, plans, open_device(device_name), seconds=seconds)
    return {count: item.ratio for count, item in zip(counts, found, strict=True)}


def error_of(model: Model, entry: Entry, images: int, seed: int) -> float:
    """NMSE of the output against the dense one on held-out images, at stratified timesteps."""
    batch = model.batch("evaluation", images, seed)
    return FidelityEvaluator(model, entry.scorer, batch, segments=entry.plan.segments).error(entry.plan)


def score(model: Model, entry: Entry | None, samples: int, seed: int) -> dict[str, float]:
    """Frechet distance and classifier agreement of generated images; None is the dense model."""
    labels = torch.arange(samples) % 10

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(velocity_of(model.module), labels, SAMPLER_STEPS, GUIDANCE_SCALE, generator)

    if entry is None:
        return score_samples(draw(), labels)
    with AppliedPlan(model, entry.plan, entry.scorer, guidance=True):
        return score_samples(draw(), labels)


def entries_at(model: Model, name: str, plan: Plan, selector: Selector, tune_steps: int, seed: int) -> list[Entry]:
    """All ways to choose tokens at one plan; where it asks for a bypass, all have the one that `selector` brings."""
    ways: dict[str, TokenScorer | str] = {}
    for name_of, untrained in {**{key: make() for key, make in SCORERS.items()}, "oracle": Oracle(model)}.items():
        ways[name_of] = Accompanied(untrained, selector) if isinstance(selector, BypassBank) else untrained
    ways["bypass" if isinstance(selector, BypassBank) else "router"] = selector
    if tune_steps:
        tuned = copy.deepcopy(selector)
        ways["tuned"] = tune(model, tuned, plan, steps=tune_steps, seed=seed, progress=tell)[0]
    return [Entry(method, name, plan, scorer) for method, scorer in ways.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, help="plan.json or a run's folder, beside uniform keep")
    parser.add_argument("--tune-steps", type=int, default=100, help="0 leaves the tuned rows out")
    parser.add_argument("--images", type=int, default=256, help="held-out images per error")
    parser.add_argument("--samples", type=int, default=0, help="generated images per row; 0 leaves these figures empty")
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring latency; 0 leaves it empty")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_model()
    still, moving = ss.warm_up(model), ss.fit_bypasses(model)
    k = int(model.tokens * KEEP)
    given = model.workload.as_dict()
    jobs: list[tuple[str, Plan, Selector]] = [
        (f"uniform {KEEP}", Plan.uniform(model, KEEP, workload=given), still),
        (
            f"uniform {KEEP}, bypass",
            Plan.from_rows(
                model, [[model.tokens, *[Kept(k, moving.ranks[1])] * (model.layer_count - 1)]], workload=given
            ),
            moving,
        ),
    ]
    if options.plan is not None:
        plan = Plan.from_file(options.plan)
        jobs.append(("searched", plan, still if plan.bypass["kind"] == "none" else moving))
    entries = [
        entry
        for name, plan, selector in jobs
        for entry in entries_at(model, name, plan, selector, options.tune_steps, options.seed)
    ]
    if options.seconds:
        timed = [entry for entry in entries if entry.method != "oracle"]
        scorers = {id(entry.plan): entry.scorer for entry in timed}
        for entry in timed:  # measured by row: plans are told apart by identity
            entry.plan = replace(entry.plan)
            scorers[id(entry.plan)] = entry.scorer
        found = measure_plans(
            model, [entry.plan for entry in timed], open_device(options.device),
            scorer_for=lambda plan: scorers[id(plan)], seconds=options.seconds * 0.8, seed=options.seed,
        )  # fmt: skip
        for entry, measured in zip(timed, found, strict=True):
            entry.figures["latency_share"] = measured.ratio
        shares = skip_shares(model, options.device, options.seconds * 0.2)
        for name, _, _ in jobs:
            limit = min(
                e.figures["latency_share"] or 1.0 for e in timed if e.name == name and isinstance(e.scorer, Selector)
            )
            plan = skip_only(model, limit, shares, batch_size=64, seed=options.seed)
            skipped = sum(k == 0 for k in plan.tokens_kept[0])
            entries.append(Entry("skip-only", name, plan, "stride", {"latency_share": shares[skipped]}))
    rows: list[dict[str, Any]] = []
    dense = score(model, None, options.samples, options.seed) if options.samples else {}
    rows.append({"method": "dense", "plan": "dense", "latency_share": 1.0, "error": 0.0, **dense})
    for entry in entries:
        inner = entry.scorer.scorer if isinstance(entry.scorer, Accompanied) else entry.scorer
        watched = inner.watching() if isinstance(inner, Oracle) else nullcontext()
        with watched:
            entry.figures["error"] = error_of(model, entry, options.images, options.seed)
            if options.samples:
                entry.figures |= score(model, entry, options.samples, options.seed)
        rows.append({"method": entry.method, "plan": entry.name, **entry.figures})
    columns = ("method", "plan", "latency_share", "error", "frechet", "agreement")
    rows = [{name: row.get(name) for name in columns} for row in rows]
    for row in rows:
        print("  ".join(f"{_cell(row[name]):>12}" for name in columns))
    print_result({"rows": rows, "images": options.images, "samples": options.samples})


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
