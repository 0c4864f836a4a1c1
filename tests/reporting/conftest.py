"""A finished run of fashion-dit at 65 % of its latency, as files: run/ holds them, made up but of the right shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shiva_search.reporting.reading import RunFiles, read_run

FILES = Path(__file__).parent / "run"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(FILES, tmp_path / "run"))


@pytest.fixture
def run() -> RunFiles:
    return read_run(FILES)
