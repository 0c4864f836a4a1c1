"""The files of a run have the names others rely on."""

from pathlib import Path

from shiva_search.records.run import RunFolder

CONTRACT = {
    "plan.json", "trials.csv", "pareto.csv", "pareto.png", "pareto.svg", "schedule.png", "cost_model.png",
    "training.csv", "training.png", "selector.safetensors", "measurements.csv", "summary.json", "report.html",
    "cost_model.json", "samples.png", "compare.csv", "run.json",
}  # fmt: skip


def test_every_file_lies_in_the_folder_under_its_own_name(tmp_path: Path) -> None:
    names = [name for name, item in vars(RunFolder).items() if isinstance(item, property)]
    paths = [getattr(RunFolder(tmp_path), name) for name in names]
    assert {path.parent for path in paths} == {tmp_path}
    assert sorted(path.name for path in paths if not path.name.startswith(".")) == sorted(CONTRACT)
    assert not list(tmp_path.iterdir())
