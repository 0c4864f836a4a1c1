"""Sketches of what a plan does to the output. In: differences. Out: short vectors that keep angles, also as text.

As text any Optuna storage can hold them; so are the errors of single samples.
"""

from __future__ import annotations

import base64
from functools import lru_cache

import numpy as np
import torch

from shiva_search.search.candidates import Floats


def encode(vector: Floats) -> str:
    """Direction only: scaled to a largest entry of 1, half precision."""
    largest = float(np.abs(vector).max(initial=0.0)) or 1.0
    return base64.b64encode((vector / largest).astype("<f2").tobytes()).decode("ascii")


@lru_cache(maxsize=4096)
def decode(text: str | None) -> Floats | None:
    """Inverse of encode up to a positive factor."""
    return None if not text else np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)


def parts_as_text(parts: Floats) -> str:
    """Errors of single samples, single precision."""
    return base64.b64encode(parts.astype("<f4").tobytes()).decode("ascii")


@lru_cache(maxsize=4096)
def parts_from_text(text: str) -> Floats:
    """Inverse of parts_as_text."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


@lru_cache(maxsize=32)
def _hashes(length: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, size, (length,), generator=generator)
    signs = torch.randint(0, 2, (length,), generator=generator, dtype=torch.int8) * 2 - 1
    return slots, signs


def count_sketch(difference: torch.Tensor, size: int, seed: int) -> Floats:
    """Count sketch (Charikar et al. 2002): inner products of two sketches estimate those of the vectors."""
    slots, signs = _hashes(len(difference), size, seed)
    flat = difference.detach().cpu().float() * signs
    return torch.zeros(size).index_add_(0, slots, flat).double().numpy()
