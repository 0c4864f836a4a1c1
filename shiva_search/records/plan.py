"""Plan: how many tokens each layer keeps, per timestep segment, with what is known of its cost and quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from shiva_search.errors import InputError
from shiva_search.records.files import read_json, write_json

SCHEMA_VERSION = 1
BYPASS_KINDS = ("none", "mean", "affine")
ATTEND_MODES = ("kept", "all")


class Kept(int):
    """What one layer does: tokens kept, whose keys they see, and how much of a bypass the rejected ones take.

    It is the number of tokens kept, and equal to it where rejected tokens stand still and kept ones see each other.

    Attributes:
        rank: of the bypass of rejected tokens; 0: they stand still. 1 where a bypass has no rank ("mean").
        attend: "kept" or "all": the tokens whose keys and values the kept ones attend to.

    Raises:
        InputError: rank below 0 or an unknown mode.
    """

    rank: int
    attend: str

    def __new__(cls, kept: int, rank: int = 0, attend: str = "kept") -> Kept:
        if rank < 0 or attend not in ATTEND_MODES:
            raise InputError(
                f"a layer's bypass has rank 0 or more and it attends to one of {', '.join(ATTEND_MODES)}, "
                f"got {rank!r} and {attend!r}"
            )
        made = super().__new__(cls, kept)
        made.rank, made.attend = rank, attend
        return made

    @classmethod
    def of(cls, value: int) -> Kept:
        """A plain count as a choice that is as simple as can be; choices as they are."""
        return value if isinstance(value, Kept) else cls(value)

    @property
    def variant(self) -> tuple[str, int]:
        """All but the count: what a cost curve over the count belongs to."""
        return self.attend, self.rank

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Kept):
            return int(self) == int(other) and self.variant == other.variant
        return isinstance(other, int) and int(self) == other and self.variant == PLAIN

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(int(self)) if self.variant == PLAIN else hash((int(self), self.variant))

    def __repr__(self) -> str:
        return str(int(self)) if self.variant == PLAIN else f"Kept({int(self)}, rank={self.rank}, {self.attend})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (int(self), self.rank, self.attend)


#: The variant of a plain count.
PLAIN = ("kept", 0)


def row_as_json(row: Sequence[int]) -> list[Any]:
    """A row of choices: plain counts as numbers, others as [kept, rank, attend]."""
    chosen = [Kept.of(entry) for entry in row]
    return [int(k) if k.variant == PLAIN else [int(k), k.rank, k.attend] for k in chosen]


def row_from_json(row: Sequence[Any]) -> tuple[Kept, ...]:
    """Inverse of row_as_json.

    Raises:
        TypeError, ValueError: no such row.
    """
    return tuple(Kept(*entry) if isinstance(entry, list) else Kept(entry) for entry in row)


def choice_in_words(choice: int, tokens: int) -> str:
    """What a layer does: "784", "320", "320+r16" with a bypass of rank 16, "320*" where kept tokens attend to all."""
    kept = Kept.of(choice)
    if kept >= tokens:
        return str(int(kept))
    return f"{int(kept)}{'*' if kept > 0 and kept.attend == 'all' else ''}{f'+r{kept.rank}' if kept.rank else ''}"


def row_in_words(row: Sequence[int], tokens: int) -> str:
    """What each layer does: "784 320+r16 0 784"."""
    return " ".join(choice_in_words(choice, tokens) for choice in row)


class Planned(Protocol):
    """What a plan needs to know of a model (models.Model is one)."""

    @property
    def tokens(self) -> int: ...

    @property
    def layer_count(self) -> int: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Plan:
    """A static choice of tokens kept: an integer per (segment, layer), 0 skips the block, `tokens` keeps all.

    Attributes:
        tokens: image tokens N of the model at this workload.
        tokens_kept: a row per segment, an entry in [0, N] per layer; the first layer keeps N.
        segments: [low, high) intervals of normalised time t (1 is noise, 0 is the image), covering [0, 1].
        model: fingerprint of the model; device and workload: what it was made for.
        bypass: what rejected tokens do: {"kind": "none"}, or "mean" or "affine" with "ranks", per segment and layer.
        attend: whose keys and values kept tokens see, per segment and layer.
        budget, predicted, measured, fidelity, solver, origin: how it was found, by name with units.
        folder: where it was read from, if from a file; its trained selector lies beside it. Not saved.

    Raises:
        InputError: the rule that is broken, with the value.
    """

    tokens: int
    tokens_kept: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    model: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""
    workload: Mapping[str, Any] = field(default_factory=dict)
    bypass: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})
    attend: tuple[tuple[str, ...], ...] = ()
    budget: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"this plan has schema_version {self.schema_version}, this release reads {SCHEMA_VERSION}; "
                "make the plan again with `shiva-search optimize`"
            )
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise InputError(f"a plan's tokens is a whole number above zero, got {self.tokens!r}")
        if not self.tokens_kept or not self.tokens_kept[0]:
            raise InputError("a plan needs at least one row of tokens_kept with one entry per layer")
        for row in self.tokens_kept:
            if len(row) != len(self.tokens_kept[0]):
                raise InputError(
                    f"all rows of tokens_kept have one entry per layer, got {[*map(len, self.tokens_kept)]}"
                )
            for layer, kept in enumerate(row):
                if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept <= self.tokens:
                    raise InputError(
                        f"tokens_kept must be whole numbers in [0, {self.tokens}], got {kept!r} in layer {layer}"
                    )
            if row[0] != self.tokens:
                raise InputError(
                    f"the first layer keeps all {self.tokens} tokens, got {row[0]}; pruning there hurts most"
                )
        if len(self.segments) != len(self.tokens_kept):
            raise InputError(f"{len(self.segments)} segments but {len(self.tokens_kept)} rows of tokens_kept")
        edges = sorted(self.segments)
        covers = edges[0][0] == 0.0 and edges[-1][1] == 1.0
        if not covers or any(a[1] != b[0] for a, b in zip(edges, edges[1:], strict=False)):
            raise InputError(f"segments must cover [0, 1] without gaps, got {[list(pair) for pair in self.segments]}")
        if self.bypass.get("kind") not in BYPASS_KINDS:
            raise InputError(f"bypass kind must be one of {', '.join(BYPASS_KINDS)}, got {self.bypass.get('kind')!r}")
        ranks = self.bypass.get("ranks", [])
        if (self.bypass["kind"] == "none") != (not ranks) or (
            ranks and [*map(len, ranks)] != [*map(len, self.tokens_kept)]
        ):
            raise InputError(
                f"a bypass other than none has ranks, one per segment and layer, got {dict(self.bypass)!r}; "
                "0 lets the rejected tokens of a layer stand still"
            )
        if not self.attend:
            object.__setattr__(self, "attend", tuple(("kept",) * len(row) for row in self.tokens_kept))
        if [*map(len, self.attend)] != [*map(len, self.tokens_kept)] or any(
            mode not in ATTEND_MODES for row in self.attend for mode in row
        ):
            raise InputError(f"attend has one of {', '.join(ATTEND_MODES)} per segment and layer, got {self.attend!r}")

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return len(self.tokens_kept[0])

    @property
    def rows(self) -> tuple[tuple[Kept, ...], ...]:
        """What each layer does, a row per segment."""
        ranks = self.bypass.get("ranks") or [[0] * len(row) for row in self.tokens_kept]
        return tuple(
            tuple(Kept(*choice) for choice in zip(*row, strict=True))
            for row in zip(self.tokens_kept, ranks, self.attend, strict=True)
        )

    def as_columns(self) -> dict[str, list[list[Any]]]:
        """What each layer does, as tables keep it: tokens_kept, bypass_ranks and attend, a list per segment."""
        return {
            "tokens_kept": [list(row) for row in self.tokens_kept],
            "bypass_ranks": [[choice.rank for choice in row] for row in self.rows],
            "attend": [list(row) for row in self.attend],
        }

    @property
    def mean_keep(self) -> float:
        """Mean share of tokens kept over layers and time, in (0, 1]."""
        weights = [high - low for low, high in self.segments]
        return sum(w * sum(row) / (len(row) * self.tokens) for w, row in zip(weights, self.tokens_kept, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether every layer keeps every token."""
        return all(kept == self.tokens for row in self.tokens_kept for kept in row)

    def row_at(self, t: float) -> int:
        """Index of the segment that holds normalised time t in [0, 1]."""
        for index, (low, high) in enumerate(self.segments):
            if low <= t < high or (high == 1.0 and t >= 1.0):
                return index
        return 0

    @classmethod
    def from_rows(
        cls, model: Planned, rows: Sequence[Sequence[int]], *, bypass_kind: str = "affine", **known: Any
    ) -> Plan:
        """A plan from one list of tokens kept per segment; segments split [0, 1] evenly, noise last.

        Args:
            model: tokens, layers and fingerprint.
            rows: plain counts, or `Kept` where layers have a bypass or attend to all tokens.
            bypass_kind: which bypass the ranks in `rows` are of.
            **known: fields of the plan.

        Raises:
            InputError: wrong number of layers, values out of range, first layer not dense.
        """
        if rows and any(len(row) != model.layer_count for row in rows):
            raise InputError(
                f"this model has {model.layer_count} layers, rows have {[len(row) for row in rows]} entries"
            )
        count = max(len(rows), 1)
        segments = tuple((i / count, (i + 1) / count) for i in range(count))
        # What is no whole number is left for the checks of the plan itself.
        kept = tuple(tuple(int(entry) if isinstance(entry, Kept) else entry for entry in row) for row in rows)
        chosen = [[entry if isinstance(entry, Kept) else Kept(0) for entry in row] for row in rows]
        made: dict[str, Any] = {"segments": segments, "model": model.fingerprint()}
        if any(entry.rank for row in chosen for entry in row):
            made["bypass"] = {"kind": bypass_kind, "ranks": [[entry.rank for entry in row] for row in chosen]}
        made["attend"] = tuple(tuple(entry.attend for entry in row) for row in chosen)
        return cls(model.tokens, kept, **{**made, **known})

    @classmethod
    def uniform(cls, model: Planned, keep: float, **known: Any) -> Plan:
        """Every layer but the first keeps floor(keep * N) tokens, at least one.

        Raises:
            InputError: keep outside (0, 1].
        """
        if not 0 < keep <= 1:
            raise InputError(f"keep is a share of tokens in (0, 1], got {keep}")
        kept = max(1, int(model.tokens * keep + 1e-9))
        return cls.from_rows(model, [[model.tokens] + [kept] * (model.layer_count - 1)], **known)

    @classmethod
    def dense(cls, model: Planned, **known: Any) -> Plan:
        """The untouched model as a plan."""
        return cls.uniform(model, 1.0, **known)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "plan") -> Plan:
        """Read the JSON form; unknown fields are ignored so that later minor releases can add some.

        Raises:
            InputError: fields missing or of the wrong type.
        """
        try:
            known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
            known.pop("folder", None)
            known["tokens_kept"] = tuple(tuple(row) for row in values["tokens_kept"])
            if "segments" in known:
                known["segments"] = tuple((float(low), float(high)) for low, high in known["segments"])
            if "attend" in known:
                known["attend"] = tuple(tuple(row) for row in known["attend"])
            for name in (
                "model",
                "workload",
                "bypass",
                "budget",
                "predicted",
                "measured",
                "fidelity",
                "solver",
                "origin",
            ):
                if not isinstance(known.get(name, {}), Mapping):
                    raise TypeError(f"{name} is not an object")
            return cls(**known)
        except InputError as error:
            raise InputError(f"{source} is not a plan this release can use: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source} is not a plan: {error!r}; make it with `shiva-search optimize`") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """Read plan.json, or the plan.json inside a run's folder.

        Raises:
            InputError: missing, unreadable or not a plan.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "plan.json"
        return replace(cls.from_dict(read_json(path, "plan"), str(path)), folder=path.parent)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form (contract: plan.json)."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "folder"}
        plain["tokens_kept"] = [list(row) for row in self.tokens_kept]
        plain["segments"] = [list(pair) for pair in self.segments]
        plain["attend"] = [list(row) for row in self.attend]
        return {"schema_version": plain.pop("schema_version"), **plain}

    def save(self, path: str | Path) -> None:
        """Write plan.json atomically.

        Raises:
            InputError: the folder cannot be written.
        """
        write_json(Path(path), self.as_dict())

    def with_(self, **changes: Any) -> Plan:
        """A copy with the given fields replaced."""
        return replace(self, **changes)

    def check_model(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a foreign model.

        Raises:
            InputError: names the fields that differ.
        """
        differing = [
            f"{name} is {self.model[name]!r} in the plan and {fingerprint.get(name)!r} in the model"
            for name in ("architecture", "config_hash", "layers", "tokens", "weights_hash")
            if name in self.model and self.model[name] != fingerprint.get(name)
        ]
        if differing:
            raise InputError(f"this plan was made for another model: {'; '.join(differing)}; search again for this one")
