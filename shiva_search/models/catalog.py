"""From what the user typed after --model to a Model: the built-in one, or a folder in diffusers format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.families import FAMILIES, family_of
from shiva_search.models.model import Batch, Model, stratified_times
from shiva_search.records.files import read_json
from shiva_search.records.workload import Workload

BUILT_IN = "fashion-dit"
REFERENCE = Path(__file__).parent / "reference"


def load_model(name: str = BUILT_IN, device: str = "cpu", seed: int = 0, **workload: Any) -> Model:
    """Load a model by name.

    Args:
        name: "fashion-dit", or a folder in diffusers format (a whole pipeline or its transformer).
        device: torch device the weights go to.
        seed: for what is random (weights of an architecture given by name).
        **workload: fields of Workload that replace the model's defaults; None leaves them.

    Raises:
        UnavailableError: the name is neither known nor a folder with a transformer.
        InputError: the transformer's class has no adapter, or the workload is not valid.
    """
    if name == BUILT_IN:
        module = _read_transformer(REFERENCE / "transformer")
        model = as_model(module, name, "built in", workload)
        model.calibration = _fashion_batch
    else:
        module = _read_transformer(_transformer_folder(name))
        model = as_model(module, name, str(Path(name)), workload)
    model.module.to(device=device, dtype=getattr(torch, model.workload.dtype)).eval().requires_grad_(False)
    return model


def _transformer_folder(name: str) -> Path:
    folder = Path(name)
    for candidate in (folder / "transformer", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise UnavailableError(
        f"unknown model {name!r}: neither a name that `shiva-search models` lists nor a folder with a transformer "
        "in diffusers format (config.json and safetensors)"
    )


def _read_transformer(folder: Path) -> torch.nn.Module:
    import diffusers

    class_name = read_json(folder / "config.json", "model configuration").get("_class_name", "")
    family = family_of(str(class_name))
    if family is None:
        known = ", ".join(item.model_class for item in FAMILIES)
        raise InputError(f"no adapter for model class {class_name!r} in {folder}; known classes: {known}")
    try:
        module: torch.nn.Module = getattr(diffusers, family.model_class).from_pretrained(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UnavailableError(f"cannot load the weights in {folder}: {first}") from error
    return module


def as_model(module: torch.nn.Module, name: str, origin: str = "", workload: dict[str, Any] | None = None) -> Model:
    """What is known of a transformer at hand.

    Args:
        workload: fields of Workload that replace the defaults of its family.

    Raises:
        InputError: its class has no adapter.
    """
    class_name = type(module).__name__
    family = family_of(class_name)
    if family is None:
        known = ", ".join(item.model_class for item in FAMILIES)
        raise InputError(f"no adapter for model class {class_name!r}; known classes: {known}")
    config = dict(module.config)  # type: ignore[arg-type]
    return Model(module, name, family, family.defaults(config).override(**(workload or {})), origin=origin)


def _fashion_batch(split: str, count: int, seed: int) -> Batch:
    """Held-out Fashion-MNIST images noised by flow matching: x_t = (1 - t) x_0 + t eps, target eps - x_0."""
    from shiva_search.models.reference.data import load_reference_data, to_pixels

    images, labels = load_reference_data(split)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(images), (count,), generator=generator)
    if count <= len(images):
        rows = torch.randperm(len(images), generator=generator)[:count]
    t_B = stratified_times(count, generator)
    x0, mix = to_pixels(images[rows]), t_B.view(-1, 1, 1, 1)
    noise = torch.randn(x0.shape, generator=generator)
    inputs = {"hidden_states": (1 - mix) * x0 + mix * noise, "timestep": t_B * 1000, "class_labels": labels[rows]}
    return Batch(inputs, t_B, noise - x0)


def shipped_router(model: Model) -> Path | None:
    """The warmed-up router that ships with the built-in model; None for all others."""
    path = REFERENCE / "router.safetensors"
    return path if model.origin == "built in" and path.is_file() else None


def list_models() -> list[dict[str, str]]:
    """What --model accepts, a row each: name, kind, blocks, what was verified."""
    rows = [{"name": BUILT_IN, "kind": "built in, trained", "class": "DiTTransformer2DModel"}]
    rows += [
        {"name": f"folder with {family.model_class}", "kind": f"family {family.name}", "class": family.model_class}
        for family in FAMILIES
    ]
    return rows


__all__ = ["BUILT_IN", "REFERENCE", "Workload", "list_models", "load_model"]
