"""How close threads are: the verdicts on scripted readings, and the readings of real threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shiva_search.devices.cpu import CpuDevice
from shiva_search.devices.threads import ThreadExchange


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """Readings as scripted: the placement changes only while threads idle."""

    def __init__(self, readings_us: list[float]) -> None:
        self.readings_us, self.now_s = readings_us, 0.0

    def reading_us(self) -> float:
        return self.readings_us[0]

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if len(self.readings_us) > 1:
            self.readings_us.pop(0)

    def exchange(self) -> ThreadExchange:
        return ThreadExchange(self.reading_us, lambda: self.now_s, self.sleep)


@pytest.mark.usefixtures("threads")
def test_what_close_is_is_learnt_before_the_first_verdict() -> None:
    machine = Machine([300.0, 310.0, 75.0, 300.0, 300.0, 300.0, 300.0, 76.0])
    exchange = machine.exchange()
    assert not exchange.settle()
    assert exchange.settle(1.0)
    assert machine.now_s < 1.0


@pytest.mark.usefixtures("threads")
def test_waiting_ends_when_the_time_is_up() -> None:
    machine = Machine([75.0] + [300.0] * 1000)
    assert not machine.exchange().settle(2.0)
    assert 2.0 <= machine.now_s < 2.5


@pytest.mark.usefixtures("threads")
def test_a_machine_that_is_always_the_same_is_never_waited_for() -> None:
    machine = Machine([300.0])
    exchange = machine.exchange()
    assert exchange.settle(5.0)
    before_s = machine.now_s
    assert all(exchange.settle(5.0) for _ in range(10))
    assert machine.now_s == before_s


def test_a_single_thread_has_nobody_to_exchange_with() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = Machine([75.0, 300.0])
        assert machine.exchange().measure_us() is None
        assert machine.exchange().settle(9.0)
        assert machine.now_s == 0.0
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_real_threads_exchange_real_data() -> None:
    exchange = ThreadExchange()
    assert 1.0 < exchange.measure_us() < 1e6  # type: ignore[operator]
    one, other, _ = exchange._tables[2]
    one.copy_(torch.arange(one.numel()).view_as(one))
    exchange.measure_us()
    assert torch.equal(other, one.flip(0))


@pytest.mark.usefixtures("threads")
def test_the_cpu_tells_it_with_its_conditions() -> None:
    device = CpuDevice()
    assert device.conditions()["thread_exchange_us"] > 0
    assert device.settle() in (True, False)
