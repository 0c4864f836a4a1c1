"""Train the router: in, a model and perhaps a plan; out, a Router and the rows of training.csv.

    warm_up         stage 1: every ratio and many kinds of plan, so that one router serves whatever the search tries
    tune            at the tokens kept by one plan
    train_selector  both, one after the other

The backbone is frozen. A step is one forward of the dense teacher without gradients, and one forward and backward of
the pruned student, in groups of samples that share a row of tokens kept. See fitting.py for checkpoints and resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan, row_as_json
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.bypass import BypassBank
from shiva_search.runtime.selector import Selector
from shiva_search.selection.batches import Group, draw_batch, planned_groups, step_seed, stratified_groups
from shiva_search.selection.distilling import Distiller, frozen
from shiva_search.selection.fitting import Progress, Row, fit
from shiva_search.selection.router import Router
from shiva_search.selection.training_gate import Recipe

AnySelector = TypeVar("AnySelector", bound=Selector)


def warm_up(model: Model, *, router: Router | None = None, seed: int = 0, **options: Any) -> tuple[Router, list[Row]]:
    """Stage 1 for a router, a new one unless given; see warm_up_from."""
    return warm_up_from(model, router or Router.for_model(model, seed), seed=seed, **options)


def warm_up_from(
    model: Model,
    selector: AnySelector,
    *,
    steps: int = 200,
    seed: int = 0,
    batch_size: int = 24,
    groups: int = 4,
    keep_range: tuple[float, float] = (0.15, 0.95),
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
    **recipe: Any,
) -> tuple[AnySelector, list[Row]]:
    """Stage 1: train a selector for every ratio by stratified ratio sampling, the backbone frozen.

    A router learns to rank; bypasses that were fit in closed form go on learning, for all ranks and both attentions.

    Args:
        model: the model; its "train" split is drawn from.
        selector: trained in place.
        steps: optimiser steps.
        seed: same seed, same router.
        batch_size: samples per step, at least `groups`.
        groups: each has its own part of keep_range and its own forward.
        keep_range: shares of tokens kept, in (0, 1].
        checkpoint: file to resume from and to save to; see fit().
        checkpoint_every_s: seconds between saves.
        progress: takes short lines.
        **recipe: fields of Recipe.

    Returns:
        The selector, and a row per step: stage, step, loss, distillation, diffusion, error (of the pruned output
        against the dense one, noise on scores included), keep, seconds.

    Raises:
        InputError: bad settings, or a checkpoint of another training.
    """
    if not 0 < keep_range[0] < keep_range[1] <= 1:
        raise InputError(f"keep_range is two ascending shares of tokens in (0, 1], got {keep_range}")
    if not 1 <= groups <= batch_size:
        raise InputError(f"a batch of {batch_size} cannot be split into {groups} groups; raise batch_size")
    chosen = Recipe(**{**_warm_recipe(selector), **recipe})
    variants = drawn_variants(model, selector)
    settings = {"keep_range": list(keep_range), "groups": groups}

    def groups_of(step: int) -> Iterable[Group]:
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        batch = draw_batch(model, batch_size, seed, step)
        return stratified_groups(model, batch, groups, keep_range, generator, variants)

    rows = _train(
        "warm-up", model, Plan.dense(model), selector, groups_of, chosen, settings, steps=steps,
        seed=seed, batch_size=batch_size, checkpoint=checkpoint, checkpoint_every_s=checkpoint_every_s,
        progress=progress,
    )  # fmt: skip
    return selector, rows


def tune(
    model: Model,
    router: AnySelector,
    plan: Plan,
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 24,
    group_size: int = 8,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
    **recipe: Any,
) -> tuple[AnySelector, list[Row]]:
    """Train a selector (in place) at the tokens kept by one plan, each timestep segment with its own row.

    Of a BypassBank, what rejected tokens do is trained together with the scores.

    Args:
        group_size: samples in one forward; bounds memory.
        plan: its rows are fixed.

    Other arguments, return value and errors as for warm_up.
    """
    if batch_size < 1 or group_size < 1:
        raise InputError(f"batch_size and group_size are at least 1, got {batch_size} and {group_size}")
    # The selector knows its trade: colder from the start, gentler steps.
    lr = 1e-3 if isinstance(router, BypassBank) else 5e-4
    chosen = Recipe(**{"lr": lr, "tau_rank": (0.05, 0.05), "tau_sel": (0.05, 0.05), "sigma": 0.05, **recipe})

    def groups_of(step: int) -> Iterable[Group]:
        return planned_groups(plan, draw_batch(model, batch_size, seed, step), group_size)

    settings = {"rows": [row_as_json(row) for row in plan.rows], "group_size": group_size}
    curve = _train(
        "tune", model, plan, router, groups_of, chosen, settings, steps=steps, seed=seed,
        batch_size=batch_size, checkpoint=checkpoint, checkpoint_every_s=checkpoint_every_s, progress=progress,
    )  # fmt: skip
    return router, curve


def train_selector(
    model: Model,
    plan: Plan,
    steps: int = 500,
    *,
    seed: int = 0,
    router: Router | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Router:
    """A trained selector for a plan: two thirds of the steps over all ratios, one third at the plan's own.

    Args:
        model: the model.
        plan: the plan it is for.
        steps: optimiser steps in all.
        seed: same seed, same selector.
        router: already warmed up: all steps are spent on the plan.
        checkpoint: file to resume from; the second stage saves beside it.
        progress: takes short lines.
        **settings: of both stages (batch_size, fields of Recipe).

    Raises:
        InputError: bad settings, a plan for another model, or a checkpoint of another training.
    """
    plan.check_model(model.fingerprint())
    common = {"seed": seed, "progress": progress, **settings}
    if router is None:
        first = steps - steps // 3
        router, _ = warm_up(model, steps=first, checkpoint=checkpoint, **common)
        steps -= first
    second = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.stem}-tune{checkpoint.suffix}")
    router, _ = tune(model, router, plan, steps=steps, checkpoint=second, **common)
    return router


def drawn_variants(model: Model, selector: Selector) -> list[list[tuple[str, int]]]:
    """What pruned layers do besides keeping tokens while a selector warms up; nothing, for a router."""
    if not isinstance(selector, BypassBank):
        return []
    modes = [["kept", "all"] if layer.attends_all else ["kept"] for layer in model.layers]
    return [[(mode, rank) for mode in found for rank in selector.ranks] for found in modes]


def _warm_recipe(selector: Selector) -> dict[str, Any]:
    """Bypasses start from a solution: gentler steps, a colder ranking, and light pruning counts as much as heavy.

    Without the last, steps took back what the closed form does well where few tokens are rejected.
    """
    if not isinstance(selector, BypassBank):
        return {}
    return {"lr": 1e-3, "tau_rank": (0.1, 0.05), "tau_sel": (0.05, 0.05), "relative": True}


def _train(
    stage: str,
    model: Model,
    plan: Plan,
    router: Selector,
    groups_of: Callable[[int], Iterable[Group]],
    recipe: Recipe,
    settings: dict[str, Any],
    *,
    steps: int,
    seed: int,
    batch_size: int,
    checkpoint: Path | None,
    checkpoint_every_s: float,
    progress: Progress | None,
) -> list[Row]:
    """What warm_up and tune share: hooks on, backbone frozen, steps, hooks off."""
    router.check_model(model.fingerprint())
    identity = {
        "stage": stage, "steps": steps, "seed": seed, "batch_size": batch_size, **settings,
        **asdict(recipe), "router": router.shape, "model": model.fingerprint(),
    }  # fmt: skip
    with frozen(model.module), AppliedPlan(model, plan, router, guidance=False) as applied:
        distiller = Distiller(applied, recipe)

        def step(index: int) -> dict[str, float]:
            gate = distiller.gate(step_seed(seed, index), index / max(1, steps - 1))
            return distiller.step(groups_of(index), gate)

        rows = fit(
            stage, [(router, recipe.lr)], step, steps=steps, identity=identity, checkpoint=checkpoint,
            checkpoint_every_s=checkpoint_every_s, progress=progress,
        )  # fmt: skip
    router.eval().requires_grad_(False)
    router.origin = {
        "stage": stage, "steps": steps, "seed": seed, "batch_size": batch_size, **settings, "after": router.origin
    }  # fmt: skip
    return rows
