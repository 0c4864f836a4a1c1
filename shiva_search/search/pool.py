"""The judged plans, chosen from. In: a study, and costs as corrected. Out: the best plan that holds the limits now."""

from __future__ import annotations

import numpy as np

from shiva_search.search.candidates import Ints, Space
from shiva_search.search.knapsack import solve
from shiva_search.search.study import PlanStudy, Record
from shiva_search.search.trade_sampler import TradeSampler

#: Plans judged anew when the closed loop changes the costs.
_REFINE = 6


class Pool:
    """Chooses among judged plans, and judges a few more where costs have changed.

    Args:
        plans: the study.
        seed: of the proposals.
    """

    def __init__(self, plans: PlanStudy, seed: int) -> None:
        self.plans, self.seed, self._calls = plans, seed, 0

    def choose(self, space: Space, without: frozenset[bytes]) -> tuple[Ints, float] | None:
        """The plan of least error that holds the space's limits, with no slack left that a layer could use.

        Raises:
            InfeasibleBudgetError: no plan holds the limits.
        """
        exact = solve(space, self.plans.effects.errors_PC)
        if self._calls and exact.plan_P.tobytes() not in without:
            self.plans.judge(exact.plan_P, "corrected")
            self._refine(space, without)
        self._calls += 1
        best = self.plans.best(space, without)
        if best is None:
            best = self.plans.judge(exact.plan_P, "exact")
            if best.plan_P.tobytes() in without:
                return None
        best = self._top_up(space, best, without)
        return best.plan_P, best.error

    def error_of(self, plan_P: Ints) -> float:
        """Error of a plan, judged now where it is not known."""
        return self.plans.judge(plan_P, "floor").error

    def _refine(self, space: Space, without: frozenset[bytes]) -> None:
        sampler = TradeSampler(space, self.plans.effects, self.seed, explore=0.0)
        rng = np.random.default_rng([self.seed, self._calls])
        for _ in range(_REFINE):
            records = self.plans.records()
            judged = [(r.plan_P, r.error, dict(r.attributes)) for r in records]
            tried = {r.plan_P.tobytes() for r in records} | without
            proposal = sampler.propose(judged, tried, rng)
            if sampler.exhausted:
                return
            self.plans.judge(proposal, "corrected")

    def _top_up(self, space: Space, record: Record, without: frozenset[bytes]) -> Record:
        """Raise single layers to their next choice while the limits hold and the judged error falls."""
        while True:
            plan_P = record.plan_P
            raised = np.repeat(plan_P[None], space.positions, axis=0) + np.eye(space.positions, dtype=np.int64)
            raised = raised[(raised < space.sizes).all(1)]
            raised = raised[space.feasible(raised)] if len(raised) else raised
            options = [self.plans.judge(row, "top-up") for row in raised if row.tobytes() not in without]
            better = min(options, key=lambda r: r.error, default=None)
            if better is None or better.error >= record.error:
                return record
            record = better
