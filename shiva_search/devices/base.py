"""The one protocol through which the rest of the package sees a device.

In: a device's name as the user writes it, and callables that run something on it. Out: times, energies, memory
peaks and conditions, each in the unit its name carries. What a device cannot measure is None with a reason.
torch is imported only once a device is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from ..errors import InputError, UnavailableError
from ..records.budget import a_budget, option_name
from ..records.cost import COST_FIELD

if TYPE_CHECKING:
    import torch

Run = Callable[[], object]  # one execution of what is measured; its result is dropped
Quantity = Literal["latency_ms", "energy_j", "power_w", "peak_memory_mib"]

MIB = 2**20


@dataclass(frozen=True)
class EnergySample:
    """Energy of one repeated run.

    Attributes:
        energy_j_per_run: joules of one run, idle power included; None where it could not be measured.
        power_w: mean power over the window, in watts; None together with the energy.
        runs: runs inside the window.
        ticks: updates of the sensor seen inside the window.
        seconds: length of the window, from one update of the sensor to another.
        idle_power_w: power with nothing queued, measured once per device; None where unknown.
        reason: why there is no energy; None where there is.
    """

    energy_j_per_run: float | None
    power_w: float | None
    runs: int
    ticks: int
    seconds: float
    idle_power_w: float | None
    reason: str | None

    @classmethod
    def missing(
        cls, reason: str, runs: int = 0, ticks: int = 0, seconds: float = 0.0, idle_power_w: float | None = None
    ) -> EnergySample:
        """A sample without energy, which always says why."""
        return cls(None, None, runs, ticks, seconds, idle_power_w, reason)


@dataclass(frozen=True)
class SensorReport:
    """One line of `shiva-search devices`.

    Attributes:
        name: the sensor, "NVML energy counter".
        what: the quantity it answers for.
        available: whether it answers here.
        how: how it measures; where it is not available, why not and the next step.
    """

    name: str
    what: Quantity
    available: bool
    how: str


@runtime_checkable
class Device(Protocol):
    """Something that runs a model and measures it.

    Attributes:
        name: as in `--device`, with the index filled in: "cpu", "cuda:0".
        torch_device: where tensors and modules of a run belong.
    """

    name: str
    torch_device: torch.device

    def describe(self) -> dict[str, Any]:
        """What the device is: its name, driver, cores, memory, library versions and clocks, ready for JSON."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has finished all it was given."""
        ...

    def time_ms(self, run: Run, repeats: int = 1) -> float:
        """Takes one timed sample.

        Args:
            run: what is timed; warm-up is the caller's.
            repeats: executions in the sample, at least 1.

        Returns:
            Milliseconds per repeat.

        Raises:
            InputError: repeats is below 1.
        """
        ...

    def settle(self, most_s: float = 0.0) -> bool:
        """Looks for what would disturb a sample taken now, and waits for its end.

        Args:
            most_s: how long to wait, at most.

        Returns:
            Whether the device is undisturbed: on a CPU, its threads are placed as well as they have been seen.
        """
        ...

    def capture(self, run: Run) -> Run:
        """Records a run as a CUDA graph, whose replay costs the host next to nothing.

        Args:
            run: has static shapes, and reads its inputs from the same tensors each time.

        Returns:
            The replay, to be timed in place of the run. Replays of one device share their memory, so none may be under
            way while another begins, and what a run returned is gone with the next replay.

        Raises:
            UnavailableError: the device has no graphs, or the run does something that a graph cannot hold.
        """
        ...

    def peak_memory_mib(self, run: Run) -> float | None:
        """Runs once and returns the allocator's own peak in MiB above what was live before; None where unknown."""
        ...

    def measure_energy(self, run: Run, min_seconds: float) -> EnergySample:
        """Repeats a run back to back until the window is long enough for the energy sensor.

        Args:
            run: what is measured; warm-up is the caller's.
            min_seconds: shortest window; a slow sensor makes it longer.
        """
        ...

    def conditions(self) -> dict[str, Any]:
        """What may disturb a measurement just now, ready for JSON.

        Names that end in `_total` count since some start: take the difference of two calls. What could not be read
        is None, and `unavailable` maps its name to the reason.
        """
        ...

    def sensors(self) -> list[SensorReport]:
        """One report for each quantity: how it is measured here, or why it is not."""
        ...


def check_repeats(repeats: int) -> None:
    """Refuses a sample of no repeats.

    Raises:
        InputError: repeats is below 1.
    """
    if repeats < 1:
        raise InputError(f"a timed sample has at least 1 repeat, got {repeats}. Pass repeats=1 or more.")


def no_graphs(name: str) -> UnavailableError:
    """What a device that is no GPU answers to `capture`."""
    return UnavailableError(f"{name} has no CUDA graphs; drop --cuda-graph, or pass --device cuda")


def check_sensors(device: Device, metrics: Iterable[str]) -> None:
    """Refuses budgets on what a device cannot measure, before anything is measured.

    Args:
        device: that the plan will be measured on.
        metrics: that budgets are on, as in records.budget.METRICS.

    Raises:
        UnavailableError: names the budget, and why its sensor does not answer.
    """
    missing: dict[str, SensorReport] = {report.what: report for report in device.sensors() if not report.available}
    for metric in metrics:
        report = missing.get(COST_FIELD.get(metric, ""))
        if report is not None:
            raise UnavailableError(
                f"{a_budget(metric)} needs a sensor that {device.name} does not have ({report.name}: "
                f"{report.how.rstrip('.')}); drop {option_name(metric)}, or see `shiva-search devices`"
            )


def _open_cpu(index: str) -> Device:
    from .cpu import CpuDevice

    if index:
        raise _unknown(f"cpu:{index}")
    return CpuDevice()


def _open_cuda(index: str) -> Device:
    from .cuda import open_cuda

    if index and not index.isdecimal():
        raise _unknown(f"cuda:{index}")
    return open_cuda(int(index) if index else None)


def _open_replay(folder: str) -> Device:
    from .replay import ReplayDevice

    if not folder:
        raise InputError("a replay device names the folder of a recorded profile: replay:DIR. Pass one.")
    return ReplayDevice(folder)


# kind of device -> what opens it, given the text behind the colon ("" where there is none)
OPENERS: Mapping[str, Callable[[str], Device]] = {
    "cpu": _open_cpu,
    "cuda": _open_cuda,
    "replay": _open_replay,
}


def open_device(name: str) -> Device:
    """Opens a device by its name.

    Args:
        name: "cpu", "cuda" (the current CUDA device), "cuda:N", or "replay:DIR" with the folder of a recorded profile.

    Raises:
        InputError: there is no such kind of device.
        UnavailableError: the device is known but not available here.
    """
    kind, _, rest = str(name).partition(":")
    if kind not in OPENERS or str(name).endswith(":"):
        raise _unknown(name)
    return OPENERS[kind](rest)


def list_devices() -> list[str]:
    """Names of the devices available here, the CPU first."""
    from .cuda import cuda_names

    return ["cpu", *cuda_names()]


def _unknown(name: str) -> InputError:
    kinds = ", ".join(sorted(OPENERS))
    here = ", ".join(list_devices())
    if not isinstance(name, str):  # an argument of another kind in its place; its contents would bury the rule
        return InputError(f"a device is a name such as {here}, got a {type(name).__name__}; is it another argument?")
    return InputError(f"a device is one of the kinds {kinds}, got {name!r}. Available here: {here}.")
