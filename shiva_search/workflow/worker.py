"""`shiva-search worker`. In: a copy of a run's folder and a storage. Out: plans judged for another process's search."""

from __future__ import annotations

from pathlib import Path

from shiva_search.records.run import RunFolder
from shiva_search.search import join_study
from shiva_search.selection.loading import load_selector
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.opening import open_both
from shiva_search.workflow.runs import settings_of


def worker_command(path: Path, *, storage: str, study: str, trials: int | None, progress: Progress) -> Answer:
    """`shiva-search worker RUN`: judge plans of a search that another process started.

    Raises:
        InputError: no such run, or another model than the study's.
        UnavailableError: no such study or storage.
    """
    run = RunFolder(path)
    settings = settings_of(run)
    device, model = open_both(settings.model, settings.device, settings.workload, settings.seed)
    # The search's own, from its folder: one made ready here would rank tokens in another way.
    selector = load_selector(run.warm_router).to(device.torch_device)
    done = join_study(storage, study, model, scorer=selector, trials=trials, progress=progress)
    return Answer({"study": study, "trials": done}, lambda: f"{done} plans judged for study {study}")
