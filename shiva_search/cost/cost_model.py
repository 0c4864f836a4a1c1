"""CostModel: the cost of any plan, with an interval that was calibrated on plans the fit had not seen.

In: a profile, or cost_model.json. Out: predictions, a table of layer costs that add up exactly, counts worth searching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shiva_search.cost.evidence import Evidence, PlanRatio
from shiva_search.cost.fit import LatencyFit, fit_latency, predict_shares
from shiva_search.errors import InputError
from shiva_search.records.cost_table import FILE, MEMORY, CostTable, Curve, extra_parts, table_fields
from shiva_search.records.files import read_json, write_json
from shiva_search.records.plan import Kept, Plan
from shiva_search.records.profile import Profile

COVERAGE = 0.9
_UNCALIBRATED = 0.15  # relative half-width where no plan was measured: what tables of blocks alone are known to miss by
_FOLDS = 10
_FEWEST_PLANS = 5
_CORRECTION_ERROR = 0.003  # of a plan measured again on purpose: it counts more than any of the profile
_FEWEST_CANDIDATES, _MOST_CANDIDATES = 16, 32


@dataclass(frozen=True)
class CostModel(CostTable):
    """A CostTable that knows what it was fit on. See CostTable for predict, layer_cost, fixed and dense.

    Attributes:
        evidence: blocks and plans behind the latency.
        held_out: relative errors on plans left out of the fit: plans, median_error, p95_error, bias; or the reason why
            there are none.
        corrections: what the fit folded in: scale, overhead_ms (layers that run), pruned_ms (pruned layers), fixed_ms.
        edges: right edges of cost steps, by signature.
        power: watts by signature and count, from which energy is folded in again after a correction; None: no sensor.
        alignment: tokens a kernel's tile spans.
    """

    evidence: Evidence | None = field(default=None, repr=False)
    held_out: Mapping[str, Any] = field(default_factory=dict, repr=False)
    corrections: Mapping[str, float] = field(default_factory=dict)
    edges: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    power: Mapping[str, Any] | None = field(default=None, repr=False)
    alignment: int = 1

    def candidates(self, min_keep: float | None = None) -> tuple[int, ...]:
        """Counts worth searching, ascending: 0, N, the right edges of steps, and counts in between.

        A count that costs as much as the dense block is left out: keeping all is better and no dearer.

        Args:
            min_keep: least share of tokens; None allows skipping. Above 0 it excludes 0.

        Raises:
            InputError: min_keep outside [0, 1].
        """
        if min_keep is not None and not 0 <= min_keep <= 1:
            raise InputError(f"--min-keep is a share of tokens in [0, 1], got {min_keep}")
        edges = {k for found in self.edges.values() for k in found}
        known = {k for curves in self.curves["latency_ms"].values() for k in curves.tokens_kept}
        # One token above another count is there to see a step, not to be used.
        inner = {k for k in known if 1 < k < self.tokens - 1 and k - 1 not in known} | edges
        while len(inner) < _FEWEST_CANDIDATES - 2:
            inner_sorted = sorted({0, *inner, self.tokens})
            low, high = max(zip(inner_sorted, inner_sorted[1:], strict=False), key=lambda pair: pair[1] - pair[0])
            middle = round((low + high) / 2 / self.alignment) * self.alignment
            if not low < middle < high:
                break
            inner.add(middle)
        inner = {k for k in inner if self._is_useful(k)}
        while len(inner) > _MOST_CANDIDATES - 2:
            ordered = sorted({0, *inner, self.tokens})
            gaps = {k: ordered[i + 2] - ordered[i] for i, k in enumerate(ordered[1:-1])}
            loose = {k: gap for k, gap in gaps.items() if k not in edges} or gaps
            inner.discard(min(loose, key=lambda k: loose[k]))
        least = 0 if min_keep is None else min_keep * self.tokens
        return tuple(sorted(k for k in {0, *inner, self.tokens} if k >= least))

    def corrected(self, plan: Plan, measured_ratio: float, error: float = _CORRECTION_ERROR) -> CostModel:
        """The model fit again with one more measured plan: the closed loop's way to stop being wrong where it matters.

        Args:
            plan: that was measured.
            measured_ratio: its latency over the dense model's, measured in one interleaved run.
            error: standard error of the ratio, relative.

        Raises:
            InputError: the ratio is not above zero, or the model was loaded without its evidence.
        """
        if not measured_ratio > 0:
            raise InputError(f"a measured ratio is above zero, got {measured_ratio}; measure the plan again")
        if self.evidence is None:
            raise InputError("this cost model was loaded without its evidence; fit it again from the profile")
        self.check(plan, {})
        weights = tuple(high - low for low, high in plan.segments)
        found = PlanRatio(plan.rows, weights, measured_ratio, error)
        return _assembled(self, self.evidence.with_plan(found))

    def save(self, folder: str | Path) -> None:
        """Write cost_model.json.

        Raises:
            InputError: the folder cannot be written.
        """
        write_json(
            Path(folder) / FILE,
            {
                **self.table_dict(),
                "held_out": dict(self.held_out),
                "corrections": dict(self.corrections),
                "edges": {name: list(found) for name, found in self.edges.items()},
                "alignment": self.alignment,
                "power": self.power,
                "evidence": None if self.evidence is None else self.evidence.as_dict(),
            },
        )

    def _is_useful(self, k: int) -> bool:
        tables = [self.table("latency_ms", self.layers.index(name)) for name in dict.fromkeys(self.layers)]
        return any(table is not None and table[k] < table[self.tokens] for table in tables)


def fit_cost_model(profile: Profile) -> CostModel:
    """Fit the cost model of a profile.

    Raises:
        InputError: a signature of the model is missing in the profile.
    """
    evidence = Evidence.of(profile)
    curves: dict[str, dict[str, Curve]] = {}
    fixed: dict[str, float] = {}
    operations = _add_operations(profile, curves, fixed)
    _add_memory(profile, curves, fixed)
    known_edges = profile.provenance.get("edges", {})
    empty = CostModel(
        model=profile.model,
        device=profile.device,
        tokens=profile.tokens,
        workload=profile.workload,
        layers=profile.layers,
        curves=curves,
        fixed_costs=fixed,
        interval=_UNCALIBRATED,
        missing=profile.missing,
        edges={name: tuple(found) for name, found in known_edges.items()},
        power=_power_of(profile),
        alignment=int(profile.provenance.get("token_alignment", 1)),
        extras={} if operations is None else {"gflops": operations},
    )
    return _assembled(empty, evidence)


def load_cost_model(folder: str | Path) -> CostModel:
    """Read cost_model.json from a profile's or a run's folder.

    Raises:
        InputError: missing or not a cost model.
    """
    path = Path(folder) / FILE
    values = read_json(path, "cost model")
    known = table_fields(values, str(path))
    try:
        evidence = values.get("evidence")
        return CostModel(
            **known,
            evidence=None if evidence is None else Evidence.from_dict(evidence),
            held_out=values.get("held_out", {}),
            corrections=values.get("corrections", {}),
            edges={name: tuple(found) for name, found in values.get("edges", {}).items()},
            power=values.get("power"),
            alignment=int(values.get("alignment", 1)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a cost model: {error!r}; fit it again with `shiva-search profile`") from None


def _assembled(known: CostModel, evidence: Evidence) -> CostModel:
    """Latency and energy from evidence, all else as it was."""
    fit = fit_latency(evidence)
    errors, expected = _held_out_errors(evidence)
    curves = dict(known.curves)
    curves["latency_ms"] = {
        name: Curve(evidence.blocks[name].tokens_kept, values) for name, values in fit.curves_ms.items()
    }
    extras = {
        **known.extras,
        "latency_ms": {
            name: {part: Curve(evidence.extras[name][part].tokens_kept, values) for part, values in parts.items()}
            for name, parts in fit.extras_ms.items()
        },
    }
    fixed = {**known.fixed_costs, "latency_ms": fit.fixed_ms}
    if known.power is not None:
        curves["energy_j"], fixed["energy_j"], extras["energy_j"] = _energy(known.power, evidence, fit)
    return CostModel(
        model=known.model,
        device=known.device,
        tokens=known.tokens,
        workload=known.workload,
        layers=known.layers,
        curves=curves,
        fixed_costs=fixed,
        interval=_conformal(errors, expected, evidence),
        missing=known.missing,
        extras=extras,
        evidence=evidence,
        held_out=_summary(errors, evidence),
        corrections={
            "scale": fit.scale,
            "overhead_ms": fit.overhead_ms,
            "pruned_ms": fit.pruned_ms,
            "fixed_ms": fit.fixed_ms,
        },
        edges=known.edges,
        power=known.power,
        alignment=known.alignment,
    )


def _held_out_errors(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """[plans], each left out of a fit once: relative error of its prediction, and the standard error it came with."""
    count = len(evidence.plans)
    if count < _FEWEST_PLANS:
        return np.zeros(0), np.zeros(0)
    folds = np.arange(count) % min(_FOLDS, count)
    errors, expected = np.zeros(count), np.zeros(count)
    for fold in range(min(_FOLDS, count)):
        out = np.flatnonzero(folds == fold)
        shares, expected[out] = predict_shares(evidence.without_plans(out.tolist()), [evidence.plans[i] for i in out])
        errors[out] = shares / [evidence.plans[i].ratio for i in out] - 1
    return errors, expected


def _conformal(errors: np.ndarray, expected: np.ndarray, evidence: Evidence) -> float:
    """Interval around what a new plan takes in truth, with probability COVERAGE.

    Normalised split conformal prediction: errors are seen in units of what prediction and measurement together were
    expected to be off by, so that the noise of short measurements does not widen the interval. The rank is that of a
    finite sample, straight between two errors.
    """
    if not len(errors):
        return _UNCALIBRATED
    of_measuring = np.array([plan.error for plan in evidence.plans])
    units = np.sort(np.abs(np.log1p(errors)) / np.hypot(expected, of_measuring))
    rank = (len(units) + 1) * COVERAGE - 1
    # Too few plans to know the tail: a half beyond the worst seen.
    most = np.interp(rank, np.arange(len(units)), units) if rank <= len(units) - 1 else 1.5 * units[-1]
    return float(np.expm1(most * np.sqrt(np.mean(expected**2))))


def _summary(errors: np.ndarray, evidence: Evidence) -> dict[str, Any]:
    if not len(errors):
        reason = f"fewer than {_FEWEST_PLANS} plans were measured from end to end, so the interval is a guess"
        return {"reason": reason}
    return {
        "plans": len(errors),
        "median_error": float(np.median(np.abs(errors))),
        "p95_error": float(np.quantile(np.abs(errors), 0.95)),
        "bias": float(np.mean(errors)),
        # Predicted and measured share of the dense latency, plan by plan.
        "ratios": [
            [plan.ratio * (1 + float(error)), plan.ratio] for plan, error in zip(evidence.plans, errors, strict=True)
        ],
    }


def _add_operations(
    profile: Profile, curves: dict[str, dict[str, Curve]], fixed: dict[str, float]
) -> dict[str, dict[str, Curve]] | None:
    rest = profile.rest.get("gflops")
    if rest is None or any(row.gflops is None for row in profile.rows):
        return None
    curves["gflops"] = {
        name: Curve(
            tuple(row.tokens_kept for row in profile.curve(name)),
            tuple(float(row.gflops or 0.0) for row in profile.curve(name)),
            parabola=True,
        )
        for name in dict.fromkeys(profile.layers)
    }
    fixed["gflops"] = rest
    return {name: _extra_operations(profile, name) for name in curves["gflops"]}


def _extra_operations(profile: Profile, signature: str) -> dict[str, Curve]:
    """GFLOP of variants beyond the plain block, where both were counted."""
    found, plain = {}, {row.tokens_kept: float(row.gflops or 0.0) for row in profile.curve(signature)}
    for (attend, rank), rows in profile.variants(signature).items():
        parts = extra_parts(Kept(0, rank, attend))
        counted = {row.tokens_kept: float(row.gflops or 0.0) - plain[row.tokens_kept] for row in rows}
        if len(parts) == 1 and counted:
            found[parts[0]] = Curve(tuple(counted), tuple(counted.values()))
    return found


def _add_memory(profile: Profile, curves: dict[str, dict[str, Curve]], fixed: dict[str, float]) -> None:
    found = {}
    for name in dict.fromkeys(profile.layers):
        rows = [row for row in profile.curve(name) if row.peak_memory_mib is not None]
        if not rows or rows[-1].tokens_kept != profile.tokens:
            return
        peaks = np.maximum.accumulate([float(row.peak_memory_mib or 0.0) for row in rows])
        found[name] = Curve(tuple(row.tokens_kept for row in rows), tuple(peaks.tolist()))
    curves[MEMORY] = found
    highest = max(curve.values[-1] for curve in found.values())
    # What a forward holds beside the block at work; where no forward was seen, what the rest of the model needs.
    held = profile.dense.get("peak_memory_mib")
    rest = profile.rest.get("peak_memory_mib") or 0.0
    fixed[MEMORY] = max(0.0, held - highest) if held is not None else rest


def _power_of(profile: Profile) -> dict[str, Any] | None:
    """Watts over tokens kept, by signature, of the rest, and the dense forward's energy; None without a sensor."""
    by_signature = {}
    for name in dict.fromkeys(profile.layers):
        rows = [row for row in profile.curve(name) if row.power_w is not None]
        if not rows:
            return None
        by_signature[name] = {
            "tokens_kept": [row.tokens_kept for row in rows],
            "power_w": [row.power_w for row in rows],
        }
    return {
        "blocks": by_signature,
        "rest_w": profile.rest.get("power_w"),
        "dense_j": profile.dense.get("energy_j"),
    }


