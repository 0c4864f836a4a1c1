"""Applied plans: exact when they keep all, right when they do not, gone when they are removed."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import DiTTransformer2DModel

from shiva_search.errors import InputError
from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import SCORERS, Stride
from shiva_search.runtime.token_ops import share_over_guidance


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=5, sample_size=8,
        patch_size=1, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    return as_model(module.eval().requires_grad_(False), "tiny")


@pytest.fixture(autouse=True)
def no_hook_survives(model: Model) -> Iterator[None]:
    yield
    assert not model.module._forward_pre_hooks
    for layer in model.layers:
        assert "forward" not in vars(layer.module)


def reference(model: Model, inputs: dict[str, torch.Tensor], row: tuple[int, ...]) -> torch.Tensor:
    """The pruned forward written out: a loop over samples and kept tokens, no hooks."""
    out = []
    for i in range(len(inputs["hidden_states"])):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        x = model.module.pos_embed(one["hidden_states"])
        for index, (layer, k) in enumerate(zip(model.layers, row, strict=True)):
            scores = Stride()(x, torch.zeros(1), x, index)[0]
            kept = sorted(range(model.tokens), key=lambda n: -float(scores[n]))[:k]
            if kept:
                kept = sorted(kept)
                block = layer.module
                y = block(x[:, kept], timestep=one["timestep"], class_labels=one["class_labels"])
                x = x.clone()
                for position, token in enumerate(kept):
                    x[0, token] = y[0, position]
        condition = model.layers[0].module.norm1.emb(one["timestep"], one["class_labels"], hidden_dtype=x.dtype)
        shift, scale = model.module.proj_out_1(torch.nn.functional.silu(condition)).chunk(2, dim=1)
        x = model.module.norm_out(x) * (1 + scale[:, None]) + shift[:, None]
        out.append(model.module.proj_out_2(x).reshape(1, 1, 8, 8))
    return torch.cat(out)


@pytest.mark.parametrize("scorer", SCORERS)
def test_keep_all_is_bit_identical(model: Model, scorer: str) -> None:
    inputs = model.example(seed=1)
    dense = model.predict(inputs)
    with AppliedPlan(model, Plan.dense(model), scorer):
        assert torch.equal(model.predict(inputs), dense)
    assert torch.equal(model.predict(inputs), dense)


@pytest.mark.parametrize("row", [(64, 38, 38, 38, 38), (64, 0, 10, 0, 64), (64, 1, 63, 7, 0)])
def test_equals_a_plain_loop_over_samples_and_tokens(model: Model, row: tuple[int, ...]) -> None:
    inputs = model.batch("evaluation", 3).inputs
    with AppliedPlan(model, Plan.from_rows(model, [row]), "stride", guidance=False):
        planned = model.predict(inputs)
    torch.testing.assert_close(planned, reference(model, inputs, row), atol=1e-5, rtol=1e-5)


def test_an_exception_inside_leaves_no_hook(model: Model) -> None:
    inputs = model.example()
    dense = model.predict(inputs)
    with pytest.raises(RuntimeError, match="stop"), AppliedPlan(model, Plan.uniform(model, 0.5)):
        raise RuntimeError("stop")
    assert torch.equal(model.predict(inputs), dense)


def test_a_scorer_that_fails_leaves_no_hook(model: Model) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise ValueError("no scores")

    with pytest.raises(ValueError, match="no scores"), AppliedPlan(model, Plan.uniform(model, 0.5), broken):
        model.predict(model.example())


def test_a_new_plan_replaces_the_old_one(model: Model) -> None:
    inputs = model.example()
    first = AppliedPlan(model, Plan.uniform(model, 0.2))
    second = AppliedPlan(model, Plan.dense(model))
    applied = model.predict(inputs)
    second.remove()
    first.remove()
    assert torch.equal(applied, model.predict(inputs))


def test_remove_restores_a_forward_that_was_there_before(model: Model) -> None:
    block = model.layers[1].module
    original = block.forward
    block.forward = original
    AppliedPlan(model, Plan.uniform(model, 0.5)).remove()
    assert vars(block).pop("forward") == original


def test_guidance_halves_share_one_selection(model: Model) -> None:
    seen: dict[int, torch.Tensor] = {}

    def watch(layer: int, x: torch.Tensor, out: torch.Tensor, kept: torch.Tensor | None) -> None:
        if kept is not None:
            seen[layer] = kept

    inputs = model.example(seed=3)
    for guidance in (True, False):
        with AppliedPlan(model, Plan.uniform(model, 0.5), "norm", guidance=guidance) as applied:
            applied.controller.observer = watch
            model.predict(inputs)
        same = all(torch.equal(kept[0], kept[1]) for kept in seen.values())
        assert same == guidance
    scores = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert share_over_guidance(scores).tolist() == [[3.0, 5.0], [3.0, 5.0]]


def test_segments_choose_their_row_by_time(model: Model) -> None:
    low, high = [64, 10, 10, 10, 10], [64, 50, 50, 50, 50]
    both = Plan.from_rows(model, [low, high])
    inputs = model.example(seed=4)
    for t, row in ((200.0, low), (900.0, high)):
        inputs["timestep"] = torch.full((2,), t)
        with AppliedPlan(model, Plan.from_rows(model, [row])):
            expected = model.predict(inputs)
        with AppliedPlan(model, both):
            assert torch.equal(model.predict(inputs), expected)
    inputs["timestep"] = torch.tensor([200.0, 900.0])
    with AppliedPlan(model, both), pytest.raises(InputError, match="separate forwards"):
        model.predict(inputs)


def test_a_plan_for_another_shape_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="layers"):
        AppliedPlan(model, Plan(tokens=64, tokens_kept=((64, 3),)))
    foreign = Plan.uniform(model, 0.5).with_(model={**model.fingerprint(), "weights_hash": "other"})
    with pytest.raises(InputError, match="another model"):
        AppliedPlan(model, foreign)


def test_a_forward_can_start_after_a_recorded_layer(model: Model) -> None:
    inputs = model.batch("calibration", 2).inputs
    with AppliedPlan(model, Plan.from_rows(model, [[64, 20, 30, 40, 5]]), "residual", guidance=False) as applied:
        applied.controller.record = frozenset({2})
        whole = model.predict(inputs)
        applied.controller.resume = applied.controller.recorded[2]
        assert torch.equal(model.predict(inputs), whole)


def test_a_handle_says_what_it_is(model: Model) -> None:
    handle = AppliedPlan(model, Plan.uniform(model, 0.5))
    assert "of the tokens in" in repr(handle) and repr(handle).endswith("on>")
    handle.remove()
    assert repr(handle).endswith("off>")
