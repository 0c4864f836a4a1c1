"""How well the threads of this process are placed just now. In: torch's threads. Out: two readings, and a verdict.

A hypervisor places its virtual cores anew all the time, an operating system its threads, and ratios change with it, not
the speed alone. Seen on two virtual cores of a shared machine, for seconds to minutes at a time:

- Cores that do not share a cache hand each other data four times slower. Work cut into small pieces, as that on few
  tokens is, then takes up to half as long again, while a dense forward hardly notices: plans that select tokens took 5
  to 11 % more of the dense latency.
- Two virtual cores on one real one exchange data faster than ever, and compute at half the speed.

Threads that idle for a second or two mostly come back well placed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ROWS_PER_THREAD, _ROW = 2048, 16  # as little as torch still shares out between threads; a row is a cache line
_WORK = 256  # side of the product that is computed
_TRIES = 3  # per reading; the fastest counts
_APART, _SLOW = 2.0, 1.5  # times the best reading from which threads count as apart, and as slow
_PAUSE_S = 0.05  # idle time after which threads may have been placed anew
_PAUSES_AT_FIRST = 6  # before the first verdict, so that there is something to compare with


@dataclass(frozen=True)
class Reading:
    """How long the threads took, together.

    Attributes:
        exchange_us: to read 128 KiB each that another has just written, there and back.
        work_us: for a matrix product of 256 x 256 x 256.
    """

    exchange_us: float
    work_us: float


class Threads:
    """Reads how well torch's threads are placed, and knows the best there has been.

    Args:
        read: takes one reading; None: by torch's threads.
        clock: seconds.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        read: Callable[[], Reading] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._read, self._clock, self._sleep = read or self._by_torch, clock, sleep
        self._best: dict[int, Reading] = {}  # by number of threads
        self._learnt: set[int] = set()  # numbers of threads that have been given time to be placed well
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._factor = torch.zeros(_WORK, _WORK)

    def read(self) -> Reading | None:
        """One reading; None for a single thread."""
        threads = torch.get_num_threads()
        if threads == 1:
            return None
        found = self._read()
        best = self._best.get(threads)
        if best is None or best.work_us > _SLOW * found.work_us:  # what was seen before was two threads on one core
            self._best[threads] = found
        elif found.work_us <= _SLOW * best.work_us:
            self._best[threads] = Reading(min(found.exchange_us, best.exchange_us), min(found.work_us, best.work_us))
        return found

    def settle(self, most_s: float = 0.0) -> bool:
        """Wait until the threads are placed about as well as they have ever been.

        Args:
            most_s: how long, at most. The first time in a process takes 0.3 s in any case, to learn what well is.

        Returns:
            Whether they are.
        """
        threads = torch.get_num_threads()
        if threads == 1:
            return True
        if threads not in self._learnt:
            self._learnt.add(threads)
            for _ in range(_PAUSES_AT_FIRST):
                self.read()
                self._sleep(_PAUSE_S)
        until = self._clock() + most_s
        while not (well := self._well_placed(threads)) and self._clock() < until:
            self._sleep(_PAUSE_S)
        return well

    def _well_placed(self, threads: int) -> bool:
        found = self.read()
        assert found is not None  # there are several threads
        best = self._best[threads]
        return found.exchange_us <= _APART * best.exchange_us and found.work_us <= _SLOW * best.work_us

    def _by_torch(self) -> Reading:
        threads = torch.get_num_threads()
        if threads not in self._tables:
            rows = _ROWS_PER_THREAD * threads
            one = torch.zeros(rows, _ROW)
            # Read backwards: each thread writes its own part, and reads that of the thread opposite.
            self._tables[threads] = one, one.clone(), torch.arange(rows - 1, -1, -1)
        one, other, backwards = self._tables[threads]

        def exchange() -> None:
            torch.index_select(one, 0, backwards, out=other)
            torch.index_select(other, 0, backwards, out=one)

        with torch.no_grad():
            return Reading(_fastest_us(exchange), _fastest_us(lambda: self._factor @ self._factor))


def _fastest_us(run: Callable[[], object]) -> float:
    times_s = []
    for _ in range(_TRIES):
        begun = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - begun)
    return 1e6 * min(times_s)


THREADS = Threads()
"""One per process: what it has learnt holds for every device opened in it."""
