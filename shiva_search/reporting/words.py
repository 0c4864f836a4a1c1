"""Figures of a run in words, as the terminal, the plots, the page and the model card say them.

In: the run's summary and plan. Out: texts with units. A figure that is not known is a dash whose footnote says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from shiva_search.records.cost import COST_FIELD
from shiva_search.records.plan import Plan
from shiva_search.records.run import Summary

#: Cost field -> its name in words and its unit.
UNITS = {
    "latency_ms": ("latency", "ms"),
    "energy_j": ("energy", "J"),
    "power_w": ("power", "W"),
    "peak_memory_mib": ("peak memory", "MiB"),
    "gflops": ("work", "GFLOP"),
}


def number(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent: 184.2, 12.31, 0.0412, 15300."""
    if value == 0:
        return "0"
    # The exponent is taken after rounding: 9.9999 becomes 10.00.
    decimals = digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{round(value, decimals):.{max(decimals, 0)}f}"


def percent(share: float) -> str:
    """A share as a percentage: 0.641 -> "64.1 %", 0.65 -> "65 %"."""
    return f"{share * 100:.1f}".removesuffix(".0") + " %"


class Footnotes:
    """Numbers the reasons why figures are missing, each once."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def dash(self, reason: str) -> str:
        """A dash that carries the number of its reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return "–" + _raised(self.reasons.index(reason) + 1)

    def lines(self) -> list[tuple[str, str]]:
        """Mark and reason of each footnote."""
        return [(_raised(index), reason) for index, reason in enumerate(self.reasons, start=1)]


def _raised(index: int) -> str:
    return str(index).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def part_of(summary: Summary, part: str) -> Mapping[str, Any]:
    """The costs "dense", "predicted" or "measured" of a summary; empty where they are not there yet."""
    return cast("Mapping[str, Any]", summary).get(part) or {}


def why_missing(summary: Summary, part: str, field: str) -> str:
    """Why a figure of a part ("dense", "predicted", "measured") is missing: as recorded, or what would make it."""
    reasons = summary.get("reasons") or {}
    name = UNITS[field][0] if field in UNITS else field
    for key in (f"{part}_{field}", field):
        if reasons.get(key):
            return str(reasons[key])
    if not part_of(summary, part):
        return f"{part}: {_not_there('optimize' if part == 'predicted' else 'measure')}"
    return f"{name}: not {'known' if part == 'predicted' else 'measured'}, and no reason recorded"


def cost_in_words(summary: Summary, part: str, field: str, notes: Footnotes, *, interval: bool = True) -> str:
    """One figure of a part with its unit and, where known, its interval; a dash with a footnote otherwise."""
    figures = part_of(summary, part)
    return figure_in_words(figures, field, notes, why_missing(summary, part, field), interval=interval)


def figure_in_words(
    figures: Mapping[str, Any], field: str, notes: Footnotes, reason: str = "", *, interval: bool = True
) -> str:
    """A figure by the name it has in a row or part, such as "measured_latency_ms"; a dash with a footnote if empty.

    Args:
        reason: why it may be missing, where the row's own `reasons` do not say.
    """
    name, unit = next(about for known, about in UNITS.items() if field.endswith(known))
    value = figures.get(field)
    if value is None:
        recorded = (figures.get("reasons") or {}).get(field)
        return notes.dash(recorded or reason or f"{name}: not known, and no reason recorded")
    text = f"{number(value)} {unit}"
    low, high = figures.get(f"{field}_low"), figures.get(f"{field}_high")
    return f"{text} ({number(low)} to {number(high)})" if interval and low is not None and high is not None else text


def error_in_words(summary: Summary, notes: Footnotes) -> str:
    """The output error to three digits; a dash with a footnote where there is none."""
    if summary.get("error") is not None:
        return number(float(summary["error"] or 0.0), 3)
    return notes.dash(f"error: {(summary.get('reasons') or {}).get('error') or _not_there('measure')}")


def inputs_in_words(summary: Summary, split: str) -> str:
    """What an error was taken on: "evaluation images", or "random inputs" where the model has no data of its own."""
    kind = summary.get("error_inputs")
    return "random inputs" if kind == "random" else f"{split} {'images' if kind == 'real' else 'inputs'}"


def held_out_in_words(held_out: Mapping[str, Any]) -> str:
    """How far a cost model was off on plans its fit had not seen; empty where nothing is known of it.

    Args:
        held_out: as in cost_model.json.
    """
    names = {"median_error": "median error", "p95_error": "95th percentile", "bias": "bias"}
    known = [f"{words} {percent(held_out[name])}" for name, words in names.items() if held_out.get(name) is not None]
    if known:
        return f"Predictions for {held_out.get('plans', 0):.0f} plans the fit had not seen: {', '.join(known)}."
    if "reason" in held_out:
        return f"The cost model was not checked on plans the fit had not seen: {held_out['reason']}."
    return ""


def _not_there(command: str) -> str:
    return f"not there yet; `shiva-search {command}` makes it"


def limits_in_words(summary: Summary) -> dict[str, str]:
    """Each limit by the cost field it is on (mean_keep by its own name): {"latency_ms": "119.7 ms (65 % of dense)"}."""
    budget = summary.get("budget") or {}
    shares = budget.get("shares") or {}
    words = {}
    for metric, field in [*COST_FIELD.items(), ("mean_keep", "mean_keep")]:
        share = f"{percent(shares[metric])} of dense" if metric in shares else ""
        value = budget.get(metric)
        if value is not None:
            text = percent(value) + " of the tokens" if field == "mean_keep" else f"{number(value)} {UNITS[field][1]}"
            words[field] = f"{text} ({share})" if share else text
        elif share:
            words[field] = share
    return words


def ratio_of(summary: Summary, part: str) -> float | None:
    """Latency of a part relative to dense: as recorded, or from two latencies of one measurement or one prediction."""
    figures = part_of(summary, part)
    if figures.get("ratio") is not None:
        return float(figures["ratio"])
    latency_ms = figures.get("latency_ms")
    dense_ms = figures.get("dense_latency_ms")
    if part == "measured" and not dense_ms:
        dense_ms = part_of(summary, "dense").get("latency_ms")
    return latency_ms / dense_ms if latency_ms and dense_ms else None


def plan_in_words(plan: Plan) -> str:
    """What a plan does to the blocks: "8 blocks: 2 select tokens, 1 is skipped, 5 keep all 784; ...".

    A block of which all tokens take the bypass is not skipped but replaced by it.
    """
    kept = [k for row in plan.tokens_kept for k in row]
    pruned = [k for row in plan.rows for k in row if k < plan.tokens]
    moving, everyone = sum(k.rank > 0 for k in pruned), sum(k > 0 and k.attend == "all" for k in pruned)
    more = f"; rejected tokens take a bypass in {moving}" if moving else ""
    more += f"; kept tokens attend to all in {everyone}" if everyone else ""
    selecting, replaced = sum(0 < k < plan.tokens for k in kept), sum(k.rank > 0 and int(k) == 0 for k in pruned)
    skipped = kept.count(0) - replaced
    instead = f"{_are(replaced, 'is', 'are')} replaced by a bypass, " if replaced else ""
    where = "blocks" if len(plan.segments) == 1 else f"blocks in {len(plan.segments)} timestep segments"
    return (
        f"{len(kept)} {where}: {_are(selecting, 'selects', 'select')} tokens, {_are(skipped, 'is', 'are')} skipped, "
        f"{instead}{_are(kept.count(plan.tokens), 'keeps', 'keep')} all {plan.tokens}; "
        f"{percent(plan.mean_keep)} of all tokens are processed{more}"
    )


def _are(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
