"""`devices` and `models`: what there is to choose from. In: this machine and the catalogue. Out: a list."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any

from shiva_search.devices import list_devices, open_device
from shiva_search.errors import ShivaError
from shiva_search.models.catalog import list_models, list_refused
from shiva_search.workflow.answer import Answer


def devices_command() -> Answer:
    """`shiva-search devices`: what each device and sensor can do, and why not."""
    found: list[dict[str, Any]] = []
    names = list_devices()
    for name in names if any(known.startswith("cuda") for known in names) else [*names, "cuda"]:
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
    """`shiva-search models`: what --model accepts, by family, and what is known to hold for each."""
    rows, refused = list_models(), list_refused()
    lines = []
    for family, members in groupby(rows, key=lambda row: row["family"]):
        named = list(members)
        lines.append(f"{family}: {named[0]['class']}")
        lines += [f"  {row['name']:<32} {row['kind']}" for row in named]
        lines.append(f"  verified: {named[0]['verified']}")
        lines.append(f"  --attend all: {', '.join(named[0]['attends_all']) or 'no block'}")
    lines += [f"refused: {row['class']}: {row['reason']}" for row in refused]
    lines.append(
        "any other transformer in Python: shiva_search.wrap(module, example=...) looks whether it allows plans"
    )
    return Answer({"models": rows, "refused": refused}, lambda: "\n".join(lines))
