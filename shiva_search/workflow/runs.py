"""A run's folder, opened. In: its path. Out: model, device, plan and settings at hand for the commands on a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.budget import Budget
from shiva_search.records.files import read_json
from shiva_search.records.plan import Plan
from shiva_search.records.run import RunFolder
from shiva_search.runtime.selector import Selector
from shiva_search.selection.loading import load_selector
from shiva_search.workflow.opening import open_both
from shiva_search.workflow.settings import Settings

if TYPE_CHECKING:
    from shiva_search.devices.base import Device


@dataclass(frozen=True)
class OpenRun:
    """A run's folder with its model and device at hand."""

    folder: RunFolder
    settings: Settings
    model: Model
    device: Device
    plan: Plan

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        return Budget.parse(self.settings.budget, self.settings.per, self.settings.steps)

    def scorer(self) -> Selector | str:
        """The trained selector where there is one."""
        return load_selector(self.folder.selector) if self.folder.selector.is_file() else "stride"


def open_run(path: Path, device_name: str | None = None) -> OpenRun:
    """Open a run's folder.

    Args:
        device_name: another device than the run's.

    Raises:
        InputError: no run there, or its plan is of another model.
    """
    folder = RunFolder(path)
    settings = settings_of(folder)
    plan = Plan.from_file(folder.plan)
    workload = dict(settings.workload)
    if device_name == "cpu":
        workload.pop("cuda_graph", None)  # the same forwards, as this device runs them
    device, model = open_both(settings.model, device_name or settings.device, workload, settings.seed)
    plan.check_model(model.fingerprint())
    return OpenRun(folder, settings, model, device, plan)


def check_is_run(path: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
        InputError: names the command that makes one.
    """
    if not path.is_dir():
        make = f"shiva-search optimize --max-latency 60% --out {path}"
        raise InputError(f"a run is a folder, {path} is none; make one with, for example, `{make}`")


def settings_of(folder: RunFolder) -> Settings:
    """How a run was made.

    Raises:
        InputError: no run there.
    """
    check_is_run(folder.path)
    stored = read_json(folder.settings, "run")
    try:
        return Settings(**stored["settings"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder.settings} does not describe a run ({error}); run `optimize` again") from None
