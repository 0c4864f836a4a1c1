"""Profiles of a real model on a device whose true costs are known."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from virtual_device import VirtualDevice, small_dit

from shiva_search.cost import fit_cost_model
from shiva_search.devices import open_device
from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.model import Model
from shiva_search.profiling.bench import Bench
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.drift import Drift, check_drift
from shiva_search.profiling.end_to_end import dense_cell, measure_plans, plan_cell, random_rows
from shiva_search.records.plan import Plan, row_as_json
from shiva_search.records.profile import Profile, Sample, load_profile
from shiva_search.runtime.apply import remove_plan
from shiva_search.runtime.scorers import Norm
from tests.processes import start, wait_until
from tests.profiling.killed import SECONDS, run


def drifting(now_s: float) -> float:
    """Up to 30 % slower and back within 20 seconds, with a lasting step at 15."""
    return (1.15 + 0.15 * math.sin(now_s / 20 * 2 * math.pi)) * (1.2 if now_s > 15 else 1.0)


def machine(seed: int = 0, **options: object) -> VirtualDevice:
    return VirtualDevice(seed, **{"speed": drifting, "noise": 0.04, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def profiled(tiny_model: Model) -> tuple[VirtualDevice, Profile]:
    device = machine()
    return device, profile_model(tiny_model, device, seconds=40, clock=device.clock)


def true_shares(model: Model, device: VirtualDevice, rows: list[tuple[int, ...]]) -> np.ndarray:
    shares = []
    for row in rows:
        cell = plan_cell(model, Plan.from_rows(model, [row], workload=model.workload.as_dict()), "stride", "held out")
        assert cell.prepare is not None
        cell.prepare()
        shares.append(device.true_ms(cell.run))
        remove_plan(model.module)
    return np.array(shares) / device.true_ms(dense_cell(model).run)


def test_held_out_plans_are_predicted_within_the_bound(
    tiny_model: Model, profiled: tuple[VirtualDevice, Profile]
) -> None:
    device, profile = profiled
    cost = fit_cost_model(profile)
    rows = random_rows(tiny_model.layer_count, tiny_model.tokens, 40, seed=99)
    true = true_shares(tiny_model, device, rows)
    predicted = np.array([cost.predict(Plan.from_rows(tiny_model, [row])).latency_ms for row in rows])
    errors = predicted / cost.dense.latency_ms / true - 1
    assert np.median(np.abs(errors)) < 0.01
    assert np.quantile(np.abs(errors), 0.95) < 0.03
    assert abs(errors.mean()) < 0.01


def test_selection_is_inside_every_pruned_cell(profiled: tuple[VirtualDevice, Profile]) -> None:
    _, profile = profiled
    for row in profile.rows:
        if row.tokens_kept in (0, profile.tokens):
            assert row.selection_ms == 0.0
        elif row.selection_ms is not None:
            assert 0.2 * row.selection_ms < row.latency_ms
    nearly_all, dense = profile.curve(profile.layers[0])[-2:]
    assert nearly_all.latency_ms > dense.latency_ms  # the dense block selects nothing


def test_a_dearer_scorer_makes_dearer_rows(tiny_model: Model) -> None:
    class Dear(Norm):
        def __call__(self, x_BND, t_B, condition_BC, layer):  # type: ignore[no-untyped-def]
            for _ in range(20):
                x_BND = x_BND + 1
            return super().__call__(x_BND, t_B, condition_BC, layer)

    def half(scorer: Norm) -> float:
        device = VirtualDevice()
        profile = profile_model(tiny_model, device, scorer=scorer, seconds=4, counts=[128], plans=1, clock=device.clock)
        return next(row.ratio for row in profile.rows if row.tokens_kept == 128)

    assert half(Dear()) > half(Norm()) + 0.05


def test_blocks_of_a_signature_take_turns(tiny_model: Model) -> None:
    bench = Bench(tiny_model, VirtualDevice(), Norm(), 0, [128])
    bench.prepare([], None)
    used: list[int] = []
    handles = [
        layer.module.register_forward_pre_hook(lambda *_, index=layer.index: used.append(index))
        for layer in tiny_model.layers
    ]
    forwards = [
        layer.module.ff.register_forward_pre_hook(lambda *_, i=layer.index: used.append(i))
        for layer in tiny_model.layers
    ]
    with torch.no_grad():
        for _ in range(7):
            bench.sampler.groups["blocks"].reference.run()
    for handle in [*handles, *forwards]:
        handle.remove()
    assert used == [0, 1, 2, 3, 4, 5, 0]


def test_steps_are_found_and_not_smoothed(tiny_model: Model) -> None:
    device = machine(tile=64, noise=0.02)
    profile = profile_model(tiny_model, device, seconds=120, clock=device.clock)
    cost = fit_cost_model(profile)
    found = set(profile.provenance["edges"][profile.layers[0]])
    assert {64, 128, 192} <= found
    assert {64, 128} <= set(cost.candidates())  # 192 costs what all do, once its selection is paid
    for edge in (64, 128, 192):
        here, behind = (cost.layer_cost("latency_ms", 1, k) for k in (edge, edge + 1))
        before = cost.layer_cost("latency_ms", 1, edge - 1)
        assert here is not None and behind is not None and before is not None
        assert behind - here > 5 * abs(here - before)


def test_missing_energy_is_empty_with_a_reason_and_given_energy_adds_up(
    tiny_model: Model, profiled: tuple[VirtualDevice, Profile]
) -> None:
    _, without = profiled
    assert all(row.energy_j is None and row.power_w is None for row in without.rows)
    assert "no sensor" in without.missing["energy_j"]
    assert fit_cost_model(without).dense.energy_j is None
    device = VirtualDevice(power_w=100.0)
    cost = fit_cost_model(profile_model(tiny_model, device, seconds=10, plans=6, clock=device.clock))
    half = cost.predict(Plan.uniform(tiny_model, 0.5))
    assert cost.dense.energy_j == pytest.approx(0.1 * device.true_ms(dense_cell(tiny_model).run), rel=0.01)
    assert half.power_w == pytest.approx(100.0, rel=0.05)


def test_a_complete_profile_is_returned_and_a_foreign_one_refused(tiny_model: Model, tmp_path: Path) -> None:
    device = VirtualDevice()
    first = profile_model(tiny_model, device, seconds=2, plans=2, counts=[128], folder=tmp_path, clock=device.clock)
    runs = device.runs
    again = profile_model(tiny_model, device, seconds=2, folder=tmp_path, clock=device.clock)
    assert device.runs == runs
    assert again.rows == first.rows
    assert again == load_profile(tmp_path)
    other = small_dit(layers=2)
    with pytest.raises(InputError, match="config_hash"):
        profile_model(other, device, seconds=2, folder=tmp_path, clock=device.clock)
    anew = profile_model(
        tiny_model, device, seconds=2, plans=2, counts=[64], folder=tmp_path, resume=False, clock=device.clock
    )
    assert device.runs > runs
    assert [row.tokens_kept for row in anew.rows if row.attend == "kept"] == [0, 64, 256]


def test_a_profile_past_its_time_says_what_it_waits_for(tiny_model: Model) -> None:
    device, said = machine(speed=lambda now_s: 100.0), []
    profile_model(tiny_model, device, seconds=1.5, clock=device.clock, progress=said.append)
    over = [line for line in said if line.startswith("the 1.5 s asked for are over")]
    left = [re.search(r"(\d+) of (\d+) to go", line) for line in over]
    assert any(left) and all(0 < int(found[1]) < int(found[2]) for found in left if found)
    assert all(found or line.endswith("every cell has a sample now") for line, found in zip(over, left, strict=True))
    for line in said:
        counted = re.match(r"(\d+) of (\d+) s", line)
        assert counted is None or int(counted[1]) <= int(counted[2]), line


def test_an_interrupted_profile_goes_on_where_it_stopped(tiny_model: Model, tmp_path: Path) -> None:
    class Stops(VirtualDevice):
        def time_ms(self, run, repeats=1):  # type: ignore[no-untyped-def]
            if self.now_s > 3.0:
                raise KeyboardInterrupt
            return super().time_ms(run, repeats)

    device = Stops(noise=0.2)
    options = {"seconds": 8.0, "plans": 4, "counts": [64, 128], "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        profile_model(tiny_model, device, clock=device.clock, **options)  # type: ignore[arg-type]
    assert all("forward" not in layer.module.__dict__ for layer in tiny_model.layers)
    cut = load_profile(tmp_path)
    assert not cut.complete
    assert cut.rows and cut.samples
    second = VirtualDevice(1, noise=0.2)
    whole = profile_model(tiny_model, second, clock=second.clock, **options)  # type: ignore[arg-type]
    assert whole.complete
    assert whole.samples[: len(cut.samples)] == cut.samples
    assert second.now_s < 7.0
    assert [row_as_json(item.tokens_kept) for item in whole.forwards] == cut.provenance["plans"]


def test_finished_cells_are_not_measured_again(tiny_model: Model, tmp_path: Path) -> None:
    class Stops(VirtualDevice):
        def time_ms(self, run, repeats=1):  # type: ignore[no-untyped-def]
            if self.now_s > 6.5:  # the blocks are done by then, plans are not
                raise KeyboardInterrupt
            return super().time_ms(run, repeats)

    stops = Stops(speed=lambda now_s: 20.0, noise=0.001)
    options = {"seconds": 60.0, "plans": 4, "counts": [64, 128, 192], "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        profile_model(tiny_model, stops, clock=stops.clock, **options)  # type: ignore[arg-type]
    cut = load_profile(tmp_path)
    before = Counter(sample.cell for sample in cut.samples)
    done = {cell for cell, count in before.items() if count >= 8}  # on so steady a machine the least number will do
    assert done
    second = VirtualDevice(1, speed=lambda now_s: 20.0, noise=0.001)
    whole = profile_model(tiny_model, second, clock=second.clock, **options)  # type: ignore[arg-type]
    after = Counter(sample.cell for sample in whole.samples)
    assert {cell: after[cell] for cell in done} == {cell: before[cell] for cell in done}
    assert set(after) - done and all(after[cell] >= 8 for cell in after)


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_profile_that_loads(tmp_path: Path) -> None:
    """Killed at ten moments from the first file to the last, each time going on with what was there."""
    known: tuple[Sample, ...] = ()
    process = start(run, str(tmp_path))
    wait_until((tmp_path / "profile.json").exists, process)
    for moment in range(10):
        time.sleep(0.05 + 0.11 * moment)
        process.kill()
        process.join()
        cut = load_profile(tmp_path)
        assert cut.samples[: len(known)] == known
        known = cut.samples
        process = start(run, str(tmp_path))
    process.join(60)
    assert process.exitcode == 0
    whole = load_profile(tmp_path)
    assert whole.complete
    assert whole.samples[: len(known)] == known
    assert whole.provenance["seconds"] < SECONDS + 3  # time before a kill counts
    assert run(str(tmp_path)) == whole


def test_a_model_of_shapes_is_profiled_one_block_at_a_time() -> None:
    model = small_dit(device="meta")
    device = VirtualDevice()
    profile = profile_model(model, device, seconds=5, clock=device.clock)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert profile.forwards == ()
    assert "never whole" in profile.missing["forwards"]
    cost = fit_cost_model(profile)
    real = small_dit()
    true_ms = device.true_ms(dense_cell(real).run)
    assert cost.dense.latency_ms == pytest.approx(true_ms, rel=0.03)
    assert cost.interval > 0.1 and "reason" in cost.held_out
    with pytest.raises(InputError, match="only as shapes"):
        measure_plans(model, [Plan.dense(model)], device)


def test_a_recording_answers_in_place_of_a_device(
    tiny_model: Model, profiled: tuple[VirtualDevice, Profile], tmp_path: Path
) -> None:
    _, profile = profiled
    profile.save(tmp_path)
    cost = fit_cost_model(profile)
    cost.save(tmp_path)
    device = open_device(f"replay:{tmp_path}")
    assert profile_model(tiny_model, device) == profile
    plan = Plan.uniform(tiny_model, 0.5)
    [measured] = measure_plans(tiny_model, [plan], device)
    assert measured.replayed
    assert measured.latency_ms == cost.predict(plan).latency_ms
    with pytest.raises(UnavailableError, match="recording"):
        device.time_ms(lambda: None)
    with pytest.raises(InputError, match="config_hash"):
        profile_model(small_dit(layers=2), device)


def test_drift_is_told_from_change(tiny_model: Model, profiled: tuple[VirtualDevice, Profile]) -> None:
    _, profile = profiled
    level = profile.dense["latency_ms"]
    assert level is not None
    nominal = level / VirtualDevice().true_ms(dense_cell(tiny_model).run)
    same = VirtualDevice(3, lambda now_s: nominal, noise=0.02)
    assert check_drift(tiny_model, profile, same, clock=same.clock).verdict == "same"
    slow = VirtualDevice(3, lambda now_s: 1.5 * nominal, noise=0.02)
    drift = check_drift(tiny_model, profile, slow, clock=slow.clock)
    assert drift.verdict == "rescale"
    assert drift.scale == pytest.approx(1.5, rel=0.05)
    assert fit_cost_model(drift.profile).dense.latency_ms == pytest.approx(1.5 * level, rel=0.05)
    other = VirtualDevice(3, lambda now_s: nominal, noise=0.02, tile=128)
    drift = check_drift(tiny_model, profile, other, clock=other.clock)
    assert drift.verdict == "profile again"
    assert "profile" in drift.describe()


def test_a_large_change_that_passes_is_said_to_be_within_the_intervals(profiled: tuple[VirtualDevice, Profile]) -> None:
    found = Drift("same", 1.01, 1.0, 1.02, {"block": -0.28}, profiled[1], 6.0)
    allowed = ", no more than the intervals of both measurements allow: the profile holds"
    assert f"-28.0% (block){allowed}" in found.describe()
    assert "allow" not in replace(found, changes={"block": -0.04}).describe()
    assert "allow" not in replace(found, verdict="profile again").describe()
