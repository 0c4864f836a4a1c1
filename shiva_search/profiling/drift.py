"""Whether a profile still holds. In: one taken earlier. Out: by how much the device has drifted since, and a verdict.

A machine that is slower as a whole (another clock, another power limit) keeps its ratios: the profile is rescaled. One
whose ratios changed (another library, another thread count, a neighbour) needs a new profile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shiva_search.devices.base import Device
from shiva_search.models.model import Model
from shiva_search.profiling.bench import BLOCKS, FORWARDS, Bench, BlockCell, plan_name
from shiva_search.profiling.conditions import check_place, deployed
from shiva_search.profiling.statistics import Estimate
from shiva_search.records.plan import Kept
from shiva_search.records.profile import Profile, signatures_of
from shiva_search.runtime.apply import remove_plan
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name

TOLERANCE = 0.05  # relative change of a ratio that is not worth a new profile, beyond what both intervals allow
_SAME_CLOCK = 0.03  # relative change of the absolute level that is not worth a rescaling
FAR = 0.25  # relative change of the level beyond which a rescaled profile is doubtful: the machine is not as it was
_BLOCK_SHARES = (0.25, 0.5, 0.75)  # of the tokens: counts checked per signature, next to the dense block
_PLANS_CHECKED = 2
_SECOND_LOOK = 3  # times as long again before a change is believed: a disturbance passes, a change stays


@dataclass(frozen=True)
class Drift:
    """What a quick check found.

    Attributes:
        verdict: "same", "rescale" (ratios hold, the level moved) or "profile again" (ratios changed).
        scale: latency level now over recorded; low and high bound a 95 % interval.
        changes: cell -> relative change of its ratio to dense.
        profile: the one to go on with: at the recorded level, or rescaled to the present one.
        seconds: the check took.
    """

    verdict: Literal["same", "rescale", "profile again"]
    scale: float
    scale_low: float
    scale_high: float
    changes: Mapping[str, float]
    profile: Profile
    seconds: float

    @property
    def largest(self) -> tuple[str, float] | None:
        """The cell whose ratio changed most, and by how much; None where there was none to compare."""
        return max(self.changes.items(), key=lambda item: abs(item[1]), default=None)

    @property
    def is_far(self) -> bool:
        """Whether the level moved so far, up or down, that rescaling is doubtful."""
        return abs(math.log(self.scale)) > math.log(1 + FAR)

    def describe(self) -> str:
        """One line for the user, with the next step."""
        largest = self.largest
        most = (
            f"the largest change of a ratio is {largest[1]:+.1%} ({largest[0]})" if largest else "no ratio to compare"
        )
        advice = {
            "same": "the profile holds",
            "rescale": "its latencies were rescaled",
            "profile again": f"more than {TOLERANCE:.0%} beyond both intervals, so a new profile is needed",
        }[self.verdict]
        if largest and abs(largest[1]) > TOLERANCE and self.verdict != "profile again":
            most += ", no more than the intervals of both measurements allow"
        return f"the device runs at {self.scale:.2f} times the recorded latency and {most}: {advice}"

    def as_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        largest = self.largest
        return {
            "verdict": self.verdict,
            "scale": self.scale,
            "scale_low": self.scale_low,
            "scale_high": self.scale_high,
            "largest_change": None if largest is None else largest[1],
            "largest_change_of": None if largest is None else largest[0],
            "tolerance": TOLERANCE,
            "changes": dict(self.changes),
            "seconds": self.seconds,
        }


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
    """Measure a few cells of a profile again, interleaved: blocks of every signature, and plans from end to end.

    Args:
        profile: of this model and workload, taken earlier.
        scorer: what selected tokens when the profile was taken.
        seconds: of measuring; where a ratio seems to have changed, up to four times as long.
        seed: of the order.
        clock: seconds.

    Raises:
        InputError: weights on another device.
    """
    check_place(model, device.torch_device)
    scorer = scorer_by_name(scorer) if isinstance(scorer, str) else scorer
    begun = clock()
    recorded = _recorded_ratios(profile)
    plans = [item.tokens_kept for item in profile.forwards if not item.flags][:_PLANS_CHECKED]
    with deployed(model):
        bench = Bench(model, device, scorer, seed, _counts(profile), clock)
        bench.prepare(plans, None)
        sampler = bench.sampler
        try:
            for until_s in (seconds, seconds * (1 + _SECOND_LOOK)):
                sampler.run(until_s)
                now = sampler.finish()
                compared = {key: (now[key], recorded[key]) for key in now.keys() & recorded.keys()}
                moved = any(_has_moved(here, before) for here, before in compared.values())
                if not moved:
                    break
        finally:
            remove_plan(model.module)
    changes = {
        _in_words(key, profile): here.ratio / before.ratio - 1 for key, (here, before) in sorted(compared.items())
    }
    scale, low, high = _level(bench, profile)
    level_moved = abs(math.log(scale)) > _SAME_CLOCK
    return Drift(
        "profile again" if moved else "rescale" if level_moved else "same",
        scale,
        low,
        high,
        changes,
        profile.rescaled(scale) if level_moved else profile,
        clock() - begun,
    )


def _counts(profile: Profile) -> list[int]:
    """Recorded counts of every signature, without flags, near the shares to check."""
    curves = [
        {row.tokens_kept for row in profile.curve(name) if not row.flags} for name in signatures_of(profile.layers)
    ]
    known = sorted(k for k in set.intersection(*curves) if 1 < k < profile.tokens)
    nearest = (min(known, key=lambda k: abs(k - share * profile.tokens)) for share in _BLOCK_SHARES if known)
    return sorted(set(nearest))


def _recorded_ratios(profile: Profile) -> dict[str, Estimate]:
    """What the profile says of each cell that can be checked, by the name the bench gives it."""
    blocks = {
        BlockCell(row.signature, Kept(row.tokens_kept, row.bypass_rank, row.attend)).name: Estimate(
            row.ratio, row.ratio_low, row.ratio_high, row.samples
        )
        for row in profile.rows
        if row.tokens_kept > 1
    }
    plans = {
        plan_name(item.tokens_kept): Estimate(item.ratio, item.ratio_low, item.ratio_high, item.samples)
        for item in profile.forwards
    }
    return {**blocks, **plans}


def _level(bench: Bench, profile: Profile) -> tuple[float, float, float]:
    """Latency level now over recorded, with its interval: of whole forwards, or of blocks where there are none."""
    whole_ms = profile.dense.get("latency_ms")
    group = FORWARDS if whole_ms and FORWARDS in bench.sampler.groups and bench.rows else BLOCKS
    recorded_ms = whole_ms if group == FORWARDS else profile.curve(profile.layers[0])[-1].latency_ms
    level_ms, interval_ms = bench.sampler.reference_ms(group), bench.sampler.reference_interval_ms(group)
    assert recorded_ms and level_ms and interval_ms  # every cell was sampled
    return level_ms / recorded_ms, interval_ms[0] / recorded_ms, interval_ms[1] / recorded_ms


def _has_moved(now: Estimate, before: Estimate) -> bool:
    """Whether a ratio changed by more than is tolerated, and by more than both measurements can be wrong."""
    change = abs(math.log(now.ratio / before.ratio))
    return change > TOLERANCE + math.hypot(now.half_width, before.half_width)


def _in_words(key: str, profile: Profile) -> str:
    """A cell's name for people: a plan by the share of tokens it keeps."""
    for item in profile.forwards:
        if plan_name(item.tokens_kept) == key:
            return f"plan at {sum(map(int, item.tokens_kept)) / profile.layer_count / profile.tokens:.1%} of the tokens"
    return key
