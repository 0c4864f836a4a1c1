"""Figures in words: digits, units, reasons."""

from __future__ import annotations

import pytest

from shiva_search.records.plan import Plan
from shiva_search.records.run import Summary
from shiva_search.reporting.words import (
    Footnotes,
    cost_in_words,
    figure_in_words,
    limits_in_words,
    number,
    percent,
    plan_in_words,
    ratio_of,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (184.23, "184.2"),
        (12.314, "12.31"),
        (0.041723, "0.04172"),
        (15312.4, "15310"),
        (9.9999, "10.00"),
        (-0.5, "-0.5000"),
        (50, "50.00"),
    ],
)
def test_a_number_has_four_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_a_percentage_has_a_decimal_where_it_says_something() -> None:
    assert [percent(share) for share in (0.65, 0.6413, 1.0, 0.0004)] == ["65 %", "64.1 %", "100 %", "0 %"]


def test_equal_reasons_share_a_footnote() -> None:
    notes = Footnotes()
    assert [notes.dash("no sensor"), notes.dash("no access"), notes.dash("no sensor")] == ["–¹", "–²", "–¹"]
    assert notes.lines() == [("¹", "no sensor"), ("²", "no access")]


@pytest.mark.parametrize(
    ("summary", "part", "reason"),
    [
        ({"dense": {"latency_ms": 9.0}, "reasons": {"energy_j": "no sensor"}}, "dense", "no sensor"),
        ({"dense": {"latency_ms": 9.0}, "reasons": {"dense_energy_j": "too short"}}, "dense", "too short"),
        ({"dense": {"latency_ms": 9.0}}, "dense", "energy: not measured, and no reason recorded"),
        ({"predicted": {"latency_ms": 9.0}}, "predicted", "energy: not known, and no reason recorded"),
        ({}, "measured", "measured: not there yet; `shiva-search measure` makes it"),
    ],
)
def test_a_missing_figure_has_a_reason(summary: Summary, part: str, reason: str) -> None:
    notes = Footnotes()
    assert cost_in_words(summary, part, "energy_j", notes) == "–¹"
    assert notes.reasons == [reason]


def test_a_row_s_own_reason_comes_first() -> None:
    notes = Footnotes()
    figure_in_words({"energy_j": None, "reasons": {"energy_j": "stale counter"}}, "energy_j", notes, "any")
    assert notes.reasons == ["stale counter"]
    assert figure_in_words({"measured_peak_memory_mib": 27.75}, "measured_peak_memory_mib", notes) == "27.75 MiB"


def test_a_share_without_its_number_is_still_a_limit() -> None:
    assert limits_in_words({"budget": {"shares": {"energy_j": 0.5}}}) == {"energy_j": "50 % of dense"}


def test_the_ratio_is_that_of_one_measurement() -> None:
    assert (
        ratio_of({"measured": {"ratio": 0.64, "latency_ms": 70.0}, "dense": {"latency_ms": 100.0}}, "measured") == 0.64
    )
    assert ratio_of({"measured": {"latency_ms": 70.0, "dense_latency_ms": 140.0}}, "measured") == 0.5
    assert ratio_of({"measured": {"latency_ms": 70.0}, "dense": {"latency_ms": 140.0}}, "measured") == 0.5
    predicted = {"latency_ms": 70.0, "dense_latency_ms": 100.0}
    assert ratio_of({"predicted": predicted, "dense": {"latency_ms": 140.0}}, "predicted") == 0.7
    # The measured dense latency is of another time, when the machine may have been faster.
    assert ratio_of({"predicted": {"latency_ms": 70.0}, "dense": {"latency_ms": 100.0}}, "predicted") is None


def test_a_block_whose_tokens_all_take_the_bypass_is_not_called_skipped() -> None:
    ranks = {"kind": "affine", "ranks": [[0, 16, 0, 32, 16]]}
    words = plan_in_words(Plan(100, ((100, 0, 0, 0, 50),), bypass=ranks))
    assert "1 selects tokens, 1 is skipped, 2 are replaced by a bypass, 1 keeps all 100" in words
    assert words.endswith("rejected tokens take a bypass in 3")


def test_a_plan_counts_its_blocks() -> None:
    plan = Plan(100, ((100, 50, 0, 100), (100, 0, 0, 100)), segments=((0.0, 0.5), (0.5, 1.0)))
    words = plan_in_words(plan)
    assert words.startswith("8 blocks in 2 timestep segments: 1 selects tokens, 3 are skipped, 4 keep all 100;")
    assert words.endswith("56.2 % of all tokens are processed")
