"""What one training step sees. In: a model's training split, a seed, a step. Out: groups of samples that share a row.

Everything is drawn from (seed, step) alone: a step taken up again after an interruption sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from shiva_search.models.model import Batch, Model
from shiva_search.records.plan import Kept, Plan

#: Shares of tokens that are drawn: multiples of 1/20. A new shape costs a library time and memory to prepare for, and a
#: router that ranks well at these ranks well in between.
LEVELS = 20
_STEPS_PER_SEED = 1_000_003  # a prime, so that seeds 0, 1, 2 share no batch in any realistic number of steps


@dataclass(frozen=True)
class _Mix:
    """Shares of rows and layers that are drawn as something else than a share of tokens of their own.

    Attributes:
        uniform: of rows that keep the same share in all layers.
        skipped, dense: of layers, given the row's share of tokens.
    """

    uniform: float
    skipped: Callable[[float], float]
    dense: Callable[[float], float]


_WITHOUT = _Mix(1 / 3, lambda keep: 0.1, lambda keep: 0.1)
_WITH_BYPASSES = _Mix(0.15, lambda keep: 0.25 * (1.2 - keep), lambda keep: 0.6 * keep)


@dataclass(frozen=True)
class Group:
    """Samples that share one row of tokens kept: one forward.

    Attributes:
        batch: the samples.
        row: tokens kept per layer.
        share: of the step's samples, in (0, 1].
    """

    batch: Batch
    row: tuple[int, ...]
    share: float


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for each step."""
    return seed * _STEPS_PER_SEED + step


def draw_batch(model: Model, count: int, seed: int, step: int) -> Batch:
    """The samples of one step, timesteps stratified over all of them (eq. 15)."""
    return model.batch("train", count, step_seed(seed, step))


def draw_row(
    layers: int,
    tokens: int,
    keep: float,
    keep_range: tuple[float, float],
    generator: torch.Generator,
    variants: Sequence[Sequence[tuple[str, int]]] = (),
) -> tuple[int, ...]:
    """A row of tokens kept around a share, as plans look: the first layer dense, then one of two kinds.

    Some rows keep the same share in all layers. In the others layers differ (0.2 standard deviation, inside
    keep_range), and some are skipped or dense: a router has to rank well behind any such layer. Where there are
    bypasses, plans replace whole blocks by them and leave others alone, so more layers do.

    Args:
        variants: by layer, what pruned ones may do besides, as (attend, bypass rank), each as likely.
    """
    mix = _WITH_BYPASSES if variants else _WITHOUT
    uniform = torch.rand((), generator=generator).item() < mix.uniform
    keeps_L = keep + (0.0 if uniform else 0.2) * torch.randn(layers, generator=generator)
    low, high = (math.ceil(keep_range[0] * LEVELS - 1e-9), math.floor(keep_range[1] * LEVELS + 1e-9))
    level_L = (keeps_L * LEVELS).round().clamp(low, max(low, high))
    kept = (level_L * tokens / LEVELS).long().clamp(1, tokens)
    fate_L = torch.rand(layers, generator=generator)
    if not uniform:
        kept[fate_L < mix.skipped(keep)] = 0
        kept[fate_L > 1 - mix.dense(keep)] = tokens
    row: list[int] = kept.tolist()
    for layer, options in enumerate(variants):
        attend, rank = options[int(torch.randint(len(options), (), generator=generator))]
        if row[layer] < tokens:
            row[layer] = Kept(row[layer], rank, attend)
    return (tokens, *row[1:])


def stratified_groups(
    model: Model,
    batch: Batch,
    groups: int,
    keep_range: tuple[float, float],
    generator: torch.Generator,
    variants: Sequence[Sequence[tuple[str, int]]] = (),
) -> Iterator[Group]:
    """Split a batch into groups, each with a share of tokens from its own part of keep_range."""
    low, high = keep_range
    width = (high - low) / groups
    bounds = [len(batch) * index // groups for index in range(groups + 1)]
    for index, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        keep = low + width * (index + torch.rand((), generator=generator).item())
        row = draw_row(model.layer_count, model.tokens, keep, keep_range, generator, variants)
        if stop > start:
            yield Group(batch.slice(start, stop), row, (stop - start) / len(batch))


def planned_groups(plan: Plan, batch: Batch, size: int) -> Iterator[Group]:
    """Split a batch by the plan's timestep segments, in pieces of at most `size` samples."""
    segment_of = [plan.row_at(t) for t in batch.t_B.tolist()]
    for segment, row in enumerate(plan.rows):
        rows = [index for index, found in enumerate(segment_of) if found == segment]
        if rows:
            for piece in batch.take(rows).chunks(size):
                yield Group(piece, row, len(piece) / len(batch))
