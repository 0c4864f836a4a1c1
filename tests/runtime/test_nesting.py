"""Plans together with what else hangs on a model: adapters, offloading, caches. In any order, with no trace."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, apply_group_offloading
from peft import LoraConfig
from torch import nn

import shiva_search as ss
from shiva_search.errors import InputError
from shiva_search.models.model import Model
from tests.models.conformance import FAMILY_CASES

CASES = {case.name: case for case in FAMILY_CASES}
KEEP = 0.5


def fresh(name: str = "sd3") -> Model:
    return CASES[name].model()


def inputs_of(name: str, seed: int = 1) -> dict[str, Any]:
    return fresh(name).example(seed)  # made where weights are at hand: offloading leaves shapes behind


def output(model: Model, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.predict(inputs).clone()


def steps(model: Model, count: int = 5) -> list[torch.Tensor]:
    """A few denoising steps whose inputs drift, so that a choice made anew would differ."""
    found = []
    with torch.no_grad():
        for step in range(count):
            inputs = model.example(1)
            inputs["hidden_states"] = inputs["hidden_states"] + 0.5 * step * model.example(2)["hidden_states"]
            inputs["timestep"] = torch.full_like(inputs["timestep"], 500.0 - 10 * step)
            with model.module.cache_context("cond"):
                found.append(model.predict(inputs).clone())
    return found


def planned(model: Model) -> Any:
    return ss.apply_plan(model, ss.Plan.uniform(model, KEEP), "norm")


# ---- what nests ------------------------------------------------------------------------------------------------------


class Pass(ModelHook):
    """accelerate's hook with nothing to do."""


@dataclass(frozen=True)
class Layer:
    """Something that hangs on a model, changes nothing by itself, and can be taken off again."""

    name: str
    put: Callable[[nn.Module], None]
    take: Callable[[nn.Module], None]


def hook_blocks(module: nn.Module) -> None:
    for block in module.transformer_blocks:
        add_hook_to_module(block, Pass())
    add_hook_to_module(module, Pass())


def unhook(module: nn.Module) -> None:
    remove_hook_from_module(module, recurse=True)


def group_offload(kind: str) -> Callable[[nn.Module], None]:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda module: apply_group_offloading(module, torch.device("cpu"), offload_type=kind, **blocks)


