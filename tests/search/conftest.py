"""A tiny transformer with random weights and a synthetic cost model: real forwards, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from shiva_search.models.families import family_of
from shiva_search.models.model import Model
from shiva_search.records.cost import CostEstimate
from shiva_search.records.plan import Plan


def build_model(layers: int = 5, side: int = 8, seed: int = 0) -> Model:
    """A DiT of 64 tokens and width 32 whose blocks matter: modulation is random instead of near zero."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
        activation_fn="gelu-approximate",
    ).eval()
    for block in module.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.2)
    torch.nn.init.normal_(module.proj_out_2.weight, std=0.5)
    module.requires_grad_(False)
    family = family_of("DiTTransformer2DModel")
    assert family is not None
    return Model(module, "tiny", family, family.defaults(dict(module.config)), origin="random weights")


@dataclass(frozen=True)
class SyntheticCost:
    """Latency a*k + b*k^2 + overhead per layer, energy and FLOPs likewise.

    `bias` multiplies what pruned layers cost; `corrected` learns it from a measured ratio, or, where `deaf`, does not.
    """

    tokens: int
    layers: int
    grid: tuple[int, ...] = (0, 8, 16, 24, 32, 40, 48, 56, 64)
    power_w: float = 10.0
    fixed_ms: float = 0.5
    bias: float = 1.0
    deaf: bool = False

    def layer_cost(self, metric: str, layer: int, k: int) -> float | None:
        latency = 0.0 if k == 0 else 0.2 + (1 + 0.1 * layer) * (0.02 * k + 0.0002 * k * k)
        latency *= self.bias if k < self.tokens else 1.0
        return {
            "latency_ms": latency,
            # Selecting costs energy without keeping the device busy, so that power depends on the plan.
            "energy_j": 1e-3 * self.power_w * latency + (1e-3 if 0 < k < self.tokens else 0.0),
            "gflops": 1e-3 * k,
            "memory_mib": 10.0 + 0.5 * k,
        }.get(metric)

    def fixed(self, metric: str) -> float | None:
        return {
            "latency_ms": self.fixed_ms,
            "energy_j": 1e-3 * self.power_w * self.fixed_ms,
            "gflops": 0.01,
            "memory_mib": 0.0,
        }.get(metric)

    def candidates(self, min_keep: float | None = None) -> tuple[int, ...]:
        return tuple(k for k in self.grid if min_keep is None or k >= min_keep * self.tokens)

    def predict(self, plan: Plan) -> CostEstimate:
        weights = [high - low for low, high in plan.segments]

        def total(metric: str) -> float:
            sums = [sum(self.layer_cost(metric, i, k) for i, k in enumerate(row)) for row in plan.tokens_kept]
            return self.fixed(metric) + sum(w * s for w, s in zip(weights, sums, strict=True))

        latency, energy = total("latency_ms"), total("energy_j")
        memory = max(self.layer_cost("memory_mib", i, k) for row in plan.tokens_kept for i, k in enumerate(row))
        return CostEstimate(
            latency, 0.97 * latency, 1.03 * latency, energy, energy / (1e-3 * latency), memory, total("gflops")
        )

    @property
    def dense(self) -> CostEstimate:
        return self.predict(Plan(self.tokens, ((self.tokens,) * self.layers,)))

    def corrected(self, plan: Plan, measured_ratio: float) -> SyntheticCost:
        dense_ms = self.dense.latency_ms
        pruned_ms = np.mean(
            [
                sum(self.layer_cost("latency_ms", i, k) for i, k in enumerate(row) if k < self.tokens)
                for row in plan.tokens_kept
            ]
        )
        if self.deaf or not pruned_ms:
            return self
        off_ms = measured_ratio * dense_ms - self.predict(plan).latency_ms
        return replace(self, bias=float(self.bias * (pruned_ms + off_ms) / pruned_ms))


@pytest.fixture(scope="session")
def model() -> Model:
    return build_model()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    return build_model


@pytest.fixture
def cost(model: Model) -> SyntheticCost:
    return SyntheticCost(model.tokens, model.layer_count)


@pytest.fixture(scope="session")
def make_cost() -> Callable[..., SyntheticCost]:
    return SyntheticCost
