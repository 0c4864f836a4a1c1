"""The plainest alternative: blocks are kept whole or skipped. In: a cost model. Out: one that offers nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from shiva_search.records.cost import CostEstimate
from shiva_search.records.plan import Plan
from shiva_search.search.candidates import PlanCost


@dataclass(frozen=True)
class WholeBlocks:
    """A cost model whose candidates are 0 and all tokens, for searching the best plan that only skips blocks.

    Attributes:
        cost: the cost model; costs are its own.
    """

    cost: PlanCost

    @property
    def dense(self) -> CostEstimate:
        """Cost of the untouched model."""
        return self.cost.dense

    def predict(self, plan: Plan) -> CostEstimate:
        """Cost of a plan."""
        return self.cost.predict(plan)

    def layer_cost(self, metric: str, layer: int, k: int) -> float | None:
        """Cost of a layer at k tokens."""
        return self.cost.layer_cost(metric, layer, k)

    def fixed(self, metric: str) -> float | None:
        """What no choice changes."""
        return self.cost.fixed(metric)

    def candidates(self, min_keep: float | None = None) -> tuple[int, ...]:
        """Nothing or everything."""
        known = self.cost.candidates(None)
        return (known[0], known[-1])

    def corrected(self, plan: Plan, measured_ratio: float) -> WholeBlocks:
        """With one more piece of evidence."""
        return WholeBlocks(self.cost.corrected(plan, measured_ratio))
