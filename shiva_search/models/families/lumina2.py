"""Lumina Image 2.0 (Qin et al., arXiv 2503.21758): one sequence of text and image tokens, rotary tables per sample.

Captions may differ in length: each sample's image tokens follow its own caption, and padding comes last. The two
refiner blocks before the sequence is formed stay dense: they are of the same class as the others and cost less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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
    time_embedding,
)
from shiva_search.models.joint import JointSequence
from shiva_search.records.workload import Workload

_PIXELS = 8  # per latent position and side
_TEXT = 256


def _pixels_per_token(config: Mapping[str, Any]) -> int:
    return _PIXELS * int(config["patch_size"])


def _resolution(config: Mapping[str, Any], workload: Workload) -> int:
    return workload.resolution or int(config["sample_size"]) * _PIXELS


def _tokens(config: Mapping[str, Any], workload: Workload) -> int:
    return patches_per_side(_resolution(config, workload), _pixels_per_token(config)) ** 2


def _example(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
    dtype, batch = getattr(torch, workload.dtype), workload.batch
    side, text = (
        _resolution(config, workload) // _PIXELS,
        _TEXT if workload.text_tokens is None else workload.text_tokens,
    )
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], side, side, generator=generator).to(dtype),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["cap_feat_dim"], generator=generator).to(dtype),
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.bool),
    }


def _workload_of(config: Mapping[str, Any], example: Mapping[str, Any], workload: Workload) -> Workload:
    latent = example["hidden_states"]
    return workload.override(
        batch=len(latent), dtype=dtype_name(latent), resolution=square_side(latent) * _PIXELS,
        text_tokens=example["encoder_hidden_states"].shape[1], guidance=halves_guidance(workload, len(latent)),
    )  # fmt: skip


LUMINA2 = Family(
    name="lumina2",
    model_class="Lumina2Transformer2DModel",
    adapters={
        "Lumina2TransformerBlock": joint_adapter(
            "Lumina2TransformerBlock",
            JointSequence(mask="attention_mask"),
            condition=time_embedding,
            gather=keep_sequence_rows("image_rotary_emb", "attention_mask"),
            keys_of_all=KeysOfAll(rotary="image_rotary_emb"),
        )
    },
    block_lists=("layers",),
    tokens=_tokens,
    pixels_per_token=_pixels_per_token,
    example=_example,
    # Its pipeline runs the two halves of guidance one after the other.
    defaults=lambda config: Workload(batch=1, resolution=int(config["sample_size"]) * _PIXELS, text_tokens=_TEXT),
    workload_of=_workload_of,
    timestep_scale=0.0,
    timestep_clean=1.0,
    reads_values=True,
    architectures={
        "lumina-image-2.0": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "multiple_of": 256,
            "norm_eps": 1e-5,
            "axes_dim_rope": (32, 32, 32),
            "axes_lens": (300, 512, 512),
            "cap_feat_dim": 2304,
        }
    },
    verified="exact against a loop over samples and tokens, captions of different length included; Lumina2Pipeline",
)
