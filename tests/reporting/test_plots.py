"""What is drawn is what the files say. Artists are found by their gid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shiva_search.records.plan import Plan
from shiva_search.reporting import plots
from shiva_search.reporting.reading import RunFiles

Figure = plots.Figure


def found(figure: Figure, gid: str, panel: int = 0) -> Any:
    """The one artist of this name in a panel, None where there is none."""
    named = [artist for artist in figure.axes[panel].get_children() if artist.get_gid() == gid]
    assert len(named) <= 1
    return named[0] if named else None


def points(artist: Any) -> list[tuple[float, float]]:
    data = artist.get_offsets() if hasattr(artist, "get_offsets") else np.column_stack(artist.get_data())
    return [tuple(point) for point in data.tolist()]


def at(row: dict[str, Any], part: str) -> float:
    """Where a latency is drawn: its share of dense, at the dense latency of the summary."""
    share: float = row[f"{part}_ratio"]
    return share * 180.666


def pareto(run: RunFiles, **changes: Any) -> Figure:
    run = replace(run, **changes)
    figure = plots.pareto_figure(run.trials, run.pareto, run.plan, run.summary)
    assert figure is not None
    return figure


class TestPareto:
    def test_every_row_of_the_front_is_drawn_and_none_is_beaten(self, run: RunFiles) -> None:
        front = points(found(pareto(run), "front"))
        assert front == sorted((at(row, "predicted"), row["error"]) for row in run.pareto)
        assert all(b[1] < a[1] for a, b in zip(front, front[1:], strict=False))

    def test_trials_are_told_apart_by_the_budget_and_those_stopped_early_left_out(self, run: RunFiles) -> None:
        figure = pareto(run)
        complete = [row for row in run.trials if row["state"] == "complete"]
        assert 0 < len(complete) < len(run.trials)
        for gid, fits in (("trials-within", True), ("trials-over", False)):
            expected = [(at(row, "predicted"), row["error"]) for row in complete if row["feasible"] is fits]
            assert points(found(figure, gid)) == expected

    def test_measured_plans_have_a_marker_of_their_own_beside_the_prediction(self, run: RunFiles) -> None:
        figure = pareto(run)
        again = [row for row in run.pareto if row["measured_latency_ms"] is not None]
        assert len(again) == 3
        drawn = found(figure, "measured")
        assert points(drawn) == [(at(row, "measured"), row["error"]) for row in again]
        assert drawn.get_marker() != found(figure, "front").get_marker()
        joins = [text.xyann + text.xy for text in figure.axes[0].texts if text.arrow_patch]
        expected = [(at(r, "predicted"), r["error"], at(r, "measured"), r["error"]) for r in again]
        assert joins == expected

    @pytest.mark.parametrize(("kind", "said"), [("real", "calibration images"), ("random", "random inputs")])
    def test_the_axis_of_the_error_says_what_it_was_taken_on(self, run: RunFiles, kind: str, said: str) -> None:
        figure = pareto(run, summary={**run.summary, "error_inputs": kind})
        assert figure.axes[0].get_ylabel() == f"output error on {said} (NMSE)"

    def test_without_measurements_nothing_is_marked_as_measured(self, run: RunFiles) -> None:
        assert run.plan is not None
        rows = [{k: v for k, v in row.items() if not k.startswith("measured")} for row in run.pareto]
        assert found(pareto(run, pareto=rows), "measured") is None

    def test_the_budget_line_stands_at_the_limit_and_the_chosen_plan_left_of_it(self, run: RunFiles) -> None:
        figure = pareto(run)
        limit = run.summary["budget"]["latency_ms"]
        assert found(figure, "budget").get_xdata() == [limit, limit]
        [(latency_ms, error)] = points(found(figure, "chosen"))
        assert run.plan is not None
        assert latency_ms == pytest.approx(run.plan.predicted["latency_ms"], rel=0.02)
        assert error == run.plan.fidelity["error"]
        assert latency_ms < limit < figure.axes[0].get_xlim()[1]

    def test_a_plan_off_the_front_is_drawn_from_plan_json(self, run: RunFiles) -> None:
        assert run.plan is not None
        others = [row for row in run.pareto if not row["chosen"]]
        figure = pareto(run, pareto=others)
        predicted, error, now_ms = run.plan.predicted, run.plan.fidelity["error"], run.summary["dense"]["latency_ms"]
        share = predicted["latency_ms"] / predicted["dense_latency_ms"]
        assert points(found(figure, "chosen")) == [(pytest.approx(share * now_ms), error)]
        assert (pytest.approx(run.plan.measured["latency_ms"], rel=1e-4), error) in points(found(figure, "measured"))

    def test_a_plan_off_the_front_is_drawn_at_the_speed_of_the_day_as_all_others(self, run: RunFiles) -> None:
        assert run.plan is not None
        now_ms = run.summary["dense"]["latency_ms"]
        plan = replace(run.plan, predicted={**run.plan.predicted, "dense_latency_ms": 1.25 * now_ms})
        [(latency_ms, _)] = points(found(pareto(run, pareto=[], plan=plan), "chosen"))
        assert latency_ms == pytest.approx(plan.predicted["latency_ms"] / 1.25)

    def test_each_limit_has_a_panel_and_the_front_s_line_is_latency_s(self, run: RunFiles) -> None:
        budget = {"latency_ms": 116.7, "memory_mib": 28.0, "mean_keep": 0.7}
        figure = pareto(run, summary={**run.summary, "budget": budget})
        assert [found(figure, "budget", panel).get_xdata()[0] for panel in range(3)] == [116.7, 28.0, 0.7]
        assert [found(figure, "front", panel).get_linestyle() for panel in range(3)] == ["-", "None", "None"]
        assert [axes.get_xlabel() for axes in figure.axes] == [
            "latency of one step (ms)",
            "peak memory of one step (MiB)",
            "tokens processed, share of dense",
        ]

    def test_an_error_of_zero_is_on_the_picture(self, run: RunFiles) -> None:
        dense = {"tokens_kept": [[784] * 8], "predicted_latency_ms": 180.7, "error": 0.0}
        axes = pareto(run, pareto=[*run.pareto, dense]).axes[0]
        assert axes.get_ylim()[0] < 0
        assert axes.transData.transform([(180.7, 0.0)])[0, 1] >= axes.get_window_extent().y0

    def test_a_dense_model_that_fits_is_one_point(self, run: RunFiles, tmp_path: Path) -> None:
        dense = {"tokens_kept": [[784] * 8], "predicted_latency_ms": 180.7, "error": 0.0, "chosen": True}
        figure = pareto(run, trials=[], pareto=[dense], plan=None, summary={"budget": {"latency_ms": 900.0}})
        assert points(found(figure, "chosen")) == [(180.7, 0.0)]
        plots.save(figure, tmp_path / "pareto.png")

    def test_nothing_evaluated_is_no_picture(self) -> None:
        assert plots.pareto_figure([], [], None, {}) is None


class TestSchedule:
    def texts(self, plan: Plan) -> list[str]:
        return [text.get_text() for text in plots.schedule_figure(plan).axes[0].texts]

    def test_cells_hold_share_and_count_and_skipped_blocks_are_hatched(self, run: RunFiles) -> None:
        assert run.plan is not None
        axes = plots.schedule_figure(run.plan).axes[0]
        texts = [text.get_text() for text in axes.texts]
        assert texts[:4] == ["100 %\n784", "62 %\n490", "100 %\n784", "skip"]
        assert len([patch for patch in axes.collections if patch.get_hatch()]) == 2 == texts.count("skip")

    def test_each_segment_has_a_row_named_by_its_times(self) -> None:
        plan = Plan(64, ((64, 16, 0), (64, 0, 64)), segments=((0.0, 0.5), (0.5, 1.0)))
        axes = plots.schedule_figure(plan).axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0 to 0.5", "0.5 to 1"]
        assert [text.get_text() for text in axes.texts] == [
            "100 %\n64", "25 %\n16", "skip", "100 %\n64", "skip", "100 %\n64",
        ]  # fmt: skip

    def test_a_block_whose_tokens_all_take_the_bypass_is_not_called_skipped(self) -> None:
        plan = Plan(64, ((64, 0, 0, 16),), bypass={"kind": "affine", "ranks": [[0, 16, 0, 8]]})
        assert self.texts(plan) == ["100 %\n64", "0 %\n0+r16", "skip", "25 %\n16+r8"]
        many = Plan(64, ((64, *[0] * 27),), bypass={"kind": "affine", "ranks": [[0, *[16, 0, 0] * 9]]})
        assert self.texts(many) == ["100", *["0", "skip", "skip"] * 9]

    def test_many_layers_still_carry_their_shares(self) -> None:
        plan = Plan(4096, ((4096, *[1024, 2048, 0, 3072] * 14),))
        assert self.texts(plan) == ["100", *["25", "50", "skip", "75"] * 14]


class TestCostModel:
    def test_held_out_plans_are_drawn_with_the_band(self, run: RunFiles) -> None:
        figure = plots.cost_model_figure(run.cost_model)
        assert figure is not None
        expected = np.array(run.cost_model["held_out"]["ratios"]) * 100
        np.testing.assert_allclose(points(found(figure, "held-out")), expected)
        outline = found(figure, "band").get_paths()[0].vertices
        at_end = outline[outline[:, 0] == outline[:, 0].max()]
        np.testing.assert_allclose(
            [at_end[:, 1].min() / at_end[0, 0], at_end[:, 1].max() / at_end[0, 0]], [0.97, 1.03], rtol=1e-6
        )
        words = figure.axes[0].texts[0].get_text()
        assert f"median error {run.cost_model['held_out']['median_error'] * 100:.1f} %" in words

    def test_each_signature_has_its_curve_named_by_its_layers(self) -> None:
        curve = {"tokens_kept": [0, 32, 64], "values": [0.0, 1.5, 2.0], "parabola": False}
        signatures = {"a": curve, "b": {**curve, "values": [0.0, 2.5, 3.0]}}
        figure = plots.cost_model_figure({"layers": ["a", "a", "b", "a"], "curves": {"latency_ms": signatures}})
        assert figure is not None
        assert points(found(figure, "curve-b")) == [(0.0, 0.0), (32.0, 2.5), (64.0, 3.0)]
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert labels == ["layers 0 to 1, 3", "layer 2"]

    def test_a_model_fit_without_plans_has_no_held_out_panel(self, run: RunFiles) -> None:
        figure = plots.cost_model_figure({**run.cost_model, "held_out": None})
        assert figure is not None
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["What a layer costs"]
        assert plots.cost_model_figure({}) is None


class TestTraining:
    def test_stages_follow_each_other_and_every_loss_has_a_panel(self, run: RunFiles) -> None:
        figure = plots.training_figure(run.training)
        assert figure is not None
        assert len(figure.axes) == 4
        tuned = [row for row in run.training if row["stage"] == "tune"]
        warm_up_steps = len(run.training) - len(tuned)
        expected = [(float(warm_up_steps + row["step"]), row["loss"]) for row in tuned]
        assert points(found(figure, "loss-tune-logged")) == expected

    def test_columns_without_values_have_no_panel(self) -> None:
        rows = [{"stage": "tune", "step": i, "loss": 1.0 / i, "distillation": None} for i in range(1, 5)]
        figure = plots.training_figure(rows)
        assert figure is not None
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss"]
        assert plots.training_figure([]) is None

    def test_smoothing_keeps_a_line_and_stays_within_the_values(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.uniform(1, 2, 200)
        smooth = plots.smoothed(values)
        assert smooth.shape == values.shape
        assert values.min() <= smooth.min() <= smooth.max() <= values.max()
        assert smooth.std() < values.std() / 2
        np.testing.assert_allclose(plots.smoothed(np.full(5, 3.0)), 3.0)


class TestFiles:
    def test_the_same_run_gives_the_same_files(self, run: RunFiles, tmp_path: Path) -> None:
        for suffix in (".png", ".svg"):
            paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
            for path in paths:
                plots.save(pareto(run), path)
            assert paths[0].read_bytes() == paths[1].read_bytes()
        assert 'id="front"' in (tmp_path / "one.svg").read_text()
        with Image.open(tmp_path / "one.png") as image:
            assert image.width > 1000

    def test_samples_stand_above_each_other_by_seed(self, tmp_path: Path) -> None:
        dense = np.stack([np.full((4, 4), value) for value in np.linspace(-1, 1, 12)])
        figure = plots.samples_figure(dense, -dense, [str(index) for index in range(12)])
        shown = [axes for axes in figure.axes if axes.images]
        assert len(shown) == 24
        by_place = {
            tuple(axes.get_subplotspec().rowspan) + tuple(axes.get_subplotspec().colspan): axes for axes in shown
        }
        for index in range(12):
            row, column = 2 * (index // 10), index % 10
            np.testing.assert_array_equal(by_place[row, column].images[0].get_array(), dense[index])
            np.testing.assert_array_equal(by_place[row + 1, column].images[0].get_array(), -dense[index])
            assert by_place[row, column].get_title() == str(index)

    def test_color_samples_are_shown_in_color_four_to_a_row(self) -> None:
        dense = np.random.default_rng(0).uniform(-1.2, 1, (6, 5, 7, 3))
        figure = plots.samples_figure(dense, -dense, [f"prompt {index}" for index in range(6)])
        shown = [axes for axes in figure.axes if axes.images]
        assert len(shown) == 12
        assert {axes.get_subplotspec().colspan.start for axes in shown} == {0, 1, 2, 3}
        np.testing.assert_allclose(shown[0].images[0].get_array(), np.clip((dense[0] + 1) / 2, 0, 1))

    def test_drawing_leaves_matplotlib_as_it_was(self, run: RunFiles, tmp_path: Path) -> None:
        before = json.dumps({key: str(value) for key, value in plots.matplotlib.rcParams.items()})
        plots.save(pareto(run), tmp_path / "x.png")
        assert json.dumps({key: str(value) for key, value in plots.matplotlib.rcParams.items()}) == before


@pytest.mark.parametrize(
    ("layers", "words"),
    [([0], "layer 0"), ([0, 1, 2, 5], "layers 0 to 2, 5"), ([1, 3, 4], "layers 1, 3 to 4")],
)
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert plots.layers_in_words(layers) == words
