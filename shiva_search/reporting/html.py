"""The report of a run: all plots drawn again, and one page that opens from disk without a network.

In: a run's folder, finished or interrupted. Out: the plots and report.html beside its files. Pictures are embedded and
styles inline, so the page can be sent on alone. What is not there yet is named with the command that makes it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from shiva_search.records.files import write_text
from shiva_search.records.plan import Kept, Plan, row_in_words
from shiva_search.records.run import Summary
from shiva_search.reporting import plots
from shiva_search.reporting.reading import MAKES, RunFiles, choices_of, is_chosen, read_run
from shiva_search.reporting.tables import Row
from shiva_search.reporting.words import (
    UNITS,
    Footnotes,
    cost_in_words,
    error_in_words,
    figure_in_words,
    held_out_in_words,
    inputs_in_words,
    limits_in_words,
    number,
    part_of,
    percent,
    plan_in_words,
    ratio_of,
)

TEMPLATE = "report.html.j2"

Cells = Sequence[str]


def build_report(run_dir: Path) -> list[Path]:
    """Draw every plot and the page again from the files of a run.

    Returns:
        The files written, the page last.

    Raises:
        InputError: no run there, one of its files cannot be read, or the folder cannot be written.
    """
    run = read_run(run_dir)
    folder = run.folder
    drawings = [
        (plots.pareto_figure(run.trials, run.pareto, run.plan, run.summary), (folder.pareto_png, folder.pareto_svg)),
        (plots.schedule_figure(run.plan) if run.plan else None, (folder.schedule_png,)),
        (plots.cost_model_figure(run.cost_model), (folder.cost_model_png,)),
        (plots.training_figure(run.training), (folder.training_png,)),
    ]
    written = []
    for figure, paths in drawings:
        if figure is not None:
            for path in paths:
                plots.save(figure, path)
                written.append(path)
    # Only what was drawn now is shown: a picture left from an earlier state must not pass for this one.
    shown = [path for path in [*written, folder.samples_png] if path.suffix == ".png" and path.is_file()]
    write_text(folder.report, render_page(run, {path.name: _data_uri(path) for path in shown}))
    return [*written, folder.report]


def _data_uri(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def render_page(run: RunFiles, pictures: Mapping[str, str]) -> str:
    """The page as HTML.

    Args:
        run: what the run's folder holds.
        pictures: data URIs of the plots and samples, by file name.
    """
    notes = Footnotes()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=_title(run.summary),
        subtitle=_subtitle(run.summary),
        verdict=_verdict(run),
        tiles=[*_tiles(run.summary, notes)],
        note=run.summary.get("note"),
        plan_words=plan_in_words(run.plan) if run.plan else "",
        schedule=_schedule_in_words(run.plan) if run.plan else "",
        costs=[*_cost_rows(run.summary, notes)],
        rounds=_round_rows(run.summary),
        held_out=held_out_in_words(run.cost_model.get("held_out") or {}),
        drift=_drift_in_words(run.summary),
        measurements=_measurement_rows(run.measurements, notes),
        trials_words=_trials_in_words(run.trials),
        front=_front_rows(run.pareto, run.plan, notes),
        alternatives=_alternative_rows(run.compare or run.summary.get("alternatives") or [], notes),
        seconds=[(stage.replace("_", " "), f"{s:.0f} s") for stage, s in (run.summary.get("seconds") or {}).items()],
        facts=[*_facts(run)],
        files=_file_rows(run),
        commands={name: command for name, (_, command) in MAKES.items()},
        pictures=pictures,
        footnotes=notes,
    )


# ---- head and verdict ------------------------------------------------------------------------------------------------


def _name(value: Any) -> str:
    return str(value.get("name") or value.get("architecture") or "") if isinstance(value, Mapping) else str(value or "")


def _title(summary: Summary) -> str:
    model = _name(summary.get("model")) or "A model"
    limits = limits_in_words(summary)
    return f"{model} within " + " and ".join(limits.values()) if limits else model


def _subtitle(summary: Summary) -> str:
    device, workload = summary.get("device"), summary.get("workload") or {}
    full_name = device.get("device_name") if isinstance(device, Mapping) else None
    words = [
        f"on {_name(device)}" + (f" ({full_name})" if full_name else "") if device else "",
        f"batch {workload['batch']}" if workload.get("batch") else "",
        str(workload.get("dtype") or ""),
        "with guidance" if workload.get("guidance") else "",
        "compiled" if workload.get("compile") else "",
        "as CUDA graphs" if workload.get("cuda_graph") else "",
        "one denoising step",
    ]
    return ", ".join(word for word in words if word)


def _verdict(run: RunFiles) -> Mapping[str, str]:
    summary, holds = run.summary, run.summary.get("holds")
    if run.plan is None:
        return {"kind": "open", "text": "No plan yet", "command": MAKES["plan.json"][1]}
    if holds is None:
        return {"kind": "open", "text": "Not measured yet", "command": MAKES["measurements.csv"][1]}
    measured, budget = part_of(summary, "measured"), part_of(summary, "budget")
    latency_ms, limit_ms = measured.get("latency_ms"), budget.get("latency_ms")
    figures = f": {number(latency_ms)} ms measured, {number(limit_ms)} ms allowed" if latency_ms and limit_ms else ""
    if holds:
        return {"kind": "holds", "text": f"The budget holds{figures}", "command": ""}
    return {"kind": "broken", "text": f"The budget is broken{figures}", "command": MAKES["plan.json"][1]}


def _tiles(summary: Summary, notes: Footnotes) -> Iterator[tuple[str, str]]:
    for part, label in (("dense", "dense"), ("measured", "planned, as measured")):
        yield label, cost_in_words(summary, part, "latency_ms", notes, interval=False)
    ratio = ratio_of(summary, "measured")
    yield "times as fast", f"{1 / ratio:.2f}" if ratio else notes.dash("speed-up: follows from a measurement")
    split = summary.get("error_split")
    yield "output error" + (f", {inputs_in_words(summary, split)}" if split else ""), error_in_words(summary, notes)


# ---- plan and costs --------------------------------------------------------------------------------------------------


def _schedule_in_words(plan: Plan) -> str:
    return f"Tokens kept of {plan.tokens}, layer by layer: {_rows_in_words(plan.rows)}"


def _rows_in_words(rows: Sequence[Sequence[Kept]]) -> str:
    """What each layer does, segments told apart by a stroke; the first layer keeps all tokens."""
    return " / ".join(row_in_words(row, row[0]) for row in rows)


def _cost_rows(summary: Summary, notes: Footnotes) -> Iterator[Cells]:
    limits = limits_in_words(summary)
    for field, (name, _) in UNITS.items():
        dense, predicted = (cost_in_words(summary, part, field, notes) for part in ("dense", "predicted"))
        if field == "latency_ms" and (dense_ms := part_of(summary, "predicted").get("dense_latency_ms")):
            predicted += f", with dense at {number(dense_ms)} ms"  # the profile's: the measured one is of another time
        yield (
            name,
            dense,
            limits.get(field, ""),
            predicted,
            cost_in_words(summary, "measured", field, notes),
        )
        if field == "latency_ms":
            ratios = [ratio_of(summary, part) for part in ("predicted", "measured")]
            yield "of its own dense latency", "", "", *(percent(ratio) if ratio else "" for ratio in ratios)


def _round_rows(summary: Summary) -> list[Cells]:
    words = {True: "holds", False: "broken"}
    return [
        (
            str(row.get("round", index)),
            _share(row.get("predicted_ratio")),
            _share(row.get("measured_ratio")),
            words.get(row.get("holds"), ""),  # type: ignore[arg-type]
            _rows_in_words(choices_of(row)),
        )
        for index, row in enumerate(summary.get("rounds") or [], start=1)
    ]


def _share(value: float | None) -> str:
    return percent(value) if value is not None else "–"


def _drift_in_words(summary: Summary) -> str:
    """What the quick check of a profile that was taken earlier found; empty where the profile was fresh."""
    drift = (summary.get("provenance") or {}).get("drift")
    if not drift:
        return ""
    level = f"{number(drift['scale'], 3)} times the recorded latency ({number(drift['scale_low'], 3)} to "
    level += f"{number(drift['scale_high'], 3)})"
    change = drift.get("largest_change")
    most = (
        "" if change is None else f"; the ratio that changed most, {drift['largest_change_of']}, by {percent(change)}"
    )
    return (
        f"The profile was taken earlier. Checked before the search, the device ran at {level}{most}: {drift['done']}."
    )


def _measurement_rows(rows: Sequence[Row], notes: Footnotes) -> list[Cells]:
    return [
        (
            str(row.get("plan") or index),
            figure_in_words(row, "dense_latency_ms", notes),
            figure_in_words(row, "latency_ms", notes),
            _share(row.get("ratio")),
            _share(row.get("predicted_ratio")),
            str(row.get("samples") or "–"),
            _rows_in_words(choices_of(row)),
            ", ".join(row.get("flags") or []),
        )
        for index, row in enumerate(rows, start=1)
    ]


# ---- the search and its alternatives ---------------------------------------------------------------------------------


def _trials_in_words(trials: Sequence[Row]) -> str:
    if not trials:
        return ""
    fitting = sum(row.get("feasible") is True for row in trials)
    early = sum(row.get("state") not in (None, "complete") for row in trials)
    stopped = f"; {early} were stopped early and are not drawn" if early else ""
    return f"{len(trials)} plans evaluated, {fitting} of them within the budget as predicted{stopped}."


def _front_rows(pareto: Sequence[Row], plan: Plan | None, notes: Footnotes) -> list[Cells]:
    return [
        (
            _rows_in_words(choices_of(row)),
            figure_in_words(row, "predicted_latency_ms", notes),
            _share(row.get("predicted_ratio")),
            figure_in_words(row, "measured_latency_ms", notes, "measured latency: only some plans are measured again"),
            _share(row.get("measured_ratio")),
            number(row["error"], 3) if row.get("error") is not None else "–",
            "chosen" if is_chosen(row, plan) else "",
        )
        for row in pareto
    ]


def _alternative_rows(rows: Sequence[Mapping[str, Any]], notes: Footnotes) -> list[Cells]:
    return [
        (
            " ".join(filter(None, [row.get("method"), _settings_in_words(row)])),
            figure_in_words(row, "latency_ms", notes, str(row.get("note") or "")),
            _share(row.get("ratio")),
            number(row["error"], 3) if row.get("error") is not None else notes.dash(str(row.get("note") or "")),
        )
        for row in rows
    ]


def _settings_in_words(row: Mapping[str, Any]) -> str:
    """Of a method that is no plan, as they are."""
    return _rows_in_words(choices_of(row, "settings")) or str(row.get("settings") or "")


# ---- conditions ------------------------------------------------------------------------------------------------------


def _facts(run: RunFiles) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Groups of named facts: what was run, where, and how it was found."""
    summary = run.summary
    groups: dict[str, Any] = {
        "model": summary.get("model"),
        "device": summary.get("device"),
        "workload": summary.get("workload"),
        "conditions": summary.get("conditions"),
        "solver": run.plan.solver if run.plan else None,
        "origin": {**(run.plan.origin if run.plan else {}), **(summary.get("provenance") or {})},
    }
    for name, value in groups.items():
        facts = list(_flat(value if isinstance(value, Mapping) else {"name": value}))
        if facts:
            yield name, facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}, ")
        elif value is not None and value != "":
            text = number(value) if isinstance(value, float) else str(value)
            yield (prefix + key).replace("_", " "), text


def _file_rows(run: RunFiles) -> list[Cells]:
    return [
        (name, what, "there" if (run.folder.path / name).is_file() else f"not yet: {command}")
        for name, (what, command) in MAKES.items()
    ]
