"""What rejected tokens do, and whose keys kept ones see: against loops over tokens, and gone when removed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.bypass import AffineBypass, BypassBank
from shiva_search.runtime.scorers import Stride
from shiva_search.selection.closed_form import untrained_bypasses
from shiva_search.selection.loading import load_selector
from tests.models.conformance import FAMILY_CASES

CASES = {case.name: case for case in FAMILY_CASES}


@pytest.fixture(scope="module")
def model() -> Model:
    return CASES["dit"].model()


@pytest.fixture(scope="module")
def bank(model: Model) -> BypassBank:
    made = untrained_bypasses(model, ranks=(2, 5))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(20)  # far from zero, so that a mistake shows
    return made


def normed(x_D: torch.Tensor) -> torch.Tensor:
    return (x_D - x_D.mean()) / (x_D.var(unbiased=False) + 1e-5).sqrt()


def slow_update(bypass: AffineBypass, x_ND: torch.Tensor, n: int, condition_C: torch.Tensor, rank: int) -> torch.Tensor:
    """Token n of an image, written out as the file's head says it."""
    x_D, normed_D = x_ND[n], normed(x_ND[n])
    image_E = torch.cat([normed(condition_C), normed(x_ND.mean(0))])
    gates_J = bypass.over_condition @ normed(condition_C) + bypass.gate
    update_D = bypass.mean[0].clone()
    for r in range(rank):
        over_normed_D, over_tokens_D = bypass.over_normed[0, r].clone(), bypass.over_tokens[0, r].clone()
        for j in range(bypass.gates):
            over_normed_D += gates_J[j] * bypass.gated_normed[0, j, r]
            over_tokens_D += gates_J[j] * bypass.gated_tokens[0, j, r]
        # Weights over n(x) count less their mean, which changes nothing: n(x) has none.
        h = over_normed_D @ normed_D + over_tokens_D @ x_D
        h = h + bypass.over_image[0, r] @ image_E + bypass.hidden[0, r]
        update_D = update_D + h * bypass.out[0, r]
    return update_D


@pytest.mark.parametrize("rank", [2, 5])
def test_tokens_move_as_written_out(bank: BypassBank, rank: int) -> None:
    bypass = bank.bypasses[1]
    width, condition_width = bank.widths
    x_BND = 3 * torch.randn(2, 7, width) + 1
    condition_BC = torch.randn(2, condition_width)
    hidden = bypass.read(x_BND, condition_BC)
    moved = bypass.move(x_BND, hidden, rank)
    for b in range(2):
        for n in range(7):
            expected = x_BND[b, n] + slow_update(bypass, x_BND[b], n, condition_BC[b], rank)
            assert moved[b, n] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_reading_for_one_rank_gives_what_it_is_of_all(bank: BypassBank, rank: int) -> None:
    bypass, (width, condition_width) = bank.bypasses[1], bank.widths
    x_BND, condition_BC = torch.randn(2, 7, width), torch.randn(2, condition_width)
    whole, alone = bypass.read(x_BND, condition_BC), bypass.read(x_BND, condition_BC, rank=rank)
    assert alone.shape == (2, 7, rank + 1)
    assert torch.allclose(alone[..., :rank], whole[..., :rank], atol=1e-5)
    assert torch.allclose(alone[..., -1], bypass.scores(whole, rank), atol=1e-5)
    with pytest.raises(InputError, match="ranks 0, 2, 5"):
        bypass.read(x_BND, condition_BC, rank=3)


def test_a_bank_without_gates_reads_all_images_alike(bank: BypassBank) -> None:
    """As those saved before there were gates."""
    assert bank.gates > 0
    shape = {key: value for key, value in bank.shape.items() if key != "gates"}
    plain = BypassBank(**shape)
    named = dict(bank.named_parameters())
    plain.load_state_dict({name: named[name] for name in plain.state_dict()})
    x_BND = torch.randn(1, 7, bank.widths[0]).expand(2, -1, -1)
    condition_BC = torch.randn(2, bank.widths[1])
    alike = plain.bypasses[1].read(x_BND, condition_BC, rank=0)
    apart = bank.bypasses[1].read(x_BND, condition_BC, rank=0)
    assert torch.allclose(alike[0], alike[1], atol=1e-6)
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)


def test_a_bypass_is_close_in_bfloat16(bank: BypassBank) -> None:
    bypass = bank.bypasses[1]
    width, condition_width = bank.widths
    x_BND, condition_BC = 3 * torch.randn(2, 7, width) + 1, torch.randn(2, condition_width)
    exact = bypass.move(x_BND, bypass.read(x_BND, condition_BC), 5) - x_BND
    half = x_BND.bfloat16()
    found = bypass.move(half, bypass.read(half, condition_BC.bfloat16()), 5)
    assert found.dtype == torch.bfloat16
    assert (found.float() - half.float() - exact).norm() < 0.05 * (exact.norm() + x_BND.norm())


