"""Samplers by name. In: a name and a seed. Out: ours or one of Optuna's, ready for a study of plans."""

from __future__ import annotations

import optuna

from shiva_search.errors import InputError, UnavailableError
from shiva_search.search.candidates import Space
from shiva_search.search.sensitivity import Effects
from shiva_search.search.storages import quiet
from shiva_search.search.trade_sampler import TradeSampler

SAMPLERS = ("trade", "tpe", "nsga2", "nsga3", "gp", "cmaes", "random")


def make_sampler(name: str, space: Space, effects: Effects, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by name, seeded.

    Raises:
        InputError: unknown name.
        UnavailableError: its library is not installed.
    """
    samplers = optuna.samplers
    if name == "trade":
        return TradeSampler(space, effects, seed)
    with quiet():
        if name == "tpe":
            return samplers.TPESampler(seed=seed)
        if name == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        if name == "nsga3":
            return samplers.NSGAIIISampler(seed=seed)
        if name == "gp":
            return samplers.GPSampler(seed=seed)
        if name == "random":
            return samplers.RandomSampler(seed=seed)
        if name == "cmaes":
            try:
                import cmaes  # noqa: F401  # Optuna's sampler imports it only at the first proposal
            except ImportError:
                raise UnavailableError("--sampler cmaes needs a library: pip install cmaes") from None
            return samplers.CmaEsSampler(seed=seed)
    raise InputError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
