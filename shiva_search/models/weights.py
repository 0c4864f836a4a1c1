"""A model's own weights, whatever was put on it: under low-rank adapters, and where offloading took them.

A plan belongs to a backbone. Adapters of PEFT rename its parameters and add some; sequential offloading leaves shapes
behind and keeps the values elsewhere. Neither makes another model of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Tensors below this many elements in total are hashed whole; larger models by a sample of every tensor.
_WHOLE_HASH_ELEMENTS = 16_000_000


def own_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the backbone's parameters, without adapters; on the meta device where there are no values."""
    seen: set[int] = set()
    for name, parameter, value in _below(module, ""):
        if id(parameter) not in seen:  # a tied one counts once
            seen.add(id(parameter))
            yield name, value


def parameter_count(module: nn.Module) -> int:
    """Elements of all own parameters."""
    return sum(value.numel() for _, value in own_parameters(module))


def weights_hash(module: nn.Module) -> str | None:
    """sha256 of the weights, rounded to bfloat16 so that a model loaded in it is still the same.

    Of a large model, 256 evenly spread values of each tensor. None for shapes without weights: what is planned for
    these holds for any weights.
    """
    named = sorted(own_parameters(module), key=lambda item: item[0])
    if any(value.is_meta for _, value in named):
        return None
    whole = sum(value.numel() for _, value in named) <= _WHOLE_HASH_ELEMENTS
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(name.encode())
        flat = value.detach().reshape(-1)
        if not whole and flat.numel() > 256:
            flat = flat[:: flat.numel() // 256]
        digest.update(flat.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):  # PEFT's wrapper of one layer
        yield from _below(module.base_layer, prefix)  # type: ignore[arg-type]
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, _offloaded(module, name, parameter)
    for name, child in module.named_children():
        yield from _below(child, f"{prefix}{name}.")


def _offloaded(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """The value that accelerate keeps of a parameter it left as a shape."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # several hooks in sequence, or one
        kept = getattr(part, "weights_map", None)
        if value.is_meta and kept is not None:
            found: torch.Tensor = kept[name]
            return found
    return value
