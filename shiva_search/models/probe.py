"""Find out how a transformer without an adapter carries its tokens, by running it. In: module, inputs. Out: a Family.

What is looked for: lists of blocks that are called one after the other with image tokens [B, N, D], N fitting the grid
of the noisy image, and return them; the context they return along; what belongs to single tokens (rotary tables,
masks). All of it is a guess until soundness.py has run every block on permuted tokens. What does not hold is refused.

Legend: B samples, N image tokens, T context tokens, S positions, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, product
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter, Family, Kwargs, argument_names, dtype_name, halves_guidance
from shiva_search.models.model import output_tensor
from shiva_search.models.soundness import Reason, Travel, gather_of, reason_against
from shiva_search.records.workload import Workload

_LEAST_TOKENS = 4
_MOST_GUESSES = 64
_TIMESTEPS = ("timestep", "timesteps", "t", "time", "times", "sigma", "sigmas", "noise_level")
_CONDITIONS = ("temb", "emb", "cond", "conditioning", "c", "t_emb", "vec", "modulation", "adaln_input", "timestep", "y")


@dataclass(frozen=True)
class Call:
    """One call of a block: shapes only.

    Attributes:
        order: of its start among all calls.
        named: arguments by name, tensors on the meta device.
        output: what came back.
    """

    order: int
    named: Kwargs
    output: Any


def probe(module: nn.Module, example: Mapping[str, Any]) -> tuple[Family, Workload]:
    """The family of a transformer, made from one dense forward and checked on all of its blocks.

    Args:
        module: anything that maps the example to a prediction of the noisy image's shape.
        example: keyword arguments of one forward, at least two samples.

    Raises:
        InputError: nothing was found, or it is not sound to leave tokens out; names the block class and what failed.
    """
    with at_rest(module):
        first, second = (_forward(module, example) for _ in range(2))
        if not torch.equal(first, second):
            raise InputError(_no(module, "two forwards of the same inputs differ, so nothing can be checked"))
        batch = len(first)
        image = _image_argument(module, example, first)
        calls = _record(module, example)
        lists, tokens = _block_lists(module, calls, example, image, batch)
        blocks = [block for name in lists for block in module.get_submodule(name).children()]
        guesses = _guesses(module, [(block, calls[block]) for block in blocks], batch, tokens)
        _check_that_all_are_of_the_image(module, example, image, blocks[0], guesses[type(blocks[0]).__name__][0].tokens)
        adapters = _check(module, example, blocks, guesses, tokens)
        _check_that_blocks_stand_alone(module, example, blocks, adapters, first)
    family = _family(module, example, image, lists, adapters, tokens)
    return family, family.workload_of({}, example, family.defaults({}))


def _forward(module: nn.Module, example: Mapping[str, Any]) -> torch.Tensor:
    try:
        return output_tensor(module(**example))
    except Exception as error:  # whatever a foreign module raises
        first = (str(error).splitlines() or [""])[0]
        raise InputError(_no(module, f"it does not run on the example ({type(error).__name__}: {first})")) from error


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _no(module: nn.Module, reason: str) -> str:
    return (
        f"no adapter for model class {type(module).__name__!r}, and the probe cannot stand in for one: {reason} "
        "(CONTRIBUTING.md says how to write an adapter)"
    )


# ---- what the model's arguments are ----------------------------------------------------------------------------------


def _tensors(example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}


def _image_argument(module: nn.Module, example: Mapping[str, Any], output: torch.Tensor) -> str:
    """The argument that lies on the same grid as the prediction."""
    batch = len(output)
    if batch < 2:
        raise InputError(_no(module, "an example of one sample does not show what belongs to a sample; give two"))
    grid = output.shape[1:2] if output.ndim == 3 else output.shape[2:]
    found = [
        name
        for name, value in _tensors(example).items()
        if value.is_floating_point()
        and value.ndim == output.ndim >= 3
        and len(value) == batch
        and (value.shape[1:2] if value.ndim == 3 else value.shape[2:]) == grid
    ]
    if len(found) != 1:
        said = f"arguments {', '.join(found)} all lie" if found else "no argument lies"
        raise InputError(_no(module, f"{said} on the grid of its output {tuple(output.shape)}, one should"))
    return found[0]


def _grid_lengths(image: torch.Tensor) -> set[int]:
    """Numbers of tokens that a patch embedding can make of an image [B, C, H, W], a video or packed tokens."""
    if image.ndim == 3:
        return {image.shape[1]}
    *time, height, width = image.shape[2:]
    planes = {1}
    for frames in time:
        planes = {frames // patch for patch in range(1, frames + 1) if frames % patch == 0}
    patches = [patch for patch in range(1, min(height, width) + 1) if height % patch == 0 and width % patch == 0]
    return {plane * (height // patch) * (width // patch) for plane in planes for patch in patches}


# ---- where the blocks are --------------------------------------------------------------------------------------------


def _record(module: nn.Module, example: Mapping[str, Any]) -> dict[nn.Module, Call]:
    """The calls of all modules in module lists in one forward; one called twice is left out."""
    started, calls, twice = {}, {}, set()
    order = count()

    def begin(block: nn.Module, args: Any, kwargs: Any) -> None:
        started[block] = next(order)

    def end(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if block in calls:
            twice.add(block)
        calls[block] = Call(started[block], _to_meta(_named(block, args, kwargs)), _to_meta(output))

    with ExitStack() as stack:
        for part in module.modules():
            for block in part.children() if isinstance(part, nn.ModuleList) else ():
                stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(end, with_kwargs=True).remove)
        module(**example)
    return {block: call for block, call in calls.items() if block not in twice}


def _named(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kwargs:
    return {**kwargs, **dict(zip(argument_names(type(block).forward)[1:], args, strict=False))}


def _to_meta(value: Any) -> Any:
    return tree_map(lambda item: item.to("meta") if isinstance(item, torch.Tensor) else item, value)


def _block_lists(
    module: nn.Module, calls: Mapping[nn.Module, Call], example: Mapping[str, Any], image: str, batch: int
) -> tuple[tuple[str, ...], int]:
    """Names of the lists of blocks in order of execution, and the number of image tokens."""
    texts = {
        value.shape[1]
        for name, value in _tensors(example).items()
        if name != image and len(value.shape) == (3 if value.is_floating_point() else 2) and len(value) == batch
    }
    possible = {length for length in _grid_lengths(example[image]) if length >= _LEAST_TOKENS}
    sizes: dict[str, set[int]] = {}
    for name, part in module.named_modules():
        blocks = list(part.children()) if isinstance(part, nn.ModuleList) else []
        inside = any(name.startswith(f"{other}.") for other in sizes)
        if inside or not blocks or any(block not in calls or not list(block.children()) for block in blocks):
            continue
        if [calls[block].order for block in blocks] == sorted(calls[block].order for block in blocks):
            shared = set.intersection(*(_lengths(calls[block], batch) for block in blocks))
            if shared:
                sizes[name] = shared
    votes = {length: sum(length in found for found in sizes.values()) for length in possible - texts}
    best = [length for length, number in votes.items() if number and number == max(votes.values())]
    if len(best) != 1:
        seen = sorted(set().union(*sizes.values())) if sizes else []
        raise InputError(
            _no(module, f"its blocks, called one after the other in a ModuleList, should take and return image tokens; "
                f"the image allows {_few(possible)} of them, the text has {_few(texts)}, the blocks take {_few(seen)}")
        )  # fmt: skip
    tokens = best[0]
    for name, found in sizes.items():
        longer = [length for length in found if length > tokens and length not in texts]
        if tokens not in found and longer:
            block = type(next(module.get_submodule(name).children())).__name__
            raise InputError(
                _no(module, f"{block} takes image tokens and others as one sequence ({longer[0]} positions, of which "
                    f"{tokens} are image tokens), and which are which does not show")
            )  # fmt: skip
    lists = [name for name, found in sizes.items() if tokens in found]
    lists.sort(key=lambda name: calls[next(module.get_submodule(name).children())].order)
    orders = [calls[block].order for name in lists for block in module.get_submodule(name).children()]
    if orders != sorted(orders):
        raise InputError(_no(module, f"the lists {', '.join(lists)} take turns, where one should follow the other"))
    return tuple(lists), tokens


def _lengths(call: Call, batch: int) -> set[int]:
    """Token axes of the sequences that a block takes and returns in the same shape."""
    outputs = call.output if isinstance(call.output, (tuple, list)) else (call.output,)
    returned = {tuple(item.shape) for item in outputs if isinstance(item, torch.Tensor)}
    taken = [value for value in call.named.values() if isinstance(value, torch.Tensor)]
    return {
        value.shape[1]
        for value in taken
        if value.ndim == 3 and len(value) == batch and value.is_floating_point() and tuple(value.shape) in returned
    }


def _few(values: Any) -> str:
    return ", ".join(map(str, sorted(values))) or "none"


# ---- how a block carries tokens --------------------------------------------------------------------------------------


def _guesses(
    module: nn.Module, calls: Sequence[tuple[nn.Module, Call]], batch: int, tokens: int
) -> dict[str, list[BlockAdapter]]:
    """Adapters by block class, the likeliest first; the same for all blocks of a class."""
    by_class: dict[str, list[Call]] = {}
    for block, call in calls:
        by_class.setdefault(type(block).__name__, []).append(call)
    return {name: _guesses_of(module, name, found, batch, tokens) for name, found in by_class.items()}


def _guesses_of(module: nn.Module, name: str, calls: Sequence[Call], batch: int, tokens: int) -> list[BlockAdapter]:
    argument, context, returns = _streams(module, name, calls, batch, tokens)
    named = calls[0].named
    length = 0 if context is None else named[context].shape[1]
    leaves = dict(_leaves({key: value for key, value in named.items() if key not in (argument, context)}))
    options = {path: _options(path, leaf, batch, tokens, length) for path, leaf in leaves.items()}
    options = {path: found for path, found in options.items() if found}
    condition = _condition(named, argument, {argument, context, *(path[0] for path in options)}, batch)
    base = BlockAdapter(name, condition, tokens=argument, context=context, returns=returns)
    guesses = [
        replace(base, gather=gather_of([travel for travel in chosen if travel is not None]))
        for chosen in product(*((*found, None) for found in options.values()))
    ]
    if len(guesses) > _MOST_GUESSES:
        raise InputError(_no(module, f"{name} has {len(options)} arguments as long as its tokens, too many to try out"))
    return guesses


def _streams(
    module: nn.Module, name: str, calls: Sequence[Call], batch: int, tokens: int
) -> tuple[str, str | None, tuple[str, ...]]:
    """The argument with tokens, the one with context, and the order in which both come back."""
    for call in calls:
        outputs = call.output if isinstance(call.output, tuple) else (call.output,)
        shapes = [tuple(item.shape) if isinstance(item, torch.Tensor) else None for item in outputs]
        taken = {
            key: tuple(value.shape)
            for key, value in call.named.items()
            if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()
        }
        sequences = [key for key, shape in taken.items() if shape[:2] == (batch, tokens) and shape in shapes]
        if len(sequences) != 1 or shapes.count(taken[sequences[0]]) != 1:
            raise InputError(
                _no(module, f"{name} should take and return one sequence of {tokens} tokens, not {_few(sequences)}; "
                    "where the text is as long as the image, give an example with another text")
            )  # fmt: skip
        if len(outputs) > 2 or (isinstance(call.output, tuple) and len(outputs) < 2):
            raise InputError(_no(module, f"{name} returns {len(outputs)} values in a tuple, and tokens may come alone "
                                 "or with their context"))  # fmt: skip
        place = shapes.index(taken[sequences[0]])
        if len(outputs) == 1:
            return sequences[0], None, ("tokens",)
        other = shapes[1 - place]
        contexts = [key for key, shape in taken.items() if shape == other and key != sequences[0]]
        if other is None:
            continue  # the last block of some models returns no context; the others tell which it is
        if len(contexts) != 1:
            raise InputError(_no(module, f"what {name} returns besides its tokens is none of its arguments"))
        return sequences[0], contexts[0], ("tokens", "context") if place == 0 else ("context", "tokens")
    raise InputError(_no(module, f"{name} returns its tokens with None, so its context is not known"))


def _leaves(named: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int | str | None], torch.Tensor]]:
    """Tensors among arguments, and one level down in tuples, lists and dicts."""
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            yield (name, None), value
        elif isinstance(value, (tuple, list, Mapping)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for place, item in items:
                if isinstance(item, torch.Tensor):
                    yield (name, place), item


def _options(
    path: tuple[str, int | str | None], leaf: torch.Tensor, batch: int, tokens: int, context: int
) -> list[Travel]:
    """Ways in which a tensor may belong to single tokens; empty where it cannot."""
    lengths = {tokens, tokens + context}
    axes = tuple(
        axis
        for axis, size in enumerate(leaf.shape)
        if size in lengths and (axis == 0 or leaf.shape[0] in (1, batch)) and not (axis == 0 and size == batch)
    )
    if not axes:
        return []
    several = [axes] if len(axes) > 1 else []
    starts = ("last", "first") if any(leaf.shape[axis] != tokens for axis in axes) else ("last",)
    return [Travel(path, chosen, start) for chosen in (*several, *((axis,) for axis in axes)) for start in starts]


def _condition(
    named: Mapping[str, Any], tokens: str, taken: set[Any], batch: int
) -> Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]:
    """What a block is told of timestep and condition, [B, C]: an embedding where there is one, else bare numbers."""
    free = {
        name: value
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and name not in taken and value.ndim and len(value) == batch
    }
    wide = [name for name, value in free.items() if value.ndim > 1 and value.is_floating_point()]
    wide.sort(key=lambda name: (_CONDITIONS.index(name) if name in _CONDITIONS else len(_CONDITIONS), free[name].ndim))
    if wide and (free[wide[0]].ndim == 2 or wide[0] in _CONDITIONS):
        chosen = wide[0]
        return lambda block, kwargs: kwargs[chosen].flatten(1)
    bare = [name for name, value in free.items() if value.ndim == 1]

    def numbers(block: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
        if not bare:
            return torch.zeros(len(kwargs[tokens]), 1, device=kwargs[tokens].device)
        return torch.stack([kwargs[name].float() for name in bare], dim=1)

    return numbers


# ---- whether it holds ------------------------------------------------------------------------------------------------


def _check(
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
        named = _named(block, args, kwargs)
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
                raise InputError(_no(module, f"{name} cannot be run on some of its tokens: {reasons[name].words}"))
    return {name: found[0] for name, found in left.items()}


def _check_that_all_are_of_the_image(
    module: nn.Module, example: Mapping[str, Any], image: str, first: nn.Module, argument: str
) -> None:
    """That every token of the first block changes with the image: text and padding may be as many as a grid has."""
    seen: list[torch.Tensor] = []
    handle = first.register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(_named(block, args, kwargs)[argument].clone()), with_kwargs=True
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
            _no(module, f"{type(first).__name__} takes image tokens and others as one sequence (of {seen[0].shape[1]} "
                f"positions {changed} change with the image), and where they lie in other calls does not show")
        )  # fmt: skip


def _check_that_blocks_stand_alone(
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
                    named = _named(block, args, kwargs)
                    return adapter.pack(named[adapter.tokens], named.get(adapter.context))

                previous = block.__dict__.get("forward")
                stack.callback(_restore, block, previous)
                block.forward = stand_in
            found = output_tensor(module(**example))
        if not torch.equal(found, expected):
            raise InputError(
                _no(module, f"what block {stop} of {len(blocks)} returns does not decide the output: others reach "
                    "around it (long skip connections), so plans cannot be judged")
            )  # fmt: skip


def _restore(block: nn.Module, previous: Any) -> None:
    if previous is None:
        block.__dict__.pop("forward", None)
    else:
        block.forward = previous


# ---- the family ------------------------------------------------------------------------------------------------------


def _family(
    module: nn.Module,
    example: Mapping[str, Any],
    image: str,
    lists: tuple[str, ...],
    adapters: Mapping[str, BlockAdapter],
    tokens: int,
) -> Family:
    batch = len(example[image])
    timestep = next((name for name in _TIMESTEPS if name in example), None)
    if timestep is None:
        raise InputError(
            _no(module, f"no argument is called as the noise level of a sample usually is ({', '.join(_TIMESTEPS)})")
        )
    times = torch.as_tensor(example[timestep])
    if times.ndim > 1 or (times.ndim == 1 and len(times) != batch):
        raise InputError(
            _no(module, f"{timestep} should be one noise level for each sample, and is {tuple(times.shape)}")
        )
    texts = [adapter.context for adapter in adapters.values() if adapter.context]
    text = next((example[name].shape[1] for name in texts if name in example), None)
    shared = {name for name, value in _tensors(example).items() if not value.ndim or len(value) != batch}
    kept = dict(example)

    def drawn(config: Mapping[str, Any], workload: Workload, generator: torch.Generator) -> Kwargs:
        """The example with noise for the image, its samples repeated or cut to the workload's batch."""
        rows = torch.arange(workload.batch) % batch

        def resized(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: resized(item) for name, item in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            taken = value[rows.to(value.device)] if value.ndim and len(value) == batch else value
            return taken.to(getattr(torch, workload.dtype)) if _is_of(value, kept[image].dtype) else taken

        inputs = {name: value if name in shared else resized(value) for name, value in kept.items()}
        noise = torch.randn(inputs[image].shape, generator=generator)
        return {**inputs, image: noise.to(inputs[image])}

    def workload_of(config: Mapping[str, Any], found: Mapping[str, Any], workload: Workload) -> Workload:
        latent = found[image]
        if latent.shape[1:] != kept[image].shape[1:]:
            raise InputError(
                f"this model was probed with {image} of {tuple(kept[image].shape[1:])} a sample, got "
                f"{tuple(latent.shape[1:])}; wrap it again with an example of that size"
            )
        return workload.override(
            batch=len(latent),
            dtype=dtype_name(latent),
            text_tokens=text,
            guidance=halves_guidance(workload, len(latent)),
        )

    return Family(
        name=f"probed {type(module).__name__}",
        model_class=type(module).__name__,
        adapters=adapters,
        block_lists=lists,
        tokens=lambda config, workload: tokens,
        pixels_per_token=lambda config: 1,
        example=drawn,
        defaults=lambda config: Workload(batch=batch),
        workload_of=workload_of,
        timestep_scale=1000.0 if float(times.float().max()) > 1 or not times.is_floating_point() else 1.0,
        timestep_argument=timestep,
        image_argument=image,
        shared=frozenset(
            shared | {name for name, value in example.items() if not isinstance(value, (torch.Tensor, Mapping))}
        ),
        verified="probed: every block run on permuted and on half of its tokens",
    )


def _is_of(value: torch.Tensor, dtype: torch.dtype) -> bool:
    return value.dtype == dtype
