"""A profile as tests start it in a process of its own (tests.processes)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # for virtual_device

from virtual_device import small_dit

from shiva_search.devices import open_device
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.records.profile import Profile

SECONDS = 5.0


def run(folder: str) -> Profile:
    """Profiles a small model on the CPU, or goes on with what the folder holds."""
    torch.set_num_threads(1)
    model = small_dit(layers=2, side=8)
    return profile_model(model, open_device("cpu"), seconds=SECONDS, counts=[32], plans=2, folder=folder)
