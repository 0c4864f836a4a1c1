"""Blocks that take image tokens and others as one sequence. In: such a call. Out: the same call with the two apart.

The runtime prunes blocks whose image tokens come alone. Where a model glues text, registers or padding to them, the
sequence is cut before the pruned block and glued again behind it, so that the runtime sees one kind of block only.

Legend: B samples, S positions, N image tokens, T = S - N others, K image tokens kept, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Names that the others, and where the image tokens begin, have in a call with the two apart.
CONTEXT, START = "joint_context", "joint_start"

Start = int | torch.Tensor


@dataclass(frozen=True)
class JointSequence:
    """Where image tokens lie among others in a sequence [B, S, D].

    Attributes:
        image_first: image tokens come first; otherwise they come last, before what pads a sample.
        mask: the argument that says where samples of different length end, [B, S], or None where all end at S.
    """

    image_first: bool = False
    mask: str | None = None

    def split(self, kwargs: Mapping[str, Any], argument: str, tokens: int) -> dict[str, Any]:
        """The call with N image tokens in `argument`, the others in CONTEXT."""
        sequence_BSD: torch.Tensor = kwargs[argument]
        start = self._start(kwargs, sequence_BSD.shape[1], tokens)
        image_BND, others_BTD = split_sequence(sequence_BSD, start, tokens)
        return {**kwargs, argument: image_BND, CONTEXT: others_BTD, START: start}

    def join(self, kwargs: Mapping[str, Any], argument: str) -> dict[str, Any]:
        """Inverse of split, for any number of image tokens."""
        joined = dict(kwargs)
        others_BTD, start = joined.pop(CONTEXT), joined.pop(START)
        return {**joined, argument: join_sequence(others_BTD, joined[argument], start)}

    def _start(self, kwargs: Mapping[str, Any], length: int, tokens: int) -> Start:
        if self.image_first:
            return 0
        mask_BS = None if self.mask is None else kwargs.get(self.mask)
        # A plain int also where a tracer counts operations and lengths are tensors.
        return int(length) - tokens if mask_BS is None else mask_BS.bool().sum(dim=1) - tokens


def split_sequence(sequence_BSD: torch.Tensor, start: Start, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image tokens [B, N, D] and the others [B, T, D] in their order."""
    if isinstance(start, int):
        before, image_BND, behind = sequence_BSD.split(
            [start, tokens, sequence_BSD.shape[1] - start - tokens], dim=1
        )  # fmt: skip
        if not before.shape[1] or not behind.shape[1]:
            return image_BND, behind if not before.shape[1] else before
        return image_BND, torch.cat([before, behind], dim=1)
    first_B1 = start[:, None]
    image_BN = first_B1 + torch.arange(tokens, device=start.device)
    others_T = torch.arange(sequence_BSD.shape[1] - tokens, device=start.device)
    others_BT = others_T + tokens * (others_T >= first_B1)
    return take_rows(sequence_BSD, image_BN), take_rows(sequence_BSD, others_BT)


def join_sequence(others_BTD: torch.Tensor, image_BKD: torch.Tensor, start: Start) -> torch.Tensor:
    """The sequence [B, T + K, D] with the image tokens at `start`."""
    if isinstance(start, int):
        return torch.cat([others_BTD[:, :start], image_BKD, others_BTD[:, start:]], dim=1)
    others, kept = others_BTD.shape[1], image_BKD.shape[1]
    position = torch.arange(others + kept, device=start.device)
    first_B1 = start[:, None]
    behind = torch.where(position < first_B1 + kept, others + position - first_B1, position - kept)
    return take_rows(torch.cat([others_BTD, image_BKD], dim=1), torch.where(position < first_B1, position, behind))


def rows_of_kept(start: Start, kept_BK: torch.Tensor, tokens: int, length: int) -> torch.Tensor:
    """Positions [B, T + K] in the full sequence of what is left of it: all others, and the kept image tokens."""
    if isinstance(start, int):
        position = torch.arange(length, device=kept_BK.device).expand(len(kept_BK), -1)
        return torch.cat([position[:, :start], start + kept_BK, position[:, start + tokens :]], dim=1)
    kept = kept_BK.shape[1]
    position = torch.arange(length - tokens + kept, device=kept_BK.device)
    first_B1 = start[:, None]
    among_kept = (position - first_B1).clamp(0, kept - 1)
    image = first_B1 + kept_BK.gather(1, among_kept)
    behind = torch.where(position < first_B1 + kept, image, position - kept + tokens)
    return torch.where(position < first_B1, position, behind)


def take_rows(table_BSX: torch.Tensor, rows_BK: torch.Tensor) -> torch.Tensor:
    """Rows of each sample's own table: [B or 1, S, ...] -> [B, K, ...]."""
    tail = table_BSX.shape[2:]
    table_BSX = table_BSX.expand(len(rows_BK), *table_BSX.shape[1:])
    index = rows_BK.reshape(*rows_BK.shape, *[1] * len(tail)).expand(*rows_BK.shape, *tail)
    return table_BSX.gather(1, index)


def apart(forward: Callable[..., Any], joint: JointSequence, argument: str) -> Callable[..., Any]:
    """A block's forward that takes and gives image tokens and others apart: (others, image tokens)."""

    def call(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output_BSD = forward(**joint.join(kwargs, argument))
        image_BKD, others_BTD = split_sequence(output_BSD, kwargs[START], kwargs[argument].shape[1])
        return others_BTD, image_BKD

    return call


def around(
    pruned: Callable[..., Any], joint: JointSequence, argument: str, arguments: tuple[str, ...], tokens: int
) -> Callable[..., Any]:
    """The inverse of `apart`, for a block that stands in for the model's own."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        named = joint.split({**kwargs, **dict(zip(arguments, args, strict=False))}, argument, tokens)
        others_BTD, image_BND = pruned(**named)
        return join_sequence(others_BTD, image_BND, named[START])

    return call
