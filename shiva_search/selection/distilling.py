"""Teacher and student of one model. In: groups of samples with their row of tokens kept. Out: gradients and figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shiva_search.runtime.apply import AppliedPlan
from shiva_search.selection.batches import Group
from shiva_search.selection.losses import diffusion_loss, distillation_loss, distilled_layers, relative_error
from shiva_search.selection.training_gate import Recipe, TrainingGate

#: Of losses that count by the inverse of their error: the error at which one counts once, and what is added to each.
_UNIT, _FLOOR = 0.1, 0.01


class Distiller:
    """Runs the dense teacher and the pruned student of one model through one set of hooks."""

    def __init__(self, applied: AppliedPlan, recipe: Recipe) -> None:
        self.applied, self.recipe = applied, recipe
        model = applied.model
        self.device = next(model.module.parameters()).device
        self.compared = frozenset(distilled_layers(model.layer_count)) if recipe.feature_weight else frozenset[int]()
        self.half = prefers_bfloat16(model.module)

    def gate(self, seed: int, progress: float) -> TrainingGate:
        """The gate of one step, at a share of the way in [0, 1]."""
        return self.recipe.gate(self.applied.model.tokens, seed, progress)

    def backward(self, group: Group, gate: TrainingGate) -> dict[str, float]:
        """Forward of the teacher, forward and backward of the student; gradients are added up, weighted by share.

        Args:
            group: samples and their row of tokens kept.
            gate: of this step.

        Returns:
            Detached figures of this group: loss, distillation, diffusion (where known), error, keep.
        """
        tokens, batch, recipe = self.applied.model.tokens, group.batch, self.recipe
        with torch.no_grad(), self.teaching():
            dense, teacher = self._forward(group, (tokens,) * len(group.row))
        self.applied.controller.gate = gate
        try:
            output, student = self._forward(group, gate.aim_at(group.row))
        finally:
            self.applied.controller.gate = None
        distillation = distillation_loss(output, dense, student, teacher, recipe.feature_weight)
        loss = distillation
        figures = {"distillation": distillation}
        if batch.target is not None:
            figures["diffusion"] = diffusion_loss(output, batch.target)
            loss = loss + recipe.diffusion_weight * figures["diffusion"]
        figures = {"loss": loss, **figures, "error": relative_error(output.detach(), dense)}
        if loss.requires_grad:  # not where every layer is dense or skipped: nothing was chosen
            weight = _UNIT / (figures["error"] + _FLOOR) if recipe.relative else 1.0
            (loss * group.share * weight).backward()
        keep = sum(group.row) / len(group.row) / tokens
        return {**{name: value.detach().item() for name, value in figures.items()}, "keep": keep}

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
    """Whether float32 weights run faster under bfloat16 autocast here: on a GPU, or a CPU with instructions for it."""
    parameter = next(module.parameters())
    if parameter.dtype != torch.float32:
        return False
    if parameter.device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return parameter.device.type == "cuda" and torch.cuda.is_bf16_supported()
