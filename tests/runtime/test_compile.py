"""torch.compile with a plan on: the same outputs, one graph, and nothing compiled again once each block has run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import shiva_search as ss
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept
from shiva_search.selection.router import Router
from tests.models.conformance import FAMILY_CASES

CASES = {case.name: case for case in FAMILY_CASES}
FAMILIES = ("dit", "sd3.5", "flux.1-dev")
ONCE = {"error_on_recompile": True}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def falling(model: Model) -> list[int]:
    """A count of its own for every layer."""
    return [max(0, model.tokens - 3 * layer) for layer in range(model.layer_count)]


def attending(model: Model) -> list[Kept]:
    """A count of its own for every layer, most of which attend to all."""
    rest = [Kept(max(2, model.tokens - 3 * layer), 0, "all") for layer in range(1, model.layer_count)]
    return [
        Kept(model.tokens),
        *(k if layer.attends_all else Kept(int(k)) for k, layer in zip(rest, model.layers[1:], strict=True)),
    ]


def at(model: Model, t: float, seed: int) -> dict[str, Any]:
    """Inputs at a normalised time."""
    inputs, name = model.example(seed), model.family.timestep_argument
    return {**inputs, name: torch.full_like(inputs[name], t * model.family.timestep_scale)}


@pytest.mark.parametrize("name", [*FAMILIES, "auraflow"])
def test_a_planned_model_is_one_graph(name: str) -> None:
    model = CASES[name].model()
    check_one_graph(model, falling(model))


@pytest.mark.parametrize("name", [*FAMILIES, "qwen-image"])
def test_with_keys_of_all_tokens_it_still_is(name: str) -> None:
    model = CASES[name].model()
    check_one_graph(model, attending(model))


def check_one_graph(model: Model, row: Sequence[int]) -> None:
    with ss.apply_plan(model, ss.Plan.from_rows(model, [row]), Router.for_model(model)):
        expected = [model.predict(model.example(seed)) for seed in (1, 2)]
        compiled = torch.compile(model.module, fullgraph=True, dynamic=False, backend="aot_eager")
        found = [compiled(**model.example(1), return_dict=False)[0]]
        with torch._dynamo.config.patch(**ONCE):
            found.append(compiled(**model.example(2), return_dict=False)[0])
    assert graphs() == 1 and not counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_model_compiled_before_takes_a_plan_and_gives_it_back() -> None:
    model = CASES["sd3"].model()
    inputs = model.example(1)
    compiled = torch.compile(model.module, fullgraph=True, dynamic=False, backend="aot_eager")

    def run() -> torch.Tensor:
        found: torch.Tensor = compiled(**inputs, return_dict=False)[0]
        return found

    dense = run()
    assert torch.equal(dense, model.predict(inputs))
    plan = ss.Plan.from_rows(model, [falling(model)])
    with ss.apply_plan(model, plan, "norm"):
        expected = model.predict(inputs)
    with ss.apply_plan(compiled, plan, "norm"):
        torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(run(), dense)
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("name", ["dit", "flux.1-dev"])
def test_one_graph_of_a_block_serves_every_count(name: str) -> None:
    model = CASES[name].model()
    kinds = len({layer.signature for layer in model.layers})
    row = [model.tokens] + [model.tokens - 2 * layer for layer in range(1, model.layer_count)]
    inputs = model.example(1)
    with ss.apply_plan(model, ss.Plan.from_rows(model, [row]), Router.for_model(model)) as handle:
        expected = model.predict(inputs)
        handle.compile(backend="aot_eager")
        model.predict(inputs)
        assert kinds <= graphs() <= 2 * kinds  # a first block may get its tokens as a view of an image
        with torch._dynamo.config.patch(**ONCE):
            torch.testing.assert_close(model.predict(inputs), expected, atol=1e-5, rtol=1e-5)


def test_one_graph_of_a_block_serves_every_count_that_attends_to_all() -> None:
    model = CASES["sd3"].model()
    kinds = len({layer.signature for layer in model.layers})
    inputs, row = model.example(1), attending(model)
    with ss.apply_plan(model, ss.Plan.from_rows(model, [row]), Router.for_model(model)) as handle:
        expected = model.predict(inputs)
        handle.compile(fullgraph=True, backend="aot_eager")
        model.predict(inputs)
        handle.controller.rows = [[row[0], *row[:0:-1]]]  # the same counts for other blocks
        model.predict(inputs)
        handle.controller.rows = [row]
        assert graphs() <= 3 * kinds
        with torch._dynamo.config.patch(**ONCE):
            torch.testing.assert_close(model.predict(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["auraflow", "z-image"])
def test_blocks_of_one_sequence_compile_with_keys_of_all_tokens(name: str) -> None:
    model = CASES[name].model()
    inputs = model.example(1)
    with ss.apply_plan(model, ss.Plan.from_rows(model, [attending(model)]), Router.for_model(model)) as handle:
        expected = model.predict(inputs)
        handle.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        model.predict(model.example(2))
        with torch._dynamo.config.patch(**ONCE):
            torch.testing.assert_close(model.predict(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3"])
def test_blocks_compile_with_their_choice_once_per_segment(name: str) -> None:
    model = CASES[name].model()
    rows = [falling(model), [model.tokens] + [2 + layer for layer in range(model.layer_count - 1)]]
    handle = ss.apply_plan(model, ss.Plan.from_rows(model, rows), Router.for_model(model))
    runs = [at(model, 0.2, 1), at(model, 0.8, 2), at(model, 0.3, 3)]
    expected = [model.predict(inputs) for inputs in runs]
    handle.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for t in (0.1, 0.9):
        model.predict(at(model, t, 9))
    warm = graphs()
    assert warm > 0 and not counters["graph_break"]
    with torch._dynamo.config.patch(**ONCE):
        found = [model.predict(inputs) for inputs in runs]
    assert graphs() == warm
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert all(layer.module._compiled_call_impl is None for layer in model.layers)
    handle.put_on()
    handle.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(**ONCE):  # what was compiled for it is still there
        assert torch.equal(model.predict(runs[0]), found[0])
    handle.remove()


def test_24_layers_of_different_counts_stay_within_the_limit_of_recompilations() -> None:
    case = CASES["dit"]
    deep = type(case)(case.name, case.model_class, {**case.config, "num_layers": 24, "sample_size": 16}, case.workload)
    model = deep.model()
    rows = [[64, *range(63, 40, -1)]]
    assert len(set(rows[0])) == 24
    inputs = model.example(1)
    handle = ss.apply_plan(model, ss.Plan.from_rows(model, rows), "norm")
    expected = model.predict(inputs)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for block in model.module.transformer_blocks:  # as a user may, and as diffusers compiles repeated blocks
            block.compile(fullgraph=True, dynamic=False, backend="eager")
        model.predict(inputs)
    assert graphs() == 24
    with torch._dynamo.config.patch(**ONCE):
        assert torch.equal(model.predict(inputs), expected)
    handle.remove()


@pytest.mark.slow
def test_the_compiler_of_this_machine_gives_the_same() -> None:
    case = CASES["dit"]
    model = type(case)(case.name, case.model_class, {**case.config, "num_layers": 2}, case.workload).model()
    inputs = model.example(1)
    with ss.apply_plan(model, ss.Plan.uniform(model, 0.5), Router.for_model(model)) as handle:
        expected = model.predict(inputs)
        handle.compile()
        model.predict(inputs)
        with torch._dynamo.config.patch(**ONCE):
            torch.testing.assert_close(model.predict(inputs), expected, atol=1e-4, rtol=1e-4)
