"""Plots of a run, through matplotlib's objects: no window, no global figure.

In: rows of the run's CSV files, the plan, the summary and the cost model's file as read. Out: figures, or None where
there is nothing to draw. Predicted figures are blue circles, measured ones orange diamonds, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from shiva_search.records.cost import COST_FIELD
from shiva_search.records.files import write_atomic
from shiva_search.records.plan import Plan, choice_in_words
from shiva_search.records.run import Summary
from shiva_search.reporting.reading import is_chosen, plan_row
from shiva_search.reporting.tables import Row
from shiva_search.reporting.words import UNITS, inputs_in_words, number, part_of, percent

# Okabe and Ito's colours, told apart by all common kinds of colour vision; shapes differ as well.
PREDICTED, MEASURED, INK, QUIET, FAINT = "#0072b2", "#d55e00", "#222222", "#6b6b6b", "#c9c9c9"
SEQUENCE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
SHARE_COLOURS = LinearSegmentedColormap.from_list("share", ["#eef4f8", "#7fb2d3", "#0a4f80"])
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
BAND = 0.03  # the error that predictions are held to

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#ebebeb",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 160,
    "svg.hashsalt": "shiva-search",  # the same run gives the same file
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically; the suffix of the path chooses the format.

    Raises:
        InputError: the folder cannot be written.
    """
    undated = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context(_STYLE):
        write_atomic(path, lambda temporary: figure.savefig(temporary, metadata=undated))


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_formatter(_PLAIN)


def axis_label(field: str) -> str:
    """What an axis shows, with its unit, per denoising step."""
    if field == "mean_keep":
        return "tokens processed, share of dense"
    name, unit = UNITS[field]
    return f"{name} of one step ({unit})"


# ---- pareto ----------------------------------------------------------------------------------------------------------


