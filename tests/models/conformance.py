"""What every block family must hold. One line of FAMILY_CASES per family; test_families.py runs all checks on each.

The reference here knows nothing of adapters or hooks: blocks are replaced by modules that loop over samples and tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model

KEEP = (0.6, 0.3)  # of all blocks but the first


@dataclass(frozen=True)
class FamilyCase:
    """A small model of a family.

    Attributes:
        name: of the test.
        model_class: diffusers class.
        config: small.
        workload: fields that differ from the family's defaults.
    """

    name: str
    model_class: str
    config: dict[str, Any]
    workload: dict[str, Any]

    def module(self, seed: int = 0) -> nn.Module:
        """The model with random weights in which every block matters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: nn.Module = getattr(diffusers, self.model_class)(**self.config)
        return module.eval().requires_grad_(False)

    def model(self, seed: int = 0) -> Model:
        """The model with its workload."""
        return as_model(self.module(seed), self.name, "random weights", self.workload)


_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 4,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 2,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}  # fmt: skip
_FLUX = {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
_PIXART = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 4,
    "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 12,
}  # fmt: skip

_SD35 = {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}
_FLUX_DEV = {**_FLUX, "guidance_embeds": True}
_SIGMA = {**_PIXART, "use_additional_conditions": False}
_ALPHA = {**_PIXART, "attention_head_dim": 12, "cross_attention_dim": 24, "use_additional_conditions": True}
_FLUX_WORK = {"batch": 2, "resolution": 64, "text_tokens": 5}

FAMILY_CASES = (
    FamilyCase("dit", "DiTTransformer2DModel", _DIT, {}),
    FamilyCase("sd3", "SD3Transformer2DModel", _SD3, {"text_tokens": 5}),
    FamilyCase("sd3.5", "SD3Transformer2DModel", _SD35, {"text_tokens": 5}),
    FamilyCase("flux.1-dev", "FluxTransformer2DModel", _FLUX_DEV, _FLUX_WORK),
    FamilyCase("flux.1-schnell", "FluxTransformer2DModel", _FLUX, _FLUX_WORK),
    FamilyCase("pixart-sigma", "PixArtTransformer2DModel", _SIGMA, {"text_tokens": 5}),
    FamilyCase("pixart-alpha", "PixArtTransformer2DModel", _ALPHA, {"text_tokens": 5}),
)

#: (tokens of one sample [N, D], layer) -> scores [N], written as the scorers of the package define them.
SampleScores = Callable[[torch.Tensor, int], torch.Tensor]


class SlowBlock(nn.Module):
    """A block run one sample at a time on rows picked one token at a time."""

    def __init__(self, block: nn.Module, index: int, k: int, scores: SampleScores) -> None:
        super().__init__()
        self.block, self.index, self.k, self.scores = block, index, k, scores
        self.norm1 = getattr(block, "norm1", None)  # DiT's forward asks its first block for the embedding

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        images, contexts = [], []
        for sample in range(len(hidden_states)):
            one = {name: _of_sample(value, sample, len(hidden_states)) for name, value in kwargs.items()}
            tokens = list(hidden_states[sample])
            scores = self.scores(hidden_states[sample], self.index).tolist()
            kept = sorted(sorted(range(len(tokens)), key=lambda token: -scores[token])[: self.k])
            if kept:
                if one.get("image_rotary_emb") is not None:
                    text = one["encoder_hidden_states"].shape[1]
                    rows = [*range(text), *(text + token for token in kept)]
                    tables = one["image_rotary_emb"]
                    one["image_rotary_emb"] = tuple(torch.stack([table[row] for row in rows]) for table in tables)
                picked = torch.stack([tokens[token] for token in kept])
                output = self.block(hidden_states=picked[None], **one)
                context, updated = output if isinstance(output, tuple) else (None, output)
                for position, token in enumerate(kept):
                    tokens[token] = updated[0, position]
            else:
                context = one.get("encoder_hidden_states")
            images.append(torch.stack(tokens))
            contexts.append(context)
        batch = torch.stack(images)
        if type(self.block).__name__ == "BasicTransformerBlock":
            return batch
        return (None if contexts[0] is None else torch.cat(contexts)), batch


def _of_sample(value: Any, sample: int, count: int) -> Any:
    """One sample of an argument; rotary tables and dictionaries are for all."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value[sample : sample + 1]
    return value


def slow_copy(model: Model, row: Sequence[int], scores: SampleScores) -> nn.Module:
    """A copy of the model whose blocks are slow; the copy shares no hook and no weight with the model."""
    module = copy.deepcopy(model.module)
    index = 0
    for name in ("transformer_blocks", "single_transformer_blocks"):
        blocks = getattr(module, name, ())
        for position, block in enumerate(blocks):
            blocks[position] = SlowBlock(block, index, row[index], scores)
            index += 1
    return module


def norm_scores(tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The "norm" scorer for one sample: samples keep different tokens."""
    return tokens.norm(dim=-1)


def uniform_row(model: Model, keep: float) -> tuple[int, ...]:
    """Every block but the first at the same share of tokens."""
    return (model.tokens, *[round(keep * model.tokens)] * (model.layer_count - 1))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The raw blocks of a slow copy or of a model, in order."""
    lists = [getattr(module, name, ()) for name in ("transformer_blocks", "single_transformer_blocks")]
    return [block.block if isinstance(block, SlowBlock) else block for blocks in lists for block in blocks]
