"""The warmed-up router. In: a model. Out: a router that serves every ratio; warm-up runs once per model and is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shiva_search.models.catalog import shipped_router
from shiva_search.models.model import Model
from shiva_search.selection.loading import load_selector
from shiva_search.selection.router import Router
from shiva_search.selection.training import warm_up
from shiva_search.workflow.answer import Progress
from shiva_search.workflow.settings import Settings

WARM_UP_STEPS = 180


def warm_router(
    model: Model, settings: Settings, folder: Path, progress: Progress
) -> tuple[Router, list[dict[str, Any]]]:
    """A router that serves every ratio: the shipped one, the one kept beside the profile, or a new one, then kept."""
    shipped, kept = shipped_router(model), folder / "router.safetensors"
    if settings.warmup_steps is None and shipped is not None:
        progress("router: the warmed-up one that ships with the model")
        return load_selector(shipped), []
    steps = WARM_UP_STEPS if settings.warmup_steps is None else settings.warmup_steps
    if kept.is_file():
        router = load_selector(kept)
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
