"""Images of the dense and the planned model side by side. In: a run and its plan. Out: samples.png."""

from __future__ import annotations

from typing import Any

from shiva_search.generation import generate_pairs
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.records.run import RunFolder
from shiva_search.reporting import plots
from shiva_search.runtime.selector import Selector
from shiva_search.workflow.answer import Progress


def draw_samples(
    run: RunFolder, model: Model, plan: Plan, selector: Selector | str, *, progress: Progress, **options: Any
) -> dict[str, Any]:
    """Draw pairs of images into the run's folder; what generate_pairs says of them."""
    progress("drawing images, dense and planned, from the same seeds")
    pairs = generate_pairs(model, plan, selector, **options)
    figure = plots.samples_figure(pairs.dense.numpy(), pairs.planned.numpy(), pairs.titles)
    plots.save(figure, run.samples_png)
    return pairs.figures
