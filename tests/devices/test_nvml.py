"""The real pynvml on a scripted libnvidia-ml.so.1: counters that work, wrap, stand still, are missing or forbidden."""

from __future__ import annotations

import ctypes.util
from collections.abc import Callable
from typing import Any

import pynvml
import pytest

Nvml = Callable[..., Any]  # the fixture of conftest.py

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
POWER = "nvmlDeviceGetPowerUsage"


def test_energy_of_a_run_is_exact_between_two_updates_of_the_counter(nvml: Nvml) -> None:
    # Half a joule a run, told in steps of 4 J: each update is 8 runs.
    answer = nvml("energy", script={COUNTER: "work:4000"}, work_mj=500, min_ticks=12)
    assert answer["source"] == "NVML energy counter"
    assert answer["energy_j_per_run"] == pytest.approx(0.5)
    assert (answer["ticks"], answer["runs"], answer["reason"]) == (12, 96, None)
    assert answer["power_w"] == pytest.approx(0.5 * 96 / answer["seconds"])


def test_window_lasts_as_long_as_asked(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "work:1000"}, work_mj=1000, work_s=0.002, min_ticks=3, min_seconds=0.3)
    assert answer["seconds"] >= 0.3
    assert answer["energy_j_per_run"] == pytest.approx(1.0)
    assert answer["ticks"] == answer["runs"] > 3


def test_power_and_idle_power_come_from_the_counter(nvml: Nvml) -> None:
    answer = nvml("energy", work_s=0.001, min_seconds=0.3, poll_s=0.002, idle_s=0.3)
    assert answer["power_w"] == pytest.approx(200, rel=0.2)
    assert answer["idle_power_w"] == pytest.approx(200, rel=0.2)


def test_counter_that_goes_backwards_gives_no_energy(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "4294967000 4294967100 4294967200 4 104 204 304"}, min_ticks=3)
    assert answer["energy_j_per_run"] is None
    assert answer["power_w"] is None
    assert "went backwards, from 4294967.200 J to 0.004 J" in answer["reason"]


def test_counter_that_never_moves_gives_no_energy(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "1000"}, work_s=0.001, min_ticks=1)
    assert answer["energy_j_per_run"] is None
    assert "stood still" in answer["reason"]
    assert answer["runs"] > 0


def test_counter_that_stops_in_the_window_gives_no_energy(nvml: Nvml) -> None:
    moving = " ".join(str(1000 * step) for step in range(20))
    answer = nvml("energy", script={COUNTER: moving}, work_s=0.001, min_ticks=1, min_seconds=0.3)
    assert answer["energy_j_per_run"] is None
    assert "stood still" in answer["reason"]


def test_counter_slower_than_any_known_gives_no_energy(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "clock:200000:350"}, work_s=0.001, min_ticks=4)
    assert answer["energy_j_per_run"] is None
    assert "needs 4 updates in a window and gave" in answer["reason"]


def test_power_is_integrated_where_there_is_no_counter(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "!3"}, work_s=0.002, min_seconds=0.4)
    assert answer["source"] == "NVML power, integrated"
    assert answer["reason"] is None
    assert answer["power_w"] == pytest.approx(200, rel=0.2)
    assert answer["energy_j_per_run"] == pytest.approx(200 * answer["seconds"] / answer["runs"], rel=0.2)
    assert answer["ticks"] >= 10


def test_power_that_is_stuck_gives_no_energy(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "!3", POWER: "200000"}, work_s=0.001, min_ticks=1)
    assert answer["energy_j_per_run"] is None
    assert "stood still" in answer["reason"]


def test_gpu_lost_while_power_is_integrated(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "!3", POWER: "100000 110000 120000 !15"}, work_s=0.001)
    assert answer["energy_j_per_run"] is None
    assert "NVML_ERROR_GPU_IS_LOST" in answer["reason"]


