"""Budget: the limits a user sets. In: texts with units ("50ms", "60%", "6GiB"). Out: numbers in fixed units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from shiva_search.errors import InputError, UnavailableError
from shiva_search.records.cost import CostEstimate

#: metric -> (what to say it is, unit it is kept in, example, units a user may write)
_KINDS = {
    "latency_ms": ("latency", "ms", "50ms", "ns, us, ms, s, min"),
    "energy_j": ("energy", "J", "2J", "mJ, J, kJ, Wh"),
    "power_w": ("power", "W", "250W", "mW, W, kW"),
    "memory_mib": ("memory", "MiB", "6GiB", "KiB, MiB, GiB, MB, GB"),
    "gflops": ("flops", "GFLOP", "5T", "M, G, T, P"),
    "mean_keep": ("mean keep", "", "0.6", "none: a share between 0 and 1"),
}
METRICS = tuple(_KINDS)
#: Shares of the dense model above this are a slip: 60 in the place of 0.6.
_MOST_SHARE = 10.0


@cache
def _units() -> Any:
    import pint

    return pint.UnitRegistry()


def option_name(metric: str) -> str:
    """The command-line option that sets a metric: "latency_ms" -> "--max-latency"."""
    return "--mean-keep" if metric == "mean_keep" else f"--max-{_KINDS[metric][0]}"


def a_budget(metric: str) -> str:
    """A budget on the metric, in words: "an energy budget"."""
    kind = _KINDS[metric][0]
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} budget"


def parse_limit(metric: str, text: str) -> tuple[float, bool]:
    """Read one limit.

    Args:
        metric: one of METRICS.
        text: "50ms", "2 J", "6GiB", "5T" or a share of the dense model such as "60%".

    Returns:
        The value in the metric's unit and False, or the share (0.6) and True.

    Raises:
        InputError: an unknown metric, no unit, a foreign unit, or not above zero.
    """
    if metric not in _KINDS:
        raise InputError(f"a budget limits one of {', '.join(METRICS)}, got {metric!r}")
    kind, unit, example, known = _KINDS[metric]
    text = text.strip()
    hint = f"write for example {option_name(metric)} {example} or 60% (units: {known}; % is a share of the dense model)"
    match = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S*)", text)
    if match is None:
        raise InputError(f"{a_budget(metric)} is a number with a unit, got {text!r}; {hint}")
    value, suffix = float(match[1]), match[2]
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{a_budget(metric)} must be above zero, got {text!r}; {hint}")
    if suffix == "%":
        return value / 100, True
    if metric == "mean_keep":
        if suffix or value > 1:
            raise InputError(f"a mean keep is a share of tokens in (0, 1], got {text!r}; write for example 0.6 or 60%")
        return value, False
    if not suffix:
        raise InputError(f"{a_budget(metric)} needs a unit, got {text!r}; {hint}")
    if metric == "gflops":
        scale = re.fullmatch(r"([kMGTP])(?:[Ff][Ll][Oo][Pp][sS]?)?", suffix)
        if scale is None:
            raise InputError(f"{text!r} is not a count of operations; {hint}")
        return value * {"k": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3, "P": 1e6}[scale[1]], False
    import pint

    try:
        converted = float(_units().Quantity(value, suffix).to(unit).magnitude)
    except (pint.PintError, AttributeError, TypeError, ValueError, AssertionError):
        raise InputError(f"{suffix!r} is not a unit of {kind}, got {text!r}; {hint}") from None
    return converted, False


@dataclass(frozen=True)
class Budget:
    """Limits that hold together; None is no limit. Scope: one denoising step (the mean over a whole image's steps).

    Attributes:
        latency_ms, energy_j, power_w, memory_mib, gflops: absolute limits of one step, in the unit of the name.
        mean_keep: limit on the mean share of tokens kept over layers, in (0, 1].
        shares: limits as a share of the dense model's own cost, by metric; `resolve` turns them into numbers.

    Raises:
        InputError: a limit is not above zero, or no limit is set where one is needed.
    """

    latency_ms: float | None = None
    energy_j: float | None = None
    power_w: float | None = None
    memory_mib: float | None = None
    gflops: float | None = None
    mean_keep: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric, value in [*self.limits().items(), *self.shares.items()]:
            if metric not in _KINDS:
                raise InputError(f"unknown budget {metric!r}; known: {', '.join(METRICS)}")
            if isinstance(value, str):
                raise InputError(
                    f"{a_budget(metric)} in code is a number, got {value!r}; write a share of the dense model as "
                    f'Budget(shares={{"{metric}": 0.6}}), or Budget.parse({{"{metric}": {value!r}}})'
                )
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"{a_budget(metric)} must be above zero, got {value!r}")
        for metric, share in self.shares.items():
            if share > _MOST_SHARE:
                raise InputError(
                    f"{a_budget(metric)} of {share:.0%} of the dense model limits nothing; write 60% "
                    f'(in code Budget(shares={{"{metric}": 0.6}}))'
                )
        if self.mean_keep is not None and self.mean_keep > 1:
            raise InputError(f"a mean keep is a share of tokens in (0, 1], got {self.mean_keep}")

    @classmethod
    def parse(cls, texts: Mapping[str, str], per: str = "step", steps: int = 1) -> Budget:
        """Read limits by metric from texts. With per="image", latency, energy and FLOPs cover `steps` steps.

        Raises:
            InputError: see parse_limit; or per/steps out of range.
        """
        if per not in ("step", "image"):
            raise InputError(f"a budget is per step or per image, got {per!r}")
        if steps < 1:
            raise InputError(f"--steps must be at least 1, got {steps}")
        absolute: dict[str, Any] = {}
        shares: dict[str, float] = {}
        for metric, text in texts.items():
            value, is_share = parse_limit(metric, text)
            if is_share and metric != "mean_keep":
                shares[metric] = value
            else:
                scales = per == "image" and metric in ("latency_ms", "energy_j", "gflops")
                absolute[metric] = value / steps if scales else value
        return cls(**absolute, shares=shares)

    def limits(self) -> dict[str, float]:
        """The absolute limits that are set, by metric."""
        return {metric: getattr(self, metric) for metric in METRICS if getattr(self, metric) is not None}

    def __bool__(self) -> bool:
        return bool(self.limits() or self.shares)

    def resolve(self, dense: CostEstimate) -> Budget:
        """Turn shares into numbers with the dense model's cost.

        Raises:
            UnavailableError: a limit is on a quantity this device could not measure.
        """
        numbers: dict[str, Any] = self.limits()
        for metric in {**numbers, **self.shares}:
            if metric != "mean_keep" and dense.of(metric) is None:
                raise UnavailableError(
                    f"{a_budget(metric)} needs a measured {metric}, and this profile has none; "
                    "`shiva-search devices` says why, or drop " + option_name(metric)
                )
        for metric, share in self.shares.items():
            limit = share * (dense.of(metric) or 0.0)
            numbers[metric] = min(limit, numbers.get(metric, limit))
        return Budget(**numbers)

    def as_dict(self) -> dict[str, Any]:
        """What is set, JSON-able."""
        return {**self.limits(), **({"shares": dict(self.shares)} if self.shares else {})}
