"""Fit latency. In: Evidence. Out: a monotone curve per signature and a fixed part, in milliseconds, that add up.

One bounded least-squares problem. Unknown are the fixed part f, the cost c_s(k) of a block of signature s at each
measured count k, what a variant (a bypass, attention to all tokens) costs beyond it, e_s(k), and three corrections: a
scale a, an overhead o per layer that runs, and p per layer that is pruned. All in units of the dense forward:

    c_s(k) = a b_s(k) + o [k > 0] + p [0 < k < N]   blocks measured alone, b, to within their error and what they miss
    e_s(k) = a d_s(k)                               differences measured alone, d, likewise
    f + sum_l c_s(l)(N) = 1                         the dense forward
    f + sum_l c_s(l)(k_l) + e_s(l)(k_l) = y         each plan measured from end to end, to within its error
    a = 1,  o = p = 0,  f = rest cell               weakly

with c_s rising in k over the pruned counts. The dense block stands beside the curve, since it selects nothing and may
cost less than a block that drops one token. No smoothing: between measured counts the curve is straight, and two
neighbouring counts make a step. Corrections end up in c and f, so the cost of a plan is exactly additive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import lsq_linear

from shiva_search.cost.evidence import Evidence, PlanRatio
from shiva_search.records.cost_table import extra_parts

# Prior widths, relative. A block alone and the same block in a model differ by caches, allocator and neighbours.
_BLOCK_IN_MODEL = 0.02  # of c_s(k), beyond what scale and overhead explain
_OF_DENSE_BLOCK = 0.003  # the least of it, in units of the dense block
_EXTRA_IN_MODEL = 0.3  # of e_s(k): what a difference of two cells alone leaves out is large next to it
_RANKS_ALIKE = 0.01  # of the dense block: passes over the tokens make a bypass's cost, its rank changes little
_SCALE = 0.1
_OVERHEAD = 0.05  # of the dense block, for layers that run and for pruned ones
_REST = 0.3  # of the rest cell
_DENSE = 0.001
_HUBER = 1.5  # standard errors beyond which a plan counts as an outlier
_ITERATIONS = 4


@dataclass(frozen=True)
class LatencyFit:
    """Latency that adds up: fixed_ms + sum of curves.

    Attributes:
        fixed_ms: what no plan changes.
        curves_ms: by signature, at the measured counts of that signature.
        scale, overhead_ms, pruned_ms: the corrections that were folded in: a, o and p above.
        extras_ms: what variants cost beyond the curve, by signature and part, at the counts of the evidence.
    """

    fixed_ms: float
    curves_ms: Mapping[str, tuple[float, ...]]
    scale: float
    overhead_ms: float
    pruned_ms: float
    extras_ms: Mapping[str, Mapping[str, tuple[float, ...]]]


def fit_latency(evidence: Evidence) -> LatencyFit:
    """Solve the problem above; without forwards it is the isotonic regression of the blocks, weighted by precision."""
    system = _System(evidence)
    return system.unpack(system.fit()[0])


def predict_shares(evidence: Evidence, plans: Sequence[PlanRatio]) -> tuple[np.ndarray, np.ndarray]:
    """What a fit says of plans that are not among its evidence.

    Returns:
        [plans]: planned over dense latency; and its standard error, relative: what the evidence leaves open, by the
        normal equations of the problem above.
    """
    system = _System(evidence)
    solution, matrix = system.fit()
    dense = PlanRatio(((evidence.tokens,) * len(evidence.layers),), (1.0,), 1.0, 0.0)
    rows = np.array([system.plan_row(plan) for plan in plans])
    totals = rows @ solution
    _, triangle = np.linalg.qr(matrix)
    errors = np.linalg.norm(np.linalg.solve(triangle.T, rows.T), axis=0)
    return totals / float(system.plan_row(dense) @ solution), errors / totals


class _System:
    """Rows of the least-squares problem over x = [f, a, o, p, steps of every curve, every extra]."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.tokens = evidence.tokens
        blocks = evidence.blocks
        names = evidence.layers
        skipped_ms = sum(blocks[name].latency_ms[0] for name in names if blocks[name].tokens_kept[0] == 0)
        self.rest_ms = max(0.0, evidence.rest_ms - skipped_ms)
        self.sum_ms = self.rest_ms + sum(blocks[name].latency_ms[-1] for name in names)
        self.offsets, width = {}, 4
        for name, curve in blocks.items():
            self.offsets[name] = width
            width += len(curve.tokens_kept)
        self.extras: dict[tuple[str, str], slice] = {}
        for name, parts in evidence.extras.items():
            for part, extra in parts.items():
                self.extras[name, part] = slice(width, width + len(extra.tokens_kept))
                width += len(extra.tokens_kept)
        self.width = width
        self.matrices = {name: self._curve_matrix(name) for name in blocks}
        self.dense_block = sum(blocks[name].latency_ms[-1] for name in names) / len(names) / self.sum_ms
        self.prior_rows, self.prior_values = self._prior()
        self.plan_rows = np.array([self.plan_row(plan) for plan in evidence.plans]).reshape(-1, width)
        self.plan_values = np.array([plan.ratio for plan in evidence.plans])
        self.plan_errors = np.array([plan.error * plan.ratio for plan in evidence.plans])

    def fit(self) -> tuple[np.ndarray, np.ndarray]:
        """The solution, outliers weighted down, and the rows it solves, each in units of its error."""
        solution, matrix = self._solve(np.ones(len(self.plan_values)))
        for _ in range(_ITERATIONS if len(self.plan_values) else 0):
            # Huber's weights: a plan far off counts in proportion to 1 / distance.
            residuals = np.abs(self.plan_values - self.plan_rows @ solution) / self.plan_errors
            solution, matrix = self._solve(np.minimum(1.0, _HUBER / np.maximum(residuals, 1e-9)))
        return solution, matrix

    def _solve(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The solution with plans weighted, and the rows."""
        root = np.sqrt(weights) / self.plan_errors if len(weights) else np.zeros(0)
        matrix = np.vstack([self.prior_rows, self.plan_rows * root[:, None]])
        values = np.concatenate([self.prior_values, self.plan_values * root])
        low = np.zeros(self.width)
        low[1], low[2], low[3] = 0.05, -np.inf, -np.inf
        for (_, part), place in self.extras.items():
            if part == "all":  # a kernel may take more keys in less time; a bypass is only ever work
                low[place] = -np.inf
        bounds = (low, np.full(self.width, np.inf))
        return lsq_linear(matrix, values, bounds=bounds, method="bvls").x, matrix

    def unpack(self, solution: np.ndarray) -> LatencyFit:
        """Milliseconds, such that the dense model comes out at its measured latency to the last digit."""
        values = {name: self.matrices[name] @ solution for name in self.evidence.blocks}
        total = solution[0] + sum(values[name][-1] for name in self.evidence.layers)
        unit_ms = float((self.evidence.dense_ms or self.sum_ms) / total)
        curves = {name: tuple(float(v) * unit_ms for v in curve) for name, curve in values.items()}
        fixed, scale, overhead, pruned = (float(value) for value in solution[:4])
        extras = {
            name: {part: tuple((solution[self.extras[name, part]] * unit_ms).tolist()) for part in parts}
            for name, parts in self.evidence.extras.items()
        }
        return LatencyFit(fixed * unit_ms, curves, scale, overhead * unit_ms, pruned * unit_ms, extras)

    def _curve_matrix(self, name: str) -> np.ndarray:
        """[counts, unknowns]: pruned counts add up steps, the dense block is an unknown of its own."""
        counts = len(self.evidence.blocks[name].tokens_kept)
        matrix = np.zeros((counts, self.width))
        start = self.offsets[name]
        matrix[: counts - 1, start : start + counts - 1] = np.tril(np.ones((counts - 1, counts - 1)))
        matrix[counts - 1, start + counts - 1] = 1.0
        return matrix

    def _prior(self) -> tuple[np.ndarray, np.ndarray]:
        rows: list[np.ndarray] = []
        values: list[float] = []

        def add(row: np.ndarray, value: float, error: float) -> None:
            rows.append(row / error)
            values.append(value / error)

        unit = np.eye(self.width)
        whole = bool(self.evidence.dense_ms)
        add(unit[1], 1.0, _SCALE if self.evidence.plans else 1e-6)
        for overhead in unit[2:4]:
            add(overhead, 0.0, _OVERHEAD * self.dense_block if self.evidence.plans else 1e-9)
        rest = self.rest_ms / self.sum_ms
        add(unit[0], rest, _REST * rest + 0.002 if whole else 1e-6)
        for name, curve in self.evidence.blocks.items():
            matrix = self.matrices[name]
            for i, k in enumerate(curve.tokens_kept):
                alone = curve.latency_ms[i] / self.sum_ms
                corrected = alone * unit[1] + (k > 0) * unit[2] + (0 < k < self.tokens) * unit[3]
                spread = _BLOCK_IN_MODEL * alone + _OF_DENSE_BLOCK * self.dense_block if self.evidence.plans else 0.0
                error = float(np.hypot(curve.error[i] * alone, spread))
                add(matrix[i] - corrected, 0.0, error)
        for (name, part), place in self.extras.items():
            extra = self.evidence.extras[name][part]
            for row, ms, error_ms in zip(unit[place], extra.latency_ms, extra.error_ms, strict=True):
                alone = ms / self.sum_ms
                spread = _EXTRA_IN_MODEL * abs(alone) + _OF_DENSE_BLOCK * self.dense_block if self.evidence.plans else 0
                error = float(np.hypot(error_ms / self.sum_ms, spread)) + 1e-9
                add(row - alone * unit[1], 0.0, error)
        for one, other in self._pairs_of_ranks():
            for row in unit[one] - unit[other]:
                add(row, 0.0, _RANKS_ALIKE * self.dense_block)
        if whole:
            dense = unit[0] + sum(self.matrices[name][-1] for name in self.evidence.layers)
            add(dense, 1.0, _DENSE)
        return np.array(rows), np.array(values)

    def _pairs_of_ranks(self) -> list[tuple[slice, slice]]:
        """Places of two ranks of one signature that were measured at the same counts."""
        ranks = [(name, part) for name, part in self.extras if part != "all"]
        counts = {key: self.evidence.extras[key[0]][key[1]].tokens_kept for key in ranks}
        return [
            (self.extras[one], self.extras[other])
            for one, other in pairwise(ranks)
            if one[0] == other[0] and counts[one] == counts[other]
        ]

    def plan_row(self, plan: PlanRatio) -> np.ndarray:
        """How much of each unknown a plan takes."""
        total = np.zeros(self.width)
        total[0] = 1.0
        for weight, row in zip(plan.weights, plan.rows, strict=True):
            for name, k in zip(self.evidence.layers, row, strict=True):
                total += weight * self._interpolated(name, k)
                for part in extra_parts(k):
                    total[self.extras[name, part]] += weight * self.evidence.extras[name][part].weights(k)
        return total

    def _interpolated(self, name: str, k: int) -> np.ndarray:
        counts = self.evidence.blocks[name].tokens_kept
        matrix = self.matrices[name]
        above = int(np.searchsorted(counts, k))
        if counts[above] == k:
            row: np.ndarray = matrix[above]
            return row
        share = (k - counts[above - 1]) / (counts[above] - counts[above - 1])
        between: np.ndarray = (1 - share) * matrix[above - 1] + share * matrix[above]
        return between
