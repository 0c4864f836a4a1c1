"""What all tests share: no hub, no screen, property tests without a stopwatch, the skip of `cuda` tests, a database."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest

# Before any test imports torch, diffusers or matplotlib: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Tiny models gain nothing from threads and lose a lot where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The first example of a property pays for torch's start-up, which a deadline would call flaky. CI repeats the same
# examples each time; elsewhere new ones are tried.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Makes empty databases on a PostgreSQL that runs while the tests do; each call returns a URL."""
    from tests.postgres import programs, running

    pytest.importorskip("psycopg2", reason="needs the extra 'postgres'")
    folder = programs()
    if folder is None:
        pytest.skip("needs PostgreSQL's initdb and postgres: apt-get install postgresql")
    with running(folder) as server:
        yield server.new_database
