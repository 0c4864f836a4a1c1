"""Blocks through torch.compile, one graph for every number of tokens. In: layers. Out: their forwards, compiled.

Counts of tokens differ from block to block and from plan to plan; compiled for each, a search would spend its time in
the compiler. With the count left open, one graph per kind of block serves them all, at about the speed of a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any

import torch

from shiva_search.models.attend_all import AttendAll
from shiva_search.models.model import Layer
from shiva_search.runtime.places import Forward


def compiled_forwards(forwards: Iterable[tuple[Layer, Forward]], **options: Any) -> list[Forward]:
    """Forwards of layers, compiled; blocks of one signature share what is compiled.

    Args:
        forwards: a layer, and its forward as it is now.
        **options: of torch.compile; dynamic=True unless said otherwise.
    """
    settings = {"dynamic": True, **options}
    shared: dict[str, Forward] = {}
    found: list[Forward] = []
    for layer, forward in forwards:
        if getattr(forward, "__func__", None) is not type(layer.module).forward:
            found.append(torch.compile(forward, **settings))  # wrapped by somebody: not the same as its likes
            continue
        if layer.signature not in shared:
            shared[layer.signature] = torch.compile(_own(type(layer.module).forward), **settings)
        found.append(_by_name(shared[layer.signature], layer))
    return found


def compiled_attend_all(
    layer: Layer, attend_all: AttendAll, shared: dict[str, Callable[..., Any]], **options: Any
) -> Callable[..., Any]:
    """A block whose kept tokens attend to all, compiled; those of one signature share what is compiled."""
    if layer.signature not in shared:
        shared[layer.signature] = torch.compile(_own(AttendAll.__call__), **{"dynamic": True, **options})
    return partial(shared[layer.signature], attend_all)


def _by_name(compiled: Forward, layer: Layer) -> Forward:
    """The compiled function on the layer's block, called alike by all: positions and names would make two graphs."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(layer.module, **kwargs, **dict(zip(layer.arguments, args, strict=False)))

    return forward


def _own(function: Forward) -> Forward:
    """The function with code of its own: torch.compile counts recompilations by code, and others compile it too."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
