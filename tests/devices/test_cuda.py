"""The order in which the CUDA device asks torch.cuda for things, written down by a stand-in; and the real one."""

from __future__ import annotations

import pytest
import torch
from recorded_cuda import RecordedCuda

from shiva_search.devices import open_device
from shiva_search.devices.cuda import CudaDevice, cuda_names, open_cuda
from shiva_search.errors import UnavailableError

L2_BYTES = 40 * 2**20


def device_on(cuda: RecordedCuda, index: int = 0) -> CudaDevice:
    return CudaDevice(index, cuda=cuda, new_buffer=cuda.new_buffer)


def test_sample_is_flushed_recorded_and_waited_for_in_this_order() -> None:
    cuda = RecordedCuda(devices=2)
    device = device_on(cuda, index=1)
    device.time_ms(lambda: cuda.calls.append("run"), repeats=3)
    assert [call for call in cuda.calls if call != f"new buffer of {L2_BYTES}"] == [
        "enter device 1",
        "synchronize 1",
        "flush",
        "record begin",
        "run",
        "run",
        "run",
        "record end",
        "wait for end",
        "elapsed",
        "leave device 1",
    ]


def test_every_sample_is_flushed_with_one_buffer_of_the_size_of_the_l2_cache() -> None:
    cuda = RecordedCuda()
    device = device_on(cuda)
    for _ in range(4):
        device.time_ms(lambda: None)
    assert cuda.calls.count(f"new buffer of {L2_BYTES}") == 1
    assert cuda.calls.count("flush") == 4


def test_peak_memory_is_above_what_was_live() -> None:
    cuda = RecordedCuda()
    cuda.allocate(100 * 2**20)
    cuda.release(40 * 2**20)

    def run() -> None:
        cuda.allocate(8 * 2**20)
        cuda.release(8 * 2**20)
        cuda.allocate(2 * 2**20)

    assert device_on(cuda).peak_memory_mib(run) == 8.0
    assert cuda.calls == ["enter device 0", "synchronize 0", "synchronize 0", "leave device 0"]


def test_capture_warms_up_on_a_side_stream_and_returns_the_replay() -> None:
    cuda = RecordedCuda()
    device = device_on(cuda)
    replay = device.capture(lambda: cuda.calls.append("run"), warmups=2)
    assert cuda.calls == [
        "new pool",
        "enter device 0",
        "side stream waits for current stream",
        "on side stream",
        "run",
        "run",
        "off side stream",
        "current stream waits for side stream",
        "capture into pool begins",
        "run",
        "capture ends",
        "leave device 0",
    ]
    replay()
    replay()
    assert cuda.graphs[0].replays == 2
    assert cuda.calls.count("run") == 3
    device.capture(lambda: None)
    assert cuda.calls.count("new pool") == 1  # graphs of a device share their memory
    del replay
    cuda.graphs.clear()
    device.capture(lambda: None)
    assert cuda.calls.count("new pool") == 2  # which goes with the last of them


def test_what_cannot_be_captured_is_refused_in_one_line() -> None:
    cuda = RecordedCuda(capturable=False)
    with pytest.raises(UnavailableError, match="operation not permitted when stream is capturing. Measure it without"):
        device_on(cuda).capture(lambda: None)


def test_energy_of_a_gpu_that_cannot_be_matched_is_missing() -> None:
    device = device_on(RecordedCuda())  # with neither UUID nor address
    sample = device.measure_energy(lambda: None, 0.01)
    assert sample.energy_j_per_run is None and sample.reason
    conditions = device.conditions()
    assert conditions["temperature_c"] is None
    assert conditions["unavailable"]["temperature_c"] == sample.reason == device.describe()["unavailable"]["driver"]


def test_names_and_indices() -> None:
    cuda = RecordedCuda(devices=2)
    assert cuda_names(cuda) == ["cuda:0", "cuda:1"]
    assert open_cuda(None, cuda).name == "cuda:0"
    assert open_cuda(1, cuda).name == "cuda:1"
    with pytest.raises(UnavailableError, match="cuda:2 is not available here. Pass one of: cpu, cuda:0, cuda:1"):
        open_cuda(2, cuda)


def test_no_gpu_says_why() -> None:
    cuda = RecordedCuda(devices=0)
    assert cuda_names(cuda) == []
    with pytest.raises(UnavailableError, match="No CUDA GPUs are available"):
        open_cuda(None, cuda)


@pytest.mark.cuda
def test_real_gpu() -> None:
    device = open_device("cuda")
    assert isinstance(device, CudaDevice)
    a_NN = torch.randn(2048, 2048, device=device.torch_device)
    out_NN = torch.empty_like(a_NN)

    def work(products: int) -> None:
        for _ in range(products):
            torch.mm(a_NN, a_NN, out=out_NN)

    work(3)
    few_ms, many_ms = (min(device.time_ms(lambda n=n: work(n)) for _ in range(5)) for n in (4, 40))
    assert few_ms * 4 < many_ms < few_ms * 20
    replay = device.capture(lambda: work(4))
    assert 0 < device.time_ms(replay) < 2 * few_ms
    grown = device.peak_memory_mib(lambda: torch.empty(64 * 2**20, dtype=torch.uint8, device=device.torch_device))
    assert grown == pytest.approx(64, rel=0.01)
    sample = device.measure_energy(lambda: work(4), 1.0)
    assert sample.reason or (sample.power_w and 10 < sample.power_w < 2000)
