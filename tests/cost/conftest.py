"""What the tests of cost share: a made-up device whose true costs are known, and profiles of it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from shiva_search.records.plan import PLAIN, Kept, Plan
from shiva_search.records.profile import Forward, Profile, Row

N, LAYERS = 512, 8
COUNTS = (0, 1, 64, 65, 128, 192, 256, 320, 384, 448, 511, 512)
VARIANTS = (
    *(Kept(k, rank, "kept") for rank in (16, 32) for k in (0, 256)),
    *(Kept(k, 0, "all") for k in (1, 128, 256, 384, 511)),
)


@dataclass
class Truth:
    """A device where block s at k tokens takes `block_ms(s, k)`, and blocks in a model differ from blocks alone.

    Attributes:
        scale, overhead_ms, fixed_ms: what the model has and blocks alone have not.
        noise: relative error of what is measured.
        variant_scale: what a bypass or attention to all costs in a model, as a share of what it costs alone.
    """

    scale: float = 1.0
    overhead_ms: float = 0.0
    fixed_ms: float = 2.0
    noise: float = 0.0
    tile: int = 1
    layers: tuple[str, ...] = ("a",) * LAYERS
    seed: int = 0
    variant_scale: float | None = None

    def block_ms(self, signature: str, k: int) -> float:
        return self.plain_ms(signature, k) + self.variant_ms(k)

    def variant_ms(self, k: int) -> float:
        """Of a bypass, cheaper where the block reads the tokens as well, and of keys of all tokens."""
        kept = Kept.of(k)
        bypass_ms = (0.5 if int(k) else 1.2) + kept.rank / 200 if kept.rank else 0.0
        return bypass_ms + (1.5 * (1 - k / N) if kept.attend == "all" else 0.0)

    def plain_ms(self, signature: str, k: int) -> float:
        if int(k) == 0:  # Kept(0, 32) is not 0
            return 0.01
        tiles = -(-k // self.tile) * self.tile
        selection_ms = 0.4 if k < N else 0.0
        return (2.0 if signature == "b" else 1.0) * (0.3 + 6 * tiles / N + 2 * (tiles / N) ** 2) + selection_ms

    def in_model_ms(self, signature: str, k: int) -> float:
        variant = (self.variant_scale or 0.0) * self.variant_ms(k)
        return self.scale * (self.plain_ms(signature, k) + variant) + (self.overhead_ms if 0 < k < N else 0.0)

    def plan_ms(self, row: tuple[int, ...]) -> float:
        return self.fixed_ms + sum(self.in_model_ms(name, k) for name, k in zip(self.layers, row, strict=True))

    def dense_ms(self) -> float:
        return self.plan_ms((N,) * len(self.layers))

    def profile(self, plans: int = 24, **known: object) -> Profile:
        rng = np.random.default_rng(self.seed)

        def about(value: float) -> tuple[float, float, float]:
            seen = value * float(np.exp(self.noise * rng.standard_normal()))
            return seen, seen * (1 - 2 * self.noise - 1e-4), seen * (1 + 2 * self.noise + 1e-4)

        rows = []
        for name in dict.fromkeys(self.layers):
            for k in (*COUNTS, *(VARIANTS if self.variant_scale is not None else ())):
                ms, low, high = about(self.block_ms(name, k))
                rows.append(
                    Row(
                        name,
                        N,
                        int(k),
                        ms,
                        low,
                        high,
                        ms,
                        low,
                        high,
                        30,
                        gflops=k / N + (k / N) ** 2,
                        peak_memory_mib=k / 8,
                        bypass_rank=Kept.of(k).rank,
                        attend=Kept.of(k).attend,
                    )  # fmt: skip
                )
        forwards = []
        for row in self.plans(plans, seed=self.seed + 7, counts=COUNTS):
            ratio, low, high = about(self.plan_ms(row) / self.dense_ms())
            forwards.append(Forward(row, ratio * self.dense_ms(), ratio, low, high, 20))
        return Profile(
            model={"architecture": "X", "config_hash": "h", "tokens": N},
            device="made up",
            tokens=N,
            layers=self.layers,
            workload={},
            rows=tuple(rows),
            forwards=tuple(forwards),
            rest={"latency_ms": self.fixed_ms + 0.01 * len(self.layers), "gflops": 0.5, "peak_memory_mib": 3.0},
            dense={"latency_ms": self.dense_ms() if plans else None, "peak_memory_mib": 80.0 if plans else None},
            missing={"energy_j": "no sensor"},
            provenance={"token_alignment": 16, "edges": {"a": [64]}},
            **known,  # type: ignore[arg-type]
        )

    def plans(self, count: int, seed: int, counts: tuple[int, ...] | None = None) -> list[tuple[int, ...]]:
        """Random plans, with variants where the device has them."""
        rows = random_plans(count, len(self.layers), seed, counts)
        if self.variant_scale is None:
            return rows
        rng = np.random.default_rng(seed)
        return [
            tuple(
                Kept(k, int(rng.choice([0, 16, 32])), str(rng.choice(["kept", "all"])) if k else "kept") if k < N else k
                for k in row
            )
            for row in rows
        ]

    def plan(self, row: tuple[int, ...]) -> Plan:
        choices = [Kept.of(k) for k in row]
        if all(choice.variant == PLAIN for choice in choices):
            return Plan(N, (row,))
        return Plan(
            N, (tuple(map(int, row)),), bypass={"kind": "affine", "ranks": [[choice.rank for choice in choices]]},
            attend=(tuple(choice.attend for choice in choices),),
        )  # fmt: skip


def random_plans(count: int, layers: int, seed: int, counts: tuple[int, ...] | None = None) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        share = rng.choice([0.0, 1.0, rng.random(), rng.random(), rng.random()], size=layers)
        row = (share * N).astype(int)
        if counts is not None:
            row = np.array(counts)[np.abs(row[:, None] - np.array(counts)).argmin(axis=1)]
        row[0] = N
        rows.append(tuple(int(k) for k in row))
    return rows


@pytest.fixture(scope="session")
def truth() -> Callable[..., Truth]:
    return Truth


@pytest.fixture(scope="session")
def plans_of() -> Callable[..., list[tuple[int, ...]]]:
    return random_plans
