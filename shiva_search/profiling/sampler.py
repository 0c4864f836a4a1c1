"""When to measure what. In: cells (something to run) and a device. Out: estimates of their ratios to references.

The machine's speed moves all the time, so no cell is measured to completion before the next. Time is cut into rounds;
a round takes a few cells of each group, in shuffled order, with a reference run right before and right after each.
Samples whose references disagree are taken again first, and the time that is left goes where intervals are widest.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np

from shiva_search.profiling.sample_log import Round, SampleLog
from shiva_search.profiling.statistics import (
    Estimate,
    disturbance_limit,
    estimate,
    is_disturbed,
    log_ratio,
    median_interval,
)
from shiva_search.records.profile import Sample

Run = Callable[[], object]

_CAPTURED = 4  # runs of a cell that become graphs, at most
_SETTLE_S = 3.0  # to wait at a time, at most, until the device is undisturbed
_SETTLE_SHARE = 0.25  # of the time, most to wait in all
_RETRIED = frozenset({"throttled", "unsettled", "no clean sample"})  # flags of a cell that is not known yet
_LONG = 20  # a cell this many times longer than a sample must be is not repeated, so there is nothing to find out


class Timer(Protocol):
    """The part of a device the sampler needs."""

    def time_ms(self, run: Run, repeats: int = 1) -> float: ...

    def settle(self, most_s: float = 0.0) -> bool: ...

    def conditions(self) -> dict[str, Any]: ...


class InTurn:
    """Runs that take turns, so that each finds its weights as cold as in the model."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._turns = cycle(self.runs)

    def __call__(self) -> object:
        return next(self._turns)()


@dataclass(frozen=True)
class Cell:
    """Something to time.

    Attributes:
        name: unique; the key of its samples.
        run: one execution.
        group: whose reference it is measured against.
        prepare: called untimed right before each sample (hooks on, hooks off).
        target: half-width of the interval, relative, at which the cell is done.
        min_samples: samples it gets in any case, time permitting.
    """

    name: str
    run: Run
    group: str
    prepare: Callable[[], object] | None = None
    target: float = 0.01
    min_samples: int = 8


@dataclass(frozen=True)
class Group:
    """Cells that share a reference.

    Attributes:
        name: as in Cell.group.
        reference: what the cells are compared with; its own group is ignored.
        share: of the time, relative to the other groups.
    """

    name: str
    reference: Cell
    share: float = 1.0


def throttled(conditions: Mapping[str, Any]) -> bool:
    """Whether a device's conditions speak of throttling."""
    return bool(conditions.get("throttled"))


