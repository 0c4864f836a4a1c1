"""A device whose true costs are known: it runs real models and charges each operation by the size of what it makes.

Implements the Device protocol from the bottom: blocks, selection and whole forwards all really run, once; from then on
only the virtual clock moves. Costs climb in steps of `tile` rows, as kernels that work in tiles do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from simulation import VirtualMachine
from torch.utils._python_dispatch import TorchDispatchMode

from shiva_search.devices.base import EnergySample, SensorReport
from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model

_FREE = ("view", "expand", "transpose", "detach", "split", "slice", "permute", "t.", "unsqueeze", "select", "alias")


class _Meter(TorchDispatchMode):
    """Adds up what operations cost."""

    def __init__(self, tile: int) -> None:
        super().__init__()
        self.tile = tile
        self.ms = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        tensor = next(
            (item for item in (out if isinstance(out, tuple) else (out,)) if isinstance(item, torch.Tensor)), None
        )
        if tensor is None or any(word in name for word in _FREE):
            return out
        self.ms += 0.004  # a call
        rows = tensor.shape[-2] if tensor.ndim > 1 else 1
        tiles = -(-rows // self.tile) * self.tile
        elements = tensor.numel() / max(1, rows) * tiles
        if "attention" in name:
            self.ms += elements * args[1].shape[-2] * 4e-8 + elements * 4e-6
        elif "mm" in name:
            self.ms += elements * args[-2].shape[-1] * 4e-8
        else:
            self.ms += elements * 2e-7
        return out


@dataclass
class VirtualDevice(VirtualMachine):
    """A VirtualMachine that runs models.

    Attributes:
        tile: rows a kernel processes together.
        power_w: watts while running; None: no sensor.
    """

    tile: int = 1
    power_w: float | None = None
    name: str = "virtual"
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _known_ms: dict[int, tuple[Callable[[], object], float]] = field(default_factory=dict)

    def true_ms(self, run: Callable[[], object]) -> float:
        """What a run costs on this device when it is quiet."""
        if id(run) not in self._known_ms:
            with _Meter(self.tile) as meter, torch.no_grad():
                run()
            self._known_ms[id(run)] = run, meter.ms  # the run is kept, so that its id stays its own
        return self._known_ms[id(run)][1]

    def time_ms(self, run: Callable[[], object], repeats: int = 1) -> float:
        return super().time_ms(self.work(self.true_ms(run)), repeats)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "device_name": "virtual", "driver": "none"}

    def synchronize(self) -> None:
        pass

    def peak_memory_mib(self, run: Callable[[], object]) -> float | None:
        return self.true_ms(run) * 2.0  # any monotone figure will do

    def measure_energy(self, run: Callable[[], object], min_seconds: float) -> EnergySample:
        if self.power_w is None:
            return EnergySample.missing("this device has no sensor")
        self.now_s += min_seconds
        energy_j = self.power_w * self.true_ms(run) / 1e3
        return EnergySample(energy_j, self.power_w, 100, 20, min_seconds, self.power_w / 4, None)

    def sensors(self) -> list[SensorReport]:
        has = self.power_w is not None
        return [SensorReport("virtual", "energy_j", has, "made up" if has else "this device has no sensor")]


def small_dit(layers: int = 6, side: int = 16, width: int = 16, device: str = "cpu") -> Model:
    """A DiT with random weights; on the meta device it has none."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        module = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=width,
            in_channels=1,
            out_channels=1,
            num_layers=layers,
            sample_size=side,
            patch_size=1,
            num_embeds_ada_norm=10,
            norm_num_groups=1,
        )
    return as_model(module.eval().requires_grad_(False), "small", "random weights")
