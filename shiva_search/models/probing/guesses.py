"""How a foreign block might carry its tokens. In: its calls. Out: adapters to try, the likeliest first.

Legend: B samples, N image tokens, T context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter
from shiva_search.models.probing.calls import Call, few, refusal
from shiva_search.models.probing.soundness import Travel, gather_of

_MOST_GUESSES = 64
_CONDITIONS = ("temb", "emb", "cond", "conditioning", "c", "t_emb", "vec", "modulation", "adaln_input", "timestep", "y")


def guesses(
    module: nn.Module, calls: Sequence[tuple[nn.Module, Call]], batch: int, tokens: int
) -> dict[str, list[BlockAdapter]]:
    """Adapters by block class, the likeliest first; the same for all blocks of a class."""
    by_class: dict[str, list[Call]] = {}
    for block, call in calls:
        by_class.setdefault(type(block).__name__, []).append(call)
    return {name: _guesses_of(module, name, found, batch, tokens) for name, found in by_class.items()}


def _guesses_of(module: nn.Module, name: str, calls: Sequence[Call], batch: int, tokens: int) -> list[BlockAdapter]:
    argument, context, returns = _streams(module, name, calls, batch, tokens)
    named = calls[0].named
    length = 0 if context is None else named[context].shape[1]
    leaves = dict(_leaves({key: value for key, value in named.items() if key not in (argument, context)}))
    options = {path: _options(path, leaf, batch, tokens, length) for path, leaf in leaves.items()}
    options = {path: found for path, found in options.items() if found}
    condition = _condition(named, argument, {argument, context, *(path[0] for path in options)}, batch)
    base = BlockAdapter(name, condition, tokens=argument, context=context, returns=returns)
    guesses = [
        replace(base, gather=gather_of([travel for travel in chosen if travel is not None]))
        for chosen in product(*((*found, None) for found in options.values()))
    ]
    if len(guesses) > _MOST_GUESSES:
        raise InputError(
            refusal(module, f"{name} has {len(options)} arguments as long as its tokens, too many to try out")
        )
    return guesses


def _streams(
    module: nn.Module, name: str, calls: Sequence[Call], batch: int, tokens: int
) -> tuple[str, str | None, tuple[str, ...]]:
    """The argument with tokens, the one with context, and the order in which both come back."""
    for call in calls:
        outputs = call.output if isinstance(call.output, tuple) else (call.output,)
        shapes = [tuple(item.shape) if isinstance(item, torch.Tensor) else None for item in outputs]
        taken = {
            key: tuple(value.shape)
            for key, value in call.named.items()
            if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()
        }
        sequences = [key for key, shape in taken.items() if shape[:2] == (batch, tokens) and shape in shapes]
        if len(sequences) != 1 or shapes.count(taken[sequences[0]]) != 1:
            raise InputError(
                refusal(
                    module,
                    f"{name} should take and return one sequence of {tokens} tokens, not {few(sequences)}; "
                    "where the text is as long as the image, give an example with another text",
                )
            )
        if len(outputs) > 2 or (isinstance(call.output, tuple) and len(outputs) < 2):
            said = f"{name} returns {len(outputs)} values in a tuple, and tokens may come alone or with their context"
            raise InputError(refusal(module, said))
        place = shapes.index(taken[sequences[0]])
        if len(outputs) == 1:
            return sequences[0], None, ("tokens",)
        other = shapes[1 - place]
        contexts = [key for key, shape in taken.items() if shape == other and key != sequences[0]]
        if other is None:
            continue  # the last block of some models returns no context; the others tell which it is
        if len(contexts) != 1:
            raise InputError(refusal(module, f"what {name} returns besides its tokens is none of its arguments"))
        return sequences[0], contexts[0], ("tokens", "context") if place == 0 else ("context", "tokens")
    raise InputError(refusal(module, f"{name} returns its tokens with None, so its context is not known"))


def _leaves(named: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int | str | None], torch.Tensor]]:
    """Tensors among arguments, and one level down in tuples, lists and dicts."""
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            yield (name, None), value
        elif isinstance(value, (tuple, list, Mapping)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for place, item in items:
                if isinstance(item, torch.Tensor):
                    yield (name, place), item


def _options(
    path: tuple[str, int | str | None], leaf: torch.Tensor, batch: int, tokens: int, context: int
) -> list[Travel]:
    """Ways in which a tensor may belong to single tokens; empty where it cannot."""
    lengths = {tokens, tokens + context}
    axes = tuple(
        axis
        for axis, size in enumerate(leaf.shape)
        if size in lengths and (axis == 0 or leaf.shape[0] in (1, batch)) and not (axis == 0 and size == batch)
    )
    if not axes:
        return []
    several = [axes] if len(axes) > 1 else []
    starts = ("last", "first") if any(leaf.shape[axis] != tokens for axis in axes) else ("last",)
    return [Travel(path, chosen, start) for chosen in (*several, *((axis,) for axis in axes)) for start in starts]


def _condition(
    named: Mapping[str, Any], tokens: str, taken: set[Any], batch: int
) -> Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]:
    """What a block is told of timestep and condition, [B, C]: an embedding where there is one, else bare numbers."""
    free = {
        name: value
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and name not in taken and value.ndim and len(value) == batch
    }
    wide = [name for name, value in free.items() if value.ndim > 1 and value.is_floating_point()]
    wide.sort(key=lambda name: (_CONDITIONS.index(name) if name in _CONDITIONS else len(_CONDITIONS), free[name].ndim))
    if wide and (free[wide[0]].ndim == 2 or wide[0] in _CONDITIONS):
        chosen = wide[0]
        return lambda block, kwargs: kwargs[chosen].flatten(1)
    bare = [name for name, value in free.items() if value.ndim == 1]

    def numbers(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
        if not bare:
            return torch.zeros(len(kwargs[tokens]), 1, device=kwargs[tokens].device)
        return torch.stack([kwargs[name].float() for name in bare], dim=1)

    return numbers
