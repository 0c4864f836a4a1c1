"""How near to each other the threads of this process run just now. In: torch's threads. Out: microseconds, a verdict.

A hypervisor places its virtual cores anew all the time, an operating system its threads. Cores that share a cache hand
each other data several times faster than cores that do not, and then work that is cut into small pieces, as that on few
tokens is, takes up to half as long again, while a dense forward hardly notices: ratios change, not only the speed. On
two virtual cores of a shared machine the exchange below took 75 or 304 us, for seconds to minutes at a time, and plans
that select tokens took 5 to 11 % more of the dense latency in the second state. Threads that idle a moment mostly come
back close to each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_ROWS_PER_THREAD, _ROW = 2048, 16  # as little as torch still shares out between threads; a row is a cache line
_TRIES = 3  # exchanges per reading; the fastest counts
_APART = 2.0  # times the closest reading from which threads count as apart
_PAUSE_S = 0.05  # idle time after which threads may have been placed anew
_PAUSES_AT_FIRST = 6  # before the first verdict, so that there is something close to compare with


class ThreadExchange:
    """Times how long the threads take to read what others have just written, and knows the closest they have been.

    Args:
        reading_us: takes one reading; None: by torch's threads.
        clock: seconds.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        reading_us: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._reading_us, self._clock, self._sleep = reading_us or self._by_torch, clock, sleep
        self._closest_us: dict[int, float] = {}  # by number of threads
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def measure_us(self) -> float | None:
        """Microseconds of one exchange of 128 KiB per thread, there and back; None for a single thread."""
        threads = torch.get_num_threads()
        if threads == 1:
            return None
        found_us = self._reading_us()
        self._closest_us[threads] = min(found_us, self._closest_us.get(threads, found_us))
        return found_us

    def settle(self, most_s: float = 0.0) -> bool:
        """Wait until the threads are about as close as they have ever been.

        Args:
            most_s: how long, at most. The first time in a process takes 0.3 s in any case, to learn what close is.

        Returns:
            Whether they are.
        """
        threads = torch.get_num_threads()
        if threads == 1:
            return True
        if threads not in self._closest_us:
            for _ in range(_PAUSES_AT_FIRST):
                self.measure_us()
                self._sleep(_PAUSE_S)
        until = self._clock() + most_s
        while not (close := self._are_close(threads)) and self._clock() < until:
            self._sleep(_PAUSE_S)
        return close

    def _are_close(self, threads: int) -> bool:
        found_us = self.measure_us()
        assert found_us is not None  # there are several threads
        return found_us <= _APART * self._closest_us[threads]

    def _by_torch(self) -> float:
        threads = torch.get_num_threads()
        if threads not in self._tables:
            rows = _ROWS_PER_THREAD * threads
            one = torch.zeros(rows, _ROW)
            # Read backwards: each thread writes its own part, and reads that of the thread opposite.
            self._tables[threads] = one, one.clone(), torch.arange(rows - 1, -1, -1)
        one, other, backwards = self._tables[threads]
        times_s = []
        with torch.no_grad():
            for _ in range(_TRIES):
                begun = time.perf_counter()
                torch.index_select(one, 0, backwards, out=other)
                torch.index_select(other, 0, backwards, out=one)
                times_s.append(time.perf_counter() - begun)
        return 1e6 * min(times_s)


THREADS = ThreadExchange()
"""One per process: what it has learnt holds for every device opened in it."""
