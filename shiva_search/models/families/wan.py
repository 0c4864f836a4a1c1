"""Wan 2.1 and 2.2 (Wan team, arXiv 2503.20314): tokens of a video, rotary tables in three axes.

Tokens are latent frames x height x width; plans are for videos with square frames. Wan 2.2 14B has two transformers,
for the noisy and for the late steps: each takes a plan of its own.
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
    square_side,
    take_rows,
)
from shiva_search.records.workload import Workload

_FRAMES_PER_LATENT = 4
_RESOLUTION, _FRAMES, _TEXT = 480, 81, 512


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The modulation of the timestep, [B, 6 D]."""
    modulation: torch.Tensor = kwargs["temb"]
    if modulation.ndim != 3:
        raise InputError(
            "this Wan model is called with a timestep for each token (image to video of Wan 2.2 5B), for which plans "
            "have no segment; take the plan off for it"
        )
    return modulation.flatten(1)


def _keep_rows(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """Rotary tables (cos, sin), each [1, N, 1, E], reduced to the kept rows of each sample."""
    tables = kwargs.get("rotary_emb")
    if tables is None:
        return kwargs
    return {**kwargs, "rotary_emb": tuple(take_rows(table, kept_BK) for table in tables)}


def _pixels(config: Mapping[str, Any]) -> int:
    """Per latent position and side; the autoencoder with 48 channels (Wan 2.2 5B) compresses twice as much."""
    return 16 if int(config["out_channels"] or config["in_channels"]) == 48 else 8


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _pixels(config) * int(config["patch_size"][1])


def _resolution(workload: Workload) -> int:
    return workload.resolution or _RESOLUTION


def _latents(workload: Workload) -> int:
    return latent_frames(workload.frames or _FRAMES, _FRAMES_PER_LATENT)


def _planes(config: Mapping[str, Any], workload: Workload) -> int:
    return patches_per_side(_latents(workload), int(config["patch_size"][0]))


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return _planes(config, workload) * patches_per_side(_resolution(workload), _pixels_per_token(config)) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, batch, side = getattr(torch, workload.dtype), workload.batch, _resolution(workload) // _pixels(config)
    text = _TEXT if workload.text_tokens is None else workload.text_tokens
    shape = (batch, config["in_channels"], _latents(workload), side, side)
    inputs: Kwargs = {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(batch, text, config["text_dim"], generator=generator).to(dtype),
    }
    if config["image_dim"] is not None:  # image to video: features of the first frame
        features = torch.randn(batch, 257, config["image_dim"], generator=generator)
        inputs["encoder_hidden_states_image"] = features.to(dtype)
    return inputs


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * _pixels(config),
        frames=(latent.shape[2] - 1) * _FRAMES_PER_LATENT + 1, text_tokens=example["encoder_hidden_states"].shape[1],
        guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


_WAN_2_1: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

WAN = Family(
    name="wan",
    model_class="WanTransformer3DModel",
    adapters={
        "WanTransformerBlock": BlockAdapter(
            "WanTransformerBlock",
            condition=_condition,
            gather=_keep_rows,
            keys_of_all=KeysOfAll(attention=("attn1",), rotary="rotary_emb"),
        )
    },
    block_lists=("blocks",),
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    planes=_planes,
    example=_example,
    # Its pipeline runs the two halves of guidance one after the other.
    defaults=lambda config: Workload(batch=1, resolution=_RESOLUTION, frames=_FRAMES, text_tokens=_TEXT),
    workload_of=_workload_of,
    architectures={
        "wan2.1-t2v-14b": _WAN_2_1,
        "wan2.1-t2v-1.3b": {**_WAN_2_1, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    },
    verified="exact against a loop over samples and tokens; WanPipeline",
)
