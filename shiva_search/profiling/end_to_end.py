"""Whole forwards, planned next to dense. In: a model, plans, a device. Out: measured costs, each with its interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shiva_search.devices.base import Device, Run
from shiva_search.errors import InputError
from shiva_search.models.blocks import Kwargs
from shiva_search.models.model import Model
from shiva_search.profiling.conditions import check_place, deployed, is_meta, record_inputs
from shiva_search.profiling.flops import ModelFlops
from shiva_search.profiling.sampler import Cell, Group, Sampler
from shiva_search.profiling.statistics import Estimate
from shiva_search.records.cost_table import load_cost_table
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan, remove_plan
from shiva_search.runtime.scorers import TokenScorer

Progress = Callable[[str], None]
_ENERGY_SHARE = 0.3  # of the time, where the device has a sensor
#: Measurements, at most, until one has seen the device settled.
SETTLED_TRIES = 3
_STEADY = 0.005  # half-width at which a plan's ratio needs no more time


def measure_plans(
    model: Model,
    plans: Sequence[Plan],
    device: Device,
    *,
    scorer_for: Callable[[Plan], TokenScorer | str] = lambda plan: "stride",
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure plans and the dense model in one interleaved run.

    Each planned forward runs between two dense ones and is compared with these. A plan of several segments is measured
    segment by segment and averaged over time. On a replay device the recorded cost model answers, and says so.

    Args:
        plans: for this model.
        scorer_for: what each plan selects with; a selector with bypasses brings what rejected tokens do.
        seconds: for all plans together; each gets one sample in any case.
        seed: of the order and the inputs.
        clock: seconds.

    Returns:
        One Measurement per plan, in order.

    Raises:
        InputError: no plans, a plan for another model, or weights on another device.
    """
    if not plans:
        raise InputError("measuring needs at least one plan, got none; pass a plan, or Plan.dense(model)")
    recorded = getattr(device, "folder", None)
    if recorded is not None:
        table = load_cost_table(recorded)
        for plan in plans:
            table.check(plan, model.fingerprint())
        return [table.replay(plan) for plan in plans]
    check_place(model, device.torch_device)
    if is_meta(model):
        raise InputError(
            f"{model.name} exists only as shapes here, so no whole forward can be measured; profile its blocks instead"
        )
    flops = ModelFlops(model, record_inputs(model, model.example(seed)))
    with deployed(model):
        runs = [
            _PlannedForward(model, plan, scorer_for(plan), segment, model.example(seed))
            for plan in plans
            for segment in range(len(plan.segments))
        ]
        reference = dense_cell(model, seed)
        keys = [(index, segment) for index, plan in enumerate(plans) for segment in range(len(plan.segments))]
        cells = {
            key: Cell(f"plan {key[0]}/{key[1]}", run.run, "forwards", prepare=run.prepare, target=_STEADY)
            for key, run in zip(keys, runs, strict=True)
        }
        groups = [Group("forwards", reference)]
        capture = capture_for(model, device)
        sampler = Sampler(device, groups, list(cells.values()), seed=seed, capture=capture, clock=clock)
        try:
            has_energy = energy_reason(device) is None
            sampler.run(seconds * (1 - _ENERGY_SHARE if has_energy else 1), _report(progress, len(cells)))
            estimates = sampler.finish()
            share_s = seconds * _ENERGY_SHARE / (len(cells) + (2 if has_energy else 1))
            before = other_costs(sampler, device, reference, share_s)
            costs = {key: other_costs(sampler, device, cell, share_s) for key, cell in cells.items()}
            # Power rises as a device warms up, so the plans' energy, too, is taken between two of the dense model.
            after = other_costs(sampler, device, reference, share_s) if has_energy else before
            dense_costs = {name: _mean([(before[name], 0.5), (after[name], 0.5)]) for name in before}
        finally:
            remove_plan(model.module)
    dense_ms = sampler.reference_ms("forwards")
    assert dense_ms is not None  # every cell has a sample
    conditions = summary_of(sampler)
    dense: dict[str, Any] = {f"dense_{name}": value for name, value in dense_costs.items()}
    found = []
    for index, plan in enumerate(plans):
        weights = {(index, i): high - low for i, (low, high) in enumerate(plan.segments)}
        ratio = average_over_time([(estimates[cells[key].name], weight) for key, weight in weights.items()])
        mine: dict[str, Any] = {
            name: _mean([(costs[key][name], weight) for key, weight in weights.items()]) for name in dense_costs
        }
        peaks = [costs[key]["peak_memory_mib"] for key in weights]
        mine["peak_memory_mib"] = None if None in peaks else max(peaks)  # type: ignore[type-var]
        if mine["energy_j"] is not None:
            mine["power_w"] = _mean([(costs[key]["power_w"], weight) for key, weight in weights.items()])
        found.append(
            Measurement(
                tokens_kept=plan.rows,
                latency_ms=ratio.ratio * dense_ms,
                latency_ms_low=ratio.low * dense_ms,
                latency_ms_high=ratio.high * dense_ms,
                dense_latency_ms=dense_ms,
                ratio=ratio.ratio,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                samples=ratio.samples,
                gflops=flops.plan(plan),
                dense_gflops=flops.dense,
                **mine,
                **dense,
                reasons=_reasons(device, mine),
                conditions=conditions,
                flags=ratio.flags,
            )
        )
    return found


