"""What every Device keeps to. A new one joins with one line in DEVICES."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recorded_cuda import RecordedCuda

from shiva_search.devices import Device, check_sensors, list_devices, open_device
from shiva_search.devices.cpu import CpuDevice
from shiva_search.devices.cuda import CudaDevice
from shiva_search.devices.host import keep_freed_memory
from shiva_search.errors import InputError, UnavailableError


def recorded() -> CudaDevice:
    cuda = RecordedCuda()
    return CudaDevice(cuda=cuda, new_buffer=cuda.new_buffer)


DEVICES = [
    pytest.param(CpuDevice, id="cpu"),
    pytest.param(recorded, id="recorded cuda"),
    pytest.param(lambda: open_device("cuda"), id="cuda", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("open_it", DEVICES)
class TestEveryDevice:
    @pytest.fixture
    def device(self, open_it: Callable[[], Device]) -> Device:
        return open_it()

    def test_has_the_protocol(self, device: Device) -> None:
        assert isinstance(device, Device)
        assert str(device.torch_device) == device.name
        assert device.synchronize() is None

    def test_describes_itself(self, device: Device) -> None:
        described = device.describe()
        assert json.loads(json.dumps(described)) == described
        assert described["name"] == device.name
        assert described["device_name"]
        assert described["cores"] > 0
        assert described["memory_mib"] > 0
        assert described["versions"]["torch"] == torch.__version__
        everything = described | described["clocks"] | described["versions"]
        assert all(everything[name] is None and reason for name, reason in described["unavailable"].items())

    def test_time_is_positive(self, device: Device) -> None:
        assert 0 < device.time_ms(lambda: None) < math.inf

    def test_time_is_per_repeat(self, device: Device) -> None:
        ran = 0

        def run() -> None:
            nonlocal ran
            ran += 1
            time.sleep(0.002)

        time_ms = min(device.time_ms(run, repeats=5) for _ in range(3))
        assert ran == 15
        assert 1.2 < time_ms < 8  # 10 ms and more if it were the sum; a GPU that still flushes starts its clock late

    @pytest.mark.parametrize("repeats", [0, -1])
    def test_refuses_a_sample_of_nothing(self, device: Device, repeats: int) -> None:
        with pytest.raises(InputError, match="at least 1"):
            device.time_ms(lambda: None, repeats=repeats)

    def test_memory_of_nothing_is_nothing(self, device: Device) -> None:
        assert device.peak_memory_mib(lambda: None) in (0.0, None)

    def test_energy_is_positive_or_missing_with_a_reason(self, device: Device) -> None:
        sample = device.measure_energy(lambda: time.sleep(0.001), min_seconds=0.05)
        if sample.reason is None:
            assert sample.energy_j_per_run is not None and sample.energy_j_per_run > 0
            assert sample.power_w == pytest.approx(sample.energy_j_per_run * sample.runs / sample.seconds)
            assert sample.ticks > 0
        else:
            assert sample.reason.endswith(".") and "\n" not in sample.reason
            assert (sample.energy_j_per_run, sample.power_w) == (None, None)

    def test_conditions_say_what_they_could_not_read(self, device: Device) -> None:
        before = device.conditions()
        assert json.loads(json.dumps(before)) == before
        assert all(before[name] is None and reason for name, reason in before["unavailable"].items())
        after = device.conditions()
        assert after.keys() == before.keys()
        totals = [name for name in before if name.endswith("_total") and before[name] is not None]
        assert all(after[name] >= before[name] for name in totals)

    def test_reports_one_sensor_for_each_quantity(self, device: Device) -> None:
        reports = {report.what: report for report in device.sensors()}
        assert list(reports) == ["latency_ms", "energy_j", "power_w", "peak_memory_mib"]
        assert len(device.sensors()) == len(reports)
        assert all(report.name and report.how and "\n" not in report.how for report in reports.values())
        assert reports["latency_ms"].available
        if not reports["energy_j"].available:
            assert device.measure_energy(lambda: None, 0.01).reason == reports["energy_j"].how

    def test_an_error_of_the_run_comes_through_and_the_device_goes_on(self, device: Device) -> None:
        def run() -> None:
            raise ZeroDivisionError

        for measure in (device.time_ms, device.peak_memory_mib):
            with pytest.raises(ZeroDivisionError):
                measure(run)
        assert device.time_ms(lambda: None) > 0
        assert device.peak_memory_mib(lambda: None) in (0.0, None)


@pytest.mark.parametrize("metric", ["energy_j", "power_w"])
def test_a_budget_without_its_sensor_is_refused(metric: str, tmp_path: Path) -> None:
    device = CpuDevice(powercap=tmp_path / "none")
    others = ["latency_ms", "memory_mib", "gflops", "mean_keep"]
    check_sensors(device, others)
    with pytest.raises(UnavailableError, match=r"an? (energy|power) budget needs a sensor .*RAPL") as refusal:
        check_sensors(device, [*others, metric])
    assert f"drop --max-{metric.split('_')[0]}" in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    (tmp_path / "intel-rapl:0").mkdir()
    for file, value in {"name": "package-0", "max_energy_range_uj": "262143328850", "energy_uj": "5"}.items():
        (tmp_path / "intel-rapl:0" / file).write_text(value)
    check_sensors(CpuDevice(powercap=tmp_path), [*others, metric])


def test_cpu_is_always_there() -> None:
    assert list_devices()[0] == "cpu"
    assert open_device("cpu").name == "cpu"


def test_all_listed_devices_open() -> None:
    assert [open_device(name).name for name in list_devices()] == list_devices()


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cpu:0", "cpu:", "cuda:", "cuda:one", "cuda:-1", "cuda:0:1"])
def test_unknown_names_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match="Available here: cpu") as refusal:
        open_device(name)
    assert repr(name) in str(refusal.value)
    assert refusal.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_that_is_not_there(name: str) -> None:
    with pytest.raises(UnavailableError, match="no CUDA device is available: .+ pass --device cpu") as refusal:
        open_device(name)
    assert refusal.value.exit_code == 4
    assert "\n" not in str(refusal.value)


FAULTS = """
import resource
import torch
import shiva_search as ss
{call}
model = ss.load_model()
inputs = model.example()
def forward():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        model.module(**inputs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted(forward() for _ in range(9))[4])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_stays_where_it_is_used_again(kept: bool) -> None:
    """Page faults of a forward that has run before: hardly any, or as many as it needs memory."""
    call = "assert ss.keep_freed_memory()" if kept else ""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults = int(done.stdout)
    assert faults < 100 if kept else faults > 1000


def test_a_users_own_setting_of_the_heap_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_freed_memory() is False
