"""From what the user typed after --model to a Model: the built-in one, an architecture with random weights, a folder in
diffusers format, or a hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.blocks import Family
from shiva_search.models.families import FAMILIES, REFUSED, family_of
from shiva_search.models.hub import why_unreachable
from shiva_search.models.model import Batch, Model, stratified_times
from shiva_search.records.files import read_json
from shiva_search.records.workload import Workload

BUILT_IN = "fashion-dit"
REFERENCE = Path(__file__).parent / "reference"

#: Published configurations by name; latency does not depend on weights, so random ones will do to profile them.
ARCHITECTURES: Mapping[str, tuple[Family, Mapping[str, Any]]] = {
    name: (family, config) for family in FAMILIES for name, config in family.architectures.items()
}

_CPU_ROOM_BYTES = 4 * 2**30  # random weights beyond this are not made on a CPU unless asked for
_CUDA_ROOM_SHARE = 0.5  # of a GPU's memory


def load_model(
    name: str = BUILT_IN, device: str = "cpu", seed: int = 0, real: bool | None = None, **workload: Any
) -> Model:
    """Load a model by name.

    Args:
        name: "fashion-dit"; an architecture of `list_models()`, with random weights; a folder in diffusers format (a
            whole pipeline or its transformer); or a hub id.
        device: torch device the weights go to.
        seed: for what is random (weights of an architecture given by name).
        real: whether an architecture given by name gets weights, or exists as shapes (on the meta device), which is
            enough to profile it block by block. None: weights where they fit (4 GiB on a CPU, half of a GPU's memory).
        **workload: fields of Workload that replace the model's defaults; None leaves them.

    Raises:
        UnavailableError: the name is not known, the folder has no transformer, or the hub cannot be reached.
        InputError: the transformer's class has no adapter, or the workload is not valid.
    """
    if name in ARCHITECTURES:
        family, config = ARCHITECTURES[name]
        shapes = _shapes(family, config)
        model = as_model(shapes, name, "random weights", workload)
        dtype = getattr(torch, model.workload.dtype)
        wanted = _fits(shapes, dtype, device) if real is None else real
        if real is None and not wanted and family.reads_values:
            raise UnavailableError(
                f"{name} takes {_size_bytes(shapes, dtype) / 2**30:.1f} GiB, too much here, and looks at the values of "
                "its inputs, so shapes will not do; take a GPU, or load_model(..., real=True, dtype='bfloat16')"
            )
        if wanted:
            model.module = _random_weights(family, config, device, seed)
    elif name == BUILT_IN:
        model = as_model(_read_transformer(REFERENCE / "transformer"), name, "built in", workload)
        model.calibration = _fashion_batch
    else:
        model = as_model(_read_transformer(name), name, str(Path(name)) if Path(name).is_dir() else name, workload)
    place = None if next(model.module.parameters()).is_meta else device
    # Straight from torch: diffusers' own `to` warns of modules to keep in float32 even where there are none.
    nn.Module.to(model.module, device=place, dtype=getattr(torch, model.workload.dtype))
    model.module.eval().requires_grad_(False)
    return model


def _shapes(family: Family, config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, family.model_class)(**config)
    return module


def _fits(shapes: nn.Module, dtype: torch.dtype, device: str) -> bool:
    size_bytes = _size_bytes(shapes, dtype)
    place = torch.device(device)
    if place.type != "cuda":
        return size_bytes <= _CPU_ROOM_BYTES
    return size_bytes <= _CUDA_ROOM_SHARE * torch.cuda.get_device_properties(place).total_memory


def _size_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def _random_weights(family: Family, config: Mapping[str, Any], device: str, seed: int) -> nn.Module:
    import diffusers

    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        module: nn.Module = getattr(diffusers, family.model_class)(**config)
    return module


def _read_transformer(source: str | Path) -> nn.Module:
    """The transformer of a folder or of a hub repository, whole pipeline or transformer alone.

    Raises:
        UnavailableError: there is none, or its weights cannot be loaded.
        InputError: its class has no adapter.
    """
    import diffusers

    config, place = _read_config(source)
    class_name = str(config.get("_class_name", ""))
    family = family_of(class_name)
    if family is None:
        raise _no_adapter(class_name, str(source))
    try:
        module: nn.Module = getattr(diffusers, family.model_class).from_pretrained(str(source), **place)
    except (OSError, ValueError, RuntimeError) as error:
        raise UnavailableError(f"cannot load the weights in {source}: {_first_line(error)}") from error
    return module


def _read_config(source: str | Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """config.json of a transformer, and where it lies, as diffusers takes it: subfolder, local_files_only."""
    for subfolder in ("transformer", None):
        path = Path(source) / (subfolder or "") / "config.json"
        if path.is_file():
            return read_json(path, "model configuration"), {"subfolder": subfolder}
    if Path(source).exists() or str(source).count("/") != 1:
        raise UnavailableError(
            f"unknown model {str(source)!r}: neither a name that `shiva-search models` lists nor a folder with a "
            "transformer in diffusers format (config.json and safetensors) nor a hub id (owner/name)"
        )
    from huggingface_hub import hf_hub_download

    offline = why_unreachable()
    problems = []
    for subfolder in ("transformer", None):
        place: dict[str, Any] = {"subfolder": subfolder, "local_files_only": offline is not None}
        try:
            path = Path(hf_hub_download(str(source), "config.json", **place))
            return read_json(path, "model configuration"), place
        except (OSError, ValueError) as error:
            problems.append(_first_line(error))
    if offline is not None:
        raise UnavailableError(
            f"{str(source)!r} is no folder here and not in the hub's cache, and the hub could not be reached "
            f"({offline}); give the folder of a downloaded copy, or try again with a network"
        )
    raise UnavailableError(
        f"{str(source)!r} is no folder here, and the hub does not give its transformer ({problems[0]}); "
        "check the name and the network, or download it and give the folder"
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def refuse_known(class_name: str) -> None:
    """Refuse a class that is known not to allow plans.

    Raises:
        InputError: says why.
    """
    if class_name in REFUSED:
        raise _no_adapter(class_name)


def _no_adapter(class_name: str, where: str = "") -> InputError:
    known = ", ".join(family.model_class for family in FAMILIES)
    place = f" in {where}" if where else ""
    if class_name in REFUSED:
        return InputError(f"plans cannot be put on {class_name}{place}: {REFUSED[class_name]}")
    return InputError(
        f"no adapter for model class {class_name!r}{place}; known classes: {known}; "
        "shiva_search.wrap(module, example=...) looks whether it can do without"
    )


def as_model(module: torch.nn.Module, name: str, origin: str = "", workload: dict[str, Any] | None = None) -> Model:
    """What is known of a transformer at hand.

    Args:
        workload: fields of Workload that replace the defaults of its family.

    Raises:
        InputError: its class has no adapter, or the workload is none for it.
    """
    class_name = type(module).__name__
    family = family_of(class_name)
    if family is None:
        raise _no_adapter(class_name)
    config = dict(getattr(module, "config", {}))
    usual, asked = family.defaults(config), dict(workload or {})
    if usual.frames is None and asked.get("frames") is not None:
        raise InputError(f"--frames is for video models, and {class_name} makes images; leave it out")
    if usual.text_tokens is None and asked.pop("text_tokens", None):  # stored workloads may say 0, which is the default
        raise InputError(f"--text-tokens is for models that read text, and {class_name} takes none; leave it out")
    return Model(module, name, family, usual.override(**asked), origin=origin)


def _fashion_batch(split: str, count: int, seed: int) -> Batch:
    """Held-out Fashion-MNIST images noised by flow matching: x_t = (1 - t) x_0 + t eps, target eps - x_0.

    Half of the labels are left out, as in deployment: guidance runs each image with its label and without. What is
    judged or trained on labels alone can be far off without them, and guidance multiplies the difference.
    """
    from shiva_search.models.reference.data import CLASSES, load_reference_data, to_pixels

    images, labels = load_reference_data(split)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(images), (count,), generator=generator)
    if count <= len(images):
        rows = torch.randperm(len(images), generator=generator)[:count]
    t_B = stratified_times(count, generator)
    x0, mix = to_pixels(images[rows]), t_B.view(-1, 1, 1, 1)
    noise = torch.randn(x0.shape, generator=generator)
    told = torch.where(torch.rand(count, generator=generator) < 0.5, labels[rows], CLASSES)
    inputs = {"hidden_states": (1 - mix) * x0 + mix * noise, "timestep": t_B * 1000, "class_labels": told}
    return Batch(inputs, t_B, noise - x0)


def shipped_router(model: Model) -> Path | None:
    """The warmed-up router that ships with the built-in model; None for all others."""
    path = REFERENCE / "router.safetensors"
    return path if model.origin == "built in" and path.is_file() else None


def shipped_bypass(model: Model) -> Path | None:
    """The bypasses that ship with the built-in model; None for all others."""
    path = REFERENCE / "bypass.safetensors"
    return path if model.origin == "built in" and path.is_file() else None


def list_models() -> list[dict[str, Any]]:
    """What --model accepts, a row each, family by family: name, family, kind, class, verified, attends_all.

    The last lists the block classes whose kept tokens may attend to all.
    """
    rows = []
    for family in FAMILIES:
        names = [(BUILT_IN, "built in, trained")] if family.name == "dit" else []
        names += [(name, "random weights") for name in family.architectures]
        names.append((f"folder or hub id, {family.name}", "diffusers format"))
        rows += [
            {
                "name": name,
                "family": family.name,
                "kind": kind,
                "class": family.model_class,
                "verified": family.verified,
                "attends_all": [name for name, adapter in family.adapters.items() if adapter.keys_of_all is not None],
            }
            for name, kind in names
        ]
    return rows


def list_refused() -> list[dict[str, str]]:
    """Model classes that are known not to allow plans: class and reason."""
    return [{"class": name, "reason": reason} for name, reason in REFUSED.items()]


__all__ = [
    "ARCHITECTURES",
    "BUILT_IN",
    "REFERENCE",
    "Workload",
    "as_model",
    "list_models",
    "list_refused",
    "load_model",
]
