"""Tables of a run: CSV files with fixed columns, and the closing table in the terminal.

In: rows as dicts, and the run's summary. Out: CSV files and a rich table. A figure that is not known is an empty
cell in a file and a dash with a footnote in a table, never 0; predicted and measured never share a column.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from shiva_search.errors import InputError
from shiva_search.records.cost import COST_FIELD
from shiva_search.records.files import write_atomic
from shiva_search.records.plan import Plan, row_in_words
from shiva_search.records.run import Summary
from shiva_search.reporting.words import (
    UNITS,
    Footnotes,
    cost_in_words,
    error_in_words,
    inputs_in_words,
    limits_in_words,
    number,
    part_of,
    percent,
    plan_in_words,
    ratio_of,
)

Row = dict[str, Any]

_COST = ("latency_ms", "energy_j", "power_w", "peak_memory_mib", "gflops")
_PREDICTED = tuple(
    f"predicted_{name}" for name in ("latency_ms", "latency_ms_low", "latency_ms_high", "ratio", *_COST[1:])
)
_MEASURED = tuple(
    f"measured_{name}" for name in ("latency_ms", "latency_ms_low", "latency_ms_high", "ratio", *_COST[1:4])
)
_CONSTRAINTS = tuple(f"constraint_{metric}" for metric in (*COST_FIELD, "mean_keep"))  # cost - limit: above 0 breaks it

#: Columns of each file, in order (summary.json: records.run.Summary). tokens_kept is JSON, a row of k per segment.
_Columns = tuple[str, ...]
TRIALS: _Columns = (
    *("trial", "origin", "state", "tokens_kept", "bypass_ranks", "attend", "mean_keep", "error", "feasible"),
    *(*_PREDICTED, *_CONSTRAINTS, "seconds"),
)
PARETO: _Columns = (
    "trial",
    "tokens_kept",
    "bypass_ranks",
    "attend",
    "mean_keep",
    "error",
    *_PREDICTED,
    *_MEASURED,
    "chosen",
)
MEASUREMENTS: _Columns = (
    *("round", "plan", "tokens_kept", "bypass_ranks", "attend", "samples"),
    *("dense_latency_ms", "latency_ms", "latency_ms_low", "latency_ms_high"),
    *("ratio", "ratio_low", "ratio_high", "dense_energy_j", "energy_j", "dense_power_w", "power_w"),
    *("dense_peak_memory_mib", "peak_memory_mib", "dense_gflops", "gflops", "predicted_latency_ms", "predicted_ratio"),
    *("holds", "flags", "replayed", "reasons", "conditions"),
)
TRAINING: _Columns = ("stage", "step", "loss", "distillation", "diffusion", "error", "keep", "seconds")
COMPARE: _Columns = (
    *("method", "settings", "bypass_ranks", "attend"),  # settings: tokens_kept
    *("latency_ms", "latency_ms_low", "latency_ms_high", "ratio", "error", "note"),
)


# ---- CSV files -------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically: `columns` first, then what else the rows have, in order of appearance.

    None and numbers that are not finite become empty cells; lists and objects become JSON.

    Raises:
        InputError: the folder cannot be written.
    """
    rows = list(rows)
    header = [*dict.fromkeys([*columns, *(name for row in rows for name in row)])]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([_cell(row.get(name)) for name in header] for row in rows)

    write_atomic(path, write)


def read_rows(path: Path) -> list[Row] | None:
    """Read a CSV file of a run; None where there is none yet. Inverse of write_rows: empty cells become None.

    Raises:
        InputError: the file is there and cannot be read as a table.
    """
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read table {path}: {error}; restore it or run the stage again") from error
    header, body = (rows[0], rows[1:]) if rows else ([], [])
    for line, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise InputError(
                f"table {path} has {len(header)} columns, its row {line} has {len(row)} cells; "
                "restore it or run the stage again"
            )
    return [{name: _value(text) for name, text in zip(header, row, strict=True)} for row in body]


