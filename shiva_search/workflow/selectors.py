"""The selector of a run. In: a model. Out: one that serves every plan, made once and kept; and it trained at a plan.

With a bypass, rejected tokens take a cheap path, and what that path misses ranks the tokens (closed form). Without one
(`--bypass none`, the paper's method), a router does, warmed up over all ratios.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from shiva_search.errors import InputError
from shiva_search.models.catalog import shipped_bypass, shipped_router
from shiva_search.models.model import Model
from shiva_search.records.plan import BYPASS_KINDS, Plan
from shiva_search.runtime.bypass import BypassBank
from shiva_search.runtime.selector import Selector
from shiva_search.search.fidelity import fidelity
from shiva_search.selection.closed_form import RANKS, fit_bypasses, offered_ranks, untrained_bypasses
from shiva_search.selection.loading import load_selector
from shiva_search.selection.router import Router
from shiva_search.selection.training import tune, warm_up
from shiva_search.workflow.answer import Progress
from shiva_search.workflow.settings import Settings

WARM_UP_STEPS = 180
#: Inputs of each pass of the closed-form fit.
FIT_SAMPLES = 192


def untrained_selector(model: Model, bypass: str, bypass_rank: int | None) -> Selector:
    """What a profile selects with: the cost of selecting does not depend on what was learned."""
    if bypass == "none":
        return Router.for_model(model, seed=0)
    return untrained_bypasses(model, bypass, ranks_of(bypass_rank))


def ranks_of(bypass_rank: int | None) -> tuple[int, ...]:
    """Ranks on offer: all, or the one asked for."""
    return RANKS if bypass_rank is None else (bypass_rank,)


def ready_selector(
    model: Model, settings: Settings, folder: Path, progress: Progress
) -> tuple[Selector, list[dict[str, Any]]]:
    """A selector that serves every plan, and the rows of training.csv that made it.

    Raises:
        InputError: an unknown bypass, or a rank below 1.
    """
    check_bypass(settings.bypass, settings.bypass_rank)
    if settings.bypass == "none":
        return warm_router(model, settings, folder, progress)
    offered = offered_ranks(settings.bypass, ranks_of(settings.bypass_rank))
    kept = folder / f"bypass-{settings.bypass}-{'-'.join(map(str, offered))}.safetensors"
    for path in (shipped_bypass(model), kept):
        if path is None or not path.is_file():
            continue
        try:
            bank = load_selector(path)
        except InputError as error:  # of an earlier release, say
            progress(f"bypasses: fit anew, since {error}")
            continue
        assert isinstance(bank, BypassBank)
        if (bank.bypass_kind, bank.ranks) == (settings.bypass, offered) and bank.model == model.fingerprint():
            progress(f"bypasses: {'those that ship with the model' if path != kept else f'kept from before ({kept})'}")
            return bank.to(next(model.module.parameters()).device), []
    bank, report = fit_bypasses(
        model, settings.bypass, offered, samples=FIT_SAMPLES, seed=settings.seed, progress=progress
    )
    left = [row[max(offered)] for row in report.missed.values()]
    progress(f"bypasses: {1 - sum(left) / len(left):.0%} of the squared updates explained, mean over layers")
    bank.save(kept)
    return bank, []


def check_bypass(bypass: str, bypass_rank: int | None) -> None:
    """Raises InputError for a bypass that is not known or a rank below 1."""
    if bypass not in BYPASS_KINDS:
        raise InputError(f"--bypass is one of {', '.join(BYPASS_KINDS)}, got {bypass!r}")
    if bypass_rank is not None and (bypass_rank < 1 or bypass != "affine"):
        raise InputError(f"--bypass-rank is at least 1 and goes with --bypass affine, got {bypass_rank} with {bypass}")


def warm_router(
    model: Model, settings: Settings, folder: Path, progress: Progress
) -> tuple[Router, list[dict[str, Any]]]:
    """A router that serves every ratio: the shipped one, the one kept beside the profile, or a new one, then kept."""
    shipped, kept = shipped_router(model), folder / "router.safetensors"
    if settings.warmup_steps is None and shipped is not None:
        progress("router: the warmed-up one that ships with the model")
        return _router(shipped), []
    steps = WARM_UP_STEPS if settings.warmup_steps is None else settings.warmup_steps
    if kept.is_file():
        router = _router(kept)
        trained = router.origin.get("steps")
        if router.model == model.fingerprint() and (settings.warmup_steps is None or trained == steps):
            progress(f"router: kept from before, {trained} steps of warm-up ({kept})")
            return router, []
    if steps == 0:
        return Router.for_model(model, seed=settings.seed), []
    router, curve = warm_up(
        model, steps=steps, seed=settings.seed, checkpoint=folder / ".warm_up.pt", progress=progress
    )
    router.save(kept)
    (folder / ".warm_up.pt").unlink(missing_ok=True)
    return router, curve


def _router(path: Path) -> Router:
    found = load_selector(path)
    if not isinstance(found, Router):
        raise InputError(f"{path} holds no router; delete it, or train with --bypass affine")
    return found


def tuned_selector(
    model: Model, plan: Plan, selector: Selector, *, steps: int, seed: int, checkpoint: Path | None, progress: Progress
) -> tuple[Selector, list[dict[str, Any]], bool]:
    """The selector, trained in place at the plan, the rows of training.csv, and whether the training is kept.

    A few steps can undo what the closed form found; inputs that are not trained on tell. Then it is as it was before.
    """
    before = copy.deepcopy(selector)
    _, curve = tune(model, selector, plan, steps=steps, seed=seed, checkpoint=checkpoint, progress=progress)
    was, now = (fidelity(model, plan, scorer, seed=seed + 1) for scorer in (before, selector))
    if now > was:
        progress(f"{steps} steps of training made it worse (error {was:.4f} before, {now:.4f} after): kept as it was")
        selector.load_state_dict(before.state_dict())
        selector.origin = before.origin
    return selector, curve, now <= was
