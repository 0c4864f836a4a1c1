"""When to measure what, and what the samples say. In: cells (something to run) and a device. Out: estimates of ratios.

The machine's speed moves all the time, so no cell is measured to completion before the next. Time is cut into rounds;
a round takes a few cells of each group, in shuffled order, with a reference run right before and right after each.
What is kept of a sample is the log of its ratio to these two references; what is reported of a cell is the trimmed mean
of its log ratios. Of the estimators tried on a noisy machine this one repeats best: drift that is slow against a
sample cancels, and the references tell which samples a disturbance fell into.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shiva_search.errors import InputError
from shiva_search.records.files import write_text
from shiva_search.records.profile import Sample, read_samples, to_csv

TRIM = 0.2  # share of samples dropped at each end before the mean
CONFIDENCE = 0.95
WIDE = 0.05  # half-width of an interval, relative, from which a row is flagged
_RESAMPLES = 400
_DISTURBED_SIGMAS = 3.5
_DISTURBED_FLOOR = 0.02  # references closer than this never count as disturbed
_MIN_CLEAN = 4
_LONG = 20  # a cell this many times longer than a sample must be is not repeated, so there is nothing to find out


class Timer(Protocol):
    """The part of a device the sampler needs."""

    def time_ms(self, run: Callable[[], object], repeats: int = 1) -> float: ...

    def conditions(self) -> dict[str, Any]: ...


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
    run: Callable[[], object]
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


@dataclass(frozen=True)
class Estimate:
    """What the samples of a cell say.

    Attributes:
        ratio: cell over reference; low and high bound a 95 % bootstrap interval.
        samples: clean samples it rests on.
        disturbed: share of samples whose references disagree, left out.
        flags: "wide" (interval), "disturbed" (over a third of the samples left out), "throttled" or "no clean sample"
            (nothing was left, so all were taken).
    """

    ratio: float
    low: float
    high: float
    samples: int
    disturbed: float = 0.0
    flags: tuple[str, ...] = ()

    @property
    def half_width(self) -> float:
        """Relative half-width of the interval."""
        return (self.high - self.low) / (2 * self.ratio)


@dataclass(frozen=True)
class Round:
    """A stretch of the run and the conditions it was taken in.

    Attributes:
        index: number of the round.
        started_s: seconds since the run began, pauses left out.
        seconds: how long it took.
        conditions: of the device; names that end in `_total` are counted over the round.
    """

    index: int
    started_s: float
    seconds: float
    conditions: Mapping[str, Any] = field(default_factory=dict)


def disturbance_limit(samples: Sequence[Sample]) -> float:
    """How far apart the two references of a sample may lie, as a log ratio: what is usual here, and some."""
    gaps = np.abs([math.log(sample.after_ms / sample.before_ms) for sample in samples])
    if not len(gaps):
        return _DISTURBED_FLOOR
    # The median absolute gap, as a standard deviation: half of all gaps may be foul before it gives way.
    return max(_DISTURBED_FLOOR, _DISTURBED_SIGMAS * 1.4826 * float(np.median(gaps)))


def is_disturbed(sample: Sample, limit: float) -> bool:
    """Whether something happened around a sample that its references noticed, or the device throttled."""
    return sample.throttled or abs(math.log(sample.after_ms / sample.before_ms)) > limit


def log_ratio(sample: Sample) -> float:
    """Log of the sample over the geometric mean of the references around it."""
    return math.log(sample.ms) - (math.log(sample.before_ms) + math.log(sample.after_ms)) / 2


def estimate(samples: Sequence[Sample], limit: float, seed: int = 0, quick: bool = False) -> Estimate:
    """Trimmed mean of log ratios, with a bootstrap interval.

    Args:
        samples: of one cell, at least one.
        limit: from disturbance_limit, over all samples of the cell's group.
        seed: of the bootstrap.
        quick: take the interval from the winsorised variance instead, for deciding what to measure next.
    """
    clean = [sample for sample in samples if not is_disturbed(sample, limit)]
    disturbed = 1 - len(clean) / len(samples)
    flags = []
    if len(clean) < min(_MIN_CLEAN, len(samples)):
        # Better a flagged figure than none; the interval is wide of itself.
        clean = list(samples)
        is_throttled = any(sample.throttled for sample in samples)
        flags.append("throttled" if is_throttled else "no clean sample")
    elif len(clean) < 2 / 3 * sum(not sample.throttled for sample in samples):
        flags.append("disturbed")
    logs = np.array([log_ratio(sample) for sample in clean])
    centre, low, high = (winsorised_interval if quick else trimmed_interval)(logs, seed)
    if high - low > 2 * WIDE:
        flags.append("wide")
    return Estimate(math.exp(centre), math.exp(low), math.exp(high), len(clean), disturbed, tuple(flags))


def winsorised_interval(logs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Trimmed mean, and about the bounds that trimmed_interval gives (Tukey and McLaughlin 1963), without drawing."""
    count = len(logs)
    if count < 2:
        return trimmed_interval(logs)
    cut = int(TRIM * count)
    ordered = np.sort(logs)
    winsorised = np.clip(ordered, ordered[cut], ordered[count - 1 - cut])
    centre = float(_trimmed_mean(ordered[None])[0])
    error = float(winsorised.std(ddof=1)) / ((1 - 2 * cut / count) * math.sqrt(count))
    return centre, centre - 1.96 * error, centre + 1.96 * error


