"""Updates of earlier steps: against a dictionary by token, apart for each half of guidance, gone with the image."""

from __future__ import annotations

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.reuse import ReusedUpdates
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
        reused.begin(torch.full((B,), 1 - step / 8))
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
    reused.begin(torch.tensor([0.9]))
    reused.keep(1, x_BND, x_BND + 2, None)
    reused.begin(torch.tensor([0.8]))
    assert torch.allclose(reused.moved(1, x_BND, x_BND), x_BND + 2)
    assert reused.moved(2, x_BND, x_BND) is x_BND  # another layer


class InTurns:
    """Keeps the even tokens, then the odd ones, and so on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_BND: torch.Tensor, t_B: torch.Tensor, condition_BC: torch.Tensor, layer: int) -> torch.Tensor:
        self.calls += 1
        return ((torch.arange(x_BND.shape[1]) + self.calls) % 2).float().expand(x_BND.shape[:2])


def one_pruned(model: Model) -> Plan:
    row = [Kept(model.tokens)] * model.layer_count
    row[1] = Kept(model.tokens // 2)
    return Plan.from_rows(model, [row])


def outputs(model: Model, times: list[float], seeds: list[int], reuse: int) -> list[torch.Tensor]:
    """A forward at each time, on the example inputs of each seed."""
    found = []
    with torch.no_grad(), AppliedPlan(model, one_pruned(model), InTurns(), guidance=False, reuse_updates=reuse):
        for time, seed in zip(times, seeds, strict=True):
            inputs = {**model.example(seed), "timestep": torch.full((2,), round(1000 * time))}
            found.append(model.predict(inputs))
    return found


def test_a_rejected_token_moves_as_in_the_step_before(model: Model) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), AppliedPlan(model, one_pruned(model), InTurns(), reuse_updates=1) as applied:
        applied.controller.observer = lambda layer, x, out, kept: seen.append((x, out)) if layer == 1 else None
        for time in (900, 800):
            model.predict({**model.example(0), "timestep": torch.full((2,), time)})
    (x_first, out_first), (x_second, out_second) = seen
    stood_still = (out_first == x_first).all(-1)  # no update is known in the first step
    assert int(stood_still[0].sum()) == model.tokens - model.tokens // 2
    moved = ~stood_still  # in the second step these are the rejected ones
    assert torch.allclose((out_second - x_second)[moved], (out_first - x_first)[moved], atol=1e-5)


def test_another_image_starts_anew_and_without_reuse_nothing_is_kept(model: Model) -> None:
    first, second, third = outputs(model, [0.9, 0.8, 0.9], [0, 0, 0], 1)
    assert not torch.equal(first, second)
    assert torch.equal(first, third)
    without = outputs(model, [0.9, 0.8], [0, 0], 0)
    assert torch.equal(first, without[0]) and not torch.equal(second, without[1])


def test_halves_of_guidance_in_separate_calls_do_not_mix(model: Model) -> None:
    apart = [outputs(model, [0.9, 0.8], [seed, seed], 2) for seed in (0, 1)]
    with torch.no_grad(), AppliedPlan(model, one_pruned(model), "stride", guidance=False, reuse_updates=2):
        together = [
            model.predict({**model.example(seed), "timestep": torch.full((2,), time)})
            for time in (900, 800)
            for seed in (0, 1)
        ]
    alone = []
    for seed in (0, 1):
        with torch.no_grad(), AppliedPlan(model, one_pruned(model), "stride", guidance=False, reuse_updates=2):
            alone.append(
                [model.predict({**model.example(seed), "timestep": torch.full((2,), time)}) for time in (900, 800)]
            )
    assert all(torch.equal(a, b) for a, b in zip(together[0::2], alone[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together[1::2], alone[1], strict=True))
    assert not torch.equal(apart[0][1], apart[1][1])


def test_steps_to_reuse_are_counted_from_one(model: Model) -> None:
    with pytest.raises(InputError, match="at least 1 step"):
        AppliedPlan(model, one_pruned(model), "stride", reuse_updates=-1)
