"""Forwards as CUDA graphs. In: a forward and its arguments. Out: the same output, for hardly any work of the host.

A planned forward has static shapes and reads nothing back, so a graph holds it whole. Where blocks are short, the host
takes longer to queue their kernels than a GPU to run them, and without a graph a plan would save little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shiva_search.errors import InputError, UnavailableError
from shiva_search.runtime.derived import version_of
from shiva_search.runtime.step_caches import hooks_with_memory

_TENSOR = object()


class ForwardGraphs:
    """One graph for each kind of arguments a model's forward is called with; they share their memory.

    Args:
        module: whose forward it is; where its weights move, graphs are recorded anew.
        selector: what ranks tokens and moves rejected ones. Graphs hold what is made of its weights, so they are
            recorded anew where these are written to as well.
    """

    def __init__(self, module: nn.Module, selector: nn.Module | None = None) -> None:
        self._module = module
        self._selector = selector
        self._weights: tuple[Any, ...] = ()
        self._replays: dict[Any, Callable[..., Any]] = {}
        self._pool: Any = None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], row: int) -> Any:
        """The forward's output, a copy that later forwards leave alone.

        Args:
            forward: what a graph is made of.
            args, kwargs: its arguments, tensors anywhere inside; whatever is no tensor tells graphs apart.
            row: of the plan, which tells graphs apart too.

        Raises:
            InputError: an argument that cannot be told from another, or tensors that are not where the model is.
            UnavailableError: the forward does something that a graph cannot hold.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (row, spec, *(_kind(leaf) for leaf in leaves))
        weights: tuple[Any, ...] = tuple(parameter.data_ptr() for parameter in self._module.parameters())
        if self._selector is not None:
            weights += tuple((weight.data_ptr(), version_of(weight)) for weight in self._selector.parameters())
        if weights != self._weights:
            self._weights, self._replays, self._pool = weights, {}, None
        try:
            replay = self._replays.get(kind)
        except TypeError as error:
            raise InputError(f"these arguments cannot tell graphs apart: {error}; leave capture out") from None
        if replay is None:
            self._check(tensors)
            replay = self._replays[kind] = self._record(forward, leaves, tensors, spec)
        return replay(*tensors)

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        place = next(self._module.parameters()).device
        elsewhere = next((tensor.device for tensor in tensors if tensor.device != place), None)
        if elsewhere is not None:
            raise InputError(f"a graph takes all its tensors from {place}, got one on {elsewhere}; move it there")
        if hooks_with_memory(self._module.modules()):
            raise UnavailableError(
                "a cache of diffusers decides on the host what to run, which a CUDA graph would do once for all; "
                "take it off, or leave capture out"
            )

    def _record(
        self, forward: Callable[..., Any], leaves: list[Any], tensors: list[torch.Tensor], spec: Any
    ) -> Callable[..., Any]:
        found: list[Any] = []  # the output: its leaves with places for tensors, and its structure

        def flat(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left = iter(given)
            filled = [next(left) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, spec)
            with torch.no_grad():
                parts, structure = tree_flatten(forward(*args, **kwargs))
            found[:] = [[_TENSOR if isinstance(part, torch.Tensor) else part for part in parts], structure]
            return tuple(part for part in parts if isinstance(part, torch.Tensor))

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False):  # what is copied into them later may be of either mode
            static = tuple(tensor.detach().clone() for tensor in tensors)
        try:
            graphed = torch.cuda.make_graphed_callables(flat, static, pool=self._pool)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UnavailableError(f"this forward cannot be a CUDA graph: {reason}. Leave capture out.") from error

        def replay(*given: torch.Tensor) -> Any:
            outputs: tuple[torch.Tensor, ...] = graphed(*given)  # type: ignore[assignment]
            copies = iter([output.clone() for output in outputs])
            return tree_unflatten([next(copies) if part is _TENSOR else part for part in found[0]], found[1])

        return replay


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
