"""How a block family carries its tokens: which argument, which output, what condition. In: a block. Out: an adapter.

A new family is one file in models/families/ and one line in its __init__.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.joint import CONTEXT, START, JointSequence, apart, around, rows_of_kept, take_rows
from shiva_search.records.workload import Workload

Kwargs = dict[str, Any]


def keep_rows(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """The default companion gather: nothing travels with the tokens (positions were added at the input)."""
    return kwargs


class PerSampleTable:
    """Rotary rows that differ from sample to sample, [B, S, E], where a block expects one [S, E] for all.

    diffusers' apply_rotary_emb makes room for the batch itself, by indexing its table with None first; QwenImage's
    reads complex tables, by unsqueeze(1). Here the batch axis is already there, so the same reading yields [B, S, E]
    laid out for the block. Any attention processor that reads in these ways takes it as it is; any other use of the
    table fails loudly, for there is nothing else to call.
    """

    def __init__(self, rows_BSE: torch.Tensor) -> None:
        self.rows_BSE = rows_BSE

    def __getitem__(self, index: Any) -> torch.Tensor:
        if not isinstance(index, tuple) or len(index) != 4 or index[0] is not None:
            raise self._unknown(repr(index))
        return self.rows_BSE[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> torch.Tensor:
        """[B, S, 1, E], for readers that lay [S, 1, E] beside [B, S, heads, E]."""
        if dim != 1:
            raise self._unknown(f"unsqueeze({dim})")
        return self.rows_BSE.unsqueeze(2)

    @staticmethod
    def _unknown(reading: str) -> InputError:
        return InputError(
            f"this attention processor reads rotary tables by {reading}, which is not known to be sound where "
            "samples keep different tokens; run one sample at a time or use the model's own processor"
        )


def keep_sequence_rows(*names: str) -> Callable[[Kwargs, torch.Tensor, int], Kwargs]:
    """A gather for blocks of one joint sequence: arguments [B, S, ...] with a row per position keep what stays."""

    def gather(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
        length = tokens + kwargs[CONTEXT].shape[1]
        rows_BS = rows_of_kept(kwargs[START], kept_BK, tokens, length)
        return {
            **kwargs,
            **{name: take_rows(kwargs[name], rows_BS) for name in names if kwargs.get(name) is not None},
        }

    return gather


def keep_rotary_rows(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """Rotary tables (cos, sin), each [T + N, E] with T text rows first, reduced to the text and the kept rows."""
    tables = kwargs.get("image_rotary_emb")
    if tables is None:
        return kwargs
    text = len(tables[0]) - tokens
    text_BT = torch.arange(text, device=kept_BK.device).expand(len(kept_BK), text)
    rows_BS = torch.cat([text_BT, kept_BK + text], dim=1)
    if len(rows_BS) == 1:
        reduced: tuple[Any, ...] = tuple(table_SE[rows_BS[0]] for table_SE in tables)
    else:
        reduced = tuple(PerSampleTable(table_SE[rows_BS]) for table_SE in tables)
    return {**kwargs, "image_rotary_emb": reduced}


def keep_masked_columns(kwargs: Kwargs, kept_BK: torch.Tensor, tokens: int) -> Kwargs:
    """A mask over image tokens as keys, [B, 1, N] or [1, 1, N], reduced to the kept ones."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    mask_BQN = mask.expand(len(kept_BK), -1, -1)
    return {**kwargs, "attention_mask": mask_BQN.gather(2, kept_BK[:, None].expand(-1, mask_BQN.shape[1], -1))}


