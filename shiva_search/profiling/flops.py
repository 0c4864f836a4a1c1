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

from shiva_search.models.attend_all import AttendAll
from shiva_search.models.blocks import BlockAdapter, Kwargs
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
        self._curves = {"kept": self._curve([1, max(1, tokens // 2), tokens], "kept")}
        if layer.attends_all and tokens > 1:
            self._curves["all"] = self._curve([1, tokens - 1], "all")  # a line: each query sees the same keys

    def _curve(self, counts: Sequence[int], attend: str) -> np.polynomial.Polynomial:
        at = sorted(set(counts))
        counted = [self.counted(Kept(k, 0, attend)) for k in at]
        return np.polynomial.Polynomial.fit(at, counted, len(at) - 1).convert()

    def counted(self, k: int) -> float:
        """GFLOP at k tokens, or of a choice without its bypass, counted."""
        adapter, choice = self._layer.adapter, Kept.of(k)
        kwargs = dict(self._kwargs)
        if k >= self._tokens:
            return count_gflops(self._block, adapter.join(kwargs))
        x_BND = kwargs[adapter.tokens]
        kept_BK = torch.zeros(len(x_BND), int(k), dtype=torch.int64, device="meta")
        entering = torch.empty(len(x_BND), int(k), x_BND.shape[-1], dtype=x_BND.dtype, device="meta")
        if choice.attend == "all":
            return count_gflops(_AttendsAll(adapter, self._block), {"call": kwargs, "kept": (kept_BK, entering)})
        return count_gflops(
            self._block, adapter.join(adapter.gather({**kwargs, adapter.tokens: entering}, kept_BK, self._tokens))
        )

    def __call__(self, k: int) -> float:
        """GFLOP of a choice with k tokens, in [0, N], from the curve through few counts, and of its bypass."""
        choice = Kept.of(k)
        curve = self._curves[choice.attend if choice < self._tokens else "kept"]
        return (float(curve(int(choice))) if k else 0.0) + self._bypass(choice)

    def _bypass(self, choice: Kept) -> float:
        """GFLOP of a bypass, which is worked out for all tokens."""
        batch, tokens, width = self._kwargs[self._layer.adapter.tokens].shape
        if not choice.rank or choice >= self._tokens:
            return 0.0
        return 2e-9 * batch * tokens * width * (3 * choice.rank + 2)


class _AttendsAll(nn.Module):
    """A block whose kept tokens attend to all, as a module."""

    def __init__(self, adapter: BlockAdapter, block: nn.Module) -> None:
        super().__init__()
        self.block = block  # a tracer wants to find it
        self._run = AttendAll(adapter, block)

    def forward(self, call: Kwargs, kept: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return self._run(call, *kept)


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