def measure_settled(
    measure: Callable[[], Measurement], progress: Progress | None = None, tries: int = SETTLED_TRIES
) -> Measurement:
    """A measurement, taken again where the device was never settled meanwhile: its ratios are those of no other time.

    Args:
        measure: takes one.
        tries: measurements, at most.

    Returns:
        The first of a settled device; where there was none, the last, flagged "unsettled".
    """
    for left in reversed(range(tries)):
        found = measure()
        if "unsettled" not in found.flags or not left:
            break
        if progress:
            progress("the machine placed threads badly all along; measuring once more")
    return found


def dense_cell(model: Model, seed: int = 0) -> Cell:
    """The untouched model, all hooks off."""
    inputs = model.example(seed)
    return Cell("dense", lambda: model.module(**inputs), "", prepare=lambda: remove_plan(model.module))


def plan_cell(model: Model, plan: Plan, scorer: TokenScorer | str, name: str, seed: int = 0) -> Cell:
    """A plan of one segment from end to end."""
    run = _PlannedForward(model, plan, scorer, 0, model.example(seed))
    return Cell(name, run.run, "forwards", prepare=run.prepare)


class _PlannedForward:
    """One segment of a plan: hooks on before the clock starts, one forward inside it."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        scorer: TokenScorer | str,
        segment: int,
        inputs: Kwargs,
    ) -> None:
        self._model, self._plan, self._scorer = model, plan, scorer
        self._inputs = inputs
        self._applied: AppliedPlan | None = None
        if len(plan.segments) > 1:
            low, high = plan.segments[segment]
            name = model.family.timestep_argument
            middle = (low + high) / 2 * model.family.timestep_scale
            self._inputs = {**inputs, name: torch.full_like(inputs[name], middle)}

    def prepare(self) -> None:
        if self._applied is None:
            self._applied = AppliedPlan(self._model, self._plan, self._scorer)
        else:
            self._applied.put_on()  # what was compiled for it is used again

    def run(self) -> object:
        return self._model.module(**self._inputs)


def random_rows(
    layer_count: int, tokens: int, count: int, seed: int, counts: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Random plans as a search would try them: first layer dense, some layers at 0, some dense, the rest anywhere.

    In every other plan most layers are at 0 or dense, as in the plans that searches return.

    Args:
        layer_count: layers.
        tokens: N.
        count: how many plans.
        seed: of the draw.
        counts: numbers of tokens to choose from; None: any.

    Returns:
        One row of tokens kept per plan; mean keep is spread over about 0.2 to 0.95.
    """
    rng = np.random.default_rng(seed)
    allowed = None if counts is None else np.array(sorted(counts))
    rows = []
    for index in range(count):
        # Stratified in the mean, so that few plans already span cheap to dear.
        centre = 0.1 + 0.9 * (index + rng.random()) / count
        share = rng.beta(4 * centre + 0.2, 4 * (1 - centre) + 0.2, size=layer_count)
        special = rng.random(layer_count)
        none, every = (0.24, 0.4) if index % 2 else (0.7, 0.7)
        share[special < none * (1 - centre)] = 0.0
        share[special > 1 - every * centre] = 1.0
        row = np.round(share * tokens).astype(int)
        if allowed is not None:
            row = allowed[np.abs(row[:, None] - allowed).argmin(axis=1)]
        row[0] = tokens
        rows.append(tuple(int(k) for k in row))
    return [rows[i] for i in rng.permutation(count)]


