"""What is said of a plan that breaks its budget."""

from __future__ import annotations

from typing import Any

import pytest

from shiva_search.workflow.outcome import _broken_in_words

MEASURED = {"latency_ms": 8.42, "ratio": 0.813, "ratio_high": 0.82, "peak_memory_mib": 1.0888758}
BUDGET = {"latency_ms": 8.802, "memory_mib": 1.0888672, "shares": {"latency_ms": 0.8, "memory_mib": 1.0}}


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ({"latency_ms": 0.957, "memory_mib": 1.0000079}, "82.0%) and 100.001% of the memory budget of 1.089 MiB"),
        ({"latency_ms": 1.02, "memory_mib": 0.9}, "82.0%), over the budget of 8.802 ms (80 % of dense)"),
        (None, "over the budget of 8.802 ms (80 % of dense)"),  # a run of before
    ],
)
def test_the_limit_that_was_broken_is_named(used: dict[str, float] | None, said: str) -> None:
    summary: dict[str, Any] = {"measured": MEASURED, "budget": BUDGET, "used": used}
    text = _broken_in_words(summary)
    assert text.startswith("the measured plan takes 8.42 ms (81.3% of dense")
    assert said in text and "allow more" in text


def test_a_plan_that_only_its_interval_speaks_against_is_not_said_to_be_over_the_budget() -> None:
    budget = {"latency_ms": 8.44, "shares": {"latency_ms": 0.815}}
    text = _broken_in_words({"measured": MEASURED, "budget": budget, "used": {"latency_ms": 1.006}})
    assert "at most 82.0%), the upper end of which is over the budget of 8.440 ms (81.5 % of dense)" in text


def test_a_broken_run_of_before_without_a_latency_limit_names_its_limits() -> None:
    budget = {"memory_mib": 1.0888672, "mean_keep": 0.5}
    text = _broken_in_words({"measured": MEASURED, "budget": budget})
    assert "and breaks the budget of 1.089 MiB, 50 % of the tokens after all corrections" in text
