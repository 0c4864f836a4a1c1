"""PixArt-alpha and Sigma (Chen et al., arXiv 2310.00426, 2403.04692): one modulation for all blocks, text apart.

Positions are added at the input. Blocks get the six modulation vectors of the timestep in one tensor, [B, 6 D], which
is their condition; they look at the caption by cross-attention, and it stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shiva_search.models.blocks import (
    BlockAdapter,
    Family,
    KeysOfAll,
    Kwargs,
    dtype_name,
    halves_guidance,
    keep_masked_columns,
    patches_per_side,
    square_side,
)
from shiva_search.records.workload import Workload

_PIXELS = 8  # per latent position and side
_TEXT_ALPHA, _TEXT_SIGMA = 120, 300


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The modulation of the timestep, [B, 6 D]."""
    modulation: torch.Tensor = kwargs["timestep"]
    return modulation.reshape(len(kwargs["hidden_states"]), -1)


def _resolution(config: Mapping[str, Any], workload: Workload) -> int:
    return workload.resolution or int(config["sample_size"]) * _PIXELS


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _PIXELS * int(config["patch_size"])


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return patches_per_side(_resolution(config, workload), _pixels_per_token(config)) ** 2


def _knows_size(config: Mapping[str, Any]) -> bool:
    """Whether resolution and aspect ratio are inputs: where not said, the model decides by its sample size."""
    said = config.get("use_additional_conditions")
    return int(config["sample_size"]) == 128 if said is None else bool(said)


def _text(config: Mapping[str, Any]) -> int:
    return _TEXT_SIGMA if config.get("use_additional_conditions") is False else _TEXT_ALPHA


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, pixels, batch = getattr(torch, workload.dtype), _resolution(config, workload), workload.batch
    text = _text(config) if workload.text_tokens is None else workload.text_tokens
    width = config["caption_channels"] or config["cross_attention_dim"]
    side = pixels // _PIXELS
    size: Kwargs = {"resolution": None, "aspect_ratio": None}
    if _knows_size(config):
        size = {
            "resolution": torch.full((batch, 2), float(pixels), dtype=dtype),
            "aspect_ratio": torch.ones(batch, 1, dtype=dtype),
        }
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], side, side, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, width, generator=generator).to(dtype),
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.int64),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "added_cond_kwargs": size,
    }


def _defaults(config: Mapping[str, Any]) -> Workload:
    return Workload(batch=2, guidance=True, resolution=int(config["sample_size"]) * _PIXELS, text_tokens=_text(config))


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * _PIXELS,
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


_XL_2: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
}

PIXART = Family(
    name="pixart",
    model_class="PixArtTransformer2DModel",
    adapters={
        "BasicTransformerBlock": BlockAdapter(
            "BasicTransformerBlock",
            condition=_condition,
            gather=keep_masked_columns,
            keys_of_all=KeysOfAll(attention=("attn1",)),
        )
    },
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    example=_example,
    defaults=_defaults,
    workload_of=_workload_of,
    architectures={
        "pixart-sigma": {**_XL_2, "interpolation_scale": 2, "use_additional_conditions": False},
        "pixart-alpha": {**_XL_2, "use_additional_conditions": True},
    },
    verified="exact against a loop over samples and tokens; PixArtSigmaPipeline",
)
