"""The deployed conditions, and that nothing of them stays behind."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from virtual_device import VirtualDevice, small_dit

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.conditions import (
    check_place,
    deployed,
    parts_of,
    real_module,
    record_inputs,
    shapes_of,
    without_blocks,
)
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan


def test_threads_mode_and_gradients_are_set_and_restored() -> None:
    model = small_dit(layers=2, side=4)
    model.workload = model.workload.override(threads=1)
    model.module.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="stop"), deployed(model):
            assert torch.get_num_threads() == 1
            assert not torch.is_grad_enabled()
            assert not model.module.training
            raise RuntimeError("stop")
        assert torch.get_num_threads() == 2
        assert torch.is_grad_enabled()
        assert model.module.training
    finally:
        torch.set_num_threads(threads)


def test_blocks_are_compiled_where_the_workload_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, guarded, not translated
    model = small_dit(layers=3, side=4)
    model.workload = model.workload.override(compile=True)
    inputs = model.example()
    with torch.no_grad():
        expected = model.predict(inputs)
    torch._dynamo.reset()
    counters.clear()
    with deployed(model):
        torch.testing.assert_close(model.predict(inputs), expected)
        for k in (9, 5, 12):
            with AppliedPlan(model, Plan.from_rows(model, [[16, k, k + 1]])):
                model.predict(inputs)
        # For all counts; the first block gets its tokens as a view of an image, the others as rows.
        assert counters["stats"]["unique_graphs"] == 2
    assert all("forward" not in layer.module.__dict__ for layer in model.layers)
    torch._dynamo.reset()


def test_a_profile_of_compiled_blocks_compiles_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = small_dit(layers=2, side=8)
    model.workload = model.workload.override(compile=True)
    torch._dynamo.reset()
    counters.clear()
    device = VirtualDevice()
    profile = profile_model(model, device, seconds=5, counts=[0, 8, 16, 32, 48, 64], plans=2, clock=device.clock)
    assert {row.tokens_kept for row in profile.rows} == {0, 8, 16, 32, 48, 64}
    assert counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_blocks_get_what_they_get_in_a_dense_forward(tiny_model: Model) -> None:
    inputs = tiny_model.example()
    layer = tiny_model.layers[0]
    recorded = record_inputs(tiny_model, inputs)
    assert list(recorded) == [layer.signature]
    outputs: list[torch.Tensor] = []
    handle = layer.module.register_forward_hook(lambda *args: outputs.append(args[-1]))
    with torch.no_grad():
        tiny_model.module(**inputs)
        handle.remove()
        assert torch.equal(layer.module(**recorded[layer.signature]), outputs[0])


def test_shapes_take_no_memory_and_leave_the_original_alone(tiny_model: Model) -> None:
    shapes = shapes_of(tiny_model.module)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert all(buffer.is_meta for buffer in shapes.buffers())
    assert not any(parameter.is_meta for parameter in tiny_model.module.parameters())
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in tiny_model.module.parameters()]


def test_of_a_model_of_shapes_only_a_block_or_two_become_real() -> None:
    model = small_dit(device="meta")
    [part] = parts_of(model, torch.device("cpu"), seed=1)
    assert len(part.layers) == 2
    assert all(not p.is_meta for layer in part.layers for p in layer.module.parameters())
    with torch.no_grad():
        assert torch.isfinite(part.layers[0].module(**part.kwargs)).all()
    assert all(p.is_meta for p in model.module.parameters())
    rest = without_blocks(model, torch.device("cpu"))
    real = {name for name, p in rest.module.named_parameters() if not p.is_meta}
    assert any(name.startswith("pos_embed") for name in real)
    # DiT's output asks its first block for the condition; nothing else of the blocks is needed.
    inside = {name for name in real if "transformer_blocks" in name}
    assert inside and all(name.startswith("transformer_blocks.0.norm1.emb") for name in inside)


def test_made_up_weights_follow_the_seed() -> None:
    block = small_dit(device="meta").layers[0].module
    place = torch.device("cpu")
    one, same, other = (real_module(block, place, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_a_clock_of_another_device_is_refused(tiny_model: Model) -> None:
    check_place(tiny_model, torch.device("cpu"))
    with pytest.raises(InputError, match="load the model on cuda"):
        check_place(tiny_model, torch.device("cuda"))
