"""Z-Image (Alibaba, 2025): one sequence, image tokens first, then the caption; rotary tables per sample.

The model fills image and caption up to multiples of 32 with learned tokens, which attention sees; they count as others
here and are never pruned. The refiner blocks before the sequence is formed stay dense, as in Lumina.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import (
    Family,
    KeysOfAll,
    Kwargs,
    dtype_name,
    halves_guidance,
    joint_adapter,
    keep_sequence_rows,
    patches_per_side,
    square_side,
)
from shiva_search.models.joint import JointSequence
from shiva_search.records.workload import Workload

_PIXELS = 8  # per latent position and side
_RESOLUTION = 1024
_TEXT = 128


def _condition(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    if kwargs.get("noise_mask") is not None:
        raise InputError(
            "Z-Image in omni mode modulates every token for itself, with several images in one sequence; "
            "plans are for one image per sample, so take the plan off for it"
        )
    condition: torch.Tensor = kwargs["adaln_input"]
    return condition


def _patch(config: Mapping[str, Any]) -> int:
    return int(config["all_patch_size"][0])


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _PIXELS * _patch(config)


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return patches_per_side(workload.resolution or _RESOLUTION, _pixels_per_token(config)) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, batch = getattr(torch, workload.dtype), workload.batch
    side, text = (workload.resolution or _RESOLUTION) // _PIXELS, workload.text_tokens
    text = _TEXT if text is None else text
    # The model takes a list of images and one of captions, and is as content with tensors of them.
    return {
        "x": torch.randn(batch, config["in_channels"], 1, side, side, generator=generator).to(dtype),
        "t": torch.rand(batch, generator=generator),
        "cap_feats": torch.randn(batch, text, config["cap_feat_dim"], generator=generator).to(dtype),
        "patch_size": _patch(config),
        "f_patch_size": int(config["all_f_patch_size"][0]),
    }


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    images, captions = example["x"], example["cap_feats"]
    if isinstance(images[0], list):
        raise InputError("plans are for one image per sample; Z-Image's omni mode (lists of lists) has several")
    sides = {square_side(image) for image in images}
    if len(sides) != 1:
        raise InputError(f"plans are for images of one size, this batch has sides of {sorted(sides)} latent positions")
    batch = len(images)
    return workload.override(
        batch=batch, dtype=dtype_name(images[0]), resolution=sides.pop() * _PIXELS,
        text_tokens=max(len(caption) for caption in captions), guidance=halves_guidance(workload, batch),
    )  # fmt: skip


Z_IMAGE = Family(
    name="z-image",
    model_class="ZImageTransformer2DModel",
    adapters={
        "ZImageTransformerBlock": joint_adapter(
            "ZImageTransformerBlock",
            JointSequence(image_first=True),
            condition=_condition,
            gather=keep_sequence_rows("freqs_cis", "attn_mask"),
            keys_of_all=KeysOfAll("attention_norm1", ("attention",), rotary="freqs_cis"),
            tokens="x",
        )
    },
    block_lists=("layers",),
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    example=_example,
    defaults=lambda config: Workload(batch=1, resolution=_RESOLUTION, text_tokens=_TEXT),
    workload_of=_workload_of,
    image_argument="x",
    timestep_argument="t",
    timestep_scale=0.0,
    timestep_clean=1.0,
    shared=frozenset({"patch_size", "f_patch_size"}),
    architectures={
        "z-image-turbo": {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1024, 512, 512],
        }
    },
    verified="exact against a loop over samples and tokens, captions of different length included; ZImagePipeline",
)
