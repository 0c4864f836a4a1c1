"""Flux.1 (Black Forest Labs, 2024): blocks with two streams, then blocks with one; positions are rotary embeddings.

Both kinds of block take image and text tokens apart and return (text, image). Rotary tables hold a row per text token,
then a row per image token; the rows of kept tokens travel with them.
"""

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
    time_embedding,
)
from shiva_search.records.workload import Workload

_PIXELS_PER_TOKEN = 16  # latents are 8x compressed and packed two by two
_RESOLUTION = 1024
_TEXT = 512


def _side(workload: Workload) -> int:
    return patches_per_side(workload.resolution or _RESOLUTION, _PIXELS_PER_TOKEN)


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return _side(workload) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, side, batch = getattr(torch, workload.dtype), _side(workload), workload.batch
    text = _TEXT if workload.text_tokens is None else workload.text_tokens

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inputs: Kwargs = {
        "hidden_states": drawn(side**2, config["in_channels"]),
        "encoder_hidden_states": drawn(text, config["joint_attention_dim"]),
        "pooled_projections": drawn(config["pooled_projection_dim"]),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    packed = example["hidden_states"]
    batch, tokens = packed.shape[:2]
    return workload.override(
        batch=batch, dtype=dtype_name(packed), resolution=FLUX.resolution_of(config, tokens),
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, batch),
    )  # fmt: skip


def _adapter(block_class: str, keys_of_all: KeysOfAll) -> BlockAdapter:
    return BlockAdapter(
        block_class,
        condition=time_embedding,
        context="encoder_hidden_states",
        returns=("context", "tokens"),
        gather=keep_rotary_rows,
        keys_of_all=keys_of_all,
    )


_FLUX_1: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}

FLUX = Family(
    name="flux",
    model_class="FluxTransformer2DModel",
    adapters={
        "FluxTransformerBlock": _adapter("FluxTransformerBlock", KeysOfAll(rotary="image_rotary_emb")),
        "FluxSingleTransformerBlock": _adapter(
            "FluxSingleTransformerBlock", KeysOfAll("norm", beside=("proj_mlp",), rotary="image_rotary_emb")
        ),
    },
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    tokens=_tokens,
    pixels_per_token=lambda config: _PIXELS_PER_TOKEN,
    example=_example,
    defaults=lambda config: Workload(batch=1, resolution=_RESOLUTION, text_tokens=_TEXT),
    workload_of=_workload_of,
    timestep_scale=1.0,
    shared=frozenset({"img_ids", "txt_ids"}),
    architectures={
        "flux.1-dev": {**_FLUX_1, "guidance_embeds": True},
        "flux.1-schnell": {**_FLUX_1, "guidance_embeds": False},
    },
    verified="exact against a loop over samples and tokens; FluxPipeline",
)
