"""The architecture of fashion-dit: out, a stock diffusers transformer, untrained or with the shipped weights."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel

from shiva_search.models.reference.data import shipped

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 8,
    "sample_size": 28,
    "patch_size": 1,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 1,
    "activation_fn": "gelu-approximate",
}


def build_transformer(seed: int) -> DiTTransformer2DModel:
    """The untrained model. Modulation starts near zero, so each block starts near the identity (DiT's adaLN-zero)."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**CONFIG).eval()  # eval: label dropout is done on the batch, not per block
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.01)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model


def load_transformer() -> DiTTransformer2DModel:
    """The shipped model, in evaluation mode and frozen; UnavailableError where its weights are missing."""
    folder = shipped("transformer/diffusion_pytorch_model.safetensors").parent
    model: DiTTransformer2DModel = DiTTransformer2DModel.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)
