"""DiT (Peebles and Xie, arXiv 2212.09748): class-conditional, positions added at the input, condition inside the norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shiva_search.models.blocks import BlockAdapter, Family, Kwargs
from shiva_search.records.workload import Workload


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Timestep plus class embedding [B, D], computed by the block's own modulation."""
    embed: nn.Module = block.norm1.emb  # type: ignore[union-attr, assignment]
    condition: torch.Tensor = embed(
        kwargs["timestep"], kwargs["class_labels"], hidden_dtype=kwargs["hidden_states"].dtype
    )
    return condition


def _size(config: Mapping[str, Any], workload: Workload) -> int:
    """Side of the latent. Published DiT works on 8x compressed latents; a model of one channel works on pixels."""
    if workload.resolution is None:
        return int(config["sample_size"])
    return workload.resolution if config["in_channels"] == 1 else workload.resolution // 8


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return (_size(config, workload) // int(config["patch_size"])) ** 2


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
    pixels = 1 if config["in_channels"] == 1 else 8
    return workload.override(
        batch=len(latent), dtype=str(latent.dtype).removeprefix("torch."), resolution=latent.shape[-1] * pixels,
        guidance=workload.guidance and len(latent) % 2 == 0,
    )  # fmt: skip


DIT = Family(
    name="dit",
    model_class="DiTTransformer2DModel",
    adapters={"BasicTransformerBlock": BlockAdapter("BasicTransformerBlock", condition=_condition)},
    tokens=_tokens,
    example=_example,
    defaults=lambda config: Workload(batch=2, guidance=True),
    workload_of=_workload_of,
)
