"""Find the plan: quality of plans, exact solutions, studies, and the loop that holds the budget as measured."""

from shiva_search.search.closed_loop import holds
from shiva_search.search.fidelity import FidelityEvaluator, fidelity
from shiva_search.search.run_search import SearchResult, check_attend, check_budget, join_study, search
from shiva_search.search.trade_sampler import TradeSampler

__all__ = [
    "FidelityEvaluator",
    "SearchResult",
    "TradeSampler",
    "check_attend",
    "check_budget",
    "fidelity",
    "holds",
    "join_study",
    "search",
]
