"""A machine with a clock of its own, for tests of the statistics: it drifts, stutters, steps and is disturbed.

Built at the lowest level there is: cells say how long they take, and the timer makes the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class VirtualMachine:
    """Times cells by a virtual clock.

    Attributes:
        now_s: the clock.
        speed: factor on all durations at a time; 1 is nominal.
        noise: relative size of the noise of one run, heavy-tailed (Student's t with 3 degrees of freedom, from above).
        disturbed: (start, end, size): within this stretch a run takes longer by a random factor up to `size`.
        throttled: (start, end): the machine reports throttling, and runs at half its speed.
        apart: (start, end): threads are far from each other, so that short work takes longer than its share.
    """

    seed: int = 0
    speed: Callable[[float], float] = lambda now_s: 1.0
    noise: float = 0.0
    disturbed: tuple[float, float, float] | None = None
    throttled: tuple[float, float] | None = None
    apart: tuple[float, float] | None = None
    waited_s: float = 0.0
    now_s: float = 0.0
    runs: int = 0
    _pending_ms: float = 0.0
    _rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def work(self, ms: float) -> Callable[[], object]:
        """A cell that takes `ms` on a quiet machine."""

        def run() -> None:
            self._pending_ms += ms

        return run

    def time_ms(self, run: Callable[[], object], repeats: int = 1) -> float:
        total_ms = 0.0
        for _ in range(repeats):
            self._pending_ms = 0.0
            run()
            factor = self.speed(self.now_s)
            if self.noise:
                factor *= math.exp(self.noise * min(12.0, abs(self._rng.standard_t(3))))
            if self.disturbed and self.disturbed[0] <= self.now_s < self.disturbed[1]:
                factor *= self._rng.uniform(1.0, self.disturbed[2])
            if self._is_throttled():
                factor *= 2.0
            if self._is_apart():
                factor *= 1 + 1 / (1 + self._pending_ms)
            self.now_s += self._pending_ms * factor / 1e3
            total_ms += self._pending_ms * factor
            self.runs += 1
        return total_ms / repeats

    def conditions(self) -> dict[str, Any]:
        return {"runs_total": self.runs, "throttled": self._is_throttled()}

    def settle(self, most_s: float = 0.0) -> bool:
        while self._is_apart() and most_s > 1e-9:
            step_s = min(0.05, most_s)
            most_s -= step_s
            self.waited_s += step_s
            self.now_s += step_s
        return not self._is_apart()

    def clock(self) -> float:
        return self.now_s

    def _is_apart(self) -> bool:
        return self.apart is not None and self.apart[0] <= self.now_s < self.apart[1]

    def _is_throttled(self) -> bool:
        return self.throttled is not None and self.throttled[0] <= self.now_s < self.throttled[1]
