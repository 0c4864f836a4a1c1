"""A recorded profile in place of a device, so that a profile from one machine can be searched on another.

In: a profile's folder. Out: its recorded figures. There is no clock: what was not recorded cannot be measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, UnavailableError
from ..records.profile import Profile, load_profile
from .base import EnergySample, Quantity, Run, SensorReport


class ReplayDevice:
    """Answers from a recorded profile.

    Args:
        folder: of the profile, with profile.json in it.

    Raises:
        InputError: the folder holds no profile, or an interrupted one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.profile: Profile = load_profile(self.folder)
        if not self.profile.complete:
            raise InputError(
                f"the profile in {self.folder} was interrupted; "
                f"finish it with `shiva-search profile` on {self.profile.device}"
            )
        self.name = f"replay:{folder}"
        self.torch_device = torch.device("cpu")  # where quality is judged; costs come from the record

    def describe(self) -> dict[str, Any]:
        """The recorded device, and that it is a recording."""
        return {**self.profile.provenance.get("device", {}), "name": self.name, "recorded": self.profile.device}

    def synchronize(self) -> None:
        """Nothing is under way."""

    def time_ms(self, run: Run, repeats: int = 1) -> float:
        """Refuses: a recording has no clock.

        Raises:
            UnavailableError: always.
        """
        raise self._no("time")

    def settle(self, most_s: float = 0.0) -> bool:
        """True: nothing disturbs a recording."""
        return True

    def capture(self, run: Run) -> Run:
        """Refuses, as time_ms."""
        raise self._no("time")

    def peak_memory_mib(self, run: Run) -> float | None:
        """Refuses, as time_ms."""
        raise self._no("memory")

    def measure_energy(self, run: Run, min_seconds: float) -> EnergySample:
        """No energy beyond what was recorded, with the reason."""
        return EnergySample.missing(str(self._no("energy")))

    def conditions(self) -> dict[str, Any]:
        """Nothing disturbs a recording."""
        return {}

    def sensors(self) -> list[SensorReport]:
        """Which quantities were recorded, and why others were not."""
        recorded: dict[Quantity, bool] = {
            "latency_ms": True,
            "energy_j": any(row.energy_j is not None for row in self.profile.rows),
            "power_w": any(row.power_w is not None for row in self.profile.rows),
            "peak_memory_mib": any(row.peak_memory_mib is not None for row in self.profile.rows),
        }
        how = f"recorded on {self.profile.device}"
        missing = self.profile.missing
        return [
            SensorReport("recorded profile", what, known, how if known else missing.get(what, "not recorded"))
            for what, known in recorded.items()
        ]

    def _no(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"{self.name} answers from a recording and cannot measure {what}; "
            f"measure on {self.profile.device}, or pass --device cpu"
        )
