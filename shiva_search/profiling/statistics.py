"""What samples say. In: raw samples with references around them. Out: a ratio per cell, its interval and flags.

What is kept of a sample is the log of its ratio to the references right before and right after; what is reported of a
cell is the trimmed mean of its log ratios. Of the estimators tried on a noisy machine this one repeats best: drift that
is slow against a sample cancels, and the references tell which samples a disturbance fell into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shiva_search.records.profile import Sample

TRIM = 0.2  # share of samples dropped at each end before the mean
CONFIDENCE = 0.95
WIDE = 0.05  # half-width of an interval, relative, from which a row is flagged
_RESAMPLES = 400
_DISTURBED_SIGMAS = 3.5
_DISTURBED_FLOOR = 0.02  # references closer than this never count as disturbed
_MIN_CLEAN = 4


@dataclass(frozen=True)
class Estimate:
    """What the samples of a cell say.

    Attributes:
        ratio: cell over reference; low and high bound a 95 % bootstrap interval.
        samples: clean samples it rests on.
        disturbed: share of samples left out: references disagree, throttling, an unsettled device.
        flags: "wide" (interval), "disturbed" (over a third of the samples left out), "throttled", "unsettled" or "no
            clean sample" (too few were left, so all were taken).
    """

    ratio: float
    low: float
    high: float
    samples: int
    disturbed: float = 0.0
    flags: tuple[str, ...] = ()

    @property
    def half_width(self) -> float:
        """Relative half-width of the interval."""
        return (self.high - self.low) / (2 * self.ratio)


def disturbance_limit(samples: Sequence[Sample]) -> float:
    """How far apart the two references of a sample may lie, as a log ratio: what is usual here, and some."""
    gaps = np.abs([math.log(sample.after_ms / sample.before_ms) for sample in samples])
    if not len(gaps):
        return _DISTURBED_FLOOR
    # The median absolute gap, as a standard deviation: half of all gaps may be foul before it gives way.
    return max(_DISTURBED_FLOOR, _DISTURBED_SIGMAS * 1.4826 * float(np.median(gaps)))


def is_disturbed(sample: Sample, limit: float) -> bool:
    """Whether something happened around a sample that its references noticed, or that the device told."""
    return sample.foul or abs(math.log(sample.after_ms / sample.before_ms)) > limit


def log_ratio(sample: Sample) -> float:
    """Log of the sample over the geometric mean of the references around it."""
    return math.log(sample.ms) - (math.log(sample.before_ms) + math.log(sample.after_ms)) / 2


def estimate(samples: Sequence[Sample], limit: float, seed: int = 0, quick: bool = False) -> Estimate:
    """Trimmed mean of log ratios, with a bootstrap interval.

    Args:
        samples: of one cell, at least one.
        limit: from disturbance_limit, over all samples of the cell's group.
        seed: of the bootstrap.
        quick: take the interval from the winsorised variance instead, for deciding what to measure next.
    """
    clean = [sample for sample in samples if not is_disturbed(sample, limit)]
    disturbed = 1 - len(clean) / len(samples)
    flags = []
    if len(clean) < min(_MIN_CLEAN, len(samples)):
        # Better a flagged figure than none; the interval is wide of itself.
        clean = list(samples)
        told = [name for name in ("throttled", "unsettled") if any(getattr(sample, name) for sample in samples)]
        flags.append(told[0] if told else "no clean sample")
    elif len(clean) < 2 / 3 * sum(not sample.foul for sample in samples):
        flags.append("disturbed")
    logs = np.array([log_ratio(sample) for sample in clean])
    centre, low, high = (winsorised_interval if quick else trimmed_interval)(logs, seed)
    if high - low > 2 * WIDE:
        flags.append("wide")
    return Estimate(math.exp(centre), math.exp(low), math.exp(high), len(clean), disturbed, tuple(flags))


def winsorised_interval(logs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Trimmed mean, and about the bounds that trimmed_interval gives (Tukey and McLaughlin 1963), without drawing."""
    count = len(logs)
    if count < 2:
        return trimmed_interval(logs)
    cut = int(TRIM * count)
    ordered = np.sort(logs)
    winsorised = np.clip(ordered, ordered[cut], ordered[count - 1 - cut])
    centre = float(_trimmed_mean(ordered[None])[0])
    error = float(winsorised.std(ddof=1)) / ((1 - 2 * cut / count) * math.sqrt(count))
    return centre, centre - 1.96 * error, centre + 1.96 * error


def trimmed_interval(logs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Trimmed mean, and the bounds of its 95 % bootstrap interval; a single value is taken as good to 20 %."""
    count = len(logs)
    if count < 2:
        return float(logs[0]), float(logs[0]) - 0.2, float(logs[0]) + 0.2
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    means = _trimmed_mean(np.sort(logs[drawn], axis=1))
    centre = float(_trimmed_mean(np.sort(logs)[None])[0])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # The bootstrap knows only the values it was given: of few, it makes an interval too narrow by sqrt((n-1)/n).
    widen = math.sqrt(count / (count - 1))
    return centre, centre - (centre - float(low)) * widen, centre + (float(high) - centre) * widen


def _trimmed_mean(sorted_logs: np.ndarray) -> np.ndarray:
    cut = int(TRIM * sorted_logs.shape[1])
    mean: np.ndarray = sorted_logs[:, cut : sorted_logs.shape[1] - cut].mean(axis=1)
    return mean


def median_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median of all values; values of a group move together, so groups are drawn."""
    levels = [np.array(values) for values in groups]
    rng = np.random.default_rng(seed)
    medians = [
        float(np.median(np.concatenate([levels[i] for i in rng.integers(len(levels), size=len(levels))])))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
