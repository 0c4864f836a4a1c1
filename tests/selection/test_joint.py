"""Policy learning and joint tuning on a small transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.selection.adapters import adapted, adapted_linears, adapters_off
from shiva_search.selection.joint import learn_policy, sorted_groups, tune_jointly
from shiva_search.selection.losses import relative_error
from shiva_search.selection.ratio_policy import CostTable, RatioPolicy
from shiva_search.selection.router import Router


def table(model, weight_of_last: float = 1.0) -> CostTable:
    cost_LG = torch.tensor([[0.0, 1.0]]).repeat(model.layer_count, 1)
    cost_LG[-1] *= weight_of_last
    return CostTable(torch.tensor([0.0, float(model.tokens)]), cost_LG)


def test_a_policy_moves_to_its_budget_and_spares_the_costly_layer(smaller):
    policy = RatioPolicy(smaller.layer_count, 0.9)
    costs = table(smaller, weight_of_last=4.0)
    _, policy, rows = learn_policy(
        smaller, Router.for_model(smaller), policy, budget=0.6, costs=costs, budget_weight=20.0, policy_lr=1e-3,
        steps=60, batch_size=8, groups=4,
    )  # fmt: skip
    row = policy.compile_rows([(0.0, 1.0)], smaller.tokens)[0]
    assert costs.share(torch.tensor([row], dtype=torch.float32)).item() == pytest.approx(0.6, abs=0.08)
    assert row[0] == smaller.tokens and row[-1] < min(row[1:-1])
    assert {entry["stage"] for entry in rows} == {"policy"} and rows[-1]["keep"] < rows[0]["keep"]


def test_a_policy_without_a_push_down_keeps_more(smaller):
    policy = RatioPolicy(smaller.layer_count, 0.8)
    learn_policy(
        smaller, Router.for_model(smaller), policy, budget=1.0, budget_weight=1e-6, policy_lr=1e-3, steps=20,
        batch_size=8, logit_noise=False,
    )  # fmt: skip
    ratios_BL = policy(torch.linspace(0, 1, 9))[:, 1:]
    assert ratios_BL.mean().item() > 0.82  # quality alone asks for tokens (eq. 24)


def test_policy_learning_resumes_to_the_same_result(smaller, tmp_path):
    def run(**more):
        policy = RatioPolicy(smaller.layer_count, 0.6)
        settings = {"budget": 0.5, "steps": 3, "batch_size": 4, "groups": 2}
        router, policy, _ = learn_policy(smaller, Router.for_model(smaller), policy, **settings, **more)
        return [*router.parameters(), *policy.parameters()]

    whole = run()
    calls = iter(range(100))

    def stop(*_):
        if next(calls) == 6:
            raise KeyboardInterrupt

    hook = smaller.module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "policy.pt")
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(whole, run(checkpoint=tmp_path / "policy.pt"), strict=True))


def test_joint_tuning_lowers_the_error_and_hands_the_model_back(smaller):
    plan, router = Plan.uniform(smaller, 0.5), Router.for_model(smaller)
    batch = smaller.batch("evaluation", 32)
    with torch.no_grad():
        dense = smaller.predict(batch.inputs)
    settings = {"rank": 4, "backbone_lr": 3e-3, "steps": 25, "batch_size": 8, "groups": 1}
    state, rows = tune_jointly(smaller, router, plan, **settings)
    assert rows[-1]["stage"] == "joint" and len(rows) == 25

    def error() -> float:
        with torch.no_grad(), AppliedPlan(smaller, plan, router, guidance=False):
            return relative_error(smaller.predict(batch.inputs), dense).item()

    without = error()
    with adapted(smaller, 4, state):
        assert error() < 0.9 * without
    with torch.no_grad():
        assert torch.equal(smaller.predict(batch.inputs), dense)
    assert all(isinstance(smaller.module.get_submodule(name), nn.Linear) for name in adapted_linears(smaller))
    assert not any("lora" in name for name, _ in smaller.module.named_parameters())
    assert all(value.requires_grad for value in smaller.module.parameters())


def test_joint_tuning_goes_on_with_a_policy(smaller):
    router, policy = Router.for_model(smaller), RatioPolicy(smaller.layer_count, 0.6)
    before = policy.bias.item()
    state, rows = tune_jointly(smaller, router, policy, budget=0.5, rank=2, steps=2, batch_size=4, groups=2)
    assert policy.bias.item() != before and len(rows) == 2
    assert any(value.abs().sum() > 0 for name, value in state.items() if "lora_B" in name)


def test_fresh_adapters_change_nothing_and_can_be_switched_off(smaller):
    inputs = smaller.batch("evaluation", 2).inputs
    with torch.no_grad():
        dense = smaller.predict(inputs)
        with adapted(smaller, 2) as parameters:
            torch.testing.assert_close(smaller.predict(inputs), dense)
            for name, value in parameters.items():
                if "lora_B" in name:
                    value.fill_(0.1)
            changed = smaller.predict(inputs)
            with adapters_off(smaller):
                assert torch.equal(smaller.predict(inputs), dense)
            assert torch.equal(smaller.predict(inputs), changed) and not torch.allclose(changed, dense)
            assert all(value.requires_grad for value in parameters.values())


def test_adapters_sit_on_attention_and_feed_forward_alone(smaller):
    names = adapted_linears(smaller)
    assert len(names) == 6 * smaller.layer_count
    assert {name.split(".")[2] for name in names} == {"attn1", "ff"}


def test_adapters_of_another_rank_are_refused_and_leave_no_trace(smaller):
    with adapted(smaller, 2) as parameters:
        state = {name.replace("/", "."): value.detach() for name, value in parameters.items()}
    with pytest.raises(InputError, match="another rank"), adapted(smaller, 3, state):
        pass
    assert not any("lora" in name for name, _ in smaller.module.named_parameters())
    with pytest.raises(InputError, match="at least 1"), adapted(smaller, 0):
        pass


def test_groups_hold_neighbouring_times(smaller):
    batches = sorted_groups(smaller.batch("train", 7), 3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert batches[0].t_B.max() < batches[1].t_B.min() and batches[1].t_B.max() < batches[2].t_B.min()
    with pytest.raises(InputError, match="raise batch_size"):
        sorted_groups(smaller.batch("train", 2), 3)
