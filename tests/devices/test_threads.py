"""How close threads are: the verdicts on scripted readings, and the readings of real threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shiva_search.devices.cpu import CpuDevice
from shiva_search.devices.threads import Reading, Threads


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """Readings as scripted: the placement changes only while threads idle."""

    def __init__(self, *readings: Reading) -> None:
        self.readings, self.now_s = list(readings), 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if len(self.readings) > 1:
            self.readings.pop(0)

    def threads(self) -> Threads:
        return Threads(lambda: self.readings[0], lambda: self.now_s, self.sleep)


CLOSE, APART, ONE_CORE = Reading(75.0, 180.0), Reading(304.0, 185.0), Reading(40.0, 340.0)


@pytest.mark.usefixtures("threads")
def test_what_well_placed_is_is_learnt_before_the_first_verdict() -> None:
    machine = Machine(APART, APART, CLOSE, APART, APART, APART, APART, CLOSE)
    threads = machine.threads()
    assert threads.read() == APART  # as a round's conditions do; that is not enough to compare with
    assert not threads.settle()
    assert threads.settle(1.0)
    assert machine.now_s < 1.0


@pytest.mark.usefixtures("threads")
def test_two_threads_on_one_core_are_not_close_but_slow() -> None:
    machine = Machine(*[ONE_CORE] * 3, CLOSE, *[ONE_CORE] * 4, CLOSE)
    threads = machine.threads()
    assert not threads.settle()
    assert threads.settle(1.0)
    machine.readings = [APART]
    assert not threads.settle()


@pytest.mark.usefixtures("threads")
def test_waiting_ends_when_the_time_is_up() -> None:
    machine = Machine(CLOSE, *[APART] * 1000)
    assert not machine.threads().settle(2.0)
    assert 2.0 <= machine.now_s < 2.5


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("always", [CLOSE, APART, ONE_CORE])
def test_a_machine_that_is_always_the_same_is_never_waited_for(always: Reading) -> None:
    machine = Machine(always)
    threads = machine.threads()
    assert threads.settle(5.0)
    before_s = machine.now_s
    assert all(threads.settle(5.0) for _ in range(10))
    assert machine.now_s == before_s


def test_a_single_thread_has_nobody_to_exchange_with() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = Machine(CLOSE, APART)
        assert machine.threads().read() is None
        assert machine.threads().settle(9.0)
        assert machine.now_s == 0.0
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_real_threads_exchange_real_data() -> None:
    threads = Threads()
    found = threads.read()
    assert found is not None
    assert 1.0 < found.exchange_us < 1e6
    assert 1.0 < found.work_us < 1e6
    one, other, _ = threads._tables[2]
    one.copy_(torch.arange(one.numel()).view_as(one))
    threads.read()
    assert torch.equal(other, one.flip(0))


@pytest.mark.usefixtures("threads")
def test_the_cpu_tells_it_with_its_conditions() -> None:
    device = CpuDevice()
    assert device.conditions()["thread_exchange_us"] > 0
    assert device.conditions()["thread_work_us"] > 0
    assert device.settle() in (True, False)
