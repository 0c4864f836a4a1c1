"""What tells problems apart. In: a model, a scorer, a space. Out: texts that are equal where errors are comparable."""

from __future__ import annotations

import hashlib
import json

from torch import nn

from shiva_search.models.model import Model
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.search.candidates import Space


def scorer_identity(scorer: TokenScorer | str) -> str:
    """What tells two scorers apart: the name, or class and weights."""
    if isinstance(scorer, str):
        return scorer
    name = type(scorer).__name__ if not hasattr(scorer, "__qualname__") else str(scorer.__qualname__)
    if isinstance(scorer, nn.Module):
        digest = hashlib.sha256()
        for key, value in sorted(scorer.state_dict().items()):
            digest.update(key.encode() + value.detach().float().cpu().numpy().tobytes())
        return f"{name}-{digest.hexdigest()[:12]}"
    return name.lower() if not vars(scorer) else f"{name}-{sorted(vars(scorer).items())!r}"


def problem_digest(model: Model, scorer: TokenScorer | str, space: Space, samples: int, chunk: int, seed: int) -> str:
    """The same for searches whose trials may be put together."""
    problem = [space.as_dict(), model.fingerprint(), scorer_identity(scorer), samples, chunk, seed]
    return hashlib.sha256(json.dumps(problem, sort_keys=True).encode()).hexdigest()
