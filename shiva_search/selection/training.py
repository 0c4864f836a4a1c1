"""Train the router: in, a model and perhaps a plan; out, a Router and the rows of training.csv.

    warm_up         stage 1: every ratio and many kinds of plan, so that one router serves whatever the search tries
    tune            at the tokens kept by one plan
    train_selector  both, one after the other

The backbone is frozen. A step is one forward of the dense teacher without gradients, and one forward and backward of
the pruned student, in groups of samples that share a row of tokens kept. See fitting.py for checkpoints and resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.pruned_block import Bypass
from shiva_search.selection.batches import Group, draw_batch, planned_groups, step_seed, stratified_groups
from shiva_search.selection.fitting import Progress, Row, fit
from shiva_search.selection.gates import Estimator, get_estimator
from shiva_search.selection.losses import diffusion_loss, distillation_loss, distilled_layers, relative_error
from shiva_search.selection.router import Router
from shiva_search.selection.soft_topk import inclusion, perturb, soft_rank


@dataclass(frozen=True)
class Recipe:
    """What the stages have in common.

    Attributes:
        estimator: "update" or "literal" (gates.py).
        lr: peak learning rate of the router.
        sigma: standard deviation of the noise on scores, in units of score.
        tau_rank: temperature of the soft rank at the first and at the last step; geometric in between.
        tau_sel: likewise of the inclusion score.
        feature_weight: of the compared layers beside the output in the distillation loss.
        diffusion_weight: of the diffusion loss, where targets are known.
    """

    estimator: str = "update"
    lr: float = 1e-3
    sigma: float = 0.1
    tau_rank: tuple[float, float] = (0.2, 0.05)
    tau_sel: tuple[float, float] = (0.1, 0.05)
    feature_weight: float = 0.5
    diffusion_weight: float = 0.1

    def temperatures(self, progress: float) -> tuple[float, float]:
        """(tau_rank, tau_sel) at a share of the way in [0, 1]."""
        rank, sel = ((a * (b / a) ** progress) for a, b in (self.tau_rank, self.tau_sel))
        return rank, sel


@dataclass
class TrainingGate:
    """The runtime's Gate for training: an estimator, its temperatures and the noise on scores.

    Attributes:
        estimator: how dL/dpi is found.
        tokens: N.
        tau_rank, tau_sel, sigma: temperatures and noise in force.
        generator: source of the noise.
        soft_k: real-valued tokens kept by layer, [] or [B, 1], where k learns (eq. 24); else the plan's own.
    """

    estimator: Estimator
    tokens: int
    tau_rank: float
    tau_sel: float
    sigma: float
    generator: torch.Generator
    soft_k: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def perturb(self, scores_BN: torch.Tensor) -> torch.Tensor:
        """Noisy scores."""
        return perturb(scores_BN, self.sigma, self.generator)

    def inclusion(self, scores_BN: torch.Tensor, k: int, layer: int) -> torch.Tensor:
        """Inclusion scores [B, N] of one layer."""
        ranks_BN = soft_rank(scores_BN, self.tau_rank)
        return inclusion(ranks_BN, self.soft_k.get(layer, k), self.tau_sel, self.tokens)

    def enter(self, x_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor:
        """See Estimator."""
        return self.estimator.enter(x_kept_BKD, pi_kept_BK)

    def leave(self, x_kept_BKD: torch.Tensor, out_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor:
        """See Estimator."""
        return self.estimator.leave(x_kept_BKD, out_kept_BKD, pi_kept_BK)

    def stay(self, x_BND: torch.Tensor, pi_BN: torch.Tensor) -> torch.Tensor:
        """See Estimator. The runtime hands over all tokens; the kept ones are overwritten, so they add no gradient."""
        return self.estimator.stay(x_BND, pi_BN) if self.estimator.gates_rejected else x_BND


class Distiller:
    """Runs the dense teacher and the pruned student of one model through one set of hooks."""

    def __init__(self, applied: AppliedPlan, recipe: Recipe) -> None:
        self.applied, self.recipe = applied, recipe
        model = applied.model
        self.device = next(model.module.parameters()).device
        self.compared = frozenset(distilled_layers(model.layer_count)) if recipe.feature_weight else frozenset[int]()
        self.half = prefers_bfloat16(model.module)

    def gate(self, seed: int, progress: float, **more: Any) -> TrainingGate:
        """The gate of one step."""
        tau_rank, tau_sel = self.recipe.temperatures(progress)
        generator = torch.Generator().manual_seed(seed)
        estimator = get_estimator(self.recipe.estimator)
        tokens = self.applied.model.tokens
        return TrainingGate(estimator, tokens, tau_rank, tau_sel, self.recipe.sigma, generator, **more)

    def backward(self, group: Group, gate: TrainingGate, extra: torch.Tensor | None = None) -> dict[str, float]:
        """Forward of the teacher, forward and backward of the student; gradients are added up, weighted by share.

        Args:
            group: samples and their row of tokens kept.
            gate: of this step.
            extra: a further loss of this group (the budget's), already weighted.

        Returns:
            Detached figures of this group: loss, distillation, diffusion (where known), error, keep.
        """
        tokens, batch, recipe = self.applied.model.tokens, group.batch, self.recipe
        with torch.no_grad(), self.teaching():
            dense, teacher = self._forward(group, (tokens,) * len(group.row))
        self.applied.controller.gate = gate
        try:
            output, student = self._forward(group, group.row)
        finally:
            self.applied.controller.gate = None
        distillation = distillation_loss(output, dense, student, teacher, recipe.feature_weight)
        loss = distillation
        figures = {"distillation": distillation}
        if batch.target is not None:
            figures["diffusion"] = diffusion_loss(output, batch.target)
            loss = loss + recipe.diffusion_weight * figures["diffusion"]
        if extra is not None:
            loss = loss + extra
        figures = {"loss": loss, **figures, "error": relative_error(output.detach(), dense)}
        if loss.requires_grad:  # not where every layer is dense or skipped: nothing was chosen
            (loss * group.share).backward()
        return {name: float(value) for name, value in figures.items()} | {"keep": sum(group.row) / len(group.row) / tokens}

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Hook for stages whose student differs from the teacher by more than the selection."""
        yield

    def _forward(self, group: Group, row: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Output, and the tokens behind the compared layers, with a row in force."""
        controller, seen = self.applied.controller, {}

        def observe(layer: int, x_BND: torch.Tensor, out_BND: torch.Tensor, kept_BK: torch.Tensor | None) -> None:
            if layer in self.compared:
                seen[layer] = out_BND

        planned = controller.rows
        controller.rows, controller.observer = [row] * len(planned), observe
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                output = self.applied.model.predict(group.batch.inputs)
        finally:
            controller.rows, controller.observer = planned, None
        return output, seen

    def step(self, groups: Iterable[Group], gate: TrainingGate) -> dict[str, float]:
        """All groups of one step, one after the other; figures are means over samples."""
        return mean_figures([(group.share, self.backward(group, gate)) for group in groups])


def mean_figures(parts: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Weighted means of figures, by name."""
    total = sum(share for share, _ in parts)
    return {name: sum(share * figures[name] for share, figures in parts) / total for name in parts[0][1]}


def warm_up(
    model: Model,
    *,
    steps: int = 200,
    seed: int = 0,
    batch_size: int = 24,
    groups: int = 4,
    keep_range: tuple[float, float] = (0.15, 0.95),
    router: Router | None = None,
    bypasses: Mapping[int, Bypass] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
    **recipe: Any,
) -> tuple[Router, list[Row]]:
    """Stage 1: train a router for every ratio by stratified ratio sampling, the backbone frozen.

    Args:
        model: the model; its "train" split is drawn from.
        steps: optimiser steps.
        seed: same seed, same router.
        batch_size: samples per step, at least `groups`.
        groups: each has its own part of keep_range and its own forward.
        keep_range: shares of tokens kept, in (0, 1].
        router: start from this one (it is trained in place); None makes a new one.
        bypasses: what rejected tokens do, by layer.
        checkpoint: file to resume from and to save to; see fit().
        checkpoint_every_s: seconds between saves.
        progress: takes short lines.
        **recipe: fields of Recipe.

    Returns:
        The router, and a row per step: stage, step, loss, distillation, diffusion, error (of the pruned output
        against the dense one, noise on scores included), keep, seconds.

    Raises:
        InputError: bad settings, or a checkpoint of another training.
    """
    if not 0 < keep_range[0] < keep_range[1] <= 1:
        raise InputError(f"keep_range is two ascending shares of tokens in (0, 1], got {keep_range}")
    if not 1 <= groups <= batch_size:
        raise InputError(f"a batch of {batch_size} cannot be split into {groups} groups; raise batch_size")
    chosen = Recipe(**recipe)
    router = router or Router.for_model(model, seed)
    settings = {"keep_range": list(keep_range), "groups": groups}

    def groups_of(step: int) -> Iterable[Group]:
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        batch = draw_batch(model, batch_size, seed, step)
        return stratified_groups(model, batch, groups, keep_range, generator)

    rows = _train(
        "warm-up", model, Plan.dense(model), router, groups_of, chosen, settings, bypasses=bypasses, steps=steps,
        seed=seed, batch_size=batch_size, checkpoint=checkpoint, checkpoint_every_s=checkpoint_every_s,
        progress=progress,
    )  # fmt: skip
    return router, rows


def tune(
    model: Model,
    router: Router,
    plan: Plan,
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 24,
    group_size: int = 8,
    bypasses: Mapping[int, Bypass] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
    **recipe: Any,
) -> tuple[Router, list[Row]]:
    """Train a router (in place) at the tokens kept by one plan, each timestep segment with its own row.

    Args:
        group_size: samples in one forward; bounds memory.
        plan: its rows are fixed.

    Other arguments, return value and errors as for warm_up.
    """
    if batch_size < 1 or group_size < 1:
        raise InputError(f"batch_size and group_size are at least 1, got {batch_size} and {group_size}")
    # The router knows its trade: colder from the start, gentler steps.
    chosen = Recipe(**{"lr": 5e-4, "tau_rank": (0.05, 0.05), "tau_sel": (0.05, 0.05), "sigma": 0.05, **recipe})

    def groups_of(step: int) -> Iterable[Group]:
        return planned_groups(plan, draw_batch(model, batch_size, seed, step), group_size)

    settings = {"tokens_kept": [list(row) for row in plan.tokens_kept], "group_size": group_size}
    rows = _train(
        "tune", model, plan, router, groups_of, chosen, settings, bypasses=bypasses, steps=steps, seed=seed,
        batch_size=batch_size, checkpoint=checkpoint, checkpoint_every_s=checkpoint_every_s, progress=progress,
    )  # fmt: skip
    return router, rows


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
        **settings: of both stages (batch_size, bypasses, fields of Recipe).

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


def _train(
    stage: str,
    model: Model,
    plan: Plan,
    router: Router,
    groups_of: Callable[[int], Iterable[Group]],
    recipe: Recipe,
    settings: dict[str, Any],
    *,
    bypasses: Mapping[int, Bypass] | None,
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
        **asdict(recipe), "router": asdict(router.config), "model": model.fingerprint(),
    }  # fmt: skip
    with frozen(model.module), AppliedPlan(model, plan, router, guidance=False, bypasses=bypasses) as applied:
        distiller = Distiller(applied, recipe)

        def step(index: int) -> dict[str, float]:
            gate = distiller.gate(step_seed(seed, index), index / max(1, steps - 1))
            return distiller.step(groups_of(index), gate)

        rows = fit(
            stage, [(router, recipe.lr)], step, steps=steps, identity=identity, checkpoint=checkpoint,
            checkpoint_every_s=checkpoint_every_s, progress=progress,
        )  # fmt: skip
    router.origin = {**router.origin, stage: {"steps": steps, "seed": seed, "batch_size": batch_size, **settings}}
    return rows


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for gradients inside; afterwards each as before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)


def prefers_bfloat16(module: nn.Module) -> bool:
    """Whether float32 weights run faster under bfloat16 autocast here: on accelerators, and CPUs with instructions for it."""
    parameter = next(module.parameters())
    if parameter.dtype != torch.float32:
        return False
    if parameter.device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return parameter.device.type == "cuda" and torch.cuda.is_bf16_supported()
