"""The CPU device on real work: its clock, the allocator's account of memory, and RAPL where it may be read."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from shiva_search.devices.cpu import CpuDevice
from shiva_search.devices.host import ahead_of_others, describe_host, host_conditions

MIB = 2**20


def buffer(mib: float) -> torch.Tensor:
    return torch.empty(int(mib * MIB), dtype=torch.uint8)


def test_time_grows_with_work() -> None:
    device = CpuDevice()
    a_NN = torch.randn(192, 192)

    def work(products: int) -> float:
        return min(device.time_ms(lambda: [a_NN @ a_NN for _ in range(products)]) for _ in range(5))

    work(1)
    assert work(2) < work(12) < work(72)


def test_garbage_is_collected_between_samples_only() -> None:
    device = CpuDevice()
    seen: list[bool] = []
    device.time_ms(lambda: seen.append(gc.isenabled()))
    assert seen == [False]
    assert gc.isenabled()


def test_peak_memory_of_a_known_allocation() -> None:
    assert CpuDevice().peak_memory_mib(lambda: buffer(8)) == pytest.approx(8, rel=0.01)


def test_peak_is_not_the_sum() -> None:
    def run() -> None:
        first = buffer(6)
        second = buffer(3)
        del first
        third = buffer(4)
        del second, third

    assert CpuDevice().peak_memory_mib(run) == pytest.approx(9, rel=0.01)


def test_peak_is_above_what_was_live_before() -> None:
    kept = [buffer(16)]
    assert CpuDevice().peak_memory_mib(lambda: kept.append(buffer(2))) == pytest.approx(2, rel=0.01)
    assert len(kept) == 2


def test_peak_counts_what_an_operation_needs_inside() -> None:
    x_ND = torch.randn(256, 1024)  # 1 MiB
    module = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
    with torch.inference_mode():
        peak_mib = CpuDevice().peak_memory_mib(lambda: module(x_ND))
    assert peak_mib == pytest.approx(8, rel=0.01)  # 4 MiB into GELU and 4 out of it


def test_peak_of_a_backward_pass() -> None:
    x_ND = torch.randn(256, 1024, requires_grad=True)
    # exp keeps its result of 1 MiB until its gradient, another one, is made.
    assert CpuDevice().peak_memory_mib(lambda: x_ND.exp().sum().backward()) == pytest.approx(2, rel=0.01)


def test_profiler_writes_nothing_and_leaves_the_environment_alone() -> None:
    program = (
        "import os\n"
        "from shiva_search.devices.cpu import CpuDevice\n"
        "import torch\n"
        "before = dict(os.environ)\n"
        "peak_mib = CpuDevice().peak_memory_mib(lambda: torch.empty(2**20, dtype=torch.uint8))\n"
        "assert dict(os.environ) == before\n"
        "print(peak_mib)\n"
    )
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=280)
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_energy_from_rapl(tmp_path: Path) -> None:
    domain = tmp_path / "intel-rapl:0"
    domain.mkdir()
    for file, value in {"name": "package-0", "max_energy_range_uj": "262143328850", "energy_uj": "0"}.items():
        (domain / file).write_text(value)
    device = CpuDevice(powercap=tmp_path, idle_s=0)
    spent_uj = 0

    def run() -> None:
        nonlocal spent_uj
        spent_uj += 750_000
        (domain / "energy_uj").write_text(str(spent_uj))

    sample = device.measure_energy(run, min_seconds=0.05)
    assert sample.energy_j_per_run == pytest.approx(0.75)
    assert sample.power_w == pytest.approx(0.75 * sample.runs / sample.seconds)
    assert all(report.available for report in device.sensors())


def test_without_rapl_nothing_runs(tmp_path: Path) -> None:
    ran: list[int] = []
    sample = CpuDevice(powercap=tmp_path).measure_energy(lambda: ran.append(1), min_seconds=0.05)
    assert sample.energy_j_per_run is None
    assert sample.reason is not None and "no RAPL package" in sample.reason
    assert (ran, sample.runs) == ([], 0)


def test_conditions_count_context_switches() -> None:
    before = host_conditions()
    for _ in range(20):
        threading.Event().wait(0.001)
    after = host_conditions()
    assert after["voluntary_switches_total"] >= before["voluntary_switches_total"] + 20


def nice_of_threads() -> dict[int, int]:
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    return {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}


def test_measuring_goes_before_other_processes_where_that_is_allowed() -> None:
    release = threading.Event()
    waiting = [threading.Thread(target=release.wait) for _ in range(2)]
    waiting[0].start()
    before = nice_of_threads()
    usual = before[threading.get_native_id()]
    try:
        with pytest.raises(RuntimeError, match="stop"), ahead_of_others():
            waiting[1].start()
            inside = nice_of_threads()
            assert all(nice == inside[threading.get_native_id()] for nice in inside.values())
            assert host_conditions()["nice"] == inside[threading.get_native_id()]
            if may_go_first():
                assert set(inside.values()) == {-20}
            else:
                assert max(inside.values()) <= usual
            raise RuntimeError("stop")
        after = nice_of_threads()
        assert {thread: after[thread] for thread in before} == before
        assert after[waiting[1].native_id or 0] == usual
    finally:
        release.set()
        for thread in waiting:
            if thread.ident:
                thread.join()


def may_go_first() -> bool:
    code = "import os; os.setpriority(os.PRIO_PROCESS, 0, -20)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_without_permission_priorities_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, who: int, priority: int) -> None:
        raise PermissionError("not permitted")

    before = nice_of_threads()
    monkeypatch.setattr(os, "setpriority", refuse)
    with ahead_of_others():
        assert nice_of_threads() == before


def test_where_threads_are_not_listed_nothing_is_changed(tmp_path: Path) -> None:
    before = nice_of_threads()
    with ahead_of_others(proc=tmp_path):
        assert nice_of_threads() == before


def test_host_from_a_proc_tree(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  9 8 7 6 5 4 3 200 0 0\ncpu0 9 8 7 6 5 4 3 200 0 0\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Test CPU 3000\ncpu MHz\t\t: 2500.125\n")
    cpufreq = tmp_path / "devices/system/cpu/cpu0/cpufreq"
    cpufreq.mkdir(parents=True)
    (cpufreq / "cpuinfo_max_freq").write_text("3900000\n")
    (cpufreq / "scaling_governor").write_text("powersave\n")
    described = describe_host(proc=tmp_path, sys=tmp_path)
    assert described["device_name"] == "Test CPU 3000"
    assert described["clocks"] == {"cpu_mhz": 2500.125, "cpu_max_mhz": 3900.0, "governor": "powersave"}
    assert described["unavailable"] == {}
    assert host_conditions(tmp_path)["steal_s_total"] == pytest.approx(2.0, rel=0.5)  # 200 ticks, mostly of 10 ms


def test_host_that_tells_nothing(tmp_path: Path) -> None:
    described = describe_host(proc=tmp_path, sys=tmp_path)
    assert set(described["clocks"].values()) == {None}
    assert described["unavailable"].keys() == described["clocks"].keys()
    assert described["device_name"]
    conditions = host_conditions(tmp_path)
    assert conditions["steal_s_total"] is None
    assert "steal_s_total" in conditions["unavailable"]
