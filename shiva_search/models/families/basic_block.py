"""diffusers' BasicTransformerBlock where kept tokens attend to the keys and values of all: DiT and PixArt.

The block itself would make keys of the tokens it is given. Its parts take queries and keys apart, so they are called
here one by one, in the block's own order; test_families.py holds this against the block run whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shiva_search.models.joint import take_rows


def attend_all(
    block: nn.Module, kwargs: Mapping[str, Any], kept_BK: torch.Tensor, x_kept_BKD: torch.Tensor
) -> torch.Tensor:
    """The block's output for the kept tokens, [B, K, D]: queries of these, keys and values of all.

    Args:
        block: with adaptive norms, of the "zero" (DiT) or the "single" kind (PixArt).
        kwargs: of the block, with all tokens.
        kept_BK: indices of the kept tokens.
        x_kept_BKD: the kept tokens.
    """
    part: Any = block  # its parts are known to diffusers alone
    x_BND: torch.Tensor = kwargs["hidden_states"]
    single = part.norm_type == "ada_norm_single"
    if single:
        table_B6D = part.scale_shift_table[None] + kwargs["timestep"].reshape(len(x_BND), 6, -1)
        shift_msa, scale_msa, gate_msa, shift, scale, gate = table_B6D.chunk(6, dim=1)
        normed_BND = part.norm1(x_BND) * (1 + scale_msa) + shift_msa
    else:
        normed_BND, *vectors = part.norm1(x_BND, kwargs["timestep"], kwargs["class_labels"], hidden_dtype=x_BND.dtype)
        gate_msa, shift, scale, gate = (vector_BD[:, None] for vector_BD in vectors)
    options = kwargs.get("cross_attention_kwargs") or {}
    attended_BKD = part.attn1(
        take_rows(normed_BND, kept_BK), encoder_hidden_states=normed_BND,
        attention_mask=kwargs.get("attention_mask"), **options,
    )  # fmt: skip
    hidden_BKD: torch.Tensor = gate_msa * attended_BKD + x_kept_BKD
    if part.attn2 is not None:
        hidden_BKD = hidden_BKD + part.attn2(
            hidden_BKD if single else part.norm2(hidden_BKD),
            encoder_hidden_states=kwargs.get("encoder_hidden_states"),
            attention_mask=kwargs.get("encoder_attention_mask"),
            **options,
        )
    norm = part.norm2 if single else part.norm3
    out_BKD: torch.Tensor = gate * part.ff(norm(hidden_BKD) * (1 + scale) + shift) + hidden_BKD
    return out_BKD
