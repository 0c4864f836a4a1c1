"""Studies: every sampler, every storage, resumed after a kill, shared by workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from threadpoolctl import ThreadpoolController, threadpool_info

from shiva_search.errors import InfeasibleBudgetError, InputError, UnavailableError
from shiva_search.records.budget import Budget
from shiva_search.records.plan import Plan
from shiva_search.search import check_budget, fidelity, join_study, search
from shiva_search.search.candidates import build_space
from shiva_search.search.identity import scorer_identity
from shiva_search.search.pareto import non_dominated
from shiva_search.search.sensitivity import Effects
from shiva_search.search.starting import evaluator_for
from shiva_search.search.storages import open_storage
from shiva_search.search.study import PlanStudy
from shiva_search.search.trade_sampler import distributions

BUDGET = Budget(shares={"latency_ms": 0.6})
SMALL = {"samples": 8, "chunk": 4}


@pytest.fixture(scope="module")
def result(model, make_cost):
    return search(model, make_cost(64, 5), BUDGET, trials=30, **SMALL)


def test_the_plan_holds_the_budget_as_predicted_and_is_the_best_judged(model, cost, result) -> None:
    assert cost.predict(result.plan).latency_ms <= 0.6 * cost.dense.latency_ms
    fits = [row["error"] for row in result.trials if row["feasible"] and row["state"] == "complete"]
    assert result.plan.fidelity["error"] == min(fits)
    assert result.plan.fidelity["error"] == pytest.approx(fidelity(model, result.plan, samples=8, chunk=4), rel=1e-6)
    assert result.plan.predicted["latency_ms"] == cost.predict(result.plan).latency_ms
    assert result.plan.predicted["dense_latency_ms"] == cost.dense.latency_ms
    assert result.plan.solver["optimality_gap"] == 0.0
    assert result.plan.tokens_kept[0][0] == 64


def test_trials_say_what_each_plan_costs_and_breaks(cost, result) -> None:
    assert len({str(row["tokens_kept"]) for row in result.trials}) == len(result.trials) >= 30
    limit = 0.6 * cost.dense.latency_ms
    for row in result.trials:
        plan = Plan(64, tuple(map(tuple, row["tokens_kept"])))
        assert row["predicted_latency_ms"] == pytest.approx(cost.predict(plan).latency_ms)
        assert row["constraint_latency_ms"] == pytest.approx(row["predicted_latency_ms"] - limit)
        assert row["feasible"] == (row["constraint_latency_ms"] <= 1e-6)
    assert result.trials[0]["origin"] == "exact"
    assert {"front", "trade"} <= {row["origin"] for row in result.trials}


def test_the_search_improves_on_its_exact_start(result) -> None:
    assert result.plan.fidelity["error"] < result.trials[0]["error"]


def test_the_front_is_not_dominated_and_holds_the_plan(result) -> None:
    rows = result.pareto
    assert [row["predicted_latency_ms"] for row in rows] == sorted(row["predicted_latency_ms"] for row in rows)
    assert [row["error"] for row in rows] == sorted((row["error"] for row in rows), reverse=True)
    [chosen] = [row for row in rows if row["chosen"]]
    assert chosen["tokens_kept"] == [list(row) for row in result.plan.tokens_kept]
    assert all(row["measured_latency_ms"] is None for row in rows)


def test_non_dominated_points() -> None:
    errors, costs = [3.0, 1.0, 2.0, 2.0, 5.0], [1.0, 4.0, 2.0, 2.0, 3.0]
    assert non_dominated(errors, costs) == [0, 2, 1]
    assert non_dominated([], []) == []


def test_same_seed_same_plan_another_seed_other_proposals(model, cost, result) -> None:
    again = search(model, cost, BUDGET, trials=30, **SMALL)
    assert again.plan == result.plan
    assert [row["tokens_kept"] for row in again.trials] == [row["tokens_kept"] for row in result.trials]
    other = search(model, cost, BUDGET, trials=30, seed=1, **SMALL)
    assert [row["tokens_kept"] for row in other.trials] != [row["tokens_kept"] for row in result.trials]


def test_sensitivities_of_one_search_serve_another_on_the_same_choices(model, cost, result) -> None:
    anew = search(model, cost, Budget(shares={"latency_ms": 0.5}), trials=20, **SMALL)
    known = search(model, cost, Budget(shares={"latency_ms": 0.5}), trials=20, effects=result.effects, **SMALL)
    assert known.plan == anew.plan and known.trials[0]["tokens_kept"] == anew.trials[0]["tokens_kept"]
    assert known.forwards < anew.forwards - 1
    fewer = search(
        model, cost, Budget(shares={"latency_ms": 0.6}), trials=1, min_keep=0.25, effects=result.effects, **SMALL
    )
    assert fewer.effects is not result.effects  # other choices: measured anew


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "gp", "random"])
def test_every_sampler_works_and_wastes_no_judgement(model, cost, sampler: str) -> None:
    found = search(model, cost, BUDGET, trials=14, sampler=sampler, **SMALL)
    assert len(found.trials) == 14
    assert cost.predict(found.plan).latency_ms <= 0.6 * cost.dense.latency_ms
    # Only the exact solutions along the front may lie beyond the budget; proposals were moved onto it.
    assert all(row["feasible"] or row["origin"] == "front" for row in found.trials)


def test_unknown_samplers_and_missing_libraries_are_refused(model, cost) -> None:
    with pytest.raises(InputError, match="choose one of trade"):
        search(model, cost, BUDGET, trials=2, sampler="annealing", **SMALL)
    try:
        import cmaes  # noqa: F401
    except ImportError:
        with pytest.raises(UnavailableError, match="pip install cmaes"):
            search(model, cost, BUDGET, trials=2, sampler="cmaes", **SMALL)
    else:
        assert len(search(model, cost, BUDGET, trials=4, sampler="cmaes", **SMALL).trials) == 4


def test_segments_have_rows_of_their_own(model, cost) -> None:
    found = search(model, cost, BUDGET, trials=16, segments=2, **SMALL)
    assert len(found.plan.tokens_kept) == 2 and found.plan.segments == ((0.0, 0.5), (0.5, 1.0))
    assert found.plan.tokens_kept[0] != found.plan.tokens_kept[1]
    assert cost.predict(found.plan).latency_ms <= 0.6 * cost.dense.latency_ms


def test_several_budgets_hold_together(model, cost) -> None:
    dense = cost.dense
    budget = Budget(latency_ms=0.7 * dense.latency_ms, energy_j=0.65 * dense.energy_j, mean_keep=0.6)
    found = search(model, cost, budget, trials=16, **SMALL)
    predicted = cost.predict(found.plan)
    assert predicted.latency_ms <= budget.latency_ms and predicted.energy_j <= budget.energy_j
    assert found.plan.mean_keep <= 0.6
    assert {"constraint_latency_ms", "constraint_energy_j", "constraint_mean_keep"} <= found.trials[0].keys()


def test_infeasible_budgets_are_refused_before_any_work(model, cost) -> None:
    with pytest.raises(InfeasibleBudgetError, match="floor"):
        search(model, cost, Budget(latency_ms=0.5), trials=2, **SMALL)
    with pytest.raises(InfeasibleBudgetError, match="floor"):
        check_budget(model, cost, Budget(latency_ms=0.5))
    check_budget(model, cost, BUDGET)


def test_scorers_are_told_apart() -> None:
    import torch

    from shiva_search.runtime.scorers import Random, Stride

    torch.manual_seed(0)
    names = [
        scorer_identity(s)
        for s in ("stride", Stride(), Random(0), Random(1), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    ]
    assert names[0] == names[1] == "stride"
    assert len(set(names[1:])) == 5


# ---- storages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}/a.journal", "journal:{}/b/c.journal", "sqlite:///{}/d.db"])
def test_a_finished_search_is_found_again_and_a_longer_one_goes_on(model, cost, tmp_path, form: str) -> None:
    storage = form.format(tmp_path)
    first = search(model, cost, BUDGET, trials=6, storage=storage, study_name="s", **SMALL)
    again = search(model, cost, BUDGET, trials=6, storage=storage, study_name="s", **SMALL)
    assert again.plan.tokens_kept == first.plan.tokens_kept
    assert [r["trial"] for r in again.trials] == [r["trial"] for r in first.trials]
    longer = search(model, cost, BUDGET, trials=10, storage=storage, study_name="s", **SMALL)
    assert len(longer.trials) >= 10
    assert [r["trial"] for r in longer.trials][: len(first.trials)] == [r["trial"] for r in first.trials]
    other = search(model, cost, Budget(shares={"latency_ms": 0.8}), trials=3, storage=storage, study_name="s", **SMALL)
    assert other.study_name != "s" and len(other.trials) < 6


@pytest.mark.parametrize(
    ("storage", "error"),
    [
        ("postgresql://nobody@127.0.0.1:1/none", UnavailableError),
        ("oracel://x", UnavailableError),
        ("/proc/no/x", InputError),
    ],
)
def test_storages_that_cannot_be_opened_are_refused_in_one_line(storage: str, error: type[Exception]) -> None:
    with pytest.raises(error) as refusal:
        open_storage(storage)
    assert "\n" not in str(refusal.value)


def test_a_trial_that_fails_is_tried_again(model, cost, tmp_path) -> None:
    class Fragile:
        calls = 0

        def __call__(self, x_BND, t_B, condition_BC, layer):
            Fragile.calls += 1
            if Fragile.calls == 30:
                raise RuntimeError("out of memory")
            return x_BND.norm(dim=-1)

    options = {"trials": 12, "storage": f"{tmp_path}/j", "study_name": "s", **SMALL}
    with pytest.raises(RuntimeError, match="out of memory"):
        search(model, cost, BUDGET, scorer=Fragile(), **options)
    study = optuna.load_study(study_name="s", storage=open_storage(f"{tmp_path}/j"))
    [failed] = study.get_trials(states=(TrialState.FAIL,))
    found = search(model, cost, BUDGET, scorer=Fragile(), **options)
    study = optuna.load_study(study_name="s", storage=open_storage(f"{tmp_path}/j"))
    same = [t for t in study.get_trials(states=(TrialState.COMPLETE,)) if t.params == failed.params]
    assert len(same) == 1 and len(found.trials) >= 12


def test_an_interrupted_search_keeps_its_progress(model, cost, tmp_path) -> None:
    class Impatient:
        calls = 0

        def __call__(self, x_BND, t_B, condition_BC, layer):
            Impatient.calls += 1
            if Impatient.calls == 30:
                raise KeyboardInterrupt
            return x_BND.norm(dim=-1)

    options = {"trials": 12, "storage": f"{tmp_path}/j", "study_name": "s", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        search(model, cost, BUDGET, scorer=Impatient(), **options)
    finished = done(f"{tmp_path}/j")
    assert finished
    search(model, cost, BUDGET, scorer=Impatient(), **options)
    assert finished.items() <= done(f"{tmp_path}/j").items()


def done(storage: str) -> dict[int, tuple]:
    """Finished trials by number."""
    study = optuna.load_study(study_name="s", storage=open_storage(storage))
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    return {t.number: (tuple(sorted(t.params.items())), tuple(t.values)) for t in trials}


SEARCH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("synthetic", {conftest!r})
synthetic = importlib.util.module_from_spec(spec)
sys.modules["synthetic"] = synthetic
spec.loader.exec_module(synthetic)
from shiva_search.records.budget import Budget
from shiva_search.search import search
model = synthetic.build_model()
cost = synthetic.SyntheticCost(64, 5)
search(model, cost, Budget(shares={{"latency_ms": 0.6}}), trials=1000, storage={storage!r}, study_name="s",
       samples=8, chunk=4)
"""


