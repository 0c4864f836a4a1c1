"""What every block family must hold. One line of FAMILY_CASES per family; test_families.py runs all checks on each.

The reference here knows nothing of adapters or hooks: blocks are replaced by modules that loop over samples and tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept

KEEP = (0.6, 0.3)  # of all blocks but the first


@dataclass(frozen=True)
class FamilyCase:
    """A small model of a family.

    Attributes:
        name: of the test.
        model_class: diffusers class.
        config: small.
        workload: fields that differ from the family's defaults.
        inputs: (example) -> None, changes the example in place to what is worth a case of its own.
    """

    name: str
    model_class: str
    config: dict[str, Any]
    workload: dict[str, Any]
    inputs: Callable[[dict[str, Any]], None] = lambda example: None

    def module(self, seed: int = 0) -> nn.Module:
        """The model with random weights in which every block matters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: nn.Module = getattr(diffusers, self.model_class)(**self.config)
        return module.eval().requires_grad_(False)

    def model(self, seed: int = 0) -> Model:
        """The model with its workload."""
        return as_model(self.module(seed), self.name, "random weights", self.workload)

    def example(self, model: Model, seed: int) -> dict[str, Any]:
        """Inputs of one forward."""
        inputs = model.example(seed)
        self.inputs(inputs)
        return inputs


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

_AURAFLOW = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 2,
    "num_single_dit_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
    "caption_projection_dim": 16, "pos_embed_max_size": 144,
}  # fmt: skip
_COGVIEW4 = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
    "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 20, "condition_dim": 4, "sample_size": 8,
    "rope_axes_dim": (16, 16),
}  # fmt: skip
_LUMINA2 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4),
    "axes_lens": (32, 16, 16), "cap_feat_dim": 12,
}  # fmt: skip
_FLUX2 = {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 12, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
_QWEN = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 4, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_Z_IMAGE = {
    "in_channels": 4, "dim": 24, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 12, "axes_dims": [4, 4, 4], "axes_lens": [128, 16, 16],
}  # fmt: skip
_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 4, "rope_max_seq_len": 32,
}  # fmt: skip
_LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "num_layers": 4, "caption_channels": 12,
}  # fmt: skip

