"""Where a command starts. In: names. Out: the device and the model on it, and the folder of their profile."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shiva_search.devices import check_sensors, no_graphs, open_device
from shiva_search.models.catalog import load_model
from shiva_search.models.model import Model

if TYPE_CHECKING:
    from shiva_search.devices.base import Device


def open_both(
    model_name: str, device_name: str, workload: dict[str, Any], seed: int, limited: Iterable[str] = ()
) -> tuple[Device, Model]:
    """The device, and the model loaded onto it, with the workload's threads set.

    Args:
        limited: budget metrics that will be measured on the device.

    Raises:
        ShivaError: no such device, sensor or model, or the workload does not fit them.
    """
    device = open_device(device_name)
    check_sensors(device, limited)
    if workload.get("cuda_graph") and device.name == "cpu":
        raise no_graphs(device.name)
    model = load_model(model_name, device=str(device.torch_device), seed=seed, **workload)
    if model.workload.threads is not None:
        torch.set_num_threads(model.workload.threads)
    return device, model


def profile_folder(device: Device, model: Model, bypass: str = "affine", bypass_rank: int | None = None) -> Path:
    """Where profiles of the model on the device lie: profiles/<device>/<model>.

    Another workload than the model's default has a folder of its own, and so has another bypass: each value that
    differs is named behind the model, as in fashion-dit.batch-4.dtype-bfloat16.
    """
    others = model.workload.differences(model.family.defaults(model.config))
    suffix = "".join(f".{here.replace(' ', '-')}" for here, _ in others)
    suffix += "" if bypass == "affine" else f".bypass-{bypass}"
    suffix += "" if bypass_rank is None else f".rank-{bypass_rank}"
    return Path("profiles") / device.name.replace(":", "-") / f"{Path(model.name).name}{suffix}"