def _energy(
    power: Mapping[str, Any], evidence: Evidence, fit: LatencyFit
) -> tuple[dict[str, Curve], float, dict[str, dict[str, Curve]]]:
    """Joules: power at a count, times latency at that count; the dense forward comes out as measured.

    Returns:
        Curves by signature, the fixed part, and extras by signature and part.
    """
    joules = {}
    for name, known in power["blocks"].items():
        counts = evidence.blocks[name].tokens_kept
        watts = np.interp(counts, known["tokens_kept"], known["power_w"])
        joules[name] = watts * np.array(fit.curves_ms[name]) * 1e-3
    rest_w = (
        power["rest_w"] if power["rest_w"] is not None else min(min(k["power_w"]) for k in power["blocks"].values())
    )
    fixed_j = rest_w * fit.fixed_ms * 1e-3
    total_j = fixed_j + sum(float(joules[name][-1]) for name in evidence.layers)
    scale = 1.0 if power["dense_j"] is None else power["dense_j"] / total_j
    curves = {
        name: Curve(evidence.blocks[name].tokens_kept, tuple((values * scale).tolist()))
        for name, values in joules.items()
    }
    extras = {
        name: {
            part: Curve(
                evidence.extras[name][part].tokens_kept,
                tuple(
                    scale * 1e-3 * ms * float(np.interp(k, known["tokens_kept"], known["power_w"]))
                    for k, ms in zip(evidence.extras[name][part].tokens_kept, values, strict=True)
                ),
            )
            for part, values in fit.extras_ms[name].items()
        }
        for name, known in power["blocks"].items()
        if name in fit.extras_ms
    }
    return curves, fixed_j * scale, extras
