"""From a cumulative energy reading to joules per run.

In: a source whose reading grows in steps (a hardware counter, or power integrated by a thread) and a run to repeat.
Out: an EnergySample over a window that starts and ends at an update of the source, so that how stale a reading is
cancels out. A source that stands still, resets or fails gives None with the reason, never 0.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from ..errors import UnavailableError
from .base import EnergySample, Run

_STEADY_POLLS = 5  # without a change of the runs per poll


class SensorError(UnavailableError):
    """A sensor is missing, refuses, or answers with what cannot be true."""


class EnergySource(Protocol):
    """A cumulative energy reading that grows in steps.

    Attributes:
        name: for reports, "RAPL packages".
        slowest_update_s: a source that stands still for longer has stopped.
        settle_s: how long a load must last before the reading follows it.
    """

    name: str
    slowest_update_s: float
    settle_s: float

    def window(self) -> AbstractContextManager[object]:
        """Must be open while the source is read."""
        ...

    def read_j(self) -> float:
        """Joules since some start.

        Raises:
            SensorError: there is no reading, or it went backwards.
        """
        ...


class _Reading(NamedTuple):
    """The state at the moment an update of the source was noticed."""

    seconds: float
    joules: float
    runs: int


class _Pace:
    """How many runs there are between two readings: enough that reading is rare and that a device never waits for it.

    A reading can take longer than a run (milliseconds with NVML). A device with a queue works on meanwhile, if there
    is enough in the queue: then what was queued before is still being waited for afterwards.

    Attributes:
        runs: between two readings; only ever grows.
    """

    def __init__(self, poll_s: float, has_queue: bool) -> None:
        self.runs = 1
        self._poll_s = poll_s
        self._has_queue = has_queue
        self._unchanged = 0

    @property
    def steady(self) -> bool:
        """Whether the count has stayed the same for a while: one that changes shifts the two ends of a window."""
        return self._unchanged >= _STEADY_POLLS

    def see(self, queueing_s: float, waiting_s: float, reading_s: float) -> None:
        """What the last poll spent its time on."""
        too_often = queueing_s + waiting_s + reading_s < self._poll_s
        # A host that takes long to queue is the one that is busy; more runs do not change that.
        idled = self._has_queue and waiting_s < reading_s and queueing_s < max(self._poll_s, 2 * reading_s)
        self._unchanged = 0 if too_often or idled else self._unchanged + 1
        self.runs *= 2 if too_often or idled else 1


class EnergyMeter:
    """Repeats a run and reads an energy source in between.

    Args:
        source: what is read.
        synchronize: waits for the device, so that a reading covers the runs counted and no others.
        min_ticks: updates of the source in a window, at least. The error of a window is at most about one in min_ticks,
            since each end is known to within the time between two polls.
        poll_s: time between two polls: short against the source's updates, long against waiting for the device.
        idle_s: length of the idle window, taken once before the first measurement; 0 leaves it out.
        mark: for a device with a queue: remembers what is queued by now, and returns what waits for it. Then the next
            runs are queued before the source is read: reading takes NVML milliseconds, in which the device would idle.
    """

    def __init__(
        self,
        source: EnergySource,
        synchronize: Callable[[], None],
        min_ticks: int = 10,
        poll_s: float = 0.01,
        idle_s: float = 1.0,
        mark: Callable[[], Callable[[], object]] | None = None,
    ) -> None:
        self.source = source
        self._synchronize = synchronize
        self._min_ticks = min_ticks
        self._poll_s = poll_s
        self._idle_s = idle_s
        self._mark = mark
        self._idle: EnergySample | None = None

    def measure(self, run: Run, min_seconds: float) -> EnergySample:
        """Joules of one run, from a window of at least `min_seconds` and `min_ticks` updates."""
        if self._idle is None and self._idle_s > 0:
            self._synchronize()
            # Floored so that a poll interval of 0 does not turn idling into a busy loop.
            self._idle = self._sample(lambda: time.sleep(max(self._poll_s, 1e-3)), self._idle_s)
        idle_power_w = None if self._idle is None else self._idle.power_w
        return replace(self._sample(run, min_seconds), idle_power_w=idle_power_w)

    def _sample(self, run: Run, min_seconds: float) -> EnergySample:
        try:
            with self.source.window():
                self._settle(run)
                return self._window(run, min_seconds)
        except SensorError as error:
            return EnergySample.missing(str(error))

    def _settle(self, run: Run) -> None:
        until = time.perf_counter() + self.source.settle_s
        while time.perf_counter() < until:
            run()
            self._synchronize()

    def _window(self, run: Run, min_seconds: float) -> EnergySample:
        # Long enough for min_ticks of the slowest source; beyond it the source is judged by what it gave.
        limit_s = min_seconds + self._min_ticks * self.source.slowest_update_s
        begun = time.perf_counter()
        last = _Reading(begun, self.source.read_j(), 0)
        edges: list[_Reading] = []
        polls = 0  # since the first edge
        pace = _Pace(self._poll_s, has_queue=self._mark is not None)
        # With a queue, readings find the device at the start of the runs queued last: a window holds whole ones.
        queued = deque([] if self._mark is None else [(self._queue(run, 1), 1)])
        while True:
            since = time.perf_counter()
            queued.append((self._queue(run, pace.runs), pace.runs))
            queueing_s = time.perf_counter() - since
            wait, runs = queued.popleft()
            wait()
            now_s = time.perf_counter()
            now = _Reading(now_s, self.source.read_j(), last.runs + runs)
            polls += bool(edges)
            if pace.steady and now.joules != last.joules:
                edges.append(now)
            if not edges:
                pace.see(queueing_s, now_s - since - queueing_s, time.perf_counter() - now_s)
            last = now
            if not pace.steady:
                begun = now.seconds
            origin_s = edges[0].seconds if edges else begun
            if len(edges) > self._min_ticks and edges[-1].seconds - origin_s >= min_seconds:
                break
            if now.seconds - origin_s >= limit_s:
                break
        self._synchronize()
        return self._judged(edges, polls, min_seconds, begun, last)

    def _queue(self, run: Run, count: int) -> Callable[[], object]:
        """Queues runs; what waits for them."""
        for _ in range(count):
            run()
        return self._synchronize if self._mark is None else self._mark()

    def _judged(
        self, edges: list[_Reading], polls: int, min_seconds: float, begun_s: float, last: _Reading
    ) -> EnergySample:
        alive_s = edges[-1].seconds - edges[0].seconds if edges else 0.0
        ticks = max(0, len(edges) - 1)
        if ticks == 0 or alive_s < min_seconds:
            still_s = last.seconds - (edges[-1].seconds if edges else begun_s)
            return EnergySample.missing(
                f"{self.source.name} stood still for {still_s:.2f} s under load, so its reading is stale. "
                "Check the sensor with the vendor's tool, or leave energy out of the budget.",
                last.runs,
                ticks,
                last.seconds - begun_s,
            )
        runs = edges[-1].runs - edges[0].runs
        # Runs longer than the update period see an update at every poll: fewer ticks, but none was waited for in vain.
        if ticks < min(self._min_ticks, polls):
            return EnergySample.missing(
                f"{self.source.name} needs {self._min_ticks} updates in a window and gave {ticks} in {alive_s:.2f} s. "
                "Measure for longer, or leave energy out of the budget.",
                runs,
                ticks,
                alive_s,
            )
        energy_j = edges[-1].joules - edges[0].joules
        return EnergySample(energy_j / runs, energy_j / alive_s, runs, ticks, alive_s, None, None)


@dataclass
class CounterSource:
    """A hardware counter that only grows.

    Args:
        name: for reports.
        counter_j: reads the counter, in joules.
        slowest_update_s: a counter that stands still for longer has stopped.
    """

    name: str
    counter_j: Callable[[], float]
    slowest_update_s: float
    settle_s: float = 0.0
    _last_j: float | None = field(default=None, init=False)

    def window(self) -> AbstractContextManager[object]:
        """A counter runs by itself; a window only forgets the reading before it."""
        self._last_j = None
        return nullcontext()

    def read_j(self) -> float:
        """Joules since the counter started.

        Raises:
            SensorError: the counter went backwards.
        """
        now_j = self.counter_j()
        if self._last_j is not None and now_j < self._last_j:
            raise SensorError(
                f"{self.name} went backwards, from {self._last_j:.3f} J to {now_j:.3f} J: it wrapped or was reset. "
                "Measure again."
            )
        self._last_j = now_j
        return now_j


class IntegratedPower:
    """Power readings, integrated by a thread: for devices without an energy counter.

    Each reading holds until the next one differs, and the integral advances only then, so a reading that is stuck shows
    as an energy that stands still.

    Args:
        name: for reports.
        power_w: reads the power, in watts.
        interval_s: time between two readings, shorter than the sensor's update period.
        settle_s: length of the sensor's own averaging.
        slowest_update_s: a reading that stays the same for longer is stuck.
    """

    def __init__(
        self,
        name: str,
        power_w: Callable[[], float],
        interval_s: float = 0.005,
        settle_s: float = 1.0,
        slowest_update_s: float = 0.2,
    ) -> None:
        self.name = name
        self.settle_s = settle_s
        self.slowest_update_s = slowest_update_s
        self._power_w = power_w
        self._interval_s = interval_s
        self._energy_j = 0.0
        self._error: SensorError | None = None

    def window(self) -> AbstractContextManager[object]:
        """Runs the sampling thread until the window closes."""
        self._energy_j, self._error = 0.0, None
        return _Sampling(self._integrate)

    def read_j(self) -> float:
        """Joules up to the last change of the reading.

        Raises:
            SensorError: a reading failed.
        """
        if self._error is not None:
            raise self._error
        return self._energy_j

    def _integrate(self, stop: threading.Event) -> None:
        try:
            then, before_w = time.perf_counter(), self._power_w()
            while not stop.wait(self._interval_s):
                now, now_w = time.perf_counter(), self._power_w()
                if now_w != before_w:
                    self._energy_j += before_w * (now - then)
                    then, before_w = now, now_w
        except SensorError as error:
            self._error = error


class _Sampling:
    """A thread that lives as long as its `with` block."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=work, args=(self._stop,), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
