"""The meter on sources whose every joule is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiva_search.devices.energy import CounterSource, EnergyMeter, IntegratedPower, SensorError


def no_wait() -> None: ...


class Work:
    """Energy that each run adds, told in steps of a quantum."""

    def __init__(self, run_j: float, quantum_j: float) -> None:
        self.run_j = run_j
        self.quantum_j = quantum_j
        self.spent_j = 0.0

    def run(self) -> None:
        self.spent_j += self.run_j

    def told_j(self) -> float:
        return self.spent_j // self.quantum_j * self.quantum_j

    def source(self, slowest_update_s: float = 0.2) -> CounterSource:
        return CounterSource("test counter", self.told_j, slowest_update_s)


@given(run_j=st.floats(0.01, 10), quantum_j=st.floats(0.01, 10), start_j=st.floats(0, 100), ticks=st.integers(5, 20))
def test_error_is_at_most_one_step_of_the_counter(run_j: float, quantum_j: float, start_j: float, ticks: int) -> None:
    work = Work(run_j, quantum_j)
    work.spent_j = start_j
    sample = EnergyMeter(work.source(), no_wait, min_ticks=ticks, poll_s=0, idle_s=0).measure(work.run, 0.0)
    assert sample.energy_j_per_run is not None and sample.reason is None
    assert sample.ticks == ticks
    assert abs(sample.energy_j_per_run - run_j) * sample.runs <= quantum_j * (1 + 1e-6)


def test_readings_cover_finished_runs_only() -> None:
    """Work that only the wait carries out, as a GPU's queue does."""
    work = Work(run_j=2.0, quantum_j=1.0)
    queued = 0

    def queue() -> None:
        nonlocal queued
        queued += 1

    def finish() -> None:
        nonlocal queued
        while queued:
            work.run()
            queued -= 1

    sample = EnergyMeter(work.source(), finish, poll_s=0.001, idle_s=0).measure(queue, 0.02)
    assert sample.energy_j_per_run == pytest.approx(2.0)


class Queueing:
    """A device with a queue, 500 W at work and 100 W idle, whose counter takes long to read; its clock is its own."""

    read_s, tick_s = 0.004, 0.1

    def __init__(self, run_s: float) -> None:
        self.run_s = run_s
        self.now_s = 0.0
        self.busy: list[list[float]] = [[0.0, 0.0]]  # stretches of work, from and to

    def queue(self) -> None:
        self.now_s += 1e-5
        if self.busy[-1][1] < self.now_s:
            self.busy.append([self.now_s, self.now_s])
        self.busy[-1][1] += self.run_s

    def mark(self) -> Callable[[], None]:
        queued_s = self.busy[-1][1]

        def wait() -> None:
            self.now_s = max(self.now_s, queued_s)

        return wait

    def finish(self) -> None:
        self.now_s = max(self.now_s, self.busy[-1][1])

    def read_j(self) -> float:
        self.now_s += self.read_s
        told_s = self.now_s // self.tick_s * self.tick_s
        worked_s = sum(max(0.0, min(end, told_s) - begin) for begin, end in self.busy)
        return 100 * told_s + 400 * worked_s


@pytest.mark.parametrize("run_s", [1e-4, 1e-3, 2e-3, 2e-2])
def test_a_slow_reading_does_not_idle_a_device_with_a_queue(run_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Queueing(run_s)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)

    def measured_w(mark: Callable[[], Callable[[], None]] | None) -> float:
        source = CounterSource("test counter", device.read_j, 0.2)
        sample = EnergyMeter(source, device.finish, idle_s=0, mark=mark).measure(device.queue, 1.0)
        assert sample.power_w is not None and sample.energy_j_per_run is not None
        if mark is not None:
            assert sample.energy_j_per_run == pytest.approx(500 * run_s, rel=0.03)
        return sample.power_w

    assert measured_w(device.mark) == pytest.approx(500, rel=0.03)
    assert measured_w(None) < 450  # what waiting for each reading would give


def test_long_runs_need_fewer_updates() -> None:
    """A run of 40 ms on a counter that updates every millisecond: an update at each poll, none missed."""
    work = Work(run_j=8.0, quantum_j=0.2)

    def run() -> None:
        time.sleep(0.04)
        work.run()

    source = work.source(slowest_update_s=0.002)
    sample = EnergyMeter(source, no_wait, min_ticks=50, idle_s=0).measure(run, 0.05)
    assert sample.energy_j_per_run == pytest.approx(8.0)
    assert sample.ticks == sample.runs < 50
    assert sample.seconds >= 0.05


def test_short_runs_are_polled_in_batches() -> None:
    work = Work(run_j=2**-10, quantum_j=2**-11)
    polls = 0

    def count() -> None:
        nonlocal polls
        polls += 1

    sample = EnergyMeter(work.source(), count, poll_s=0.005, idle_s=0).measure(work.run, 0.1)
    assert sample.energy_j_per_run == 2**-10
    assert sample.runs > 20 * polls


def test_idle_power_is_measured_once_and_without_the_run() -> None:
    begun = time.perf_counter()
    source = CounterSource("clock", lambda: 50.0 * (time.perf_counter() - begun), 0.2)
    meter = EnergyMeter(source, no_wait, min_ticks=3, poll_s=0.002, idle_s=0.1)
    started = time.perf_counter()
    first = meter.measure(lambda: time.sleep(0.001), 0.02)
    assert time.perf_counter() - started >= 0.1
    second = meter.measure(lambda: time.sleep(0.001), 0.02)
    assert first.idle_power_w == second.idle_power_w == pytest.approx(50, rel=0.1)
    assert first.power_w == pytest.approx(50, rel=0.1)


def test_an_error_of_the_run_is_the_callers_and_leaves_no_thread() -> None:
    def run() -> None:
        raise ZeroDivisionError

    before = threading.active_count()
    source = IntegratedPower("power", lambda: 1.0, settle_s=0)
    with pytest.raises(ZeroDivisionError):
        EnergyMeter(source, no_wait, idle_s=0).measure(run, 0.0)
    assert threading.active_count() == before


def test_power_counts_for_as_long_as_it_is_shown() -> None:
    begun = time.perf_counter()

    def power_w() -> float:
        return 300.0 if (time.perf_counter() - begun) % 0.04 < 0.03 else 100.0

    source = IntegratedPower("three to one", power_w, interval_s=0.001, settle_s=0)
    sample = EnergyMeter(source, no_wait, poll_s=0, idle_s=0).measure(lambda: time.sleep(0.001), 0.5)
    assert sample.power_w == pytest.approx(250, rel=0.1)


def test_a_failing_sensor_is_a_reason_and_no_error() -> None:
    def broken() -> float:
        raise SensorError("the sensor is on fire. Put it out.")

    for source in (CounterSource("broken", broken, 0.2), IntegratedPower("broken", broken, settle_s=0)):
        sample = EnergyMeter(source, no_wait, idle_s=0).measure(lambda: time.sleep(0.001), 0.0)
        assert (sample.energy_j_per_run, sample.power_w) == (None, None)
        assert sample.reason == "the sensor is on fire. Put it out."
