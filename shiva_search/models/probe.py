"""Find out how a transformer without an adapter carries its tokens, by running it. In: module, inputs. Out: a Family.

What is looked for: lists of blocks that are called one after the other with image tokens [B, N, D], N fitting the grid
of the noisy image, and return them; the context they return along; what belongs to single tokens (rotary tables,
masks). All of it is a guess until every block has run on permuted tokens (probing/soundness.py). What does not hold is
refused.

Legend: B samples, N image tokens, T context tokens, S positions, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter, Family, Kwargs, dtype_name, halves_guidance
from shiva_search.models.model import output_tensor
from shiva_search.models.probing.calls import block_lists, record, refusal, tensors_of
from shiva_search.models.probing.checks import (
    check,
    check_that_all_are_of_the_image,
    check_that_blocks_stand_alone,
)
from shiva_search.models.probing.guesses import guesses
from shiva_search.records.workload import Workload

_TIMESTEPS = ("timestep", "timesteps", "t", "time", "times", "sigma", "sigmas", "noise_level")


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
            raise InputError(refusal(module, "two forwards of the same inputs differ, so nothing can be checked"))
        batch = len(first)
        image = _image_argument(module, example, first)
        calls = record(module, example)
        lists, tokens = block_lists(module, calls, example, image, batch)
        blocks = [block for name in lists for block in module.get_submodule(name).children()]
        tried = guesses(module, [(block, calls[block]) for block in blocks], batch, tokens)
        check_that_all_are_of_the_image(module, example, image, blocks[0], tried[type(blocks[0]).__name__][0].tokens)
        adapters = check(module, example, blocks, tried, tokens)
        check_that_blocks_stand_alone(module, example, blocks, adapters, first)
    family = _family(module, example, image, lists, adapters, tokens)
    return family, family.workload_of({}, example, family.defaults({}))


def _forward(module: nn.Module, example: Mapping[str, Any]) -> torch.Tensor:
    try:
        return output_tensor(module(**example))
    except Exception as error:  # whatever a foreign module raises
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            refusal(module, f"it does not run on the example ({type(error).__name__}: {first})")
        ) from error


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


def _image_argument(module: nn.Module, example: Mapping[str, Any], output: torch.Tensor) -> str:
    """The argument that lies on the same grid as the prediction."""
    batch = len(output)
    if batch < 2:
        raise InputError(refusal(module, "an example of one sample does not show what belongs to a sample; give two"))
    grid = output.shape[1:2] if output.ndim == 3 else output.shape[2:]
    found = [
        name
        for name, value in tensors_of(example).items()
        if value.is_floating_point()
        and value.ndim == output.ndim >= 3
        and len(value) == batch
        and (value.shape[1:2] if value.ndim == 3 else value.shape[2:]) == grid
    ]
    if len(found) != 1:
        said = f"arguments {', '.join(found)} all lie" if found else "no argument lies"
        raise InputError(refusal(module, f"{said} on the grid of its output {tuple(output.shape)}, one should"))
    return found[0]


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
            refusal(
                module, f"no argument is called as the noise level of a sample usually is ({', '.join(_TIMESTEPS)})"
            )
        )
    times = torch.as_tensor(example[timestep])
    if times.ndim > 1 or (times.ndim == 1 and len(times) != batch):
        raise InputError(
            refusal(module, f"{timestep} should be one noise level for each sample, and is {tuple(times.shape)}")
        )
    texts = [adapter.context for adapter in adapters.values() if adapter.context]
    text = next((example[name].shape[1] for name in texts if name in example), None)
    shared = {name for name, value in tensors_of(example).items() if not value.ndim or len(value) != batch}
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