def test_gpu_lost_while_counting(nvml: Nvml) -> None:
    answer = nvml("energy", script={COUNTER: "1000 2000 3000 !15"})
    assert answer["energy_j_per_run"] is None
    assert "NVML_ERROR_GPU_IS_LOST" in answer["reason"]


@pytest.mark.parametrize("script", [{COUNTER: "!4"}, {COUNTER: "!3", POWER: "!4"}], ids=["counter", "power"])
def test_no_permission_is_not_taken_for_no_counter(nvml: Nvml, script: dict[str, str]) -> None:
    answer = nvml("energy", script=script)
    assert answer["error"] == "NvmlPermissionError"
    assert "Ask the administrator" in answer["text"]


def test_gpu_without_counter_and_power(nvml: Nvml) -> None:
    assert nvml("energy", script={COUNTER: "!3", POWER: "!3"})["error"] == "NvmlUnsupportedError"


@pytest.mark.parametrize(
    ("uuid", "script"),
    [("aaaa", {"nvmlDeviceGetMigMode": "1"}), ("bbbb", {"nvmlDeviceGetHandleByUUID": "GPU-aaaa MIG-bbbb"})],
    ids=["mode on", "given a slice"],
)
def test_energy_of_a_mig_slice_cannot_be_told(nvml: Nvml, uuid: str, script: dict[str, str]) -> None:
    answer = nvml("energy", script=script, uuid=uuid)
    assert answer["error"] == "SensorError"
    assert "MIG" in answer["text"]
    assert nvml("describe", script=script, uuid=uuid)["mig"] is True


def test_unknown_mig_mode_is_not_taken_for_off(nvml: Nvml) -> None:
    assert nvml("energy", script={"nvmlDeviceGetMigMode": "!4"})["error"] == "NvmlPermissionError"


def test_gpu_without_mig_is_measured(nvml: Nvml) -> None:
    answer = nvml("energy", script={"nvmlDeviceGetMigMode": "!3", COUNTER: "work:1000"}, work_mj=1000)
    assert answer["energy_j_per_run"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("driver", "function"),
    [
        ("new", "nvmlDeviceGetCurrentClocksEventReasons"),
        ("old", "nvmlDeviceGetCurrentClocksThrottleReasons"),
    ],
)
def test_throttle_reasons_have_names(nvml: Nvml, driver: str, function: str) -> None:
    expected = {
        0x000: ([], False),
        0x001: (["gpu_idle"], False),
        0x102: (["applications_clocks_setting", "display_clock_setting"], False),
        0x044: (["sw_power_cap", "hw_thermal_slowdown"], True),
        0x0B8: (["hw_slowdown", "sync_boost", "sw_thermal_slowdown", "hw_power_brake_slowdown"], True),
        0x8600: (["board_limit", "reliability", "unknown_0x8000"], True),
    }
    answers = nvml("conditions", driver, {function: " ".join(map(str, expected))}, times=len(expected))
    assert [(answer["throttle_reasons"], answer["throttled"]) for answer in answers] == list(expected.values())


@pytest.mark.parametrize("driver", ["new", "old"])
def test_conditions_of_new_and_old_drivers(nvml: Nvml, driver: str) -> None:
    [answer] = nvml("conditions", driver)
    assert answer == {
        "sm_mhz": 1410,
        "memory_mhz": 1410,
        "temperature_c": 61,
        "power_state": "P0",
        "throttle_reasons": [],
        "throttled": False,
        "unavailable": {},
    }


def test_condition_that_cannot_be_read_is_none_with_its_reason(nvml: Nvml) -> None:
    script = {
        "nvmlDeviceGetClockInfo": "1410 !4",
        "nvmlDeviceGetPerformanceState": "32",
        "nvmlDeviceGetCurrentClocksEventReasons": "!999",
    }
    [answer] = nvml("conditions", script=script)
    reasons = answer.pop("unavailable")
    assert {name for name, value in answer.items() if value is None} == {*reasons, "throttled"}
    assert "NVML_ERROR_NO_PERMISSION" in reasons["memory_mhz"]
    assert "power state" in reasons["power_state"]
    assert "NVML_ERROR_UNKNOWN" in reasons["throttle_reasons"]


