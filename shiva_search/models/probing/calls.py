"""The calls of a foreign model's blocks. In: a module and one forward. Out: which lists hold blocks over image tokens.

Legend: B samples, N image tokens, T context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from shiva_search.errors import InputError
from shiva_search.models.blocks import Kwargs, argument_names

_LEAST_TOKENS = 4


@dataclass(frozen=True)
class Call:
    """One call of a block: shapes only.

    Attributes:
        order: of its start among all calls.
        named: arguments by name, tensors on the meta device.
        output: what came back.
    """

    order: int
    named: Kwargs
    output: Any


def refusal(module: nn.Module, reason: str) -> str:
    """The message of a refusal: the class, the reason, the next step."""
    return (
        f"no adapter for model class {type(module).__name__!r}, and the probe cannot stand in for one: {reason} "
        "(CONTRIBUTING.md says how to write an adapter)"
    )


def tensors_of(example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments that are tensors."""
    return {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}


def grid_lengths(image: torch.Tensor) -> set[int]:
    """Numbers of tokens that a patch embedding can make of an image [B, C, H, W], a video or packed tokens."""
    if image.ndim == 3:
        return {image.shape[1]}
    *time, height, width = image.shape[2:]
    planes = {1}
    for frames in time:
        planes = {frames // patch for patch in range(1, frames + 1) if frames % patch == 0}
    patches = [patch for patch in range(1, min(height, width) + 1) if height % patch == 0 and width % patch == 0]
    return {plane * (height // patch) * (width // patch) for plane in planes for patch in patches}


def record(module: nn.Module, example: Mapping[str, Any]) -> dict[nn.Module, Call]:
    """The calls of all modules in module lists in one forward; one called twice is left out."""
    started, calls, twice = {}, {}, set()
    order = count()

    def begin(block: nn.Module, args: Any, kwargs: Any) -> None:
        started[block] = next(order)

    def end(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if block in calls:
            twice.add(block)
        calls[block] = Call(started[block], _to_meta(named_arguments(block, args, kwargs)), _to_meta(output))

    with ExitStack() as stack:
        for part in module.modules():
            for block in part.children() if isinstance(part, nn.ModuleList) else ():
                stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(end, with_kwargs=True).remove)
        module(**example)
    return {block: call for block, call in calls.items() if block not in twice}


def named_arguments(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kwargs:
    """All arguments of a call by name."""
    return {**kwargs, **dict(zip(argument_names(type(block).forward)[1:], args, strict=False))}


def _to_meta(value: Any) -> Any:
    return tree_map(lambda item: item.to("meta") if isinstance(item, torch.Tensor) else item, value)


def block_lists(
    module: nn.Module, calls: Mapping[nn.Module, Call], example: Mapping[str, Any], image: str, batch: int
) -> tuple[tuple[str, ...], int]:
    """Names of the lists of blocks in order of execution, and the number of image tokens."""
    texts = {
        value.shape[1]
        for name, value in tensors_of(example).items()
        if name != image and len(value.shape) == (3 if value.is_floating_point() else 2) and len(value) == batch
    }
    possible = {length for length in grid_lengths(example[image]) if length >= _LEAST_TOKENS}
    sizes: dict[str, set[int]] = {}
    for name, part in module.named_modules():
        blocks = list(part.children()) if isinstance(part, nn.ModuleList) else []
        inside = any(name.startswith(f"{other}.") for other in sizes)
        if inside or not blocks or any(block not in calls or not list(block.children()) for block in blocks):
            continue
        if [calls[block].order for block in blocks] == sorted(calls[block].order for block in blocks):
            shared = set.intersection(*(_lengths(calls[block], batch) for block in blocks))
            if shared:
                sizes[name] = shared
    votes = {length: sum(length in found for found in sizes.values()) for length in possible - texts}
    best = [length for length, number in votes.items() if number and number == max(votes.values())]
    if len(best) != 1:
        seen = sorted(set().union(*sizes.values())) if sizes else []
        raise InputError(
            refusal(
                module,
                f"its blocks, called one after the other in a ModuleList, should take and return image tokens; "
                f"the image allows {few(possible)} of them, the text has {few(texts)}, the blocks take {few(seen)}",
            )
        )
    tokens = best[0]
    for name, found in sizes.items():
        longer = [length for length in found if length > tokens and length not in texts]
        if tokens not in found and longer:
            block = type(next(module.get_submodule(name).children())).__name__
            raise InputError(
                refusal(
                    module,
                    f"{block} takes image tokens and others as one sequence ({longer[0]} positions, of which "
                    f"{tokens} are image tokens), and which are which does not show",
                )
            )
    lists = [name for name, found in sizes.items() if tokens in found]
    lists.sort(key=lambda name: calls[next(module.get_submodule(name).children())].order)
    orders = [calls[block].order for name in lists for block in module.get_submodule(name).children()]
    if orders != sorted(orders):
        raise InputError(refusal(module, f"the lists {', '.join(lists)} take turns, where one should follow the other"))
    return tuple(lists), tokens


def _lengths(call: Call, batch: int) -> set[int]:
    """Token axes of the sequences that a block takes and returns in the same shape."""
    outputs = call.output if isinstance(call.output, (tuple, list)) else (call.output,)
    returned = {tuple(item.shape) for item in outputs if isinstance(item, torch.Tensor)}
    taken = [value for value in call.named.values() if isinstance(value, torch.Tensor)]
    return {
        value.shape[1]
        for value in taken
        if value.ndim == 3 and len(value) == batch and value.is_floating_point() and tuple(value.shape) in returned
    }


def few(values: Any) -> str:
    """Numbers or names for a message."""
    return ", ".join(map(str, sorted(values))) or "none"
