"""What the tests of workflow share: the path to the machines that the tests of profiling simulate."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "profiling"))  # for simulation, virtual_device
