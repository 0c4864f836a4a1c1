"""Searches of several processes on a real PostgreSQL, killed at any time: nothing is lost and nothing counts twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import optuna
import pytest
from optuna.trial import TrialState

from shiva_search.records.plan import Plan
from shiva_search.search import search, storages
from shiva_search.search.run_search import SearchResult
from shiva_search.search.storages import open_storage
from tests.processes import start, wait_until
from tests.search.workers import (
    BUDGET,
    GRACE_S,
    HEARTBEAT_S,
    SMALL,
    STUDY,
    finished,
    run_search,
    run_worker,
    slow,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "HEARTBEAT_S", HEARTBEAT_S)
    monkeypatch.setattr(storages, "GRACE_S", GRACE_S)


@pytest.fixture
def storage(postgresql: Callable[[], str]) -> str:
    return postgresql()


def go_on(model, cost, storage: str, trials: int) -> SearchResult:  # type: ignore[no-untyped-def]
    return search(model, cost, BUDGET, trials=trials, storage=storage, study_name=STUDY, scorer=slow, **SMALL)


def trials_of(storage: str, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=STUDY, storage=open_storage(storage)).get_trials(states=states)


def test_a_search_killed_again_and_again_goes_on_where_it_was(model, cost, storage: str) -> None:
    before = finished(storage)
    for attempt in range(4):
        process = start(run_search, storage, 1000)
        wanted = len(before) + attempt + 1
        wait_until(lambda wanted=wanted: len(finished(storage)) >= wanted, process)
        time.sleep(0.07 * attempt)  # a different moment of a trial each time
        process.kill()
        process.join()
        after = finished(storage)
        assert before.items() <= after.items()
        before = after
    target = len(before) + 4
    found = go_on(model, cost, storage, target)
    after = finished(storage)
    assert before.items() <= after.items()
    plans = [parameters for parameters, _ in after.values()]
    assert len(set(plans)) == len(plans) == len(found.trials) >= target
    assert not trials_of(storage, TrialState.RUNNING)
    assert found.trials[0]["origin"] == "exact"


def test_workers_agree_on_what_is_feasible_and_share_the_trials(model, cost, storage: str) -> None:
    # All at once on an empty database: the worker waits for the study, whoever makes the tables first.
    processes = [start(run_search, storage, 24), *(start(run_worker, storage) for _ in range(2))]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    complete = trials_of(storage, TrialState.COMPLETE)
    assert len({trial.user_attrs["worker"][1] for trial in complete if "worker" in trial.user_attrs}) == 3
    found = go_on(model, cost, storage, 24)
    assert len(found.trials) >= 24
    limit = 0.6 * cost.dense.latency_ms * (1 + 1e-9)
    for row in found.trials:
        plan = Plan(64, tuple(map(tuple, row["tokens_kept"])))
        assert row["feasible"] == (cost.predict(plan).latency_ms <= limit)
    assert cost.predict(found.plan).latency_ms <= limit


def test_a_killed_worker_of_another_machine_is_noticed_by_its_heartbeat(model, cost, storage: str) -> None:
    go_on(model, cost, storage, 4)
    known = optuna.load_study(study_name=STUDY, storage=open_storage(storage))
    known.set_user_attr("settings", {**known.user_attrs["settings"], "trials": 1000})
    worker = start(run_worker, storage, "elsewhere")

    def stopped_at_a_plan() -> bool:
        """Stops the worker and looks; it goes on where it was not judging a plan."""
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        under_way = trials_of(storage, TrialState.RUNNING)
        if any(len(t.params) == model.layer_count - 1 for t in under_way) and len(finished(storage)) > 5:
            return True
        os.kill(worker.pid, signal.SIGCONT)
        return False

    wait_until(stopped_at_a_plan, worker)
    worker.kill()
    worker.join()
    [lost] = trials_of(storage, TrialState.RUNNING)  # nobody here can tell yet
    before = finished(storage)
    time.sleep(GRACE_S + HEARTBEAT_S)
    found = go_on(model, cost, storage, len(before) + 4)
    assert before.items() <= finished(storage).items()
    assert not trials_of(storage, TrialState.RUNNING)
    assert lost.number in {trial.number for trial in trials_of(storage, TrialState.FAIL)}
    assert len([trial for trial in trials_of(storage, TrialState.COMPLETE) if trial.params == lost.params]) == 1
    assert len(found.trials) >= len(before) + 4


def test_a_worker_that_was_stopped_for_long_goes_on(model, cost, storage: str) -> None:
    worker = started_elsewhere(model, cost, storage)
    wait_until(lambda: bool(trials_of(storage, TrialState.RUNNING)), worker)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)  # as a laptop that sleeps
    time.sleep(GRACE_S + HEARTBEAT_S)
    others_go_on_and_then_it_does(model, cost, storage, worker)


def test_a_worker_that_stands_still_amid_a_transaction_holds_nobody_up(model, cost, storage: str) -> None:
    import psycopg2

    worker = started_elsewhere(model, cost, storage)
    ours, looking = psycopg2.connect(storage), psycopg2.connect(storage)
    looking.autocommit = True
    try:
        ours.cursor().execute("SELECT * FROM studies FOR UPDATE")

        def waits_for_us() -> bool:
            cursor = looking.cursor()
            cursor.execute(
                "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
                "WHERE NOT granted AND datname = current_database()"
            )
            return bool(cursor.fetchone()[0])

        wait_until(waits_for_us, worker)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
    finally:
        ours.close()
        looking.close()
    # The study's row is its alone now.
    others_go_on_and_then_it_does(model, cost, storage, worker)


def started_elsewhere(model, cost, storage: str) -> BaseProcess:  # type: ignore[no-untyped-def]
    go_on(model, cost, storage, 4)
    known = optuna.load_study(study_name=STUDY, storage=open_storage(storage))
    known.set_user_attr("settings", {**known.user_attrs["settings"], "trials": 16})
    return start(run_worker, storage, "elsewhere")


def others_go_on_and_then_it_does(model, cost, storage: str, worker: BaseProcess) -> None:  # type: ignore[no-untyped-def]
    go_on(model, cost, storage, 10)  # gives a trial that stands still to itself
    before = finished(storage)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGCONT)
    worker.join(120)
    assert worker.exitcode == 0
    after = finished(storage)
    assert before.items() <= after.items()
    plans = [parameters for parameters, _ in after.values()]
    assert len(set(plans)) == len(plans) >= 16
