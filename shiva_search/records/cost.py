"""CostEstimate: what a plan costs, one denoising step, in the device's own units."""

from __future__ import annotations

from dataclasses import asdict, dataclass

#: Budget metric -> the field of CostEstimate it limits.
COST_FIELD = {
    "latency_ms": "latency_ms",
    "energy_j": "energy_j",
    "power_w": "power_w",
    "memory_mib": "peak_memory_mib",
    "gflops": "gflops",
}


@dataclass(frozen=True)
class CostEstimate:
    """Predicted cost of one denoising step (mean over timestep segments). None: not known for this device.

    Attributes:
        latency_ms: expected latency, milliseconds; low and high bound a 90 % interval.
        energy_j: joules.
        power_w: mean power over the step, watts (energy / latency).
        peak_memory_mib: peak memory of activations above the resident weights, MiB.
        gflops: 10^9 floating point operations, 2 per multiply-add.
    """

    latency_ms: float | None
    latency_ms_low: float | None = None
    latency_ms_high: float | None = None
    energy_j: float | None = None
    power_w: float | None = None
    peak_memory_mib: float | None = None
    gflops: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """All figures by name, None where unknown."""
        return asdict(self)

    def of(self, metric: str) -> float | None:
        """The figure that a budget metric ("latency_ms", "memory_mib", ...) limits."""
        value: float | None = getattr(self, COST_FIELD[metric])
        return value
