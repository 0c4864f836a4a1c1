"""How much memory may be taken for what only saves time. In: a device. Out: MiB."""

from __future__ import annotations

import torch


def room_mib(device: torch.device, host_mib: float, free_share: float) -> float:
    """Room for what would otherwise be computed again.

    Args:
        device: where it is to lie.
        host_mib: room in main memory, where nothing is said of what is free.
        free_share: of what a GPU has free.
    """
    if device.type != "cuda":
        return host_mib
    free, _ = torch.cuda.mem_get_info(device)
    return free_share * free / 2**20
