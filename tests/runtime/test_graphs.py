"""A plan whose forwards are CUDA graphs: what is recorded when, and that outputs are those of the plan.

torch's own maker of graphs is played by one that keeps its rules without a GPU: inputs are copied into the tensors it
was made with, and outputs land in the same memory each time. On a GPU the real one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import shiva_search as ss
from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.catalog import load_model
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.graphs import ForwardGraphs
from shiva_search.selection.closed_form import untrained_bypasses

Flat = Callable[..., tuple[torch.Tensor, ...]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each graph takes, in the order they were made."""
    counts: list[int] = []

    def make(flat: Flat, static: tuple[torch.Tensor, ...], pool: object) -> Flat:
        assert pool == "pool"
        counts.append(len(static))
        kept = tuple(torch.empty_like(output) for output in flat(*static))

        def replay(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for mine, its in zip(static, given, strict=True):
                mine.copy_(its)
            for mine, its in zip(kept, flat(*static), strict=True):
                mine.copy_(its)
            return tuple(output.detach() for output in kept)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return counts


@pytest.fixture
def model() -> Iterator[Model]:
    found = load_model("fashion-dit")
    yield found
    ss.remove_plan(found)


def graphed(model: Model, plan: Plan) -> AppliedPlan:
    handle = ss.apply_plan(model, plan, "norm")
    handle.graphs = ForwardGraphs(model.module)  # as capture() does on a GPU
    return handle


def test_outputs_are_those_of_the_plan_and_stay(model: Model, made: list[int]) -> None:
    plan = Plan.uniform(model, 0.5)
    with torch.no_grad():
        with ss.apply_plan(model, plan, "norm"):
            wanted = [model.predict(model.example(seed)) for seed in (1, 2)]
        with graphed(model, plan):
            found = [model.predict(model.example(seed)) for seed in (1, 2)]
        dense = model.predict(model.example(1))
    for mine, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)
    assert made == [len([v for v in model.example(1).values() if isinstance(v, torch.Tensor)])]
    assert not torch.equal(dense, found[0])  # the plan is off again, and its graphs with it


def test_another_batch_is_another_graph(model: Model, made: list[int]) -> None:
    with torch.no_grad(), graphed(model, Plan.uniform(model, 0.5)):
        model.predict(model.example(1))
        inputs = {
            name: value.repeat_interleave(2, 0) if isinstance(value, torch.Tensor) else value
            for name, value in model.example(1).items()
        }
        model.predict(inputs)
        model.predict(model.example(3))
    assert len(made) == 2


def test_each_segment_has_its_graph(model: Model, made: list[int]) -> None:
    plan = Plan.uniform(model, 0.5)
    rows = [*plan.rows, *Plan.uniform(model, 0.3).rows]
    late = Plan.from_rows(model, rows, workload=model.workload.as_dict())
    name = model.family.timestep_argument

    def at(t: float) -> dict[str, object]:
        inputs = model.example(1)
        return {**inputs, name: torch.full_like(inputs[name], t * model.family.timestep_scale)}

    with torch.no_grad():
        with ss.apply_plan(model, late, "norm"):
            wanted = [model.predict(at(t)) for t in (0.25, 0.75)]
        with graphed(model, late):
            found = [model.predict(at(t)) for t in (0.25, 0.75, 0.3, 0.8)]
    assert len(made) == 2
    for mine, its in zip(found, wanted, strict=False):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_a_selector_that_was_written_to_is_recorded_anew(model: Model, made: list[int]) -> None:
    plan = Plan.uniform(model, 0.5)
    bank = untrained_bypasses(model, ranks=(8,)).requires_grad_(False)
    with torch.no_grad():
        with ss.apply_plan(model, plan, bank) as handle:
            handle.graphs = ForwardGraphs(model.module, bank)
            before = [model.predict(model.example(1)) for _ in range(2)][-1]
            for weight in bank.parameters():
                torch.nn.init.normal_(weight)
            found = [model.predict(model.example(1)) for _ in range(2)][-1]
        with ss.apply_plan(model, plan, bank):
            wanted = model.predict(model.example(1))
    assert len(made) == 2
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not torch.equal(before, found)


def test_gradients_are_not_for_graphs(model: Model, made: list[int]) -> None:
    with torch.enable_grad(), graphed(model, Plan.uniform(model, 0.5)):
        model.module(**model.example(1))
    assert made == []


def test_what_cannot_be_captured_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuses)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with (
        torch.no_grad(),
        graphed(model, Plan.uniform(model, 0.5)),
        pytest.raises(UnavailableError, match=r"when stream is capturing\. Leave capture out"),
    ):
        model.predict(model.example(1))


def test_arguments_that_cannot_tell_graphs_apart_are_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(InputError, match="cannot tell graphs apart"):
        ForwardGraphs(torch.nn.Linear(1, 1)).run(lambda thing: thing, (Unhashable(),), {}, 0)


def test_weights_that_moved_are_another_graph_and_none_stays_none(made: list[int]) -> None:
    module = torch.nn.Linear(2, 2).requires_grad_(False)
    graphs, x = ForwardGraphs(module), torch.randn(3, 2)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return module(x), None

    first, nothing = graphs.run(forward, (x,), {}, 0)
    graphs.run(forward, (x,), {}, 0)
    assert len(made) == 1 and nothing is None and torch.equal(first, module(x))
    module.weight.data = module.weight.data + 1
    again, _ = graphs.run(forward, (x,), {}, 0)
    assert len(made) == 2 and torch.equal(again, module(x))


def test_tensors_elsewhere_and_caches_are_refused(model: Model, made: list[int]) -> None:
    with pytest.raises(InputError, match="takes all its tensors from cpu, got one on meta"):
        ForwardGraphs(torch.nn.Linear(1, 1)).run(lambda x: x, (torch.empty(1, device="meta"),), {}, 0)
    module = torch.nn.Linear(1, 1)
    module._diffusers_hook = SimpleNamespace(hooks={"cache": SimpleNamespace(_is_stateful=True)})  # type: ignore[assignment]
    with pytest.raises(UnavailableError, match="decides on the host"):
        ForwardGraphs(module).run(lambda x: x, (torch.ones(1),), {}, 0)
    assert made == []


def test_a_model_on_a_cpu_has_no_graphs(model: Model) -> None:
    with ss.apply_plan(model, Plan.uniform(model, 0.5)) as handle, pytest.raises(UnavailableError, match="on a GPU"):
        handle.capture()


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    model = load_model("fashion-dit", device="cuda")
    plan = Plan.uniform(model, 0.5)
    with torch.no_grad():
        with ss.apply_plan(model, plan, "norm"):
            wanted = [model.predict(model.example(seed)) for seed in (1, 2)]
        with ss.apply_plan(model, plan, "norm").capture():
            found = [model.predict(model.example(seed)) for seed in (1, 2, 1)]
    for mine, its in zip(found, [*wanted, wanted[0]], strict=True):
        torch.testing.assert_close(mine, its)
