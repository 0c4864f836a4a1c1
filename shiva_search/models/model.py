"""Model: a torch module plus what is known of it: its layers, tokens, workload, inputs and fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter, Family, Kwargs, argument_names
from shiva_search.models.weights import parameter_count, weights_hash
from shiva_search.records.workload import Workload


@dataclass(frozen=True)
class Layer:
    """One block of the model.

    Attributes:
        index: position in order of execution.
        name: module path.
        module: the block.
        adapter: how it carries tokens.
        arguments: positional names of its forward.
        signature: equal for blocks that cost the same: class, parameter shapes and dtype.
    """

    index: int
    name: str
    module: nn.Module
    adapter: BlockAdapter
    arguments: tuple[str, ...]
    signature: str

    @property
    def attends_all(self) -> bool:
        """Whether its kept tokens can attend to the keys and values of all."""
        return self.adapter.keys_of_all is not None


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward and the noise level of each sample.

    Attributes:
        inputs: keyword arguments of the model's forward.
        t_B: normalised time in [0, 1], 1 is noise.
        target: what the model was trained to predict for these inputs (None where unknown), [B, ...].
        shared: names of inputs without a batch axis.
    """

    inputs: Kwargs
    t_B: torch.Tensor
    target: torch.Tensor | None = None
    shared: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.t_B)

    def take(self, rows: Sequence[int] | torch.Tensor) -> Batch:
        """The samples of the given indices, in that order."""
        return self._cut(torch.as_tensor(rows, dtype=torch.int64))

    def slice(self, start: int, stop: int) -> Batch:
        """Samples start to stop; views of this batch."""
        return self._cut(slice(start, stop))

    def _cut(self, rows: Any) -> Batch:
        count = len(self)

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
                return value[rows.to(value.device) if isinstance(rows, torch.Tensor) else rows]
            if isinstance(value, Mapping):
                return {name: item if name in self.shared else cut(item) for name, item in value.items()}
            return value

        return replace(self, inputs=cut(self.inputs), t_B=cut(self.t_B), target=cut(self.target))

    def chunks(self, size: int) -> Iterator[Batch]:
        """Consecutive slices of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self.slice(start, min(start + size, len(self)))


#: (split, count, seed) -> Batch, with split one of "train", "calibration", "evaluation".
Calibration = Callable[[str, int, int], Batch]


@dataclass
class Model:
    """A diffusion transformer and what is known of it.

    Attributes:
        module: the torch module; eval mode.
        name: what the user called it.
        family: how its blocks carry tokens.
        workload: the conditions it is deployed in.
        calibration: draws real inputs; None where only random ones are known.
        origin: where the weights come from ("built in", "random weights", a path).
    """

    module: nn.Module = field(repr=False)
    name: str
    family: Family = field(repr=False)
    workload: Workload
    calibration: Calibration | None = None
    origin: str = ""

    @property
    def config(self) -> Mapping[str, Any]:
        """The diffusers configuration; empty where the module has none."""
        found = getattr(self.module, "config", None)
        return dict(found) if isinstance(found, Mapping) else {}

    @cached_property
    def tokens(self) -> int:
        """Image tokens N at this workload."""
        return self.family.tokens(self.config, self.workload)

    @cached_property
    def root_arguments(self) -> tuple[str, ...]:
        """Positional argument names of the model's forward."""
        return argument_names(type(self.module).forward)[1:]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The blocks in order of execution.

        Raises:
            InputError: a block class has no adapter.
        """
        found: list[Layer] = []
        for list_name in self.family.block_lists:
            for position, block in enumerate(_blocks_in(self.module, list_name)):
                adapter = self.family.adapter_of(block)
                name = f"{list_name}.{position}"
                arguments = argument_names(type(block).forward)[1:]
                found.append(Layer(len(found), name, block, adapter, arguments, block_signature(block)))
        if not found:
            raise InputError(f"model {self.name!r} has no blocks in {', '.join(self.family.block_lists)}")
        return tuple(found)

    @property
    def layer_count(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def example(self, seed: int = 0, workload: Workload | None = None) -> Kwargs:
        """Random inputs of one forward at the workload: right shapes and dtypes, for timing."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.family.example(self.config, workload or self.workload, generator)
        device = next(self.module.parameters()).device
        return {name: _to_device(value, device) for name, value in inputs.items()}

    def like(self, example: Mapping[str, Any]) -> Model:
        """This model with the workload that keyword arguments of one forward show: batch, dtype, resolution."""
        return replace(self, workload=self.family.workload_of(self.config, example, self.workload))

    def at(self, resolution: int) -> Model:
        """This model at another resolution (pixels)."""
        return replace(self, workload=self.workload.override(resolution=resolution))

    @property
    def inputs_kind(self) -> str:
        """What `batch` draws: "real" inputs, or "random" ones where the model has no calibration data."""
        return "random" if self.calibration is None else "real"

    def batch(self, split: str, count: int, seed: int = 0) -> Batch:
        """Inputs for judging quality, timesteps stratified (eq. 15): real ones where the model has calibration data.

        Args:
            split: "train", "calibration" (search) or "evaluation" (reported figures).
            count: samples.
            seed: same seed, same batch.

        Raises:
            InputError: no such split, or no samples.
        """
        offsets = {"train": 0, "calibration": 1, "evaluation": 2}
        if split not in offsets or not isinstance(count, Integral) or count < 1:
            raise InputError(
                f"a batch is 1 sample or more of {', '.join(offsets)}, got {count} of {split!r}; name one of these"
            )
        if self.calibration is not None:
            return self.calibration(split, count, seed)
        generator = torch.Generator().manual_seed(3 * seed + offsets[split])
        t_B = stratified_times(count, generator)
        workload = Workload(**{**self.workload.as_dict(), "batch": count, "guidance": False})
        inputs = self.family.example(self.config, workload, generator)
        timestep = inputs[self.family.timestep_argument]
        inputs[self.family.timestep_argument] = self._timestep(t_B).to(timestep.dtype)
        device = next(self.module.parameters()).device
        placed = {name: _to_device(value, device) for name, value in inputs.items()}
        return Batch(placed, t_B.to(device), shared=self.family.shared)

    def times(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Normalised time in [0, 1] of each sample, from the arguments of a forward."""
        timestep = torch.as_tensor(inputs[self.family.timestep_argument])
        clean, noise = self.family.timestep_clean, self.family.timestep_scale
        return ((timestep.float().reshape(-1) - clean) / (noise - clean)).clamp(0.0, 1.0)

    def _timestep(self, t_B: torch.Tensor) -> torch.Tensor:
        """Inverse of times: what the model is told."""
        clean, noise = self.family.timestep_clean, self.family.timestep_scale
        return clean + t_B * (noise - clean)

    @cached_property
    def has_joint_blocks(self) -> bool:
        """Whether some blocks take image tokens and others in one argument, whose length does not tell how many."""
        return any(layer.adapter.joint is not None for layer in self.layers)

    def check_tokens(self, inputs: Mapping[str, Any], tokens: int) -> None:
        """Refuse a forward with another number of image tokens.

        Raises:
            InputError: names both numbers.
        """
        # Not self.like(inputs).tokens: a tracer of torch.compile may not enter the lock of a cached property.
        found = self.family.tokens(self.config, self.family.workload_of(self.config, inputs, self.workload))
        if found != tokens:
            raise InputError(
                f"this plan is for {tokens} image tokens, the model was called with {found}; "
                "search again at this resolution"
            )

    def predict(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """One forward; the output tensor, whatever the model wraps it in."""
        return output_tensor(self.module(**inputs))

    def fingerprint(self) -> dict[str, Any]:
        """What makes this model this model: enough to refuse a foreign plan. JSON-able."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        weights = weights_hash(self.module)
        return {
            "name": self.name,
            "architecture": type(self.module).__name__,
            "config_hash": _digest(json.dumps(config, sort_keys=True, default=str).encode()),
            "layers": self.layer_count,
            "tokens": self.tokens,
            "parameters": parameter_count(self.module),
            **({} if weights is None else {"weights_hash": weights}),
        }


def _blocks_in(module: nn.Module, list_name: str) -> tuple[nn.Module, ...]:
    """Children of a module list; none where there is no such list."""
    try:
        return tuple(module.get_submodule(list_name).children())
    except AttributeError:
        return ()


def output_tensor(output: Any) -> torch.Tensor:
    """The tensor in a model's output: itself, `.sample`, or the first element; lists of images are stacked."""
    if isinstance(output, torch.Tensor):
        return output
    found = output.sample if hasattr(output, "sample") else output[0]
    tensor: torch.Tensor = torch.stack(found) if isinstance(found, list) else found
    return tensor


def stratified_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """One uniform draw per interval [i/count, (i+1)/count), shuffled (eq. 15): [count] in (0, 1)."""
    drawn = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return drawn[torch.randperm(count, generator=generator)].clamp(1e-3, 1 - 1e-3)


def block_signature(block: nn.Module) -> str:
    """Blocks with equal signatures cost the same: class, and names, shapes and dtypes of all parameters."""
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in block.named_parameters()]
    kind = type(block).__name__
    return f"{kind}-{_digest(repr((kind, sorted(shapes))).encode())[:8]}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to_device(item, device) for name, item in value.items()}
    return value
