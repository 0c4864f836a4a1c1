"""Which selector a run goes on with after it was trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from virtual_device import small_dit

import shiva_search as ss
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.bypass import BypassBank
from shiva_search.search.fidelity import fidelity
from shiva_search.selection.closed_form import untrained_bypasses
from shiva_search.workflow.selectors import tuned_selector

STEPS = 3


@pytest.fixture(scope="module")
def model() -> Model:
    return small_dit(layers=3)


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return Plan.from_rows(model, [[model.tokens, Kept(model.tokens // 2, 16), Kept(0, 16)]])


def trained(model: Model, plan: Plan, bank: BypassBank, folder: Path) -> tuple[float, float, list[str]]:
    """Errors before and after, and what was said."""
    said: list[str] = []
    before = copy.deepcopy(bank)
    after, curve, kept = tuned_selector(
        model, plan, bank, steps=STEPS, seed=0, checkpoint=folder / "c.pt", progress=said.append
    )
    assert len(curve) == STEPS
    was, now = (fidelity(model, plan, selector, seed=1) for selector in (before, after))
    assert kept is (now < was)
    return was, now, [line for line in said if "worse" in line]


def test_a_training_that_helps_is_kept(model: Model, plan: Plan, tmp_path: Path) -> None:
    was, now, complaints = trained(model, plan, untrained_bypasses(model, ranks=(16,)), tmp_path)
    assert now < was and not complaints


def test_a_training_that_makes_it_worse_is_not(model: Model, plan: Plan, tmp_path: Path) -> None:
    # A few steps from the closed form lead away from it first.
    was, now, complaints = trained(model, plan, ss.fit_bypasses(model, ranks=(16,), samples=64), tmp_path)
    assert now == was and len(complaints) == 1
