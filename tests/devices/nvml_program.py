"""What test_nvml.py runs in a process of its own, with a scripted libnvidia-ml.so.1 where the loader looks first.

In: a task and its options as JSON. Out: one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from shiva_search.devices.energy import EnergyMeter, SensorError
from shiva_search.devices.nvml import NvmlError, NvmlGpu


def found(uuid: str | None = "aaaa", pci: str | None = None) -> NvmlGpu:
    return NvmlGpu.find(uuid, pci)


def task_describe(**gpu: Any) -> dict[str, Any]:
    return found(**gpu).describe()


def task_conditions(times: int = 1) -> list[dict[str, Any]]:
    gpu = found()
    return [gpu.conditions() for _ in range(times)]


def task_energy(
    work_mj: int = 0,
    work_s: float = 0.0,
    min_seconds: float = 0.0,
    min_ticks: int = 10,
    poll_s: float = 0.0,
    idle_s: float = 0.0,
    **gpu: Any,
) -> dict[str, Any]:
    """Each run adds work_mj to the GPU's `work` counter and lasts work_s."""
    source = found(**gpu).energy_source()
    source.settle_s = 0.0
    library = ctypes.CDLL("libnvidia-ml.so.1")

    def run() -> None:
        library.scripted_work_mj(work_mj)
        time.sleep(work_s)

    meter = EnergyMeter(source, synchronize=lambda: None, min_ticks=min_ticks, poll_s=poll_s, idle_s=idle_s)
    return {"source": source.name} | asdict(meter.measure(run, min_seconds))


def task_codes(count: int) -> dict[str, Any]:
    """Asks for the power limit again and again, and tells the kind of error of each answer."""
    gpu = found()
    kinds = {}
    for _ in range(count):
        try:
            gpu._ask("nvmlDeviceGetEnforcedPowerLimit")
        except NvmlError as error:
            kinds[error.code] = [type(error).__name__, error.code_name, str(error)]
    return kinds


def task_device(min_seconds: float) -> dict[str, Any]:
    """A whole CudaDevice on a recorded torch.cuda, with its energy from the scripted library."""
    from recorded_cuda import RecordedCuda

    from shiva_search.devices.cuda import CudaDevice

    cuda = RecordedCuda(uuid="aaaa")
    device = CudaDevice(cuda=cuda, new_buffer=cuda.new_buffer, idle_s=0.3)
    return {
        "describe": device.describe(),
        "conditions": device.conditions(),
        "sensors": [asdict(report) for report in device.sensors()],
        "energy": asdict(device.measure_energy(lambda: time.sleep(0.001), min_seconds)),
        "calls": cuda.calls,
    }


TASKS: dict[str, Callable[..., Any]] = {
    "describe": task_describe,
    "conditions": task_conditions,
    "energy": task_energy,
    "codes": task_codes,
    "device": task_device,
}

if __name__ == "__main__":
    try:
        answer = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    except SensorError as error:
        answer = {"error": type(error).__name__, "text": str(error), "exit_code": error.exit_code}
    print(json.dumps(answer))
