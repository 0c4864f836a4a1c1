"""The architecture of fashion-dit: out, a stock diffusers transformer, untrained or with the shipped weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from shiva_search.models.reference.data import shipped

CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 7,
    "sample_size": 28,
    "patch_size": 1,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 1,
    "activation_fn": "gelu-approximate",
}


def build_transformer(seed: int, layers: int = CONFIG["num_layers"]) -> nn.Module:
    """The untrained model of so many blocks.

    Modulation starts near zero, so each block starts near the identity (DiT's adaLN-zero).
    """
    torch.manual_seed(seed)
    # Any, since diffusers' types do not say that it is a module
    built: Any = DiTTransformer2DModel(**{**CONFIG, "num_layers": layers})
    model: nn.Module = built.eval()  # eval: label dropout is done on the batch, not per block
    for block in built.transformer_blocks:
        nn.init.normal_(block.norm1.linear.weight, std=0.01)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(built.proj_out_2.weight)
    nn.init.zeros_(built.proj_out_2.bias)
    return model


def layers_in(weights: dict[str, torch.Tensor]) -> int:
    """Number of blocks that a model's weights belong to."""
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))


def load_transformer() -> nn.Module:
    """The shipped model, in evaluation mode and frozen; UnavailableError where its weights are missing."""
    folder = shipped("transformer/diffusion_pytorch_model.safetensors").parent
    loaded: Any = DiTTransformer2DModel.from_pretrained(folder, local_files_only=True)
    model: nn.Module = loaded.eval()
    return model.requires_grad_(False)
