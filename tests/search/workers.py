"""A search and its workers as tests start them in processes of their own (tests.processes)."""

from __future__ import annotations

import socket
import time
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from shiva_search.records.budget import Budget
from shiva_search.search import join_study, search, storages
from tests.search.conftest import SyntheticCost, build_model

BUDGET = Budget(shares={"latency_ms": 0.6})
STUDY = "s"
SMALL = {"samples": 8, "chunk": 4}
#: Heartbeats short enough for a test, seconds.
HEARTBEAT_S, GRACE_S = 1, 3

Finished = dict[int, tuple[Any, ...]]


def slow(x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
    """A scorer that takes its time, so that a process can be killed at work."""
    time.sleep(0.01)
    return x_BND.norm(dim=-1)


def run_search(storage: str, trials: int) -> None:
    """The searching process."""
    _prepare()
    model = build_model()
    cost = SyntheticCost(model.tokens, model.layer_count)
    search(model, cost, BUDGET, trials=trials, storage=storage, study_name=STUDY, scorer=slow, **SMALL)  # type: ignore[arg-type]


def run_worker(storage: str, host: str | None = None) -> None:
    """A worker; with `host`, one that looks like another machine's, whose processes nobody here can see."""
    _prepare()
    if host is not None:
        socket.gethostname = lambda: host
    join_study(storage, STUDY, build_model(), scorer=slow, wait_s=120)


def finished(storage: str) -> Finished:
    """Complete trials by number: parameters and values; none while there is no study."""
    try:
        found = optuna.load_study(study_name=STUDY, storage=storages.open_storage(storage))
    except KeyError:
        return {}
    trials = found.get_trials(states=(TrialState.COMPLETE,))
    return {trial.number: (tuple(sorted(trial.params.items())), tuple(trial.values)) for trial in trials}


def _prepare() -> None:
    torch.set_num_threads(1)
    storages.HEARTBEAT_S, storages.GRACE_S = HEARTBEAT_S, GRACE_S
