"""What `optimize` is asked for. In: options. Out: Settings, kept in run.json, so that later commands know them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What `optimize` was asked for; kept in run.json.

    Attributes:
        budget: texts by metric, {"latency_ms": "50ms"}; per and steps give their scope.
        workload: fields of Workload that differ from the model's defaults.
        others: as the options of the same name.
    """

    model: str = "fashion-dit"
    device: str = "cpu"
    budget: dict[str, str] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    per: str = "step"
    steps: int = 28
    segments: int = 1
    min_keep: float | None = None
    trials: int = 100
    sampler: str = "trade"
    bypass: str = "affine"
    bypass_rank: int | None = None
    attend: str = "free"
    train_steps: int = 60
    warmup_steps: int | None = None
    profile: str | None = None
    profile_seconds: float = 60.0
    storage: str | None = None
    seed: int = 0

    def digest(self, *parts: str) -> str:
        """Equal for equal settings: of the fields named, or of all."""
        values = {name: value for name, value in asdict(self).items() if not parts or name in parts}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
