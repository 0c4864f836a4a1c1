"""A worker. In: a storage and a study's name. Out: plans judged for a search that another process started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.model import Model
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.identity import scorer_identity
from shiva_search.search.shared_problem import read_problem
from shiva_search.search.starting import evaluator_for
from shiva_search.search.storages import database_errors, is_there, open_storage
from shiva_search.search.study import PlanStudy


@database_errors()
def join_study(
    storage: str | BaseStorage,
    study_name: str,
    model: Model,
    *,
    scorer: TokenScorer | str = "stride",
    trials: int | None = None,
    wait_s: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Judge plans of a search that another process started, until it has as many as it asked for.

    Args:
        storage: where the study is.
        study_name: as the search says it.
        model: the same model.
        scorer: the same scorer.
        trials: stop after this many here; None: when the study is complete.
        wait_s: how long the study may take to appear.
        progress: told short lines.

    Returns:
        Trials finished here.

    Raises:
        UnavailableError: no such study, or not prepared in time.
        InputError: another model or scorer than the study's.
    """
    study, (space, effects, settings) = _prepared(storage, study_name, wait_s, progress or (lambda line: None))
    differing = [
        name
        for name in ("architecture", "config_hash", "layers", "tokens", "weights_hash")
        if settings["model"].get(name) != model.fingerprint().get(name)
    ]
    if differing:
        raise InputError(f"this study is about another model ({', '.join(differing)} differ); load the same one")
    if settings["scorer"] != scorer_identity(scorer):
        raise InputError(
            f"this study judges with scorer {settings['scorer']}, not {scorer_identity(scorer)}; pass the same one"
        )
    evaluator = evaluator_for(model, scorer, space, settings["seed"], settings["samples"], settings["chunk"])
    # Workers that start from the same trials would propose the same plans; their seed tells them apart.
    own = {**settings, "seed": int(np.random.default_rng().integers(2**31))}
    plans = PlanStudy(study, space, effects, evaluator, own, progress)
    before = len(plans.records())
    plans.run(settings["trials"], trials)
    return len(plans.records()) - before


def _prepared(
    storage: str | BaseStorage, study_name: str, wait_s: float, say: Callable[[str], None]
) -> tuple[optuna.Study, Any]:
    """The study and its problem, waited for: the search may just be preparing them.

    Raises:
        UnavailableError: not there, or not prepared, in time.
    """
    until, opened, told = time.monotonic() + wait_s, None, False
    while True:
        if opened is None and is_there(storage):
            opened = open_storage(storage)
        state = f"there is no {storage}"
        if opened is not None:
            try:
                study = optuna.load_study(study_name=study_name, storage=opened)
            except KeyError:
                state = f"study {study_name!r} does not exist in this storage"
            else:
                known = read_problem(study)
                if known is not None:
                    return study, known
                state = f"study {study_name!r} is not prepared yet in this storage"
        if time.monotonic() > until:
            raise UnavailableError(f"{state}; start the search first, and name its storage and study as it says them")
        if not told:
            say(f"{state}; waiting {wait_s:.0f} s for it")
            told = True
        time.sleep(min(1.0, wait_s))
