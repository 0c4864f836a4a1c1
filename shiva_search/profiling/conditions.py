"""The deployed conditions. In: a model and its workload. Out: a context in which blocks run as they will be deployed,
the inputs blocks get in a dense forward, and real blocks of a model that exists only as shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from shiva_search.devices.host import ahead_of_others
from shiva_search.errors import InputError
from shiva_search.models.blocks import Kwargs
from shiva_search.models.model import Layer, Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.compiled import compiled_forwards

_ROTATED_COPIES = 2
_COPY_LIMIT_BYTES = 64 * 2**20  # beyond this a block's weights leave the cache between two runs of themselves


@contextmanager
def deployed(model: Model) -> Iterator[None]:
    """Threads, no gradients, evaluation mode and compiled blocks as the workload says, ahead of other processes.

    All is as before at the end.
    """
    threads = torch.get_num_threads()
    training = model.module.training
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if model.workload.threads is not None:
            torch.set_num_threads(model.workload.threads)
            stack.callback(torch.set_num_threads, threads)
        stack.enter_context(ahead_of_others())
        if training:
            model.module.eval()
            stack.callback(model.module.train)
        if model.workload.compile:
            stack.enter_context(_compiled(model))
        yield


@contextmanager
def _compiled(model: Model) -> Iterator[None]:
    """Blocks run through torch.compile, one graph for all counts of tokens, as AppliedPlan.compile makes them."""
    replaced: list[tuple[nn.Module, Any]] = []
    forwards = compiled_forwards((layer, layer.module.forward) for layer in model.layers)
    try:
        for layer, forward in zip(model.layers, forwards, strict=True):
            replaced.append((layer.module, layer.module.__dict__.get("forward")))
            layer.module.forward = forward
        yield
    finally:
        for module, previous in replaced:
            if previous is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = previous


def shapes_of(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device: its shapes, without its weights, and without copying these first."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        shape = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(module, memo)


def is_meta(model: Model) -> bool:
    """Whether the model exists only as shapes."""
    return any(parameter.is_meta for parameter in model.module.parameters())


def check_place(model: Model, device: torch.device) -> None:
    """Refuse to time a model on one device with the clock of another.

    Raises:
        InputError: the weights lie elsewhere.
    """
    found = next(model.module.parameters()).device
    if found.type not in (device.type, "meta"):
        raise InputError(f"the model's weights are on {found}, the device is {device}; load the model on {device}")


@dataclass(frozen=True)
class Part:
    """Blocks of one signature, ready to run.

    Attributes:
        signature: of all of them.
        layers: they take turns, so that weights are as cold as in the model.
        kwargs: arguments of the first of them in a dense forward.
    """

    signature: str
    layers: tuple[Layer, ...]
    kwargs: Kwargs


def parts_of(model: Model, device: torch.device, seed: int = 0) -> list[Part]:
    """One Part per signature, in order of first use. Of a model on the meta device, only these blocks are made real."""
    recorded = record_inputs(model, model.example(seed))
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for signature, kwargs in recorded.items():
        layers = tuple(layer for layer in model.layers if layer.signature == signature)
        if is_meta(model):
            small = _bytes_of(layers[0].module) <= _COPY_LIMIT_BYTES
            wanted = layers[: _ROTATED_COPIES if small else 1]
            layers = tuple(replace(layer, module=real_module(layer.module, device, generator)) for layer in wanted)
            kwargs = tree_map(lambda value: _real_value(value, device, generator), kwargs)
        parts.append(Part(signature, layers, kwargs))
    return parts


def without_blocks(model: Model, device: torch.device, seed: int = 0) -> Model:
    """The model with all but its blocks made real, for the rest of a forward; a real model comes back as it is."""
    if not is_meta(model):
        return model
    generator = torch.Generator(device).manual_seed(seed)
    whole = replace(model, module=copy.deepcopy(model.module))  # shapes only
    inside = {part for layer in whole.layers for part in layer.module.modules()}
    wanted = [part for part in whole.module.modules() if part not in inside] + _used_inside(whole, inside)
    for part in wanted:
        for name, parameter in list(part.named_parameters(recurse=False)):
            real = _real_value(parameter, device, generator)
            setattr(part, name, nn.Parameter(real, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _real_value(buffer, device, generator))
    return whole


def _used_inside(model: Model, inside: set[nn.Module]) -> list[nn.Module]:
    """Modules inside blocks that the rest of a forward calls (DiT's output asks the first block for its condition)."""
    used: list[nn.Module] = []
    with ExitStack() as stack, torch.no_grad():
        for part in inside:
            stack.callback(part.register_forward_pre_hook(lambda part, args: used.append(part)).remove)
        applied = stack.enter_context(AppliedPlan(model, Plan.dense(model)))
        applied.controller.rows = [[0] * model.layer_count]
        model.module(**model.example())
    blocks = {layer.module for layer in model.layers}
    return [part for part in dict.fromkeys(used) if part not in blocks]


def record_inputs(model: Model, inputs: Kwargs) -> dict[str, Kwargs]:
    """Arguments of the first block of each signature in one dense forward, by name, as the runtime knows them."""
    recorded: dict[str, Kwargs] = {}

    def keep(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called = {**kwargs, **dict(zip(layer.arguments, args, strict=False))}
            named = layer.adapter.split(called, model.tokens)
            recorded[layer.signature] = tree_map(
                lambda value: value.detach() if isinstance(value, torch.Tensor) else value, named
            )

        return hook

    with ExitStack() as stack, torch.no_grad():
        for signature in dict.fromkeys(layer.signature for layer in model.layers):
            layer = next(layer for layer in model.layers if layer.signature == signature)
            handle = layer.module.register_forward_pre_hook(keep(layer), with_kwargs=True)
            stack.callback(handle.remove)
        model.module(**inputs)
    return recorded


def real_module(module: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A copy of a module of shapes, with random weights on the device."""
    real = copy.deepcopy(module)
    _make_real(real, device, generator)
    return real.eval().requires_grad_(False)


def _make_real(module: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    module.to_empty(device=device)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = _filled(tensor.data, generator)


def _real_value(value: Any, device: torch.device, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return _filled(torch.empty(value.shape, dtype=value.dtype, device=device), generator)


def _filled(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # Small normal values keep deep sums finite; zeros are a valid index, label and mask.
    return tensor.normal_(std=0.02, generator=generator) if tensor.is_floating_point() else tensor.zero_()


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
