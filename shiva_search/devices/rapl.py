"""Energy of CPU packages from RAPL, as Linux shows it under /sys/class/powercap.

In: <root>/intel-rapl:N/{name,energy_uj,max_energy_range_uj}; AMD's processors appear under the same names. Out: joules
summed over the packages. Each package holds its cores and its uncore, and `psys` holds the packages, so only the
packages are added up; memory (`dram`) is left out. A package's energy includes every process that runs on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .energy import CounterSource, SensorError

POWERCAP = Path("/sys/class/powercap")
_TOP_DOMAIN = re.compile(r"intel-rapl:\d+")  # intel-rapl:0:0 is a part of intel-rapl:0, intel-rapl-mmio:0 repeats it

ReadText = Callable[[Path], str]


@dataclass
class _Package:
    energy: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0


class RaplPackages:
    """The sum of all CPU packages, unwrapped.

    Args:
        root: the powercap folder.
        read_text: reads one file.

    Raises:
        SensorError: there is no package, or its energy may not be read; the message says what to do.
    """

    def __init__(self, root: Path = POWERCAP, read_text: ReadText = Path.read_text) -> None:
        self._read_text = read_text
        try:
            folders = sorted(entry for entry in root.iterdir() if _TOP_DOMAIN.fullmatch(entry.name))
        except FileNotFoundError:
            folders = []
        except OSError as error:
            raise SensorError(f"{root} cannot be read: {error.strerror}. Grant read access to it.") from error
        self._packages = [
            _Package(
                energy=folder / "energy_uj",
                range_uj=self._integer(folder / "max_energy_range_uj"),
                last_uj=self._integer(folder / "energy_uj"),
            )
            for folder in folders
            if self._text(folder / "name").startswith("package")
        ]
        if not self._packages:
            raise SensorError(
                f"no RAPL package under {root}: virtual machines and most processors other than x86 have none. "
                "Run on the machine itself (on x86: `modprobe intel_rapl_msr`), or leave energy out of the budget."
            )

    def read_j(self) -> float:
        """Joules of all packages since this object was made.

        Must be called more often than a counter wraps, which takes minutes at the least.

        Raises:
            SensorError: a counter can no longer be read.
        """
        for package in self._packages:
            now_uj = self._integer(package.energy)
            step_uj = now_uj - package.last_uj
            # The counter starts over after max_energy_range_uj.
            package.total_uj += step_uj if step_uj >= 0 else step_uj + package.range_uj
            package.last_uj = now_uj
        return sum(package.total_uj for package in self._packages) * 1e-6

    def source(self) -> CounterSource:
        """The packages as a source for an EnergyMeter. RAPL updates about every millisecond."""
        return CounterSource("RAPL packages", self.read_j, slowest_update_s=0.1)

    def _integer(self, path: Path) -> int:
        text = self._text(path)
        try:
            return int(text)
        except ValueError as error:
            raise SensorError(f"{path} holds {text!r}, not a number of microjoules. Energy is left out.") from error

    def _text(self, path: Path) -> str:
        try:
            return self._read_text(path).strip()
        except PermissionError as error:
            raise SensorError(
                f"{path} may be read by root alone. Allow it with `sudo chmod a+r {path}` until the next start, or for "
                'good with a udev rule: SUBSYSTEM=="powercap", RUN+="/bin/chmod a+r /sys%p/energy_uj".'
            ) from error
        except OSError as error:
            raise SensorError(f"{path} cannot be read: {error.strerror}. Energy is left out.") from error