def write_trials(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write trials.csv: a row per evaluated plan, feasible or not, with its constraint values."""
    write_rows(path, rows, TRIALS)


def write_pareto(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write pareto.csv: a row per non-dominated plan; measured_* is filled for those measured again."""
    write_rows(path, rows, PARETO)


def write_measurements(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write measurements.csv: a row per plan measured interleaved with the dense model."""
    write_rows(path, rows, MEASUREMENTS)


def write_training(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write training.csv: a row per logged step of the selector's training."""
    write_rows(path, rows, TRAINING)


def write_compare(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write compare.csv: a row per alternative, measured on the same device in the same run."""
    write_rows(path, rows, COMPARE)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (bool, list, tuple, dict)):
        return json.dumps(value)
    return value


def _value(text: str) -> Any:
    if text == "":
        return None
    # What a cell can be besides text is JSON: numbers, true, false, lists, objects.
    if text[0] in "-0123456789tf[{":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


# ---- the closing table -----------------------------------------------------------------------------------------------


def closing_table(summary: Summary, plan: Plan | None = None, files: Sequence[Path] = ()) -> Table:
    """The last thing a run prints: dense, planned, budget, predicted, measured, error, files written.

    Args:
        summary: what the run came to; parts may be missing.
        plan: the chosen plan, for the row "planned".
        files: what was written; named relative to the folder they share.
    """
    notes = Footnotes()
    limits = limits_in_words(summary)
    parts = [part_of(summary, part) for part in ("dense", "predicted", "measured")]
    # Latency always; of the others what somebody knows, limits or gives a reason for.
    asked = {*limits, *(summary.get("reasons") or {})}
    fields = [f for f in UNITS if f == "latency_ms" or f in asked or any(part.get(f) is not None for part in parts)]

    def costs(part: str) -> str:
        names = {field: "" if field == "latency_ms" else f"{UNITS[field][0]} " for field in fields}
        return ", ".join(names[field] + cost_in_words(summary, part, field, notes) for field in fields)

    rows = [("dense", costs("dense"))]
    if plan is None:
        rows.append(("planned", notes.dash("plan.json: not there yet; `shiva-search optimize` makes it")))
    else:
        kept = "\n".join(row_in_words(row, plan.tokens) for row in plan.rows)
        rows.append(("planned", f"tokens kept {kept}\n{plan_in_words(plan)}"))
    named = [f"{UNITS[f][0] if f in UNITS else 'mean keep'} at most {text}" for f, text in limits.items()]
    rows.append(("budget", ", ".join(named) or "none set"))
    for part in ("predicted", "measured"):
        rows.append((part, costs(part) + _share_of_dense(summary, part)))
    split = f" on {inputs_in_words(summary, summary['error_split'])}" if summary.get("error_split") else ""
    meaning = f"{split} (squared difference to the dense output, normalised; 0 is dense)"
    rows.append(("error", error_in_words(summary, notes) + (meaning if summary.get("error") is not None else "")))
    if unsettled := (summary.get("conditions") or {}).get("unsettled"):
        rows.append(("unsettled", _unsettled_in_words(unsettled)))
    folders = {path.parent for path in files}
    if len(folders) == 1:
        rows.append(("files written", f"{folders.pop()}/: " + ", ".join(path.name for path in files)))
    else:
        rows.append(("files written", ", ".join(map(str, files)) or "none"))

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, Text(text))
    for mark, reason in notes.lines():
        table.add_row("", Text(f"{mark} {reason}"), style="dim")
    if note := summary.get("note"):
        table.add_row("note", Text(note))
    return table


def _share_of_dense(summary: Summary, part: str) -> str:
    """A line on a part's latency relative to dense: the machine's speed, then or now, is not in it."""
    ratio, predicted = ratio_of(summary, part), ratio_of(summary, "predicted")
    if not ratio:
        return ""
    if part == "predicted":
        dense_ms = part_of(summary, part).get("dense_latency_ms")
        then = f", which the profile puts at {number(dense_ms)} ms" if dense_ms else ""
        return f"\n{percent(ratio)} of dense{then}"
    foreseen = f"predicted {percent(predicted)}, measured " if predicted else ""
    text = f"\n{foreseen}{percent(ratio)} of dense, {1 / ratio:.2f} times as fast"
    if summary.get("holds") is not None:
        text += ": the budget holds" if summary["holds"] else ": the budget is broken"
    return text


def _unsettled_in_words(unsettled: Mapping[str, float]) -> str:
    """What the machine's placing of threads would have changed, where it placed them badly during the measurement."""
    share, change = unsettled["share_of_samples"], unsettled.get("ratio_change")
    fate = "left out" if share < 1 else "used as there were no others"
    text = f"{percent(share)} of the samples, {fate}: the machine had placed the threads badly"
    return text if change is None else f"{text}, and the plan's share of the dense latency differed by {change:+.1%}"
