"""Plans: what is not a plan is refused, what is one survives the way to disk and back."""

import json
from pathlib import Path
from typing import Any

import pytest

from shiva_search.errors import InputError
from shiva_search.records.plan import Plan


class Shape:
    """The least a model must tell of itself."""

    tokens = 100
    layer_count = 4

    def fingerprint(self) -> dict[str, Any]:
        return {"architecture": "X", "layers": 4, "tokens": 100, "weights_hash": "a"}


def test_uniform_keeps_the_first_block_dense() -> None:
    plan = Plan.uniform(Shape(), keep=0.6)
    assert plan.tokens_kept == ((100, 60, 60, 60),)
    assert plan.mean_keep == pytest.approx(0.7)
    assert Plan.dense(Shape()).is_dense


def test_file_round_trip(tmp_path: Path) -> None:
    plan = Plan.from_rows(Shape(), [[100, 60, 0, 100], [100, 20, 30, 40]], device="cpu", budget={"latency_ms": 5.0})
    plan.save(tmp_path / "plan.json")
    assert Plan.from_file(tmp_path / "plan.json") == plan
    assert Plan.from_file(tmp_path) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["segments"] == [[0.0, 0.5], [0.5, 1.0]]


def test_rows_by_time() -> None:
    plan = Plan.from_rows(Shape(), [[100, 1, 1, 1], [100, 2, 2, 2]])
    assert [plan.row_at(t) for t in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "row",
    [
        [100, 60, 60],
        [50, 60, 60, 60],
        [100, -1, 60, 60],
        [100, 101, 60, 60],
        [100, 6.5, 60, 60],
        [100, True, 60, 60],
        [],
    ],
)
def test_refuses_bad_rows(row: list[Any]) -> None:
    with pytest.raises(InputError):
        Plan.from_rows(Shape(), [row])


@pytest.mark.parametrize("keep", [0, -0.1, 1.1])
def test_refuses_bad_keep(keep: float) -> None:
    with pytest.raises(InputError):
        Plan.uniform(Shape(), keep)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"tokens": 100}', '{"tokens": 100, "tokens_kept": 5}',
     '{"tokens": "x", "tokens_kept": [[1]]}',
     '{"schema_version": 99, "tokens": 100, "tokens_kept": [[100]]}'],
)  # fmt: skip
def test_refuses_foreign_files_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError) as caught:
        Plan.from_file(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def test_refuses_a_foreign_model_and_says_what_differs() -> None:
    plan = Plan.uniform(Shape(), keep=0.5)
    plan.check_model(Shape().fingerprint())
    with pytest.raises(InputError, match="weights_hash is 'a' in the plan and 'b' in the model"):
        plan.check_model({**Shape().fingerprint(), "weights_hash": "b"})


def test_segments_must_cover_all_time() -> None:
    with pytest.raises(InputError, match="cover"):
        Plan(tokens=100, tokens_kept=((100, 1),), segments=((0.0, 0.9),))
