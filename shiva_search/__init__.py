"""shiva-search: give a diffusion transformer a static token budget that holds on the device it runs on.

    import shiva_search as ss
    with ss.apply_plan(pipe.transformer, "reports/demo"):
        image = pipe(prompt).images[0]

Importing this package loads nothing heavy; each name is fetched when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AppliedPlan": "shiva_search.runtime.apply",
    "Budget": "shiva_search.records.budget",
    "BudgetBrokenError": "shiva_search.errors",
    "CostEstimate": "shiva_search.records.cost",
    "InfeasibleBudgetError": "shiva_search.errors",
    "InputError": "shiva_search.errors",
    "Kept": "shiva_search.records.plan",
    "Plan": "shiva_search.records.plan",
    "ShivaError": "shiva_search.errors",
    "UnavailableError": "shiva_search.errors",
    "Workload": "shiva_search.records.workload",
    "apply_plan": "shiva_search.api",
    "fidelity": "shiva_search.api",
    "fit_bypasses": "shiva_search.api",
    "fit_cost_model": "shiva_search.api",
    "from_pretrained": "shiva_search.api",
    "keep_freed_memory": "shiva_search.devices.host",
    "load_model": "shiva_search.api",
    "load_profile": "shiva_search.api",
    "load_selector": "shiva_search.api",
    "measure": "shiva_search.api",
    "optimize": "shiva_search.api",
    "profile": "shiva_search.api",
    "remove_plan": "shiva_search.api",
    "save_pretrained": "shiva_search.api",
    "train_selector": "shiva_search.api",
    "warm_up": "shiva_search.api",
    "wrap": "shiva_search.api",
}
__all__ = ["__version__", "search", *_HOME]

if TYPE_CHECKING:
    from shiva_search.api import (
        apply_plan,
        fidelity,
        fit_bypasses,
        fit_cost_model,
        from_pretrained,
        load_model,
        load_profile,
        load_selector,
        measure,
        optimize,
        profile,
        remove_plan,
        save_pretrained,
        search,
        train_selector,
        warm_up,
        wrap,
    )
    from shiva_search.devices.host import keep_freed_memory
    from shiva_search.errors import BudgetBrokenError, InfeasibleBudgetError, InputError, ShivaError, UnavailableError
    from shiva_search.records.budget import Budget
    from shiva_search.records.cost import CostEstimate
    from shiva_search.records.plan import Kept, Plan
    from shiva_search.records.workload import Workload
    from shiva_search.runtime.apply import AppliedPlan


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shiva_search' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`search` names a function of the API and the room behind it: `shiva_search.search(...)` is the function.

    Importing the room would otherwise put its module in the function's place.
    """

    @property
    def search(self) -> Any:
        return import_module("shiva_search.api").search

    @search.setter
    def search(self, room: ModuleType) -> None:
        """The import system's own assignment; the room stays reachable by import."""


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
