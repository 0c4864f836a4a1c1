"""The budgets that benchmarks/budgets.py draws: feasible ones are, the others are refused with a usable floor."""

from __future__ import annotations

import json

import pytest

from benchmarks.budgets import feasible_budgets, infeasible_budgets, refusal, summary_of
from benchmarks.state import begun, keep
from shiva_search.errors import InputError
from shiva_search.records.budget import Budget
from shiva_search.search import check_budget


def test_feasible_budgets_span_floor_to_dense_and_every_fourth_has_two(model, cost) -> None:
    budgets = feasible_budgets(model, cost, 20, seed=0)
    for texts in budgets:
        check_budget(model, cost, Budget.parse(texts))
    shares = [float(texts["latency_ms"].rstrip("%")) for texts in budgets]
    floor = 100 * (cost.fixed_ms + cost.layer_cost("latency_ms", 0, 64)) / cost.dense.latency_ms
    assert shares == sorted(shares) and floor <= shares[0] < floor + 5 and 95 < shares[-1] <= 100
    assert [len(texts) for texts in budgets] == [1, 1, 1, 2] * 5
    assert {name for texts in budgets for name in texts} == {"latency_ms", "mean_keep", "gflops", "memory_mib"}
    assert feasible_budgets(model, cost, 20, seed=0) == budgets != feasible_budgets(model, cost, 20, seed=1)


def test_infeasible_budgets_are_refused_and_the_named_floor_is_feasible(model, cost) -> None:
    budgets = infeasible_budgets(model, cost, 10, seed=1)
    assert {next(iter(texts)) for texts in budgets} == {"latency_ms", "mean_keep", "gflops", "memory_mib"}
    refusals = [refusal(model, cost, texts) for texts in budgets]
    assert all(row == {"refused": True, "named_floor_feasible": True} for row in refusals)
    assert refusal(model, cost, {"latency_ms": "90%"}) == {"refused": False, "named_floor_feasible": False}


def test_runs_that_return_no_plan_count_as_tried_alone() -> None:
    done = {"exit_code": 0, "held": True, "held_with_interval": False, "slack": 0.02, "used_most": 0.98}
    broken = {"exit_code": 0, "held": False, "held_with_interval": False, "slack": -0.01, "used_most": 1.01}
    summary = summary_of([done, broken, {"exit_code": 5, "error": "..."}], [])
    assert (summary["held"], summary["returned"], summary["tried"]) == (1, 2, 3)
    assert summary["median_slack"] == 0.02 and summary["most_used"] == 1.01


def test_a_state_file_goes_on_with_the_same_question_only(tmp_path, capsys) -> None:
    state = tmp_path / "state.jsonl"
    assert begun(state, {"count": 2}) == []
    keep(state, {"index": 0})
    assert begun(state, {"count": 2}) == [{"index": 0}]
    assert json.loads(capsys.readouterr().out) == {"index": 0}
    with pytest.raises(InputError, match="name another file"):
        begun(state, {"count": 3})
    assert begun(None, {"count": 2}) == []
