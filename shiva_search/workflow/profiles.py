"""`shiva-search profile`. In: a model and a device. Out: a folder with the profile and the cost model fit on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiva_search.cost.cost_model import CostModel, fit_cost_model
from shiva_search.models.model import Model
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.records.files import check_folder_writable
from shiva_search.records.profile import Profile
from shiva_search.runtime.selector import Selector
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.opening import open_both, profile_folder
from shiva_search.workflow.selectors import check_bypass, untrained_selector

if TYPE_CHECKING:
    from shiva_search.devices.base import Device


def profile_command(
    model_name: str,
    device_name: str,
    workload: dict[str, Any],
    *,
    seconds: float,
    out: Path | None,
    seed: int,
    resume: bool,
    progress: Progress,
    bypass: str = "affine",
    bypass_rank: int | None = None,
) -> Answer:
    """`shiva-search profile`: measure, fit the cost model, write both."""
    device, model = open_both(model_name, device_name, workload, seed)
    check_bypass(bypass, bypass_rank)
    folder = out or profile_folder(device, model, bypass, bypass_rank)
    check_folder_writable(folder)
    scorer = untrained_selector(model, bypass, bypass_rank)
    profile, cost = take_profile(model, device, folder, seconds, seed, resume, progress, scorer)
    summary = {
        "folder": str(folder),
        "model": model.fingerprint(),
        "device": device.describe(),
        "dense": cost.dense.as_dict(),
        "held_out": cost.held_out,
    }
    lines = [
        f"profile of {model.name} on {device.name} in {folder}",
        f"dense step: {cost.dense.latency_ms:.1f} ms",
        "held-out error of the cost model: " + ", ".join(f"{k} {v:.4g}" for k, v in _numbers(cost.held_out).items()),
    ]
    return Answer(summary, lambda: "\n".join(lines))


def take_profile(
    model: Model,
    device: Device,
    folder: Path,
    seconds: float,
    seed: int,
    resume: bool,
    progress: Progress,
    scorer: Selector,
) -> tuple[Profile, CostModel]:
    """Measure, or take what the folder holds, and fit the cost model; both are kept in the folder.

    Args:
        scorer: what selects in pruned blocks, and brings what rejected tokens do; its weights do not matter.
    """
    if not resume:
        for name in ("profile.json", "profile.csv", "samples.csv", "cost_model.json"):
            (folder / name).unlink(missing_ok=True)
    profile = profile_model(model, device, seconds=seconds, seed=seed, folder=folder, scorer=scorer, progress=progress)
    profile.save(folder)
    cost = fit_cost_model(profile)
    cost.save(folder)
    return profile, cost


def _numbers(values: Any) -> dict[str, float]:
    return {name: value for name, value in dict(values).items() if isinstance(value, (int, float))}
