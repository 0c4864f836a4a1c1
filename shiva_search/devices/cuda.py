"""One CUDA GPU as a device: CUDA events, a flushed L2 cache, the caching allocator's peak, NVML's energy.

In: callables that queue work on the GPU. Out: the answers of the Device protocol. Every call runs with this GPU as the
current one, since events and streams belong to whichever is current.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnavailableError
from .base import MIB, Device, EnergySample, Run, SensorReport, check_repeats
from .energy import EnergyMeter, SensorError
from .host import describe_host, garbage_kept, host_conditions
from .nvml import NvmlGpu


class CudaDevice:
    """A GPU by its index in torch's numbering.

    Args:
        index: torch's index, which CUDA_VISIBLE_DEVICES renumbers.
        cuda: the torch.cuda module, or what answers like it.
        new_buffer: makes the buffer whose writing empties the L2 cache, given its size in bytes.
        idle_s: length of the idle window before the first energy measurement, in seconds.
    """

    def __init__(
        self,
        index: int = 0,
        cuda: Any = torch.cuda,
        new_buffer: Callable[[int], Any] | None = None,
        idle_s: float = 1.0,
    ) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self._index = index
        self._cuda = cuda
        self._new_buffer = new_buffer or self._bytes
        self._flushed: Any = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._properties = cuda.get_device_properties(index)
        try:
            self._gpu = NvmlGpu.find(*_addresses(self._properties))
        except SensorError as error:
            self._gpu = NvmlGpu(error)
        self._meter: EnergyMeter | None = None
        self._no_energy: str | None = None
        try:
            self._meter = EnergyMeter(self._gpu.energy_source(), self.synchronize, idle_s=idle_s, mark=self._mark)
        except SensorError as error:
            self._no_energy = str(error)

    def describe(self) -> dict[str, Any]:
        """GPU, driver, multiprocessors, memory and L2 in MiB, clocks and versions; `host` describes the computer."""
        host = describe_host()
        nvml = self._gpu.describe()
        return {
            "name": self.name,
            "device_name": self._properties.name,
            "driver": nvml["driver"],
            "cores": self._properties.multi_processor_count,
            "capability": f"{self._properties.major}.{self._properties.minor}",
            "memory_mib": self._properties.total_memory / MIB,
            "l2_mib": self._properties.L2_cache_size / MIB,
            "power_limit_w": nvml["power_limit_w"],
            "mig": nvml["mig"],
            "clocks": {"sm_max_mhz": nvml["sm_max_mhz"], "memory_max_mhz": nvml["memory_max_mhz"]},
            "versions": {
                **host.pop("versions"),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "nvml": nvml["nvml"],
            },
            "unavailable": nvml["unavailable"],
            "host": host,
        }

    def synchronize(self) -> None:
        """Waits for all streams of this GPU."""
        self._cuda.synchronize(self._index)

    def time_ms(self, run: Run, repeats: int = 1) -> float:
        """Milliseconds per repeat between two CUDA events on the current stream.

        The L2 cache is emptied before the sample, and only then: later repeats find what earlier ones left, so one
        repeat per sample gives cold-cache times. Writing the cache also keeps the GPU busy while the host queues the
        first kernels.
        """
        check_repeats(repeats)
        with self._cuda.device(self._index), garbage_kept():
            begun, ended = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self.synchronize()
            self._flush_l2()
            begun.record()
            for _ in range(repeats):
                run()
            ended.record()
            ended.synchronize()
            return float(begun.elapsed_time(ended)) / repeats

    def capture(self, run: Run, warmups: int = 3) -> Run:
        """See the protocol; `warmups` executions come first, on a side stream, where libraries set themselves up."""
        if not self._graphs:  # a pool goes with the last graph in it
            self._pool = self._cuda.graph_pool_handle()
        with self._cuda.device(self._index):
            side = self._cuda.Stream()
            side.wait_stream(self._cuda.current_stream())
            with self._cuda.stream(side):
                for _ in range(warmups):
                    run()
            self._cuda.current_stream().wait_stream(side)
            graph = self._cuda.CUDAGraph()
            try:
                with warnings.catch_warnings(), self._cuda.graph(graph, pool=self._pool):
                    warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # a skipped block queues nothing
                    run()
            except RuntimeError as error:
                raise UnavailableError(
                    f"this run cannot be a CUDA graph: {_first_line(error)}. Measure it without --cuda-graph."
                ) from error
        self._graphs.add(graph)
        replay: Run = graph.replay
        return replay

    def peak_memory_mib(self, run: Run) -> float:
        """The caching allocator's peak during one run above what was live before, in MiB."""
        with self._cuda.device(self._index):
            self.synchronize()
            live_bytes = self._cuda.memory_allocated(self._index)
            self._cuda.reset_peak_memory_stats(self._index)
            run()
            self.synchronize()
            return float(self._cuda.max_memory_allocated(self._index) - live_bytes) / MIB

    def measure_energy(self, run: Run, min_seconds: float) -> EnergySample:
        """Joules of the whole board per run, back to back with warm caches; nothing runs without a sensor."""
        if self._meter is None:
            return EnergySample.missing(self._no_energy or "no energy sensor")
        with self._cuda.device(self._index):
            return self._meter.measure(run, min_seconds)

    def settle(self, most_s: float = 0.0) -> bool:
        """True at once: what may disturb a GPU is told by its conditions."""
        return True

    def conditions(self) -> dict[str, Any]:
        """The host's conditions, and the GPU's clocks, temperature, power state and throttle reasons."""
        host = host_conditions()
        gpu = self._gpu.conditions()
        return host | gpu | {"unavailable": host["unavailable"] | gpu["unavailable"]}

    def sensors(self) -> list[SensorReport]:
        """Events, the allocator, and NVML with what is missing to use it."""
        source = self._meter.source.name if self._meter else "NVML"
        how = self._no_energy or "whole board, read between updates of the sensor"
        return [
            SensorReport("CUDA events", "latency_ms", True, "L2 cache emptied before each sample"),
            SensorReport(source, "energy_j", self._meter is not None, how),
            SensorReport(source, "power_w", self._meter is not None, how),
            SensorReport("torch allocator", "peak_memory_mib", True, "torch.cuda.max_memory_allocated"),
        ]

    def _mark(self) -> Callable[[], object]:
        """Waits for what has been queued up to now, and not for what comes later."""
        event = self._cuda.Event()
        event.record()
        wait: Callable[[], object] = event.synchronize
        return wait

    def _flush_l2(self) -> None:
        if self._flushed is None:
            self._flushed = self._new_buffer(self._properties.L2_cache_size)
        self._flushed.zero_()

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.torch_device)


