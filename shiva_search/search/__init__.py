"""Find the plan: quality of plans, exact solutions, studies, and the loop that holds the budget as measured."""

from shiva_search.search.candidates import check_layout
from shiva_search.search.closed_loop import holds
from shiva_search.search.feasibility import check_budget
from shiva_search.search.fidelity import FidelityEvaluator, fidelity
from shiva_search.search.joining import join_study
from shiva_search.search.run_search import SearchResult, search
from shiva_search.search.trade_sampler import TradeSampler
from shiva_search.search.variants import check_attend

__all__ = [
    "FidelityEvaluator",
    "SearchResult",
    "TradeSampler",
    "check_attend",
    "check_budget",
    "check_layout",
    "fidelity",
    "holds",
    "join_study",
    "search",
]