@pytest.mark.parametrize("name", ["dit", "sd3.5", "flux.1-dev", "pixart-sigma", "auraflow"])
def test_rejected_tokens_take_the_bypass_and_kept_ones_the_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES[name].model()
    bank = untrained_bypasses(model, ranks=(2, 3))
    ranked, conditions = bank.bypasses[1], []
    read = ranked.read

    def reading(x_BND, condition_BC, *args):
        conditions.append(condition_BC)
        return read(x_BND, condition_BC, *args)

    monkeypatch.setattr(ranked, "read", reading)
    row = [Kept(model.tokens), *[Kept(model.tokens // 2, 3)] * (model.layer_count - 1)]
    identity = [Kept(int(k)) for k in row]
    seen: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {"bypass": {}, "none": {}}
    for label, choices in (("bypass", row), ("none", identity)):

        def note(layer, x_BND, out_BND, kept_BK, label=label):
            seen[label][layer] = (x_BND, out_BND, kept_BK)

        with torch.no_grad(), AppliedPlan(model, Plan.from_rows(model, [choices]), bank, guidance=False) as applied:
            applied.controller.observer = note
            model.predict(model.example())
    x_BND, out_BND, kept_BK = seen["bypass"][1]
    same_x, plain_BND, plain_kept = seen["none"][1]
    assert torch.equal(x_BND, same_x)
    rejected = torch.ones(x_BND.shape[:2], dtype=torch.bool).scatter(1, kept_BK, False)
    assert not torch.allclose(out_BND[rejected], x_BND[rejected])
    scores = ranked.scores(read(x_BND, conditions[0]), 3)
    assert torch.equal(kept_BK, scores.topk(model.tokens // 2).indices.sort(1).values)
    both = [sorted(set(a) & set(b)) for a, b in zip(kept_BK.tolist(), plain_kept.tolist(), strict=True)]
    if both == kept_BK.tolist():  # the same choice: kept tokens went through the same block
        assert torch.allclose(out_BND[~rejected], plain_BND[~rejected], atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "pixart-sigma"])
def test_under_autocast_tokens_keep_their_dtype(name: str) -> None:
    model = CASES[name].model()
    row = [Kept(model.tokens), *[Kept(model.tokens // 2, 3)] * (model.layer_count - 1)]
    seen: list[torch.dtype] = []
    plan = Plan.from_rows(model, [row])
    with AppliedPlan(model, plan, untrained_bypasses(model, ranks=(2, 3)), guidance=False) as applied:
        applied.controller.observer = lambda layer, x_BND, out_BND, kept_BK: seen.append(out_BND.dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.predict(model.example())
    assert len(seen) == model.layer_count and len(set(seen)) == 1


def test_a_block_may_be_replaced_by_its_bypass(model: Model, bank: BypassBank) -> None:
    row = [Kept(model.tokens), *[Kept(0, 5)] * (model.layer_count - 1)]
    steps = {}

    def note(layer, x_BND, out_BND, kept_BK):
        steps[layer] = (x_BND, out_BND)

    with torch.no_grad(), AppliedPlan(model, Plan.from_rows(model, [row]), bank, guidance=False) as applied:
        applied.controller.observer = note
        inputs = model.example()
        model.predict(inputs)
    condition_BC = model.layers[1].module.norm1.emb(
        inputs["timestep"], inputs["class_labels"], hidden_dtype=torch.float32
    )
    x_BND, out_BND = steps[1]
    expected = x_BND[0, 0] + slow_update(bank.bypasses[1], x_BND[0], 0, condition_BC[0], 5)
    assert out_BND[0, 0] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_keep_all_is_bit_identical_and_nothing_is_left_behind(model: Model, bank: BypassBank) -> None:
    inputs = model.example()
    before = sorted(name for name, _ in model.module.named_parameters())
    with torch.no_grad():
        expected = model.predict(inputs)
        with AppliedPlan(model, Plan.from_rows(model, [[Kept(model.tokens, 5, "all")] * model.layer_count]), bank):
            assert torch.equal(model.predict(inputs), expected)
        with AppliedPlan(model, Plan.from_rows(model, [[model.tokens, *[Kept(3, 2)] * 3]]), bank):
            assert not torch.equal(model.predict(inputs), expected)
        assert torch.equal(model.predict(inputs), expected)
    assert sorted(name for name, _ in model.module.named_parameters()) == before


def test_a_plan_without_its_bypass_is_refused(model: Model, bank: BypassBank) -> None:
    plan = Plan.from_rows(model, [[model.tokens, *[Kept(3, 2)] * 3]])
    with pytest.raises(InputError, match="bypass of rank 2.*selector.safetensors"):
        AppliedPlan(model, plan, Stride())
    other = Plan.from_rows(model, [[model.tokens, *[Kept(3, 4)] * 3]])
    with pytest.raises(InputError, match="ranks 0, 2, 5"):
        AppliedPlan(model, other, bank)


def test_a_bank_survives_its_file(bank: BypassBank, model: Model, tmp_path: Path) -> None:
    bank.save(tmp_path / "selector.safetensors")
    loaded = load_selector(tmp_path)
    assert isinstance(loaded, BypassBank) and loaded.shape == bank.shape and loaded.model == model.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), bank.parameters(), strict=True))


def test_a_plan_with_variants_survives_its_file(model: Model, tmp_path: Path) -> None:
    row = [Kept(model.tokens), Kept(5, 2), Kept(0, 5), Kept(7, 0, "all")]
    plan = Plan.from_rows(model, [row])
    plan.save(tmp_path / "plan.json")
    again = Plan.from_file(tmp_path)
    assert again.rows == plan.rows == (tuple(row),)
    assert again.bypass == {"kind": "affine", "ranks": [[0, 2, 5, 0]]} and again.attend[0][3] == "all"