def open_cuda(index: int | None, cuda: Any = torch.cuda) -> Device:
    """Opens one GPU, the current one where no index is given.

    Raises:
        UnavailableError: torch finds no such GPU; the message says why.
    """
    names = cuda_names(cuda)
    if not names:
        raise UnavailableError(
            f"no CUDA device is available: {_why_not(cuda)}. Install the NVIDIA driver and a CUDA build of torch, or "
            "pass --device cpu."
        )
    wanted = cuda.current_device() if index is None else index
    if f"cuda:{wanted}" not in names:
        raise UnavailableError(f"cuda:{wanted} is not available here. Pass one of: {', '.join(['cpu', *names])}.")
    return CudaDevice(wanted, cuda)


def cuda_names(cuda: Any = torch.cuda) -> list[str]:
    """Names of the GPUs torch can use: "cuda:0", ..."""
    return [f"cuda:{index}" for index in range(cuda.device_count())] if cuda.is_available() else []


def _why_not(cuda: Any) -> str:
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        return _first_line(error)
    return "torch finds none"


def _addresses(properties: Any) -> tuple[str | None, str | None]:
    """UUID and PCI address of a GPU as NVML writes them; None for what this torch does not tell."""
    uuid = getattr(properties, "uuid", None)
    pci: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    return (
        None if uuid is None else str(uuid),
        None if None in pci else "{:08x}:{:02x}:{:02x}.0".format(*pci),
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
