"""What is known of the computer around a device: processor, memory, versions, and who else is using it.

In: /proc, /sys and the operating system. Out: dictionaries ready for JSON; what a system does not tell is None.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .base import MIB

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_FIRST = -20  # the nice value that goes first
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(limit_mib: int = 1024) -> bool:
    """Keep what tensors freed in this process, for its life, instead of giving it back and asking for it again.

    By default glibc returns what a forward frees to the system, and the next forward waits for pages to be mapped and
    cleared again: 8,500 page faults and 15 % of the time of a dense forward of fashion-dit, more at some times than at
    others. Call it where a model is deployed on a CPU, as is done wherever one is measured.

    Args:
        limit_mib: most memory to keep at the end of the heap. Single tensors of 32 MiB and more are returned as before.

    Returns:
        Whether it was done: not without glibc's malloc, nor where the environment sets MALLOC_TRIM_THRESHOLD_,
        MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS
        return False
    limit_bytes = min(limit_mib * 2**20, 2**31 - 1)  # a C int
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20) and mallopt(_TRIM_THRESHOLD, limit_bytes))


def describe_host(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> dict[str, Any]:
    """Processor, kernel, cores, memory in MiB, clocks in MHz and versions of what runs the measurement."""
    cpufreq = sys / "devices/system/cpu/cpu0/cpufreq"
    clocks = {
        "cpu_mhz": _number(_cpuinfo(proc, "cpu MHz")),
        "cpu_max_mhz": _scaled(_number(_line(cpufreq / "cpuinfo_max_freq")), 1e-3),  # the kernel speaks kHz
        "governor": _line(cpufreq / "scaling_governor"),
    }
    return {
        "device_name": _cpuinfo(proc, "model name") or platform.processor() or platform.machine(),
        "driver": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB,
        "clocks": clocks,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "unavailable": {name: "the system does not tell" for name, value in clocks.items() if value is None},
    }


def host_conditions(proc: Path = Path("/proc")) -> dict[str, Any]:
    """Load, priority, context switches and page faults of this process, and time stolen by a hypervisor.

    Names that end in `_total` count since the start of the process (switches, faults) or of the system (steal, in
    seconds).
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    steal_s = _steal_s(proc)
    return {
        "load_1min": os.getloadavg()[0],
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "voluntary_switches_total": usage.ru_nvcsw,
        "involuntary_switches_total": usage.ru_nivcsw,
        "page_faults_total": usage.ru_minflt,
        "steal_s_total": steal_s,
        "unavailable": {} if steal_s is not None else {"steal_s_total": f"no steal time in {proc / 'stat'}"},
    }


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Holds the garbage collector back, whose pauses would otherwise land in single samples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def ahead_of_others(proc: Path = Path("/proc")) -> Iterator[None]:
    """All threads of this process go before other processes, as far as the system lets them, and back at the end.

    A run on several threads waits for the last of them, so one busy process beside it costs long runs more than short
    ones, and ratios are off by a fifth. Ahead of it, by less than 1 %. Root may do so, and whom CAP_SYS_NICE or
    RLIMIT_NICE allow it; for others nothing changes. Processes of other control groups are not affected.
    """
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    before: dict[int, int] = {}
    for thread in _threads(proc):
        with suppress(ProcessLookupError):  # ended since
            before[thread] = os.getpriority(os.PRIO_PROCESS, thread)
    try:
        for thread in before:
            # What is allowed to whom is not root: see setrlimit(2).
            if not _set_nice(thread, _FIRST):
                _set_nice(thread, min(usual, 20 - resource.getrlimit(resource.RLIMIT_NICE)[0]))
        yield
    finally:
        for thread in _threads(proc):  # those that began on the way as well: they inherit
            _set_nice(thread, before.get(thread, usual))


def _threads(proc: Path) -> list[int]:
    # On Linux each thread has a nice value of its own; elsewhere this folder is missing, and nothing is changed.
    try:
        return [int(entry.name) for entry in (proc / "self/task").iterdir()]
    except OSError:
        return []


def _set_nice(thread: int, nice: int) -> bool:
    try:
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    except (PermissionError, ProcessLookupError):  # not allowed; ended since
        return False
    return True


def _steal_s(proc: Path) -> float | None:
    # "cpu  user nice system idle iowait irq softirq steal ...", in clock ticks over all cores
    fields = (_line(proc / "stat") or "").split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else None


def _cpuinfo(proc: Path, key: str) -> str | None:
    try:
        text = (proc / "cpuinfo").read_text()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(key)), None)


def _line(path: Path) -> str | None:
    try:
        return path.read_text().partition("\n")[0].strip()
    except OSError:
        return None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
