"""Judging plans: exact, shared, early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_search.errors import InputError
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.search.fidelity import FidelityEvaluator, fidelity


@pytest.fixture(scope="module")
def batch(model):
    return model.batch("calibration", 16, seed=3)


def evaluator(model, batch, **options) -> FidelityEvaluator:
    return FidelityEvaluator(model, options.pop("scorer", "stride"), batch, chunk=4, **options)


def plain_error(model, batch, row, scorer="stride") -> float:
    """NMSE as the definition has it: one forward of each over the whole batch."""
    with torch.no_grad():
        dense = model.predict(batch.inputs)
        with AppliedPlan(model, Plan.from_rows(model, [row]), scorer, guidance=False):
            planned = model.predict(batch.inputs)
    return float((planned - dense).double().square().sum() / dense.double().square().sum())


ROW = (64, 40, 0, 24, 64)


@pytest.mark.parametrize("scorer", ["stride", "norm", "residual"])
def test_error_is_the_nmse_of_the_output(model, batch, scorer: str) -> None:
    assert evaluator(model, batch, scorer=scorer).error(ROW) == pytest.approx(
        plain_error(model, batch, ROW, scorer), rel=1e-4
    )


def test_a_plan_that_keeps_all_tokens_has_error_zero(model, batch) -> None:
    assert evaluator(model, batch).error((64,) * 5) == 0.0


@given(st.lists(st.tuples(*[st.sampled_from((0, 8, 32, 64))] * 4), min_size=1, max_size=6))
@settings(max_examples=15)
def test_shared_prefixes_change_no_bit(model, batch, tails: list[tuple[int, ...]]) -> None:
    rows = [(64, *tail) for tail in tails]
    # Room for a few states only, so that some are dropped and made again.
    shared = evaluator(model, batch, scorer="residual", memory_mib=0.3)
    plain = evaluator(model, batch, scorer="residual", memory_mib=0.0)
    assert [shared.error(row) for row in rows] == [plain.error(row) for row in rows]


def test_shared_prefixes_save_work(model, batch) -> None:
    shared, plain = evaluator(model, batch), evaluator(model, batch, memory_mib=0.0)
    for last in (0, 16, 32, 48):
        for each in (shared, plain):
            each.error((64, 40, 24, 32, last))
    # Dense, the whole first plan, then one layer for each of the three others.
    assert plain.forwards == pytest.approx(1 + sum((64 + 40 + 24 + 32 + k) / 320 for k in (0, 16, 32, 48)))
    assert shared.forwards == pytest.approx(1 + (96 + 0 + 16 + 32 + 48) / 320)


def test_work_is_counted_by_predicted_cost_where_it_is_known(model, batch) -> None:
    each = evaluator(model, batch, layer_cost=lambda layer, k: float(k > 0), fixed_cost=1.0)
    before = each.forwards
    each.error((64, 8, 0, 0, 8))
    assert before == 1.0
    assert each.forwards - before == pytest.approx((1 + 2) / 6)  # the first layer is shared with the dense pass


def test_states_stay_within_their_room(model, batch) -> None:
    each = evaluator(model, batch, memory_mib=0.2)
    for k in (0, 8, 16, 24, 32, 40):
        each.error((64, k, 64, k, 64))
    held = [state for state, _ in each._prefixes._states.values()]
    assert 0 < sum(s.output.numel() * 4 for s in held) <= 0.2 * 2**20


def test_no_hook_is_left(model, batch) -> None:
    before = [layer.module.__dict__.get("forward") for layer in model.layers]
    each = evaluator(model, batch)
    each.error(ROW)

    class Broken:
        def __call__(self, x_BND, t_B, condition_BC, layer):
            raise RuntimeError("scorer broke")

    each.scorer = Broken()
    with pytest.raises(RuntimeError, match="scorer broke"):
        each.error((64, 8, 8, 8, 8))
    assert [layer.module.__dict__.get("forward") for layer in model.layers] == before
    assert not model.module._forward_pre_hooks


# ---- early stop ------------------------------------------------------------------------------------------------------


def test_a_hopeless_plan_is_stopped_and_estimated(model, batch) -> None:
    each = evaluator(model, batch)
    good = each.judge(((64, 64, 64, 64, 48),))
    assert good.complete and good.samples == 16
    before = each.forwards
    bad = each.judge(((64, 0, 0, 0, 0),), rival=good)
    assert not bad.complete and bad.samples < 16
    whole = each.judge(((64, 0, 0, 0, 0),))
    assert whole.complete
    assert bad.error == pytest.approx(whole.error, rel=0.5)
    assert each.forwards - before < 2 * bad.samples / 16


def test_a_better_plan_is_never_stopped(model, batch) -> None:
    each = evaluator(model, batch)
    bad = each.judge(((64, 0, 0, 0, 0),))
    assert each.judge(((64, 64, 64, 64, 48),), rival=bad).complete


def test_parts_of_a_complete_plan_average_to_its_error(model, batch) -> None:
    judged = evaluator(model, batch).judge((ROW,))
    assert len(judged.parts) == 16
    assert float(judged.parts.mean()) == judged.error


# ---- segments, weights, types ----------------------------------------------------------------------------------------


def test_segments_are_judged_by_their_own_row_and_add_up(model, batch) -> None:
    halves = ((0.0, 0.5), (0.5, 1.0))
    each = evaluator(model, batch, segments=halves)
    dense = (64,) * 5
    early, late = each.error([ROW, dense]), each.error([dense, ROW])
    assert each.error([ROW, ROW]) == pytest.approx(early + late, rel=1e-6)
    assert each.error([ROW, ROW]) == pytest.approx(plain_error(model, batch, ROW), rel=1e-4)
    low = [i for i, t in enumerate(batch.t_B.tolist()) if t < 0.5]
    with torch.no_grad():
        model_dense = model.predict(batch.inputs)
    part = batch.slice(0, 16)
    with torch.no_grad(), AppliedPlan(model, Plan.from_rows(model, [ROW]), "stride", guidance=False):
        planned = model.predict(part.inputs)
    expected = (planned - model_dense)[low].square().sum() / model_dense.square().sum()
    assert early == pytest.approx(float(expected), rel=1e-4)


def test_rows_that_do_not_fit_are_refused(model, batch) -> None:
    with pytest.raises(InputError, match="1 rows of 5 entries"):
        evaluator(model, batch).error((64, 64))


def test_a_segment_without_samples_is_refused(model) -> None:
    with pytest.raises(InputError, match="no sample"):
        evaluator(model, model.batch("calibration", 2), segments=((0.0, 0.01), (0.01, 1.0)))


def test_weights_count_by_sample(model, batch) -> None:
    only_late = evaluator(model, batch, weight=lambda t_b: (t_b > 0.5).float())
    halves = ((0.0, 0.5), (0.5, 1.0))
    each = evaluator(model, batch, segments=halves)
    late = each.error([(64,) * 5, ROW])
    energy = [float(sum(c.energy_b.sum() for c in e._chunks if True)) for e in (each,)][0]
    assert only_late.error(ROW) == pytest.approx(late * energy / only_late.energy, rel=1e-4)


def test_bfloat16_keeps_the_ranking_of_clearly_different_plans(model, batch) -> None:
    rows = [(64, 64, 64, 64, 48), (64, 56, 64, 32, 48), (64, 0, 32, 0, 8)]
    exact = [evaluator(model, batch).error(row) for row in rows]
    rough = [evaluator(model, batch, autocast=torch.bfloat16).error(row) for row in rows]
    assert sorted(range(3), key=exact.__getitem__) == sorted(range(3), key=rough.__getitem__)


def test_sketches_keep_lengths_and_angles(model, batch) -> None:
    each = evaluator(model, batch, probe=99)
    a, b = each.judge(((64, 32, 64, 64, 64),)), each.judge(((64, 64, 64, 32, 64),))
    both = each.judge(((64, 32, 64, 32, 64),))
    assert float(a.sketch @ a.sketch) == pytest.approx(a.error, rel=0.2)
    # To first order the changes of single layers add up.
    added = a.sketch + b.sketch
    cosine = float(added @ both.sketch / np.linalg.norm(added) / np.linalg.norm(both.sketch))
    assert cosine > 0.9


# ---- the public figure -----------------------------------------------------------------------------------------------


def test_fidelity_is_zero_for_dense_and_the_same_for_the_same_seed(model) -> None:
    assert fidelity(model, Plan.dense(model), samples=8) == 0.0
    plan = Plan.uniform(model, 0.5)
    first = fidelity(model, plan, samples=8)
    assert first == fidelity(model, plan, samples=8) > 0
    assert first != fidelity(model, plan, samples=8, seed=1)
    assert first != fidelity(model, plan, "norm", samples=8)


def test_fidelity_refuses_a_plan_for_another_model(model, make_model) -> None:
    with pytest.raises(InputError, match="another model"):
        fidelity(model, Plan.uniform(make_model(seed=5), 0.5), samples=4)