_SD35 = {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}
_FLUX_DEV = {**_FLUX, "guidance_embeds": True}
_SIGMA = {**_PIXART, "use_additional_conditions": False}
_ALPHA = {**_PIXART, "attention_head_dim": 12, "cross_attention_dim": 24, "use_additional_conditions": True}
_WAN_I2V = {**_WAN, "in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 24}
_TINY = {"batch": 2, "resolution": 64, "text_tokens": 5}


def _uneven_captions(example: dict[str, Any]) -> None:
    """The second caption is shorter: the image tokens of the two samples do not lie at the same place."""
    if "cap_feats" in example:  # a list: Z-Image fills captions up to a multiple of 32 each
        long = torch.cat([example["cap_feats"][0]] * 8)
        example["cap_feats"] = [long, example["cap_feats"][1]]
    else:
        example["encoder_attention_mask"][1, 3:] = False


def _masked_text(example: dict[str, Any]) -> None:
    """The second prompt is padded."""
    example["encoder_hidden_states_mask"][1, 2:] = False


FAMILY_CASES = (
    FamilyCase("dit", "DiTTransformer2DModel", _DIT, {}),
    FamilyCase("sd3", "SD3Transformer2DModel", _SD3, {"text_tokens": 5}),
    FamilyCase("sd3.5", "SD3Transformer2DModel", _SD35, {"text_tokens": 5}),
    FamilyCase("flux.1-dev", "FluxTransformer2DModel", _FLUX_DEV, _TINY),
    FamilyCase("flux.1-schnell", "FluxTransformer2DModel", _FLUX, _TINY),
    FamilyCase("pixart-sigma", "PixArtTransformer2DModel", _SIGMA, {"text_tokens": 5}),
    FamilyCase("pixart-alpha", "PixArtTransformer2DModel", _ALPHA, {"text_tokens": 5}),
    FamilyCase("auraflow", "AuraFlowTransformer2DModel", _AURAFLOW, _TINY),
    FamilyCase("cogview4", "CogView4Transformer2DModel", _COGVIEW4, _TINY),
    FamilyCase("lumina2", "Lumina2Transformer2DModel", _LUMINA2, _TINY),
    FamilyCase("lumina2-uneven", "Lumina2Transformer2DModel", _LUMINA2, _TINY, _uneven_captions),
    FamilyCase("flux2", "Flux2Transformer2DModel", _FLUX2, _TINY),
    FamilyCase("qwen-image", "QwenImageTransformer2DModel", _QWEN, _TINY),
    FamilyCase("qwen-image-masked", "QwenImageTransformer2DModel", _QWEN, _TINY, _masked_text),
    FamilyCase("z-image", "ZImageTransformer2DModel", _Z_IMAGE, _TINY),
    FamilyCase("z-image-uneven", "ZImageTransformer2DModel", _Z_IMAGE, _TINY, _uneven_captions),
    FamilyCase("wan", "WanTransformer3DModel", _WAN, {**_TINY, "frames": 5}),
    FamilyCase("wan-i2v", "WanTransformer3DModel", _WAN_I2V, {**_TINY, "frames": 1, "text_tokens": 512}),
    FamilyCase("ltx-video", "LTXVideoTransformer3DModel", _LTX, {**_TINY, "resolution": 128, "frames": 9}),
)


@dataclass(frozen=True)
class Reading:
    """How a person reads the forward of a block class in the diffusers sources; written anew, not from the adapters.

    Attributes:
        tokens: the argument with image tokens.
        image: they are "alone" in it, or "first" or "last" in a sequence with others.
        tables: arguments with a row per position: (name, axis), or (name, axis, element) of a pair.
        ends: the argument with true where a sample goes on.
        outputs: what comes back, in order.
        keys_of_all: whether keys and values are made apart from the rest of its work, so that all tokens can have them.
    """

    tokens: str = "hidden_states"
    image: str = "alone"
    tables: tuple[tuple[Any, ...], ...] = ()
    ends: str | None = None
    outputs: tuple[str, ...] = ("tokens",)
    keys_of_all: bool = True


_ROPE = ("image_rotary_emb", 0)
_CONTEXT_FIRST = ("context", "tokens")
READINGS = {
    "BasicTransformerBlock": Reading(),
    "JointTransformerBlock": Reading(outputs=_CONTEXT_FIRST),
    "FluxTransformerBlock": Reading(tables=(_ROPE,), outputs=_CONTEXT_FIRST),
    "FluxSingleTransformerBlock": Reading(tables=(_ROPE,), outputs=_CONTEXT_FIRST),
    "AuraFlowJointTransformerBlock": Reading(outputs=_CONTEXT_FIRST),
    "AuraFlowSingleTransformerBlock": Reading(image="last"),
    "CogView4TransformerBlock": Reading(tables=(_ROPE,), outputs=("tokens", "context")),
    "Lumina2TransformerBlock": Reading(
        image="last", tables=(("image_rotary_emb", 1), ("attention_mask", 1)), ends="attention_mask"
    ),
    "Flux2TransformerBlock": Reading(tables=(_ROPE,), outputs=_CONTEXT_FIRST),
    "Flux2SingleTransformerBlock": Reading(image="last", tables=(_ROPE,), keys_of_all=False),
    "QwenImageTransformerBlock": Reading(tables=((*_ROPE, 0),), outputs=_CONTEXT_FIRST),
    "ZImageTransformerBlock": Reading(tokens="x", image="first", tables=(("freqs_cis", 1), ("attn_mask", 1))),
    "WanTransformerBlock": Reading(tables=(("rotary_emb", 1),)),
    "LTXVideoTransformerBlock": Reading(tables=(("image_rotary_emb", 1),)),
}

#: (tokens of one sample [N, D], layer) -> scores [N], written as the scorers of the package define them.
SampleScores = Callable[[torch.Tensor, int], torch.Tensor]


class SlowBlock(nn.Module):
    """A block run one sample at a time on rows picked one token at a time.

    Where kept tokens attend to all (`Kept.attend`), each of them, and the context, is what the dense block makes of it:
    what a token becomes depends on the keys and values of the others, not on their queries.
    """

    def __init__(self, block: nn.Module, index: int, k: int, tokens: int, scores: SampleScores) -> None:
        super().__init__()
        self.block, self.index, self.k, self.tokens, self.scores = block, index, k, tokens, scores
        self.reading = READINGS[type(block).__name__]
        self.norm1 = getattr(block, "norm1", None)  # DiT's forward asks its first block for the embedding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = inspect.signature(self.block.forward).bind(*args, **kwargs).arguments
        sequences = named.pop(self.reading.tokens)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.reading.outputs}
        for sample in range(len(sequences)):
            one = {name: _of_sample(value, sample, len(sequences)) for name, value in named.items()}
            for name, value in zip(self.reading.outputs, self._run(list(sequences[sample]), one), strict=True):
                parts[name].append(value)
        batches = [None if parts[name][0] is None else torch.cat(parts[name]) for name in self.reading.outputs]
        return batches[0] if len(batches) == 1 else tuple(batches)

    def _run(self, rows: list[torch.Tensor], one: dict[str, Any]) -> list[Any]:
        """What comes out for one sample, in the order of the block's outputs."""
        first = self._first(len(rows), one)
        image = rows[first : first + self.tokens]
        scores = self.scores(torch.stack(image), self.index).tolist()
        kept = sorted(sorted(range(len(image)), key=lambda token: -scores[token])[: self.k])
        found = {"tokens": torch.stack(rows)[None], "context": one.get("encoder_hidden_states")}
        if kept:
            left = [*range(first), *(first + token for token in kept), *range(first + self.tokens, len(rows))]
            seen = list(range(len(rows))) if Kept.of(self.k).attend == "all" else left
            picked = torch.stack([rows[position] for position in seen])[None]
            tables = {} if seen is not left else self._tables(one, kept)
            output = self.block(**{**one, **tables, self.reading.tokens: picked})
            found = dict(zip(self.reading.outputs, output if isinstance(output, tuple) else (output,), strict=True))
            for position in left:
                rows[position] = found["tokens"][0, seen.index(position)]
            found["tokens"] = torch.stack(rows)[None]
        return [found[name] for name in self.reading.outputs]

    def _first(self, length: int, one: dict[str, Any]) -> int:
        """Where the image tokens begin."""
        if self.reading.image != "last":
            return 0
        ends = None if self.reading.ends is None else one[self.reading.ends]
        return (length if ends is None else int(ends.sum())) - self.tokens

    def _tables(self, one: dict[str, Any], kept: list[int]) -> dict[str, Any]:
        """The arguments with a row per position, with the rows of tokens that are left out left out."""
        changed = {}
        for name, axis, *element in self.reading.tables:
            value = one.get(name)
            if value is None:
                continue
            wanted = element or range(len(value)) if isinstance(value, tuple) else [None]
            picked = [
                self._left(table, axis, kept, one) if number in wanted else table
                for number, table in (enumerate(value) if isinstance(value, tuple) else [(None, value)])
            ]
            changed[name] = tuple(picked) if isinstance(value, tuple) else picked[0]
        return changed

    def _left(self, table: torch.Tensor, axis: int, kept: list[int], one: dict[str, Any]) -> torch.Tensor:
        length = table.shape[axis]
        if self.reading.image == "alone":  # text rows, if the table has any, come first
            first = length - self.tokens
        else:
            first = self._first(length, one)
        left = [*range(first), *(first + token for token in kept), *range(first + self.tokens, length)]
        return torch.stack([table.select(axis, row) for row in left], dim=axis)


