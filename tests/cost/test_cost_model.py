"""The cost model against a device whose true costs are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shiva_search as ss
from shiva_search.cost import CostModel, fit_cost_model, load_cost_model
from shiva_search.errors import InputError
from shiva_search.records.budget import Budget
from shiva_search.records.cost_table import load_cost_table
from shiva_search.records.plan import Kept, Plan
from shiva_search.records.profile import Profile

Make = Callable[..., Any]


def errors(truth: Any, cost: CostModel, rows: list[tuple[int, ...]]) -> np.ndarray:
    dense_ms = cost.dense.latency_ms
    assert dense_ms is not None
    predicted = np.array([cost.predict(truth.plan(row)).latency_ms for row in rows]) / dense_ms
    true = np.array([truth.plan_ms(row) for row in rows]) / truth.dense_ms()
    found: np.ndarray = predicted / true - 1
    return found


def test_what_blocks_alone_do_not_know_is_learned_from_plans(truth: Make, plans_of: Make) -> None:
    device = truth(scale=1.08, overhead_ms=0.35, fixed_ms=5.0, noise=0.01)
    rows = plans_of(60, 8, seed=1)
    with_plans = errors(device, fit_cost_model(device.profile()), rows)
    without = errors(device, fit_cost_model(device.profile(plans=0)), rows)
    assert np.median(np.abs(with_plans)) < 0.01
    assert np.median(np.abs(with_plans)) < np.median(np.abs(without)) / 2
    assert abs(with_plans.mean()) < 0.005


def test_corrections_are_recovered(truth: Make) -> None:
    cost = fit_cost_model(truth(scale=1.06, overhead_ms=0.3, fixed_ms=4.0, noise=0.003).profile(plans=60))
    dense_ms = truth(scale=1.06, fixed_ms=4.0).dense_ms()
    assert cost.dense.latency_ms == pytest.approx(dense_ms, rel=1e-9)
    assert cost.fixed("latency_ms") == pytest.approx(4.0, abs=0.5)
    gap = (cost.layer_cost("latency_ms", 1, 256) or 0) - (cost.layer_cost("latency_ms", 1, 512) or 0)
    true = truth(scale=1.06, overhead_ms=0.3)
    assert gap == pytest.approx(true.in_model_ms("a", 256) - true.in_model_ms("a", 512), abs=0.1)


def test_what_variants_cost_is_learned_from_plans(truth: Make) -> None:
    device = truth(scale=1.05, noise=0.01, variant_scale=0.5)
    cost = fit_cost_model(device.profile(plans=40))
    assert cost.variants() == ("all", "rank 16", "rank 32")
    found = errors(device, cost, device.plans(60, seed=1))
    assert np.median(np.abs(found)) < 0.01 and abs(found.mean()) < 0.005
    # Blocks alone make a bypass twice as dear as it is.
    assert cost.layer_cost("latency_ms", 1, Kept(0, 32)) == pytest.approx(0.5 * 1.05 * 1.36, abs=0.25)


def test_outliers_among_plans_do_little(truth: Make, plans_of: Make) -> None:
    device = truth(scale=1.05, noise=0.01)
    profile = device.profile()
    spoilt = [
        replace(item, ratio=item.ratio * 1.5, ratio_low=item.ratio_low * 1.5, ratio_high=item.ratio_high * 1.5)
        if i % 8 == 0
        else item
        for i, item in enumerate(profile.forwards)
    ]
    cost = fit_cost_model(replace(profile, forwards=tuple(spoilt)))
    assert np.median(np.abs(errors(device, cost, plans_of(40, 8, seed=2)))) < 0.015


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_nine_in_ten_new_plans_lie_in_the_interval(truth: Make, plans_of: Make, noise: float) -> None:
    true, measured = [], []
    for seed in range(8):
        device = truth(scale=1.05, overhead_ms=0.2, noise=noise, seed=seed)
        cost = fit_cost_model(device.profile(plans=28))
        rows = plans_of(60, 8, seed=100 + seed)
        # What a user compares with is a measurement, which has an interval of its own.
        errors = noise * np.random.default_rng(seed).standard_normal(len(rows))
        for row, error in zip(rows, errors, strict=True):
            estimate, true_ms = cost.predict(device.plan(row)), device.plan_ms(row)
            assert estimate.latency_ms_low is not None and estimate.latency_ms_high is not None
            true.append(estimate.latency_ms_low <= true_ms <= estimate.latency_ms_high)
            distance = abs(np.log(estimate.latency_ms / true_ms) - error)
            measured.append(distance <= np.hypot(np.log1p(cost.interval), 1.645 * noise))
    assert 0.85 <= np.mean(true) <= 0.98
    assert 0.85 <= np.mean(measured) <= 0.95


def test_noise_of_short_measurements_does_not_widen_the_interval(truth: Make) -> None:
    wide = np.mean([fit_cost_model(truth(noise=0.02, seed=seed).profile(plans=28)).interval for seed in range(6)])
    assert wide < 1.645 * 0.02


def test_steps_are_kept(truth: Make) -> None:
    cost = fit_cost_model(truth(tile=64, noise=0.002).profile())
    here, behind, before = (cost.layer_cost("latency_ms", 3, k) or 0.0 for k in (64, 65, 63))
    assert behind - here > 0.5
    assert abs(here - before) < 0.15
    assert 64 in cost.candidates() and 65 not in cost.candidates()


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.0, 0.1))
def test_curves_rise_over_pruned_counts_whatever_the_noise(truth: Make, seed: int, noise: float) -> None:
    cost = fit_cost_model(truth(noise=noise, seed=seed, layers=("a", "b", "a", "b")).profile(plans=5))
    for layer in (0, 1):
        table = cost.table("latency_ms", layer)
        assert table is not None and len(table) == 513
        assert (np.diff(table[:-1]) >= -1e-12).all()
        assert (table >= 0).all()
    assert (cost.fixed("latency_ms") or 0.0) >= 0


@pytest.mark.parametrize("layers", [("a",) * 8, ("a", "b", "b", "a", "b")])
def test_costs_add_up_exactly(truth: Make, plans_of: Make, layers: tuple[str, ...]) -> None:
    device = truth(noise=0.02, layers=layers)
    cost = fit_cost_model(device.profile())
    for row in plans_of(10, len(layers), seed=3):
        estimate = cost.predict(device.plan(row))
        for metric, value in (("latency_ms", estimate.latency_ms), ("gflops", estimate.gflops)):
            total = sum(cost.layer_cost(metric, i, k) or 0.0 for i, k in enumerate(row)) + (cost.fixed(metric) or 0.0)
            assert value == pytest.approx(total, rel=1e-12)
        peaks = [cost.layer_cost("memory_mib", i, k) or 0.0 for i, k in enumerate(row)]
        assert estimate.peak_memory_mib == pytest.approx((cost.fixed("memory_mib") or 0.0) + max(peaks))


def test_segments_are_averaged_over_time(truth: Make) -> None:
    cost = fit_cost_model(truth().profile())
    rows = ((512,) * 8, (512,) + (64,) * 7)
    both = Plan(512, rows, segments=((0.0, 0.25), (0.25, 1.0)))
    apart = [cost.predict(Plan(512, (row,))).latency_ms or 0.0 for row in rows]
    assert cost.predict(both).latency_ms == pytest.approx(0.25 * apart[0] + 0.75 * apart[1])


def test_operations_follow_a_parabola_between_counts(truth: Make) -> None:
    cost = fit_cost_model(truth().profile())
    for k in (1, 33, 200, 511):
        assert cost.layer_cost("gflops", 2, k) == pytest.approx(k / 512 + (k / 512) ** 2, rel=1e-6)
    assert cost.layer_cost("gflops", 2, 0) == 0.0
    assert cost.dense.gflops == pytest.approx(0.5 + 8 * 2.0)


def test_memory_is_what_is_held_plus_the_largest_block(truth: Make) -> None:
    cost = fit_cost_model(truth().profile())
    assert cost.dense.peak_memory_mib == pytest.approx(80.0)
    alone = fit_cost_model(truth().profile(plans=0))
    assert alone.dense.peak_memory_mib == pytest.approx(3.0 + 64.0)


def test_what_was_not_measured_is_unknown(truth: Make) -> None:
    cost = fit_cost_model(truth().profile())
    assert cost.dense.energy_j is None and cost.dense.power_w is None
    assert cost.layer_cost("energy_j", 0, 512) is None and cost.fixed("energy_j") is None
    with pytest.raises(Exception, match="energy") as refusal:
        Budget(energy_j=1.0).resolve(cost.dense)
    assert getattr(refusal.value, "exit_code", None) == 4


def test_energy_is_power_times_time_and_the_dense_figure_is_met(truth: Make) -> None:
    profile: Profile = truth().profile()
    rows = [
        replace(row, power_w=20.0 + 10.0 * row.tokens_kept / 512) if row.tokens_kept in (64, 256, 512) else row
        for row in profile.rows
    ]
    dense = {**profile.dense, "energy_j": 2.5}
    cost = fit_cost_model(replace(profile, rows=tuple(rows), dense=dense, rest={**profile.rest, "power_w": 10.0}))
    assert cost.dense.energy_j == pytest.approx(2.5)
    assert cost.dense.power_w == pytest.approx(2.5 / (cost.dense.latency_ms or 1) * 1e3)
    small = cost.predict(Plan(512, ((512,) + (64,) * 7,)))
    assert small.energy_j is not None and small.energy_j < 1.0
    again = cost.corrected(Plan.dense(_Shape()), 1.0)
    assert again.dense.energy_j == pytest.approx(2.5)


class _Shape:
    tokens, layer_count = 512, 8

    def fingerprint(self) -> dict[str, Any]:
        return {}


def test_a_measurement_corrects_the_prediction_where_it_was_taken(truth: Make) -> None:
    device = truth(noise=0.01)
    cost = fit_cost_model(device.profile())
    plan = device.plan((512, 256, 256, 256, 128, 128, 64, 0))
    before = (cost.predict(plan).latency_ms or 0) / (cost.dense.latency_ms or 1)
    for wrong in (1.04, 0.96):
        after_model = cost.corrected(plan, before * wrong)
        after = (after_model.predict(plan).latency_ms or 0) / (after_model.dense.latency_ms or 1)
        assert abs(np.log(after / (before * wrong))) < 0.4 * abs(np.log(wrong))
        assert after_model.evidence is not None and cost.evidence is not None
        assert len(after_model.evidence.plans) == len(cost.evidence.plans) + 1
    with pytest.raises(InputError, match="above zero"):
        cost.corrected(plan, 0.0)


def test_candidates(truth: Make) -> None:
    cost = fit_cost_model(truth(noise=0.01).profile())
    found = cost.candidates()
    assert found == tuple(sorted(set(found)))
    assert found[0] == 0 and found[-1] == 512
    assert 14 <= len(found) <= 32
    assert 511 not in found and 1 not in found and 65 not in found
    dense_ms = cost.layer_cost("latency_ms", 1, 512) or 0.0
    assert all((cost.layer_cost("latency_ms", 1, k) or 0.0) < dense_ms for k in found[:-1])
    kept = cost.candidates(min_keep=0.25)
    assert min(kept) >= 128 and kept[-1] == 512
    with pytest.raises(InputError, match="share of tokens"):
        cost.candidates(min_keep=1.5)


def test_a_file_gives_the_same_model_back(truth: Make, tmp_path: Path) -> None:
    device = truth(noise=0.02, layers=("a", "b", "a", "b"))
    cost = fit_cost_model(device.profile())
    cost.save(tmp_path)
    loaded = load_cost_model(tmp_path)
    assert loaded == cost
    plan = device.plan((512, 100, 300, 0))
    assert loaded.predict(plan) == cost.predict(plan)
    assert loaded.corrected(plan, 0.5).dense == cost.corrected(plan, 0.5).dense
    assert load_cost_table(tmp_path).predict(plan) == cost.predict(plan)
    saved = json.loads((tmp_path / "cost_model.json").read_text())
    assert {"median_error", "p95_error", "bias", "plans"} <= saved["held_out"].keys()


def test_the_folder_of_a_profile_will_do(truth: Make, tmp_path: Path) -> None:
    device = truth(noise=0.01)
    profile = device.profile()
    profile.save(tmp_path)
    plan = device.plan((512, 256, 0, 448, 128, 512, 64, 320))
    at_hand, from_folder = (ss.fit_cost_model(given).predict(plan) for given in (profile, str(tmp_path)))
    assert from_folder.latency_ms == pytest.approx(at_hand.latency_ms, rel=1e-4)  # files have fewer digits
    with pytest.raises(InputError, match="nowhere"):
        ss.fit_cost_model(tmp_path / "nowhere")


def test_without_plans_it_says_that_it_is_not_sure(truth: Make) -> None:
    cost = fit_cost_model(truth().profile(plans=0))
    assert "reason" in cost.held_out
    assert cost.interval >= 0.1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.pop("curves"), "not a cost model"),
        (lambda values: values.update(schema_version=99), "schema_version 99"),
        (lambda values: values.update(layers=None), "not a cost model"),
        (lambda values: values["evidence"].pop("blocks"), "not a cost model"),
    ],
)
def test_a_spoilt_file_is_refused(
    truth: Make, tmp_path: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    fit_cost_model(truth().profile()).save(tmp_path)
    path = tmp_path / "cost_model.json"
    values = json.loads(path.read_text())
    spoil(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        load_cost_model(tmp_path)


def test_wrong_questions_are_refused(truth: Make) -> None:
    cost = fit_cost_model(truth().profile())
    with pytest.raises(InputError, match="power is energy over latency"):
        cost.layer_cost("power_w", 0, 512)
    with pytest.raises(InputError, match="layer 9"):
        cost.layer_cost("latency_ms", 9, 0)
    with pytest.raises(InputError, match="3 layers"):
        cost.predict(Plan(512, ((512, 1, 2),)))
    profile = truth().profile()
    pruned = tuple(row for row in profile.rows if row.tokens_kept < 512)
    with pytest.raises(InputError, match="no dense row"):
        fit_cost_model(replace(profile, rows=pruned))


def test_no_torch() -> None:
    program = "import sys, shiva_search.cost; sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).resolve().parents[2])
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_a_host_that_cannot_keep_up_is_learned(truth: Make, plans_of: Make) -> None:
    """Blocks alone cost in proportion to tokens; in the model each costs the same, as launching takes longer."""

    class HostBound(type(truth())):  # type: ignore[misc]
        def in_model_ms(self, signature: str, k: int) -> float:
            return 9.0 + (2.0 if k < 512 else 0.0) if k else 0.01

    device = HostBound(noise=0.005)
    found = errors(device, fit_cost_model(device.profile(plans=28)), plans_of(40, 8, seed=5))
    assert np.median(np.abs(found)) < 0.02
