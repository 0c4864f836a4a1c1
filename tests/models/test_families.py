"""Every block family: exact when all tokens are kept, equal to a plain loop when not, gone when removed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.models.blocks import PerSampleTable
from shiva_search.models.model import Model, output_tensor
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from tests.models.conformance import FAMILY_CASES, KEEP, FamilyCase, blocks_of, norm_scores, slow_copy, uniform_row


@pytest.fixture(params=FAMILY_CASES, ids=lambda case: case.name)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    case: FamilyCase = request.param
    model = case.model()
    yield model
    assert not model.module._forward_pre_hooks
    assert not [layer.name for layer in model.layers if "forward" in vars(layer.module)]


def test_keep_all_is_bit_identical(model: Model) -> None:
    inputs = model.example(seed=1)
    assert model.workload.batch == 2
    dense = model.predict(inputs)
    with AppliedPlan(model, Plan.dense(model), "norm"):
        assert torch.equal(model.predict(inputs), dense)
    with AppliedPlan(model, Plan.uniform(model, 0.5), "norm"):
        assert not torch.equal(model.predict(inputs), dense)
    assert torch.equal(model.predict(inputs), dense)


@pytest.mark.parametrize("keep", KEEP)
def test_pruned_equals_a_loop_over_samples_and_tokens(model: Model, keep: float) -> None:
    row, inputs = uniform_row(model, keep), model.example(seed=2)
    expected = output_tensor(slow_copy(model, row, norm_scores)(**inputs))
    kept_by_layer: dict[int, torch.Tensor] = {}
    with AppliedPlan(model, Plan.from_rows(model, [row]), "norm", guidance=False) as applied:
        applied.controller.observer = lambda layer, x, out, kept: kept_by_layer.update({layer: kept})
        planned = model.predict(inputs)
    assert any(not torch.equal(kept[0], kept[1]) for layer, kept in kept_by_layer.items() if layer)
    torch.testing.assert_close(planned, expected, atol=1e-5, rtol=1e-5)


def test_skipped_blocks_equal_the_loop(model: Model) -> None:
    row = [model.tokens, 0, 5, *[1] * (model.layer_count - 4), 0]
    inputs = model.example(seed=3)
    expected = output_tensor(slow_copy(model, row, norm_scores)(**inputs))
    with AppliedPlan(model, Plan.from_rows(model, [row]), "norm", guidance=False):
        torch.testing.assert_close(model.predict(inputs), expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_loop(model: Model) -> None:
    row, inputs = uniform_row(model, KEEP[0]), model.example(seed=4)
    slow = slow_copy(model, row, norm_scores)
    gradients = []
    for module in (slow, model.module):
        image = inputs["hidden_states"].clone().requires_grad_()
        module.requires_grad_(True)
        call = {**inputs, "hidden_states": image}
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


def test_samples_do_not_depend_on_their_batch(model: Model) -> None:
    batch = model.batch("calibration", 3, seed=1)
    with AppliedPlan(model, Plan.uniform(model, 0.5), "norm", guidance=False):
        together = model.predict(batch.inputs)
        apart = torch.cat([model.predict(one.inputs) for one in batch.chunks(1)])
        picked = model.predict(batch.take([2, 0]).inputs)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[[2, 0]], picked, atol=1e-5, rtol=1e-5)


def test_what_is_said_of_the_model_is_what_its_blocks_see(model: Model) -> None:
    seen: dict[str, torch.Tensor] = {}
    layer = model.layers[0]
    handle = layer.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update({**kwargs, **dict(zip(layer.arguments, args, strict=False))}),
        with_kwargs=True,
    )
    inputs = model.example(seed=5)
    try:
        output = model.predict(inputs)
    finally:
        handle.remove()
    assert seen[layer.adapter.tokens].shape[:2] == (model.workload.batch, model.tokens)
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


def test_guidance_halves_of_one_image_share_their_selection(model: Model) -> None:
    inputs = model.example(seed=6)
    kept_of: list[torch.Tensor] = []
    with AppliedPlan(model, Plan.uniform(model, 0.5), "norm") as applied:
        applied.controller.observer = lambda layer, x, out, kept: kept_of.append(kept) if layer else None
        model.predict(inputs)
        assert any(not torch.equal(kept[0], kept[1]) for kept in kept_of)
        kept_of.clear()
        half = inputs["hidden_states"][:1]
        model.predict({**inputs, "hidden_states": torch.cat([half, half])})
        assert all(torch.equal(kept[0], kept[1]) for kept in kept_of)


def test_another_resolution_than_the_plans_is_refused(model: Model) -> None:
    larger = model.like(model.example()).family.example(
        model.config, model.workload.override(resolution=96), torch.Generator().manual_seed(0)
    )
    with AppliedPlan(model, Plan.uniform(model, 0.5)), pytest.raises(InputError, match="16 image tokens.* 36"):
        model.predict(larger)


def test_rotary_tables_are_read_only_as_diffusers_reads_them() -> None:
    rows = torch.randn(2, 5, 4)
    table = PerSampleTable(rows)
    assert torch.equal(table[None, :, None, :], rows[:, :, None, :])
    assert torch.equal(table[None, None, :, :], rows[:, None])
    with pytest.raises(InputError, match="rotary tables"):
        table[:, None]
    with pytest.raises(AttributeError):
        table.unsqueeze(2)  # type: ignore[attr-defined]
