"""Low-rank adapters on a backbone for joint tuning (DoRA through PEFT). In: a model. Out: the model with them on.

Adapters sit on the linear layers of attention and feed-forward parts of every block, image and text streams alike;
modulation, norms and embeddings are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.files import write_atomic

_NAME = "shiva"
_KIND = "shiva-search adapters"
SCHEMA_VERSION = 1


def adapted_linears(model: Model) -> list[str]:
    """Module paths of the linear layers that take an adapter."""
    return [
        f"{layer.name}.{name}"
        for layer in model.layers
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.Linear) and "norm" not in name and "emb" not in name
    ]


@contextmanager
def adapted(
    model: Model, rank: int = 32, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[nn.ParameterDict]:
    """Put DoRA adapters on a model's blocks for the duration of the body; afterwards it is as it was before.

    Fresh adapters change nothing until they are trained.

    Args:
        model: the model; its own weights are frozen inside.
        rank: of the adapters.
        state: values to start from, as adapter_state gives them.

    Yields:
        The adapters' parameters, by name with "." written as "/".

    Raises:
        InputError: rank below 1, a state of other adapters, or adapters that are on already.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a second to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    if rank < 1:
        raise InputError(f"an adapter's rank is at least 1, got {rank}")
    others = {name for layer in model.module.modules() for name in adapters_of_layer(layer)}
    if others:
        raise InputError(
            f"the model already has adapters on ({', '.join(sorted(others))}) and these belong under them; "
            "unload those, put these on, and load those again"
        )
    targets = adapted_linears(model)
    model.fingerprint()  # remembered: plans and selectors stay valid for the model underneath
    asked = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rank)
            inject_adapter_in_model(config, model.module, adapter_name=_NAME)
        named = {name: value for name, value in model.module.named_parameters() if f".{_NAME}" in name}
        for parameter in model.module.parameters():
            parameter.requires_grad_(False)
        for value in named.values():
            value.requires_grad_(True)
        if state is not None:
            if {name: value.shape for name, value in state.items()} != {n: value.shape for n, value in named.items()}:
                raise InputError("these adapters do not fit: other layers or another rank; train them again")
            with torch.no_grad():
                for name, value in named.items():
                    value.copy_(state[name])
        yield nn.ParameterDict({name.replace(".", "/"): value for name, value in named.items()})
    finally:
        for target in targets:
            parent, _, child = target.rpartition(".")
            layer = model.module.get_submodule(target)
            if isinstance(layer, BaseTunerLayer):
                if adapters_of_layer(layer) - {_NAME}:  # somebody put others on meanwhile
                    layer.delete_adapter(_NAME)
                else:
                    setattr(model.module.get_submodule(parent), child, layer.get_base_layer())
        configs = getattr(model.module, "peft_config", {})
        configs.pop(_NAME, None)
        if not configs and hasattr(model.module, "peft_config"):
            del model.module.peft_config
        for parameter, before in asked:
            parameter.requires_grad_(before)


def adapter_state(parameters: nn.ParameterDict) -> dict[str, torch.Tensor]:
    """A copy of the adapters' values, by parameter name; can be saved as safetensors."""
    return {name.replace("/", "."): value.detach().clone() for name, value in parameters.items()}


def adapters_of_layer(layer: nn.Module) -> set[str]:
    """Names of the adapters on a layer; none on one that is not PEFT's."""
    names = getattr(layer, "adapter_layer_names", None)
    if names is None or not hasattr(layer, "base_layer"):
        return set()
    return {name for kind in names for name in getattr(layer, kind, {})}


def save_adapters(path: str | Path, state: Mapping[str, torch.Tensor], model: Mapping[str, Any]) -> None:
    """Write adapters as safetensors, with the fingerprint of their model as metadata, atomically.

    Raises:
        InputError: the folder cannot be written.
    """
    metadata = {"kind": _KIND, "schema_version": str(SCHEMA_VERSION), "model": json.dumps(dict(model))}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomic(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_adapters(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what save_adapters wrote: values by parameter name, as `adapted` takes them.

    Raises:
        InputError: missing, unreadable, not adapters, or of another schema version.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read adapters {path}: {error}; train them again") from error
    if metadata.get("kind") != _KIND or metadata.get("schema_version") != str(SCHEMA_VERSION):
        raise InputError(f"{path} holds no adapters that this release reads; train them again")
    return state


def rank_of(state: Mapping[str, torch.Tensor]) -> int:
    """The rank of adapters, from their values.

    Raises:
        InputError: there are none.
    """
    down = [value for name, value in state.items() if "lora_A" in name]
    if not down:
        raise InputError(f"these are no low-rank adapters: {', '.join(list(state)[:3]) or 'nothing'}; train them again")
    return len(down[0])


@contextmanager
def adapters_off(model: Model) -> Iterator[None]:
    """The backbone as it was, for the teacher, while adapters stay in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.module.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
