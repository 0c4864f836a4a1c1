"""LTX-Video (HaCohen et al., arXiv 2501.00103): packed tokens of a video, rotary tables per sample.

Tokens are latent frames x height x width; plans are for videos with square frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import (
    BlockAdapter,
    Family,
    KeysOfAll,
    Kwargs,
    dtype_name,
    halves_guidance,
    latent_frames,
    patches_per_side,
    take_rows,
)
from shiva_search.records.workload import Workload

_PIXELS_PER_TOKEN, _FRAMES_PER_LATENT = 32, 8
_RESOLUTION, _FRAMES, _TEXT = 512, 161, 128
_FRAMES_PER_SECOND = 25


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The modulation of the timestep, [B, 6 D]."""
    modulation: torch.Tensor = kwargs["temb"]
    if modulation.shape[1] != 1:
        raise InputError(
            "this LTX model is called with a timestep for each token (image to video), for which plans have no "
            "segment; take the plan off for it"
        )
    return modulation.flatten(1)


def _keep_rows(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """Rotary tables (cos, sin), each [B, N, E], reduced to the kept rows of each sample."""
    tables = kwargs.get("image_rotary_emb")
    if tables is None:
        return kwargs
    return {**kwargs, "image_rotary_emb": tuple(take_rows(table, kept_BK) for table in tables)}


def _side(workload: Workload) -> int:
    return patches_per_side(workload.resolution or _RESOLUTION, _PIXELS_PER_TOKEN)


def _planes(config: Mapping[str, Any], workload: Workload) -> int:
    return latent_frames(workload.frames or _FRAMES, _FRAMES_PER_LATENT)


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return _planes(config, workload) * _side(workload) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, batch, side = getattr(torch, workload.dtype), workload.batch, _side(workload)
    planes, text = _planes(config, workload), _TEXT if workload.text_tokens is None else workload.text_tokens
    shape = (batch, planes * side**2, config["in_channels"])
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, config["caption_channels"], generator=generator).to(dtype),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.int64),
        "num_frames": planes,
        "height": side,
        "width": side,
        "rope_interpolation_scale": (
            _FRAMES_PER_LATENT / _FRAMES_PER_SECOND,
            float(_PIXELS_PER_TOKEN),
            float(_PIXELS_PER_TOKEN),
        ),
    }


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    packed = example["hidden_states"]
    (batch, tokens), planes = packed.shape[:2], example.get("num_frames")
    if planes is None:
        raise InputError("an example of LTX needs num_frames, height and width, as its pipeline gives them")
    return workload.override(
        batch=batch, dtype=dtype_name(packed), resolution=LTX.resolution_of(config, tokens, planes),
        frames=(planes - 1) * _FRAMES_PER_LATENT + 1, text_tokens=example["encoder_hidden_states"].shape[1],
        guidance=halves_guidance(workload, batch),
    )  # fmt: skip


LTX = Family(
    name="ltx-video",
    model_class="LTXVideoTransformer3DModel",
    adapters={
        "LTXVideoTransformerBlock": BlockAdapter(
            "LTXVideoTransformerBlock",
            condition=_condition,
            gather=_keep_rows,
            keys_of_all=KeysOfAll(attention=("attn1",), rotary="image_rotary_emb"),
        )
    },
    tokens=_tokens,
    pixels_per_token=lambda config: _PIXELS_PER_TOKEN,
    planes=_planes,
    example=_example,
    defaults=lambda config: Workload(batch=2, guidance=True, resolution=_RESOLUTION, frames=_FRAMES, text_tokens=_TEXT),
    workload_of=_workload_of,
    shared=frozenset({"num_frames", "height", "width", "rope_interpolation_scale"}),
    architectures={
        "ltx-video": {
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "patch_size_t": 1,
            "num_attention_heads": 32,
            "attention_head_dim": 64,
            "cross_attention_dim": 2048,
            "num_layers": 28,
            "caption_channels": 4096,
        }
    },
    verified="exact against a loop over samples and tokens; LTXPipeline",
)
