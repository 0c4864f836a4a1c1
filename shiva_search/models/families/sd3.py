"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): image and text tokens attend jointly, positions added at
the input. In SD3.5 Medium the first blocks attend a second time among image tokens only; both attentions see the kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shiva_search.errors import InputError
from shiva_search.models.blocks import (
    BlockAdapter,
    Family,
    KeysOfAll,
    Kwargs,
    dtype_name,
    halves_guidance,
    patches_per_side,
    square_side,
    time_embedding,
)
from shiva_search.records.workload import Workload

_PIXELS = 8  # per latent position and side
_TEXT = 333  # 77 of CLIP and 256 of T5


def _resolution(config: Mapping[str, Any], workload: Workload) -> int:
    return workload.resolution or int(config["sample_size"]) * _PIXELS


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _PIXELS * int(config["patch_size"])


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    pixels = _resolution(config, workload)
    side, most = patches_per_side(pixels, _pixels_per_token(config)), int(config["pos_embed_max_size"])
    if side > most:
        largest = most * _pixels_per_token(config)
        raise InputError(f"this model has positions for up to {largest} pixels a side, got --resolution {pixels}")
    return side**2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, side = getattr(torch, workload.dtype), _resolution(config, workload) // _PIXELS
    text = _TEXT if workload.text_tokens is None else workload.text_tokens

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(workload.batch, *shape, generator=generator).to(dtype)

    return {
        "hidden_states": drawn(config["in_channels"], side, side),
        "encoder_hidden_states": drawn(text, config["joint_attention_dim"]),
        "pooled_projections": drawn(config["pooled_projection_dim"]),
        "timestep": torch.rand(workload.batch, generator=generator) * 1000,
    }


def _defaults(config: Mapping[str, Any]) -> Workload:
    return Workload(batch=2, guidance=True, resolution=int(config["sample_size"]) * _PIXELS, text_tokens=_TEXT)


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * _PIXELS,
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

SD3 = Family(
    name="sd3",
    model_class="SD3Transformer2DModel",
    adapters={
        "JointTransformerBlock": BlockAdapter(
            "JointTransformerBlock",
            condition=time_embedding,
            context="encoder_hidden_states",
            returns=("context", "tokens"),
            keys_of_all=KeysOfAll(attention=("attn", "attn2"), cuts_by_input=True),
        )
    },
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    example=_example,
    defaults=_defaults,
    workload_of=_workload_of,
    architectures={
        "sd3.5-medium": {
            **_MEDIUM,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "sd3.5-large": {
            **_MEDIUM,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
        "sd3-medium": _MEDIUM,
    },
    verified="exact against a loop over samples and tokens; StableDiffusion3Pipeline",
)
