"""Profile: what was measured of a model on a device. In: a folder of four files. Out: rows a cost model is fit on.

profile.json   provenance, the dense forward, the part outside the blocks, and why empty cells are empty
profile.csv    a row per layer signature and tokens_kept
forwards.csv   a row per plan measured from end to end, next to the dense forward
samples.csv    every raw sample: medians and intervals are computed from these
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from shiva_search.errors import InputError
from shiva_search.records.files import read_json, write_json, write_text
from shiva_search.records.plan import PLAIN, row_as_json, row_from_json

SCHEMA_VERSION = 1
#: Columns that the first profiles did not have.
_ADDED = ("bypass_rank", "attend", "unsettled")
_AGAIN = "restore it or run `shiva-search profile` again"
_Record = TypeVar("_Record", "Row", "Forward", "Sample")


@dataclass(frozen=True)
class Row:
    """One block at one number of tokens, selection included. None: not measured (profile.json says why).

    Attributes:
        signature: blocks with equal signatures cost the same.
        tokens: image tokens N of the model at this workload.
        tokens_kept: 0 skips the block, N is the dense block.
        latency_ms: ratio to the reference block, times the reference's median over the whole run; low and high bound
            a 95 % bootstrap interval.
        ratio: trimmed mean of the ratios to the dense reference block run right before and right after.
        samples: samples the estimate rests on.
        selection_ms: the part of latency_ms that scores, picks, gathers and scatters.
        energy_j, power_w: of one run of the block.
        peak_memory_mib: the allocator's peak during the block, above what was live before.
        gflops: 10^9 floating point operations, 2 per multiply-add.
        flags: "wide" (interval), "disturbed", "throttled", "unsettled", "no clean sample".
        bypass_rank, attend: what else the block did, as in records.plan.Kept.
    """

    signature: str
    tokens: int
    tokens_kept: int
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    samples: int
    selection_ms: float | None = None
    energy_j: float | None = None
    power_w: float | None = None
    peak_memory_mib: float | None = None
    gflops: float | None = None
    flags: tuple[str, ...] = ()
    bypass_rank: int = 0
    attend: str = "kept"

    @property
    def variant(self) -> tuple[str, int]:
        """See records.plan.Kept."""
        return self.attend, self.bypass_rank


@dataclass(frozen=True)
class Forward:
    """One plan from end to end, measured between two dense forwards.

    Attributes:
        tokens_kept: an entry per layer.
        latency_ms: ratio times the median dense forward of the run.
        ratio: planned over dense, trimmed mean; low and high bound a 95 % bootstrap interval.
        samples: samples the estimate rests on.
        energy_j, power_w, peak_memory_mib: of one forward; None where not measured.
        flags: as in Row.
    """

    tokens_kept: tuple[int, ...]
    latency_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    samples: int
    energy_j: float | None = None
    power_w: float | None = None
    peak_memory_mib: float | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One raw sample and the two references around it.

    Attributes:
        cell: what was run.
        reference: what was run right before and right after.
        round: number of the round it belongs to.
        started_s: seconds since the profile began, pauses of an interrupted run left out.
        ms: milliseconds of one run.
        before_ms, after_ms: milliseconds of the references.
        repeats: runs timed together.
        throttled: whether the device reported throttling in this round.
        unsettled: whether the device was disturbed around the sample (Device.settle), its threads placed badly.
    """

    cell: str
    reference: str
    round: int
    started_s: float
    ms: float
    before_ms: float
    after_ms: float
    repeats: int = 1
    throttled: bool = False
    unsettled: bool = False

    @property
    def foul(self) -> bool:
        """Whether the device itself told that it was disturbed."""
        return self.throttled or self.unsettled


