"""Images from the dense and the planned model side by side. In: model, plan, selector. Out: pixels and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shiva_search.errors import UnavailableError
from shiva_search.models.model import Model
from shiva_search.models.reference.evaluation import sample, velocity_of
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import TokenScorer

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Pairs:
    """Images of the same seeds.

    Attributes:
        dense, planned: [n, 28, 28] in [-1, 1].
        titles: what each was asked to show.
        figures: mean squared difference of the pairs' pixels, in the range of 0 to 4.
    """

    dense: torch.Tensor
    planned: torch.Tensor
    titles: tuple[str, ...]
    figures: dict[str, Any]


def generate_pairs(
    model: Model,
    plan: Plan,
    selector: TokenScorer | str,
    *,
    count: int,
    steps: int,
    guidance_scale: float,
    seed: int,
) -> Pairs:
    """Draw `count` images twice from the same noise, once dense, once under the plan.

    Raises:
        UnavailableError: the model is no flow-matching model of labelled 28x28 images.
    """
    config = model.config
    if config.get("sample_size") != 28 or config.get("in_channels") != 1:
        raise UnavailableError(
            f"generate draws images with fashion-dit; for {model.name} use the plan in your pipeline: "
            "shiva_search.apply_plan(pipe.transformer, RUN)"
        )
    labels = torch.arange(count) % len(CLASSES)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(velocity_of(model.module), labels, steps, guidance_scale, generator)

    dense = draw()
    with AppliedPlan(model, plan, selector, guidance=guidance_scale != 1.0):
        planned = draw()
    difference = float((dense - planned).square().mean())
    titles = tuple(CLASSES[label] for label in labels.tolist())
    return Pairs(dense.squeeze(1), planned.squeeze(1), titles, {"mean_squared_difference": difference})
