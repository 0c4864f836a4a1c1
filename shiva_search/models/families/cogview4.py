"""CogView4 (Zhipu AI, 2025): image and text tokens attend jointly; rotary tables have rows for image tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shiva_search.models.blocks import (
    BlockAdapter,
    Family,
    KeysOfAll,
    Kwargs,
    dtype_name,
    halves_guidance,
    keep_rotary_rows,
    patches_per_side,
    square_side,
    time_embedding,
)
from shiva_search.records.workload import Workload

_PIXELS = 8  # per latent position and side
_TEXT = 224  # prompts are padded to a multiple of 16 and may be up to 1024 long


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _PIXELS * int(config["patch_size"])


def _resolution(config: Mapping[str, Any], workload: Workload) -> int:
    return workload.resolution or int(config["sample_size"]) * _PIXELS


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return patches_per_side(_resolution(config, workload), _pixels_per_token(config)) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, pixels, batch = getattr(torch, workload.dtype), _resolution(config, workload), workload.batch
    text = _TEXT if workload.text_tokens is None else workload.text_tokens
    side = pixels // _PIXELS
    size = torch.full((batch, 2), float(pixels), dtype=dtype)
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], side, side, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, config["text_embed_dim"], generator=generator).to(dtype),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(batch, 2, dtype=dtype),
    }


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * _PIXELS,
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


COGVIEW4 = Family(
    name="cogview4",
    model_class="CogView4Transformer2DModel",
    adapters={
        "CogView4TransformerBlock": BlockAdapter(
            "CogView4TransformerBlock",
            condition=time_embedding,
            context="encoder_hidden_states",
            returns=("tokens", "context"),
            gather=keep_rotary_rows,
            keys_of_all=KeysOfAll(attention=("attn1",), rotary="image_rotary_emb"),
        )
    },
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    example=_example,
    # Its pipeline runs the two halves of guidance one after the other.
    defaults=lambda config: Workload(batch=1, resolution=int(config["sample_size"]) * _PIXELS, text_tokens=_TEXT),
    workload_of=_workload_of,
    architectures={
        "cogview4-6b": {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 28,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "text_embed_dim": 4096,
            "time_embed_dim": 512,
            "condition_dim": 256,
            "pos_embed_max_size": 128,
            "sample_size": 128,
            "rope_axes_dim": (256, 256),
        }
    },
    verified="exact against a loop over samples and tokens; CogView4Pipeline",
)