def stop_group_offload(module: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(module).remove_hook("group_offloading", recurse=True)


def sequential(module: nn.Module) -> None:
    accelerate.cpu_offload(module, torch.device("cpu"), offload_buffers=True)


LAYERS = (
    Layer("accelerate", hook_blocks, unhook),
    Layer("sequential offload", sequential, unhook),
    Layer("group offload of blocks", group_offload("block_level"), stop_group_offload),
    Layer("group offload of leaves", group_offload("leaf_level"), stop_group_offload),
)
ORDERS = [order for order in itertools.permutations(("+plan", "+other", "-plan", "-other"))
          if order.index("+plan") < order.index("-plan") and order.index("+other") < order.index("-other")]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("name", ["sd3", "dit"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_offloading_goes_on_and_off_in_any_order(layer: Layer, name: str, order: tuple[str, ...]) -> None:
    model, inputs = fresh(name), inputs_of(name)
    dense = output(model, inputs)
    with planned(model):
        pruned = output(model, inputs)
    handle: Any = None
    for step in order:
        if step == "+plan":
            handle = planned(known_anew(model))
        elif step == "-plan":
            handle.remove()
            handle = None
        elif step == "+other":
            layer.put(model.module)
        else:
            layer.take(model.module)
        assert torch.equal(output(model, inputs), dense if handle is None else pruned), step
    assert_own_forwards(model)


def known_anew(model: Model) -> Model:
    """What is known of the module, found out as it is now."""
    return Model(model.module, model.name, model.family, model.workload, origin=model.origin)


def assert_own_forwards(model: Model) -> None:
    for module in (model.module, *(layer.module for layer in model.layers)):
        assert getattr(module.forward, "__func__", None) is type(module).forward


def test_a_wrapper_of_an_unknown_kind_is_kept(sd3_inputs: dict[str, Any]) -> None:
    model = fresh()
    dense = output(model, sd3_inputs)
    block = model.layers[2].module
    calls: list[int] = []

    def wrap(module: nn.Module) -> None:
        before = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return before(*args, **kwargs)

        module.forward = forward

    wrap(block)
    first = block.forward
    handle = planned(model)
    pruned = output(model, sd3_inputs)
    assert not torch.equal(pruned, dense) and len(calls) == 1
    wrap(block)  # on top of ours: removal must go under it
    second = block.forward
    assert torch.equal(output(model, sd3_inputs), pruned) and len(calls) == 3
    handle.remove()
    assert block.forward is second
    assert torch.equal(output(model, sd3_inputs), dense) and len(calls) == 5
    block.forward = first
    assert torch.equal(output(model, sd3_inputs), dense)


def test_a_plan_that_was_overwritten_is_noticed(sd3_inputs: dict[str, Any]) -> None:
    model = fresh()
    block = model.layers[1].module
    with planned(model):
        block.forward = type(block).forward.__get__(block)
        with pytest.raises(InputError, match=r"transformer_blocks\.1 ran without the plan"):
            output(model, sd3_inputs)
    assert_own_forwards(model)


def test_a_planned_block_shows_the_signature_of_its_own(sd3_inputs: dict[str, Any]) -> None:
    model = fresh()
    block = model.layers[1].module
    own = inspect.signature(block.forward)
    with planned(model):
        assert inspect.signature(block.forward) == own


@pytest.fixture(scope="module")
def sd3_inputs() -> dict[str, Any]:
    return inputs_of("sd3")


# ---- adapters --------------------------------------------------------------------------------------------------------


def load_lora(module: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_v", "ff.net.2"], init_lora_weights=False), "style"
        )


def unload_lora(module: Any) -> None:
    module.unload_lora()


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_lora_goes_on_and_off_in_any_order(order: tuple[str, ...], sd3_inputs: dict[str, Any]) -> None:
    expected = {}
    for has_lora, has_plan in itertools.product((False, True), repeat=2):
        model = fresh()
        if has_lora:
            load_lora(model.module)
        if has_plan:
            planned(model)
        expected[has_lora, has_plan] = output(model, sd3_inputs)
    assert len({float(value.sum()) for value in expected.values()}) == 4
    model = fresh()
    plan = ss.Plan.uniform(model, KEEP)
    has_lora, handle = False, None
    for step in order:
        if step == "+plan":
            handle = ss.apply_plan(model.module, plan, "norm")
        elif step == "-plan":
            handle.remove()  # type: ignore[union-attr]
            handle = None
        else:
            has_lora = step == "+other"
            (load_lora if has_lora else unload_lora)(model.module)
        assert torch.equal(output(model, sd3_inputs), expected[has_lora, handle is not None]), step


# ---- caches ----------------------------------------------------------------------------------------------------------

CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "taylor": TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*transformer_blocks\.\d+\.attn"],
    ),
    "taylor of blocks": TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*transformer_blocks\.\d+"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_gives_the_same_before_and_after_the_plan(cache: str) -> None:
    model = fresh("flux.1-dev")
    dense = steps(model)
    with planned(model):
        plain = steps(model)
        model.module.enable_cache(CACHES[cache])
        inside = steps(model)
        model.module.disable_cache()
        again = steps(model)
    assert all(map(torch.equal, again, plain))
    model.module.enable_cache(CACHES[cache])
    cached = steps(model)
    model.module._reset_stateful_cache()
    handle = planned(model)
    outside = steps(model)
    assert all(map(torch.equal, outside, inside))
    assert not all(map(torch.equal, inside, plain)) and not all(map(torch.equal, inside, cached))
    handle.remove()
    model.module._reset_stateful_cache()
    assert all(map(torch.equal, steps(model), cached))
    model.module.disable_cache()
    assert all(map(torch.equal, steps(model), dense))
    assert_own_forwards(model)


@pytest.mark.parametrize("cache", ["pyramid", "taylor"])
def test_what_a_cache_inside_a_block_reuses_belongs_to_the_same_tokens(cache: str) -> None:
    model = fresh("flux.1-dev")
    model.module.enable_cache(CACHES[cache])
    seen: dict[int, list[torch.Tensor | None]] = {}

    def note(layer: int, x: torch.Tensor, out: torch.Tensor, kept: torch.Tensor | None) -> None:
        seen.setdefault(layer, []).append(kept)

    with planned(model) as applied:
        applied.controller.observer = note
        steps(model)
        model.module._reset_stateful_cache()
        first = {layer: kept[0] for layer, kept in seen.items()}
        assert all(torch.equal(kept, chosen[0]) for chosen in seen.values() if chosen[0] is not None for kept in chosen)
        seen.clear()
        with torch.no_grad(), model.module.cache_context("cond"):
            model.predict(model.example(9))
        assert any(not torch.equal(first[layer], kept[0]) for layer, kept in seen.items() if kept[0] is not None)


@pytest.mark.parametrize("cache", ["pyramid", "taylor"])
def test_a_cache_filled_without_the_plan_is_emptied_not_reused(cache: str) -> None:
    model, other = fresh("flux.1-dev"), fresh("flux.1-dev")
    model.module.enable_cache(CACHES[cache])
    other.module.enable_cache(CACHES[cache])
    with planned(other):
        expected = steps(other)
    steps(model)
    with planned(model):
        found = steps(model)  # no reset in between
    # The first layer keeps all tokens; its cache is emptied as well, so both runs begin alike.
    assert all(map(torch.equal, found, expected))


def test_a_cache_filled_at_another_batch_size_is_refused() -> None:
    model = fresh("flux.1-dev")
    model.module.enable_cache(CACHES["pyramid"])
    with planned(model):
        steps(model, 1)
        single = model.batch("evaluation", 1).inputs
        with torch.no_grad(), model.module.cache_context("cond"), pytest.raises(InputError, match="at batch 2.* has 1"):
            model.predict(single)
