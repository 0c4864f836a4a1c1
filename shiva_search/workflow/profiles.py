"""`shiva-search profile`. In: a model and a device. Out: a folder with the profile and the cost model fit on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiva_search.cost.cost_model import CostModel, fit_cost_model
from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.profiling.block_profiler import check_same, profile_model
from shiva_search.profiling.drift import Drift, check_drift
from shiva_search.records.files import check_folder_writable
from shiva_search.records.profile import Profile, load_profile
from shiva_search.reporting.words import held_out_in_words
from shiva_search.runtime.selector import Selector
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.opening import open_both, profile_folder
from shiva_search.workflow.selectors import check_bypass, untrained_selector

if TYPE_CHECKING:
    from shiva_search.devices.base import Device

#: Seconds of the quick check of a profile that was taken earlier, at most.
CHECK_SECONDS = 6.0
#: Median error on held-out plans beyond which a cost model is said to be vague.
VAGUE = 0.05


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
    costs = take_profile(
        model, device, folder, seconds=seconds, seed=seed, resume=resume,
        scorer=untrained_selector(model, bypass, bypass_rank), progress=progress,
    )  # fmt: skip
    cost = costs.model
    summary = {
        "folder": str(folder),
        "model": model.fingerprint(),
        "device": device.describe(),
        "dense": cost.dense.as_dict(),
        "held_out": cost.held_out,
        "drift": costs.drift,
    }
    lines = [
        f"profile of {model.name} on {device.name} in {folder}",
        f"dense step: {cost.dense.latency_ms:.1f} ms",
        held_out_in_words(cost.held_out),
    ]
    return Answer(summary, lambda: "\n".join(lines))


@dataclass(frozen=True)
class Costs:
    """What a model costs here and now.

    Attributes:
        model: the cost model, at the level the device runs at now.
        drift: what a quick check of a profile that was taken earlier found (Drift.as_dict); None for a fresh one.
    """

    model: CostModel
    drift: dict[str, Any] | None = None


def take_profile(
    model: Model,
    device: Device,
    folder: Path,
    *,
    seconds: float,
    seed: int,
    resume: bool,
    progress: Progress,
    scorer: Selector,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Measure, or take what the folder holds after a quick check, and fit the cost model; all is kept in the folder.

    A profile whose level alone moved is rescaled in memory: the files keep what was measured, with the check's figures
    beside it. One whose ratios changed is measured anew.

    Args:
        scorer: what selects in pruned blocks, and brings what rejected tokens do; its weights do not matter.
    """

    def measured(again: bool) -> Profile:
        return profile_model(
            model, device, seconds=seconds, seed=seed, folder=folder, resume=not again, scorer=scorer,
            progress=progress, clock=clock,
        )  # fmt: skip

    known = resume and _is_complete(folder) and not _is_recording(device)
    profile = measured(again=not resume)
    figures, level = None, profile
    if known:
        check_s = min(CHECK_SECONDS, max(1.0, seconds / 10))
        drift = _checked(model, device, profile, scorer, check_s, progress, clock, "--no-resume")
        level = drift.profile
        if drift.verdict == "profile again":
            progress("its ratios are no longer this device's: profiling again")
            profile = level = measured(again=True)
        figures = _figures(drift, otherwise="it was taken again")
        profile = replace(profile, provenance={**profile.provenance, "last_check": figures})
    profile.save(folder)
    cost = fit_cost_model(profile)
    cost.save(folder)
    _warn_if_vague(cost, folder, progress)
    return Costs(cost if level.rows == profile.rows else fit_cost_model(level), figures)


def use_profile(
    model: Model,
    device: Device,
    folder: Path,
    *,
    progress: Progress,
    scorer: Selector,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Read a profile the user points at, with a quick check where it was taken on this device; its folder stays as is.

    Raises:
        InputError: no profile, an interrupted one, or one of another model, workload or device.
    """
    profile = load_profile(folder)
    if not profile.complete:
        raise InputError(
            f"the profile in {folder} was interrupted; finish it with `shiva-search profile --out {folder}`"
        )
    check_same(profile, model, None if _is_recording(device) else device, f"the profile in {folder}")
    cost = fit_cost_model(profile)
    _warn_if_vague(cost, folder, progress)
    if _is_recording(device):
        return Costs(cost)
    anew = f"`shiva-search profile --no-resume --out {folder}`"
    drift = _checked(model, device, profile, scorer, CHECK_SECONDS, progress, clock, anew)
    if drift.verdict == "profile again":
        progress(
            f"warning: the ratios in {folder} are no longer this device's, so predictions will miss; take a new "
            f"profile with {anew}, or leave out --profile"
        )
    level = drift.profile
    return Costs(
        cost if level.rows == profile.rows else fit_cost_model(level), _figures(drift, otherwise="predictions may miss")
    )


def _warn_if_vague(cost: CostModel, folder: Path, progress: Progress) -> None:
    """One line where plans are predicted so badly that a search on them would lose its way."""
    off = cost.held_out.get("median_error")
    if off is not None and off > VAGUE:
        progress(
            f"warning: predictions are off by {off:.0%} (median over held-out plans), as the profile was too short or "
            f"the device busy; take a longer one while nothing else runs: "
            f"`shiva-search profile --no-resume --seconds ... --out {folder}`"
        )


def _checked(
    model: Model,
    device: Device,
    profile: Profile,
    scorer: Selector,
    seconds: float,
    progress: Progress,
    clock: Callable[[], float],
    anew: str,
) -> Drift:
    """The quick check, said to the user; `anew`: what takes a new profile."""
    progress("checking a few cells of the profile again")
    drift = check_drift(model, profile, device, scorer=scorer, seconds=seconds, clock=clock)
    progress(drift.describe())
    if drift.verdict == "rescale" and drift.is_far:
        progress(
            f"warning: this machine is not as it was when the profile was taken ({drift.scale:.2f} times its latency): "
            f"is it busy, or at another clock? If it stays so, take a new profile with {anew}"
        )
    return drift


def _figures(drift: Drift, otherwise: str) -> dict[str, Any]:
    """The check's figures, when it was, and what was done about it; `otherwise`: where the profile no longer holds."""
    done = {"same": "it holds", "rescale": "its latencies were rescaled"}.get(drift.verdict, otherwise)
    return {**drift.as_dict(), "done": done, "checked": datetime.now(UTC).isoformat(timespec="seconds")}


def _is_complete(folder: Path) -> bool:
    return (folder / "profile.json").is_file() and load_profile(folder).complete


def _is_recording(device: Device) -> bool:
    return getattr(device, "profile", None) is not None