class Sampler:
    """Measures cells in shuffled, interleaved rounds until each is known well enough or the time is up.

    Args:
        device: times and tells conditions.
        groups: references by group.
        cells: what to measure.
        seed: of the order.
        min_sample_ms: short cells are repeated within a sample to last this long.
        round_s: length of a round.
        log: where samples go as rounds end; samples already there are taken up.
        capture: makes of a run what is timed in its place (a CUDA graph's replay), once per cell.
        clock: seconds; the time the rounds are cut by.
    """

    def __init__(
        self,
        device: Timer,
        groups: Sequence[Group],
        cells: Sequence[Cell],
        *,
        seed: int = 0,
        min_sample_ms: float = 1.0,
        round_s: float = 1.0,
        log: SampleLog | None = None,
        capture: Callable[[Run], Run] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self.groups = {group.name: group for group in groups}
        self.cells = {cell.name: cell for cell in cells}
        self.samples: dict[str, list[Sample]] = {name: [] for name in self.cells}
        self.rounds: list[Round] = []
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._min_sample_ms = min_sample_ms
        self._round_s = round_s
        self._log = log
        self._clock = clock
        self._set_aside: dict[str, list[Sample]] = {}
        self._queues: dict[str, deque[str]] = {name: deque() for name in self.groups}
        self._capture = capture
        self._runs: dict[str, Run] = {}
        self._repeats: dict[str, int] = {}
        self._estimates: dict[str, tuple[int, Estimate]] = {}
        self._limits: dict[str, float] = dict.fromkeys(self.groups, math.inf)
        self._owed_s: dict[str, float] = dict.fromkeys(self.groups, 0.0)
        self._waited_s = 0.0
        self._began = clock()
        self._ended = clock()
        if log is not None:
            samples, self.rounds = log.read()
            for sample in samples:
                # Cells that were added on the way may be added again.
                (self.samples if sample.cell in self.samples else self._set_aside).setdefault(sample.cell, []).append(
                    sample
                )
            # A resumed run must not draw the order of the first run again.
            self._rng = np.random.default_rng([seed, len(self.rounds)])

    @property
    def elapsed_s(self) -> float:
        """Seconds spent in finished rounds, those before an interruption included."""
        return sum(item.seconds for item in self.rounds)

    def add(self, cells: Sequence[Cell]) -> None:
        """More cells, found worth measuring while the run is under way; those known already are left alone."""
        for cell in cells:
            if cell.name not in self.cells:
                self.cells[cell.name] = cell
                self.samples[cell.name] = self._set_aside.pop(cell.name, [])

    def open_cells(self, group: str) -> list[Cell]:
        """Cells of a group that are not known well enough yet, the widest interval first."""
        found = []
        for cell in self.cells.values():
            if cell.group != group:
                continue
            width = self._width(cell)
            if width > cell.target:
                found.append((width / cell.target, cell))
        return [cell for _, cell in sorted(found, key=lambda item: -item[0])]

    def run(self, until_s: float, on_round: Callable[[Sampler], object] | None = None) -> None:
        """Measure until every cell is done or `elapsed_s` has reached `until_s`.

        Each cell gets one sample even when the time is up before.

        Args:
            until_s: time limit on all rounds of this sampler together, seconds.
            on_round: called after each round (to save estimates, to report progress).
        """
        for group in self.groups:
            self._limits[group] = disturbance_limit(self._of_group(group))
        self._ended = self._clock()
        while True:
            first_pass = any(not samples for samples in self.samples.values())
            if not first_pass and self.elapsed_s >= until_s:
                break
            if not any(self.open_cells(group) for group in self.groups):
                break
            self._round(self.elapsed_s, math.inf if first_pass else until_s)
            if on_round is not None:
                on_round(self)

    def estimate(self, name: str) -> Estimate | None:
        """What is known of a cell by now, its interval the quick one; None before its first sample."""
        samples = self.samples[name]
        if not samples:
            return None
        known = self._estimates.get(name)
        if known is None or known[0] != len(samples):
            limit = self._limits[self.cells[name].group]
            self._estimates[name] = len(samples), estimate(samples, limit, quick=True)
        return self._estimates[name][1]

    def finish(self) -> dict[str, Estimate]:
        """Estimates of all cells with samples, disturbances judged over all samples of the run."""
        limits = {group: disturbance_limit(self._of_group(group)) for group in self.groups}
        return {
            name: estimate(samples, limits[self.cells[name].group], self._seed)
            for name, samples in self.samples.items()
            if samples
        }

    def reference_ms(self, group: str) -> float | None:
        """Median of a group's references over the whole run, or over its undisturbed part."""
        levels = [level for sample in self._settled(group) for level in (sample.before_ms, sample.after_ms)]
        return float(np.median(levels)) if levels else None

    def reference_interval_ms(self, group: str) -> tuple[float, float] | None:
        """95 % bootstrap interval of reference_ms; references of one round move together, so rounds are drawn."""
        rounds: dict[int, list[float]] = {}
        for sample in self._settled(group):
            rounds.setdefault(sample.round, []).extend((sample.before_ms, sample.after_ms))
        return median_interval(list(rounds.values()), self._seed) if rounds else None

    def unsettled(self) -> dict[str, float]:
        """Share of the samples taken while the device was not settled, and by how much ratios differed then.

        `ratio_change` is the median over cells with samples of both kinds: how much more of their reference they took.
        """
        taken = [sample for samples in self.samples.values() for sample in samples]
        if not any(sample.unsettled for sample in taken):
            return {}
        changes = []
        for samples in self.samples.values():
            logs = {far: [log_ratio(sample) for sample in samples if sample.unsettled is far] for far in (True, False)}
            if all(logs.values()):
                changes.append(math.exp(float(np.median(logs[True]) - np.median(logs[False]))) - 1)
        found = {"share_of_samples": sum(sample.unsettled for sample in taken) / len(taken)}
        return {**found, "ratio_change": float(np.median(changes))} if changes else found

    def timed_run(self, cell: Cell) -> Run:
        """What is timed for a cell, which is prepared: its run, or what `capture` made of it."""
        if self._capture is None:
            return cell.run
        if cell.name not in self._runs:
            whole = cell.run
            if isinstance(whole, InTurn):
                self._runs[cell.name] = InTurn([self._capture(run) for run in whole.runs[:_CAPTURED]])
            else:
                self._runs[cell.name] = self._capture(whole)
        return self._runs[cell.name]

    def _of_group(self, group: str) -> list[Sample]:
        return [
            sample for name, samples in self.samples.items() if self.cells[name].group == group for sample in samples
        ]

    def _settled(self, group: str) -> list[Sample]:
        samples = self._of_group(group)
        return [sample for sample in samples if not sample.foul] or samples

    def _width(self, cell: Cell) -> float:
        known = self.estimate(cell.name)
        if known is None or known.samples < cell.min_samples or _RETRIED & set(known.flags):
            return math.inf
        return known.half_width

    def _round(self, started_s: float, until_s: float) -> None:
        index = self.rounds[-1].index + 1 if self.rounds else 0
        begun = self._clock()
        before = self.device.conditions()
        taken: list[Sample] = []
        names = [name for name in self.groups if self.open_cells(name)]
        shares = {name: self.groups[name].share for name in names}
        # What a long cell took beyond its group's share is paid back in later rounds, while other groups run.
        for name in names:
            self._owed_s[name] += self._round_s * shares[name] / sum(shares.values())
        most_s = max(self._owed_s[name] for name in names)
        for name in self._rng.permutation(names):
            self._owed_s[name] += max(0.0, 0.01 - most_s)
            if self._owed_s[name] <= 0:
                continue
            group_begun = self._clock()
            taken += self._chain(
                self.groups[name],
                index,
                started_s - begun,
                group_begun + self._owed_s[name],
                until_s - started_s + begun,
            )
            self._owed_s[name] -= self._clock() - group_begun
        after = self.device.conditions()
        conditions = _over_round(before, after)
        if throttled(before) or throttled(after):
            taken = [Sample(**{**sample.__dict__, "throttled": True}) for sample in taken]
        # From the end of the last round on, so that time spent in between is not forgotten.
        ended = self._clock()
        finished = Round(index, started_s, ended - self._ended, conditions)
        self._ended = ended
        self.rounds.append(finished)
        for sample in taken:
            self.samples[sample.cell].append(sample)
        for name in self.groups:
            self._limits[name] = disturbance_limit(self._of_group(name))
        for sample in taken:
            group = self.cells[sample.cell].group
            if sample.foul:  # the whole device, and for a while: others come first
                self._queues[group].append(sample.cell)
            elif is_disturbed(sample, self._limits[group]):
                self._queues[group].appendleft(sample.cell)
        if self._log is not None:
            self._log.append(taken, finished)

    def _chain(self, group: Group, index: int, offset_s: float, until: float, stop: float) -> list[Sample]:
        """Reference, cell, reference, cell, ..., reference: each serves the cell before it and the cell after it."""
        taken: list[Sample] = []
        before_ms, settled = self._settle(group)
        while not taken or (self._clock() < until and self._clock() < stop):
            cell = self._next(group.name)
            if cell is None:
                break
            if self._warm_up(cell):
                before_ms, settled = self._settle(group)
            started_s = offset_s + self._clock()
            # A look before each run: what it leaves in the caches, it leaves to references and cells alike.
            ms = self._time(cell)
            settled &= self.device.settle()
            after_ms = self._time(group.reference)
            still = self.device.settle()
            unsettled = not (settled and still)
            repeats = self._repeats[cell.name]
            taken.append(
                Sample(cell.name, group.name, index, started_s, ms, before_ms, after_ms, repeats, unsettled=unsettled)
            )
            before_ms, settled = (after_ms, True) if still else self._settle(group)
        return taken

    def _settle(self, group: Group) -> tuple[float, bool]:
        """A reference's milliseconds after the device has settled, and whether it has."""
        begun = self._clock()
        allowed_s = _SETTLE_S + _SETTLE_SHARE * (begun - self._began) - self._waited_s
        # Rather one wait that is long enough than many that are not.
        settled = self.device.settle(_SETTLE_S if allowed_s >= _SETTLE_S else 0.0)
        self._waited_s += self._clock() - begun
        before_ms = self._time(group.reference)
        return before_ms, settled & self.device.settle()

    def _next(self, group: str) -> Cell | None:
        queue = self._queues[group]
        if not queue:
            waiting = self.open_cells(group)
            # Once all have their minimum, time goes to the wider half.
            if len(waiting) > 2 and all(math.isfinite(self._width(cell)) for cell in waiting):
                waiting = waiting[: (len(waiting) + 1) // 2]
            names = [cell.name for cell in waiting]
            queue.extend(str(name) for name in self._rng.permutation(names))
        return self.cells[queue.popleft()] if queue else None

    def _warm_up(self, cell: Cell) -> bool:
        """Allocations and lazy initialisation happen here, once per cell; True if they did."""
        if cell.name in self._repeats:
            return False
        if cell.prepare is not None:
            cell.prepare()
        run = self.timed_run(cell)
        once_ms = self.device.time_ms(run)
        if once_ms < _LONG * self._min_sample_ms:
            once_ms = min(self.device.time_ms(run) for _ in range(2))
        self._repeats[cell.name] = max(1, min(1000, math.ceil(self._min_sample_ms / max(once_ms, 1e-6))))
        return True

    def _time(self, cell: Cell) -> float:
        self._warm_up(cell)
        if cell.prepare is not None:
            cell.prepare()
        return self.device.time_ms(self.timed_run(cell), self._repeats[cell.name])


def _over_round(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    conditions = dict(after)
    for name in after:
        if name.endswith("_total") and after[name] is not None and before.get(name) is not None:
            conditions[name.removesuffix("_total")] = after[name] - before[name]
            del conditions[name]
    return conditions
