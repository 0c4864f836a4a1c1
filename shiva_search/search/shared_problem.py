"""A study that says what it is about. In: a space, effects, settings. Out: the same, read by any worker.

Everything another process needs to take part, the space first of all, is kept in the study, so that all workers agree
on what is feasible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage

from shiva_search.search.candidates import Floats, Space
from shiva_search.search.sensitivity import Effects
from shiva_search.search.sketches import decode, encode
from shiva_search.search.storages import quiet


def create(name: str, storage: BaseStorage | None, objectives: int, digest: str) -> optuna.Study:
    """A study for this problem: the one of this name where it is about the same problem, else a new one.

    Args:
        name: wanted; a study of this name about another problem is left alone and a suffix is added.
        storage: from open_storage.
        objectives: 2 (error, latency) or 1 (error).
        digest: identifies the problem: space, model, scorer, batch.
    """
    with quiet():
        for attempt in (name, f"{name}-{digest[:8]}"):
            study = optuna.create_study(
                study_name=attempt, storage=storage, directions=["minimize"] * objectives, load_if_exists=True
            )
            known = study.user_attrs.get("digest")
            if known is None:
                study.set_user_attr("digest", digest)
                return study
            if known == digest and len(study.directions) == objectives:
                return study
    return study


def share_problem(study: optuna.Study, space: Space, effects: Effects, settings: Mapping[str, Any]) -> None:
    """Write into the study what a worker needs."""
    study.set_user_attr("settings", dict(settings))
    study.set_user_attr("space", json.dumps(space.as_dict()))
    for p in map(int, space.free):
        rows = [
            {"error": float(effects.errors_PC[p, c]), "sketch": encode(effects.vectors_PCS[p, c])}
            for c in range(int(space.sizes[p]))
        ]
        # One attribute per choice keeps each within what every database stores.
        for c, row in enumerate(rows):
            study.set_user_attr(f"effect.{p}.{c}", row)
    study.set_user_attr("ready", True)


def read_problem(study: optuna.Study) -> tuple[Space, Effects, dict[str, Any]] | None:
    """Inverse of share_problem; None while the study has not been prepared."""
    attributes = study.user_attrs
    if not attributes.get("ready"):
        return None
    space = Space.from_dict(json.loads(attributes["space"]))
    errors: Floats = np.zeros(space.kept.shape)
    vectors: Floats | None = None
    for p in map(int, space.free):
        for c in range(int(space.sizes[p])):
            row = attributes[f"effect.{p}.{c}"]
            direction = decode(row["sketch"])
            assert direction is not None
            if vectors is None:
                vectors = np.zeros((*space.kept.shape, len(direction)))
            errors[p, c] = row["error"]
            norm = float(np.linalg.norm(direction))
            vectors[p, c] = direction * (max(row["error"], 0.0) ** 0.5 / norm) if norm > 0 else 0.0
        errors[p, space.sizes[p] :] = errors[p, space.sizes[p] - 1]
        if vectors is not None:
            vectors[p, space.sizes[p] :] = vectors[p, space.sizes[p] - 1]
    if vectors is None:
        vectors = np.zeros((*space.kept.shape, 1))
    return space, Effects(errors, vectors), dict(attributes["settings"])
