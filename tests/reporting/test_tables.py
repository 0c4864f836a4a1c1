"""CSV files come back as they went, and the closing table says what is known and why the rest is not."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from shiva_search.errors import InputError
from shiva_search.records.plan import Plan
from shiva_search.records.run import Summary
from shiva_search.reporting import tables
from shiva_search.reporting.reading import RunFiles

CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.lists(st.integers(0, 784), min_size=1), min_size=1),
    st.dictionaries(st.text("abc", min_size=1), st.integers(), min_size=1),
    st.sampled_from(["trade", "stopped early", "a, b", 'say "no"', "true story", "-", "[half"]),
)


class TestFiles:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
    @given(rows=st.lists(st.fixed_dictionaries({"a": CELLS, "b": CELLS}), min_size=1, max_size=4))
    def test_rows_come_back_with_their_types(self, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
        tables.write_rows(tmp_path / "x.csv", rows, ("a", "b"))
        # repr tells 1 from 1.0 and from True
        in_order = [{name: row[name] for name in ("a", "b")} for row in rows]
        assert repr(tables.read_rows(tmp_path / "x.csv")) == repr(in_order)

    @pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
    def test_what_is_not_known_is_an_empty_cell(self, tmp_path: Path, value: float | None) -> None:
        tables.write_rows(tmp_path / "x.csv", [{"trial": 1, "energy_j": value}])
        assert (tmp_path / "x.csv").read_text() == "trial,energy_j\n1,\n"

    def test_zero_is_a_figure(self, tmp_path: Path) -> None:
        tables.write_rows(tmp_path / "x.csv", [{"error": 0.0}])
        assert tables.read_rows(tmp_path / "x.csv") == [{"error": 0.0}]

    @pytest.mark.parametrize(
        ("write", "columns"),
        [
            (tables.write_trials, tables.TRIALS),
            (tables.write_pareto, tables.PARETO),
            (tables.write_measurements, tables.MEASUREMENTS),
            (tables.write_training, tables.TRAINING),
            (tables.write_compare, tables.COMPARE),
        ],
    )
    def test_columns_keep_their_order_and_further_ones_follow(
        self, tmp_path: Path, write: Callable[..., None], columns: tuple[str, ...]
    ) -> None:
        write(tmp_path / "x.csv", [{"new": 1, columns[-1]: "z", columns[0]: "a"}, {"newer": 2}])
        header, first, second = csv.reader((tmp_path / "x.csv").read_text().splitlines())
        assert header == [*columns, "new", "newer"]
        assert (first[0], first[len(columns) - 1], first[-2:]) == ("a", "z", ["1", ""])
        assert second == [""] * len(columns) + ["", "2"]

    def test_predicted_and_measured_have_columns_of_their_own(self) -> None:
        for columns in (tables.TRIALS, tables.PARETO, tables.MEASUREMENTS):
            assert len(set(columns)) == len(columns)
        assert {"predicted_latency_ms", "measured_latency_ms"} <= set(tables.PARETO)
        assert "latency_ms" not in {*tables.PARETO, *tables.TRIALS}

    def test_no_file_is_no_table_and_an_empty_one_has_no_rows(self, tmp_path: Path) -> None:
        assert tables.read_rows(tmp_path / "x.csv") is None
        tables.write_training(tmp_path / "x.csv", [])
        assert tables.read_rows(tmp_path / "x.csv") == []

    @pytest.mark.parametrize("content", [b"a,b\n1,2\n3\n", b'a\n"half', b"a\n\xff\n"])
    def test_a_damaged_file_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "trials.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"trials\.csv.*again"):
            tables.read_rows(tmp_path / "trials.csv")

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        tables.write_rows(path, [{"a": 1}])
        with pytest.raises(UnicodeEncodeError):
            tables.write_rows(path, [{"a": "\ud800"}])
        assert tables.read_rows(path) == [{"a": 1}]
        assert list(tmp_path.iterdir()) == [path]


def printed(summary: Summary, plan: Plan | None = None, files: tuple[Path, ...] = ()) -> dict[str, str]:
    """The closing table as a person reads it, by row; what follows unlabelled is under ""."""
    console = Console(file=io.StringIO(), width=200)
    console.print(tables.closing_table(summary, plan, files))
    rows: dict[str, str] = {}
    label = ""
    for line in console.file.getvalue().splitlines():  # type: ignore[attr-defined]
        start, text = line[:13].strip(), line[13:].strip()
        label = "" if not start and text[:1] in "¹²³⁴⁵⁶⁷⁸⁹" else start or label
        rows[label] = f"{rows[label]} {text}" if label in rows else text
    return rows


class TestClosingTable:
    @pytest.mark.parametrize(("share", "fate"), [(0.25, "25 % of the samples, left out"), (1.0, "used as there were")])
    def test_samples_of_badly_placed_threads_are_told_of(self, run: RunFiles, share: float, fate: str) -> None:
        summary = {**run.summary, "conditions": {"unsettled": {"share_of_samples": share}}}
        assert fate in printed(summary)["unsettled"]
        assert "unsettled" not in printed(run.summary)

    def test_a_finished_run(self, run: RunFiles) -> None:
        rows = printed(run.summary, run.plan, (Path("reports/demo/plan.json"), Path("reports/demo/report.html")))
        assert [*rows] == ["dense", "planned", "budget", "predicted", "measured", "error", "files written", ""]
        assert rows["dense"].startswith("180.7 ms,")
        assert "784 490 784 0 490 0 686 784" in rows["planned"]
        assert rows["budget"] == "latency at most 116.7 ms (65 % of dense)"
        assert rows["predicted"].startswith("114.0 ms (110.3 to 117.9),")
        assert rows["measured"].startswith("116.1 ms (114.9 to 117.2),")
        assert rows["measured"].endswith("64.3 % of dense, 1.56 times as fast: the budget holds")
        assert "predicted 63.5 %, measured 64.3 % of dense" in rows["measured"]
        assert rows["error"].startswith("0.0417 on evaluation images")
        assert rows["files written"] == "reports/demo/: plan.json, report.html"

    def test_shares_are_of_the_dense_model_of_each_measurement(self, run: RunFiles) -> None:
        predicted = {**run.summary["predicted"], "latency_ms": 60.0, "dense_latency_ms": 100.0}  # a faster machine's
        rows = printed({**run.summary, "predicted": predicted})
        assert rows["predicted"].endswith("60 % of dense, which the profile puts at 100.0 ms")
        assert "predicted 60 %, measured 64.3 % of dense" in rows["measured"]

    def test_missing_figures_are_dashes_with_one_footnote_per_reason(self, run: RunFiles) -> None:
        rows = printed(run.summary, run.plan)
        for part in ("dense", "predicted", "measured"):
            assert "energy –¹, power –¹" in rows[part]
        assert rows[""] == "¹ no sensor: /sys/class/powercap is not there"

    def test_nothing_known_yet_says_what_makes_it_and_shows_no_zero(self) -> None:
        rows = printed({})
        assert all(rows[part].startswith("–") for part in ("dense", "planned", "predicted", "measured", "error"))
        assert rows["budget"] == "none set"
        assert "`shiva-search measure` makes it" in rows[""]
        assert "`shiva-search optimize` makes it" in rows[""]
        assert "0" not in "".join(rows.values())

    def test_a_broken_budget_is_said(self, run: RunFiles) -> None:
        assert printed({**run.summary, "holds": False})["measured"].endswith("the budget is broken")

    def test_an_error_of_zero_is_shown_as_zero(self, run: RunFiles) -> None:
        assert printed({**run.summary, "error": 0.0})["error"].startswith("0 on evaluation images")

    @pytest.mark.parametrize(
        ("kind", "said"), [("random", "0.0417 on random inputs ("), ("", "on evaluation inputs (")]
    )
    def test_only_real_inputs_are_called_images(self, run: RunFiles, kind: str, said: str) -> None:
        assert said in printed({**run.summary, "error_inputs": kind})["error"]

    def test_every_limit_is_listed(self, run: RunFiles) -> None:
        budget = {"latency_ms": 50.0, "memory_mib": 6144.0, "mean_keep": 0.6}
        words = printed({**run.summary, "budget": budget})["budget"]
        assert words == "latency at most 50.00 ms, peak memory at most 6144 MiB, mean keep at most 60 % of the tokens"

    def test_the_note_is_shown_and_brackets_are_text(self, run: RunFiles) -> None:
        assert printed({**run.summary, "note": "fits [already]"})["note"] == "fits [already]"
