"""The names of the Python API are there, whichever room was imported before them."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shiva_search as ss


@pytest.mark.parametrize("name", ss.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ss, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ss.nonsense


@pytest.mark.parametrize("first", ["shiva_search.search.knapsack", "shiva_search.api", "shiva_search.search"])
def test_search_is_the_function_also_after_its_room_was_imported(first: str) -> None:
    program = (
        f"import {first}\nimport shiva_search as ss\nfrom shiva_search import search\n"
        "assert ss.search is search\nassert callable(search)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_workload_without_such_a_field_is_refused_by_name() -> None:
    with pytest.raises(ss.ShivaError, match="a workload has no 'colour'; it has batch"):
        ss.load_model("fashion-dit", colour="red")


TIME, PLAN = (
    "finite number of seconds above zero, got {}; try seconds=20",
    "a Plan, a path or a hub id, got {}; make one",
)
SELECTOR = r"a selector is a scorer's name, .* got {}; read one from a file with load_selector\(path\)"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, plan: ss.measure(model, plan, seconds=0), TIME.format("0")),
        (lambda model, plan: ss.measure(model, plan, seconds=-1.0), TIME.format("-1.0")),
        (lambda model, plan: ss.measure(model, plan, seconds=math.nan), TIME.format("nan")),
        (lambda model, plan: ss.measure(model, plan, seconds=math.inf), TIME.format("inf")),
        (lambda model, plan: ss.measure(model, plan, seconds="3"), TIME.format("'3'")),
        (lambda model, plan: ss.measure(model, 3), PLAN.format("3")),
        (lambda model, plan: ss.fidelity(model, None), PLAN.format("None")),
        (lambda model, plan: ss.apply_plan(model, [[4, 2]]), PLAN.format(r"\[\[4, 2\]\]")),
        (lambda model, plan: ss.measure(model, plan, selector=3), SELECTOR.format("3")),
        (lambda model, plan: ss.fidelity(model, plan, 3), SELECTOR.format("3")),
        (lambda model, plan: ss.apply_plan(model, plan, 3), SELECTOR.format("3")),
        (lambda model, plan: ss.measure("run", plan), "measure takes a Model, got a str; make one with load_model"),
        (
            lambda model, plan: ss.fidelity(None, plan),
            "fidelity takes a Model, got a NoneType; make one with load_model",
        ),
        (lambda model, plan: ss.measure(model, plan, 3), "a device is a name such as cpu.* got a int; is it another"),
        (lambda model, plan: ss.measure(model, plan, ss.warm_up(model)), r"such as cpu.* got a Router; is it another"),
        (lambda model, plan: ss.fidelity(model, plan, samples=2.5), "a batch is 1 sample or more of .* got 2.5"),
        (lambda model, plan: ss.apply_plan(model, plan, reuse_updates=0.5), "at least 1 step, a whole number, got 0.5"),
    ],
)
def test_a_stage_refuses_what_it_cannot_take(call: Callable[..., Any], said: str) -> None:
    model = ss.load_model()
    with pytest.raises(ss.InputError, match=said):
        call(model, ss.Plan.uniform(model, 0.5))
    ss.remove_plan(model)


@pytest.mark.parametrize("name", ["nowhere", "no/such/run", "./nowhere", "no/plan.json", Path("no/run")])
@pytest.mark.parametrize("call", [ss.apply_plan, ss.measure, ss.fidelity])
def test_a_folder_that_is_not_there_is_bad_input(call: Callable[..., Any], name: str | Path) -> None:
    with pytest.raises(ss.InputError, match="cannot read plan .*check the path") as refusal:
        call(ss.load_model(), name)
    assert refusal.value.exit_code == 2
    assert "no such folder" in " ".join(str(ss.apply_plan.__doc__).partition("InputError:")[2].split())


def test_arguments_of_another_kind_are_refused_with_what_to_write() -> None:
    model = ss.load_model()
    with pytest.raises(ss.ShivaError, match="of train, calibration, evaluation, got 8 of 'foo'"):
        model.batch("foo", 8)
    with pytest.raises(ss.ShivaError, match="an example is a dict of one forward's keyword arguments, got a tuple"):
        ss.wrap(model.module, example=(1,))
