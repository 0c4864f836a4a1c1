"""Whether a block may be run on some of its tokens. In: a block, how it might carry them. Out: None, or what speaks
against it.

A block that is sound treats tokens as a set: permuted tokens give the permuted output, once what belongs to single
tokens is permuted with them. Blocks are tried as copies with random weights, so that a gate or a kernel that starts at
zero hides nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter, Kwargs, PerSampleTable
from shiva_search.models.joint import rows_of_kept, take_rows

Path = tuple[str, int | str | None]

#: Largest difference that counts as rounding, as a share of the block's largest update.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Travel:
    """A tensor that belongs to single tokens.

    Attributes:
        path: argument, and the place in it where it is a tuple or a dict.
        axes: with a position each; 0 is a table for all samples, others are behind the batch.
        start: whether image tokens come "last" or "first" where an axis has more positions than image tokens.
    """

    path: Path
    axes: tuple[int, ...]
    start: str

    def take(self, value: torch.Tensor, kept_BK: torch.Tensor, tokens: int) -> Any:
        """The tensor with the kept tokens' positions only, for each sample its own."""
        found: Any = value
        for axis in self.axes:
            length = value.shape[axis]
            start = length - tokens if self.start == "last" else 0
            rows_BS = rows_of_kept(start, kept_BK, tokens, length)
            if axis == 0:
                return value[rows_BS[0]] if len(rows_BS) == 1 else PerSampleTable(value[rows_BS])
            found = take_rows(found.movedim(axis, 1), rows_BS).movedim(1, axis)
        return found


@dataclass(frozen=True)
class Reason:
    """What speaks against an adapter.

    Attributes:
        words: that follow the block's name and a colon.
        stage: how far it came before: 0 it did not run, 1 it ran on permuted tokens, 2 it passed with them.
    """

    words: str
    stage: int


