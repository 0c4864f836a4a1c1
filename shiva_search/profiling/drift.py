"""Whether a profile still holds. In: one taken earlier. Out: by how much the device has drifted since, and a verdict.

A machine that is slower as a whole (another clock, another power limit) keeps its ratios: the profile is rescaled. One
whose ratios changed (another library, another thread count, a neighbour) needs a new profile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shiva_search.devices.base import Device
from shiva_search.models.model import Model
from shiva_search.profiling.bench import BLOCKS, FORWARDS, Bench
from shiva_search.profiling.conditions import check_place, deployed
from shiva_search.profiling.statistics import Estimate
from shiva_search.records.profile import Profile, Row
from shiva_search.runtime.apply import remove_plan
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name

_BLOCKS_CHECKED = 4
_PLANS_CHECKED = 4
_SAME_RATIO = 0.05  # relative change of a ratio that is not worth a new profile
_SAME_CLOCK = 0.03  # relative change of the absolute level that is not worth a rescaling
_SIGMAS = 3.0


@dataclass(frozen=True)
class Drift:
    """What a quick check found.

    Attributes:
        verdict: "same", "rescale" (ratios hold, the level moved) or "profile again" (ratios changed).
        scale: latency level now over recorded; low and high bound a 95 % interval.
        changes: cell -> relative change of its ratio to dense.
        profile: the one to go on with: as recorded, or rescaled.
    """

    verdict: Literal["same", "rescale", "profile again"]
    scale: float
    scale_low: float
    scale_high: float
    changes: Mapping[str, float]
    profile: Profile

    def describe(self) -> str:
        """One line for the user, with the next step."""
        worst = max(self.changes, key=lambda name: abs(self.changes[name]), default=None)
        most = (
            f"the largest change of a ratio is {self.changes[worst]:+.1%} ({worst})" if worst else "no ratio to compare"
        )
        advice = {
            "same": "the profile holds",
            "rescale": "its latencies were rescaled",
            "profile again": "run `shiva-search profile` again",
        }[self.verdict]
        return f"the device runs at {self.scale:.2f} times the recorded latency and {most}: {advice}"


def check_drift(
    model: Model,
    profile: Profile,
    device: Device,
    *,
    scorer: TokenScorer | str = "stride",
    seconds: float = 6.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Drift:
    """Measure a few cells of a profile again.

    Args:
        profile: of this model and workload, taken earlier.
        scorer: what selected tokens when the profile was taken.
        seconds: of measuring.
        seed: of the order.
        clock: seconds.

    Raises:
        InputError: weights on another device.
    """
    check_place(model, device.torch_device)
    scorer = scorer_by_name(scorer) if isinstance(scorer, str) else scorer
    rows = {row.tokens_kept: row for row in profile.curve(profile.layers[0]) if 1 < row.tokens_kept < profile.tokens}
    counts = [sorted(rows)[round(i)] for i in np.linspace(0, len(rows) - 1, _BLOCKS_CHECKED)] if rows else []
    forwards = {item.tokens_kept: item for item in profile.forwards if not item.flags}
    recorded_ms = profile.dense.get("latency_ms")
    with deployed(model):
        bench = Bench(model, device, scorer, seed, counts, clock)
        bench.prepare(list(forwards)[:_PLANS_CHECKED], None)
        try:
            bench.sampler.run(seconds)
            found = bench.sampler.finish()
        finally:
            remove_plan(model.module)
    changes: dict[str, float] = {}
    moved = []
    for key, row in _checked(bench, rows).items():
        changes[f"block at {row.tokens_kept} tokens"] = _change(found[key], row.ratio)
        moved.append(_has_moved(found[key], row.ratio, row.ratio_low, row.ratio_high))
    for kept, item in list(forwards.items())[:_PLANS_CHECKED]:
        key = "plan " + " ".join(map(str, kept))
        changes[f"plan at {sum(kept) / len(kept) / profile.tokens:.0%}"] = _change(found[key], item.ratio)
        moved.append(_has_moved(found[key], item.ratio, item.ratio_low, item.ratio_high))
    group = FORWARDS if recorded_ms is not None and FORWARDS in bench.sampler.groups else BLOCKS
    if group == BLOCKS:
        recorded_ms = profile.curve(profile.layers[0])[-1].latency_ms
    level_ms, interval_ms = bench.sampler.reference_ms(group), bench.sampler.reference_interval_ms(group)
    assert recorded_ms and level_ms and interval_ms  # every cell was sampled
    scale, low, high = (value / recorded_ms for value in (level_ms, *interval_ms))
    if any(moved):
        return Drift("profile again", scale, low, high, changes, profile)
    if abs(math.log(scale)) > _SAME_CLOCK:
        return Drift("rescale", scale, low, high, changes, profile.rescaled(scale))
    return Drift("same", scale, low, high, changes, profile)


def _checked(bench: Bench, rows: Mapping[int, Row]) -> dict[str, Row]:
    first = next(iter(bench.parts))
    return {
        key: rows[cell.tokens_kept]
        for key, cell in bench.blocks.items()
        if cell.signature == first and not cell.selection and cell.tokens_kept in rows
    }


def _change(now: Estimate, recorded: float) -> float:
    return now.ratio / recorded - 1


def _has_moved(now: Estimate, ratio: float, low: float, high: float) -> bool:
    """Whether a ratio changed by more than matters, and by more than both measurements can be wrong."""
    error = math.hypot(now.half_width, (high - low) / (2 * ratio)) / 1.96
    return abs(math.log(now.ratio / ratio)) > max(_SAME_RATIO, _SIGMAS * error)
