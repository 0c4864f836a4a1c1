"""Sketches as text, so that any Optuna storage can hold them. In: vectors. Out: base64 of half floats, and back."""

from __future__ import annotations

import base64
from functools import lru_cache

import numpy as np

from shiva_search.search.candidates import Floats


def encode(vector: Floats) -> str:
    """Direction only: scaled to a largest entry of 1, half precision."""
    largest = float(np.abs(vector).max(initial=0.0)) or 1.0
    return base64.b64encode((vector / largest).astype("<f2").tobytes()).decode("ascii")


@lru_cache(maxsize=4096)
def decode(text: str | None) -> Floats | None:
    """Inverse of encode up to a positive factor."""
    return None if not text else np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