def trimmed_interval(logs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Trimmed mean, and the bounds of its 95 % bootstrap interval; a single value is taken as good to 20 %."""
    count = len(logs)
    if count < 2:
        return float(logs[0]), float(logs[0]) - 0.2, float(logs[0]) + 0.2
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    means = _trimmed_mean(np.sort(logs[drawn], axis=1))
    centre = float(_trimmed_mean(np.sort(logs)[None])[0])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # The bootstrap knows only the values it was given: of few, it makes an interval too narrow by sqrt((n-1)/n).
    widen = math.sqrt(count / (count - 1))
    return centre, centre - (centre - float(low)) * widen, centre + (float(high) - centre) * widen


def _trimmed_mean(sorted_logs: np.ndarray) -> np.ndarray:
    cut = int(TRIM * sorted_logs.shape[1])
    mean: np.ndarray = sorted_logs[:, cut : sorted_logs.shape[1] - cut].mean(axis=1)
    return mean


def throttled(conditions: Mapping[str, Any]) -> bool:
    """Whether a device's conditions speak of throttling."""
    return bool(conditions.get("throttled"))


class SampleLog:
    """Raw samples and rounds on disk, appended a round at a time, so that a kill loses at most the round under way."""

    def __init__(self, folder: Path) -> None:
        self.samples_path = folder / "samples.csv"
        self.rounds_path = folder / "rounds.jsonl"

    def read(self) -> tuple[list[Sample], list[Round]]:
        """What is there; lines cut short are dropped, from the files as well."""
        samples = read_samples(self.samples_path)
        text = self.rounds_path.read_text(encoding="utf-8") if self.rounds_path.exists() else ""
        rounds = [Round(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
        # A round counts once both files hold it.
        known = {item.index for item in rounds}
        samples = [sample for sample in samples if sample.round in known]
        self.restart(samples, rounds)
        return samples, rounds

    def restart(self, samples: Iterable[Sample] = (), rounds: Iterable[Round] = ()) -> None:
        """Replace both files."""
        write_text(self.samples_path, to_csv(Sample, samples))
        write_text(self.rounds_path, "".join(_line(item) for item in rounds))

    def append(self, samples: Sequence[Sample], finished: Round) -> None:
        """Add a round: its samples first, then the line that makes them count.

        Raises:
            InputError: the disk is full or the folder is gone.
        """
        try:
            for path, text in (
                (self.samples_path, to_csv(Sample, samples, header=False)),
                (self.rounds_path, _line(finished)),
            ):
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.samples_path}: {error.strerror or error}; "
                "choose another folder with --out, or free space"
            ) from error


def _line(finished: Round) -> str:
    return json.dumps(finished.__dict__, default=str) + "\n"


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
        self._repeats: dict[str, int] = {}
        self._estimates: dict[str, tuple[int, Estimate]] = {}
        self._limits: dict[str, float] = dict.fromkeys(self.groups, math.inf)
        self._owed_s: dict[str, float] = dict.fromkeys(self.groups, 0.0)
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
        """Median of a group's references over the whole run."""
        levels = [level for sample in self._of_group(group) for level in (sample.before_ms, sample.after_ms)]
        return float(np.median(levels)) if levels else None

    def reference_interval_ms(self, group: str) -> tuple[float, float] | None:
        """95 % bootstrap interval of reference_ms; references of one round move together, so rounds are drawn."""
        rounds: dict[int, list[float]] = {}
        for sample in self._of_group(group):
            rounds.setdefault(sample.round, []).extend((sample.before_ms, sample.after_ms))
        if not rounds:
            return None
        levels = [np.array(values) for values in rounds.values()]
        rng = np.random.default_rng(self._seed)
        medians = [
            float(np.median(np.concatenate([levels[i] for i in rng.integers(len(levels), size=len(levels))])))
            for _ in range(_RESAMPLES)
        ]
        low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)

    def _of_group(self, group: str) -> list[Sample]:
        return [
            sample for name, samples in self.samples.items() if self.cells[name].group == group for sample in samples
        ]

    def _width(self, cell: Cell) -> float:
        known = self.estimate(cell.name)
        if known is None or known.samples < cell.min_samples or {"throttled", "no clean sample"} & set(known.flags):
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
            if is_disturbed(sample, self._limits[group]):
                self._queues[group].appendleft(sample.cell)
        if self._log is not None:
            self._log.append(taken, finished)

    def _chain(self, group: Group, index: int, offset_s: float, until: float, stop: float) -> list[Sample]:
        """Reference, cell, reference, cell, ..., reference: each serves the cell before it and the cell after it."""
        taken: list[Sample] = []
        before_ms = self._time(group.reference)
        while not taken or (self._clock() < until and self._clock() < stop):
            cell = self._next(group.name)
            if cell is None:
                break
            if self._warm_up(cell):
                before_ms = self._time(group.reference)
            started_s = offset_s + self._clock()
            ms = self._time(cell)
            after_ms = self._time(group.reference)
            repeats = self._repeats[cell.name]
            taken.append(Sample(cell.name, group.name, index, started_s, ms, before_ms, after_ms, repeats))
            before_ms = after_ms
        return taken

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
        once_ms = self.device.time_ms(cell.run)
        if once_ms < _LONG * self._min_sample_ms:
            once_ms = min(self.device.time_ms(cell.run) for _ in range(2))
        self._repeats[cell.name] = max(1, min(1000, math.ceil(self._min_sample_ms / max(once_ms, 1e-6))))
        return True

    def _time(self, cell: Cell) -> float:
        self._warm_up(cell)
        if cell.prepare is not None:
            cell.prepare()
        return self.device.time_ms(cell.run, self._repeats[cell.name])


def _over_round(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    conditions = dict(after)
    for name in after:
        if name.endswith("_total") and after[name] is not None and before.get(name) is not None:
            conditions[name.removesuffix("_total")] = after[name] - before[name]
            del conditions[name]
    return conditions
