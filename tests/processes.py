"""Processes for tests that kill them: forked from one that has imported what they need, so that none costs a start."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import diffusers.models.transformers.dit_transformer_2d  # noqa: F401  # the heaviest of what forked processes need

import shiva_search.profiling.block_profiler
import shiva_search.search  # noqa: F401


def start(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process under way; `target` is found by import, so it lies at the top of a module."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def wait_until(done: Callable[[], bool], process: BaseProcess, seconds: float = 120) -> None:
    """Waits for something the process brings about.

    Raises:
        AssertionError: the process ended before, or time is up.
    """
    until = time.monotonic() + seconds
    while not done():
        assert process.is_alive(), f"the process ended with {process.exitcode}"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
