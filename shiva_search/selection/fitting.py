"""The loop under every training stage. In: modules and a step that adds up gradients. Out: trained modules, curve rows.

Resumable: a checkpoint holds modules, optimiser and curve; steps draw what they need from their own number. A run that
was interrupted and taken up again gives the same weights as one that was not.
"""

from __future__ import annotations

import math
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.records.files import write_atomic

SCHEMA_VERSION = 1
CLIP_NORM = 1.0

#: One row of training.csv: stage, step, loss, distillation, diffusion, error, keep, seconds; None where unknown.
Row = dict[str, Any]
Progress = Callable[[str], None]
COLUMNS = ("stage", "step", "loss", "distillation", "diffusion", "error", "keep", "seconds")


def fit(
    stage: str,
    trained: Sequence[tuple[nn.Module, float]],
    step: Callable[[int], Mapping[str, float]],
    *,
    steps: int,
    identity: Mapping[str, Any],
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
) -> list[Row]:
    """Train modules in place with AdamW: linear warm-up of the learning rate, then a cosine down to a tenth.

    Args:
        stage: name in the rows.
        trained: modules with their peak learning rates; their buffers are part of the checkpoint.
        step: takes the number of the step, adds up gradients, returns figures for the row.
        steps: how many, at least 1.
        identity: JSON-able; a checkpoint with another identity is refused.
        checkpoint: saved every `checkpoint_every_s` seconds, on interruption and at the end; resumed from if there.
        checkpoint_every_s: seconds.
        progress: takes a short line now and then.

    Returns:
        A row per step.

    Raises:
        InputError: steps below 1, a checkpoint that is unreadable or of another training, a loss that is not finite.
        KeyboardInterrupt: passed on after the checkpoint is saved.
    """
    if steps < 1:
        raise InputError(f"training takes at least 1 step, got {steps}")
    modules = nn.ModuleList(module for module, _ in trained)
    asked = [(parameter, parameter.requires_grad) for parameter in modules.parameters()]
    groups = [{"params": list(module.parameters()), "lr": lr} for module, lr in trained]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warm_up = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _lr_scale(done, steps, warm_up))
    rows: list[Row] = []
    parts = {"modules": modules, "optimizer": optimizer, "schedule": schedule}
    if checkpoint is not None and checkpoint.exists():
        rows = _resume(checkpoint, identity, parts)
        if progress:
            progress(f"{stage}: resumed at step {len(rows)} of {steps}")

    def save() -> None:
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
            state |= {"schema_version": SCHEMA_VERSION, "identity": dict(identity), "rows": rows}
            write_atomic(checkpoint, lambda temporary: torch.save(state, temporary))

    modules.requires_grad_(True).train()
    started_s = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    saved_s = told_s = time.monotonic()
    whole = True  # whether weights, optimiser and rows belong to the same step
    try:
        while len(rows) < steps:
            optimizer.zero_grad(set_to_none=True)
            figures = step(len(rows))
            if not all(math.isfinite(value) for value in figures.values()):
                raise InputError(f"{stage}: the loss is not finite at step {len(rows)}; lower lr, or use float32")
            nn.utils.clip_grad_norm_(modules.parameters(), CLIP_NORM)
            seconds = time.monotonic() - started_s
            row = {"stage": stage, "step": len(rows), "seconds": seconds, **figures}
            whole = False
            optimizer.step()
            schedule.step()
            rows.append({name: row.get(name) for name in COLUMNS})
            whole = True
            if time.monotonic() - saved_s >= checkpoint_every_s:
                save()
                saved_s = time.monotonic()
            if progress and (time.monotonic() - told_s >= 10.0 or len(rows) == steps):
                told_s = time.monotonic()
                left_s = seconds / len(rows) * (steps - len(rows))
                progress(f"{stage}: step {len(rows)} of {steps}, error {_recent(rows):.4f}, {left_s:.0f} s left")
        save()
    except KeyboardInterrupt:
        if whole:  # else the last checkpoint stands
            save()
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
        modules.eval()
        for parameter, before in asked:
            parameter.requires_grad_(before)
    return rows


def _lr_scale(done: int, steps: int, warm_up: int) -> float:
    if done < warm_up:
        return (done + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warm_up) / max(1, steps - warm_up)))


def _recent(rows: Sequence[Row]) -> float:
    last = [row["error"] for row in rows[-10:]]
    return sum(last) / len(last)


def _resume(path: Path, identity: Mapping[str, Any], parts: Mapping[str, Any]) -> list[Row]:
    start_over = "delete it to start over, or choose another folder"
    if not zipfile.is_zipfile(path):  # what torch.save writes; anything else could fail in any way
        raise InputError(f"checkpoint {path} is damaged or no checkpoint; {start_over}")
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({str(error).splitlines()[0]}); {start_over}") from error
    if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is no checkpoint of this release; {start_over}")
    if state["identity"] != dict(identity):
        theirs = state["identity"]
        differing = [name for name in identity if theirs.get(name) != identity[name]] or ["settings"]
        raise InputError(f"checkpoint {path} belongs to a training with another {', '.join(differing)}; {start_over}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    rows: list[Row] = state["rows"]
    return rows
