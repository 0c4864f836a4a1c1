"""Forwards as CUDA graphs. In: a forward and its arguments. Out: the same output, for hardly any work of the host.

A planned forward has static shapes and reads nothing back, so a graph holds it whole. Where blocks are short, the host
takes longer to queue their kernels than a GPU to run them, and without a graph a plan would save little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shiva_search.errors import InputError, UnavailableError


class ForwardGraphs:
    """One graph for each kind of arguments a forward is called with; they share their memory."""

    def __init__(self) -> None:
        self._replays: dict[Any, Callable[..., Any]] = {}
        self._pool: Any = None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], row: int) -> Any:
        """The forward's output, a copy that later forwards leave alone.

        Args:
            forward: what a graph is made of.
            args, kwargs: its arguments, tensors anywhere inside; whatever is no tensor tells graphs apart.
            row: of the plan, which tells graphs apart too.

        Raises:
            InputError: an argument that cannot be told from another.
            UnavailableError: the forward does something that a graph cannot hold.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (row, spec, *(_kind(leaf) for leaf in leaves))
        try:
            replay = self._replays.get(kind)
        except TypeError as error:
            raise InputError(f"these arguments cannot tell graphs apart: {error}; leave capture out") from None
        if replay is None:
            replay = self._replays[kind] = self._record(forward, leaves, tensors, spec)
        return replay(*tensors)

    def _record(
        self, forward: Callable[..., Any], leaves: list[Any], tensors: list[torch.Tensor], spec: Any
    ) -> Callable[..., Any]:
        found: list[Any] = []  # the structure of the output

        def flat(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left = iter(given)
            filled = [next(left) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, spec)
            with torch.no_grad():
                parts, structure = tree_flatten(forward(*args, **kwargs))
            found[:] = [structure]
            return tuple(parts)

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = tuple(tensor.detach().clone() for tensor in tensors)
        try:
            graphed = torch.cuda.make_graphed_callables(flat, static, pool=self._pool)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UnavailableError(f"this forward cannot be a CUDA graph: {reason}. Leave capture out.") from error

        def replay(*given: torch.Tensor) -> Any:
            outputs: tuple[torch.Tensor, ...] = graphed(*given)  # type: ignore[assignment]
            return tree_unflatten([output.clone() for output in outputs], found[0])

        return replay


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
