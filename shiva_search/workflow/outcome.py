"""What came out of a run. In: the plan and its measurement. Out: plan.json, measurements.csv, summary.json, report."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from shiva_search import __version__
from shiva_search.models.model import Model
from shiva_search.records.budget import Budget
from shiva_search.records.cost import COST_FIELD, CostEstimate
from shiva_search.records.files import read_json, write_json
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.records.run import RunFolder
from shiva_search.reporting import tables
from shiva_search.reporting.html import build_report
from shiva_search.reporting.words import limits_in_words
from shiva_search.search import holds
from shiva_search.search.candidates import CONSTRAINT_NAMES
from shiva_search.search.closed_loop import usage
from shiva_search.workflow.answer import Answer

if TYPE_CHECKING:
    from shiva_search.devices.base import Device

#: Held-out samples behind the error that a run reports.
EVALUATION_SAMPLES = 256


_REPLAYED = (
    "a recorded profile answered, not a clock: what is called measured here was predicted; "
    "`shiva-search measure RUN` with a real --device measures it"
)


def write_outcome(
    run: RunFolder,
    model: Model,
    device: Device,
    plan: Plan,
    final: Measurement,
    budget: Budget,
    rounds: list[dict[str, Any]],
    error: float,
    seconds: dict[str, float],
    note: str | None,
) -> None:
    """Write plan.json, measurements.csv and summary.json."""
    kept = holds(budget, final)
    measured = {name: value for name, value in final.as_dict().items() if name not in ("tokens_kept", "conditions")}
    plan = plan.with_(
        measured=measured,
        fidelity={**plan.fidelity, "evaluation_error": error, "evaluation_samples": EVALUATION_SAMPLES},
    )
    plan.save(run.plan)
    known = tables.read_rows(run.measurements) or []
    row = {
        "round": len(known) + 1,
        "plan": "chosen",
        **plan.as_columns(),
        "predicted_latency_ms": plan.predicted.get("latency_ms"),
        "predicted_ratio": _share(plan.predicted.get("latency_ms"), plan.predicted.get("dense_latency_ms")),
        "holds": kept,
        **{name: value for name, value in measured.items() if name in tables.MEASUREMENTS},
        "conditions": dict(final.conditions),
    }
    tables.write_measurements(run.measurements, [*known, row])
    dense = {name.removeprefix("dense_"): value for name, value in measured.items() if name.startswith("dense_")}
    planned = {name: value for name, value in measured.items() if name in (*tables.UNITS, "ratio", "ratio_low",
               "ratio_high", "latency_ms_low", "latency_ms_high")}  # fmt: skip
    write_json(
        run.summary,
        {
            "schema_version": 1,
            "model": model.fingerprint(),
            "device": device.describe(),
            "workload": model.workload.as_dict(),
            "budget": {**budget.resolve(_dense_cost(final)).as_dict(), "shares": dict(budget.shares)},
            "holds": kept,
            "used": usage(budget, final),
            "dense": dense,
            "predicted": dict(plan.predicted),
            "measured": planned,
            "error": error,
            "error_split": "evaluation",
            "error_inputs": model.inputs_kind,
            "rounds": rounds,
            "seconds": seconds,
            "note": _note(note, final.replayed),
            "reasons": dict(final.reasons),
            "conditions": dict(final.conditions),
            "provenance": {"version": __version__, "torch": torch.__version__, **dict(plan.origin)},
            "plan": str(run.plan),
            **plan.as_columns(),
        },
    )


def _dense_cost(measured: Measurement) -> CostEstimate:
    """The dense model's cost in the measurement: what a share of it means here and now."""
    return CostEstimate(
        latency_ms=measured.dense_latency_ms,
        energy_j=measured.dense_energy_j,
        power_w=measured.dense_power_w,
        peak_memory_mib=measured.dense_peak_memory_mib,
        gflops=measured.dense_gflops,
    )


def answer_of(run: RunFolder) -> Answer:
    """Rebuild the report and say how the run stands."""
    files = build_report(run.path)
    summary, plan = read_json(run.summary, "summary"), Plan.from_file(run.plan)
    written = [path for path in sorted(run.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
    broken = None
    if not summary.get("holds"):
        broken = _broken_in_words(summary)

    def text() -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(tables.closing_table(summary, plan, written or files))  # type: ignore[arg-type]
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    return Answer(summary, text, broken)


def _broken_in_words(summary: Mapping[str, Any]) -> str:
    """Which limit a measured plan breaks, by how much, and what to do."""
    limits, found = limits_in_words(summary), summary["measured"]  # type: ignore[arg-type]
    used = (
        summary.get("used") or {}
    )  # a run of before may not say which limit it breaks: it is the latency's or unknown
    metric = max(used, key=lambda name: used[name] or 0.0, default="latency_ms" if "latency_ms" in limits else None)
    takes = (
        f"the measured plan takes {found['latency_ms']:.2f} ms ({found['ratio']:.1%} of dense, at most "
        f"{found['ratio_high']:.1%})"
    )
    if metric is None:
        takes += f" and breaks the budget of {', '.join(limits.values())}"
    elif metric == "latency_ms":
        share = summary["budget"].get("shares", {}).get(metric)
        which = "the upper end of which is over" if share is not None and found["ratio"] <= share else "over"
        takes += f", {which} the budget of {limits[metric]}"
    else:
        limit = limits[COST_FIELD.get(metric, metric)]
        takes += f" and {used[metric]:.3%} of the {CONSTRAINT_NAMES[metric].replace('_', ' ')} budget of {limit}"
    return (
        f"{takes} after all corrections; allow more, or measure again on a quieter machine with `shiva-search measure`"
    )


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _note(said: str | None, replayed: bool) -> str | None:
    """What there is to note of a run; of an earlier outcome's note that it was replayed only what still holds."""
    rest = (said or "").removesuffix(_REPLAYED).removesuffix("; ")
    return "; ".join(filter(None, [rest, _REPLAYED if replayed else ""])) or None
