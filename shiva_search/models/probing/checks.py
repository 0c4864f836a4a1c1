"""Whether what was guessed of a foreign model holds, by running it. In: adapters to try. Out: those that hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter
from shiva_search.models.model import output_tensor
from shiva_search.models.probing.calls import named_arguments, refusal
from shiva_search.models.probing.soundness import Reason, reason_against


def check(
    module: nn.Module,
    example: Mapping[str, Any],
    blocks: Sequence[nn.Module],
    guesses: Mapping[str, list[BlockAdapter]],
    tokens: int,
) -> dict[str, BlockAdapter]:
    """The first adapter of each class that holds for all of its blocks, tried on what each block gets in a forward."""
    left = {name: list(found) for name, found in guesses.items()}
    reasons: dict[str, Reason] = {}

    def try_out(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        name = type(block).__name__
        named = named_arguments(block, args, kwargs)
        while left[name]:
            reason = reason_against(block, left[name][0], named, tokens)
            if reason is None:
                return
            # Blocks that were tried before are tried again with the next guess, in another forward. What is told in
            # the end is of the guess that went furthest.
            if name not in reasons or reason.stage > reasons[name].stage:
                reasons[name] = reason
            left[name].pop(0)
            changed.add(name)

    changed = {"start"}
    while changed:
        changed.clear()
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_hook(try_out, with_kwargs=True).remove)
            module(**example)
        for name, found in left.items():
            if not found:
                raise InputError(refusal(module, f"{name} cannot be run on some of its tokens: {reasons[name].words}"))
    return {name: found[0] for name, found in left.items()}


def check_that_all_are_of_the_image(
    module: nn.Module, example: Mapping[str, Any], image: str, first: nn.Module, argument: str
) -> None:
    """That every token of the first block changes with the image: text and padding may be as many as a grid has."""
    seen: list[torch.Tensor] = []
    handle = first.register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(named_arguments(block, args, kwargs)[argument].clone()),
        with_kwargs=True,
    )
    noise = torch.randn(example[image].shape, generator=torch.Generator().manual_seed(0)).to(example[image])
    try:
        module(**example)
        module(**{**example, image: example[image] + noise})
    finally:
        handle.remove()
    changed = int((seen[0] != seen[1]).any(dim=-1).all(dim=0).sum())
    if changed < seen[0].shape[1]:
        raise InputError(
            refusal(
                module,
                f"{type(first).__name__} takes image tokens and others as one sequence (of {seen[0].shape[1]} "
                f"positions {changed} change with the image), and where they lie in other calls does not show",
            )
        )


def check_that_blocks_stand_alone(
    module: nn.Module,
    example: Mapping[str, Any],
    blocks: Sequence[nn.Module],
    adapters: Mapping[str, BlockAdapter],
    expected: torch.Tensor,
) -> None:
    """That the model uses of a block only what it hands to the next: the search starts forwards in the middle."""
    for stop in {len(blocks) // 2, len(blocks) - 1}:
        recorded: list[Any] = []
        handle = blocks[stop].register_forward_hook(lambda block, args, output: recorded.append(output))  # noqa: B023
        module(**example)
        handle.remove()
        with ExitStack() as stack:
            for place, block in enumerate(blocks[: stop + 1]):
                adapter = adapters[type(block).__name__]

                def stand_in(
                    *args: Any, block: Any = block, place: int = place, adapter: Any = adapter, **kwargs: Any
                ) -> Any:
                    if place == stop:  # noqa: B023
                        return recorded[0]  # noqa: B023
                    named = named_arguments(block, args, kwargs)
                    return adapter.pack(named[adapter.tokens], named.get(adapter.context))

                previous = block.__dict__.get("forward")
                stack.callback(_restore, block, previous)
                block.forward = stand_in
            found = output_tensor(module(**example))
        if not torch.equal(found, expected):
            raise InputError(
                refusal(
                    module,
                    f"what block {stop} of {len(blocks)} returns does not decide the output: others reach "
                    "around it (long skip connections), so plans cannot be judged",
                )
            )


def _restore(block: nn.Module, previous: Any) -> None:
    if previous is None:
        block.__dict__.pop("forward", None)
    else:
        block.forward = previous
