"""A worker. In: a storage and a study's name. Out: plans judged for a search that another process started."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import optuna
from optuna.storages import BaseStorage

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.model import Model
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.identity import scorer_identity
from shiva_search.search.shared_problem import read_problem
from shiva_search.search.starting import evaluator_for
from shiva_search.search.storages import database_errors, open_storage
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
    opened = open_storage(storage)
    assert opened is not None  # None only where no storage is named
    until = time.monotonic() + wait_s
    while True:
        try:
            study: optuna.Study | None = optuna.load_study(study_name=study_name, storage=opened)
        except KeyError:
            study = None
        known = None if study is None else read_problem(study)
        if study is not None and known is not None:
            break
        if time.monotonic() > until:
            state = "is not prepared yet" if study is not None else "does not exist"
            raise UnavailableError(f"study {study_name!r} {state} in this storage; start the search first")
        time.sleep(min(1.0, wait_s))
    space, effects, settings = known
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