def pareto_figure(trials: Sequence[Row], pareto: Sequence[Row], plan: Plan | None, summary: Summary) -> Figure | None:
    """Error over cost: every trial, the front, the chosen plan and the budget; a panel per limited quantity.

    A row that was measured again has a second point, joined to its prediction by an arrow.
    """
    # The error of a trial that was stopped early is not known.
    trials = [row for row in trials if row.get("state") in (None, "complete")]
    budget = summary.get("budget") or {}
    limits = {field: budget.get(metric) for metric, field in [*COST_FIELD.items(), ("mean_keep", "mean_keep")]}
    fields = [field for field, limit in limits.items() if limit is not None] or ["latency_ms"]
    dense_ms = part_of(summary, "dense").get("latency_ms")
    own = [plan_row(plan)] if plan else []  # the chosen plan need not lie on the front
    trials, pareto, own = (_at_one_speed(rows, dense_ms) for rows in (trials, pareto, own))
    chosen = [row for row in pareto if is_chosen(row, plan)] or own
    rows = [*trials, *pareto, *chosen]
    fields = [field for field in fields if any(_xy([row], _predicted(field)).size for row in rows)]
    if not fields:
        return None
    with _figure(7.2 if len(fields) == 1 else 4.6 * len(fields), 4.6) as figure:
        panels = figure.subplots(1, len(fields), sharey=True, squeeze=False)[0]
        for axes, field in zip(panels, fields, strict=True):
            _pareto_panel(axes, field, trials, pareto, chosen, summary, limits[field])
        panels[0].set_ylabel(f"output error on {inputs_in_words(summary, 'calibration')} (NMSE)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure


def _at_one_speed(rows: Sequence[Row], dense_ms: float | None) -> list[Row]:
    """Rows with latencies as shares of dense times one dense latency: a machine's speed drifts between measurements."""
    if not dense_ms:
        return list(rows)
    scaled = []
    for row in rows:
        known = {part: row.get(f"{part}_ratio") for part in ("predicted", "measured")}
        scaled.append(row | {f"{part}_latency_ms": share * dense_ms for part, share in known.items() if share})
    return scaled


def _predicted(field: str) -> str:
    return field if field == "mean_keep" else f"predicted_{field}"


def _xy(rows: Sequence[Row], *columns: str) -> np.ndarray:
    """The rows that know all the columns and their error: [rows, columns + 1], the error last."""
    wanted = (*columns, "error")
    known = [[row[name] for name in wanted] for row in rows if all(row.get(name) is not None for name in wanted)]
    return np.array(known, dtype=float).reshape(-1, len(wanted))


def _pareto_panel(
    axes: Axes,
    field: str,
    trials: Sequence[Row],
    pareto: Sequence[Row],
    chosen: Sequence[Row],
    summary: Summary,
    limit: float | None,
) -> None:
    predicted, measured = _predicted(field), f"measured_{field}"
    within = _xy([row for row in trials if row.get("feasible") is not False], predicted)
    over = _xy([row for row in trials if row.get("feasible") is False], predicted)
    if within.size:
        axes.plot(*within.T, "o", ms=3.5, mew=0, color="#9a9a9a", label="trial", gid="trials-within")
    if over.size:
        axes.plot(*over.T, "x", ms=4, mew=0.8, color="#b5b5b5", label="trial over a limit", gid="trials-over")
    front_rows = sorted(pareto, key=lambda row: row.get(predicted) or 0.0)
    front = _xy(front_rows, predicted)
    if front.size:
        # No other plan is better in error and latency; against another cost the same plans make no front.
        line = "-" if field == "latency_ms" or not _xy(front_rows, "predicted_latency_ms").size else ""
        axes.plot(
            *front.T, marker="o", ls=line, drawstyle="steps-post", color=PREDICTED, mfc="white", ms=5, lw=1.3,
            label="front, predicted", gid="front",
        )  # fmt: skip
    again = _xy([*pareto, *(row for row in chosen if row not in pareto)], predicted, measured)
    if again.size:
        axes.plot(again[:, 1], again[:, 2], "D", color=MEASURED, ms=5, label="measured again", gid="measured")
    picked = _xy(chosen, predicted)
    if picked.size:
        axes.plot(*picked[:1].T, "o", ms=13, mfc="none", mec=INK, mew=1.4, label="chosen plan", gid="chosen")
    _scale_error(axes, np.concatenate([_xy(trials, predicted), front, picked]))
    _join(axes, again)
    if limit is not None:
        _mark_limit(axes, limit, percent(limit) if field == "mean_keep" else f"{number(limit)} {UNITS[field][1]}")
    axes.set_xlabel(axis_label(field))
    if field == "mean_keep":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    elif dense := part_of(summary, "dense").get(field):
        top = axes.secondary_xaxis("top", functions=(lambda x: x / dense * 100, lambda x: x * dense / 100))
        top.set_xlabel("share of dense (%)", color=QUIET)


def _join(axes: Axes, again: np.ndarray) -> None:
    """A line from each prediction to its measurement, with a head where there is room for one."""
    for x_predicted, x_measured, error in again:
        (left, _), (right, _) = axes.transData.transform([(x_predicted, error), (x_measured, error)])
        roomy = abs(right - left) / axes.figure.dpi * 72 > 20
        head = {"arrowstyle": "-|>", "shrinkA": 3, "shrinkB": 4} if roomy else {"arrowstyle": "-", "shrinkA": 0}
        arrow = {"color": MEASURED, "lw": 1.2, "mutation_scale": 8, "zorder": 2.5, **head}
        axes.annotate("", (x_measured, error), (x_predicted, error), arrowprops=arrow)


def _mark_limit(axes: Axes, limit: float, text: str) -> None:
    """A line at the limit, with all beyond it shaded."""
    low, high = axes.get_xlim()
    high = max(high, limit + 0.05 * (limit - low))
    axes.axvline(limit, color=INK, ls="--", lw=1.2, gid="budget")
    axes.axvspan(limit, high, color="#f4f4f4", zorder=0, lw=0)
    axes.set_xlim(min(low, limit), high)
    axes.annotate(
        f"budget {text}", (limit, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right", va="top", rotation=90, fontsize=8,
    )  # fmt: skip


def _scale_error(axes: Axes, points: np.ndarray) -> None:
    """Logarithmic where errors span more than a decade, with a linear end where one is exactly zero."""
    errors = points[:, -1]
    above = errors[errors > 0]
    if above.size and above.max() / above.min() > 10:
        if (errors == 0).any():
            floor = 10.0 ** np.floor(np.log10(above.min()))
            axes.set_yscale("symlog", linthresh=floor, linscale=0.4)
            axes.set_ylim(bottom=-0.1 * floor)
            axes.yaxis.set_major_formatter(_PLAIN)
        else:
            _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)


# ---- schedule --------------------------------------------------------------------------------------------------------


def schedule_figure(plan: Plan) -> Figure:
    """Share of tokens kept over layers and timestep segments, with its numbers; skipped blocks are hatched.

    A block of which all tokens take the bypass is not skipped: "0 %", with the rank.
    """
    share_SL = np.array(plan.tokens_kept) / plan.tokens
    count = plan.layer_count
    with _figure(float(np.clip(0.62 * count + 1.6, 6.4, 13.0)), 1.3 + 0.55 * len(plan.segments)) as figure:
        axes = figure.subplots()
        axes.grid(False)
        mesh = axes.pcolormesh(share_SL * 100, cmap=SHARE_COLOURS, vmin=0, vmax=100)
        crowded = count > 26
        for (segment, layer), share in np.ndenumerate(share_SL):
            choice = plan.rows[segment][layer]
            skipped = share == 0 and not choice.rank
            if skipped:
                axes.fill_between(
                    [layer, layer + 1],
                    segment,
                    segment + 1,
                    facecolor="#f2f2f2",
                    edgecolor="#9a9a9a",
                    hatch="////",
                    lw=0,
                )
            text = "skip" if skipped else f"{share * 100:.0f}"
            if not crowded and not skipped:
                text = f"{share * 100:.0f} %\n{choice_in_words(choice, plan.tokens)}"
            axes.text(
                layer + 0.5, segment + 0.5, text, ha="center", va="center", fontsize=7 if crowded else 8,
                rotation=90 if crowded else 0, color="white" if share > 0.72 else INK,
                bbox={"facecolor": "#f2f2f2", "lw": 0, "pad": 1.5} if skipped else None,
            )  # fmt: skip
        axes.vlines(np.arange(count + 1), 0, len(plan.segments), color="white", lw=1.5)
        axes.hlines(np.arange(len(plan.segments) + 1), 0, count, color="white", lw=1.5)
        every = 5 if count > 40 else 2 if crowded else 1
        axes.set_xticks(np.arange(0, count, every) + 0.5, [str(layer) for layer in range(0, count, every)])
        axes.set_yticks(np.arange(len(plan.segments)) + 0.5, [_segment_name(*pair) for pair in plan.segments])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer")
        if len(plan.segments) > 1:
            axes.set_ylabel("time t (1 is noise)")
        axes.set_title(f"Tokens kept of {plan.tokens}, {percent(plan.mean_keep)} on average")
        figure.colorbar(mesh, ax=axes, label="tokens kept (%)", pad=0.01, ticks=[0, 50, 100]).outline.set_visible(False)
        return figure


def _segment_name(low: float, high: float) -> str:
    return "all steps" if (low, high) == (0.0, 1.0) else f"{low:.2g} to {high:.2g}"


# ---- cost model ------------------------------------------------------------------------------------------------------


def cost_model_figure(cost_model: Mapping[str, Any]) -> Figure | None:
    """Held-out plans, measured over predicted with a band of 3 %, and what a layer costs by tokens kept.

    Args:
        cost_model: cost_model.json as read: `held_out` with its errors and `ratios` ([predicted, measured] per plan,
            relative to dense), `layers` (signatures) and `curves` (tokens_kept and values by metric and signature).
    """
    held_out = cost_model.get("held_out") or {}
    ratios = np.array(held_out.get("ratios") or [], dtype=float).reshape(-1, 2)
    curves = (cost_model.get("curves") or {}).get("latency_ms") or {}
    count = bool(ratios.size) + bool(curves)
    if not count:
        return None
    with _figure(4.6 * count, 4.2) as figure:
        panels = list(figure.subplots(1, count, squeeze=False)[0])
        if ratios.size:
            _held_out_panel(panels.pop(0), ratios * 100, held_out)
        if curves:
            _layer_panel(panels.pop(0), curves, cost_model.get("layers") or [])
        return figure


def _held_out_panel(axes: Axes, plans: np.ndarray, figures: Mapping[str, Any]) -> None:
    low, high = plans.min(), plans.max()
    ends = np.array([low - 0.05 * (high - low) - 1, high + 0.05 * (high - low) + 1])
    axes.fill_between(
        ends, ends * (1 - BAND), ends * (1 + BAND), color="#dce9f2", lw=0, label=f"± {percent(BAND)}", gid="band"
    )
    axes.plot(ends, ends, color=QUIET, lw=0.8, ls="--")
    axes.plot(*plans.T, "D", color=MEASURED, ms=4.5, mec="white", mew=0.5, label="held-out plan", gid="held-out")
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="predicted latency (% of dense)")
    axes.set_ylabel("measured latency (% of dense)")
    known = [
        f"{words} {percent(figures[name])}"
        for name, words in (("median_error", "median error"), ("p95_error", "95th percentile"), ("bias", "bias"))
        if figures.get(name) is not None
    ]
    axes.set_title(f"{len(plans)} plans the fit has not seen")
    axes.text(0.97, 0.03, "\n".join(known), transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=INK)
    axes.legend(loc="upper left")