def time_embedding(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The embedding of timestep and pooled condition that blocks get as `temb`, [B, D]."""
    condition: torch.Tensor = kwargs["temb"]
    return condition


def patches_per_side(pixels: int, pixels_per_patch: int) -> int:
    """Side of the square grid of image tokens.

    Raises:
        InputError: the resolution does not divide evenly.
    """
    if pixels % pixels_per_patch:
        raise InputError(f"the resolution must be a multiple of {pixels_per_patch} pixels for this model, got {pixels}")
    return pixels // pixels_per_patch


def latent_frames(frames: int, frames_per_latent: int) -> int:
    """Latent frames of a video: the first frame stands alone, the others are compressed together.

    Raises:
        InputError: the number of frames does not come out even.
    """
    if (frames - 1) % frames_per_latent:
        raise InputError(
            f"the frames of this model are a multiple of {frames_per_latent} and one more, got --frames {frames}"
        )
    return (frames - 1) // frames_per_latent + 1


def square_side(latent: torch.Tensor) -> int:
    """Height and width of a latent [B, C, H, W].

    Raises:
        InputError: height and width differ.
    """
    height, width = latent.shape[-2:]
    if height != width:
        raise InputError(f"plans are made for square images, this latent is {height} x {width}; pass a square example")
    return int(height)


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def halves_guidance(workload: Workload, batch: int) -> bool:
    """Whether a batch of this size can still hold the two halves of guidance."""
    return workload.guidance and batch % 2 == 0


@dataclass(frozen=True)
class KeysOfAll:
    """The parts of a block class that let kept tokens attend to the keys and values of all; see attend_all.py.

    Attributes:
        norm: what runs before the attention. Between the two, tokens may be modulated but not mixed.
        attention: all that read the normed tokens as a sequence.
        beside: parts that read the normed tokens each alone, and are wanted for kept ones only.
        rotary: the argument with rotary tables, which the adapter's gather reduces to the rows of kept tokens.
        cuts_by_input: the attention's processor cuts text and image apart behind as many tokens as it was given.
    """

    norm: str = "norm1"
    attention: tuple[str, ...] = ("attn",)
    beside: tuple[str, ...] = ()
    rotary: str | None = None
    cuts_by_input: bool = False


@dataclass(frozen=True)
class BlockAdapter:
    """Everything the runtime must know of one block class.

    Attributes:
        block_class: the class name.
        tokens: the argument with image tokens, [B, N, D].
        context: the argument with context tokens that the block returns updated, or None.
        returns: the order of outputs, some of "tokens" and "context"; a single one comes bare, several as a tuple.
        condition: (block, kwargs) -> [B, C], the backbone's own embedding of timestep and condition.
        gather: (kwargs, kept_BK, N) -> kwargs with what belongs to single tokens (rotary rows) reduced to the kept.
        joint: where the image tokens lie, if `tokens` holds others as well; see joint_adapter.
        keys_of_all: how kept tokens attend to the keys and values of all; None where the block class does not allow it.
    """

    block_class: str
    condition: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]
    tokens: str = "hidden_states"
    context: str | None = None
    returns: tuple[str, ...] = ("tokens",)
    gather: Callable[[Kwargs, torch.Tensor, int], Kwargs] = keep_rows
    joint: JointSequence | None = None
    keys_of_all: KeysOfAll | None = None

    def split(self, kwargs: Mapping[str, Any], tokens: int) -> Kwargs:
        """A call of the block as the runtime knows it, with N image tokens alone in the argument `tokens`."""
        return dict(kwargs) if self.joint is None else self.joint.split(kwargs, self.tokens, tokens)

    def join(self, kwargs: Mapping[str, Any]) -> Kwargs:
        """Inverse of split."""
        return dict(kwargs) if self.joint is None else self.joint.join(kwargs, self.tokens)

    def apart(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward as the runtime calls it."""
        return forward if self.joint is None else apart(forward, self.joint, self.tokens)

    def around(self, pruned: Callable[..., Any], arguments: tuple[str, ...], tokens: int) -> Callable[..., Any]:
        """What stands in for the block's forward as the model calls it."""
        return pruned if self.joint is None else around(pruned, self.joint, self.tokens, arguments, tokens)

    def unpack(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split a block's output into image tokens [B, N, D] and context (or None)."""
        if len(self.returns) == 1:
            return output, None
        named = dict(zip(self.returns, output, strict=True))
        return named["tokens"], named.get("context")

    def pack(self, tokens_BND: torch.Tensor, context: torch.Tensor | None) -> Any:
        """Inverse of unpack."""
        if len(self.returns) == 1:
            return tokens_BND
        named = {"tokens": tokens_BND, "context": context}
        return tuple(named[name] for name in self.returns)


def joint_adapter(
    block_class: str,
    joint: JointSequence,
    condition: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor],
    gather: Callable[[Kwargs, torch.Tensor, int], Kwargs] = keep_rows,
    tokens: str = "hidden_states",
    keys_of_all: KeysOfAll | None = None,
) -> BlockAdapter:
    """The adapter of a block that takes image tokens and others as one sequence and returns it."""
    return BlockAdapter(
        block_class,
        condition,
        tokens=tokens,
        context=CONTEXT,
        returns=("context", "tokens"),
        gather=gather,
        joint=joint,
        keys_of_all=keys_of_all,
    )


def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Positional argument names of a block's forward, so that calls of any shape can be read by name."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY))


@dataclass(frozen=True)
class Family:
    """A family of transformers.

    Attributes:
        name: short name ("dit", "sd3").
        model_class: diffusers class name.
        block_lists: names of the module lists that hold the blocks, in order of execution.
        adapters: by block class name.
        timestep_scale: the model's timestep at pure noise (1000 for most, 1 for Flux).
        timestep_clean: the model's timestep of a clean image (0 for most; Lumina counts the other way, from 1 to 0).
        timestep_argument, image_argument: of the model's forward: noise level [B], noisy latents [B, ...].
        tokens: (config, workload) -> image tokens N.
        pixels_per_token: config -> side of an image token, pixels.
        example: (config, workload, generator) -> keyword arguments of one forward, random values, workload's dtype.
        defaults: config -> the workload of its published use (batch, resolution, text tokens, guidance).
        workload_of: (config, keyword arguments of one forward, workload) -> the workload with what they show.
        planes: (config, workload) -> grids of image tokens one behind the other in time; 1 for images.
        shared: arguments without a batch axis, the same for all samples.
        reads_values: its forward looks at values (lengths of captions), so that it cannot run on the meta device.
        architectures: published configurations by name, for models with random weights.
        verified: what is known to hold, for `shiva-search models`.
    """

    name: str
    model_class: str
    adapters: Mapping[str, BlockAdapter]
    tokens: Callable[[Mapping[str, Any], Workload], int]
    pixels_per_token: Callable[[Mapping[str, Any]], int]
    example: Callable[[Mapping[str, Any], Workload, torch.Generator], Kwargs]
    defaults: Callable[[Mapping[str, Any]], Workload]
    workload_of: Callable[[Mapping[str, Any], Mapping[str, Any], Workload], Workload]
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    timestep_scale: float = 1000.0
    timestep_clean: float = 0.0
    timestep_argument: str = "timestep"
    image_argument: str = "hidden_states"
    planes: Callable[[Mapping[str, Any], Workload], int] = lambda config, workload: 1
    shared: frozenset[str] = frozenset()
    reads_values: bool = False
    architectures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    verified: str = ""

    def resolution_of(self, config: Mapping[str, Any], tokens: int, planes: int | None = None) -> int:
        """Side in pixels of the square image with so many tokens.

        Args:
            planes: grids of tokens in time; None: those of the default workload.

        Raises:
            InputError: no square image has as many.
        """
        planes = self.planes(config, self.defaults(config)) if planes is None else planes
        side = isqrt(tokens // planes)
        if planes * side**2 != tokens:
            times = "" if planes == 1 else f" in {planes} planes"
            raise InputError(
                f"plans are made for square images, {tokens} image tokens{times} are none; pass a square example"
            )
        return side * self.pixels_per_token(config)

    def adapter_of(self, block: nn.Module) -> BlockAdapter:
        """The adapter of a block.

        Raises:
            InputError: the block's class is not one of this family's.
        """
        name = type(block).__name__
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise InputError(f"no adapter for block class {name} in family {self.name!r} (known: {known})")
        return self.adapters[name]
