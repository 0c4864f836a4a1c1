"""The sampler's statistics and schedule, on a machine whose true speeds are known."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from simulation import VirtualMachine

from shiva_search.profiling.sample_log import SampleLog
from shiva_search.profiling.sampler import Cell, Group, InTurn, Sampler
from shiva_search.profiling.statistics import disturbance_limit, estimate
from shiva_search.records.profile import Sample, read_samples

TRUE_MS = {f"cell {i}": ms for i, ms in enumerate(np.geomspace(0.4, 12.0, 12))}
REFERENCE_MS = 8.0


def drifting(now_s: float) -> float:
    """Slower by up to 30 %, back and forth within 20 seconds, and a lasting step after 15."""
    return (1.15 + 0.15 * math.sin(now_s / 20 * 2 * math.pi)) * (1.2 if now_s > 15 else 1.0)


def sampler_on(machine: VirtualMachine, seed: int = 0, **options: object) -> Sampler:
    cells = [Cell(name, machine.work(ms), "blocks") for name, ms in TRUE_MS.items()]
    reference = Cell("reference", machine.work(REFERENCE_MS), "")
    return Sampler(machine, [Group("blocks", reference)], cells, seed=seed, clock=machine.clock, **options)  # type: ignore[arg-type]


def errors_of(sampler: Sampler) -> np.ndarray:
    found = sampler.finish()
    return np.array([found[name].ratio * REFERENCE_MS / ms - 1 for name, ms in TRUE_MS.items()])


@pytest.mark.parametrize("seed", range(3))
def test_ratios_survive_drift_steps_and_heavy_tails(seed: int) -> None:
    sampler = sampler_on(VirtualMachine(seed, drifting, noise=0.04), seed)
    sampler.run(30.0)
    errors = errors_of(sampler)
    assert np.median(np.abs(errors)) < 0.01
    assert np.abs(errors).max() < 0.035


def test_one_cell_after_the_other_would_not_survive_the_same_drift() -> None:
    """The comparison that makes the test above mean something: medians of cells taken in sequence, same machine."""
    machine = VirtualMachine(0, drifting, noise=0.04)
    medians = {}
    for name, ms in TRUE_MS.items():
        samples, until = [], machine.now_s + 30.0 / len(TRUE_MS)
        while machine.now_s < until:
            samples.append(machine.time_ms(machine.work(ms)))
        medians[name] = float(np.median(samples))
    scale = np.mean([medians[name] / ms for name, ms in TRUE_MS.items()])
    errors = [medians[name] / ms / scale - 1 for name, ms in TRUE_MS.items()]
    assert np.abs(errors).max() > 0.05


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = []
    for seed in range(12):
        sampler = sampler_on(VirtualMachine(seed, drifting, noise=0.03), seed)
        sampler.run(10.0)
        found = sampler.finish()
        inside += [found[name].low <= ms / REFERENCE_MS <= found[name].high for name, ms in TRUE_MS.items()]
    assert 0.85 <= np.mean(inside) <= 0.995


def test_a_disturbed_stretch_is_recognised_and_left_out() -> None:
    sampler = sampler_on(VirtualMachine(1, noise=0.005, disturbed=(3.0, 7.0, 2.5)))
    for cell in sampler.cells.values():
        object.__setattr__(cell, "target", 1e-9)
    sampler.run(12.0)
    assert np.abs(errors_of(sampler)).max() < 0.01
    limit = disturbance_limit([sample for samples in sampler.samples.values() for sample in samples])
    samples = [sample for samples in sampler.samples.values() for sample in samples]
    gaps = [abs(math.log(sample.after_ms / sample.before_ms)) > limit for sample in samples]
    stretch = [3.0 < sample.started_s < 7.0 for sample in samples]
    # Two references may agree by chance, so not every sample of the stretch is recognised.
    assert np.mean([gap for gap, during in zip(gaps, stretch, strict=True) if during]) > 0.8
    assert np.mean([gap for gap, during in zip(gaps, stretch, strict=True) if not during]) < 0.05


def test_rows_disturbed_throughout_are_flagged() -> None:
    machine = VirtualMachine(0, noise=0.005)
    samples = [Sample("x", "blocks", 0, i, 4.0, 8.0, 8.0 * (1.6 if i % 2 else 1.0)) for i in range(10)]
    found = estimate(samples, limit=0.05)
    assert "disturbed" in found.flags
    assert found.samples == 5
    assert machine.runs == 0


def test_samples_taken_while_threads_are_apart_are_left_out() -> None:
    machine = VirtualMachine(0, noise=0.01, apart=(3.0, 8.0))
    sampler = sampler_on(machine)
    sampler.run(12.0)
    assert np.abs(errors_of(sampler)).max() < 0.02
    assert not any("unsettled" in found.flags for found in sampler.finish().values())
    taken = [sample for samples in sampler.samples.values() for sample in samples]
    assert sampler.unsettled()["share_of_samples"] == pytest.approx(np.mean([sample.unsettled for sample in taken]))
    assert 0.0 < sampler.unsettled()["ratio_change"] < 0.6
    assert 1.9 < sampler.reference_ms("blocks") / REFERENCE_MS * 2 < 2.1
    assert 2.9 < machine.waited_s < 3.0 + 0.25 * 12


def test_threads_that_stay_apart_are_waited_for_a_quarter_of_the_time_and_flagged() -> None:
    machine = VirtualMachine(0, noise=0.01, apart=(0.0, 1e9))
    sampler = sampler_on(machine)
    sampler.run(20.0)
    assert all("unsettled" in found.flags for found in sampler.finish().values())
    assert 5.0 < machine.waited_s < 3.0 + 0.26 * machine.now_s
    machine.apart = (0.0, machine.now_s)  # and now they are close
    sampler.run(40.0)
    assert not any(found.flags for found in sampler.finish().values())
    assert np.abs(errors_of(sampler)).max() < 0.02


@pytest.mark.parametrize("state", ["apart", "throttled"])
def test_a_state_that_lasts_does_not_keep_cells_from_their_turn(state: str) -> None:
    machine = VirtualMachine(0, **{state: (0.0, 1e9)})
    sampler = sampler_on(machine, round_s=0.02)
    sampler.run(6.0)
    counts = [len(samples) for samples in sampler.samples.values()]
    assert min(counts) > 2
    assert max(counts) - min(counts) <= 2


def test_throttled_rounds_are_flagged_and_tried_again() -> None:
    always = sampler_on(VirtualMachine(0, throttled=(0.0, 1e9)))
    always.run(2.0)
    assert all("throttled" in found.flags for found in always.finish().values())
    early = sampler_on(VirtualMachine(0, noise=0.01, throttled=(0.0, 2.0)))
    early.run(10.0)
    assert not any("throttled" in found.flags for found in early.finish().values())
    assert np.abs(errors_of(early)).max() < 0.02


def test_a_disturbed_sample_is_retried_first() -> None:
    machine = VirtualMachine(0, noise=0.002)
    sampler = sampler_on(machine, round_s=0.05)
    sampler.run(2.0)
    machine.disturbed = (machine.now_s, machine.now_s + 0.02, 4.0)
    for cell in sampler.cells.values():
        object.__setattr__(cell, "target", 1e-9)
    started_s = sampler.elapsed_s
    sampler.run(started_s + 0.1)
    late = sorted(
        (s for x in sampler.samples.values() for s in x if s.started_s >= started_s), key=lambda s: s.started_s
    )
    hit = [s.cell for s in late if s.round == late[0].round and abs(math.log(s.after_ms / s.before_ms)) > 0.1]
    next_round = [s.cell for s in late if s.round > late[0].round]
    assert hit
    assert next_round[0] in hit


def test_rounds_are_shuffled_and_interleaved() -> None:
    sampler = sampler_on(VirtualMachine(0, noise=0.02))
    sampler.run(4.0)
    in_order = [s.cell for s in sorted((s for x in sampler.samples.values() for s in x), key=lambda s: s.started_s)]
    passes = [in_order[i : i + len(TRUE_MS)] for i in range(0, 4 * len(TRUE_MS), len(TRUE_MS))]
    assert all(sorted(item) == sorted(TRUE_MS) for item in passes)
    assert len({tuple(item) for item in passes}) == 4


def test_a_reference_runs_right_before_and_right_after_each_cell() -> None:
    machine = VirtualMachine(0, noise=0.1)
    ran: list[str] = []

    def cell(name: str, ms: float) -> Cell:
        work = machine.work(ms)
        return Cell(name, lambda: (ran.append(name), work()), "blocks", target=1e-9)

    sampler = Sampler(
        machine, [Group("blocks", cell("reference", 8.0))], [cell("a", 2.0), cell("b", 3.0)], clock=machine.clock
    )
    sampler.run(0.0)
    ran.clear()
    sampler.run(3.0)
    assert ran
    assert all(ran[i - 1] == ran[i + 1] == "reference" for i, name in enumerate(ran) if name != "reference")


def test_time_goes_where_the_interval_is_widest() -> None:
    machine = VirtualMachine(0, noise=0.002)
    rng = np.random.default_rng(0)
    noisy = machine.work(4.0)

    def stutters() -> None:
        noisy()
        machine._pending_ms *= rng.uniform(0.7, 1.4)

    cells = [Cell(f"calm {i}", machine.work(4.0), "blocks") for i in range(7)] + [Cell("noisy", stutters, "blocks")]
    sampler = Sampler(machine, [Group("blocks", Cell("reference", machine.work(8.0), ""))], cells, clock=machine.clock)
    sampler.run(8.0)
    counts = Counter({name: len(samples) for name, samples in sampler.samples.items()})
    assert counts["noisy"] > 4 * max(count for name, count in counts.items() if name != "noisy")


def test_it_stops_when_all_is_known() -> None:
    machine = VirtualMachine(0, noise=0.001)
    sampler_on(machine).run(1000.0)
    assert machine.now_s < 5.0


def test_a_slow_machine_gives_every_cell_one_sample_at_least() -> None:
    sampler = sampler_on(VirtualMachine(0, speed=lambda now_s: 1000.0))
    sampler.run(1.0)
    assert all(len(samples) == 1 for samples in sampler.samples.values())


def test_groups_get_their_share_of_the_time() -> None:
    machine = VirtualMachine(0, noise=0.3)
    groups = [
        Group("short", Cell("ref short", machine.work(5.0), ""), 0.4),
        Group("long", Cell("ref long", machine.work(70.0), ""), 0.6),
    ]
    cells = [Cell(f"s{i}", machine.work(4.0), "short", target=1e-9) for i in range(8)]
    cells += [Cell(f"l{i}", machine.work(45.0), "long", target=1e-9) for i in range(20)]
    sampler = Sampler(machine, groups, cells, clock=machine.clock)
    sampler.run(300.0)
    spent = Counter[str]()
    for samples in sampler.samples.values():
        for sample in samples:
            spent[sample.reference] += sample.ms + sample.before_ms  # type: ignore[assignment]
    assert 0.3 < spent["short"] / spent.total() < 0.5


def test_conditions_are_kept_per_round() -> None:
    machine = VirtualMachine(0, noise=0.02)
    sampler = sampler_on(machine)
    sampler.run(3.0)
    assert all(item.conditions["runs"] > 0 and item.conditions["throttled"] is False for item in sampler.rounds)
    assert sum(item.conditions["runs"] for item in sampler.rounds) == machine.runs


def test_a_seed_fixes_the_order() -> None:
    def order(seed: int) -> list[tuple[float, str]]:
        sampler = sampler_on(VirtualMachine(0, noise=0.02), seed)
        sampler.run(2.0)
        return sorted((s.started_s, s.cell) for samples in sampler.samples.values() for s in samples)

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_a_resumed_run_keeps_its_samples_and_leaves_finished_cells_alone(tmp_path: Path) -> None:
    first = sampler_on(VirtualMachine(0, noise=0.001), log=SampleLog(tmp_path))
    first.run(1000.0)
    again = VirtualMachine(5, noise=0.001)
    second = sampler_on(again, log=SampleLog(tmp_path))
    second.run(1000.0)
    assert again.runs == 0
    assert second.finish() == first.finish()


def test_a_resumed_run_spends_only_the_time_that_is_left(tmp_path: Path) -> None:
    first = sampler_on(VirtualMachine(0, noise=0.2), log=SampleLog(tmp_path))
    first.run(4.0)
    machine = VirtualMachine(1, noise=0.2)
    second = sampler_on(machine, log=SampleLog(tmp_path))
    second.run(6.0)
    assert 1.0 < machine.now_s < 3.0
    assert len(read_samples(tmp_path / "samples.csv")) > sum(map(len, first.samples.values()))
    rounds = [item.index for item in second.rounds]
    assert rounds == list(range(len(rounds)))


def test_a_torn_end_of_the_log_is_dropped(tmp_path: Path) -> None:
    log = SampleLog(tmp_path)
    sampler = sampler_on(VirtualMachine(0, noise=0.1), log=log)
    sampler.run(3.0)
    whole = log.read()
    with log.samples_path.open("a") as file:
        file.write("cell 1,blocks,99,1.0,2.0,3.0,4.0,1,0,0\ncell 2,blo")
    with log.rounds_path.open("a") as file:
        file.write('{"index": 99, "star')
    assert log.read() == whole
    assert log.samples_path.read_text().endswith("\n")


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from shiva_search.profiling.sample_log import SampleLog
from shiva_search.profiling.sampler import Cell, Group, InTurn, Sampler

class Clock:
    def time_ms(self, run, repeats=1):
        begun = time.perf_counter(); run(); return (time.perf_counter() - begun) * 1e3
    def settle(self, most_s=0.0): return True
    def conditions(self): return {{}}

def burn():
    until = time.perf_counter() + 0.0004
    while time.perf_counter() < until: pass

log = SampleLog(Path({folder!r}))
if not log.samples_path.exists():
    log.restart()
cells = [Cell(f"c{{i}}", burn, "g", target=1e-9) for i in range(5)]
Sampler(Clock(), [Group("g", Cell("r", burn, ""))], cells, round_s=0.02, log=log, seed=1).run(1000)
"""


