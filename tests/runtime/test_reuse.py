"""Updates of earlier steps: against a dictionary by token, apart for each call of a step, gone with the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.bypass import Accompanied
from shiva_search.runtime.reuse import ReusedUpdates
from shiva_search.selection.closed_form import untrained_bypasses
from tests.models.conformance import FAMILY_CASES

B, N, D, K = 2, 9, 4, 3


@pytest.fixture(scope="module")
def model() -> Model:
    return next(case for case in FAMILY_CASES if case.name == "dit").model()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tokens_are_moved_as_written_out(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    reused, known = ReusedUpdates(steps), {}
    for step in range(8):
        x_BND = torch.randn(B, N, D, generator=generator)
        kept_BK = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(B)])
        out_BKD = torch.randn(B, K, D, generator=generator)
        reused.begin(torch.full((B,), 1 - step / 8), x_BND)
        otherwise_BND = x_BND + 100
        moved_BND = reused.moved(3, x_BND, otherwise_BND)
        for b in range(B):
            for n in range(N):
                update, when = known.get((b, n), (None, -99))
                expected = x_BND[b, n] + update if step - when <= steps else otherwise_BND[b, n]
                assert moved_BND[b, n].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        reused.keep(3, x_BND, out_BKD, kept_BK)
        for b in range(B):
            for place, n in enumerate(kept_BK[b].tolist()):
                known[b, n] = out_BKD[b, place] - x_BND[b, n], step


def test_a_layer_that_keeps_all_leaves_every_update() -> None:
    reused, x_BND = ReusedUpdates(1), torch.randn(B, N, D)
    reused.begin(torch.tensor([0.9]), x_BND)
    reused.keep(1, x_BND, x_BND + 2, None)
    reused.begin(torch.tensor([0.8]), x_BND)
    assert torch.allclose(reused.moved(1, x_BND, x_BND), x_BND + 2)
    assert reused.moved(2, x_BND, x_BND) is x_BND  # another layer


def test_updates_are_kept_in_the_type_of_the_tokens() -> None:
    reused, x_BND = ReusedUpdates(1), torch.randn(B, N, D).bfloat16()
    reused.begin(torch.tensor([0.9]), x_BND)
    reused.keep(1, x_BND, x_BND.float() + 2, None)  # a block may answer in another type under autocast
    reused.begin(torch.tensor([0.8]), x_BND)
    moved_BND = reused.moved(1, x_BND, x_BND)
    assert moved_BND.dtype == torch.bfloat16
    assert torch.allclose(moved_BND.float(), x_BND.float() + 2, atol=0.05)


def by_time(x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
    """Keeps the even tokens or the odd ones, in turns as the time goes down by tenths."""
    tenths = round(10 * float(t_B.max()))
    return ((torch.arange(x_BND.shape[1]) + tenths) % 2).float().expand(x_BND.shape[:2])


def one_pruned(model: Model, rank: int = 0) -> Plan:
    row = [Kept(model.tokens)] * model.layer_count
    row[1] = Kept(model.tokens // 2, rank)
    return Plan.from_rows(model, [row])


def inputs_at(model: Model, time: float, seed: int = 0, label: int = 0) -> dict[str, Any]:
    inputs = dict(model.example(seed))
    return {**inputs, "timestep": torch.full((2,), round(1000 * time)), "class_labels": torch.full((2,), label)}


def run(model: Model, calls: Sequence[tuple[Any, ...]], reuse: int = 1) -> list[torch.Tensor]:
    """The outputs of forwards at (time, seed of latents, label), one after the other."""
    with torch.no_grad(), AppliedPlan(model, one_pruned(model), by_time, guidance=False, reuse_updates=reuse):
        return [model.predict(inputs_at(model, *call)) for call in calls]


@pytest.mark.parametrize("grad", [False, True])
def test_a_rejected_token_moves_as_in_the_step_before(model: Model, grad: bool) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.set_grad_enabled(grad), AppliedPlan(model, one_pruned(model), by_time, reuse_updates=1) as applied:
        applied.controller.observer = lambda layer, x, out, kept: seen.append((x, out)) if layer == 1 else None
        for time in (0.9, 0.8):
            model.module(**inputs_at(model, time))
    (x_first, out_first), (x_second, out_second) = seen
    stood_still = (out_first == x_first).all(-1)  # no update is known in the first step
    assert int(stood_still[0].sum()) == model.tokens - model.tokens // 2
    moved = ~stood_still  # in the second step these are the rejected ones
    assert torch.allclose((out_second - x_second)[moved], (out_first - x_first)[moved], atol=1e-5)


def test_updates_are_reused_across_segments_of_a_plan(model: Model) -> None:
    """A block that kept all tokens at one time has an update for each at the next, whatever row the plan has there."""
    dense, half = Kept(model.tokens), Kept(model.tokens // 2)
    rows = [[dense] * model.layer_count, [dense] * model.layer_count]
    rows[0][1] = half  # at times below 0.5, which come last
    seen: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad(), AppliedPlan(model, Plan.from_rows(model, rows), by_time, reuse_updates=1) as applied:
        for time in (0.6, 0.4):
            applied.controller.observer = lambda layer, x, out, kept, time=time: (
                seen.update({time: (x, out)}) if layer == 1 else None
            )
            model.predict(inputs_at(model, time))
    (x_dense, out_dense), (x_half, out_half) = seen[0.6], seen[0.4]
    rejected = by_time(x_half, torch.tensor([0.4]), x_half, 1) == 0
    assert torch.allclose((out_half - x_half)[rejected], (out_dense - x_dense)[rejected], atol=1e-5)
    assert not torch.allclose((out_half - x_half)[~rejected], (out_dense - x_dense)[~rejected], atol=1e-5)


def test_with_a_bypass_only_what_has_no_update_takes_it(model: Model) -> None:
    scorer = Accompanied(by_time, untrained_bypasses(model, ranks=(2,)))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), AppliedPlan(model, one_pruned(model, rank=2), scorer, reuse_updates=1) as applied:
        applied.controller.observer = lambda layer, x, out, kept: seen.append((x, out)) if layer == 1 else None
        for time in (0.9, 0.8):
            model.predict(inputs_at(model, time))
    (x_first, out_first), (x_second, out_second) = seen
    kept_first = by_time(x_first, torch.tensor([0.9]), x_first, 1) > 0
    assert torch.allclose((out_second - x_second)[kept_first], (out_first - x_first)[kept_first], atol=1e-5)
    assert not torch.equal(out_first[~kept_first], x_first[~kept_first])  # the bypass moved them


def test_another_image_starts_anew(model: Model) -> None:
    fresh = run(model, [(0.9,), (0.8,)])
    assert not torch.equal(fresh[1], run(model, [(0.8,)])[0])  # the second step has the first one's updates
    for before in ([(0.9,), (0.8,)], [(0.9, 1)], [(0.3, 1)]):  # a whole image, one left after its first step, ...
        after = run(model, [*before, (0.9,), (0.8,)])[-2:]
        assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))


def test_an_image_that_begins_below_the_last_one_is_announced(model: Model) -> None:
    fresh = run(model, [(0.5,), (0.4,)])
    with torch.no_grad(), AppliedPlan(model, one_pruned(model), by_time, guidance=False, reuse_updates=1) as applied:
        model.predict(inputs_at(model, 0.8, 1))
        applied.forget_updates()
        after = [model.predict(inputs_at(model, time)) for time in (0.5, 0.4)]
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))


def test_calls_of_one_step_do_not_mix(model: Model) -> None:
    labels = (1, 2, 3)  # with the prompt, without it, and disturbed
    together = run(model, [(time, 0, label) for time in (0.9, 0.8) for label in labels])
    without = run(model, [(time, 0, label) for time in (0.9, 0.8) for label in labels], reuse=0)
    for place, label in enumerate(labels):
        alone = run(model, [(0.9, 0, label), (0.8, 0, label)])
        assert torch.equal(together[place], alone[0]) and torch.equal(together[3 + place], alone[1])
        assert not torch.equal(together[3 + place], without[3 + place])


def test_other_latents_at_the_same_time_are_another_step() -> None:
    """Heun's method ends a step at the time at which the next one begins."""
    reused, latents = ReusedUpdates(1), torch.randn(3, B, N, D)
    for time, drawn in ((0.9, 0), (0.8, 1), (0.8, 2)):
        reused.begin(torch.tensor([time]), latents[drawn])
        reused.keep(1, latents[0], latents[0] + drawn, None)
    reused.begin(torch.tensor([0.7]), latents[0])
    assert torch.allclose(reused.moved(1, latents[0], latents[0]), latents[0] + 2)


def test_what_cannot_be_together_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="at least 1 step"):
        AppliedPlan(model, one_pruned(model), "stride", reuse_updates=-1)
    with AppliedPlan(model, one_pruned(model), "stride", reuse_updates=1) as applied:
        with pytest.raises(InputError, match="CUDA graphs"):
            applied.capture()
        with pytest.raises(InputError, match="dynamic=False"):
            applied.compile(dynamic=False)
