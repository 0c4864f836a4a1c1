"""Training of the router on a small transformer: that it learns, that it resumes, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.selection.batches import stratified_groups
from shiva_search.selection.distilling import Distiller, frozen
from shiva_search.selection.fitting import COLUMNS
from shiva_search.selection.losses import relative_error
from shiva_search.selection.router import Router
from shiva_search.selection.training import train_selector, tune, warm_up
from shiva_search.selection.training_gate import TRAINING_ESTIMATORS, Recipe

QUICK = {"steps": 4, "batch_size": 4, "groups": 2}


@torch.no_grad()
def error_of(model, plan, scorer, samples=64) -> float:
    batch = model.batch("evaluation", samples)
    dense = model.predict(batch.inputs)
    with AppliedPlan(model, plan, scorer, guidance=False):
        return relative_error(model.predict(batch.inputs), dense).item()


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def learned(tiny):
    return warm_up(tiny, steps=40, batch_size=12, groups=2)


def test_a_trained_router_beats_every_untrained_scorer_on_held_out_inputs(tiny, learned):
    router, rows = learned
    for keep in (0.6, 0.4):
        plan = Plan.uniform(tiny, keep)
        untrained = {name: error_of(tiny, plan, name) for name in ("stride", "random", "norm", "residual")}
        untrained["unlearned"] = error_of(tiny, plan, Router.for_model(tiny, 0))
        assert error_of(tiny, plan, router) < 0.9 * min(untrained.values()), untrained
    assert len(rows) == 40 and all(tuple(row) == COLUMNS for row in rows)
    assert {row["stage"] for row in rows} == {"warm-up"} and [row["step"] for row in rows] == list(range(40))
    assert all(row["diffusion"] is None and 0 < row["error"] <= row["loss"] and 0 < row["keep"] < 1 for row in rows)
    assert router.origin["steps"] == 40 and not any(value.requires_grad for value in router.parameters())


def test_tuning_at_a_plan_lowers_its_error_further(tiny, learned):
    plan = Plan.from_rows(tiny, [[64, 20, 64, 32, 0, 32], [64, 48, 16, 0, 40, 64]])
    router = Router.for_model(tiny, 0)
    router.load_state_dict(learned[0].state_dict())
    halves = [(plan.with_(segments=((0.0, 1.0),), tokens_kept=(row,), attend=())) for row in plan.tokens_kept]
    before = sum(error_of(tiny, half, router) for half in halves)
    tuned, rows = tune(tiny, router, plan, steps=20, batch_size=16)
    after = sum(error_of(tiny, half, tuned) for half in halves)
    assert after < before
    assert rows[0]["keep"] == pytest.approx(plan.mean_keep, abs=0.02)  # timesteps are stratified: half of them each


def test_relative_losses_count_by_the_inverse_of_their_error(smaller):
    router, found = Router.for_model(smaller, 0).requires_grad_(True), {}
    generator = torch.Generator().manual_seed(0)
    [group] = stratified_groups(smaller, smaller.batch("train", 4), 1, (0.4, 0.6), generator)
    with frozen(smaller.module), AppliedPlan(smaller, Plan.dense(smaller), router, guidance=False) as applied:
        for relative in (False, True):
            router.zero_grad()
            distiller = Distiller(applied, Recipe(relative=relative))
            figures = distiller.backward(group, distiller.gate(0, 0.0))
            found[relative] = torch.cat([p.grad.flatten() for p in router.parameters() if p.grad is not None])
    assert found[False].norm() > 0
    expected = found[False] * 0.1 / (figures["error"] + 0.01)
    assert (found[True] - expected).norm() < 0.02 * expected.norm()  # rounded to bfloat16 where a CPU has it


def test_the_backbone_is_left_as_it_was(smaller):
    before = {name: value.clone() for name, value in smaller.module.state_dict().items()}
    smaller.module.proj_out_2.requires_grad_(False)
    asked = [value.requires_grad for value in smaller.module.parameters()]
    batch = smaller.batch("evaluation", 2)
    dense = smaller.predict(batch.inputs)
    warm_up(smaller, **QUICK)
    assert all(torch.equal(before[name], value) for name, value in smaller.module.state_dict().items())
    assert [value.requires_grad for value in smaller.module.parameters()] == asked and not all(asked)
    assert all(value.grad is None for value in smaller.module.parameters())
    assert torch.equal(smaller.predict(batch.inputs), dense)
    assert not any("forward" in layer.module.__dict__ for layer in smaller.layers)


def test_same_seed_same_router_and_other_seed_another(smaller):
    first, rows = warm_up(smaller, seed=3, **QUICK)
    again, rows_again = warm_up(smaller, seed=3, **QUICK)
    other, _ = warm_up(smaller, seed=4, **QUICK)
    assert same_weights(first, again) and without_seconds(rows) == without_seconds(rows_again)
    assert not same_weights(first, other)


class Stop:
    """Interrupts a training as Ctrl-C would, inside a given forward of the model."""

    def __init__(self, model, forward):
        self.left = forward
        self.hook = model.module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            self.hook.remove()
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_to_the_same_result(smaller, tmp_path):
    whole, rows = warm_up(smaller, **QUICK)
    checkpoint = tmp_path / "warm_up.pt"
    router = Router.for_model(smaller, 0)
    Stop(smaller, forward=11)  # a step takes four: two groups, teacher and student
    with pytest.raises(KeyboardInterrupt):
        warm_up(smaller, router=router, checkpoint=checkpoint, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["warm_up.pt"]
    assert not same_weights(router, Router.for_model(smaller, 0))
    lines = []
    resumed, resumed_rows = warm_up(smaller, checkpoint=checkpoint, progress=lines.append, **QUICK)
    assert lines[0] == "warm-up: resumed at step 2 of 4"
    assert same_weights(resumed, whole) and without_seconds(resumed_rows) == without_seconds(rows)
    finished, finished_rows = warm_up(smaller, checkpoint=checkpoint, **QUICK)  # nothing is left to do
    assert same_weights(finished, whole) and finished_rows == resumed_rows


def test_checkpoints_that_do_not_belong_are_refused(smaller, tmp_path):
    checkpoint = tmp_path / "warm_up.pt"
    warm_up(smaller, checkpoint=checkpoint, **QUICK)
    with pytest.raises(InputError, match="another seed; delete it"):
        warm_up(smaller, checkpoint=checkpoint, seed=1, **QUICK)
    with pytest.raises(InputError, match="another sigma, tau_rank; delete it"):
        warm_up(smaller, checkpoint=checkpoint, sigma=0.3, tau_rank=(0.3, 0.1), **QUICK)
    torch.save({"something": 1}, checkpoint)
    with pytest.raises(InputError, match="no checkpoint of this release"):
        warm_up(smaller, checkpoint=checkpoint, **QUICK)
    checkpoint.write_bytes(b"half of a file")
    with pytest.raises(InputError, match="damaged or no checkpoint"):
        warm_up(smaller, checkpoint=checkpoint, **QUICK)


def test_checkpoints_are_written_as_often_as_asked(smaller, tmp_path):
    checkpoint, found = tmp_path / "warm_up.pt", []
    hook = smaller.module.register_forward_pre_hook(lambda *_: found.append(checkpoint.exists()))
    warm_up(smaller, checkpoint=checkpoint, checkpoint_every_s=0.0, **QUICK)
    hook.remove()
    assert found[1:6] == [False] * 4 + [True]  # the first forward finds the router's widths


def test_train_selector_runs_both_stages_and_resumes_them(smaller, tmp_path):
    plan = Plan.uniform(smaller, 0.5)
    checkpoint = tmp_path / "train.pt"
    first = train_selector(smaller, plan, 6, checkpoint=checkpoint, batch_size=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-tune.pt", "train.pt"]
    assert first.origin["stage"] == "tune" and first.origin["steps"] == 2 and first.origin["after"]["steps"] == 4
    assert same_weights(first, train_selector(smaller, plan, 6, checkpoint=checkpoint, batch_size=4))
    assert train_selector(smaller, plan, 3, router=first, batch_size=4).origin["steps"] == 3


@pytest.mark.parametrize("estimator", sorted(TRAINING_ESTIMATORS))
def test_every_estimator_trains(smaller, estimator):
    router, rows = warm_up(smaller, estimator=estimator, **QUICK)
    assert not same_weights(router, Router.for_model(smaller, 0))
    assert rows[0]["error"] > 0


def test_layers_without_a_choice_are_passed_over(smaller):
    router = Router.for_model(smaller, 0)
    plan = Plan.from_rows(smaller, [[16, 0, 16, 0, 16]])
    tuned, rows = tune(smaller, router, plan, steps=2, batch_size=2)
    assert same_weights(tuned, Router.for_model(smaller, 0)) and rows[0]["error"] > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep_range": (0.9, 0.2)}, "ascending"),
        ({"keep_range": (0.0, 0.5)}, "ascending"),
        ({"groups": 5}, "raise batch_size"),
        ({"steps": 0}, "at least 1 step"),
        ({"estimator": "magic"}, "estimator must be one of"),
    ],
)
def test_bad_settings_are_refused(smaller, wrong, words):
    with pytest.raises(InputError, match=words):
        warm_up(smaller, **{**QUICK, **wrong})


def test_a_router_or_plan_of_another_model_is_refused(tiny, smaller):
    with pytest.raises(InputError, match="another model"):
        warm_up(tiny, router=Router.for_model(smaller), **QUICK)
    with pytest.raises(InputError, match="another model"):
        train_selector(tiny, Plan.uniform(smaller, 0.5), 2)
