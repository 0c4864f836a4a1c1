"""`devices` and `models`: what there is to choose from. In: this machine and the catalogue. Out: a list."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from shiva_search.devices import list_devices, open_device
from shiva_search.errors import ShivaError
from shiva_search.models.catalog import list_models
from shiva_search.workflow.answer import Answer


def devices_command() -> Answer:
    """`shiva-search devices`: what each device and sensor can do, and why not."""
    found: list[dict[str, Any]] = []
    for name in list_devices():
        try:
            device = open_device(name)
        except ShivaError as error:
            found.append({"device": name, "available": False, "reason": str(error), "sensors": []})
            continue
        sensors = [asdict(sensor) for sensor in device.sensors()]
        found.append({"device": name, "available": True, **device.describe(), "sensors": sensors})
    lines = []
    for entry in found:
        lines.append(f"{entry['device']}: {entry.get('reason') or entry['device_name']}")
        for sensor in entry["sensors"]:
            state = "yes" if sensor["available"] else "no "
            lines.append(f"  {sensor['what']:<16} {state}  {sensor['name']}: {sensor['how']}")
    return Answer({"devices": found}, lambda: "\n".join(lines))


def models_command() -> Answer:
    """`shiva-search models`: what --model accepts."""
    rows = list_models()
    lines = [f"{row['name']:<34} {row['kind']:<22} {row.get('verified', '')}" for row in rows]
    return Answer({"models": rows}, lambda: "\n".join(lines))
