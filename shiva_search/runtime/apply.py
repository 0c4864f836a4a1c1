"""Put a plan on a model and take it off again. In: model, plan, scorer. Out: a handle whose removal leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.pruned_block import Bypass, Controller, Gate, PrunedBlock
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name

_MARK = "_shiva_plan"


class AppliedPlan:
    """Hooks on a model, until `remove()` or the end of a `with` block.

    Args:
        model: it keeps its class, its weights and its other hooks.
        plan: tokens kept per layer.
        scorer: ranks tokens, or the name of one that needs no training.
        guidance: whether the two halves of a batch share one selection (eq. 32). None: they do where both hold the same
            images, as pipelines build them for guidance.
        gate: training's estimator.
        bypasses: the rejected path by layer.

    Raises:
        InputError: the plan does not fit the model (layers, tokens, fingerprint).
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        scorer: TokenScorer | str = "stride",
        *,
        guidance: bool | None = None,
        gate: Gate | None = None,
        bypasses: Mapping[int, Bypass] | None = None,
    ) -> None:
        if plan.layer_count != model.layer_count or plan.tokens != model.tokens:
            raise InputError(
                f"this plan is for {plan.layer_count} layers of {plan.tokens} tokens, "
                f"the model has {model.layer_count} layers of {model.tokens}; search again for this model"
            )
        plan.check_model(model.fingerprint())
        self.model = model
        self.plan = plan
        self.controller = Controller(
            rows=plan.tokens_kept,
            tokens=plan.tokens,
            scorer=scorer_by_name(scorer) if isinstance(scorer, str) else scorer,
            guidance=bool(guidance),
            gate=gate,
            bypasses=bypasses or {},
        )
        self._looks_for_halves = guidance is None
        remove_plan(model.module)  # a new plan replaces an old one
        self._replaced: list[tuple[nn.Module, Any]] = []
        for layer in model.layers:
            self._replaced.append((layer.module, layer.module.__dict__.get("forward")))
            forward = layer.module.forward
            pruned = PrunedBlock(layer, layer.adapter.apart(forward), self.controller)
            layer.module.forward = layer.adapter.around(pruned, layer.arguments, plan.tokens)
        self._root_hook = model.module.register_forward_pre_hook(self._begin, with_kwargs=True)
        object.__setattr__(model.module, _MARK, self)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        controller = self.controller
        named = {**kwargs, **dict(zip(self.model.root_arguments, args, strict=False))}
        if self.model.has_joint_blocks:  # the other blocks see for themselves
            self.model.check_tokens(named, self.plan.tokens)
        controller.t_B = self.model.times(named)
        controller.history = None
        controller.row = 0
        if self._looks_for_halves:
            controller.halves = _equal_halves(named[self.model.family.image_argument])
        if len(self.plan.segments) > 1:
            rows = {self.plan.row_at(t) for t in controller.t_B.tolist()}
            if len(rows) > 1:
                raise InputError(
                    f"samples of one batch lie in {len(rows)} timestep segments of the plan; "
                    "run them in separate forwards, or use a plan with one segment"
                )
            controller.row = rows.pop()

    def remove(self) -> None:
        """Take the hooks off; the model is as it was before. Safe to call twice."""
        for module, previous in reversed(self._replaced):
            if previous is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = previous
        self._replaced = []
        self._root_hook.remove()
        if getattr(self.model.module, _MARK, None) is self:
            object.__delattr__(self.model.module, _MARK)

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _equal_halves(images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | None:
    """Whether both halves of a batch hold the same images, as a scalar on their device; None for an odd batch."""
    if len(images) % 2:
        return None
    if not isinstance(images, torch.Tensor):  # Z-Image takes a list
        images = torch.stack(list(images))
    first, second = images.chunk(2)
    return (first == second).all()


def remove_plan(module: nn.Module) -> None:
    """Take off whatever plan is on the module; nothing happens where there is none."""
    applied = getattr(module, _MARK, None)
    if applied is not None:
        applied.remove()
