"""CostTable: what every layer costs at every number of tokens, all corrections folded in. In: cost_model.json. Out: the
cost of any plan, by adding up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shiva_search.errors import InputError
from shiva_search.records.cost import CostEstimate
from shiva_search.records.files import read_json
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Kept, Plan

SCHEMA_VERSION = 1
FILE = "cost_model.json"
ADDITIVE = ("latency_ms", "energy_j", "gflops")
MEMORY = "memory_mib"


@dataclass(frozen=True)
class Curve:
    """One metric of one signature over the tokens kept.

    Attributes:
        tokens_kept: measured counts, ascending, from 0 to N.
        values: at these counts.
        parabola: between counts the value follows a parabola (operations) instead of straight lines (all else).
    """

    tokens_kept: tuple[int, ...]
    values: tuple[float, ...]
    parabola: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"tokens_kept": list(self.tokens_kept), "values": list(self.values), "parabola": self.parabola}

    @classmethod
    def from_dict(cls, item: Mapping[str, Any]) -> Curve:
        """Inverse of as_dict."""
        return cls(tuple(item["tokens_kept"]), tuple(item["values"]), bool(item["parabola"]))

    def at(self, k: int) -> float:
        """The value at one count, straight lines between the measured ones."""
        return float(np.interp(k, self.tokens_kept, self.values))

    def expand(self, tokens: int) -> np.ndarray:
        """Values at 0, 1, ..., N. Two neighbouring counts make a step: nothing is smoothed over it."""
        k = np.arange(tokens + 1)
        values = np.interp(k, self.tokens_kept, self.values)
        if self.parabola:
            at = np.array([item for item in self.tokens_kept if item > 0])
            fitted = np.polynomial.Polynomial.fit(at, np.interp(at, self.tokens_kept, self.values), min(2, len(at) - 1))
            inside = (k > 0) & (k < tokens)
            values[inside] = fitted(k[inside])
        return values


def extra_parts(choice: int) -> tuple[str, ...]:
    """Names of the extras that a choice costs; the parts of a variant add up."""
    kept = Kept.of(choice)
    return (*(("all",) if kept.attend == "all" else ()), *((f"rank {kept.rank}",) if kept.rank else ()))


@dataclass(frozen=True)
class CostTable:
    """Costs of a model on a device; exactly additive over layers, memory excepted, which is the largest layer's.

    cost(plan) = fixed + sum over layers of layer_cost(layer, k), mean over timestep segments.

    Attributes:
        model: fingerprint. device: name. tokens: N. workload: conditions of the profile.
        layers: signature of each layer.
        curves: metric -> signature -> Curve, for latency_ms, energy_j, gflops and memory_mib as far as known.
        fixed_costs: metric -> what a plan cannot change; for memory_mib what is held beside the largest layer.
        extras: metric -> signature -> "all" or "rank R" -> Curve: what a layer costs beyond the plain one where its
            kept tokens attend to all, or its rejected ones take a bypass.
        interval: the 90 % interval of a latency reaches from latency / (1 + interval) to latency * (1 + interval).
        missing: metric -> why it is unknown.
    """

    model: Mapping[str, Any]
    device: str
    tokens: int
    workload: Mapping[str, Any]
    layers: tuple[str, ...]
    curves: Mapping[str, Mapping[str, Curve]] = field(repr=False)
    fixed_costs: Mapping[str, float]
    interval: float
    missing: Mapping[str, str] = field(default_factory=dict, repr=False)
    extras: Mapping[str, Mapping[str, Mapping[str, Curve]]] = field(default_factory=dict, repr=False)

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the model, so that plans can be made from a table alone (records.plan.Planned)."""
        return dict(self.model)

    def table(self, metric: str, layer: int) -> np.ndarray | None:
        """Cost of a layer at 0, 1, ..., N tokens; None where the metric is unknown. Do not write to it."""
        return self._tables.get(metric, {}).get(self.layers[layer])

    def layer_cost(self, metric: str, layer: int, k: int) -> float | None:
        """Cost of one layer at k tokens.

        Args:
            metric: "latency_ms", "energy_j", "gflops" or "memory_mib".
            layer: index.
            k: tokens kept, in [0, N]; a `Kept` may have a bypass or attend to all.

        Raises:
            InputError: no such metric, layer or count, or a variant that was not measured.
        """
        if metric not in (*ADDITIVE, MEMORY):
            raise InputError(
                f"layers have {', '.join((*ADDITIVE, MEMORY))}, got {metric!r}; power is energy over latency"
            )
        if not 0 <= layer < len(self.layers) or not 0 <= k <= self.tokens:
            raise InputError(
                f"a layer lies in [0, {len(self.layers) - 1}] and keeps [0, {self.tokens}] tokens, "
                f"got layer {layer} at {k}"
            )
        values = self.table(metric, layer)
        return None if values is None else float(values[k]) + self._extra(metric, self.layers[layer], k)

    def variants(self) -> tuple[str, ...]:
        """Names of the extras that are known for every signature: "all", "rank 8", ..."""
        known = [set(parts) for parts in self.extras.get("latency_ms", {}).values()]
        return tuple(sorted(set.intersection(*known))) if known else ()

    def _extra(self, metric: str, signature: str, k: int) -> float:
        if k >= self.tokens:
            return 0.0
        parts = extra_parts(k)
        known = self.extras.get(metric, {}).get(signature, {})
        if metric == MEMORY:
            return 0.0
        absent = [part for part in parts if part not in known]
        if absent:
            raise InputError(
                f"the profile did not measure {metric} of layers with {absent[0]}; "
                "profile again with that bypass or attention"
            )
        return sum(known[part].at(k) for part in parts)

    def fixed(self, metric: str) -> float | None:
        """The part no plan can change; None where the metric is unknown."""
        return self.fixed_costs.get(metric)

    @cached_property
    def dense(self) -> CostEstimate:
        """Cost of the dense model."""
        return self._estimate((((self.tokens,) * len(self.layers)),), (1.0,))

    def predict(self, plan: Plan) -> CostEstimate:
        """Cost of one denoising step of a plan.

        Raises:
            InputError: the plan has other layers or tokens.
        """
        self.check(plan, {})
        return self._estimate(plan.rows, tuple(high - low for low, high in plan.segments))

    def check(self, plan: Plan, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a plan that is not for this model.

        Raises:
            InputError: layers, tokens or (where given) the fingerprint differ.
        """
        if plan.layer_count != len(self.layers) or plan.tokens != self.tokens:
            raise InputError(
                f"this plan is for {plan.layer_count} layers of {plan.tokens} tokens, the cost model for "
                f"{len(self.layers)} of {self.tokens}; profile this model, or search again"
            )
        differing = [
            f"{name} is {self.model[name]!r} in the cost model and {fingerprint[name]!r} in the model"
            for name in ("architecture", "config_hash")
            if name in self.model and name in fingerprint and self.model[name] != fingerprint[name]
        ]
        if differing:
            raise InputError(f"this cost model was made for another model: {'; '.join(differing)}; profile this one")

    def replay(self, plan: Plan) -> Measurement:
        """What a replay device answers when asked to measure: the prediction, marked as replayed."""
        found, dense = self.predict(plan), self.dense
        assert found.latency_ms and dense.latency_ms and found.latency_ms_low and found.latency_ms_high
        return Measurement(
            tokens_kept=plan.rows,
            latency_ms=found.latency_ms,
            latency_ms_low=found.latency_ms_low,
            latency_ms_high=found.latency_ms_high,
            dense_latency_ms=dense.latency_ms,
            ratio=found.latency_ms / dense.latency_ms,
            ratio_low=found.latency_ms_low / dense.latency_ms,
            ratio_high=found.latency_ms_high / dense.latency_ms,
            samples=0,
            energy_j=found.energy_j,
            power_w=found.power_w,
            peak_memory_mib=found.peak_memory_mib,
            gflops=found.gflops,
            dense_energy_j=dense.energy_j,
            dense_power_w=dense.power_w,
            dense_peak_memory_mib=dense.peak_memory_mib,
            dense_gflops=dense.gflops,
            reasons=dict(self.missing),
            conditions={"replayed from": self.device},
            replayed=True,
        )

    @cached_property
    def _tables(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            metric: {signature: curve.expand(self.tokens) for signature, curve in curves.items()}
            for metric, curves in self.curves.items()
        }

    def _estimate(self, rows: tuple[tuple[int, ...], ...], weights: tuple[float, ...]) -> CostEstimate:
        totals = {metric: self._total(metric, rows, weights) for metric in ADDITIVE}
        latency_ms, energy_j = totals["latency_ms"], totals["energy_j"]
        memory_mib = None
        if MEMORY in self.fixed_costs:
            tables = self._tables[MEMORY]
            peaks = [tables[name][k] for row in rows for name, k in zip(self.layers, row, strict=True)]
            memory_mib = self.fixed_costs[MEMORY] + float(max(peaks))
        return CostEstimate(
            latency_ms=latency_ms,
            latency_ms_low=None if latency_ms is None else latency_ms / (1 + self.interval),
            latency_ms_high=None if latency_ms is None else latency_ms * (1 + self.interval),
            energy_j=energy_j,
            power_w=None if energy_j is None or not latency_ms else energy_j / latency_ms * 1e3,
            peak_memory_mib=memory_mib,
            gflops=totals["gflops"],
        )

    def _total(self, metric: str, rows: tuple[tuple[int, ...], ...], weights: tuple[float, ...]) -> float | None:
        if metric not in self.fixed_costs:
            return None
        tables = self._tables[metric]
        sums = [
            sum(float(tables[name][k]) + self._extra(metric, name, k) for name, k in zip(self.layers, row, strict=True))
            for row in rows
        ]
        return self.fixed_costs[metric] + sum(weight * total for weight, total in zip(weights, sums, strict=True))

    def table_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": dict(self.model),
            "device": self.device,
            "tokens": self.tokens,
            "workload": dict(self.workload),
            "layers": list(self.layers),
            "curves": {
                metric: {signature: curve.as_dict() for signature, curve in curves.items()}
                for metric, curves in self.curves.items()
            },
            "extras": {
                metric: {
                    signature: {part: curve.as_dict() for part, curve in parts.items()}
                    for signature, parts in found.items()
                }
                for metric, found in self.extras.items()
            },
            "fixed": dict(self.fixed_costs),
            "interval": self.interval,
            "missing": dict(self.missing),
        }


def table_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of a CostTable from its JSON form.

    Raises:
        InputError: another schema, or fields missing or of the wrong type.
    """
    if values.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{source} has schema_version {values.get('schema_version')!r}, this release reads {SCHEMA_VERSION}; "
            "fit the cost model again with `shiva-search profile`"
        )
    try:
        return {
            "model": values["model"],
            "device": values["device"],
            "tokens": int(values["tokens"]),
            "workload": values["workload"],
            "layers": tuple(values["layers"]),
            "curves": {
                metric: {signature: Curve.from_dict(item) for signature, item in curves.items()}
                for metric, curves in values["curves"].items()
            },
            "extras": {
                metric: {
                    signature: {part: Curve.from_dict(item) for part, item in parts.items()}
                    for signature, parts in found.items()
                }
                for metric, found in values.get("extras", {}).items()
            },
            "fixed_costs": values["fixed"],
            "interval": float(values["interval"]),
            "missing": values.get("missing", {}),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source} is not a cost model: {error!r}; fit it again with `shiva-search profile`") from None


def load_cost_table(folder: str | Path) -> CostTable:
    """Read the table from a profile's folder.

    Raises:
        InputError: cost_model.json is missing or not a cost model.
    """
    path = Path(folder) / FILE
    return CostTable(**table_fields(read_json(path, "cost model"), str(path)))
