"""What a run's folder holds, read once for plots and page.

In: the folder of a run, finished or interrupted. Out: RunFiles, with None or nothing where a file is not there yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shiva_search.errors import InputError
from shiva_search.records.files import read_json
from shiva_search.records.plan import Kept, Plan
from shiva_search.records.run import RunFolder, Summary
from shiva_search.reporting.tables import Row, read_rows

#: File of a run -> what it is, and the command that makes it; RUN stands for the run's folder.
MAKES = {
    "plan.json": ("the chosen plan", "shiva-search optimize --out RUN"),
    "summary.json": ("what the run came to", "shiva-search measure RUN"),
    "trials.csv": ("every plan the search evaluated", "shiva-search optimize --out RUN"),
    "pareto.csv": ("the plans no other one beats", "shiva-search optimize --out RUN"),
    "cost_model.json": ("the fitted cost model", "shiva-search optimize --out RUN"),
    "measurements.csv": ("measurements against the dense model", "shiva-search measure RUN"),
    "training.csv": ("the selector's training", "shiva-search train RUN"),
    "selector.safetensors": ("the trained selector", "shiva-search train RUN"),
    "samples.png": ("images of dense and planned model, same seeds", "shiva-search generate RUN"),
    "compare.csv": ("the alternatives, same device, same run", "shiva-search compare RUN"),
}


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's folder.

    Attributes:
        folder: where they came from.
        plan: the chosen plan, or None.
        summary: what the run came to; before summary.json is written, what the plan knows of itself.
        cost_model: cost_model.json as it is.
        trials, pareto, measurements, training, compare: rows of the CSV files.
    """

    folder: RunFolder
    plan: Plan | None
    summary: Summary
    cost_model: Mapping[str, Any]
    trials: Sequence[Row]
    pareto: Sequence[Row]
    measurements: Sequence[Row]
    training: Sequence[Row]
    compare: Sequence[Row]


def read_run(run_dir: Path) -> RunFiles:
    """Read what there is of a run.

    Raises:
        InputError: the folder holds no file of a run, or one of them cannot be read.
    """
    folder = RunFolder(run_dir)
    if not any((run_dir / name).is_file() for name in MAKES):
        raise InputError(
            f"no file of a run in {run_dir}; make one with, for example, "
            "`shiva-search optimize --max-latency 60% --out reports/run`"
        )
    plan = Plan.from_file(folder.plan) if folder.plan.is_file() else None
    return RunFiles(
        folder=folder,
        plan=plan,
        summary=_read_summary(folder, plan),
        cost_model=read_json(folder.cost_model, "cost model") if folder.cost_model.is_file() else {},
        trials=read_rows(folder.trials) or [],
        pareto=read_rows(folder.pareto_csv) or [],
        measurements=read_rows(folder.measurements) or [],
        training=read_rows(folder.training_csv) or [],
        compare=read_rows(folder.compare) or [],
    )


def _read_summary(folder: RunFolder, plan: Plan | None) -> Summary:
    if folder.summary.is_file():
        return cast(Summary, read_json(folder.summary, "summary"))
    if plan is None:
        return {}
    return {
        "model": dict(plan.model),
        "device": plan.device,
        "workload": dict(plan.workload),
        "budget": dict(plan.budget),
        "dense": {"latency_ms": plan.measured["dense_latency_ms"]} if "dense_latency_ms" in plan.measured else {},
        "predicted": dict(plan.predicted),
        "measured": dict(plan.measured),
        "error": plan.fidelity.get("error"),
        "error_split": str(plan.fidelity.get("split") or ""),
        "error_inputs": str(plan.fidelity.get("inputs") or ""),
    }


def choices_of(row: Mapping[str, Any], column: str = "tokens_kept") -> tuple[tuple[Kept, ...], ...]:
    """What each layer does in a row of a table, a tuple per timestep segment; empty where the row does not say.

    Args:
        row: with `Plan.as_columns`; where ranks and attention are left out, as in tables of before, counts are plain.
        column: of the tokens kept.
    """
    kept = row.get(column) or []
    if isinstance(kept, str):  # settings of a method that is no plan
        return ()
    kept = kept if not kept or isinstance(kept[0], list) else [kept]
    ranks = row.get("bypass_ranks") or [[0] * len(part) for part in kept]
    attend = row.get("attend") or [["kept"] * len(part) for part in kept]
    return tuple(
        tuple(Kept(*choice) for choice in zip(*part, strict=True)) for part in zip(kept, ranks, attend, strict=True)
    )


def is_chosen(row: Row, plan: Plan | None) -> bool:
    """Whether a row is the chosen plan: its layers do the same, or, without a plan, marked as chosen."""
    return choices_of(row) == plan.rows if plan else row.get("chosen") is True


def plan_row(plan: Plan) -> Row:
    """What a plan knows of itself, as a row of pareto.csv: it need not lie on the front."""
    latency_ms, dense_ms = (plan.predicted.get(name) for name in ("latency_ms", "dense_latency_ms"))
    return {
        **plan.as_columns(),
        "mean_keep": plan.mean_keep,
        "error": plan.fidelity.get("error"),
        **{f"predicted_{name}": value for name, value in plan.predicted.items()},
        "predicted_ratio": latency_ms / dense_ms if latency_ms and dense_ms else None,
        **{f"measured_{name}": value for name, value in plan.measured.items()},
    }