def _layer_panel(axes: Axes, curves: Mapping[str, Mapping[str, Any]], layers: Sequence[str]) -> None:
    for index, (signature, curve) in enumerate(curves.items()):
        users = [layer for layer, name in enumerate(layers) if name == signature]
        axes.plot(
            curve["tokens_kept"], curve["values"], "o-", ms=3, lw=1.3, color=SEQUENCE[index % len(SEQUENCE)],
            label=layers_in_words(users) if users else signature, gid=f"curve-{signature}",
        )  # fmt: skip
    axes.set(xlabel="tokens kept", ylabel="predicted latency of the layer (ms)", title="What a layer costs")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def layers_in_words(layers: Sequence[int]) -> str:
    """Ascending layers with runs drawn together: [0, 1, 2, 5] -> "layers 0 to 2, 5"."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {words}"


# ---- training --------------------------------------------------------------------------------------------------------

_ABOUT_TRAINING = {
    "loss": "loss",
    "distillation": "distillation loss",
    "diffusion": "diffusion loss",
    "error": "output error (NMSE)",
}


def training_figure(rows: Sequence[Row]) -> Figure | None:
    """Each recorded loss over the steps of all stages, as logged and smoothed."""
    names = [name for name in _ABOUT_TRAINING if sum(row.get(name) is not None for row in rows) > 1]
    if not names:
        return None
    columns = min(len(names), 2)
    bands = -(-len(names) // columns)
    with _figure(6.4 if columns == 1 else 8.0, 2.7 * bands + 0.3) as figure:
        panels = figure.subplots(bands, columns, squeeze=False)
        for axes, name in zip(panels.flat, names, strict=False):
            _training_panel(axes, rows, name)
        for axes in panels.flat[len(names) :]:
            axes.axis("off")
        figure.supxlabel("training step", size="medium")
        return figure


def _training_panel(axes: Axes, rows: Sequence[Row], name: str) -> None:
    everything = []
    for start, stage, steps, part in stages_of(rows):
        known = [(step, row[name]) for step, row in zip(steps, part, strict=True) if row.get(name) is not None]
        if not known:
            continue
        x, values = np.array(known, dtype=float).T
        everything.append(values)
        axes.plot(x, values, ".", color=FAINT, ms=3, gid=f"{name}-{stage}-logged")
        axes.plot(x, smoothed(values), color=PREDICTED, lw=1.5, gid=f"{name}-{stage}-smoothed")
        if start:
            axes.axvline(start, color=QUIET, lw=0.8, ls=":")
        axes.annotate(
            stage.replace("_", " "), (start, 1), (3, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=8, color=QUIET,
        )  # fmt: skip
    values = np.concatenate(everything)
    if (values > 0).all() and values.max() / values.min() > 10:
        _logarithmic(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(y=0.12)
    axes.set_title(_ABOUT_TRAINING[name])


def stages_of(rows: Sequence[Row]) -> Iterator[tuple[float, str, list[float], list[Row]]]:
    """Each stage: the step it starts at, its name, its steps counted over all stages, its rows."""
    start = 0.0
    for stage, group in groupby(rows, key=lambda row: str(row.get("stage") or "")):
        part = list(group)
        steps = [start + float(row.get("step") or 0) for row in part]
        yield start, stage, steps, part
        start = steps[-1]


def smoothed(values: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Mean over a window of `share` of the points around each one, cut off at the ends."""
    half = max(1, int(len(values) * share / 2))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[high] - sums[low]) / (high - low))


