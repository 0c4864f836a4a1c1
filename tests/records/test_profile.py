"""Profiles and measurements as files."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from shiva_search.errors import InputError
from shiva_search.records.measurement import Measurement
from shiva_search.records.profile import Forward, Profile, Row, Sample, load_profile

PROFILE = Profile(
    model={"architecture": "X", "tokens": 64},
    device="cpu",
    tokens=64,
    layers=("a", "b", "a"),
    workload={"batch": 2},
    rows=(
        Row("a", 64, 0, 0.01, 0.009, 0.011, 0.001, 0.0009, 0.0011, 12, 0.0, gflops=0.0),
        Row("a", 64, 64, 1 / 3, 0.3, 0.4, 1.0, 0.99, 1.01, 12, None, 0.1, 30.0, 5.5, 0.25, ("wide", "disturbed")),
        Row("b", 64, 64, 0.5, 0.4, 0.6, 1.5, 1.4, 1.6, 3),
    ),
    forwards=(
        Forward((64, 32, 0), 1.5, 0.6, 0.55, 0.65, 9, flags=("wide",)),
        Forward((64, 0, 0), 1.0, 0.4, 0.3, 0.5, 2),
    ),
    rest={"latency_ms": 0.2, "latency_ms_low": 0.1, "latency_ms_high": 0.3, "gflops": None},
    dense={"latency_ms": 2.5, "peak_memory_mib": 7.0},
    missing={"energy_j": "no sensor"},
    provenance={"seed": 3},
    samples=(
        Sample("block a 64", "blocks", 0, 0.5, 0.33, 0.3, 0.4, 2, True),
        Sample("x", "blocks", 1, 1.0, 1.0, 1.0, 1.0),
    ),
)


def test_what_is_saved_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    assert load_profile(tmp_path) == PROFILE
    assert load_profile(tmp_path).rows[1].latency_ms == 1 / 3


def test_columns_carry_their_units_and_what_was_not_measured_is_empty(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {
        *("signature", "tokens", "tokens_kept", "latency_ms", "latency_ms_low", "latency_ms_high", "samples"),
        *("selection_ms", "energy_j", "power_w", "peak_memory_mib", "gflops", "flags"),
    } <= rows[0].keys()
    assert rows[2]["energy_j"] == rows[2]["power_w"] == ""
    assert rows[1]["flags"] == "wide;disturbed"


def test_a_table_edited_by_hand_is_read(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    path = tmp_path / "profile.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    columns = ["note", *reversed(list(rows[0]))]
    with path.open("w") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, "note": "by hand", "latency_ms": "0.75"} for row in rows)
    assert [row.latency_ms for row in load_profile(tmp_path).rows] == [0.75] * 3


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("profile.csv", "a,64,0,0.01", "a,64,0,fast", "profile.csv, line 2.*fast"),
        ("profile.csv", "a,64,0,0.01", "a,64,0,nan", "line 2.*not a finite number"),
        ("profile.csv", "a,64,0,0.01", "a,64,0,", "line 2"),
        ("profile.csv", "latency_ms,", "latency,", "lacks the columns latency_ms"),
        ("profile.csv", "b,64,64", "b,64", "line 4"),
        ("forwards.csv", "[64, 32, 0]", "64 32 0", "forwards.csv, line 2"),
        ("profile.json", '"schema_version": 1', '"schema_version": 7', "schema_version 7"),
        ("profile.json", '"layers"', '"layer"', "not a profile"),
        ("profile.json", "{", "[", "JSON"),
    ],
)
def test_spoilt_files_are_refused_with_place_and_next_step(
    tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    PROFILE.save(tmp_path)
    path = tmp_path / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as refusal:
        load_profile(tmp_path)
    assert "\n" not in str(refusal.value)


def test_missing_files_are_refused_but_missing_samples_are_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profile\.json"):
        load_profile(tmp_path)
    PROFILE.save(tmp_path)
    (tmp_path / "samples.csv").unlink()
    assert load_profile(tmp_path).samples == ()
    (tmp_path / "profile.csv").unlink()
    with pytest.raises(InputError, match=r"profile\.csv"):
        load_profile(tmp_path)


def test_a_torn_last_sample_is_left_out(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    path = tmp_path / "samples.csv"
    path.write_text(path.read_text() + "block a 64,blocks,2,1.5,0.")
    assert load_profile(tmp_path).samples == PROFILE.samples


def test_rescaling_moves_times_and_leaves_ratios(tmp_path: Path) -> None:
    slower = PROFILE.rescaled(2.0)
    assert slower.rows[1].latency_ms == pytest.approx(2 / 3)
    assert slower.rows[1].ratio == 1.0
    assert slower.rows[0].selection_ms == 0.0 and slower.rows[1].selection_ms is None
    assert slower.dense == {"latency_ms": 5.0, "peak_memory_mib": 7.0}
    assert slower.forwards[0].ratio == 0.6 and slower.forwards[0].latency_ms == 3.0
    assert slower.rescaled(3.0).provenance["rescaled"] == 6.0


def test_curves_and_layers() -> None:
    assert [row.tokens_kept for row in replace(PROFILE, rows=PROFILE.rows[::-1]).curve("a")] == [0, 64]
    assert PROFILE.layer_count == 3


def test_a_measurement_survives_json() -> None:
    found = Measurement(
        tokens_kept=((64, 32), (64, 0)),
        latency_ms=1.0,
        latency_ms_low=0.9,
        latency_ms_high=1.1,
        dense_latency_ms=2.0,
        ratio=0.5,
        ratio_low=0.45,
        ratio_high=0.55,
        samples=8,
        reasons={"energy_j": "no sensor"},
        flags=("wide",),
    )
    assert Measurement.from_dict(found.as_dict()) == found
