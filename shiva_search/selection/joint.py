"""Later stages of training: in, a model and a warmed-up router; out, a ratio policy, adapters, rows of training.csv.

    learn_policy    stage 2: how many tokens each layer keeps at each time, together with the router, under a budget
    tune_jointly    stage 3: adapters on the backbone together with router and, where it is not a plan's, policy

A batch is sorted by time and split into groups; a group has the row of k of its mean time, so shapes stay static.

Legend: G groups, L layers. Equation numbers are those of Shiva-DiT, arXiv 2602.05605.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.model import Batch, Model
from shiva_search.records.plan import Plan, row_as_json
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.selector import Selector
from shiva_search.selection.adapters import adapted, adapter_state, adapters_off
from shiva_search.selection.batches import Group, draw_batch, planned_groups, step_seed
from shiva_search.selection.distilling import Distiller, frozen, mean_figures
from shiva_search.selection.fitting import Progress, Row, fit
from shiva_search.selection.losses import BudgetLoss
from shiva_search.selection.ratio_policy import CostTable, RatioPolicy, tokens_kept
from shiva_search.selection.router import Router
from shiva_search.selection.training_gate import Recipe, TrainingGate


def learn_policy(
    model: Model,
    router: Router,
    policy: RatioPolicy,
    *,
    budget: float,
    costs: CostTable | None = None,
    budget_weight: float = 1.0,
    policy_lr: float = 5e-4,
    logit_noise: bool = True,
    steps: int = 200,
    seed: int = 0,
    batch_size: int = 24,
    groups: int = 4,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
    **recipe: Any,
) -> tuple[Router, RatioPolicy, list[Row]]:
    """Stage 2: learn how many tokens each layer keeps at each time (eq. 10 to 13, 24), the backbone frozen.

    Args:
        model: the model.
        router: warmed up; trained in place.
        policy: trained in place.
        budget: what a step may cost, as a share of the dense model in (0, 1]: of `costs`, else of tokens kept.
        costs: what each layer costs at each token count; None counts tokens, as the paper does.
        budget_weight: lambda of the budget loss.
        policy_lr: peak learning rate of the policy.
        logit_noise: N(0, 1) noise on the policy's logits (eq. 29).
        steps, seed, batch_size, groups, checkpoint, checkpoint_every_s, progress, **recipe: as for warm_up.

    Returns:
        The router, the policy, and a row per step.

    Raises:
        InputError: bad settings, or a checkpoint of another training.
    """
    chosen = Recipe(**{"lr": 3e-4, **recipe})
    budget_loss = BudgetLoss(budget, budget_weight)
    identity = {
        "stage": "policy", "steps": steps, "seed": seed, "batch_size": batch_size, "groups": groups, "budget": budget,
        "budget_weight": budget_weight, "policy_lr": policy_lr, "logit_noise": logit_noise, **asdict(chosen),
        "router": router.shape, "model": model.fingerprint(),
    }  # fmt: skip
    with frozen(model.module), AppliedPlan(model, Plan.dense(model), router, guidance=False) as applied:
        distiller = Distiller(applied, chosen)

        def step(index: int) -> dict[str, float]:
            gate = distiller.gate(step_seed(seed, index), index / max(1, steps - 1))
            batch = draw_batch(model, batch_size, seed, index)
            noise = gate.generator if logit_noise else None
            return policy_step(distiller, gate, policy, budget_loss, costs, sorted_groups(batch, groups), noise)

        rows = fit(
            "policy", [(router, chosen.lr), (policy, policy_lr), (budget_loss, 0.0)], step, steps=steps,
            identity=identity, checkpoint=checkpoint, checkpoint_every_s=checkpoint_every_s, progress=progress,
        )  # fmt: skip
    return router, policy, rows


def tune_jointly(
    model: Model,
    router: Selector,
    allocation: Plan | RatioPolicy,
    *,
    budget: float = 1.0,
    costs: CostTable | None = None,
    budget_weight: float = 1.0,
    rank: int = 32,
    backbone_lr: float = 1e-4,
    policy_lr: float = 1e-4,
    steps: int = 200,
    seed: int = 0,
    batch_size: int = 24,
    groups: int = 4,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Progress | None = None,
    **recipe: Any,
) -> tuple[dict[str, torch.Tensor], list[Row]]:
    """Stage 3: DoRA adapters on the backbone, router and (unless a plan is given) policy together, no logit noise.

    The teacher stays the backbone without adapters. Router and policy are trained in place; the model is handed back
    without adapters: `with adapted(model, rank, state)` puts the trained ones on.

    Args:
        allocation: a plan, whose rows stay as they are, or a policy, which goes on learning under `budget`.
        budget, costs, budget_weight: as for learn_policy.
        rank: of the adapters.
        backbone_lr: peak learning rate of the adapters.
        policy_lr: peak learning rate of the policy.
        groups: forwards per step, at least; a plan's timestep segments get at least one each.

    Other arguments and errors as for warm_up.

    Returns:
        The adapters' values by parameter name, and a row per step.
    """
    defaults = {"lr": 3e-4, "tau_rank": (0.05, 0.05), "tau_sel": (0.05, 0.05), "sigma": 0.05, "diffusion_weight": 1.0}
    chosen = Recipe(**{**defaults, **recipe})
    plan = allocation if isinstance(allocation, Plan) else Plan.dense(model)
    trained: list[tuple[nn.Module, float]] = [(router, chosen.lr)]
    budget_loss = BudgetLoss(budget, budget_weight)
    if isinstance(allocation, RatioPolicy):
        trained += [(allocation, policy_lr), (budget_loss, 0.0)]
    identity = {
        "stage": "joint", "steps": steps, "seed": seed, "batch_size": batch_size, "groups": groups, "rank": rank,
        "backbone_lr": backbone_lr, "budget": budget,
        "rows": [row_as_json(row) for row in plan.rows],
        **asdict(chosen), "router": router.shape, "model": model.fingerprint(),
    }  # fmt: skip
    with adapted(model, rank) as parameters, AppliedPlan(model, plan, router, guidance=False) as applied:
        distiller = AdaptedDistiller(applied, chosen)

        def step(index: int) -> dict[str, float]:
            gate = distiller.gate(step_seed(seed, index), index / max(1, steps - 1))
            batch = draw_batch(model, batch_size, seed, index)
            if isinstance(allocation, Plan):
                return distiller.step(planned_groups(allocation, batch, -(-batch_size // groups)), gate)
            return policy_step(distiller, gate, allocation, budget_loss, costs, sorted_groups(batch, groups), None)

        rows = fit(
            "joint", [*trained, (parameters, backbone_lr)], step, steps=steps, identity=identity,
            checkpoint=checkpoint, checkpoint_every_s=checkpoint_every_s, progress=progress,
        )  # fmt: skip
        state = adapter_state(parameters)
    return state, rows


def policy_step(
    distiller: Distiller,
    gate: TrainingGate,
    policy: RatioPolicy,
    budget_loss: BudgetLoss,
    costs: CostTable | None,
    batches: list[Batch],
    noise: torch.Generator | None,
) -> dict[str, float]:
    """One step with k from a policy: gradients of quality and budget meet at the ratios and go on together."""
    tokens, count = distiller.applied.model.tokens, sum(len(batch) for batch in batches)
    t_G = torch.stack([batch.t_B.mean() for batch in batches]).to(distiller.device)
    ratios_GL = policy(t_G, noise)
    # A leaf of its own lets each group run backward on its own, so that only one group's activations are alive.
    leaf_GL = ratios_GL.detach().requires_grad_()
    parts = []
    for index, (batch, row) in enumerate(zip(batches, tokens_kept(ratios_GL, tokens), strict=True)):
        # At least one token: a layer without any has no gradient that could bring it back.
        group = Group(batch, tuple(max(1, k) for k in row), len(batch) / count)
        gate.soft_k = {layer: tokens * leaf_GL[index, layer] for layer in range(1, len(row))}
        parts.append((group.share, distiller.backward(group, gate)))
    spent_G = leaf_GL.mean(dim=1) if costs is None else costs.share(tokens * leaf_GL)
    loss = budget_loss(spent_G)
    loss.backward()
    if leaf_GL.grad is not None:
        ratios_GL.backward(leaf_GL.grad)
    figures = mean_figures(parts)
    return {**figures, "loss": figures["loss"] + loss.item()}


def sorted_groups(batch: Batch, groups: int) -> list[Batch]:
    """Groups of samples of nearby times, at most `groups` of them.

    Raises:
        InputError: fewer samples than groups.
    """
    if not 1 <= groups <= len(batch):
        raise InputError(f"a batch of {len(batch)} cannot be split into {groups} groups; raise batch_size")
    return list(batch.take(batch.t_B.argsort()).chunks(-(-len(batch) // groups)))


class AdaptedDistiller(Distiller):
    """A student with adapters, and the backbone without them as its teacher."""

    @contextmanager
    def teaching(self) -> Iterator[None]:
        with adapters_off(self.applied.model):
            yield
