"""Top-k over importance scores: hard forward, soft backward.

In: scores of the tokens, the number k to keep, temperatures. Out: the kept indices (forward) and inclusion scores
through which gradients reach the scores and k (backward).

Legend: B samples, N tokens, K kept tokens, C tokens of one row chunk, M tokens from that chunk to the end.
Equation numbers are those of Shiva-DiT, arXiv 2602.05605.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shiva_search.errors import InputError


def soft_rank(scores_BN: Tensor, tau: float, chunk: int = 128) -> Tensor:
    """Differentiable descending rank of every token: 1 for the clear winner, N for the clear last (eq. 5).

    r_i = 1 + sum over j != i of sigmoid((s_j - s_i) / tau). Scores are compared in row chunks, so forward and backward
    hold O(B * N * chunk) numbers besides their results and never N x N; each pair is compared once. A second
    derivative is not offered.

    Args:
        scores_BN: importance [B, N], any floating dtype; half precisions are compared in float32.
        tau: temperature in units of score, > 0; the smaller, the closer to the hard rank.
        chunk: tokens per row chunk, >= 1. It changes memory and speed, and the result by rounding alone.

    Returns:
        Ranks [B, N] in [1, N], float64 for float64 scores and float32 otherwise (bfloat16 cannot tell 256 from 257).

    Raises:
        InputError: scores are not a floating [B, N], tau is not positive and finite, or chunk < 1.
    """
    _check_scores(scores_BN)
    _check_positive("tau", tau)
    if chunk < 1:
        raise InputError(f"chunk must be at least 1 token, got {chunk}. Use 128 unless memory is short.")
    ranks_BN: Tensor = _SoftRank.apply(_widen(scores_BN), tau, chunk)
    return ranks_BN


def inclusion(ranks_BN: Tensor, k: int | Tensor, tau: float, tokens: int) -> Tensor:
    """Inclusion score of every token: 1 well inside the first k ranks, 1/2 at rank k, 0 far behind (eq. 6, 30).

    pi_i = sigmoid((k - r_i) / (tau * N)): the gap in ranks counts as a share of N, so tau suits every resolution.

    Args:
        ranks_BN: soft ranks [B, N].
        k: tokens kept, in [0, N]; a tensor ([] or [B, 1], real-valued) receives dL/dk (eq. 24).
        tau: temperature as a share of N, > 0.
        tokens: N, >= 1.

    Returns:
        Inclusion scores [B, N] in (0, 1).

    Raises:
        InputError: tau or tokens is not positive, or k is a tensor of another shape.
    """
    _check_positive("tau", tau)
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}. Pass the token count N of the layer.")
    if isinstance(k, Tensor) and k.ndim != 0 and k.shape != (ranks_BN.shape[0], 1):
        # A [B] tensor would broadcast along the tokens without complaint where B equals N.
        raise InputError(f"k must have shape [] or [B, 1] beside ranks [B, N], got {list(k.shape)} beside "
                         f"{list(ranks_BN.shape)}. Reshape it with k.view(-1, 1).")  # fmt: skip
    return torch.sigmoid((k - ranks_BN) / (tau * tokens))


def hard_top_k(scores_BN: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of every sample, in token order (eq. 3).

    Ascending order keeps gathered tokens in their spatial order. Among equal scores torch.topk decides: the same
    choice for the same input on the same device, not necessarily across devices.

    Args:
        scores_BN: importance [B, N].
        k: tokens to keep, in [0, N].

    Returns:
        kept_BK: int64 indices [B, k], strictly ascending along each row.

    Raises:
        InputError: scores are not a floating [B, N] or k is outside [0, N].
    """
    _check_scores(scores_BN)
    tokens = scores_BN.shape[1]
    if not 0 <= k <= tokens:
        raise InputError(f"k must lie in [0, N], got k = {k} with N = {tokens}. Clamp k to the layer's tokens.")
    kept_BK: Tensor = scores_BN.detach().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return kept_BK


def perturb(scores: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Scores with Gaussian noise added: s~ = s + eps, eps ~ N(0, sigma^2), so that near-ties are explored (eq. 5).

    Args:
        scores: any shape, floating dtype.
        sigma: standard deviation in units of score, >= 0; 0 returns the scores themselves and draws nothing.
        generator: source of the noise. It is drawn where the generator lives, then moved: one seed gives one
            noise on every device.

    Returns:
        Noisy scores of the same shape, dtype and device; gradients pass unchanged.

    Raises:
        InputError: sigma is negative or not finite.
    """
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise InputError(f"sigma must be finite and at least 0, got {sigma}. Use 0 to switch the noise off.")
    if sigma == 0:
        return scores
    noise = torch.randn(scores.shape, generator=generator, device=generator.device, dtype=scores.dtype)
    return scores + sigma * noise.to(scores.device)


class _SoftRank(torch.autograd.Function):
    """Row-chunked eq. 5. A chunk meets only the tokens from itself on; symmetry gives the other half of the pairs."""

    @staticmethod
    def forward(scores_BN: Tensor, tau: float, chunk: int) -> Tensor:
        # Starting at 1/2, not 1, pays for the self-comparison sigmoid(0) = 1/2 that the row sums include.
        ranks_BN = torch.full_like(scores_BN, 0.5)
        for start, end in _chunks(scores_BN.shape[1], chunk):
            beaten_BCM = _gaps(scores_BN, start, end).div_(tau).sigmoid_()
            ranks_BN[:, start:end] += beaten_BCM.sum(dim=2)
            # sigmoid(-u) = 1 - sigmoid(u): what the later tokens gain from the tokens of this chunk.
            ranks_BN[:, end:] += (end - start) - beaten_BCM[:, :, end - start :].sum(dim=1)
        return ranks_BN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
        scores_BN, ctx.tau, ctx.chunk = inputs
        ctx.save_for_backward(scores_BN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor, None, None]:
        # With w_ij = sigmoid'((s_j - s_i) / tau) / tau = w_ji, the vector-Jacobian product is
        # dL/ds_m = sum_j w_mj (g_j - g_m): symmetric weights times an antisymmetric difference.
        (scores_BN,) = ctx.saved_tensors
        result_BN = torch.zeros_like(scores_BN)
        for start, end in _chunks(scores_BN.shape[1], ctx.chunk):
            # From sigmoid(-|u|) <= 1/2 the slope p - p^2 is exact to rounding however far apart two scores are.
            flow_BCM = _gaps(scores_BN, start, end).abs_().div_(-ctx.tau).sigmoid_()
            flow_BCM.addcmul_(flow_BCM, flow_BCM, value=-1)
            flow_BCM.mul_(_gaps(grad_BN, start, end))
            result_BN[:, start:end] += flow_BCM.sum(dim=2)
            result_BN[:, end:] -= flow_BCM[:, :, end - start :].sum(dim=1)
        return result_BN.div_(ctx.tau), None, None


def _chunks(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def _gaps(values_BN: Tensor, start: int, end: int) -> Tensor:
    """values_j - values_i for i in the chunk and j from the chunk's start on: [B, C, M]."""
    return values_BN[:, None, start:] - values_BN[:, start:end, None]


def _widen(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _check_scores(scores_BN: Tensor) -> None:
    if scores_BN.ndim != 2 or not scores_BN.is_floating_point():
        raise InputError(f"scores must be floating point of shape [B, N], got {scores_BN.dtype} "
                         f"{list(scores_BN.shape)}. Score every token of every sample once.")  # fmt: skip


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be positive and finite, got {value}. Anneal towards 0, not to it.")
