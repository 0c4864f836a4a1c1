"""Floating point operations of blocks, plans and the rest of a model. In: a module and its arguments. Out: GFLOP.

A multiply-add counts 2; element-wise work is left out, as in torch's own counter. fvcore counts from shapes, so blocks
are counted on the meta device and nothing is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shiva_search.models.blocks import Kwargs
from shiva_search.models.model import Layer, Model
from shiva_search.profiling.conditions import shapes_of, without_blocks
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan

_ELEMENTWISE = ("aten::layer_norm", "aten::group_norm", "aten::batch_norm", "aten::rms_norm")


def count_gflops(module: nn.Module, kwargs: Mapping[str, Any]) -> float:
    """10^9 operations of one call `module(**kwargs)`, 2 per multiply-add, matrix products and convolutions only.

    Args:
        module: traced once; on the meta device this computes nothing.
        kwargs: arguments; tensors may lie inside tuples and dicts.
    """
    values, structure = tree_flatten(dict(kwargs))
    wrapper = _Positional(module, values, structure)
    tensors = tuple(value for value in values if isinstance(value, torch.Tensor))
    analysis = FlopCountAnalysis(wrapper, tensors)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    for name in _ELEMENTWISE:
        analysis.set_op_handle(name, lambda inputs, outputs: 0)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    # fvcore counts a multiply-add once.
    with torch.no_grad():
        return 2e-9 * float(analysis.total())


def _attention_macs(inputs: Sequence[Any], outputs: Sequence[Any]) -> float:
    """Scores and weighted sum: queries [..., Q, E], keys [..., K, E], values [..., K, V]."""
    query, key, value = (get_shape(item) for item in inputs[:3])
    *lead, queries, width = query
    return float(np.prod(lead)) * queries * key[-2] * (width + value[-1])


class _Positional(nn.Module):
    """A module whose tensors come as positional arguments, which is what a trace can take."""

    def __init__(self, module: nn.Module, values: Sequence[Any], structure: Any) -> None:
        super().__init__()
        self.module = module
        self._values = list(values)
        self._structure = structure

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        values = [next(given) if isinstance(value, torch.Tensor) else value for value in self._values]
        output = self.module(**tree_unflatten(values, self._structure))
        # All of them: a trace drops what no output needs.
        return tuple(item for item in tree_flatten(output)[0] if isinstance(item, torch.Tensor))


class BlockFlops:
    """Operations of one block at any number of tokens.

    Args:
        layer: the block.
        kwargs: its arguments in a dense forward.
        tokens: image tokens N.
    """

    def __init__(self, layer: Layer, kwargs: Kwargs, tokens: int) -> None:
        self._layer = layer
        self._block = shapes_of(layer.module)
        self._kwargs = _to_meta(kwargs)
        self._tokens = tokens
        # Operations of a transformer block are a parabola in the tokens: constant, linear layers, attention.
        at = sorted({1, max(1, tokens // 2), tokens})
        self._parabola = np.polynomial.Polynomial.fit(at, [self.counted(k) for k in at], len(at) - 1).convert()

    def counted(self, k: int) -> float:
        """GFLOP at k tokens, counted."""
        adapter = self._layer.adapter
        kwargs = dict(self._kwargs)
        if k < self._tokens:
            x_BND = kwargs[adapter.tokens]
            kept_BK = torch.zeros(len(x_BND), k, dtype=torch.int64, device="meta")
            entering = torch.empty(len(x_BND), k, x_BND.shape[-1], dtype=x_BND.dtype, device="meta")
            kwargs = adapter.gather({**kwargs, adapter.tokens: entering}, kept_BK, self._tokens)
        return count_gflops(self._block, adapter.join(kwargs))

    def __call__(self, k: int) -> float:
        """GFLOP at k tokens, in [0, N], from the parabola through three counts, and of the choice's variant."""
        choice = Kept.of(k)
        return (float(self._parabola(int(choice))) if k else 0.0) + self._extra(choice)

    def _extra(self, choice: Kept) -> float:
        """GFLOP of a bypass for all tokens, and of the keys and values of the tokens that are not kept."""
        k, rest = int(choice), self._tokens - int(choice)
        if not rest:
            return 0.0
        batch, tokens, width = self._kwargs[self._layer.adapter.tokens].shape
        macs = batch * tokens * width * (3 * choice.rank + 2) if choice.rank else 0
        if choice.attend == "all" and k:
            macs += batch * rest * (2 * width * width + 2 * k * width)
        return 2e-9 * macs


class ModelFlops:
    """Operations of whole plans: the blocks at their tokens, plus what lies outside the blocks.

    Args:
        model: counted at its workload; its blocks are not run.
        recorded: arguments of one block of each signature in a dense forward.
    """

    def __init__(self, model: Model, recorded: Mapping[str, Kwargs]) -> None:
        self._layers = [layer.signature for layer in model.layers]
        first = {layer.signature: layer for layer in reversed(model.layers)}
        self.blocks = {name: BlockFlops(first[name], kwargs, model.tokens) for name, kwargs in recorded.items()}
        self.rest = _count_rest(model)
        self.tokens = model.tokens

    @property
    def dense(self) -> float:
        """GFLOP of the dense forward."""
        return self.rest + sum(self.blocks[signature](self.tokens) for signature in self._layers)

    def plan(self, plan: Plan) -> float:
        """GFLOP of one step of a plan, mean over its segments."""
        rows = [
            sum(self.blocks[signature](k) for signature, k in zip(self._layers, row, strict=True)) for row in plan.rows
        ]
        widths = [high - low for low, high in plan.segments]
        return self.rest + sum(width * row for width, row in zip(widths, rows, strict=True))


def _count_rest(model: Model) -> float:
    """GFLOP outside the blocks, counted on a real forward that skips them (convolutions cannot be traced as shapes)."""
    device = next(model.module.parameters()).device
    whole = without_blocks(model, torch.device("cpu") if device.type == "meta" else device)
    with AppliedPlan(whole, Plan.dense(whole)) as applied:
        applied.controller.rows = [[0] * whole.layer_count]
        return count_gflops(whole.module, whole.example())


def _to_meta(value: Any) -> Any:
    values, structure = tree_flatten(value)
    return tree_unflatten([item.to("meta") if isinstance(item, torch.Tensor) else item for item in values], structure)


# fvcore reports each operator it skips; those are the element-wise ones, skipped on purpose.
logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
