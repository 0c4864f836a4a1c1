"""`shiva-search worker`. In: a copy of a run's folder and a storage. Out: plans judged for another process's search."""

from __future__ import annotations

from pathlib import Path

from shiva_search.records.files import read_json
from shiva_search.search import join_study
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.opening import open_both, profile_folder
from shiva_search.workflow.selectors import ready_selector
from shiva_search.workflow.settings import Settings


def worker_command(path: Path, *, storage: str, study: str, trials: int | None, progress: Progress) -> Answer:
    """`shiva-search worker RUN`: judge plans of a search that another process started."""
    stored = read_json(path / "run.json", "run")
    settings = Settings(**stored["settings"])
    device, model = open_both(settings.model, settings.device, settings.workload, settings.seed)
    folder = (
        Path(settings.profile)
        if settings.profile
        else profile_folder(device, model, settings.bypass, settings.bypass_rank)
    )
    router, _ = ready_selector(model, settings, folder, progress)
    done = join_study(storage, study, model, scorer=router, trials=trials, progress=progress)
    return Answer({"study": study, "trials": done}, lambda: f"{done} plans judged for study {study}")
