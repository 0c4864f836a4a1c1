"""Flux.2 (Black Forest Labs, 2025): blocks with two streams, then blocks over one sequence of text and image tokens.

One modulation serves all blocks of a kind. Rotary tables hold a row per text token, then a row per image token.
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
    joint_adapter,
    keep_rotary_rows,
    patches_per_side,
)
from shiva_search.models.joint import JointSequence
from shiva_search.records.workload import Workload

_PIXELS_PER_TOKEN = 16  # latents are 8x compressed and packed two by two
_RESOLUTION = 1024
_TEXT = 512


def _condition(argument: str) -> Any:
    """The modulation of the attention (shift, scale, gate), [B, 3 D], which both kinds of block have."""

    def condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
        modulation: torch.Tensor = kwargs[argument]
        cached = (kwargs.get("joint_attention_kwargs") or {}).get("kv_cache_mode")
        if modulation.ndim != 2 or cached is not None:
            raise InputError(
                "Flux.2 with reference images in a cache of keys and values modulates every token for itself; "
                "plans are for one image per sample, so take the plan off for it"
            )
        width = kwargs["hidden_states"].shape[-1]
        return modulation[:, : 3 * width]

    return condition


def _side(workload: Workload) -> int:
    return patches_per_side(workload.resolution or _RESOLUTION, _PIXELS_PER_TOKEN)


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return _side(workload) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, side, batch = getattr(torch, workload.dtype), _side(workload), workload.batch
    text = _TEXT if workload.text_tokens is None else workload.text_tokens
    one, along = torch.arange(1), torch.arange(side)
    inputs: Kwargs = {
        "hidden_states": torch.randn(batch, side**2, config["in_channels"], generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator).to(dtype),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": torch.cartesian_prod(one, along, along, one),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(text)),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.full((batch,), 4.0)
    return inputs


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    packed = example["hidden_states"]
    batch, tokens = packed.shape[:2]
    return workload.override(
        batch=batch, dtype=dtype_name(packed), resolution=FLUX2.resolution_of(config, tokens),
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, batch),
    )  # fmt: skip


FLUX2 = Family(
    name="flux2",
    model_class="Flux2Transformer2DModel",
    adapters={
        "Flux2TransformerBlock": BlockAdapter(
            "Flux2TransformerBlock",
            condition=_condition("temb_mod_img"),
            context="encoder_hidden_states",
            returns=("context", "tokens"),
            gather=keep_rotary_rows,
            keys_of_all=KeysOfAll(rotary="image_rotary_emb"),
        ),
        # One linear layer makes queries, keys, values and the MLP's input: keys of all tokens would save little.
        "Flux2SingleTransformerBlock": joint_adapter(
            "Flux2SingleTransformerBlock",
            JointSequence(),
            condition=_condition("temb_mod"),
            gather=keep_rotary_rows,
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
        "flux.2-dev": {
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": 8,
            "num_single_layers": 48,
            "attention_head_dim": 128,
            "num_attention_heads": 48,
            "joint_attention_dim": 15360,
            "axes_dims_rope": (32, 32, 32, 32),
            "guidance_embeds": True,
        }
    },
    verified="exact against a loop over samples and tokens; Flux2Pipeline",
)