def test_describe(nvml: Nvml) -> None:
    assert nvml("describe") == {
        "driver": "580.10",
        "nvml": "13.580.10",
        "sm_max_mhz": 1980,
        "memory_max_mhz": 1980,
        "power_limit_w": 300.0,
        "mig": False,
        "unavailable": {},
    }


@pytest.mark.parametrize(("uuid", "pci"), [("aaaa", None), ("unknown", "00000000:3b:00.0"), (None, "00000000:3b:00.0")])
def test_gpu_is_found_by_uuid_then_by_address(nvml: Nvml, uuid: str | None, pci: str | None) -> None:
    assert nvml("describe", uuid=uuid, pci=pci)["driver"] == "580.10"


@pytest.mark.parametrize(
    ("uuid", "pci", "error"),
    [
        ("unknown", None, "NvmlNotFoundError"),
        ("unknown", "00000000:ff:00.0", "NvmlNotFoundError"),
        (None, None, "SensorError"),
    ],
)
def test_gpu_that_cannot_be_matched_is_not_guessed(nvml: Nvml, uuid: str | None, pci: str | None, error: str) -> None:
    assert nvml("describe", uuid=uuid, pci=pci)["error"] == error


@pytest.mark.parametrize(("code", "next_step"), [(9, "modprobe nvidia"), (18, "Restart the machine")])
def test_driver_that_does_not_answer(nvml: Nvml, code: int, next_step: str) -> None:
    answer = nvml("energy", script={"nvmlInitWithFlags": f"!{code}"})
    assert answer["error"] == "NvmlMissingError"
    assert answer["exit_code"] == 4
    assert next_step in answer["text"]


@pytest.mark.skipif(ctypes.util.find_library("nvidia-ml") is not None, reason="a real NVML is installed here")
def test_no_library(nvml: Nvml) -> None:
    answer = nvml("energy", "none")
    assert answer["error"] == "NvmlMissingError"
    assert "NVML_ERROR_LIBRARY_NOT_FOUND" in answer["text"]
    assert "Install the NVIDIA driver" in answer["text"]


def test_every_code_becomes_an_error_with_its_name(nvml: Nvml) -> None:
    codes = {value: name for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")}
    asked = [*sorted(codes), 12345]
    answers = nvml(
        "codes",
        script={"nvmlDeviceGetEnforcedPowerLimit": " ".join(f"!{code}" for code in asked)},
        count=len(asked),
    )
    assert {int(code): name for code, (_kind, name, _text) in answers.items()} == codes | {12345: "code 12345"}
    assert {kind for kind, _name, _text in answers.values()} == {
        "NvmlError",
        "NvmlMissingError",
        "NvmlUnsupportedError",
        "NvmlPermissionError",
        "NvmlNotFoundError",
        "NvmlLostError",
    }
    assert all("\n" not in text and text.endswith(".") for _kind, _name, text in answers.values())


def test_a_cuda_device_on_scripted_sensors(nvml: Nvml) -> None:
    answer = nvml("device", min_seconds=0.3)
    assert answer["describe"]["driver"] == "580.10"
    assert answer["describe"]["clocks"] == {"sm_max_mhz": 1980, "memory_max_mhz": 1980}
    assert answer["conditions"]["temperature_c"] == 61
    assert answer["conditions"]["load_1min"] >= 0
    assert {report["name"] for report in answer["sensors"] if report["what"] == "energy_j"} == {"NVML energy counter"}
    assert all(report["available"] for report in answer["sensors"])
    assert answer["energy"]["power_w"] == pytest.approx(200, rel=0.2)
    assert answer["energy"]["idle_power_w"] == pytest.approx(200, rel=0.2)
    assert answer["calls"][0] == "enter device 0"
    assert answer["calls"].count("wait for mark") > 10
