"""`optimize` and `worker` from the command line on one PostgreSQL, the search killed half-way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from shiva_search.search.storages import open_storage

TRIALS = 14


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A transformer in diffusers format, heavy enough that dropping tokens saves time."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=4, sample_size=20,
        patch_size=1, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    module.save_pretrained(tmp_path / "checkpoint" / "transformer")
    return tmp_path / "checkpoint"


def command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "shiva_search", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(storage: BaseStorage) -> dict[int, tuple[tuple[str, int], ...]]:
    """Complete trials of the one study there is."""
    names = optuna.get_all_study_names(storage=storage)
    if not names:
        return {}
    assert len(names) == 1
    trials = optuna.load_study(study_name=names[0], storage=storage).get_trials(states=(TrialState.COMPLETE,))
    return {trial.number: tuple(sorted(trial.params.items())) for trial in trials}


@pytest.mark.slow
def test_a_killed_search_goes_on_and_a_worker_helps(
    checkpoint: Path, postgresql: Callable[[], str], tmp_path: Path
) -> None:
    url = postgresql()
    storage = open_storage(url)
    assert storage is not None
    asked = (
        "optimize", "--model", str(checkpoint), "--max-latency", "75%", "--out", "run", "--storage", url,
        "--trials", str(TRIALS), "--train-steps", "0", "--warmup-steps", "2", "--profile-seconds", "4",
        "--bypass", "none",
    )  # fmt: skip
    first = command(*asked, folder=tmp_path)
    until = time.monotonic() + 200
    while len(finished(storage)) < 3:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    first.kill()
    first.communicate()
    before = finished(storage)
    [study] = optuna.get_all_study_names(storage=storage)

    # The worker's machine has a copy of the run's folder and nothing else: no profile, no router warmed up here.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run", elsewhere / "run")
    worker = command("worker", "run", "--storage", url, "--study", study, "--json", folder=elsewhere)
    second = command(*asked, "--json", folder=tmp_path)
    out, said = second.communicate(timeout=250)
    assert second.returncode in (0, 5), said  # on a loaded machine the last measurement may miss
    assert "going on with the run" in said
    summary = json.loads(out)
    assert summary["provenance"]["study"] == study
    told, complaint = worker.communicate(timeout=60)
    assert worker.returncode == 0, complaint
    assert json.loads(told)["trials"] > 0

    after = finished(storage)
    assert before.items() <= after.items()
    assert len(set(after.values())) >= TRIALS
    running = optuna.load_study(study_name=study, storage=storage).get_trials(states=(TrialState.RUNNING,))
    assert not running
