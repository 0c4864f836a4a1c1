"""Every command on small checkpoints of SD3, Flux, PixArt and DiT: whole pipelines and transformers, local folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.image import imread

import shiva_search as ss
from scripts.small_checkpoints import PIPELINES, RESOLUTION, write
from shiva_search.cli import main
from shiva_search.workflow import optimize

#: Text is short, so that image tokens are what there is to leave out; DiT has none.
TEXT = {"sd3": ["--text-tokens", "8"], "flux": ["--text-tokens", "8", "--resolution", str(RESOLUTION)],
        "pixart": ["--text-tokens", "8"], "dit": []}  # fmt: skip


def call(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


@pytest.fixture(scope="module", params=PIPELINES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """Name, folder of the pipeline, and a run on it that keeps 60 % of the tokens: a budget no clock decides on."""
    here = tmp_path_factory.mktemp(request.param)
    folder = write(here, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(optimize, "MEASURE_SECONDS", 1.0)
        fast = ["--trials", "4", "--train-steps", "2", "--warmup-steps", "2", "--profile-seconds", "2"]
        chosen = ["--model", str(folder), *TEXT[request.param]]
        assert call("optimize", *chosen, "--mean-keep", "60%", "--out", "reports/run", *fast) == 0
        yield request.param, folder, here / "reports/run"


def test_a_pipelines_folder_gives_a_plan(run: tuple[str, Path, Path]) -> None:
    name, folder, path = run
    plan = ss.Plan.from_file(path)
    assert plan.tokens == 64 and not plan.is_dense
    assert plan.mean_keep <= 0.6
    assert json.loads((path / "summary.json").read_text())["holds"] is True
    [profile] = (path.parent.parent / "profiles" / "cpu").iterdir()
    model, *others = profile.name.split(".")
    assert model == folder.name and ("text-tokens-8" in others) is bool(TEXT[name])
    assert (profile / "profile.csv").is_file()
    assert call("profile", "--model", str(folder), *TEXT[name], "--seconds", "2", "--out", str(profile)) == 0


def test_train_measure_and_generate_go_on_with_it(
    run: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, path = run
    assert call("train", str(path), "--train-steps", "2") == 0
    assert call("measure", str(path), "--seconds", "1") == 0
    assert len((path / "measurements.csv").read_text().splitlines()) == 3
    capsys.readouterr()
    asked = [] if name == "dit" else ["--prompt", "a red car"]
    assert call("generate", str(path), "--count", "2", "--steps", "2", "--json", *asked) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["mean_squared_difference"] < 4
    assert imread(summary["images"]).std() > 0.05
    if name == "dit":
        assert call("generate", str(path), "--prompt", "a red car") == 2
        assert "reads no prompt" in capsys.readouterr().err


def test_a_plan_that_keeps_all_draws_the_dense_images(run: tuple[str, Path, Path]) -> None:
    from shiva_search.generation import generate_pairs

    _, folder, path = run
    model = ss.load_model(str(folder), resolution=RESOLUTION)
    pairs = generate_pairs(model, ss.Plan.dense(model), "norm", count=2, steps=2, seed=3)
    assert pairs.dense.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert pairs.dense.equal(pairs.planned)
    assert not pairs.dense[0].equal(pairs.dense[1])
    other = generate_pairs(model, ss.Plan.uniform(model, 0.3), "norm", count=1, steps=2, seed=3)
    assert other.dense[0].equal(pairs.dense[0])
    assert not other.planned.equal(other.dense)
    with ss.apply_plan(model, path):
        pass  # the run's plan and selector fit the model as it lies in the folder


def test_a_transformer_alone_has_no_images_to_show(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, path = run
    shutil.copytree(path, tmp_path / "run")
    stored = json.loads((path / "run.json").read_text())
    stored["settings"]["model"] = str(folder / "transformer")
    (tmp_path / "run" / "run.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert call("generate", str(tmp_path / "run")) == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: generate needs a whole pipeline") and "apply_plan" in error
    assert call("measure", str(tmp_path / "run"), "--seconds", "1") == 0


def test_a_pipeline_without_its_text_encoder_is_refused(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder, path = run
    if name == "dit":
        pytest.skip("DiT has no text encoder")
    shutil.copytree(folder, tmp_path / "pipe")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(path, tmp_path / "run")
    stored = json.loads((path / "run.json").read_text())
    stored["settings"]["model"] = str(tmp_path / "pipe")
    (tmp_path / "run" / "run.json").write_text(json.dumps(stored))
    assert call("generate", str(tmp_path / "run")) == 4
    assert "lacks text_encoder, so it cannot read a prompt" in capsys.readouterr().err
