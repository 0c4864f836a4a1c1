"""How well a profile repeats: the same one taken five times, then two more with a busy loop on one core.

Printed next to it: what torch.utils.benchmark's blocked_autorange gives on the same cells, one after the other, in the
same time. Each figure is the median over cells of the coefficient of variation of a cell's ratio to the dense block.

    python -m benchmarks.repeatability [--seconds 30]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.benchmark import Timer

from benchmarks.timing import MODELS, model_named, print_result
from shiva_search.devices import Device, open_device
from shiva_search.models.model import Model
from shiva_search.profiling.bench import Bench
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.conditions import deployed
from shiva_search.selection.router import Router

Ratios = dict[tuple[str, int], float]


def ours(model: Model, device: Device, seconds: float, seed: int) -> Ratios:
    profile = profile_model(model, device, seconds=seconds, seed=seed, scorer=Router.for_model(model, seed=0))
    dense = {row.signature: row.latency_ms for row in profile.rows if row.tokens_kept == profile.tokens}
    return {(row.signature, row.tokens_kept): row.latency_ms / dense[row.signature] for row in profile.rows}


def one_after_the_other(model: Model, device: Device, seconds: float) -> Ratios:
    """blocked_autorange on every block cell in turn."""
    found: Ratios = {}
    with deployed(model):
        bench = Bench(model, device, Router.for_model(model, seed=0), 0, None)
        bench.prepare([], None)
        cells = {key: cell for key, cell in bench.blocks.items() if not cell.selection}
        for key, cell in cells.items():
            run = bench.sampler.cells[key].run
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            found[cell.signature, cell.tokens_kept] = timer.blocked_autorange(min_run_time=seconds / len(cells)).median
    dense = {signature: found[signature, model.tokens] for signature, _ in found}
    return {(signature, k): value / dense[signature] for (signature, k), value in found.items()}


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def variation(runs: Sequence[Ratios]) -> float:
    """Median over cells of standard deviation over mean; the dense block, one by definition, and skips are left out."""
    common = set.intersection(*(set(run) for run in runs))
    values = [np.array([run[key] for run in runs]) for key in common]
    spread = [float(value.std(ddof=1) / value.mean()) for value in values if value.mean() > 0.01 and value.std() > 0]
    return float(np.median(spread))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="fashion-dit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each profile")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, device = model_named(options.model), open_device(options.device)
    model.module.to(device.torch_device)
    quiet, loaded, autorange = [], [], []
    for repeat in range(options.repeats):
        quiet.append(ours(model, device, options.seconds, repeat))
        autorange.append(one_after_the_other(model, device, options.seconds))
        print(f"repeat {repeat + 1} of {options.repeats}", flush=True)
    with busy_core():
        loaded = [ours(model, device, options.seconds, options.repeats + i) for i in range(2)]
    result = {
        "cv": variation(quiet),
        "cv_loaded": variation([*quiet[: options.repeats - 2], *loaded]),
        "cv_blocked_autorange": variation(autorange),
        "cells": len(quiet[0]),
        "repeats": options.repeats,
        "seconds": options.seconds,
    }
    print(
        f"ratio to dense over {options.repeats} profiles: {result['cv']:.2%}; with two of them beside a busy loop: "
        f"{result['cv_loaded']:.2%}; blocked_autorange, cell after cell: {result['cv_blocked_autorange']:.2%}"
    )
    print_result(result)


if __name__ == "__main__":
    main()
