"""Every block family: exact when all tokens are kept, equal to a plain loop when not, gone when removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.models.attend_all import AttendAll
from shiva_search.models.blocks import PerSampleTable
from shiva_search.models.model import Model, output_tensor
from shiva_search.profiling.conditions import record_inputs
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from tests.models.conformance import (
    FAMILY_CASES,
    KEEP,
    READINGS,
    FamilyCase,
    attending_row,
    blocks_of,
    norm_scores,
    slow_copy,
    uniform_row,
)

RowOf = Callable[[Model, float], Sequence[int]]


@pytest.fixture(params=FAMILY_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    found: FamilyCase = request.param
    return found


@pytest.fixture
def model(case: FamilyCase) -> Iterator[Model]:
    model = case.model()
    yield model
    assert not model.module._forward_pre_hooks
    assert not [layer.name for layer in model.layers if "forward" in vars(layer.module)]


def test_keep_all_is_bit_identical(case: FamilyCase, model: Model) -> None:
    inputs = case.example(model, seed=1)
    assert model.workload.batch == 2
    dense = model.predict(inputs)
    with AppliedPlan(model, Plan.dense(model), "norm"):
        assert torch.equal(model.predict(inputs), dense)
    with AppliedPlan(model, Plan.uniform(model, 0.5), "norm"):
        assert not torch.equal(model.predict(inputs), dense)
    assert torch.equal(model.predict(inputs), dense)


@pytest.mark.parametrize("row_of", [uniform_row, attending_row])
@pytest.mark.parametrize("keep", KEEP)
def test_pruned_equals_a_loop_over_samples_and_tokens(
    case: FamilyCase, model: Model, keep: float, row_of: RowOf
) -> None:
    row, inputs = row_of(model, keep), case.example(model, seed=2)
    expected = output_tensor(slow_copy(model, row, norm_scores)(**inputs))
    kept_by_layer: dict[int, torch.Tensor] = {}
    with AppliedPlan(model, Plan.from_rows(model, [row]), "norm", guidance=False) as applied:
        applied.controller.observer = lambda layer, x, out, kept: kept_by_layer.update({layer: kept})
        planned = model.predict(inputs)
    assert any(not torch.equal(kept[0], kept[1]) for layer, kept in kept_by_layer.items() if layer)
    torch.testing.assert_close(planned, expected, atol=1e-5, rtol=1e-5)


def test_skipped_blocks_equal_the_loop(case: FamilyCase, model: Model) -> None:
    row = [model.tokens, 0, 5, *[1] * (model.layer_count - 4), 0]
    inputs = case.example(model, seed=3)
    expected = output_tensor(slow_copy(model, row, norm_scores)(**inputs))
    with AppliedPlan(model, Plan.from_rows(model, [row]), "norm", guidance=False):
        torch.testing.assert_close(model.predict(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row_of", [uniform_row, attending_row])
def test_gradients_equal_those_of_the_loop(case: FamilyCase, model: Model, row_of: RowOf) -> None:
    row, inputs = row_of(model, KEEP[0]), case.example(model, seed=4)
    slow = slow_copy(model, row, norm_scores)
    gradients = []
    for module in (slow, model.module):
        image = inputs[model.family.image_argument].clone().requires_grad_()
        module.requires_grad_(True)
        call = {**inputs, model.family.image_argument: image}
        if module is slow:
            output = output_tensor(module(**call))
        else:
            with AppliedPlan(model, Plan.from_rows(model, [row]), "norm", guidance=False):
                output = model.predict(call)
        output.square().sum().backward()
        weights = [value.grad for block in blocks_of(module) for value in block.parameters() if value.grad is not None]
        assert image.grad is not None
        gradients.append([image.grad, *weights])
    model.module.requires_grad_(False)
    assert len(gradients[0]) == len(gradients[1]) > model.layer_count
    for expected, found in zip(*gradients, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=1e-5 * max(scale, 1.0), rtol=1e-5)


@pytest.mark.parametrize("row_of", [uniform_row, attending_row])
def test_samples_do_not_depend_on_their_batch(model: Model, row_of: RowOf) -> None:
    batch = model.batch("calibration", 3, seed=1)
    with AppliedPlan(model, Plan.from_rows(model, [row_of(model, 0.5)]), "norm", guidance=False):
        together = model.predict(batch.inputs)
        apart = torch.cat([model.predict(one.inputs) for one in batch.chunks(1)])
        picked = model.predict(batch.take([2, 0]).inputs)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[[2, 0]], picked, atol=1e-5, rtol=1e-5)


def test_with_all_tokens_kept_attending_to_all_is_the_block_itself(case: FamilyCase, model: Model) -> None:
    recorded = record_inputs(model, case.example(model, seed=7))
    for layer in {layer.signature: layer for layer in reversed(model.layers)}.values():
        assert layer.attends_all == READINGS[type(layer.module).__name__].keys_of_all
        if not layer.attends_all:
            continue
        adapter, call = layer.adapter, recorded[layer.signature]
        x_BND, everyone = call[adapter.tokens], torch.arange(model.tokens).expand(2, model.tokens)
        output = AttendAll(adapter, layer.module)(call, everyone, x_BND)
        for found, expected in zip(
            adapter.unpack(output), adapter.unpack(adapter.apart(layer.module.forward)(**call)), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_said_of_the_model_is_what_its_blocks_see(case: FamilyCase, model: Model) -> None:
    seen: dict[str, torch.Tensor] = {}
    layer = model.layers[0]
    handle = layer.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update({**kwargs, **dict(zip(layer.arguments, args, strict=False))}),
        with_kwargs=True,
    )
    inputs = case.example(model, seed=5)
    try:
        output = model.predict(inputs)
    finally:
        handle.remove()
    apart = layer.adapter.split(seen, model.tokens)
    assert apart[layer.adapter.tokens].shape[:2] == (model.workload.batch, model.tokens)
    assert layer.adapter.condition(layer.module, seen).ndim == 2
    assert output.isfinite().all()
    assert model.fingerprint()["tokens"] == model.tokens
    assert model.fingerprint()["layers"] == len(blocks_of(model.module)) == model.layer_count
    found = model.like(inputs)
    assert found.workload.as_dict() == {**model.workload.as_dict(), "resolution": found.workload.resolution,
                                        "text_tokens": found.workload.text_tokens}  # fmt: skip
    assert found.tokens == model.tokens
    times = model.times(inputs)
    assert times.shape == (2,) and ((times > 0.01) & (times < 1)).any()


def test_drawn_batches_are_stratified_and_repeatable(model: Model) -> None:
    first, again, other = (model.batch("calibration", 8, seed=seed) for seed in (0, 0, 1))
    image = model.family.image_argument
    assert torch.equal(first.inputs[image], again.inputs[image])
    assert not torch.equal(first.inputs[image], other.inputs[image])
    assert sorted((first.t_B * 8).int().tolist()) == list(range(8))
    torch.testing.assert_close(model.times(first.inputs), first.t_B, atol=1e-3, rtol=0)


def test_guidance_halves_of_one_image_share_their_selection(case: FamilyCase, model: Model) -> None:
    inputs = case.example(model, seed=6)
    kept_of: list[torch.Tensor] = []
    with AppliedPlan(model, Plan.uniform(model, 0.5), "norm") as applied:
        applied.controller.observer = lambda layer, x, out, kept: kept_of.append(kept) if layer else None
        model.predict(inputs)
        assert any(not torch.equal(kept[0], kept[1]) for kept in kept_of)
        kept_of.clear()
        half = inputs[model.family.image_argument][:1]
        model.predict({**inputs, model.family.image_argument: torch.cat([half, half])})
        assert all(torch.equal(kept[0], kept[1]) for kept in kept_of)


def test_another_resolution_than_the_plans_is_refused(model: Model) -> None:
    side = model.family.resolution_of(model.config, model.tokens, model.family.planes(model.config, model.workload))
    larger = model.at(side * 3 // 2)
    assert 4 * larger.tokens == 9 * model.tokens
    refusal = pytest.raises(InputError, match=f"{model.tokens} image tokens.* {larger.tokens}")
    with AppliedPlan(model, Plan.uniform(model, 0.5)), refusal:
        model.predict(larger.example())


def _per_token_timesteps(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {**inputs, "timestep": inputs["timestep"][:, None].expand(-1, tokens)}


#: Calls that modulate every token for itself or hold several images, which no plan is for.
OTHER_USES: dict[str, tuple[Callable[[dict[str, Any], int], dict[str, Any]], str]] = {
    "wan": (_per_token_timesteps, "timestep for each token"),
    "ltx-video": (_per_token_timesteps, "timestep for each token"),
    "flux2": (lambda inputs, tokens: {**inputs, "kv_cache_mode": "extract", "num_ref_tokens": 4}, "reference images"),
    "z-image": (
        lambda inputs, tokens: {
            **inputs,
            "x": [[image] for image in inputs["x"]],
            "cap_feats": [[caption] for caption in inputs["cap_feats"]],
            "siglip_feats": [None, None],
            "image_noise_mask": [[1], [1]],
        },
        "omni mode",
    ),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_uses_that_no_plan_is_for_are_refused(name: str) -> None:
    model = next(case for case in FAMILY_CASES if case.name == name).model()
    change, reason = OTHER_USES[name]
    with AppliedPlan(model, Plan.uniform(model, 0.5)), pytest.raises(InputError, match=reason):
        model.predict(change(model.example(), model.tokens))


def test_qwen_image_with_reference_images_is_refused() -> None:
    case = next(case for case in FAMILY_CASES if case.name == "qwen-image")
    model = replace(case, config={**case.config, "zero_cond_t": True}).model()
    with AppliedPlan(model, Plan.dense(model)):
        model.predict(model.example())
    with AppliedPlan(model, Plan.uniform(model, 0.5)), pytest.raises(InputError, match="reference images"):
        model.predict(model.example())


def test_lists_of_images_are_told_to_be_halves_of_guidance() -> None:
    model = next(case for case in FAMILY_CASES if case.name == "z-image").model()
    inputs = model.example()
    kept_of: list[torch.Tensor] = []
    with AppliedPlan(model, Plan.uniform(model, 0.5), "norm") as applied:
        applied.controller.observer = lambda layer, x, out, kept: kept_of.append(kept) if layer else None
        model.predict({**inputs, "x": [inputs["x"][0], inputs["x"][0].clone()]})
    assert kept_of and all(torch.equal(kept[0], kept[1]) for kept in kept_of)


def test_rotary_tables_are_read_only_as_diffusers_reads_them() -> None:
    rows = torch.randn(2, 5, 4)
    table = PerSampleTable(rows)
    assert torch.equal(table[None, :, None, :], rows[:, :, None, :])
    assert torch.equal(table[None, None, :, :], rows[:, None])
    with pytest.raises(InputError, match="rotary tables"):
        table[:, None]
    assert torch.equal(table.unsqueeze(1), rows[:, :, None])
    with pytest.raises(InputError, match=r"unsqueeze\(2\)"):
        table.unsqueeze(2)
    with pytest.raises(AttributeError):
        table.chunk(2)  # type: ignore[attr-defined]
