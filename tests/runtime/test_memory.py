"""Room for what saves time: fixed in main memory, a share of what a GPU has free."""

from __future__ import annotations

import pytest
import torch

from shiva_search.runtime.memory import room_mib


def test_main_memory_has_a_fixed_room_and_a_gpu_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room_mib(torch.device("cpu"), 512.0, 0.25) == 512.0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 * 2**30, 80 * 2**30))
    assert room_mib(torch.device("cuda"), 512.0, 0.25) == 16 * 1024