@dataclass(frozen=True)
class Profile:
    """What a model costs on a device, block by block, and how well that is known.

    Attributes:
        model: fingerprint of the model.
        device: name of the device.
        tokens: image tokens N.
        layers: signature of each layer, in order of execution.
        workload: conditions the profile was taken in.
        rows: blocks by signature and tokens_kept.
        forwards: plans from end to end; empty where the whole model was never in memory.
        rest: latency_ms, latency_ms_low, latency_ms_high, gflops, energy_j, ... of what lies outside the blocks.
        dense: latency_ms, energy_j, power_w, peak_memory_mib, gflops of the whole dense forward, as far as measured.
        missing: column -> why it is empty.
        provenance: device description, scorer, seed, seconds spent, rounds, conditions, library versions.
        complete: False while the profile is being taken, and after an interruption.
        samples: raw samples in order of time.
    """

    model: Mapping[str, Any]
    device: str
    tokens: int
    layers: tuple[str, ...]
    workload: Mapping[str, Any]
    rows: tuple[Row, ...] = field(default=(), repr=False)
    forwards: tuple[Forward, ...] = field(default=(), repr=False)
    rest: Mapping[str, float | None] = field(default_factory=dict)
    dense: Mapping[str, float | None] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    complete: bool = True
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    schema_version: int = SCHEMA_VERSION

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def fingerprint(self) -> dict[str, Any]:
        """The model's fingerprint, so that plans can be made from a profile alone (records.plan.Planned)."""
        return dict(self.model)

    def curve(self, signature: str) -> tuple[Row, ...]:
        """Plain rows of one signature by tokens_kept: no bypass, kept tokens see each other."""
        return self.variants(signature).get(PLAIN, ())

    def variants(self, signature: str) -> dict[tuple[str, int], tuple[Row, ...]]:
        """Rows of one signature by (attend, bypass rank), each by tokens_kept."""
        found: dict[tuple[str, int], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.tokens_kept):
            if row.signature == signature:
                found.setdefault(row.variant, []).append(row)
        return {variant: tuple(rows) for variant, rows in found.items()}

    def rescaled(self, factor: float) -> Profile:
        """The same profile on a machine whose clock runs `factor` times slower; ratios stay."""

        def scale(values: Mapping[str, float | None]) -> dict[str, float | None]:
            return {
                name: value * factor if value is not None and name.startswith("latency_ms") else value
                for name, value in values.items()
            }

        rows = tuple(
            replace(
                row,
                latency_ms=row.latency_ms * factor,
                latency_ms_low=row.latency_ms_low * factor,
                latency_ms_high=row.latency_ms_high * factor,
                selection_ms=None if row.selection_ms is None else row.selection_ms * factor,
            )
            for row in self.rows
        )
        forwards = tuple(replace(item, latency_ms=item.latency_ms * factor) for item in self.forwards)
        provenance = {**self.provenance, "rescaled": factor * float(self.provenance.get("rescaled", 1.0))}
        return replace(
            self,
            rows=rows,
            forwards=forwards,
            rest=scale(self.rest),
            dense=scale(self.dense),
            provenance=provenance,
        )

    def save(self, folder: str | Path) -> None:
        """Write the four files, each atomically; profile.json last, since it says whether the others are complete.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        write_text(folder / "samples.csv", to_csv(Sample, self.samples))
        self.save_estimates(folder)

    def save_estimates(self, folder: Path) -> None:
        """Write all but samples.csv, which a running profile appends to."""
        write_text(folder / "profile.csv", to_csv(Row, self.rows))
        write_text(folder / "forwards.csv", to_csv(Forward, self.forwards))
        write_json(
            folder / "profile.json",
            {
                "schema_version": self.schema_version,
                "complete": self.complete,
                "model": dict(self.model),
                "device": self.device,
                "tokens": self.tokens,
                "layers": list(self.layers),
                "workload": dict(self.workload),
                "rest": dict(self.rest),
                "dense": dict(self.dense),
                "missing": dict(self.missing),
                "provenance": dict(self.provenance),
            },
        )


def load_profile(folder: str | Path) -> Profile:
    """Read a profile, complete or interrupted.

    Raises:
        InputError: a file is missing, torn or not a profile; the message names the file and the line.
    """
    folder = Path(folder)
    header = read_json(folder / "profile.json", "profile")
    if header.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{folder / 'profile.json'} has schema_version {header.get('schema_version')!r}, this release reads "
            f"{SCHEMA_VERSION}; run `shiva-search profile` again"
        )
    try:
        known = {name: header[name] for name in ("model", "device", "tokens", "workload", "rest", "dense", "missing")}
        known["layers"] = tuple(header["layers"])
        return Profile(
            **known,
            provenance=header["provenance"],
            complete=bool(header["complete"]),
            rows=tuple(from_csv(Row, folder / "profile.csv")),
            forwards=tuple(from_csv(Forward, folder / "forwards.csv")),
            samples=tuple(read_samples(folder / "samples.csv")),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'profile.json'} is not a profile: {error!r}; {_AGAIN}") from None


def read_samples(path: Path) -> list[Sample]:
    """Raw samples; a last line cut short by an interruption is left out, a missing file is no samples."""
    if not path.exists():
        return []
    return from_csv(Sample, path, torn_end=True)


def to_csv(kind: type[_Record], records: Iterable[_Record], header: bool = True) -> str:
    """Records as CSV text, numbers in full precision, None as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [item.name for item in fields(kind)]
    if header:
        writer.writerow(names)
    for record in records:
        writer.writerow(_write_cell(getattr(record, name)) for name in names)
    return text.getvalue()


def from_csv(kind: type[_Record], path: Path, torn_end: bool = False) -> list[_Record]:
    """Inverse of to_csv. Columns may come in any order and further ones are ignored.

    Raises:
        InputError: missing file or column, or a cell of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; {_AGAIN}") from error
    if torn_end:
        text = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(text))
    columns = {item.name: str(item.type) for item in fields(kind)}
    optional = {item.name for item in fields(kind) if item.name in _ADDED}
    columns = {name: kind for name, kind in columns.items() if name not in optional - set(reader.fieldnames or ())}
    if reader.fieldnames is None and torn_end:
        return []
    absent = sorted(columns.keys() - set(reader.fieldnames or ()))
    if absent:
        raise InputError(f"{path} lacks the columns {', '.join(absent)}; {_AGAIN}")
    found = []
    for line in reader:
        try:
            cells: dict[str, Any] = {name: _read_cell(line[name], types) for name, types in columns.items()}
            found.append(kind(**cells))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}; correct the line, or {_AGAIN}") from None
    return found


def _write_cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(int(value))
        case float():
            return repr(float(value))
        case tuple():
            # Counts as a JSON list, which spreadsheets leave alone; flags as words.
            return json.dumps(row_as_json(value)) if value and isinstance(value[0], int) else ";".join(map(str, value))
    return str(value)


def _read_cell(text: str | None, types: str) -> object:
    if text is None:
        raise ValueError("too few cells")
    if types == "str":
        return text
    if types == "int":
        return int(text)
    if types == "bool":
        return bool(int(text))
    if types == "tuple[int, ...]":
        return row_from_json(json.loads(text))
    if types == "tuple[str, ...]":
        return tuple(item for item in text.split(";") if item)
    if text == "" and "None" in types:
        return None
    value = float(text)
    if not -1e300 < value < 1e300:
        raise ValueError(f"{text!r} is not a finite number")
    return value


def signatures_of(layers: Sequence[str]) -> tuple[str, ...]:
    """Distinct signatures in order of first use."""
    return tuple(dict.fromkeys(layers))
