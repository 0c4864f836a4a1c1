"""Profile a model block by block. In: a model and a device. Out: a Profile, saved as it grows.

Cells: each block signature at a grid of tokens kept, selection included; the selection alone; what lies outside the
blocks; and a few random plans from end to end, which tell what blocks measured one by one do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from shiva_search.devices.base import Device
from shiva_search.errors import InputError
from shiva_search.models.model import Layer, Model
from shiva_search.profiling.conditions import Part, check_place, deployed, is_meta, parts_of, record_inputs, without_blocks
from shiva_search.profiling.end_to_end import dense_cell, energy_reason, other_costs, plan_cell, random_rows, summary_of
from shiva_search.profiling.flops import ModelFlops
from shiva_search.profiling.sampler import Cell, Estimate, Group, SampleLog, Sampler
from shiva_search.profiling.staircase import Point, alignment_of, next_counts, token_grid
from shiva_search.records.plan import Plan
from shiva_search.records.profile import Forward, Profile, Row, Sample, load_profile
from shiva_search.runtime.apply import AppliedPlan, remove_plan
from shiva_search.runtime.pruned_block import Controller, PrunedBlock
from shiva_search.runtime.scorers import History, TokenScorer, scorer_by_name

Progress = Callable[[str], None]

_BLOCKS, _FORWARDS = "blocks", "forwards"
_SHARES = {_BLOCKS: 0.4, _FORWARDS: 0.6}
_PLANS = 28  # random plans from end to end, time permitting
_SAMPLES_PER_PLAN = 6
_OTHER_SHARE = 0.1  # of the time, for memory; more where there is an energy sensor
_ENERGY_SHARE = 0.3
_ENERGY_POINTS = 4
_PROBES = 24  # counts added to locate steps, per signature
_SAVE_EVERY = 5  # rounds


def profile_model(
    model: Model,
    device: Device,
    *,
    scorer: TokenScorer | str = "stride",
    seconds: float = 60.0,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = True,
    counts: Sequence[int] | None = None,
    plans: int | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure what a model costs on a device.

    Args:
        model: real, or on the meta device: then one block of each signature is made real, with random weights, and
            no plan is measured from end to end.
        device: where it runs; a replay device hands out its recording.
        scorer: what selects tokens inside each pruned cell; pass one that costs what the deployed one will.
        seconds: in all; each cell gets a sample in any case.
        seed: of orders, plans, inputs and made-up weights.
        folder: where the profile grows; an interrupted one found there is taken up, a complete one is returned.
        resume: False starts anew in any case.
        counts: tokens kept to measure; None: a grid that fits the device.
        plans: random plans from end to end; None: as many as the time allows.
        progress: told what is going on, a short line at a time.
        clock: seconds.

    Returns:
        The profile; complete.

    Raises:
        InputError: the folder holds a profile of something else, or cannot be written.
    """
    recorded: Profile | None = getattr(device, "profile", None)
    if recorded is not None:
        _check_same(recorded, model, None, f"{device.name}")
        return recorded
    check_place(model, device.torch_device)
    begun = clock()
    say = progress or (lambda line: None)
    place = Path(folder) if folder is not None else None
    scorer = scorer_by_name(scorer) if isinstance(scorer, str) else scorer
    if place is not None and resume and (place / "profile.json").exists():
        found = load_profile(place)
        _check_same(found, model, device, f"the profile in {place}")
        if found.complete:
            say(f"{place} holds a complete profile")
            return found
        seed = int(found.provenance.get("seed", seed))
    log = None if place is None else SampleLog(place)
    if log is not None and not (resume and (log.samples_path.parent / "profile.json").exists()):
        log.restart()
    remove_plan(model.module)
    say("counting operations")
    flops = ModelFlops(model, record_inputs(model, model.example(seed)))
    with deployed(model):
        bench = _Bench(model, device, scorer, seed, counts, clock)
        bench.prepare(log, plans, seconds)
        header = _header(bench, flops, scorer, seconds)

        def on_round(sampler: Sampler) -> None:
            bench.look_for_steps()
            if place is not None and len(sampler.rounds) % _SAVE_EVERY == 1:
                bench.assemble(header, flops, sampler.finish()).save_estimates(place)
            if len(sampler.rounds) % 5 == 1:
                say(f"{sampler.elapsed_s:.0f} of {seconds:.0f} s, {bench.open_count()} cells still open")

        try:
            if place is not None:
                header.save_estimates(place)
            share = _ENERGY_SHARE if bench.has_energy else _OTHER_SHARE
            spent_s = clock() - begun
            bench.sampler.run(max(0.0, seconds * (1 - share) - spent_s), on_round)
            say("memory and energy")
            bench.other_costs(seconds * share)
            found = bench.assemble(header, flops, bench.sampler.finish())
        finally:
            remove_plan(model.module)
    provenance = {**found.provenance, "seconds": bench.sampler.elapsed_s, "conditions": summary_of(bench.sampler)}
    found = replace(found, complete=True, provenance=provenance)
    if place is not None:
        found.save(place)
    return found


