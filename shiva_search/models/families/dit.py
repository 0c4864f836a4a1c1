"""DiT (Peebles and Xie, arXiv 2212.09748): class-conditional, positions added at the input, condition in the norms."""

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


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Timestep plus class embedding [B, D], computed by the block's own modulation."""
    embed: nn.Module = block.norm1.emb  # type: ignore[union-attr, assignment]
    condition: torch.Tensor = embed(
        kwargs["timestep"], kwargs["class_labels"], hidden_dtype=kwargs["hidden_states"].dtype
    )
    return condition


def _size(config: Mapping[str, Any], workload: Workload) -> int:
    """Side of the latent."""
    if workload.resolution is None:
        return int(config["sample_size"])
    return workload.resolution // _pixels(config)


def _pixels(config: Mapping[str, Any]) -> int:
    """Per latent position: published DiT works on 8x compressed latents, a model of one channel works on pixels."""
    return 1 if config["in_channels"] == 1 else 8


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _pixels(config) * int(config["patch_size"])


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    pixels = workload.resolution or int(config["sample_size"]) * _pixels(config)
    return patches_per_side(pixels, _pixels_per_token(config)) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    size, dtype = _size(config, workload), getattr(torch, workload.dtype)
    shape = (workload.batch, config["in_channels"], size, size)
    classes = int(config["num_embeds_ada_norm"])
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "timestep": torch.rand(workload.batch, generator=generator) * 1000,
        "class_labels": torch.randint(0, classes, (workload.batch,), generator=generator),
    }


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    pixels = _pixels(config)
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * pixels,
        guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


DIT = Family(
    name="dit",
    model_class="DiTTransformer2DModel",
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
    defaults=lambda config: Workload(batch=2, guidance=True),
    workload_of=_workload_of,
    architectures={
        "dit-xl-2": {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "activation_fn": "gelu-approximate",
        }
    },
    verified="exact against a loop over samples and tokens; DiTPipeline",
)
