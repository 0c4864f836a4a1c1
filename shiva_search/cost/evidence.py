"""What a fit rests on. In: a profile. Out: blocks and forwards with their standard errors, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from shiva_search.errors import InputError
from shiva_search.records.cost_table import extra_parts
from shiva_search.records.plan import Kept, row_as_json, row_from_json
from shiva_search.records.profile import Profile, Row, signatures_of

_Z95 = 1.96
_NO_BETTER = 0.003  # relative; a bootstrap interval knows nothing of errors all samples share


@dataclass(frozen=True)
class BlockCurve:
    """Blocks of one signature.

    Attributes:
        tokens_kept: ascending, from 0 to N.
        latency_ms: measured alone, selection included.
        error: standard error of each, relative.
    """

    tokens_kept: tuple[int, ...]
    latency_ms: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class Extra:
    """What a variant of a pruned block costs beyond the plain one.

    Attributes:
        tokens_kept: ascending, below N; straight lines between, and beyond both ends as at the end.
        latency_ms: above the plain block at that count, measured alone; may be below zero.
        error_ms: standard error of each.
    """

    tokens_kept: tuple[int, ...]
    latency_ms: tuple[float, ...]
    error_ms: tuple[float, ...]

    def weights(self, k: int) -> np.ndarray:
        """[counts]: how much each measured count says about one; they add up to 1."""
        unit = np.eye(len(self.tokens_kept))
        return np.array([np.interp(k, self.tokens_kept, row) for row in unit])


#: "all", or "rank 16": one part of a variant; the parts of a variant add up.
Extras = Mapping[str, Extra]


@dataclass(frozen=True)
class PlanRatio:
    """A plan measured against the dense model.

    Attributes:
        rows: what each layer does, a row per segment.
        weights: share of time of each segment.
        ratio: planned over dense latency.
        error: standard error, relative.
    """

    rows: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    ratio: float
    error: float


@dataclass(frozen=True)
class Evidence:
    """All a cost model's latency is fit on.

    Attributes:
        tokens: N.
        layers: signature of each layer.
        blocks: by signature.
        rest_ms: outside the blocks, measured with every block skipped.
        dense_ms: the dense forward; None where the model was never whole in memory.
        plans: from end to end.
        extras: by signature: what variants cost beyond the plain block.
    """

    tokens: int
    layers: tuple[str, ...]
    blocks: Mapping[str, BlockCurve]
    rest_ms: float
    dense_ms: float | None
    plans: tuple[PlanRatio, ...] = ()
    extras: Mapping[str, Extras] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: Profile) -> Evidence:
        """Read a profile.

        Raises:
            InputError: a signature lacks its dense block or has no rows at all.
        """
        blocks = {}
        for signature in signatures_of(profile.layers):
            rows = profile.curve(signature)
            counts = tuple(row.tokens_kept for row in rows)
            if not counts or counts[-1] != profile.tokens:
                raise InputError(
                    f"the profile has no dense row (tokens_kept {profile.tokens}) for signature {signature}; "
                    "run `shiva-search profile` again"
                )
            if any(row.latency_ms <= 0 for row in rows):
                raise InputError(f"the profile has a latency_ms of zero or less for signature {signature}; correct it")
            errors = [_error(row.latency_ms, row.latency_ms_low, row.latency_ms_high) for row in rows]
            blocks[signature] = BlockCurve(counts, tuple(row.latency_ms for row in rows), tuple(errors))
        return cls(
            tokens=profile.tokens,
            layers=profile.layers,
            blocks=blocks,
            rest_ms=float(profile.rest.get("latency_ms") or 0.0),
            dense_ms=profile.dense.get("latency_ms"),
            plans=tuple(
                PlanRatio((item.tokens_kept,), (1.0,), item.ratio, _error(item.ratio, item.ratio_low, item.ratio_high))
                for item in profile.forwards
            ),
            extras={signature: _extras(profile, signature) for signature in blocks},
        )

    def with_plan(self, plan: PlanRatio) -> Evidence:
        """One more plan; an earlier measurement of the same plan stays, as two are better than one."""
        return replace(self, plans=(*self.plans, plan))

    def without_plans(self, indices: Sequence[int]) -> Evidence:
        """Some plans held out."""
        return replace(self, plans=tuple(plan for i, plan in enumerate(self.plans) if i not in set(indices)))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        plain = asdict(self)
        for plan, item in zip(self.plans, plain["plans"], strict=True):
            item["rows"] = [row_as_json(row) for row in plan.rows]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evidence:
        """Inverse of as_dict; raises KeyError or TypeError where fields are missing."""
        known = dict(values)
        known["layers"] = tuple(known["layers"])
        known["blocks"] = {
            name: BlockCurve(*(tuple(item[key]) for key in ("tokens_kept", "latency_ms", "error")))
            for name, item in known["blocks"].items()
        }
        known["plans"] = tuple(
            PlanRatio(tuple(map(row_from_json, item["rows"])), tuple(item["weights"]), item["ratio"], item["error"])
            for item in known["plans"]
        )
        known["extras"] = {
            name: {
                part: Extra(*(tuple(item[key]) for key in ("tokens_kept", "latency_ms", "error_ms")))
                for part, item in parts.items()
            }
            for name, parts in known.get("extras", {}).items()
        }
        return cls(**known)


def _extras(profile: Profile, signature: str) -> dict[str, Extra]:
    """Differences of measured variants to the plain block, where both were measured at a count.

    A bypass costs much the same at any count of tokens kept but none, so few counts serve all.
    """
    found, plain = {}, {row.tokens_kept: row for row in profile.curve(signature)}
    for (attend, rank), rows in profile.variants(signature).items():
        parts = extra_parts(Kept(0, rank, attend))
        if len(parts) != 1:
            continue
        differences, errors = {}, {}
        for row in rows:
            other = plain.get(row.tokens_kept)
            if other is not None and row.tokens_kept < profile.tokens:
                differences[row.tokens_kept] = row.latency_ms - other.latency_ms
                errors[row.tokens_kept] = float(np.hypot(_error_ms(row), _error_ms(other)))
        if differences:
            counts = tuple(sorted(differences))
            found[parts[0]] = Extra(
                counts, tuple(differences[k] for k in counts), tuple(errors[k] for k in counts)
            )  # fmt: skip
    return found


def _error_ms(row: Row) -> float:
    return row.latency_ms * _error(row.latency_ms, row.latency_ms_low, row.latency_ms_high)


def _error(centre: float, low: float, high: float) -> float:
    return float(np.hypot((high - low) / (2 * _Z95 * centre), _NO_BETTER))
