"""A model of the output's change, learned from judged plans. In: effects and judged plans. Out: predicted errors.

The mean is first order (effects of single layers add up as vectors); what is left over is a Gaussian process with
vector values, so that each judged plan corrects its neighbourhood, interactions of layers included. Distances between
plans are distances of their effects: layers that matter count, others do not.

Changes of the output are kept in single precision: half the memory traffic, which is what predicting many plans takes.

Legend: M plans, P positions, C choices, S sketch entries, n judged plans.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from shiva_search.search.candidates import Floats, Ints, Space
from shiva_search.search.sensitivity import Effects

Singles = NDArray[np.float32]

#: Length scales tried, in units of the typical distance between judged plans, and shares of the additive part.
_LENGTHS = (0.5, 1.0, 2.0, 4.0)
_ADDITIVE = (0.0, 0.5, 0.9)
#: Judged plans that are learned from: the latest and the best; older poor ones say little about where the best lie.
_MOST = 256


class Surrogate:
    """Predicts errors of plans.

    Args:
        space: positions and choices.
        effects: first-order effects of every choice.
    """

    def __init__(self, space: Space, effects: Effects) -> None:
        self.space = space
        self.effects = effects
        # Positions that are always dense or have one choice add nothing; leaving them out keeps the tables small.
        self._free = space.free
        table = effects.vectors_PCS[self._free]
        norms = (table**2).sum(-1)
        inner = table @ table.transpose(0, 2, 1)
        self._squared = np.maximum(norms[:, :, None] + norms[:, None, :] - 2 * inner, 0.0)
        size = np.sqrt(norms)
        share = space.kept[self._free] / space.tokens
        near = np.exp(-0.5 * ((share[:, :, None] - share[:, None, :]) / 0.25) ** 2)
        self._additive = size[:, :, None] * size[:, None, :] * near / max(float(norms.max()), 1e-12)
        self._table: Singles = np.ascontiguousarray(table, dtype=np.float32)
        self._plans: Ints = np.zeros((0, space.positions), dtype=np.int64)
        self._residuals: Floats = np.zeros((0, self._table.shape[-1]))
        self._weights: Singles | None = None
        self._inverse: Floats = np.zeros((0, 0))
        self._setting: tuple[float, float] | None = None
        self._chosen_with = 0
        self.noise = 0.0
        self.dimensions = 1.0

    @property
    def known(self) -> int:
        """Judged plans that were learned from."""
        return len(self._plans)

    def fit(self, plans_nP: Ints, errors_n: Floats, sketches: list[Floats | None]) -> None:
        """Learn from judged plans.

        Args:
            plans_nP: choice indices.
            errors_n: judged errors; the best estimate there is of each.
            sketches: direction of each output's change; None: taken to be the first-order one.
        """
        if len(plans_nP) > _MOST:
            late = np.arange(len(plans_nP) - _MOST // 2, len(plans_nP))
            best = np.argsort(errors_n[: len(plans_nP) - _MOST // 2], kind="stable")[: _MOST // 2]
            chosen = np.sort(np.concatenate([best, late]))
            plans_nP, errors_n = plans_nP[chosen], errors_n[chosen]
            sketches = [sketches[i] for i in chosen]
        first = self.first_order(plans_nP)
        targets = np.array([f if s is None or len(s) != len(f) else s for f, s in zip(first, sketches, strict=True)])
        norms = np.linalg.norm(targets, axis=1, keepdims=True)
        targets *= np.sqrt(np.maximum(errors_n, 0.0))[:, None] / np.maximum(norms, 1e-12)
        self._plans, self._residuals = plans_nP, targets - first
        self._weights = None
        if len(plans_nP) < 2:
            return
        squared, additive = self._kernels(plans_nP)
        gram = self._residuals @ self._residuals.T
        # Choosing costs a dozen inversions, so it is done again only when a fifth more is known.
        if self._setting is None or len(plans_nP) > 1.2 * self._chosen_with or len(plans_nP) < self._chosen_with:
            typical = float(np.median(squared[np.triu_indices(len(plans_nP), 1)])) or 1.0
            options = [(share, typical * length**2) for share in _ADDITIVE for length in _LENGTHS]
            self._chosen_with = len(plans_nP)
        else:
            options = [self._setting]
        best_loss = np.inf
        for setting in options:
            kernel = self._mix(squared, additive, *setting)
            kernel[np.diag_indices(len(kernel))] += 1e-3 * float(np.mean(np.diag(kernel)))
            inverse = cho_solve(cho_factor(kernel, lower=True), np.eye(len(kernel)))
            # Leave one out in closed form: residual_i = (K^-1 r)_i / (K^-1)_ii, squared norms through the Gram matrix.
            diagonal = np.diag(inverse)
            left_out = ((inverse @ gram) * inverse).sum(1) / diagonal**2
            loss = float(np.log(np.maximum(left_out, 1e-12)).mean())
            if loss < best_loss:
                best_loss, self._setting, self._inverse = loss, setting, inverse
                self.noise = float((left_out * diagonal).mean())
        self._weights = (self._inverse @ self._residuals).astype(np.float32)
        # Participation ratio: in how many directions the residuals really lie.
        self.dimensions = max(1.0, float(np.trace(gram)) ** 2 / max(float((gram**2).sum()), 1e-300))

    def first_order(self, plans_MP: Ints) -> Singles:
        """Sum of the effects [M, S]."""
        total = np.zeros((len(plans_MP), self._table.shape[-1]), dtype=np.float32)
        for row, p in enumerate(self._free):
            total += self._table[row, plans_MP[:, p]]
        return total

    def change(self, plans_MP: Ints) -> tuple[Singles, Floats]:
        """Expected change of the output [M, S] and the share of the process's variance left [M]."""
        mean = self.first_order(plans_MP)
        if self._weights is None or self._setting is None:
            return mean, np.ones(len(plans_MP))
        share, scale = self._setting
        squared, additive = self._kernels(plans_MP, self._plans)
        cross = self._mix(squared, additive, share, scale)
        own = (1 - share) + share * self._own(plans_MP)
        left = own - ((cross @ self._inverse) * cross).sum(1)
        mean += cross.astype(np.float32) @ self._weights
        return mean, np.maximum(left, 0.0)

    def predict(self, plans_MP: Ints) -> tuple[Floats, Floats]:
        """Expected error [M] and a rough standard deviation of it [M]."""
        return self.judge(*self.change(np.atleast_2d(plans_MP)))

    def judge(self, mean_MS: Singles, left_M: Floats) -> tuple[Floats, Floats]:
        """Errors and their rough standard deviations [M] from what `change` returned."""
        size = np.einsum("ms,ms->m", mean_MS, mean_MS).astype(np.float64)
        unknown = self.noise * left_M
        # |y|^2 where y is normal around its mean, with the unknown variance spread over `dimensions` directions.
        return size + unknown, np.sqrt((4 * size * unknown + 2 * unknown**2) / self.dimensions)

    def errors(self, plans_MP: Ints) -> Floats:
        """Expected error [M]."""
        return self.predict(plans_MP)[0]

    def _kernels(self, a_MP: Ints, b_nP: Ints | None = None) -> tuple[Floats, Floats]:
        """Squared distances and additive kernels [M, n].

        Plans that are looked at together are mostly neighbours of the first: only where they differ from it is there
        something to add up.
        """
        b_nP = a_MP if b_nP is None else b_nP
        if not len(a_MP):
            return np.zeros((0, len(b_nP))), np.zeros((0, len(b_nP)))
        rows, first_P = np.arange(len(self._free))[:, None], a_MP[0, self._free][:, None]
        learned_Pn = b_nP[:, self._free].T
        squared = np.repeat(self._squared[rows, first_P, learned_Pn].sum(0)[None], len(a_MP), axis=0)
        additive = np.repeat(self._additive[rows, first_P, learned_Pn].sum(0)[None], len(a_MP), axis=0)
        for row, p in enumerate(self._free):
            others = np.flatnonzero(a_MP[:, p] != a_MP[0, p])
            if len(others):
                for table, total in ((self._squared, squared), (self._additive, additive)):
                    near_Cn = table[row][:, learned_Pn[row]]
                    total[others] += (near_Cn - near_Cn[a_MP[0, p]])[a_MP[others, p]]
        return np.maximum(squared, 0.0), additive

    def _own(self, plans_MP: Ints) -> Floats:
        rows = np.arange(len(self._free))
        chosen = plans_MP[:, self._free]
        return self._additive[rows, chosen, chosen].sum(1)

    @staticmethod
    def _mix(squared: Floats, additive: Floats, share: float, scale: float) -> Floats:
        distance = np.sqrt(3 * squared / scale)
        return (1 - share) * (1 + distance) * np.exp(-distance) + share * additive  # Matern 3/2
