"""How a block family carries its tokens: which argument, which output, what condition. In: a block. Out: an adapter.

A new family is one file in models/families/ and one line in its __init__.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.records.workload import Workload

Kwargs = dict[str, Any]


def keep_rows(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """The default companion gather: nothing travels with the tokens (positions were added at the input)."""
    return kwargs


@dataclass(frozen=True)
class BlockAdapter:
    """Everything the runtime must know of one block class.

    Attributes:
        block_class: the class name.
        tokens: the argument with image tokens, [B, N, D].
        context: the argument with context tokens that the block returns updated, or None.
        returns: the order of outputs, some of "tokens" and "context"; a single one comes bare, several as a tuple.
        condition: (block, kwargs) -> [B, C], the backbone's own embedding of timestep and condition.
        gather: (kwargs, kept_BK, N) -> kwargs with what belongs to single tokens (rotary rows) reduced to the kept.
    """

    block_class: str
    condition: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]
    tokens: str = "hidden_states"
    context: str | None = None
    returns: tuple[str, ...] = ("tokens",)
    gather: Callable[[Kwargs, torch.Tensor, int], Kwargs] = keep_rows

    def unpack(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split a block's output into image tokens [B, N, D] and context (or None)."""
        if len(self.returns) == 1:
            return output, None
        named = dict(zip(self.returns, output, strict=True))
        return named["tokens"], named.get("context")

    def pack(self, tokens_BND: torch.Tensor, context: torch.Tensor | None) -> Any:
        """Inverse of unpack."""
        if len(self.returns) == 1:
            return tokens_BND
        named = {"tokens": tokens_BND, "context": context}
        return tuple(named[name] for name in self.returns)


def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Positional argument names of a block's forward, so that calls of any shape can be read by name."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY))


@dataclass(frozen=True)
class Family:
    """A family of transformers.

    Attributes:
        name: short name ("dit", "sd3").
        model_class: diffusers class name.
        block_lists: names of the module lists that hold the blocks, in order of execution.
        adapters: by block class name.
        timestep_scale: the model's timestep at pure noise (1000 for most, 1 for Flux).
        tokens: (config, workload) -> image tokens N.
        example: (config, workload, generator) -> keyword arguments of one forward, random values, workload's dtype.
        defaults: config -> the workload of its published use (batch, resolution, text tokens, guidance).
        workload_of: (config, keyword arguments of one forward, workload) -> the workload with what they show.
    """

    name: str
    model_class: str
    adapters: Mapping[str, BlockAdapter]
    tokens: Callable[[Mapping[str, Any], Workload], int]
    example: Callable[[Mapping[str, Any], Workload, torch.Generator], Kwargs]
    defaults: Callable[[Mapping[str, Any]], Workload]
    workload_of: Callable[[Mapping[str, Any], Mapping[str, Any], Workload], Workload]
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    timestep_scale: float = 1000.0
    timestep_argument: str = "timestep"
    verified: str = field(default="")

    def adapter_of(self, block: nn.Module) -> BlockAdapter:
        """The adapter of a block.

        Raises:
            InputError: the block's class is not one of this family's.
        """
        name = type(block).__name__
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise InputError(f"no adapter for block class {name} in family {self.name!r} (known: {known})")
        return self.adapters[name]