def test_a_kill_at_any_point_leaves_a_log_that_loads_and_goes_on(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    log, known, whole = SampleLog(tmp_path), 0, 0
    for delay_s in (0.02, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", KILLED.format(root=root, folder=str(tmp_path))])
        until = time.monotonic() + 60
        while time.monotonic() < until and lines_of(log.rounds_path) <= whole:  # a round counts once its line is there
            time.sleep(0.01)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        samples, rounds = log.read()
        assert len(samples) > known
        assert {sample.round for sample in samples} <= {item.index for item in rounds}
        known, whole = len(samples), len(rounds)


def lines_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_what_is_captured_is_timed_in_place_of_the_run() -> None:
    """Once per cell, and once for each of the runs that take turns; the runs themselves are not timed any more."""
    machine, captured, ran = VirtualMachine(0, lambda now_s: 1.0), Counter[str](), Counter[str]()

    def work(name: str, ms: float) -> Callable[[], object]:
        def run() -> object:
            ran[name] += 1
            return machine.work(ms)()

        run.__name__ = name
        return run

    def capture(run: Callable[[], object]) -> Callable[[], object]:
        captured[run.__name__] += 1
        return machine.work(1.0 if run.__name__ == "reference" else 2.0)

    turns = InTurn([work(f"layer {i}", 5.0) for i in range(6)])
    cells = [Cell("block", turns, "blocks"), Cell("rest", work("rest", 5.0), "blocks")]
    groups = [Group("blocks", Cell("reference", work("reference", 5.0), ""))]
    sampler = Sampler(machine, groups, cells, capture=capture, clock=machine.clock)
    sampler.run(3.0)
    assert captured == {"reference": 1, "rest": 1, **{f"layer {i}": 1 for i in range(4)}}
    assert not ran
    assert {name: found.ratio for name, found in sampler.finish().items()} == pytest.approx({"block": 2.0, "rest": 2.0})
