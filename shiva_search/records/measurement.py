"""Measurement: a plan next to the dense model, timed in one interleaved run. Never holds a predicted figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """What a plan and the dense model cost, one denoising step, measured together. None: see `reasons`.

    Attributes:
        tokens_kept: the plan, a row per segment.
        latency_ms: ratio times the dense latency; low and high bound a 95 % interval of it.
        dense_latency_ms: median of the dense forwards of the run.
        ratio: planned over dense, trimmed mean of ratios to the dense forwards right before and right after.
        samples: planned forwards the ratio rests on.
        energy_j, power_w, peak_memory_mib, gflops: of the plan; dense_* of the dense model.
        reasons: field -> why it is None.
        conditions: what may have disturbed the run.
        flags: "wide", "disturbed", "throttled", "unsettled", "no clean sample".
        replayed: the figures come from a recorded profile's cost model, not from a clock.
    """

    tokens_kept: tuple[tuple[int, ...], ...]
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    dense_latency_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    samples: int
    energy_j: float | None = None
    power_w: float | None = None
    peak_memory_mib: float | None = None
    gflops: float | None = None
    dense_energy_j: float | None = None
    dense_power_w: float | None = None
    dense_peak_memory_mib: float | None = None
    dense_gflops: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    replayed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for plan.json and summary.json."""
        plain = asdict(self)
        plain["tokens_kept"] = [list(row) for row in self.tokens_kept]
        plain["flags"] = list(self.flags)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Inverse of as_dict; raises TypeError where fields are missing or unknown."""
        known = dict(values)
        known["tokens_kept"] = tuple(tuple(row) for row in known["tokens_kept"])
        known["flags"] = tuple(known.get("flags", ()))
        return cls(**known)
