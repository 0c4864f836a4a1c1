"""Images from the dense and the planned model side by side. In: model, plan, selector. Out: pixels and figures.

fashion-dit is sampled here; any other model by its own diffusers pipeline, whose folder or hub id the model came from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.model import Model
from shiva_search.models.reference.evaluation import sample, velocity_of
from shiva_search.records.files import read_json
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import TokenScorer

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
#: What pipelines are asked for where the user does not say: by text, or by ImageNet's class numbers.
PROMPTS = (
    "a red bicycle leaning on a brick wall",
    "a bowl of oranges on a wooden table",
    "a lighthouse above a stormy sea",
    "a portrait of an old fisherman",
)
LABELS = (207, 360, 387, 974, 88, 979, 417, 279)
_FASHION_GUIDANCE = 2.5


@dataclass(frozen=True)
class Pairs:
    """Images of the same seeds.

    Attributes:
        dense, planned: [n, H, W] or [n, H, W, 3], in [-1, 1].
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
    guidance_scale: float | None = None,
    seed: int,
    prompts: Sequence[str] = (),
) -> Pairs:
    """Draw `count` images twice from the same noise, once dense, once under the plan.

    Args:
        guidance_scale: None: 2.5 for fashion-dit, a pipeline's own default for others.
        prompts: for pipelines of text; they take turns.

    Raises:
        InputError: prompts for a model that draws classes.
        UnavailableError: the model did not come with a pipeline that draws images.
    """
    config = model.config
    if config.get("sample_size") == 28 and config.get("in_channels") == 1:
        if prompts:
            raise _draws_classes(model.name)
        scale = _FASHION_GUIDANCE if guidance_scale is None else guidance_scale
        draw, titles = _fashion(model, count, steps, scale, seed)
        guidance: bool | None = scale != 1.0
    else:
        draw, titles = _by_pipeline(model, count, steps, guidance_scale, seed, prompts)
        guidance = None  # whether a batch holds two halves shows in each call
    dense = draw()
    with AppliedPlan(model, plan, selector, guidance=guidance):
        planned = draw()
    difference = float((dense - planned).square().mean())
    return Pairs(dense, planned, titles, {"mean_squared_difference": difference})


def _draws_classes(name: str) -> InputError:
    return InputError(f"{name} draws classes and reads no prompt; leave out --prompt")


def _fashion(
    model: Model, count: int, steps: int, guidance_scale: float, seed: int
) -> tuple[Callable[[], torch.Tensor], tuple[str, ...]]:
    labels = torch.arange(count) % len(CLASSES)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(velocity_of(model.module), labels, steps, guidance_scale, generator).squeeze(1)

    return draw, tuple(CLASSES[label] for label in labels.tolist())


def _by_pipeline(
    model: Model, count: int, steps: int, guidance_scale: float | None, seed: int, prompts: Sequence[str]
) -> tuple[Callable[[], torch.Tensor], tuple[str, ...]]:
    """One image a call, each from its own seed, at the resolution of the model's workload."""
    pipeline = _pipeline_of(model)
    known = inspect.signature(pipeline.__call__).parameters
    resolution = model.family.resolution_of(model.config, model.tokens)
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    # Binning would draw at a resolution that the plan is not for, and cleaning needs a library that may not be there.
    wanted = {"height": resolution, "width": resolution, "use_resolution_binning": False, "clean_caption": False}
    options |= {name: value for name, value in wanted.items() if name in known}
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    if "prompt" in known:
        missing = [name for name, part in pipeline.components.items() if name.startswith("text_enc") and part is None]
        if missing:
            raise UnavailableError(
                f"the pipeline in {model.origin} lacks {', '.join(missing)}, so it cannot read a prompt; save it whole"
            )
        asked: list[dict[str, Any]] = [{"prompt": text} for text in prompts or PROMPTS]
        names = [shorten(text, 30, placeholder="...") for text in prompts or PROMPTS]
    elif "class_labels" in known:
        if prompts:
            raise _draws_classes(model.name)
        asked, names = [{"class_labels": [label]} for label in LABELS], [f"class {label}" for label in LABELS]
    else:
        raise UnavailableError(f"generate asks by prompt or by class, and {type(pipeline).__name__} takes neither")

    def draw() -> torch.Tensor:
        images = []
        for index in range(count):
            output = pipeline(
                **asked[index % len(asked)], **options, generator=torch.Generator().manual_seed(seed + index)
            )
            if not hasattr(output, "images"):
                raise UnavailableError(f"generate draws images, and {type(pipeline).__name__} makes something else")
            images.append(torch.as_tensor(output.images[0]))
        return torch.stack(images).float() * 2 - 1

    return draw, tuple(names[index % len(names)] for index in range(count))


def _pipeline_of(model: Model) -> Any:
    """The diffusers pipeline that the model's transformer was loaded from, with the model's own module in it."""
    import diffusers

    folder, index = Path(model.origin), Path(model.origin) / "model_index.json"
    if model.origin in ("", "random weights", "wrapped") or (folder.is_dir() and not index.is_file()):
        held = "a transformer only" if folder.is_dir() and model.origin else model.origin or "no weights of its own"
        raise UnavailableError(
            f"generate needs a whole pipeline, and {model.name} is {held}; optimize a pipeline's folder, or use the "
            "plan in your own pipeline: shiva_search.apply_plan(pipe.transformer, RUN)"
        )
    parts = read_json(index, "pipeline") if index.is_file() else {}
    without = {name: None for name, kind in parts.items() if isinstance(kind, list) and kind[:1] == [None]}
    first = next(model.module.parameters())
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(model.origin, transformer=model.module, **without)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"cannot load the pipeline in {model.origin}: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(first.device)
    return pipeline if first.dtype == torch.float32 else pipeline.to(first.dtype)
