"""Operation counts: fvcore against torch's counter and against a formula on paper. A family joins by one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from virtual_device import small_dit

from shiva_search.models.attend_all import AttendAll
from shiva_search.models.catalog import load_model
from shiva_search.models.model import Layer, Model
from shiva_search.profiling.conditions import record_inputs
from shiva_search.profiling.flops import BlockFlops, ModelFlops
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from tests.models.conformance import FAMILY_CASES, FamilyCase


def of_shapes(name: str, resolution: int, text: int | None) -> Model:
    """A published architecture at its real width: counting runs nothing, so shapes are enough."""
    return load_model(name, real=False, resolution=resolution, text_tokens=text)


def dit_macs(model: Model, layer: Layer, k: int) -> float:
    """4 projections and an MLP of ratio 4 (12 D^2 a token), attention (2 k D a token), modulation."""
    width = layer.module.attn1.to_q.in_features
    return 12 * k * width**2 + 2 * k**2 * width + 256 * width + 7 * width**2


def sd3_macs(model: Model, layer: Layer, k: int) -> float:
    """Both streams as in DiT, one attention over both; some blocks have a second attention, the last no text output."""
    block, text = layer.module, model.workload.text_tokens or 0
    width = block.attn.to_q.in_features
    macs = 12 * width**2 * k + 2 * (k + text) ** 2 * width
    if block.use_dual_attention:
        macs += 4 * width**2 * k + 2 * k**2 * width
    modulation = 9 if block.use_dual_attention else 6
    if block.context_pre_only:
        return macs + 3 * width**2 * text + (modulation + 2) * width**2
    return macs + 12 * width**2 * text + (modulation + 6) * width**2


def flux_macs(model: Model, layer: Layer, k: int) -> float:
    """12 D^2 a token, text and image alike, one attention over both; modulation of two streams or of one."""
    width, text = layer.module.attn.to_q.in_features, model.workload.text_tokens or 0
    modulation = 12 if layer.name.startswith("transformer_blocks") else 3
    return 12 * width**2 * (k + text) + 2 * (k + text) ** 2 * width + modulation * width**2


def pixart_macs(model: Model, layer: Layer, k: int) -> float:
    """DiT's 12 D^2 and 2 more for the cross-attention's query and output, keys and values of the text."""
    width, text = layer.module.attn1.to_q.in_features, model.workload.text_tokens or 0
    return 14 * width**2 * k + 2 * width**2 * text + 2 * k**2 * width + 2 * k * text * width


FAMILIES: list[tuple[Callable[[], Model], Callable[[Model, Layer, int], float]]] = [
    (lambda: small_dit(layers=3), dit_macs),
    (lambda: of_shapes("dit-xl-2", 256, None), dit_macs),
    (lambda: of_shapes("sd3.5-medium", 512, 77), sd3_macs),
    (lambda: of_shapes("flux.1-dev", 512, 128), flux_macs),
    (lambda: of_shapes("pixart-sigma", 512, 100), pixart_macs),
]


def counted_by_torch(run: Callable[[], object]) -> float:
    """GFLOP by torch; the math backend, since torch counts no fused attention on CPUs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() * 1e-9


@pytest.mark.parametrize(("build", "macs"), FAMILIES)
def test_blocks_agree_with_torch_and_with_paper(
    build: Callable[[], Model], macs: Callable[[Model, Layer, int], float]
) -> None:
    model = build()
    recorded = record_inputs(model, model.example())
    for signature, kwargs in recorded.items():
        layer = next(layer for layer in model.layers if layer.signature == signature)
        flops = BlockFlops(layer, kwargs, model.tokens)
        assert flops(model.tokens) == pytest.approx(counted_by_torch(lambda: layer.module(**kwargs)), rel=0.01)  # noqa: B023
        for k in (1, model.tokens // 3, model.tokens):
            on_paper = 2e-9 * model.workload.batch * macs(model, layer, k)
            assert flops(k) == pytest.approx(on_paper, rel=0.01)
            assert flops(k) == pytest.approx(flops.counted(k), rel=1e-6)
        assert flops(0) == 0.0


def test_whole_plans_agree_with_torch() -> None:
    model = small_dit(layers=3)
    inputs = model.example()
    flops = ModelFlops(model, record_inputs(model, inputs))
    assert flops.dense == pytest.approx(counted_by_torch(lambda: model.module(**inputs)), rel=0.01)
    plan = Plan.from_rows(model, [[model.tokens, model.tokens // 2, 0]])
    with AppliedPlan(model, plan):
        by_torch = counted_by_torch(lambda: model.module(**inputs))
    assert flops.plan(plan) == pytest.approx(by_torch, rel=0.01)
    assert flops.plan(Plan.dense(model)) == pytest.approx(flops.dense)


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_blocks_of_every_family_agree_with_torch(case: FamilyCase) -> None:
    model = case.model()
    for signature, kwargs in record_inputs(model, case.example(model, 0)).items():
        layer = next(layer for layer in model.layers if layer.signature == signature)
        flops, adapter = BlockFlops(layer, kwargs, model.tokens), layer.adapter
        for k in (3, model.tokens):
            kept_BK = torch.arange(k).expand(2, k)
            inputs = {**kwargs, adapter.tokens: kwargs[adapter.tokens][:, :k]}
            call = adapter.join(adapter.gather(inputs, kept_BK, model.tokens) if k < model.tokens else inputs)
            by_torch = counted_by_torch(lambda: layer.module(**call))  # noqa: B023
            assert flops(k) == pytest.approx(by_torch, rel=0.01)
        for k in (1, 3, model.tokens - 2) if layer.attends_all else ():
            call = (kwargs, torch.arange(k).expand(2, k), kwargs[adapter.tokens][:, :k])
            by_torch = counted_by_torch(lambda: AttendAll(adapter, layer.module)(*call))  # noqa: B023
            assert flops(Kept(k, 0, "all")) == pytest.approx(by_torch, rel=0.01)
            assert flops(Kept(k)) < by_torch < flops(model.tokens)


def test_a_model_of_shapes_counts_the_same() -> None:
    real, shapes = small_dit(), small_dit(device="meta")
    counts = [ModelFlops(model, record_inputs(model, model.example())).dense for model in (real, shapes)]
    assert counts[0] == pytest.approx(counts[1])


def test_counting_leaves_the_model_as_it_was(tiny_model: Model) -> None:
    before = {name: id(value) for name, value in tiny_model.module.named_parameters()}
    ModelFlops(tiny_model, record_inputs(tiny_model, tiny_model.example()))
    assert {name: id(value) for name, value in tiny_model.module.named_parameters()} == before
    assert all("forward" not in layer.module.__dict__ for layer in tiny_model.layers)
