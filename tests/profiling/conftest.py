"""What the tests of profiling share: a small real model, and the path to the machines they simulate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for simulation, virtual_device

from shiva_search.models.model import Model


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """A DiT of 6 blocks on 256 tokens, random weights."""
    from virtual_device import small_dit

    return small_dit()
