"""The router: what it computes, what it is told, and what a file of it must be."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from shiva_search.errors import InputError
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import History, Stride
from shiva_search.selection.loading import load_selector
from shiva_search.selection.router import Router, RouterConfig, sinusoid

B, N, D, C = 2, 12, 16, 8


def make(features=(), layers=5, **shape) -> Router:
    torch.manual_seed(0)
    return Router(RouterConfig(D, C, layers, features=features, **shape))


@pytest.fixture
def seen():
    generator = torch.Generator().manual_seed(1)
    x_BND = 3 + 5 * torch.randn(B, N, D, generator=generator)
    condition_BC = torch.randn(B, C, generator=generator)
    return x_BND, torch.tensor([0.2, 0.7]), condition_BC


def test_scores_are_equation_9(seen):
    router = make()
    x_BND, t_B, condition_BC = seen
    unit = router.units[1]
    h = unit.time(sinusoid(t_B, 64)) + unit.condition(condition_BC) + unit.layer(torch.tensor(1))
    bottleneck = F.silu(unit.tokens(F.layer_norm(x_BND, (D,))) + h[:, None])
    expected_BN = F.layer_norm(bottleneck, (64,)) @ unit.score
    torch.testing.assert_close(router(*seen, 3), expected_BN)


def test_pairs_of_layers_share_weights_and_are_told_apart(seen):
    router = make(layers=5)
    assert len(router.units) == 3
    scores = [router(*seen, layer) for layer in range(5)]
    assert all(not torch.equal(a, b) for a, b in zip(scores, scores[1:], strict=False))
    with torch.no_grad():
        for unit in router.units:
            unit.layer.weight.zero_()
    assert torch.equal(router(*seen, 2), router(*seen, 3))
    assert not torch.equal(router(*seen, 1), router(*seen, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_give_float32_scores_of_the_same_order(seen, dtype):
    router = make(features=("age", "update_size", "spread"))
    x_BND, t_B, condition_BC = seen
    exact_BN = router(x_BND, t_B, condition_BC, 2)
    half_BN = router(x_BND.to(dtype), t_B, condition_BC.to(dtype), 2)
    assert half_BN.dtype == torch.float32
    torch.testing.assert_close(half_BN, exact_BN, atol=0.02, rtol=0)


def test_autocast_does_not_coarsen_scores(seen):
    router = make()
    with torch.autocast("cpu", torch.bfloat16):
        scores_BN = router(*seen, 2)
    assert torch.equal(scores_BN, router(*seen, 2))


def test_gradients_reach_all_weights_of_the_unit_and_not_the_tokens(seen):
    router = make(features=("age", "update_size", "spread"))
    x_BND, t_B, condition_BC = seen
    x_BND.requires_grad_()
    history = History(torch.arange(N).float().expand(B, N), torch.ones(B, N))
    (router(x_BND, t_B, condition_BC, 2, history=history) * torch.randn(B, N)).sum().backward()
    assert x_BND.grad is None
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in router.units[1].parameters())
    assert all(value.grad is None for value in router.units[0].parameters())


def test_history_counts_only_where_it_is_a_feature(seen):
    old = History(torch.full((B, N), 3.0), torch.ones(B, N))
    told, untold = make(features=("age",)), make(features=())
    assert told.uses_history and not untold.uses_history and not make(features=("spread",)).uses_history
    assert not torch.equal(told(*seen, 2, history=old), told(*seen, 2))
    assert torch.equal(untold(*seen, 2, history=old), untold(*seen, 2))


def test_an_untrained_router_with_spread_keeps_nearly_what_stride_keeps(seen):
    kept = make(features=("spread",))(*seen, 3).topk(6).indices.sort().values
    stride = Stride()(*seen, 3).topk(6).indices.sort().values
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(kept, stride, strict=True))
    assert shared >= 10  # of 12


def test_for_model_finds_widths_and_is_seeded(smaller):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = Router.for_model(smaller, 0), Router.for_model(smaller, 0), Router.for_model(smaller, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.config.width, first.config.condition_width, first.config.layers) == (32, 32, 5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.units[0].score, other.units[0].score)
    with torch.no_grad(), AppliedPlan(smaller, Plan.uniform(smaller, 0.5), first, guidance=False):
        assert smaller.predict(smaller.example()).isfinite().all()


def test_save_and_load_give_the_same_scores(tmp_path, seen):
    router = make(features=("age", "spread"), bottleneck=24, group=3)
    router.model, router.origin = {"architecture": "A", "layers": 5}, {"stage": "tune", "steps": 3}
    router.save(tmp_path / "run" / "selector.safetensors")
    loaded = load_selector(tmp_path / "run")  # a run's folder will do
    assert loaded.config == router.config and loaded.origin == router.origin and loaded.model == router.model
    assert torch.equal(loaded(*seen, 4), router(*seen, 4))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["selector.safetensors"]


def refuse(path, *words):
    with pytest.raises(InputError) as caught:
        load_selector(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_files_that_are_no_selector_are_refused(tmp_path):
    path = tmp_path / "selector.safetensors"
    refuse(path, "cannot read", "selector.safetensors")
    path.write_text('{"tokens_kept": [[1, 2]]}')
    refuse(path, "not a safetensors file")
    save_file({"a": torch.zeros(2)}, path)
    refuse(path, "no selector")
    config = {"width": D, "condition_width": C, "layers": 5}
    good = {"kind": "shiva-search router", "schema_version": "1", "config": json.dumps(config), "model": "{}"}
    save_file({"a": torch.zeros(2)}, path, metadata={**good, "schema_version": "9"})
    refuse(path, "schema_version 9", "reads 1")
    save_file({"a": torch.zeros(2)}, path, metadata=good)
    refuse(path, "damaged")
    save_file({"a": torch.zeros(2)}, path, metadata={**good, "config": '{"width": 0}'})
    refuse(path, "damaged")
    make().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    refuse(path, "train it again")


def test_saving_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make().save(tmp_path / "file" / "selector.safetensors")


def test_a_selector_of_another_model_is_refused(tiny, smaller):
    router = Router.for_model(smaller)
    router.check_model(smaller.fingerprint())
    with pytest.raises(InputError, match="another model: .*layers is 5 in the selector and 6"):
        router.check_model(tiny.fingerprint())


@pytest.mark.parametrize("bad", [{"bottleneck": 0}, {"features": ("colour",)}, {"time_features": 7}])
def test_bad_shapes_are_refused(bad):
    with pytest.raises(InputError, match="router's"):
        RouterConfig(D, C, 5, **bad)
