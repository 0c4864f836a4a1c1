"""Operation counts: fvcore against torch's counter and against a formula on paper. A family joins by one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from virtual_device import small_dit

from shiva_search.models.model import Model
from shiva_search.profiling.conditions import record_inputs
from shiva_search.profiling.flops import BlockFlops, ModelFlops
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan


def dit_formula(model: Model, k: int) -> float:
    """Per sample: 4 projections and an MLP of ratio 4 (12 D^2 a token), attention (2 k D a token), modulation."""
    config: dict[str, Any] = dict(model.config)
    width, batch = config["num_attention_heads"] * config["attention_head_dim"], model.workload.batch
    modulation = 256 * width + width**2 + 6 * width**2
    return 2e-9 * batch * (12 * k * width**2 + 2 * k**2 * width + modulation)


FAMILIES: list[tuple[Callable[[], Model], Callable[[Model, int], float]]] = [
    (lambda: small_dit(layers=3), dit_formula),
]


def counted_by_torch(run: Callable[[], object]) -> float:
    """GFLOP by torch; the math backend, since torch counts no fused attention on CPUs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() * 1e-9


@pytest.mark.parametrize(("build", "formula"), FAMILIES)
def test_blocks_agree_with_torch_and_with_paper(
    build: Callable[[], Model], formula: Callable[[Model, int], float]
) -> None:
    model = build()
    layer = model.layers[0]
    kwargs = record_inputs(model, model.example())[layer.signature]
    flops = BlockFlops(layer, kwargs, model.tokens)
    by_torch = counted_by_torch(lambda: layer.module(**kwargs))
    assert flops(model.tokens) == pytest.approx(by_torch, rel=0.01)
    for k in (1, model.tokens // 3, model.tokens):
        assert flops(k) == pytest.approx(formula(model, k), rel=0.01)
        assert flops(k) == pytest.approx(flops.counted(k), rel=1e-6)
    assert flops(0) == 0.0


@pytest.mark.parametrize(("build", "formula"), FAMILIES)
def test_whole_plans_agree_with_torch(build: Callable[[], Model], formula: Callable[[Model, int], float]) -> None:
    model = build()
    inputs = model.example()
    flops = ModelFlops(model, record_inputs(model, inputs))
    assert flops.dense == pytest.approx(counted_by_torch(lambda: model.module(**inputs)), rel=0.01)
    plan = Plan.from_rows(model, [[model.tokens, model.tokens // 2] + [0] * (model.layer_count - 2)])
    with AppliedPlan(model, plan):
        by_torch = counted_by_torch(lambda: model.module(**inputs))
    assert flops.plan(plan) == pytest.approx(by_torch, rel=0.01)
    assert flops.plan(Plan.dense(model)) == pytest.approx(flops.dense)


def test_a_model_of_shapes_counts_the_same() -> None:
    real, shapes = small_dit(), small_dit(device="meta")
    counts = [ModelFlops(model, record_inputs(model, model.example())).dense for model in (real, shapes)]
    assert counts[0] == pytest.approx(counts[1])


def test_counting_leaves_the_model_as_it_was(tiny_model: Model) -> None:
    before = {name: id(value) for name, value in tiny_model.module.named_parameters()}
    ModelFlops(tiny_model, record_inputs(tiny_model, tiny_model.example()))
    assert {name: id(value) for name, value in tiny_model.module.named_parameters()} == before
    assert all("forward" not in layer.module.__dict__ for layer in tiny_model.layers)
