"""What a plan's error will be on samples it has not seen. In: its errors so far, and those of like plans on the whole
batch. Out: an estimate with its deviation.

The batch is fixed, so all that is unknown is the sum over the samples left. Plans that differ in a layer or two find
the same samples hard, and a plan judged in full has told how hard the others are: the regression estimator of survey
sampling (Cochran, Sampling Techniques, 1977, ch. 7) with the finite population correction (ch. 2).

Legend: m samples seen, N samples of the batch, K like plans.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import stats

from shiva_search.search.candidates import Floats

#: Plans regressed on, and how many samples each takes at least.
LIKE, _SAMPLES_EACH = 3, 5


def expected(seen_m: Floats, like_KN: Floats) -> tuple[float, float, int]:
    """Mean over the whole batch of a plan's squared errors, from those of its first samples.

    Args:
        seen_m: squared errors of the samples seen, the first m of the batch.
        like_KN: squared errors of plans like it on the whole batch, the most alike first; at least one.

    Returns:
        The estimate, its standard deviation and the deviation's degrees of freedom. Exact once m is N.
    """
    seen, (_, everyone) = len(seen_m), like_KN.shape
    like_KN = like_KN[: max(1, min(len(like_KN), seen // _SAMPLES_EACH))]
    like_mK = like_KN[:, :seen].T
    # Errors of hard samples vary more: variance in proportion to the error.
    typical_m = like_mK.mean(1)
    weight_m = 1.0 / np.sqrt(np.maximum(typical_m, 1e-3 * float(typical_m.mean()) + 1e-300))
    design_mK = like_mK * weight_m[:, None]
    slope_K, *_ = np.linalg.lstsq(design_mK, seen_m * weight_m, rcond=None)
    left_m = seen_m - like_mK @ slope_K
    freedom = seen - len(like_KN)
    if freedom < 1 or seen == everyone:
        return float((like_KN.mean(1) @ slope_K) + left_m.mean()), np.inf if seen < everyone else 0.0, freedom
    variance = float(left_m @ left_m) / freedom * (1.0 / seen - 1.0 / everyone)
    # Where the samples left are harder or easier than those seen, what is not known of the slopes counts as well.
    further_K = like_KN.mean(1) - like_mK.mean(0)
    spread_KK = np.linalg.pinv(design_mK.T @ design_mK) * float(((left_m * weight_m) ** 2).sum()) / freedom
    variance += float(further_K @ spread_KK @ further_K)
    return float(like_KN.mean(1) @ slope_K + left_m.mean()), float(np.sqrt(variance)), freedom


def is_worse(error: float, deviation: float, freedom: int, rival: float, doubt: float) -> bool:
    """Whether an estimated error is above a known one, but for a chance of `doubt` (one-sided t test)."""
    return freedom > 0 and error - rival > _quantile(doubt, freedom) * deviation


@lru_cache(maxsize=256)
def _quantile(doubt: float, freedom: int) -> float:
    return float(stats.t.isf(doubt, freedom))
