"""Qwen-Image (Wu et al., arXiv 2508.02324): two streams, complex rotary tables, image and text apart."""

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
    PerSampleTable,
    dtype_name,
    halves_guidance,
    patches_per_side,
)
from shiva_search.records.workload import Workload

_PIXELS_PER_TOKEN = 16  # latents are 8x compressed and packed two by two
_RESOLUTION = 1024
_TEXT = 256


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    if kwargs.get("modulate_index") is not None:
        raise InputError(
            "this Qwen-Image model modulates reference images apart (zero_cond_t); plans are for one image per sample, "
            "so take the plan off for it"
        )
    condition: torch.Tensor = kwargs["temb"]
    return condition


def _keep_image_rows(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """The image's table [N, E] reduced to the kept rows; the text's stays."""
    if kwargs.get("image_rotary_emb") is None:
        return kwargs
    image_NE, text_TE = kwargs["image_rotary_emb"]
    image = image_NE[kept_BK[0]] if len(kept_BK) == 1 else PerSampleTable(image_NE[kept_BK])
    return {**kwargs, "image_rotary_emb": (image, text_TE)}


def _side(workload: Workload) -> int:
    return patches_per_side(workload.resolution or _RESOLUTION, _PIXELS_PER_TOKEN)


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return _side(workload) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, side, batch = getattr(torch, workload.dtype), _side(workload), workload.batch
    text = _TEXT if workload.text_tokens is None else workload.text_tokens
    return {
        "hidden_states": torch.randn(batch, side**2, config["in_channels"], generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator).to(dtype),
        "encoder_hidden_states_mask": torch.ones(batch, text, dtype=torch.bool),
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [[(1, side, side)]],  # the model reads the first sample's and takes it for all
    }


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    packed = example["hidden_states"]
    batch, tokens = packed.shape[:2]
    return workload.override(
        batch=batch, dtype=dtype_name(packed), resolution=QWEN_IMAGE.resolution_of(config, tokens),
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, batch),
    )  # fmt: skip


QWEN_IMAGE = Family(
    name="qwen-image",
    model_class="QwenImageTransformer2DModel",
    adapters={
        "QwenImageTransformerBlock": BlockAdapter(
            "QwenImageTransformerBlock",
            condition=_condition,
            context="encoder_hidden_states",
            returns=("context", "tokens"),
            gather=_keep_image_rows,
            keys_of_all=KeysOfAll("img_norm1", rotary="image_rotary_emb"),
        )
    },
    tokens=_tokens,
    pixels_per_token=lambda config: _PIXELS_PER_TOKEN,
    example=_example,
    # Its pipeline runs the two halves of guidance one after the other.
    defaults=lambda config: Workload(batch=1, resolution=_RESOLUTION, text_tokens=_TEXT),
    workload_of=_workload_of,
    timestep_scale=1.0,
    shared=frozenset({"img_shapes"}),
    architectures={
        "qwen-image": {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        }
    },
    verified="exact against a loop over samples and tokens; QwenImagePipeline",
)
