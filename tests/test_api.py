"""The names of the Python API are there, whichever room was imported before them."""

import subprocess
import sys

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


def test_arguments_of_another_kind_are_refused_with_what_to_write() -> None:
    model = ss.load_model()
    with pytest.raises(ss.ShivaError, match="of train, calibration, evaluation, got 8 of 'foo'"):
        model.batch("foo", 8)
    with pytest.raises(ss.ShivaError, match="an example is a dict of one forward's keyword arguments, got a tuple"):
        ss.wrap(model.module, example=(1,))
