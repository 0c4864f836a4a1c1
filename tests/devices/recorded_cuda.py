"""A stand-in for torch.cuda that writes down what it is asked and keeps the rules the real one has.

Work is done by the host at once; events take the host's clock when recorded, and like real ones refuse to tell the
elapsed time before they were waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class RecordedEvent:
    def __init__(self, calls: list[str], name: str) -> None:
        self._calls = calls
        self._name = name
        self.waited = False
        self.at_s = 0.0

    def record(self) -> None:
        self._calls.append(f"record {self._name}")
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        self._calls.append(f"wait for {self._name}")
        self.waited = True

    def elapsed_time(self, end: RecordedEvent) -> float:
        self._calls.append("elapsed")
        if not end.waited:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (end.at_s - self.at_s) * 1e3


class RecordedStream:
    def __init__(self, calls: list[str], name: str) -> None:
        self._calls = calls
        self.name = name

    def wait_stream(self, other: RecordedStream) -> None:
        self._calls.append(f"{self.name} waits for {other.name}")


class RecordedGraph:
    def __init__(self) -> None:
        self.captured: list[Callable[[], object]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class RecordedCuda:
    def __init__(self, devices: int = 1, capturable: bool = True, **properties: Any) -> None:
        self.calls: list[str] = []
        self.graphs: list[RecordedGraph] = []
        self.live_bytes = self.peak_bytes = 0
        self._events = 0
        self._devices = devices
        self._capturable = capturable
        self._properties = properties
        self._current = RecordedStream(self.calls, "current stream")

    # what a run does

    def allocate(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def release(self, size: int) -> None:
        self.live_bytes -= size

    def new_buffer(self, size: int) -> Any:
        self.calls.append(f"new buffer of {size}")
        return SimpleNamespace(zero_=lambda: self.calls.append("flush"))

    # torch.cuda

    def is_available(self) -> bool:
        return self._devices > 0

    def device_count(self) -> int:
        return self._devices

    def current_device(self) -> int:
        return 0

    def init(self) -> None:
        if self._devices == 0:
            raise RuntimeError("No CUDA GPUs are available")

    def get_device_properties(self, index: int) -> Any:
        sizes = {"multi_processor_count": 108, "total_memory": 80 * 2**30, "L2_cache_size": 40 * 2**20}
        return SimpleNamespace(name="Recorded GPU", major=8, minor=0, **sizes, **self._properties)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        self.calls.append(f"enter device {index}")
        yield
        self.calls.append(f"leave device {index}")

    def synchronize(self, index: int) -> None:
        self.calls.append(f"synchronize {index}")

    def Event(self, enable_timing: bool = False) -> RecordedEvent:  # named as torch names it
        if not enable_timing:
            return RecordedEvent(self.calls, "mark")
        self._events += 1
        return RecordedEvent(self.calls, "begin" if self._events % 2 else "end")

    def memory_allocated(self, index: int) -> int:
        return self.live_bytes

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak_bytes = self.live_bytes

    def max_memory_allocated(self, index: int) -> int:
        return self.peak_bytes

    def Stream(self) -> RecordedStream:
        return RecordedStream(self.calls, "side stream")

    def current_stream(self) -> RecordedStream:
        return self._current

    @contextmanager
    def stream(self, stream: RecordedStream) -> Iterator[None]:
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append(f"off {stream.name}")

    def CUDAGraph(self) -> RecordedGraph:
        self.graphs.append(RecordedGraph())
        return self.graphs[-1]

    def graph_pool_handle(self) -> str:
        self.calls.append("new pool")
        return "pool"

    @contextmanager
    def graph(self, graph: RecordedGraph, pool: str) -> Iterator[None]:
        self.calls.append(f"capture into {pool} begins")
        if not self._capturable:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors ...")
        yield
        self.calls.append("capture ends")
