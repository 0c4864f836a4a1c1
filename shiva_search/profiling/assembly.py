"""What a bench has measured, as a profile. In: a bench, estimates of its cells. Out: a Profile's rows and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shiva_search.profiling.bench import BLOCKS, ENERGY_POINTS, FORWARDS, Bench, plan_name
from shiva_search.profiling.conditions import is_meta
from shiva_search.profiling.end_to_end import energy_reason
from shiva_search.profiling.flops import ModelFlops
from shiva_search.profiling.staircase import edges
from shiva_search.profiling.statistics import Estimate
from shiva_search.records.plan import PLAIN
from shiva_search.records.profile import Forward, Profile, Row, Sample


def assemble(bench: Bench, header: Profile, flops: ModelFlops, estimates: Mapping[str, Estimate]) -> Profile:
    """A profile of what is known by now.

    Args:
        bench: what was measured, and how.
        header: a profile without rows.
        flops: counted, not measured.
        estimates: of the cells that are known, by name.
    """
    level_ms = bench.sampler.reference_ms(BLOCKS)
    if level_ms is None:
        return header
    rest = estimates.get("rest")
    rest_costs: dict[str, float | None] = {"gflops": flops.rest, **bench.others.get("rest", {})}
    if rest is not None:
        rest_costs |= {
            "latency_ms": rest.ratio * level_ms,
            "latency_ms_low": rest.low * level_ms,
            "latency_ms_high": rest.high * level_ms,
        }
    found = {
        signature: list(edges(bench.points(signature, estimates), bench.tokens, bench.alignment))
        for signature in bench.parts
    }
    return replace(
        header,
        rows=_rows(bench, flops, estimates, level_ms),
        forwards=_forwards(bench, estimates),
        rest=rest_costs,
        dense={"gflops": flops.dense, **_dense_latency(bench), **bench.others.get("dense", {})},
        missing=_missing(bench),
        provenance={**header.provenance, "edges": found},
        samples=_raw_samples(bench),
    )


def _rows(bench: Bench, flops: ModelFlops, estimates: Mapping[str, Estimate], level_ms: float) -> tuple[Row, ...]:
    """A row per block and choice, by signature, variant and tokens kept."""
    rows = []
    for key, cell in bench.blocks.items():
        known = estimates.get(key)
        if cell.selection or known is None:
            continue
        selection = estimates.get(replace(cell, selection=True).name)
        if cell.tokens_kept in (0, bench.tokens):
            selection_ms: float | None = 0.0
        else:
            selection_ms = None if selection is None else selection.ratio * level_ms
        others = bench.others.get(key, {})
        rows.append(
            Row(
                cell.signature,
                bench.tokens,
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
                gflops=flops.blocks[cell.signature](cell.choice),
                flags=known.flags,
                bypass_rank=cell.choice.rank,
                attend=cell.choice.attend,
            )
        )
    order = list(bench.parts)
    rows.sort(key=lambda row: (order.index(row.signature), row.variant != PLAIN, row.variant, row.tokens_kept))
    return tuple(rows)


def _forwards(bench: Bench, estimates: Mapping[str, Estimate]) -> tuple[Forward, ...]:
    """Plans from end to end."""
    level_ms = bench.sampler.reference_ms(FORWARDS) if FORWARDS in bench.sampler.groups else None
    found = []
    for row in bench.rows:
        known = estimates.get(plan_name(row))
        if known is not None and level_ms is not None:
            found.append(
                Forward(
                    row,
                    known.ratio * level_ms,
                    known.ratio,
                    known.low,
                    known.high,
                    known.samples,
                    flags=known.flags,
                )
            )
    return tuple(found)


def _dense_latency(bench: Bench) -> dict[str, float | None]:
    if FORWARDS not in bench.sampler.groups:
        return {}
    level_ms, interval = bench.sampler.reference_ms(FORWARDS), bench.sampler.reference_interval_ms(FORWARDS)
    if level_ms is None or interval is None:
        return {}
    return {"latency_ms": level_ms, "latency_ms_low": interval[0], "latency_ms_high": interval[1]}


def _raw_samples(bench: Bench) -> tuple[Sample, ...]:
    found = [sample for samples in bench.sampler.samples.values() for sample in samples]
    return tuple(sorted(found, key=lambda sample: (sample.round, sample.started_s)))


def _missing(bench: Bench) -> dict[str, str]:
    """Why a quantity is not there, or how much of it was measured."""
    missing = {}
    reason = energy_reason(bench.device)
    for name in ("energy_j", "power_w"):
        missing[name] = reason or f"measured at {ENERGY_POINTS} counts per signature; power is interpolated between"
    if any(costs.get("peak_memory_mib") is not None for costs in bench.others.values()):
        missing["peak_memory_mib"] = "measured at as many counts as time allowed; interpolated between"
    else:
        missing["peak_memory_mib"] = f"{bench.device.name} does not report an allocator's peak"
    if is_meta(bench.model):
        missing["forwards"] = "the model was profiled one block at a time and never whole in memory"
    missing["selection_ms"] = "counts added later to locate a step are measured with the block only"
    return missing