def average_over_time(parts: Sequence[tuple[Estimate, float]]) -> Estimate:
    """Mean of independent estimates by weight; weights add up to 1."""
    ratio = sum(weight * part.ratio for part, weight in parts)
    below = math.sqrt(sum((weight * (part.ratio - part.low)) ** 2 for part, weight in parts))
    above = math.sqrt(sum((weight * (part.high - part.ratio)) ** 2 for part, weight in parts))
    flags = tuple(dict.fromkeys(flag for part, _ in parts for flag in part.flags))
    disturbed = max(part.disturbed for part, _ in parts)
    return Estimate(ratio, ratio - below, ratio + above, sum(part.samples for part, _ in parts), disturbed, flags)


def energy_reason(device: Device) -> str | None:
    """Why the device has no energy, or None; asks the sensors, measures nothing."""
    for report in device.sensors():
        if report.what == "energy_j":
            return None if report.available else report.how
    return f"{device.name} has no energy sensor"


def capture_for(model: Model, device: Device) -> Callable[[Run], Run] | None:
    """What turns runs into CUDA graphs, where the workload asks for them."""
    return device.capture if model.workload.cuda_graph else None


def other_costs(sampler: Sampler, device: Device, cell: Cell, seconds: float) -> dict[str, float | None]:
    """Energy, power and peak memory of one cell, None where the device has no sensor.

    Energy is of what is timed. A graph's replay allocates nothing, so memory is that of the run it was made of.
    """
    if cell.prepare is not None:
        cell.prepare()
    costs: dict[str, float | None] = {"energy_j": None, "power_w": None}
    if energy_reason(device) is None:
        energy = device.measure_energy(sampler.timed_run(cell), seconds)
        costs = {"energy_j": energy.energy_j_per_run, "power_w": energy.power_w}
    if cell.prepare is not None:
        cell.prepare()
    return {**costs, "peak_memory_mib": device.peak_memory_mib(cell.run)}


def summary_of(sampler: Sampler) -> dict[str, Any]:
    """Conditions of a whole run: sums of what was counted, median and maximum of what was read."""
    summary: dict[str, Any] = {"rounds": len(sampler.rounds), "seconds": sampler.elapsed_s}
    names = dict.fromkeys(name for item in sampler.rounds for name in item.conditions)
    for name in names:
        values = [item.conditions.get(name) for item in sampler.rounds]
        numbers = [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if numbers:
            summary[name] = {"median": float(np.median(numbers)), "max": max(numbers), "sum": sum(numbers)}
        elif any(isinstance(value, bool) for value in values):
            summary[name] = {"rounds": sum(bool(value) for value in values)}
    unsettled = sampler.unsettled()
    return {**summary, "unsettled": unsettled} if unsettled else summary


def _mean(parts: Sequence[tuple[float | None, float]]) -> float | None:
    values = [(value, weight) for value, weight in parts if value is not None]
    return sum(value * weight for value, weight in values) if len(values) == len(parts) else None


def _reasons(device: Device, costs: Mapping[str, float | None]) -> dict[str, str]:
    reasons = {}
    energy = energy_reason(device) or "the energy sensor gave no reading in the time it had"
    for name, value in costs.items():
        if value is None:
            reasons[name] = energy if name in ("energy_j", "power_w") else f"{device.name} does not report it"
    return reasons


def _report(progress: Progress | None, cells: int) -> Callable[[Sampler], None]:
    def on_round(sampler: Sampler) -> None:
        if progress is not None and len(sampler.rounds) % 10 == 0:
            progress(f"measured {cells} plans for {sampler.elapsed_s:.0f} s")

    return on_round
