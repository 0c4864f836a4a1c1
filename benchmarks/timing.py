"""What the benchmarks of costs share: models to time, held-out plans, and the figures of an error."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from shiva_search.cost import CostModel
from shiva_search.devices import Device
from shiva_search.models.catalog import as_model, load_model
from shiva_search.models.model import Model
from shiva_search.profiling.end_to_end import measure_plans, random_rows
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.selection.router import Router

MODELS = ("fashion-dit", "wide")
PROFILE_SECONDS = {"fashion-dit": 60.0, "wide": 180.0}
MEASURE_SECONDS = {"fashion-dit": 150.0, "wide": 300.0}


def model_named(name: str) -> Model:
    """fashion-dit, or a DiT of 12 blocks, 384 wide, on 1,024 tokens, with random weights."""
    if name == "wide":
        return random_dit(heads=6, head_width=64, layers=12, side=32, batch=1)
    return load_model(name)


def random_dit(heads: int, head_width: int, layers: int, side: int, batch: int) -> Model:
    """A DiT on side x side tokens; latency does not depend on the weights, so they are random."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
        activation_fn="gelu-approximate",
    )
    module.eval().requires_grad_(False)
    return as_model(module, "wide", "random weights", {"batch": batch, "guidance": batch % 2 == 0})


def random_plans(model: Model, count: int, seed: int) -> list[Plan]:
    """Plans of tokens alone, as a search would try them."""
    rows = random_rows(model.layer_count, model.tokens, count, seed)
    return [Plan.from_rows(model, [row], workload=model.workload.as_dict()) for row in rows]


def searched_plans(model: Model, run: Path) -> list[Plan]:
    """The plans on the front that a run of `shiva-search optimize` found."""
    plans = []
    with (run / "pareto.csv").open() as file:
        for line in csv.DictReader(file):
            columns = [json.loads(line[name]) for name in ("tokens_kept", "bypass_ranks", "attend")]
            rows = [[Kept(*choice) for choice in zip(*row, strict=True)] for row in zip(*columns, strict=True)]
            plans.append(Plan.from_rows(model, rows, workload=model.workload.as_dict()))
    return plans


def held_out(
    model: Model,
    cost: CostModel,
    device: Device,
    plans: Sequence[Plan],
    seconds: float,
    seed: int,
    scorer: TokenScorer | None = None,
) -> tuple[np.ndarray, np.ndarray, list[float], float]:
    """Predicted and measured share of the dense latency of plans, half-widths of the measured intervals, and the dense
    latency by then, in ms. Tokens are ranked by a router where there is no scorer.
    """
    chosen, ranked_by = list(plans), scorer or Router.for_model(model, seed=0)
    found = measure_plans(model, chosen, device, scorer_for=lambda plan: ranked_by, seconds=seconds, seed=seed)
    dense_ms = cost.dense.latency_ms or 1.0
    predicted = np.array([(cost.predict(plan).latency_ms or 0.0) / dense_ms for plan in chosen])
    measured = np.array([item.ratio for item in found])
    widths = [(item.ratio_high - item.ratio_low) / 2 / item.ratio for item in found]
    return predicted, measured, widths, found[0].dense_latency_ms


def errors_of(
    predicted: np.ndarray, measured: np.ndarray, widths: Sequence[float], interval: float
) -> dict[str, float]:
    """Relative errors over plans: median, 95th percentile, bias; rank correlation; how often the interval held.

    `coverage` counts measured values within the predicted 90 % interval; `coverage_of_both` allows for a measured
    value's own: half-widths add as errors do, and the measured ones are of 95 %.
    """
    error = predicted / measured - 1
    distance = np.abs(np.log(predicted / measured))
    own = np.array(widths) * 1.645 / 1.96
    return {
        "median_error": float(np.median(np.abs(error))),
        "p95_error": float(np.quantile(np.abs(error), 0.95)),
        "bias": float(np.mean(error)),
        "spearman": float(spearmanr(predicted, measured).statistic),
        "coverage": float(np.mean(distance <= np.log1p(interval))),
        "coverage_of_both": float(np.mean(distance <= np.hypot(np.log1p(interval), own))),
    }


def worst(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The least favourable of each figure over runs; of coverage the mean."""
    return {
        "median_error": max(run["median_error"] for run in runs),
        "p95_error": max(run["p95_error"] for run in runs),
        "bias": max((run["bias"] for run in runs), key=abs),
        "spearman": min(run["spearman"] for run in runs),
        "coverage": float(np.mean([run["coverage"] for run in runs])),
        "coverage_of_both": float(np.mean([run["coverage_of_both"] for run in runs])),
    }


def print_result(result: dict[str, Any]) -> None:
    """The last line of every benchmark."""
    print("RESULT " + json.dumps(result))
