"""What layers may do besides keeping tokens. In: a model, a cost model, a scorer. Out: attentions and bypass ranks."""

from __future__ import annotations

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.candidates import PlanCost


def check_attend(attend: str) -> None:
    """Raises InputError for an unknown attention."""
    if attend not in ("kept", "all", "free"):
        raise InputError(f"--attend is one of kept, all, free, got {attend!r}")


def variants_of(
    model: Model, cost: PlanCost, scorer: TokenScorer | str, attend: str = "free"
) -> list[list[tuple[str, int]]]:
    """What layers may do besides keeping tokens: the ranks of the scorer's bypasses, and the attentions they allow.

    Only what the cost model knows the cost of is on offer.

    Args:
        model: its layers say whether they can attend to all tokens.
        cost: names what it knows by `variants()`.
        scorer: with bypasses, or without.
        attend: "kept", "all" (where a layer can), or "free" for both.

    Raises:
        InputError: an unknown attention.
    """
    check_attend(attend)
    known = set(getattr(cost, "variants", lambda: ())())
    ranks = [0, *(rank for rank in getattr(scorer, "ranks", ()) if rank and f"rank {rank}" in known)]
    found = []
    for layer in model.layers:
        everyone = layer.attends_all and "all" in known and attend != "kept"
        modes = (["kept"] if attend != "all" or not everyone else []) + (["all"] if everyone else [])
        found.append([(mode, rank) for mode in modes for rank in ranks])
    return found
