"""How much faster two workers finish a study than one, on a PostgreSQL of the benchmark's own, each on its own core.

Time counts from a prepared study on: sensitivities are measured once, before, and Python and the model are loaded. What
each worker does for itself, the dense pass over the calibration batch first of all, counts.

    python -m benchmarks.workers [--trials 100] [--budget 0.6]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

import optuna
import torch

from benchmarks.search_quality import AnalyticCost
from benchmarks.timing import print_result
from shiva_search.models.catalog import load_model, shipped_router
from shiva_search.models.model import Model
from shiva_search.records.budget import Budget
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search import join_study
from shiva_search.search.candidates import Space, build_space
from shiva_search.search.identity import problem_digest, scorer_identity
from shiva_search.search.knapsack import solve
from shiva_search.search.sensitivity import Effects, measure_effects, reduced
from shiva_search.search.shared_problem import create, share_problem
from shiva_search.search.starting import enqueue_start, evaluator_for
from shiva_search.search.storages import open_storage
from shiva_search.search.study import PlanStudy
from shiva_search.selection.loading import load_selector
from tests.postgres import programs, running


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--budget", type=float, default=0.6, help="share of the dense latency")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    cores, folder = sorted(os.sched_getaffinity(0))[:2], programs()
    if len(cores) < 2 or folder is None:
        parser.error("needs two cores, and PostgreSQL's initdb and postgres (apt-get install postgresql)")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that start from here on

    model, scorer = opened(options.model)
    width = int(model.config["num_attention_heads"]) * int(model.config["attention_head_dim"])
    space = build_space(
        model, AnalyticCost(model.tokens, model.layer_count, width), Budget(shares={"latency_ms": options.budget})
    )
    problem = _Problem(model, scorer, space, options)
    with running(folder) as server:
        spent = {count: problem.finish(server.new_database(), cores[:count]) for count in (1, 2)}
    (one_s, one), (two_s, two) = spent[1], spent[2]
    result = {
        "ratio": one_s / two_s,
        "one_s": one_s,
        "two_s": two_s,
        "trials": options.trials,
        "judged_by_one": one,
        "judged_by_two": two,
    }
    print(
        f"{options.trials} plans: {one_s:.1f} s by one worker, {two_s:.1f} s by two, each on its own core: "
        f"{result['ratio']:.2f} times as fast"
    )
    print_result(result)
    return result


class _Problem:
    """What all studies are about; prepared once."""

    def __init__(self, model: Model, scorer: TokenScorer | str, space: Space, options: argparse.Namespace) -> None:
        self.options = options
        self.digest = problem_digest(model, scorer, space, options.samples, options.chunk, options.seed)
        self.evaluator = evaluator_for(model, scorer, space, options.seed, options.samples, options.chunk)
        self.settings = {
            "seed": options.seed, "sampler": "trade", "trials": options.trials, "samples": options.samples,
            "chunk": options.chunk, "model": model.fingerprint(), "scorer": scorer_identity(scorer),
        }  # fmt: skip
        self.space: Space
        self.effects: Effects
        self.space, self.effects = reduced(space, measure_effects(self.evaluator, space))

    def finish(self, url: str, cores: Sequence[int]) -> tuple[float, list[int]]:
        """Seconds until workers on these cores have finished the study, and how many plans each judged."""
        study = create("workers", open_storage(url), 2, self.digest)
        share_problem(study, self.space, self.effects, self.settings)
        plans = PlanStudy(study, self.space, self.effects, self.evaluator, self.settings)
        enqueue_start(plans, solve(self.space, self.effects.errors_PC).plan_P, self.options.trials)
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(len(cores) + 1)
        workers = [context.Process(target=work, args=(url, self.options.model, core, ready)) for core in cores]
        for worker in workers:
            worker.start()
        ready.wait(300)
        begun = time.perf_counter()
        for worker in workers:
            worker.join()
        spent_s = time.perf_counter() - begun
        assert not any(worker.exitcode for worker in workers), "a worker failed"
        records = plans.records()
        assert len(records) >= self.options.trials
        by = [tuple(record.attributes["worker"]) for record in records]
        return spent_s, sorted(by.count(name) for name in set(by))


def work(url: str, model_name: str, core: int, ready: Barrier) -> None:
    """A worker: one thread on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    model, scorer = opened(model_name)
    ready.wait(300)
    join_study(url, "workers", model, scorer=scorer)


def opened(name: str) -> tuple[Model, TokenScorer | str]:
    """The model, and the router that ships with it where one does."""
    model = load_model(name)
    router = shipped_router(model)
    return model, "stride" if router is None else load_selector(router)


if __name__ == "__main__":
    main()
