"""Budgets: units are read exactly, and what is wrong is said in one line."""

import pytest

from shiva_search.errors import InputError, UnavailableError
from shiva_search.records.budget import Budget, parse_limit
from shiva_search.records.cost import CostEstimate


@pytest.mark.parametrize(
    ("metric", "text", "value"),
    [
        ("latency_ms", "50ms", 50.0),
        ("latency_ms", "0.05 s", 50.0),
        ("latency_ms", "1e3us", 1.0),
        ("energy_j", "2J", 2.0),
        ("energy_j", "1500mJ", 1.5),
        ("power_w", "0.25kW", 250.0),
        ("memory_mib", "6GiB", 6144.0),
        ("memory_mib", "1GB", 1e9 / 2**20),
        ("gflops", "5T", 5000.0),
        ("gflops", "750 GFLOPs", 750.0),
        ("mean_keep", "0.6", 0.6),
    ],
)
def test_reads_units(metric: str, text: str, value: float) -> None:
    number, is_share = parse_limit(metric, text)
    assert not is_share
    assert number == pytest.approx(value)


@pytest.mark.parametrize("metric", ["latency_ms", "energy_j", "power_w", "memory_mib", "gflops", "mean_keep"])
def test_reads_shares(metric: str) -> None:
    assert parse_limit(metric, "60%") == (pytest.approx(0.6), True)


@pytest.mark.parametrize(
    "text", ["50", "", "ms", "fifty ms", "0ms", "-5ms", "50J", "50 parsecs", "nan", "50 ms ms", "1e999ms"]
)
def test_refuses_bad_latency_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_limit("latency_ms", text)
    message = str(caught.value)
    assert "\n" not in message
    assert "50ms" in message


def test_names_known_units_when_the_unit_is_missing() -> None:
    with pytest.raises(InputError, match="needs a unit.*ns, us, ms, s"):
        parse_limit("latency_ms", "50")


def test_per_image_budgets_are_spread_over_the_steps() -> None:
    budget = Budget.parse({"latency_ms": "1.4s", "memory_mib": "2GiB"}, per="image", steps=28)
    assert budget.latency_ms == pytest.approx(50.0)
    assert budget.memory_mib == 2048.0


def test_shares_resolve_against_dense() -> None:
    dense = CostEstimate(latency_ms=80.0, gflops=10.0)
    budget = Budget.parse({"latency_ms": "60%", "gflops": "9G"}).resolve(dense)
    assert budget.limits() == {"latency_ms": pytest.approx(48.0), "gflops": 9.0}


def test_a_budget_on_what_was_not_measured_is_refused_with_exit_code_4() -> None:
    with pytest.raises(UnavailableError, match="energy") as caught:
        Budget.parse({"energy_j": "2J"}).resolve(CostEstimate(latency_ms=80.0))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_numbers_must_be_above_zero(value: float) -> None:
    with pytest.raises(InputError):
        Budget(latency_ms=value)


def test_texts_where_numbers_belong_are_told_how_they_are_written() -> None:
    with pytest.raises(InputError, match=r"shares=.*0\.6.*Budget\.parse\(\{\"latency_ms\": '60%'\}\)"):
        Budget(latency_ms="60%")  # type: ignore[arg-type]


def test_mean_keep_is_at_most_one() -> None:
    with pytest.raises(InputError):
        Budget(mean_keep=1.5)


def test_a_metric_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(InputError, match="one of latency_ms, .*, got 'latency'"):
        Budget.parse({"latency": "60%"})


def test_a_share_that_was_meant_as_a_percentage_is_refused() -> None:
    with pytest.raises(InputError, match=r"a latency budget of 6000% of the dense model limits nothing; write 60%"):
        Budget(shares={"latency_ms": 60})
