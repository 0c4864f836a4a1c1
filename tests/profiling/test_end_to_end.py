"""Plans measured next to the dense model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from virtual_device import VirtualDevice

from shiva_search.devices import open_device
from shiva_search.devices.base import EnergySample
from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.profiling.end_to_end import dense_cell, measure_plans, measure_settled, random_rows
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan


def test_ratios_are_those_of_the_device(tiny_model: Model) -> None:
    device = VirtualDevice(0, lambda now_s: 1 + 0.02 * now_s, noise=0.03)
    plans = [Plan.uniform(tiny_model, keep) for keep in (1.0, 0.6, 0.2)]
    found = measure_plans(tiny_model, plans, device, seconds=20, clock=device.clock)
    assert [item.tokens_kept for item in found] == [plan.tokens_kept for plan in plans]
    assert found[0].ratio == pytest.approx(1.0, abs=0.02)
    assert found[0].ratio > found[1].ratio > found[2].ratio
    for item in found:
        assert item.ratio_low <= item.ratio <= item.ratio_high
        assert item.latency_ms == pytest.approx(item.ratio * item.dense_latency_ms)
        assert item.energy_j is None and "no sensor" in item.reasons["energy_j"]
        assert item.peak_memory_mib is not None and item.dense_peak_memory_mib is not None
        assert item.gflops is not None and item.dense_gflops is not None and item.gflops <= item.dense_gflops * 1.0001


def test_energy_is_measured_where_there_is_a_sensor(tiny_model: Model) -> None:
    device = VirtualDevice(power_w=50.0)
    [found] = measure_plans(tiny_model, [Plan.uniform(tiny_model, 0.5)], device, seconds=5, clock=device.clock)
    dense_ms = device.true_ms(dense_cell(tiny_model).run)
    assert found.dense_energy_j == pytest.approx(50.0 * dense_ms / 1e3)
    assert found.energy_j is not None and found.energy_j < found.dense_energy_j
    assert "energy_j" not in found.reasons


class Warming(VirtualDevice):
    """Takes more power the longer it has run."""

    def measure_energy(self, run: Callable[[], object], min_seconds: float) -> EnergySample:
        self.power_w = 50.0 * (1 + 0.2 * self.now_s)
        return super().measure_energy(run, min_seconds)


def test_a_device_that_warms_up_does_not_make_plans_look_dear(tiny_model: Model) -> None:
    device = Warming(power_w=50.0)
    [found] = measure_plans(tiny_model, [Plan.dense(tiny_model)], device, seconds=20, clock=device.clock)
    assert device.power_w is not None and device.power_w > 60.0
    assert found.power_w == pytest.approx(found.dense_power_w, rel=1e-3)


def test_a_device_that_was_never_settled_is_measured_again_until_it_was(tiny_model: Model) -> None:
    device, said = VirtualDevice(apart=(0.0, 30.0)), list[str]()

    def measure() -> Measurement:
        [found] = measure_plans(tiny_model, [Plan.uniform(tiny_model, 0.5)], device, seconds=20, clock=device.clock)
        return found

    found = measure_settled(measure, said.append)
    assert "unsettled" not in found.flags and len(said) == 1
    device.apart = (0.0, 1e9)
    found = measure_settled(measure, said.append)
    assert "unsettled" in found.flags and len(said) == 3


def test_segments_are_averaged_over_time(tiny_model: Model) -> None:
    device = VirtualDevice()
    low, high = ([256] + [k] * 5 for k in (64, 256))
    apart = measure_plans(
        tiny_model, [Plan.from_rows(tiny_model, [row]) for row in (low, high)], device, seconds=5, clock=device.clock
    )
    [both] = measure_plans(tiny_model, [Plan.from_rows(tiny_model, [low, high])], device, seconds=5, clock=device.clock)
    assert both.ratio == pytest.approx((apart[0].ratio + apart[1].ratio) / 2, rel=1e-3)
    assert both.gflops == pytest.approx(((apart[0].gflops or 0) + (apart[1].gflops or 0)) / 2)


def test_the_real_clock_and_nothing_left_behind(tiny_model: Model) -> None:
    threads = torch.get_num_threads()
    inputs = tiny_model.example()
    with torch.no_grad():
        before = tiny_model.predict(inputs)
    [found] = measure_plans(tiny_model, [Plan.uniform(tiny_model, 0.1)], open_device("cpu"), seconds=0.5)
    assert 0.05 < found.ratio < 1.0
    assert found.samples >= 1
    assert torch.get_num_threads() == threads
    assert all("forward" not in layer.module.__dict__ for layer in tiny_model.layers)
    with torch.no_grad():
        assert torch.equal(tiny_model.predict(inputs), before)
    assert Measurement.from_dict(found.as_dict()) == found


def test_scorers_are_asked_for_by_plan(tiny_model: Model) -> None:
    asked: list[Plan] = []
    plans = [Plan.uniform(tiny_model, keep) for keep in (0.5, 0.3)]

    def scorer_for(plan: Plan) -> str:
        asked.append(plan)
        return "norm"

    device = VirtualDevice()
    measure_plans(tiny_model, plans, device, scorer_for=scorer_for, seconds=1, clock=device.clock)
    assert asked == plans


def test_no_plans_is_refused(tiny_model: Model) -> None:
    with pytest.raises(InputError, match="at least one plan"):
        measure_plans(tiny_model, [], VirtualDevice())


def test_random_rows_are_like_searched_ones() -> None:
    rows = random_rows(8, 784, 200, seed=0)
    assert all(row[0] == 784 for row in rows)
    flat = [k for row in rows for k in row[1:]]
    assert min(flat) == 0 and max(flat) == 784
    assert 0.05 < flat.count(0) / len(flat) < 0.3
    assert 0.1 < flat.count(784) / len(flat) < 0.5
    whole = [sum(k in (0, 784) for k in row[1:]) > 4 for row in rows]
    assert 0.25 < sum(whole) / len(rows) < 0.75  # as searches return them, where few layers select tokens
    means = [sum(row) / 8 / 784 for row in rows]
    assert min(means) < 0.3 and max(means) > 0.9
    assert len(set(rows)) > 195
    counts = (0, 100, 784)
    assert {k for row in random_rows(8, 784, 20, 1, counts) for k in row} == set(counts)
    assert random_rows(8, 784, 20, seed=5) == random_rows(8, 784, 20, seed=5)
