"""The CPU as a device: a nanosecond clock, RAPL where it may be read, and the allocator's own account of memory.

In: callables that run on the CPU. Out: the answers of the Device protocol.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from .base import MIB, EnergySample, Run, SensorReport, check_repeats, no_graphs
from .energy import EnergyMeter, SensorError
from .host import describe_host, garbage_kept, host_conditions, keep_freed_memory
from .rapl import POWERCAP, RaplPackages
from .threads import THREADS


class CpuDevice:
    """The processor this program runs on. Memory that is freed stays with the process from now on (keep_freed_memory).

    Args:
        powercap: the folder RAPL is read from.
        idle_s: length of the idle window before the first energy measurement, in seconds.
    """

    def __init__(self, powercap: Path = POWERCAP, idle_s: float = 1.0) -> None:
        self.name = "cpu"
        self._keeps_memory = keep_freed_memory()
        self.torch_device = torch.device("cpu")
        self._meter: EnergyMeter | None = None
        self._no_energy: str | None = None
        try:
            self._meter = EnergyMeter(RaplPackages(powercap).source(), self.synchronize, idle_s=idle_s)
        except SensorError as error:
            self._no_energy = str(error)

    def describe(self) -> dict[str, Any]:
        """Processor, kernel, cores, memory, clocks and versions, and whether the process keeps memory it freed."""
        return {"name": self.name, **describe_host(), "keeps_freed_memory": self._keeps_memory}

    def synchronize(self) -> None:
        """Returns at once: a CPU has finished when the call returns."""

    def time_ms(self, run: Run, repeats: int = 1) -> float:
        """Milliseconds per repeat by the monotonic clock, with the garbage collector held back."""
        check_repeats(repeats)
        with garbage_kept():
            begun_ns = time.perf_counter_ns()
            for _ in range(repeats):
                run()
            ended_ns = time.perf_counter_ns()
        return (ended_ns - begun_ns) / repeats * 1e-6

    def settle(self, most_s: float = 0.0) -> bool:
        """Waits until the threads are placed well (devices/threads.py)."""
        return THREADS.settle(most_s)

    def capture(self, run: Run) -> Run:
        """Refuses: there are no graphs.

        Raises:
            UnavailableError: always.
        """
        raise no_graphs(self.name)

    def peak_memory_mib(self, run: Run) -> float:
        """The highest sum of torch's own allocations and releases during one run, in MiB.

        Exact for what goes through torch's CPU allocator. Scratch memory a library takes elsewhere (oneDNN) is not in
        it, nor what threads of the run's own making allocate; and releasing a tensor from before the run does not count
        as room gained.
        """
        with garbage_kept(), _quiet_profiler(), profile(profile_memory=True) as trace:
            run()
        assert trace.kineto_results is not None  # set when the profiler stops
        memory = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
        # Threads report in blocks of their own; only the clock puts them in order.
        steps = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
        return max(accumulate(steps, initial=0)) / MIB

    def measure_energy(self, run: Run, min_seconds: float) -> EnergySample:
        """Joules of all CPU packages per run; nothing runs where they cannot be read."""
        if self._meter is None:
            return EnergySample.missing(self._no_energy or "no energy sensor")
        return self._meter.measure(run, min_seconds)

    def conditions(self) -> dict[str, Any]:
        """Load, context switches, stolen time, and how long the threads take to exchange data and to compute."""
        found = THREADS.read()
        placed = {} if found is None else {"thread_exchange_us": found.exchange_us, "thread_work_us": found.work_us}
        return {**host_conditions(), **placed}

    def sensors(self) -> list[SensorReport]:
        """The clock, the allocator, and RAPL with what is missing to use it."""
        clock = time.get_clock_info("perf_counter")
        how = self._no_energy or "sum of all packages, other processes included"
        return [
            SensorReport("perf_counter", "latency_ms", True, f"{clock.implementation}, {clock.resolution:g} s"),
            SensorReport("RAPL packages", "energy_j", self._meter is not None, how),
            SensorReport("RAPL packages", "power_w", self._meter is not None, how),
            SensorReport("torch allocator", "peak_memory_mib", True, "allocations and releases seen by torch.profiler"),
        ]


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    # The profiler's library writes a line to stderr at each start and stop. It reads its verbosity when first used,
    # so the variable is needed only around that; a user's own setting stays.
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]
