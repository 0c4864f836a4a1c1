"""Attention to all tokens beside what users do to a model: adapters, processors, fused projections, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig

from shiva_search.errors import InputError
from shiva_search.models.attend_all import QueriesThenKeys
from shiva_search.models.model import Model, output_tensor
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from tests.models.conformance import FAMILY_CASES, attending_row, norm_scores, slow_copy

CASES = {case.name: case for case in FAMILY_CASES}


def planned(model: Model) -> torch.Tensor:
    plan = Plan.from_rows(model, [attending_row(model, 0.4)])
    with torch.no_grad(), AppliedPlan(model, plan, "norm", guidance=False):
        return model.predict(model.example(1))


def by_a_loop(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return output_tensor(slow_copy(model, attending_row(model, 0.4), norm_scores)(**model.example(1)))


@pytest.mark.parametrize("name", ["sd3.5", "flux.1-dev", "wan"])
def test_lora_takes_effect_on_every_linear_layer(name: str) -> None:
    model = CASES[name].model()
    without = planned(model)
    linear = ["to_q", "to_k", "to_v", "add_k_proj", "proj_mlp", "proj_out", "norm.linear", "net.2"]
    for part in linear:
        if not any(module.endswith(part) for module, _ in model.module.named_modules()):
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.module.add_adapter(LoraConfig(r=2, target_modules=[part], init_lora_weights=False), "style")
        found = planned(model)
        assert not torch.allclose(found, without, atol=1e-4), part
        torch.testing.assert_close(found, by_a_loop(model), atol=1e-5, rtol=1e-5)
        model.module.delete_adapters("style")


class Doubling(FluxAttnProcessor):
    """A user's own."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(attn, hidden_states, *args, **kwargs)
        return tuple(2 * part for part in found) if isinstance(found, tuple) else 2 * found


class Failing(JointAttnProcessor2_0):
    """Fails where queries and keys differ in number, after it has run."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(attn, hidden_states, *args, **kwargs)
        if attn.to_k(hidden_states).shape != attn.to_q(hidden_states).shape:
            raise RuntimeError("out of memory")
        return found


def test_a_processor_of_the_users_runs() -> None:
    model = CASES["flux.1-dev"].model()
    plain = planned(model)
    model.module.set_attn_processor(Doubling())
    assert not torch.allclose(planned(model), plain, atol=1e-4)
    torch.testing.assert_close(planned(model), by_a_loop(model), atol=1e-5, rtol=1e-5)


def test_nothing_is_left_after_an_exception() -> None:
    model = CASES["sd3.5"].model()
    model.module.set_attn_processor(Failing())
    processors, inputs = model.module.attn_processors, model.example(1)
    held = {name: dict(module.__dict__) for name, module in model.module.named_modules()}
    expected = model.predict(inputs)
    with pytest.raises(RuntimeError, match="out of memory"):
        planned(model)
    assert torch.equal(model.predict(inputs), expected)
    assert all(model.module.attn_processors[name] is found for name, found in processors.items())
    for name, module in model.module.named_modules():
        assert {key: id(value) for key, value in module.__dict__.items()} == {
            key: id(value) for key, value in held[name].items()
        }, name


def test_fused_projections_are_taken_apart_or_refused() -> None:
    flux = CASES["flux.1-dev"].model()
    expected = planned(flux)
    flux.module.fuse_qkv_projections()
    torch.testing.assert_close(planned(flux), expected, atol=1e-5, rtol=1e-5)
    sd3 = CASES["sd3"].model()
    sd3.module.fuse_qkv_projections()
    with pytest.raises(InputError, match="fused projections.*unfuse"):
        planned(sd3)
    sd3.module.unfuse_qkv_projections()
    torch.testing.assert_close(planned(sd3), by_a_loop(sd3), atol=1e-5, rtol=1e-5)


def test_a_rotary_table_is_read_for_queries_and_then_for_keys_and_no_more() -> None:
    table = QueriesThenKeys((torch.ones(2), torch.zeros(2)), (torch.ones(3), torch.zeros(3)))
    assert [len(part) for part in table] == [2, 2] and [len(part) for part in table] == [3, 3]
    with pytest.raises(InputError, match="attend kept"):
        table.unsqueeze(1)


def test_it_is_refused_where_the_block_cannot() -> None:
    model = CASES["flux2"].model()
    plan = Plan.from_rows(model, [[model.tokens, *[Kept(3, 0, "all")] * (model.layer_count - 1)]])
    with pytest.raises(InputError, match="attends to all tokens, which Flux2SingleTransformerBlock"):
        AppliedPlan(model, plan, "stride")