def gather_of(travels: Sequence[Travel]) -> Callable[[Kwargs, torch.Tensor, int], Kwargs]:
    """The gather of an adapter."""

    def gather(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
        changed = dict(kwargs)
        for travel in travels:
            name, place = travel.path
            value = changed.get(name)
            if value is None:
                continue
            if place is None:
                changed[name] = travel.take(value, kept_BK, tokens)
                continue
            items = dict(value) if isinstance(value, Mapping) else list(value)
            items[place] = travel.take(items[place], kept_BK, tokens)  # type: ignore[index]
            changed[name] = items if isinstance(value, (Mapping, list)) else tuple(items)
        return changed

    gather.travels = tuple(travels)  # type: ignore[attr-defined]
    return gather


def reason_against(block: nn.Module, adapter: BlockAdapter, kwargs: Mapping[str, Any], tokens: int) -> Reason | None:
    """Run a copy of a block on permuted tokens, and on half of them, together and sample by sample.

    Args:
        kwargs: what the block gets in a forward, by name.

    Returns:
        What went wrong; None where nothing did.
    """
    generator = torch.Generator().manual_seed(0)
    stage = 0
    try:
        other = _with_random_weights(block, generator)
        inputs = _shaken(kwargs, adapter, generator)
        words = _permuted(other, adapter, inputs, tokens, generator)
        if words is not None:
            return Reason(words, 1)
        stage = 2
        words = _halved(other, adapter, inputs, tokens, generator)
    except InputError as error:
        words = str(error)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        words = f"it fails on them ({type(error).__name__}: {first})"
    return None if words is None else Reason(words, stage)


def _permuted(
    block: nn.Module, adapter: BlockAdapter, kwargs: Kwargs, tokens: int, generator: torch.Generator
) -> str | None:
    x_BND = kwargs[adapter.tokens]
    out_BND, context = adapter.unpack(block.forward(**kwargs))
    update = float((out_BND - x_BND).abs().max())
    if not update < float("inf"):
        return "with random weights its output is not finite, so nothing can be checked"
    if update == 0:
        return "it changes nothing, so nothing can be checked"
    order_BN = torch.rand(x_BND.shape[:2], generator=generator).argsort(dim=1).to(x_BND.device)
    moved = adapter.gather({**kwargs, adapter.tokens: take_rows(x_BND, order_BN)}, order_BN, tokens)
    found_BND, found_context = adapter.unpack(block.forward(**moved))
    off = _difference(found_BND, take_rows(out_BND, order_BN), update)
    if off is not None:
        return (
            f"permuted tokens do not give the permuted output (off by {off:.0%} of the block's update): it mixes "
            "neighbours, or has positions of its own"
        )
    if context is not None and found_context is not None and _difference(found_context, context, update) is not None:
        return "permuted tokens change its context, which knows no order of tokens"
    return None


def _halved(
    block: nn.Module, adapter: BlockAdapter, kwargs: Kwargs, tokens: int, generator: torch.Generator
) -> str | None:
    x_BND = kwargs[adapter.tokens]
    batch = len(x_BND)
    order_BN = torch.rand(x_BND.shape[:2], generator=generator).argsort(dim=1)
    kept_BK = order_BN[:, : tokens // 2].sort(dim=1).values.to(x_BND.device)
    halved = {**kwargs, adapter.tokens: take_rows(x_BND, kept_BK)}
    together_BKD, context = adapter.unpack(block.forward(**adapter.gather(halved, kept_BK, tokens)))
    if together_BKD.shape != halved[adapter.tokens].shape:
        return f"of {tokens // 2} tokens it makes {together_BKD.shape[1]}"
    update = float((together_BKD - halved[adapter.tokens]).abs().max())
    for sample in range(batch):
        one = tree_map(lambda value: _of_sample(value, sample, batch), halved)  # noqa: B023
        alone = adapter.gather(one, kept_BK[sample : sample + 1], tokens)
        alone_1KD, alone_context = adapter.unpack(block.forward(**alone))
        if _difference(alone_1KD, together_BKD[sample : sample + 1], update) is not None:
            return "samples that keep different tokens come out differently together and one at a time"
        if (
            context is not None
            and alone_context is not None
            and _difference(alone_context, context[sample : sample + 1], update) is not None
        ):
            return "the context of samples comes out differently together and one at a time"
    return None


def _difference(found: torch.Tensor, expected: torch.Tensor, update: float) -> float | None:
    """The largest difference as a share of the block's update; None where it is rounding."""
    off = float((found - expected).abs().max())
    if off <= _ROUNDING * update + 1e-6 * float(expected.abs().max()):
        return None
    return off / update if update else float("inf")


def _of_sample(value: Any, sample: int, batch: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
        return value[sample : sample + 1]
    return value


def _with_random_weights(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float32; calling its forward directly runs none of the hooks that were copied along."""
    other = copy.deepcopy(block).float()
    other.__dict__.pop("forward", None)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            drawn = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.data = (drawn + (0.5 if parameter.ndim == 1 else 0.0)).to(parameter.device)
    return other


def _shaken(kwargs: Mapping[str, Any], adapter: BlockAdapter, generator: torch.Generator) -> Kwargs:
    """Arguments in float32, with every number moved a little, so that no two tokens have equal positions by chance."""
    batch = len(kwargs[adapter.tokens])

    def shaken(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.bool:
            kept = torch.rand(value.shape, generator=generator) < 0.7
            kept[..., 0] = True
            return value & kept.to(value.device)
        if value.is_complex():
            noise = torch.randn((*value.shape, 2), generator=generator)
            return value.to(torch.complex64) + 0.3 * torch.view_as_complex(noise).to(value.device)
        if not value.is_floating_point():
            return value
        scale = 1.0 if value.ndim == 3 and len(value) == batch else 0.3
        return value.float() + scale * torch.randn(value.shape, generator=generator).to(value.device)

    return dict(tree_map(shaken, dict(kwargs)))
