"""AuraFlow (fal, 2024): a few blocks with two streams, then blocks over one sequence of text and image tokens.

Positions are added at the input. Eight learned registers stand before the text and are part of it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
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
    joint_adapter,
    patches_per_side,
    square_side,
    time_embedding,
)
from shiva_search.models.joint import JointSequence
from shiva_search.records.workload import Workload

_PIXELS = 8  # per latent position and side
_TEXT = 256
_LARGEST = 1024  # pixels a side in its published use


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _PIXELS * int(config["patch_size"])


def _most(config: Mapping[str, Any]) -> int:
    """Pixels a side for which the model has positions."""
    return isqrt(int(config["pos_embed_max_size"])) * _pixels_per_token(config)


def _resolution(config: Mapping[str, Any], workload: Workload) -> int:
    return workload.resolution or min(_LARGEST, _most(config))


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    pixels = _resolution(config, workload)
    if pixels > _most(config):
        raise InputError(f"this model has positions for up to {_most(config)} pixels a side, got --resolution {pixels}")
    return patches_per_side(pixels, _pixels_per_token(config)) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, side = getattr(torch, workload.dtype), _resolution(config, workload) // _PIXELS
    text = _TEXT if workload.text_tokens is None else workload.text_tokens

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(workload.batch, *shape, generator=generator).to(dtype)

    return {
        "hidden_states": drawn(config["in_channels"], side, side),
        "encoder_hidden_states": drawn(text, config["joint_attention_dim"]),
        "timestep": torch.rand(workload.batch, generator=generator),
    }


def _defaults(config: Mapping[str, Any]) -> Workload:
    return Workload(batch=2, guidance=True, resolution=min(_LARGEST, _most(config)), text_tokens=_TEXT)


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * _PIXELS,
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


AURAFLOW = Family(
    name="auraflow",
    model_class="AuraFlowTransformer2DModel",
    adapters={
        "AuraFlowJointTransformerBlock": BlockAdapter(
            "AuraFlowJointTransformerBlock",
            condition=time_embedding,
            context="encoder_hidden_states",
            returns=("context", "tokens"),
            keys_of_all=KeysOfAll(),
        ),
        "AuraFlowSingleTransformerBlock": joint_adapter(
            "AuraFlowSingleTransformerBlock", JointSequence(), condition=time_embedding, keys_of_all=KeysOfAll()
        ),
    },
    block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    example=_example,
    defaults=_defaults,
    workload_of=_workload_of,
    timestep_scale=1.0,
    architectures={
        "auraflow-v0.3": {
            "sample_size": 64,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 4,
            "num_single_dit_layers": 32,
            "attention_head_dim": 256,
            "num_attention_heads": 12,
            "joint_attention_dim": 2048,
            "caption_projection_dim": 3072,
            "pos_embed_max_size": 9216,
        }
    },
    verified="exact against a loop over samples and tokens; AuraFlowPipeline",
)