@dataclass(frozen=True)
class _BlockCell:
    signature: str
    tokens_kept: int
    selection: bool = False

    @property
    def name(self) -> str:
        return f"{'selection' if self.selection else 'block'} {self.signature} {self.tokens_kept}"


class _Bench:
    """Everything there is to measure of one model, as cells of one sampler."""

    def __init__(
        self,
        model: Model,
        device: Device,
        scorer: TokenScorer,
        seed: int,
        counts: Sequence[int] | None,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.device, self.scorer, self.seed, self.clock = model, device, scorer, seed, clock
        self.tokens = model.tokens
        self.alignment = alignment_of(device.torch_device.type, self.tokens)
        self.explores = counts is None
        self.counts = token_grid(self.tokens, self.alignment) if counts is None else _checked(counts, self.tokens)
        self.parts = {part.signature: part for part in parts_of(model, device.torch_device, seed)}
        self.has_energy = False
        self.blocks: dict[str, _BlockCell] = {}
        self.rows: list[tuple[int, ...]] = []
        self.others: dict[str, dict[str, float | None]] = {}
        self.sampler: Sampler
        self._t_B = model.times(model.example(seed)).to("meta" if is_meta(model) else device.torch_device)
        if self._t_B.is_meta:
            self._t_B = torch.full(self._t_B.shape, 0.5, device=device.torch_device)

    def prepare(self, log: SampleLog | None, plans: int | None, seconds: float) -> None:
        """Build the cells and time a dense forward, so that plans and time fit each other."""
        first = next(iter(self.parts.values()))
        reference = Cell("reference block", self._runner(first, self.tokens), "")
        groups = [Group(_BLOCKS, reference, _SHARES[_BLOCKS])]
        cells = [cell for part in self.parts.values() for k in self.counts for cell in self._cells(part, k)]
        cells.append(self._rest_cell())
        self.has_energy = energy_reason(self.device, reference) is None
        if not is_meta(self.model):
            dense = dense_cell(self.model, self.seed)
            groups.append(Group(_FORWARDS, dense, _SHARES[_FORWARDS]))
            dense.run()
            pair_s = 1.6e-3 * self.device.time_ms(dense.run)
            share_s = seconds * (1 - _OTHER_SHARE) * _SHARES[_FORWARDS]
            count = plans if plans is not None else max(6, min(_PLANS, int(share_s / pair_s / _SAMPLES_PER_PLAN)))
            # A random plan keeps counts of the grid, so that what it teaches is about counts that were measured.
            self.rows = random_rows(self.model.layer_count, self.tokens, count, self.seed, self.counts)
            workload = self.model.workload.as_dict()
            cells += [
                plan_cell(
                    self.model,
                    Plan.from_rows(self.model, [row], workload=workload),
                    self.scorer,
                    f"plan {' '.join(map(str, row))}",
                    self.seed,
                )
                for row in self.rows
            ]
        self.sampler = Sampler(self.device, groups, cells, seed=self.seed, log=log, clock=self.clock)

    def open_count(self) -> int:
        """Cells not known well enough yet."""
        return sum(len(self.sampler.open_cells(group)) for group in self.sampler.groups)

    def look_for_steps(self) -> None:
        """Add cells where a curve rises by more than its surroundings explain."""
        if not self.explores:
            return
        for part in self.parts.values():
            known = {}
            for key, cell in self.blocks.items():
                if cell.signature == part.signature and not cell.selection:
                    found = self.sampler.estimate(key)
                    if found is None or found.samples < 6:
                        return  # judge once all are there
                    known[cell.tokens_kept] = Point(found.ratio, found.half_width * found.ratio / 2)
            wanted = next_counts(known, self.tokens, self.alignment)
            room = _PROBES + len(self.counts) - len(known)
            for k in wanted[: max(0, room)]:
                self.sampler.add(self._cells(part, k, selection=False))

    def other_costs(self, seconds: float) -> None:
        """Peak memory of every cell; energy of a few per signature where there is a sensor."""
        cells = [self.sampler.cells[key] for key, cell in self.blocks.items() if not cell.selection]
        wanted = {key for part in self.parts.values() for key in self._energy_keys(part.signature)} | {"rest"}
        share_s = seconds / (len(wanted) + 1)
        for cell in [*cells, self.sampler.cells["rest"]]:
            if cell.name in wanted and self.has_energy:
                self.others[cell.name] = other_costs(self.device, cell, share_s)
            else:
                self.others[cell.name] = {"peak_memory_mib": self.device.peak_memory_mib(cell.run)}
        if _FORWARDS in self.sampler.groups:
            self.others["dense"] = other_costs(self.device, self.sampler.groups[_FORWARDS].reference, share_s)

    def assemble(self, header: Profile, flops: ModelFlops, estimates: Mapping[str, Estimate]) -> Profile:
        """A profile of what is known by now."""
        level_ms = self.sampler.reference_ms(_BLOCKS)
        if level_ms is None:
            return header
        rows = []
        for key, cell in self.blocks.items():
            known = estimates.get(key)
            if cell.selection or known is None:
                continue
            selection = estimates.get(replace(cell, selection=True).name)
            if cell.tokens_kept in (0, self.tokens):
                selection_ms: float | None = 0.0
            else:
                selection_ms = None if selection is None else selection.ratio * level_ms
            others = self.others.get(key, {})
            rows.append(
                Row(
                    cell.signature,
                    self.tokens,
                    cell.tokens_kept,
                    latency_ms=known.ratio * level_ms,
                    latency_ms_low=known.low * level_ms,
                    latency_ms_high=known.high * level_ms,
                    ratio=known.ratio,
                    ratio_low=known.low,
                    ratio_high=known.high,
                    samples=known.samples,
                    selection_ms=selection_ms,
                    energy_j=others.get("energy_j"),
                    power_w=others.get("power_w"),
                    peak_memory_mib=others.get("peak_memory_mib"),
                    gflops=flops.blocks[cell.signature](cell.tokens_kept),
                    flags=known.flags,
                )
            )
        rest = estimates.get("rest")
        rest_costs: dict[str, float | None] = {"gflops": flops.rest, **self.others.get("rest", {})}
        if rest is not None:
            rest_costs |= {
                "latency_ms": rest.ratio * level_ms,
                "latency_ms_low": rest.low * level_ms,
                "latency_ms_high": rest.high * level_ms,
            }
        order = list(self.parts)
        return replace(
            header,
            rows=tuple(sorted(rows, key=lambda row: (order.index(row.signature), row.tokens_kept))),
            forwards=self._forwards(estimates),
            rest=rest_costs,
            dense={"gflops": flops.dense, **self._dense_latency(), **self.others.get("dense", {})},
            missing=self._missing(),
            samples=self._raw_samples(),
        )

    def _cells(self, part: Part, k: int, selection: bool = True) -> list[Cell]:
        block = _BlockCell(part.signature, k)
        self.blocks[block.name] = block
        cells = [Cell(block.name, self._runner(part, k), _BLOCKS)]
        if selection and 0 < k < self.tokens:
            alone = replace(block, selection=True)
            self.blocks[alone.name] = alone
            cells.append(Cell(alone.name, self._runner(part, k, alone=True), _BLOCKS, target=0.1))
        return cells

    def _runner(self, part: Part, k: int, alone: bool = False) -> Callable[[], object]:
        """Runs the blocks of a part in turn through the runtime's own path; `alone` leaves the block itself out."""
        controller = Controller(
            rows=[[k] * self.model.layer_count],
            tokens=self.tokens,
            scorer=self.scorer,
            guidance=self.model.workload.guidance,
            t_B=self._t_B,
        )
        if getattr(self.scorer, "uses_history", False):
            x_BND = part.kwargs[part.layers[0].adapter.tokens]
            seen_BN = torch.ones(x_BND.shape[:2], device=x_BND.device)
            controller.history = History(seen_BN, seen_BN)
        turns = cycle(
            [PrunedBlock(layer, _identity(layer) if alone else layer.module.forward, controller) for layer in part.layers]
        )
        return lambda: next(turns)(**part.kwargs)

    def _rest_cell(self) -> Cell:
        """A forward in which every block is skipped."""
        model = without_blocks(self.model, self.device.torch_device, self.seed)
        inputs = model.example(self.seed)
        plan = Plan.dense(model, workload=model.workload.as_dict())

        def prepare() -> None:
            applied = AppliedPlan(model, plan, self.scorer)
            applied.controller.rows = [[0] * model.layer_count]

        # Skipped blocks never touch their weights, so those may exist as shapes only.
        return Cell("rest", lambda: model.module(**inputs), _BLOCKS, prepare=prepare, target=0.03)

    def _energy_keys(self, signature: str) -> list[str]:
        keys = [key for key, cell in self.blocks.items() if cell.signature == signature and not cell.selection]
        keys = [key for key in keys if self.blocks[key].tokens_kept >= self.tokens // 10]
        last = len(keys) - 1
        return [keys[round(i * last / (_ENERGY_POINTS - 1))] for i in range(_ENERGY_POINTS)] if keys else []

    def _forwards(self, estimates: Mapping[str, Estimate]) -> tuple[Forward, ...]:
        level_ms = self.sampler.reference_ms(_FORWARDS) if _FORWARDS in self.sampler.groups else None
        found = []
        for row in self.rows:
            known = estimates.get(f"plan {' '.join(map(str, row))}")
            if known is not None and level_ms is not None:
                found.append(
                    Forward(
                        row, known.ratio * level_ms, known.ratio, known.low, known.high, known.samples, flags=known.flags
                    )
                )
        return tuple(found)

    def _dense_latency(self) -> dict[str, float | None]:
        if _FORWARDS not in self.sampler.groups:
            return {}
        level_ms, interval = self.sampler.reference_ms(_FORWARDS), self.sampler.reference_interval_ms(_FORWARDS)
        if level_ms is None or interval is None:
            return {}
        return {"latency_ms": level_ms, "latency_ms_low": interval[0], "latency_ms_high": interval[1]}

    def _raw_samples(self) -> tuple[Sample, ...]:
        found = [sample for samples in self.sampler.samples.values() for sample in samples]
        return tuple(sorted(found, key=lambda sample: (sample.round, sample.started_s)))

    def _missing(self) -> dict[str, str]:
        missing = {}
        reason = energy_reason(self.device, next(iter(self.sampler.groups.values())).reference)
        for name in ("energy_j", "power_w"):
            missing[name] = reason or f"measured at {_ENERGY_POINTS} counts per signature; power is interpolated between"
        if not any(costs.get("peak_memory_mib") is not None for costs in self.others.values()):
            missing["peak_memory_mib"] = f"{self.device.name} does not report an allocator's peak"
        if is_meta(self.model):
            missing["forwards"] = "the model was profiled one block at a time and never whole in memory"
        missing["selection_ms"] = "counts added later to locate a step are measured with the block only"
        return missing


def _identity(layer: Layer) -> Callable[..., Any]:
    adapter = layer.adapter
    return lambda **kwargs: adapter.pack(kwargs[adapter.tokens], kwargs.get(adapter.context) if adapter.context else None)


def _checked(counts: Sequence[int], tokens: int) -> tuple[int, ...]:
    wrong = [k for k in counts if not 0 <= k <= tokens]
    if wrong:
        raise InputError(f"counts of tokens lie in [0, {tokens}], got {wrong[0]}; leave them out to use a grid")
    return tuple(sorted({0, *counts, tokens}))


def _header(bench: _Bench, flops: ModelFlops, scorer: TokenScorer, seconds: float) -> Profile:
    model, device = bench.model, bench.device
    return Profile(
        model=model.fingerprint(),
        device=device.name,
        tokens=model.tokens,
        layers=tuple(layer.signature for layer in model.layers),
        workload=model.workload.as_dict(),
        dense={"gflops": flops.dense},
        rest={"gflops": flops.rest},
        provenance={
            "device": device.describe(),
            "scorer": type(scorer).__name__,
            "seed": bench.seed,
            "seconds_asked": seconds,
            "token_alignment": bench.alignment,
            "threads": torch.get_num_threads(),
            "whole_model": not is_meta(model),
        },
        complete=False,
    )


def _check_same(found: Profile, model: Model, device: Device | None, what: str) -> None:
    """Refuse to mix profiles of different things.

    Raises:
        InputError: names what differs.
    """
    fingerprint = model.fingerprint()
    pairs: list[tuple[str, Any, Any]] = [
        (name, found.model.get(name), fingerprint[name]) for name in ("architecture", "config_hash", "tokens")
    ]
    pairs.append(("workload", dict(found.workload), model.workload.as_dict()))
    if device is not None:
        pairs.append(("device", found.device, device.name))
    differing = [f"{name} {was!r}, not {now!r}" for name, was, now in pairs if was != now]
    if differing:
        raise InputError(f"{what} is of {'; '.join(differing)}; choose another folder with --out, or profile anew")


__all__ = ["profile_model"]