# ---- samples ---------------------------------------------------------------------------------------------------------


def samples_figure(dense_BHW: np.ndarray, planned_BHW: np.ndarray, titles: Sequence[str]) -> Figure:
    """Images of the dense model above those of the planned one, column by column from the same seed.

    Args:
        dense_BHW, planned_BHW: pixels in [-1, 1], with three channels last where they have color.
        titles: what each column was asked to show.
    """
    color = dense_BHW.ndim == 4
    per_row, side = (4, 2.4) if color else (10, 0.95)
    per_row = min(len(titles), per_row)
    bands = -(-len(titles) // per_row)
    with _figure(side * per_row + 0.7, bands * (2 * side + 0.35)) as figure:
        cells = figure.subplots(2 * bands, per_row, squeeze=False)
        for axes in cells.flat:
            axes.axis("off")
        for index, title in enumerate(titles):
            band, column = divmod(index, per_row)
            for offset, (name, images) in enumerate((("dense", dense_BHW), ("planned", planned_BHW))):
                axes = cells[2 * band + offset, column]
                # A color image has no scale of its own to set: its pixels lie in [0, 1].
                pixels = np.clip((images[index] + 1) / 2, 0, 1) if color else images[index]
                axes.imshow(pixels, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                if column == 0:
                    axes.text(-0.12, 0.5, name, transform=axes.transAxes, ha="right", va="center")
                if offset == 0:
                    axes.set_title(title, fontsize=8, loc="center")
        return figure
