"""What the tests of devices share: a scripted libnvidia-ml.so.1, and where the stand-ins beside this file are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(HERE))  # for recorded_cuda

# One GPU that answers everything; a test overrides the lines it is about.
WELL = {
    "nvmlSystemGetDriverVersion": "580.10",
    "nvmlSystemGetNVMLVersion": "13.580.10",
    "nvmlDeviceGetHandleByUUID": "GPU-aaaa",
    "nvmlDeviceGetHandleByPciBusId_v2": "00000000:3b:00.0",
    "nvmlDeviceGetMigMode": "0",
    "nvmlDeviceGetTotalEnergyConsumption": "clock:200000:20",
    "nvmlDeviceGetPowerUsage": "wave:180000:220000:20",
    "nvmlDeviceGetEnforcedPowerLimit": "300000",
    "nvmlDeviceGetPerformanceState": "0",
    "nvmlDeviceGetClockInfo": "1410",
    "nvmlDeviceGetMaxClockInfo": "1980",
    "nvmlDeviceGetTemperatureV": "61",
    "nvmlDeviceGetTemperature": "61",
    "nvmlDeviceGetCurrentClocksEventReasons": "0x0",
    "nvmlDeviceGetCurrentClocksThrottleReasons": "0x0",
}


@pytest.fixture(scope="session")
def nvml_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that hold a libnvidia-ml.so.1: of a new driver and of an old one, and one that holds none."""
    folders = {"none": tmp_path_factory.mktemp("none")}
    for driver, flags in {"new": [], "old": ["-DOLD_DRIVER"]}.items():
        folders[driver] = tmp_path_factory.mktemp(driver)
        library = folders[driver] / "libnvidia-ml.so.1"
        source = HERE / "scripted_nvml.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-pthread", *flags, "-o", library, source], check=True)
    return folders


@pytest.fixture
def nvml(nvml_libraries: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """Asks the real pynvml on top of the scripted library, in a process of its own; see nvml_program.py."""

    def ask(task: str, driver: str = "new", script: dict[str, str] | None = None, **options: Any) -> Any:
        lines = WELL | (script or {})
        (tmp_path / "script").write_text("".join(f"{name} {answers}\n" for name, answers in lines.items()))
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(nvml_libraries[driver]),
            "NVML_SCRIPT": str(tmp_path / "script"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "nvml_program.py"), task, json.dumps(options)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask
