"""What pruning one layer does to the output. In: an evaluator, a space. Out: an error and an effect per choice.

Each layer (of each segment) is pruned alone, at a few knots of its choices; the dense prefix up to it is run once. Not
only the size of the output's change is kept but a sketch of the change itself: to first order the changes of several
layers add up as vectors, so inner products of the sketches say which layers make each other's errors worse (and
which undo them) at no further forward pass.

Legend: P positions, C choices, S sketch entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shiva_search.records.plan import PLAIN, Kept
from shiva_search.search.candidates import Floats, Space
from shiva_search.search.fidelity import FidelityEvaluator

#: Shares of tokens at which a layer is really pruned; choices in between are interpolated.
KNOTS = (0.0, 0.125, 0.25, 0.5, 0.75)
#: Likewise for layers with a bypass, or that attend to all: their curves are tame.
TAME_KNOTS = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Effects:
    """What each choice does when every other layer is dense.

    Attributes:
        errors_PC: NMSE of the output; unused cells repeat the position's last choice.
        vectors_PCS: sketch of the output's change, squared norm equal to the error.
        measured: by position, the choices that were run; others are interpolated.
        choices: by layer, what was on offer; empty where effects were not measured here.
    """

    errors_PC: Floats
    vectors_PCS: Floats
    measured: tuple[tuple[int, ...], ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def separable(cls, errors_PC: Floats) -> Effects:
        """Effects that do not interact: each position has a direction of its own, so that errors simply add up."""
        positions, choices = errors_PC.shape
        vectors = np.zeros((positions, choices, positions))
        vectors[np.arange(positions), :, np.arange(positions)] = np.sqrt(np.maximum(errors_PC, 0.0))
        return cls(errors_PC, vectors)


def knots_of(choices: Sequence[int], tokens: int, shares: Sequence[float] = KNOTS) -> list[int]:
    """Indices of the choices to run: the ones nearest to the shares, the smallest always, all tokens never.

    Args:
        choices: of one variant, ascending.
        tokens: N.
        shares: of the tokens.
    """
    pruned = [index for index, k in enumerate(choices) if k < tokens]
    if not pruned:
        return []
    nearest = {min(pruned, key=lambda index: abs(choices[index] / tokens - share)) for share in shares}
    if Kept.of(choices[pruned[0]]).variant != PLAIN:
        return sorted({*nearest, pruned[0]})
    # Next to skipping comes a few tokens, which may well be worse: the smallest k above 0 is an end of its own.
    ends = {pruned[0], next((index for index in pruned if choices[index] > 0), pruned[0])}
    return sorted(nearest | ends)


def measure_effects(
    evaluator: FidelityEvaluator,
    space: Space,
    shares: Sequence[float] = KNOTS,
    progress: Callable[[str], None] | None = None,
) -> Effects:
    """Prune each layer alone, at a few choices, on the evaluator's probe chunks.

    Args:
        evaluator: its segments are those of the space.
        space: positions and choices.
        shares: where to measure.
        progress: told once per segment, and every ten seconds how much is left.
    """
    width = space.kept.shape[1]
    errors = np.zeros((space.positions, width))
    vectors = np.zeros((space.positions, width, evaluator.sketch_size))
    measured: list[tuple[int, ...]] = []
    for segment in range(space.segments):
        jobs: list[tuple[int, int, tuple[int, ...]]] = []
        for layer in range(space.layers):
            knots = [
                group[knot]
                for group in groups_of(space.choices[layer], space.tokens)
                for knot in knots_of(
                    [space.choices[layer][i] for i in group],
                    space.tokens,
                    _shares(space.choices[layer][group[0]], shares),
                )
            ]
            measured.append(tuple(knots))
            for knot in knots:
                row = [space.tokens] * space.layers
                row[layer] = space.choices[layer][knot]
                jobs.append((segment * space.layers + layer, knot, tuple(row)))
        # Late layers last, so that a job finds the dense prefix it starts from fresh.
        of = f" of segment {segment + 1} of {space.segments}" if space.segments > 1 else ""
        what = f"sensitivities: {len(jobs)} prunings of single layers{of}"
        told = None if progress is None else _Pace(progress, what)
        found_R, sketches_RS = evaluator.probe_row(segment, [row for _, _, row in jobs], told)
        for (position, knot, _), error, sketch in zip(jobs, found_R, sketches_RS, strict=True):
            errors[position, knot] = error
            vectors[position, knot] = _resized(sketch, error)
        if progress is not None:
            progress(f"sensitivities: {len(jobs)} prunings of single layers, {evaluator.forwards:.1f} dense forwards")
    for position in range(space.positions):
        _interpolate(space, position, measured[position], errors, vectors)
    return Effects(errors, vectors, tuple(measured), space.choices)


class _Pace:
    """Says every ten seconds how much of a pass is done, and what is left if it goes on at this pace."""

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._began_s = self._told_s = time.monotonic()

    def __call__(self, done: float) -> None:
        now_s = time.monotonic()
        if done < 1 and now_s - self._told_s >= 10.0:
            self._told_s = now_s
            left_s = (now_s - self._began_s) * (1 - done) / done
            self._say(f"{self._what}, {done:.0%} done, {left_s:.0f} s left")


def _interpolate(space: Space, position: int, knots: Sequence[int], errors: Floats, vectors: Floats) -> None:
    """Fill the choices between knots: direction and error linear in the tokens kept, zero at all tokens."""
    choices = space.choices[position % space.layers]
    for group in groups_of(choices, space.tokens):
        _interpolate_group(choices, position, group, [i for i in knots if i in group], space.tokens, errors, vectors)
    errors[position, len(choices) :] = errors[position, len(choices) - 1]
    vectors[position, len(choices) :] = vectors[position, len(choices) - 1]


def _interpolate_group(
    choices: Sequence[int],
    position: int,
    group: Sequence[int],
    knots: Sequence[int],
    tokens: int,
    errors: Floats,
    vectors: Floats,
) -> None:
    full = choices.index(tokens) if tokens in choices else None
    known = [*knots] if full is None else [*knots, full]
    kept = np.array([choices[index] for index in known], dtype=float)
    for index in group:
        k = choices[index]
        if index in known or not knots:
            continue
        right = int(np.searchsorted(kept, k))
        if right == len(known):  # beyond the last knot, where the memory limit took the larger choices away
            near = known[-1]
            errors[position, index], vectors[position, index] = errors[position, near], vectors[position, near]
            continue
        left = max(right - 1, 0)
        share = (k - kept[left]) / max(kept[right] - kept[left], 1.0)
        a, b = known[left], known[right]
        errors[position, index] = (1 - share) * errors[position, a] + share * errors[position, b]
        mixed = (1 - share) * vectors[position, a] + share * vectors[position, b]
        vectors[position, index] = _resized(mixed, errors[position, index])


def groups_of(choices: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of the choices by variant, ascending in tokens kept; the one that keeps all belongs to the plain ones.

    Skipping a block with a bypass is the low end of both kinds of attention, where it is found with the plain one.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for index in sorted(range(len(choices)), key=lambda i: int(choices[i])):
        if choices[index] < tokens or len(choices) == 1:
            found.setdefault(Kept.of(choices[index]).variant, []).append(index)
    return list(found.values())


def reduced(space: Space, effects: Effects) -> tuple[Space, Effects]:
    """Leave out choices that another one of the layer beats: no dearer in what is limited, and no worse alone.

    What is left rises in cost and falls in error, so the next choice is the next better one. All tokens stay on offer.
    """
    metrics = [name for name in space.limits if name in space.cost] or [
        next(name for name in ("latency_ms", "mean_keep") if name in space.cost)
    ]
    if "power_w" in space.limits:
        metrics += ["energy_j", "latency_ms"]
    keep: list[list[int]] = []
    for layer in range(space.layers):
        count = len(space.choices[layer])
        costs_CM = np.array([[space.cost[name][layer][c] for name in dict.fromkeys(metrics)] for c in range(count)])
        positions = range(layer, space.positions, space.layers)
        stays: set[int] = {count - 1}
        for position in positions:
            both = np.concatenate([costs_CM, effects.errors_PC[position, :count, None]], axis=1)
            for c in range(count):
                beaten = (both <= both[c]).all(1) & ((both < both[c]).any(1) | (np.arange(count) < c))
                if not beaten.any():
                    stays.add(c)
        keep.append(sorted(stays - {count - 1}, key=lambda c: tuple(costs_CM[c])) + [count - 1])
    width = max(map(len, keep))
    padded = np.array([[*row, *[row[-1]] * (width - len(row))] for row in keep])[
        np.arange(space.positions) % space.layers
    ]
    rows = np.arange(space.positions)[:, None]
    measured = tuple(
        tuple(i for i, c in enumerate(keep[p % space.layers]) if c in effects.measured[p])
        for p in range(len(effects.measured))
    )
    return space.only(keep), Effects(effects.errors_PC[rows, padded], effects.vectors_PCS[rows, padded], measured)


def _shares(choice: int, shares: Sequence[float]) -> Sequence[float]:
    return shares if Kept.of(choice).variant == PLAIN else TAME_KNOTS


def _resized(vector: Floats, error: float) -> Floats:
    """The vector with squared norm `error`: sketches give directions, norms are known exactly."""
    norm = float(np.linalg.norm(vector))
    return vector * (max(error, 0.0) ** 0.5 / norm) if norm > 0 else vector
