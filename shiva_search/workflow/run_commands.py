"""`train`, `measure`, `report`, `generate`: commands on a run that has a plan. In: its folder. Out: its files anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shiva_search.devices import check_sensors
from shiva_search.errors import InputError
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.files import read_json, write_json
from shiva_search.reporting import tables
from shiva_search.reporting.html import build_report
from shiva_search.search.fidelity import fidelity
from shiva_search.selection.router import Router
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.images import draw_samples
from shiva_search.workflow.outcome import EVALUATION_SAMPLES, answer_of, write_outcome
from shiva_search.workflow.runs import check_is_run, open_run
from shiva_search.workflow.selectors import tuned_selector


def train_command(path: Path, train_steps: int, *, seed: int, resume: bool, progress: Progress) -> Answer:
    """`shiva-search train RUN`: tune the run's selector at its plan."""
    run = open_run(path)
    checkpoint = run.folder.path / ".tune.pt"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    start = run.scorer()
    if isinstance(start, str):
        start = Router.for_model(run.model, seed=seed)
    router, curve, kept = tuned_selector(
        run.model, run.plan, start, steps=train_steps, seed=seed, checkpoint=checkpoint, progress=progress
    )
    router.save(run.folder.selector)
    checkpoint.unlink(missing_ok=True)
    known = tables.read_rows(run.folder.training_csv) or []
    tables.write_training(run.folder.training_csv, [*known, *curve])
    error = fidelity(run.model, run.plan, router, split="evaluation", samples=EVALUATION_SAMPLES, seed=seed)
    run.plan.with_(
        fidelity={**run.plan.fidelity, "evaluation_error": error, "evaluation_samples": EVALUATION_SAMPLES}
    ).save(run.folder.plan)
    if run.folder.summary.is_file():
        before = read_json(run.folder.summary, "summary")
        write_json(run.folder.summary, {**before, "error": error, "error_inputs": run.model.inputs_kind})
    build_report(path)
    summary = {
        "run": str(path), "steps": train_steps, "kept": kept, "error": error, "selector": str(run.folder.selector),
    }  # fmt: skip
    said = f"after {train_steps} more steps" if kept else f"as before: {train_steps} more steps did not help"
    return Answer(summary, lambda: f"error on held-out inputs {said}: {error:.4f}")


def measure_command(path: Path, *, device: str | None, seconds: float, seed: int, progress: Progress) -> Answer:
    """`shiva-search measure RUN`: apply, measure again, predicted next to measured.

    Raises:
        InputError: no run there, or a recording is to be asked in place of the run's device.
    """
    run = open_run(path, device)
    check_sensors(run.device, run.settings.budget)
    scorer = run.scorer()
    progress(f"measuring for {seconds:.0f} s")
    final = measure_plans(run.model, [run.plan], run.device, scorer_for=lambda _: scorer, seconds=seconds, seed=seed)[0]
    if final.replayed and run.device.name != run.settings.device:
        raise InputError(
            f"{run.device.name} is a recording and would put a prediction in the place of what was measured; "
            "leave --device out, or name a real one"
        )
    error = fidelity(run.model, run.plan, scorer, split="evaluation", samples=EVALUATION_SAMPLES, seed=seed)
    before = read_json(run.folder.summary, "summary") if run.folder.summary.is_file() else {}
    write_outcome(
        run.folder, run.model, run.device, run.plan, final, run.budget, before.get("rounds", []), error,
        before.get("seconds", {}), before.get("note"),
    )  # fmt: skip
    return answer_of(run.folder)


def report_command(path: Path) -> Answer:
    """`shiva-search report RUN`: rebuild tables, plots and page from files."""
    check_is_run(path)
    files = build_report(path)
    return Answer({"files": [str(file) for file in files]}, lambda: "\n".join(map(str, files)))


def generate_command(
    path: Path,
    *,
    count: int,
    steps: int,
    guidance_scale: float | None,
    seed: int,
    progress: Progress,
    prompts: Sequence[str] = (),
) -> Answer:
    """`shiva-search generate RUN`: images of dense and planned side by side, same seeds."""
    run = open_run(path)
    figures = draw_samples(
        run.folder, run.model, run.plan, run.scorer(), count=count, steps=steps, guidance_scale=guidance_scale,
        seed=seed, prompts=prompts, progress=progress,
    )  # fmt: skip
    if run.folder.summary.is_file():
        build_report(path)
    summary = {"images": str(run.folder.samples_png), "count": count, **figures}
    return Answer(summary, lambda: f"{count} pairs of images in {run.folder.samples_png}")