def test_a_killed_search_goes_on_where_it_was(model, cost, tmp_path) -> None:
    storage = f"{tmp_path}/j"
    program = SEARCH.format(conftest=str(Path(__file__).with_name("conftest.py")), storage=storage)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    try:
        until = time.monotonic() + 240
        finished: dict[int, tuple] = {}
        while len(finished) < 5 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.2)
            try:
                finished = done(storage)
            except (KeyError, UnavailableError):
                continue
        assert len(finished) >= 5
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished = done(storage)
    target = len(finished) + 4
    found = search(model, cost, BUDGET, trials=target, storage=storage, study_name="s", **SMALL)
    after = done(storage)
    assert finished.items() <= after.items()
    plans = [params for params, _ in after.values()]
    assert len(set(plans)) == len(plans) == len(found.trials)
    assert len(found.trials) >= target
    study = optuna.load_study(study_name="s", storage=open_storage(storage))
    assert not study.get_trials(states=(TrialState.RUNNING,))


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_joins_and_agrees_on_what_is_feasible(model, cost, tmp_path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    first = search(model, cost, BUDGET, trials=6, storage=storage, study_name="s", **SMALL)
    study = optuna.load_study(study_name="s", storage=storage)
    study.set_user_attr("settings", {**study.user_attrs["settings"], "trials": 12})
    assert join_study(storage, "s", model, trials=2) == 2
    assert join_study(storage, "s", model) >= 1
    assert join_study(storage, "s", model) == 0
    longer = search(model, cost, BUDGET, trials=12, storage=storage, study_name="s", **SMALL)
    assert longer.trials[: len(first.trials)] == first.trials
    assert len(longer.trials) >= 12
    for row in longer.trials:
        plan = Plan(64, tuple(map(tuple, row["tokens_kept"])))
        assert row["feasible"] == (cost.predict(plan).latency_ms <= 0.6 * cost.dense.latency_ms * (1 + 1e-9))


def test_a_worker_with_another_model_or_scorer_is_refused(model, make_model, cost, tmp_path) -> None:
    storage = f"{tmp_path}/j"
    search(model, cost, BUDGET, trials=2, storage=storage, study_name="s", **SMALL)
    with pytest.raises(InputError, match="another model"):
        join_study(storage, "s", make_model(seed=7))
    with pytest.raises(InputError, match="scorer"):
        join_study(storage, "s", model, scorer="norm")
    with pytest.raises(UnavailableError, match="does not exist"):
        join_study(storage, "t", model, wait_s=0.0)


def test_a_worker_waits_for_a_journal_that_is_not_there_and_makes_none(model, tmp_path) -> None:
    said: list[str] = []
    with pytest.raises(UnavailableError, match="there is no journal:.*mistyped"):
        join_study(f"journal:{tmp_path}/mistyped", "s", model, wait_s=0.1, progress=said.append)
    assert len(said) == 1 and "waiting" in said[0]
    assert not list(tmp_path.iterdir())


def test_errors_of_workers_and_owner_agree(model, cost, tmp_path) -> None:
    """The batch is drawn from the study's settings, so that errors of different processes can be compared."""
    storage = f"{tmp_path}/j"
    search(model, cost, BUDGET, trials=3, storage=storage, study_name="s", **SMALL)
    study = optuna.load_study(study_name="s", storage=open_storage(storage))
    study.set_user_attr("settings", {**study.user_attrs["settings"], "trials": 6})
    join_study(storage, "s", model)
    longer = search(model, cost, BUDGET, trials=6, storage=storage, study_name="s", **SMALL)
    for row in longer.trials:
        if row["state"] == "complete":
            plan = Plan.from_rows(model, row["tokens_kept"])
            assert row["error"] == pytest.approx(fidelity(model, plan, samples=8, chunk=4), rel=1e-6)
    assert np.isfinite([row["error"] for row in longer.trials]).all()


class Contested(optuna.storages.InMemoryStorage):
    """Where another process always marks a trial failed just before this one does."""

    def set_trial_state_values(self, trial_id, state, values=None):
        if state == TrialState.FAIL:
            super().set_trial_state_values(trial_id, state)
        return super().set_trial_state_values(trial_id, state, values)


def test_two_processes_may_take_up_a_dead_trial_at_the_same_moment(model, cost) -> None:
    space = build_space(model, cost, BUDGET)
    evaluator = evaluator_for(model, "stride", space, 0, 8, 4)
    study = optuna.create_study(storage=Contested(), directions=["minimize", "minimize"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trial = study.ask(distributions(space))
    trial.set_user_attr("worker", [socket.gethostname(), gone.pid])
    settings = {"seed": 0, "sampler": "trade", "trials": 1}
    plans = PlanStudy(study, space, Effects.separable(np.zeros(space.kept.shape)), evaluator, settings)
    plans.run(1)
    states = [found.state for found in study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.get_trials()[1].params == trial.params


def test_numpy_keeps_to_one_thread_while_plans_are_judged_and_has_its_own_back_afterwards(model, cost) -> None:
    def threads() -> set[int]:
        return {found["num_threads"] for found in threadpool_info() if found["prefix"] == "libscipy_openblas"}

    class Looking:
        """A scorer that looks around."""

        def __call__(self, x_BND: torch.Tensor, *context: object) -> torch.Tensor:
            seen.append(threads())
            return x_BND.norm(dim=-1)

    with ThreadpoolController().select(prefix="libscipy_openblas").limit(limits=2):
        before, seen = threads(), list[set[int]]()
        space = build_space(model, cost, BUDGET)
        evaluator = evaluator_for(model, Looking(), space, 0, 8, 4)
        settings = {"seed": 0, "sampler": "trade", "trials": 3}
        study = optuna.create_study(directions=["minimize", "minimize"])
        plans = PlanStudy(study, space, Effects.separable(np.zeros(space.kept.shape)), evaluator, settings)
        seen.clear()
        plans.run(3)
        assert seen and all(found <= {1} for found in seen)
        assert threads() == before
