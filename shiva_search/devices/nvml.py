"""What NVIDIA's management library knows of one GPU: energy, power, clocks, temperature, what slows it down.

In: the UUID or PCI address of the GPU that torch uses, which hold whatever CUDA_VISIBLE_DEVICES does to the numbering.
Out: an energy source, a description and conditions ready for JSON. Every code of NVML becomes an NvmlError of its own
kind; where one value is missing among many, the value is None and the error is the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml

from .energy import CounterSource, EnergySource, IntegratedPower, SensorError


class NvmlError(SensorError):
    """NVML answered with an error code.

    Attributes:
        code: NVML's number.
        code_name: NVML's name for it, "NVML_ERROR_TIMEOUT".
    """

    def __init__(self, function: str, code: int) -> None:
        self.code = code
        self.code_name = _CODE_NAMES.get(code, f"code {code}")
        super().__init__(f"{function} failed with {self.code_name}: {_NEXT_STEP.get(code, _ANY_NEXT_STEP)}")


class NvmlMissingError(NvmlError):
    """There is no library, no driver, or the two do not fit."""


class NvmlUnsupportedError(NvmlError):
    """This GPU or this driver does not have the function."""


class NvmlPermissionError(NvmlError):
    """The user may not ask this."""


class NvmlNotFoundError(NvmlError):
    """NVML knows no such GPU."""


class NvmlLostError(NvmlError):
    """The GPU fell off the bus or needs a reset."""


_CODE_NAMES: dict[int, str] = {
    value: name for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and isinstance(value, int)
}
_KINDS: dict[int, type[NvmlError]] = {
    pynvml.NVML_ERROR_UNINITIALIZED: NvmlMissingError,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NvmlMissingError,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: NvmlMissingError,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: NvmlMissingError,
    pynvml.NVML_ERROR_NOT_SUPPORTED: NvmlUnsupportedError,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: NvmlUnsupportedError,
    pynvml.NVML_ERROR_NO_PERMISSION: NvmlPermissionError,
    pynvml.NVML_ERROR_OPERATING_SYSTEM: NvmlPermissionError,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: NvmlNotFoundError,
    pynvml.NVML_ERROR_NOT_FOUND: NvmlNotFoundError,
    pynvml.NVML_ERROR_GPU_IS_LOST: NvmlLostError,
    pynvml.NVML_ERROR_RESET_REQUIRED: NvmlLostError,
}
_ANY_NEXT_STEP = "see whether nvidia-smi reports the same, then measure again."
_NEXT_STEP: dict[int, str] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no libnvidia-ml.so.1 on this system. Install the NVIDIA driver; in a "
    "container, pass the `utility` capability.",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded. Load it with `modprobe nvidia`.",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "library and kernel driver differ in version. Restart the machine.",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU does not have it. Use another sensor, or leave it out.",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "this driver does not have it yet. Update the driver, or leave it out.",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not read it. Ask the administrator for access to the sensors.",
    pynvml.NVML_ERROR_OPERATING_SYSTEM: "the operating system blocks it. Grant access to /dev/nvidiactl.",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost. Reset it or restart the machine.",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset. Run `nvidia-smi --gpu-reset` or restart the machine.",
}

# nvmlClocksEventReasons, in NVML's own words. Idle and user-set clocks do not hold a run back against anyone's will.
_EVENT_REASONS: dict[int, str] = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
_HARMLESS = {"gpu_idle", "applications_clocks_setting", "display_clock_setting"}


class NvmlGpu:
    """One GPU. NVML stays initialised for the life of the process, as each handle needs it.

    Args:
        handle: NVML's handle of the physical GPU, or the reason why there is none: then it answers every question.
        is_slice: whether torch was given a MIG slice of it.
    """

    def __init__(self, handle: Any, is_slice: bool = False) -> None:
        self._handle = handle
        self._is_slice = is_slice

    @classmethod
    def find(cls, uuid: str | None, pci_bus_id: str | None) -> NvmlGpu:
        """Finds the GPU that torch uses.

        Args:
            uuid: without prefix, as torch gives it.
            pci_bus_id: "00000000:3b:00.0".

        Raises:
            NvmlError: NVML does not work here, or knows no such GPU.
            SensorError: there is nothing to look it up by.
        """
        _call("nvmlInit")
        unknown: SensorError = SensorError(
            "torch tells neither UUID nor PCI address of this GPU, so NVML's sensors cannot be matched to it. "
            "Update torch."
        )
        if uuid is not None:
            try:
                return cls(_call("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}"))
            except NvmlNotFoundError as error:
                unknown = error
            try:
                mig = _call("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")
                return cls(_call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", mig), is_slice=True)
            except NvmlNotFoundError as error:
                unknown = error
        if pci_bus_id is not None:
            return cls(_call("nvmlDeviceGetHandleByPciBusId", pci_bus_id))
        raise unknown

    def energy_source(self) -> EnergySource:
        """The GPU's energy counter, or where it has none its power integrated.

        Raises:
            SensorError: neither answers, or the GPU is shared by MIG slices whose energy cannot be told apart.
        """
        if self._is_slice or self._mig_enabled():
            raise SensorError(
                "this GPU is split into MIG slices, and NVML counts energy and power of the whole GPU only. "
                "Turn MIG off, or leave energy out of the budget."
            )
        try:
            self._counter_j()
        except NvmlUnsupportedError:
            self._power_w()
            return IntegratedPower("NVML power, integrated", self._power_w)
        # Counters update every 20 to 100 ms (Yang et al., arXiv 2312.02741).
        return CounterSource("NVML energy counter", self._counter_j, slowest_update_s=0.2)

    def describe(self) -> dict[str, Any]:
        """Driver, NVML version, highest clocks and power limit; `unavailable` says why one of them is None."""
        return _gather(
            {
                "driver": lambda: self._call("nvmlSystemGetDriverVersion"),
                "nvml": lambda: self._call("nvmlSystemGetNVMLVersion"),
                "sm_max_mhz": lambda: self._ask("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM),
                "memory_max_mhz": lambda: self._ask("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_MEM),
                "power_limit_w": lambda: self._ask("nvmlDeviceGetEnforcedPowerLimit") * 1e-3,
                "mig": lambda: self._is_slice or self._mig_enabled(),
            }
        )

    def conditions(self) -> dict[str, Any]:
        """Clocks, temperature, power state and what holds the clocks down, as they are now.

        `throttled` is true where one of the reasons is not of the user's own making.
        """
        found = _gather(
            {
                "sm_mhz": lambda: self._ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
                "memory_mhz": lambda: self._ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
                "temperature_c": self._temperature_c,
                "power_state": self._power_state,
                "throttle_reasons": self._throttle_reasons,
            }
        )
        reasons = found["throttle_reasons"]
        return found | {"throttled": None if reasons is None else not _HARMLESS.issuperset(reasons)}

    def _call(self, function: str, *arguments: Any) -> Any:
        if isinstance(self._handle, SensorError):
            raise self._handle.with_traceback(None)  # or each raise would lengthen it
        return _call(function, *arguments)

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._call(function, self._handle, *arguments)

    def _counter_j(self) -> float:
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption")) * 1e-3

    def _power_w(self) -> float:
        return float(self._ask("nvmlDeviceGetPowerUsage")) * 1e-3

    def _mig_enabled(self) -> bool:
        try:
            current, _pending = self._ask("nvmlDeviceGetMigMode")
        except NvmlUnsupportedError:
            return False
        return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)

    def _temperature_c(self) -> int:
        # Newer drivers drop the older name, older ones do not know the newer.
        try:
            return int(self._ask("nvmlDeviceGetTemperatureV", pynvml.NVML_TEMPERATURE_GPU))
        except NvmlUnsupportedError:
            return int(self._ask("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU))

    def _power_state(self) -> str:
        state = self._ask("nvmlDeviceGetPerformanceState")
        if state == pynvml.NVML_PSTATE_UNKNOWN:
            raise SensorError("NVML does not know this GPU's power state just now.")
        return f"P{state}"

    def _throttle_reasons(self) -> list[str]:
        try:
            mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        except NvmlUnsupportedError:
            mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        bits = [1 << place for place in range(mask.bit_length()) if mask >> place & 1]
        return [_EVENT_REASONS.get(bit, f"unknown_{bit:#x}") for bit in bits]


def _call(function: str, *arguments: Any) -> Any:
    """Calls NVML by the name pynvml gives the function; an older pynvml without it counts as an older driver."""
    code = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    if hasattr(pynvml, function):
        try:
            return getattr(pynvml, function)(*arguments)
        except pynvml.NVMLError as error:
            code = error.value
    raise _KINDS.get(code, NvmlError)(function, code)


def _gather(questions: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for name, question in questions.items():
        try:
            answers[name] = question()
        except SensorError as error:
            answers[name] = None
            unavailable[name] = str(error)
    return answers | {"unavailable": unavailable}
