"""Where a cost curve jumps. In: measured points (tokens, cost). Out: the counts to measure next, and the edges.

Kernels work in tiles, so the cost of a block climbs in steps. The largest count on a step costs what the smallest does,
and is the one a plan should use; a curve that is drawn through coarse points only would cut the corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_SENTINELS = 3  # counts behind which one more token is measured, to notice steps as fine as the grid
_SIGMAS = 4.0
_LEAST_JUMP = 0.02  # of the dense cost: smaller steps do not matter to a plan


@dataclass(frozen=True)
class Point:
    """Cost of one count and its standard error, in any one unit."""

    cost: float
    error: float


def token_grid(tokens: int, alignment: int, steps: int = 12) -> tuple[int, ...]:
    """Counts to measure first: 0, 1, about `steps` aligned ones evenly spread, a few one above, N - 1 and N.

    Args:
        tokens: N, at least 1.
        alignment: tokens a kernel's tile likely spans.
        steps: aligned counts, about.
    """
    even = np.arange(1, steps) * tokens / steps
    aligned = sorted({int(round(k / alignment)) * alignment for k in even} - {0})
    inner = [k for k in aligned if k < tokens - max(1, tokens // (4 * steps))]
    sentinels = {inner[int(i)] + 1 for i in np.linspace(0, len(inner) - 1, _SENTINELS + 2)[1:-1]} if inner else set()
    return tuple(sorted({0, 1, *inner, *sentinels, tokens - 1, tokens}))


def alignment_of(device_type: str, tokens: int) -> int:
    """Tokens per tile to expect: what vector kernels pad to on a CPU, half a matrix tile on a GPU."""
    wanted = 16 if device_type == "cpu" else 64
    while wanted > 1 and wanted * 12 > tokens:
        wanted //= 2
    return wanted


def next_counts(points: Mapping[int, Point], tokens: int, alignment: int) -> tuple[int, ...]:
    """Counts worth measuring: inside intervals where the curve rises by more than its surroundings explain.

    Args:
        points: what is known of the pruned counts, 1 to N - 1.
        tokens: N.
        alignment: as for token_grid; steps are located to an eighth of it.
    """
    known = sorted(k for k in points if 0 < k < tokens)
    if len(known) < 4:
        return ()
    wanted = []
    for low, high in _jumps(points, known):
        if high - low <= max(1, alignment // 8):
            continue
        # Steps mostly end at aligned counts: one token more settles it. Else halve.
        wanted.append(low + 1 if low % alignment == 0 else (low + high) // 2)
    if _fine_stairs(points, known):
        aligned = range(alignment, tokens - 1, alignment)
        wanted += [probe for k in aligned for probe in (k, k + 1) if probe < tokens - 1]
    return tuple(sorted(set(wanted) - points.keys()))


def edges(points: Mapping[int, Point], tokens: int, alignment: int) -> tuple[int, ...]:
    """Right edges of steps: counts right behind which the cost jumps, ascending."""
    known = sorted(k for k in points if 0 < k < tokens)
    width = max(1, alignment // 8)
    return tuple(low for low, high in _jumps(points, known) if high - low <= width)


def _jumps(points: Mapping[int, Point], known: list[int]) -> list[tuple[int, int]]:
    """Neighbouring counts between which the cost rises significantly above the usual slope."""
    if len(known) < 4:
        return []
    widths = np.diff(known)
    rises = np.diff([points[k].cost for k in known])
    top = max(points[k].cost for k in known)
    # Rises add up to the whole; the median over tokens is the slope of the treads, whatever few steps do.
    order = np.argsort(rises / widths)
    middle = np.searchsorted(np.cumsum(widths[order]), widths.sum() / 2)
    slope = max(0.0, float((rises / widths)[order][middle]))
    found = []
    for low, high, rise in zip(known, known[1:], rises, strict=False):
        error = float(np.hypot(points[low].error, points[high].error))
        excess = rise - 1.5 * slope * (high - low)
        if low > 1 and excess > max(_SIGMAS * error, _LEAST_JUMP * top):
            found.append((low, high))
    return found


def _fine_stairs(points: Mapping[int, Point], known: list[int]) -> bool:
    """Whether one token more costs most of what the way to the next aligned count does, wherever that was tried."""
    votes = []
    for low, probe, high in zip(known, known[1:], known[2:], strict=False):
        if low > 1 and probe == low + 1:
            step = points[probe].cost - points[low].cost
            error = float(np.hypot(points[low].error, points[probe].error))
            votes.append(step > 0.5 * (points[high].cost - points[low].cost) and step > _SIGMAS * error)
    return len(votes) >= 2 and sum(votes) > len(votes) / 2