def _of_sample(value: Any, sample: int, count: int) -> Any:
    """One sample of an argument; tables without a batch axis and dictionaries are for all."""
    if isinstance(value, tuple):
        return tuple(_of_sample(item, sample, count) for item in value)
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value[sample : sample + 1]
    return value


_LISTS = ("joint_transformer_blocks", "transformer_blocks", "single_transformer_blocks", "layers", "blocks")


def slow_copy(model: Model, row: Sequence[int], scores: SampleScores) -> nn.Module:
    """A copy of the model whose blocks are slow; the copy shares no hook and no weight with the model."""
    module = copy.deepcopy(model.module)
    index = 0
    for name in _LISTS:
        blocks = getattr(module, name, ())
        for position, block in enumerate(blocks):
            blocks[position] = SlowBlock(block, index, row[index], model.tokens, scores)
            index += 1
    return module


def norm_scores(tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The "norm" scorer for one sample: samples keep different tokens."""
    return tokens.norm(dim=-1)


def uniform_row(model: Model, keep: float) -> tuple[int, ...]:
    """Every block but the first at the same share of tokens."""
    return (model.tokens, *[round(keep * model.tokens)] * (model.layer_count - 1))


def attending_row(model: Model, keep: float) -> tuple[Kept, ...]:
    """The same where kept tokens attend to all in every block that allows it."""
    return tuple(
        Kept(k, 0, "all" if layer.attends_all else "kept")
        for k, layer in zip(uniform_row(model, keep), model.layers, strict=True)
    )


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The raw blocks of a slow copy or of a model, in order."""
    lists = [getattr(module, name, ()) for name in _LISTS]
    return [block.block if isinstance(block, SlowBlock) else block for blocks in lists for block in blocks]
