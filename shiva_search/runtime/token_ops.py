"""Move tokens: pick, gather, scatter. In and out: plain tensors; no model is known here.

Legend: B samples, N tokens, K tokens kept, D width.
"""

from __future__ import annotations

import torch


def top_k(scores_BN: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [B, K] of the k highest scores, int64 (eq. 3); ascending on a CPU, so that memory is read in order.

    A GPU gives them in the order it finds them, the same for the same scores: sorting took as long as finding them.
    """
    kept_BK = torch.topk(scores_BN, k, dim=1, sorted=False).indices
    return kept_BK if kept_BK.is_cuda else kept_BK.sort(dim=1).values


def gather_tokens(x_BND: torch.Tensor, kept_BK: torch.Tensor) -> torch.Tensor:
    """Rows of the kept tokens: [B, N, D] -> [B, K, D] (eq. 4). A new tensor; gradients flow back to x."""
    width = x_BND.shape[-1]
    # Whole rows of one long table: several times faster than torch.gather, which takes an index per element.
    return x_BND.reshape(-1, width).index_select(0, _rows(kept_BK, x_BND.shape[1])).view(*kept_BK.shape, width)


def scatter_tokens(
    x_BND: torch.Tensor, kept_BK: torch.Tensor, updated_BKD: torch.Tensor, own: bool = False
) -> torch.Tensor:
    """x with the kept rows replaced (eq. 4). x itself is left alone, unless it is the caller's `own` to overwrite."""
    table, updated = x_BND.reshape(-1, x_BND.shape[-1]), updated_BKD.reshape(-1, x_BND.shape[-1])
    rows = _rows(kept_BK, x_BND.shape[1])
    if table.is_cuda:
        return (table.index_copy_(0, rows, updated) if own else table.index_copy(0, rows, updated)).view(x_BND.shape)
    # On a CPU index_put is a little faster.
    return (table.index_put_((rows,), updated) if own else table.index_put((rows,), updated)).view(x_BND.shape)


def _rows(kept_BK: torch.Tensor, tokens: int) -> torch.Tensor:
    """Indices into all samples' tokens one after the other, [B * K]."""
    first_B = torch.arange(0, len(kept_BK) * tokens, tokens, device=kept_BK.device)
    return (kept_BK + first_B[:, None]).view(-1)


def share_over_guidance(scores_BN: torch.Tensor) -> torch.Tensor:
    """One selection for both halves of a guidance batch: s = max(s_cond, s_uncond) (eq. 32).

    Args:
        scores_BN: [B, N], B even; rows i and B/2 + i are the two halves of one image.
    """
    shared_HN = torch.maximum(*scores_BN.chunk(2))
    return torch.cat([shared_HN, shared_HN])
