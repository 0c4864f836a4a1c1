"""The commands: each reads files, calls the stages, writes files. In: settings or a run's folder. Out: an Answer.

A run's folder (reports/<run>/) holds all that later commands need; run.json says how the run was made. Stages that
are done are not repeated: a stage's file counts when it was made from the same settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from shiva_search import __version__
from shiva_search.cost.cost_model import CostModel, fit_cost_model, load_cost_model
from shiva_search.devices import list_devices, open_device
from shiva_search.errors import BudgetBrokenError, InfeasibleBudgetError, InputError, ShivaError
from shiva_search.generation import generate_pairs
from shiva_search.models.catalog import list_models, load_model, shipped_router
from shiva_search.models.model import Model
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.end_to_end import measure_plans
from shiva_search.records.budget import Budget
from shiva_search.records.cost import CostEstimate
from shiva_search.records.files import check_folder_writable, read_json, write_json
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.records.profile import Profile, load_profile
from shiva_search.records.run import RunFolder
from shiva_search.reporting import plots, tables
from shiva_search.reporting.html import build_report
from shiva_search.runtime.scorers import SCORERS, TokenScorer
from shiva_search.search import SearchResult, check_budget, holds, join_study, search
from shiva_search.search.fidelity import fidelity
from shiva_search.search.whole_blocks import WholeBlocks
from shiva_search.selection.router import Router, load_selector
from shiva_search.selection.training import tune, warm_up

if TYPE_CHECKING:
    from shiva_search.devices.base import Device

Progress = Callable[[str], None]

WARM_UP_STEPS = 180
#: Held-out samples behind the error that a run reports.
EVALUATION_SAMPLES = 256
#: Seconds of interleaved measurement: while the loop closes, and for the final figure.
LOOP_SECONDS, FINAL_SECONDS = 12.0, 20.0
#: Plans searched anew because the tuned plan's final measurement broke the budget.
FINAL_ROUNDS, AGAIN_TRIALS = 3, 30
#: Share of the latency budget that the search aims for, so that a fresh, noisy measurement holds it too.
AIM = 0.985


@dataclass(frozen=True)
class Settings:
    """What `optimize` was asked for; kept in run.json.

    Attributes:
        budget: texts by metric, {"latency_ms": "50ms"}; per and steps give their scope.
        workload: fields of Workload that differ from the model's defaults.
        others: as the options of the same name.
    """

    model: str = "fashion-dit"
    device: str = "cpu"
    budget: dict[str, str] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    per: str = "step"
    steps: int = 28
    segments: int = 1
    min_keep: float | None = None
    trials: int = 100
    sampler: str = "trade"
    train_steps: int = 60
    warmup_steps: int | None = None
    profile: str | None = None
    profile_seconds: float = 60.0
    storage: str | None = None
    seed: int = 0

    def digest(self, *parts: str) -> str:
        """Equal for equal settings: of the fields named, or of all."""
        values = {name: value for name, value in asdict(self).items() if not parts or name in parts}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """What a command has to say: an object for --json, a text for people, and whether the budget held."""

    summary: dict[str, Any]
    text: Callable[[], str]
    broken: str | None = None

    def raise_if_broken(self) -> None:
        """Raises BudgetBrokenError (exit code 5) where the measured plan breaks its budget."""
        if self.broken is not None:
            raise BudgetBrokenError(self.broken)


# ---- profile ---------------------------------------------------------------------------------------------------------


def profile_command(
    model_name: str,
    device_name: str,
    workload: dict[str, Any],
    *,
    seconds: float,
    out: Path | None,
    seed: int,
    resume: bool,
    progress: Progress,
) -> Answer:
    """`shiva-search profile`: measure, fit the cost model, write both."""
    device, model = _open(model_name, device_name, workload, seed)
    folder = out or _profile_folder(device, model)
    check_folder_writable(folder)
    profile, cost = _profile(model, device, folder, seconds, seed, resume, progress)
    summary = {
        "folder": str(folder),
        "model": model.fingerprint(),
        "device": device.describe(),
        "dense": cost.dense.as_dict(),
        "held_out": cost.held_out,
    }
    lines = [
        f"profile of {model.name} on {device.name} in {folder}",
        f"dense step: {cost.dense.latency_ms:.1f} ms",
        "held-out error of the cost model: " + ", ".join(f"{k} {v:.4g}" for k, v in _numbers(cost.held_out).items()),
    ]
    return Answer(summary, lambda: "\n".join(lines))


def _profile(
    model: Model, device: Device, folder: Path, seconds: float, seed: int, resume: bool, progress: Progress
) -> tuple[Profile, CostModel]:
    if not resume:
        for name in ("profile.json", "profile.csv", "samples.csv", "cost_model.json"):
            (folder / name).unlink(missing_ok=True)
    scorer = Router.for_model(model, seed=0)  # what selecting costs does not depend on what was learned
    profile = profile_model(model, device, seconds=seconds, seed=seed, folder=folder, scorer=scorer, progress=progress)
    profile.save(folder)
    cost = fit_cost_model(profile)
    cost.save(folder)
    return profile, cost


def _profile_folder(device: Device, model: Model) -> Path:
    return Path("profiles") / device.name.replace(":", "-") / Path(model.name).name


# ---- optimize --------------------------------------------------------------------------------------------------------


def optimize_command(settings: Settings, *, out: Path | None, resume: bool, progress: Progress) -> Answer:
    """`shiva-search optimize`: profile, search, train, apply, measure again, report.

    Raises:
        ShivaError: see the contract's exit codes.
    """
    budget = Budget.parse(settings.budget, settings.per, settings.steps)
    if not budget:
        raise InputError("optimize needs a budget; write for example --max-latency 50ms or --max-latency 60%")
    run = RunFolder(out or Path("reports") / _run_name(settings))
    check_folder_writable(run.path)
    device, model = _open(settings.model, settings.device, settings.workload, settings.seed)
    clock = _Clock()

    with clock("profile"):
        folder = Path(settings.profile) if settings.profile else _profile_folder(device, model)
        if settings.profile:
            cost = fit_cost_model(load_profile(folder))
        else:
            _, cost = _profile(model, device, folder, settings.profile_seconds, settings.seed, resume, progress)
    check_budget(model, cost, budget, min_keep=settings.min_keep, segments=settings.segments)
    write_json(run.path / "run.json", {"schema_version": 1, "settings": asdict(settings), "version": __version__})
    cost.save(run.path)

    with clock("warm_up"):
        router, curve = _warm_router(model, settings, folder, progress)

    def measure(plan: Plan, seconds: float = LOOP_SECONDS) -> Measurement:
        return measure_plans(model, [plan], device, scorer_for=lambda _: router, seconds=seconds, seed=settings.seed)[0]

    find = partial(
        search, model, seed=settings.seed, scorer=router, measure=measure,
        storage=settings.storage, min_keep=settings.min_keep, segments=settings.segments, sampler=settings.sampler,
        folder=run.path, progress=progress,
    )  # fmt: skip

    def plan_of(found: SearchResult) -> Plan:
        return found.plan.with_(
            device=device.name,
            workload=model.workload.as_dict(),
            predicted={**found.plan.predicted, "dense_latency_ms": (found.cost or cost).dense.latency_ms},
            budget=budget.resolve(cost.dense).as_dict() | ({"shares": dict(budget.shares)} if budget.shares else {}),
            origin={
                "settings": settings.digest(),
                "seed": settings.seed,
                "version": __version__,
                "study": found.study_name,
            },
        )

    with clock("search"):
        try:
            result = find(cost, _tighter(budget, AIM), trials=settings.trials)
        except InfeasibleBudgetError:  # the floor lies between the aim and the budget
            result = find(cost, budget, trials=settings.trials)
    plan, rounds = plan_of(result), list(result.rounds)
    plan.save(run.plan)
    tables.write_trials(run.trials, result.trials)
    tables.write_pareto(run.pareto_csv, result.pareto)

    with clock("tune"):
        if settings.train_steps and not plan.is_dense:
            router, tuned = tune(
                model, router, plan, steps=settings.train_steps, seed=settings.seed,
                checkpoint=run.path / ".tune.pt", progress=progress,
            )  # fmt: skip
            curve = [*curve, *tuned]
    router.save(run.selector)
    (run.path / ".tune.pt").unlink(missing_ok=True)  # done: a later training starts from the selector
    if curve:
        tables.write_training(run.training_csv, curve)

    with clock("measure"):
        progress("measuring the plan against the dense model")
        # The loop has measured the plan; what counts is that a fresh measurement holds as well.
        final = _measure_afresh(measure, budget, plan)
        for again in range(1, FINAL_ROUNDS + 1):
            if holds(budget, final):
                break
            progress(f"a fresh measurement takes {final.ratio:.1%} of dense and breaks the budget; searching below it")
            try:
                result = find(result.cost or cost, _tighter(budget, AIM - 0.015 * again), trials=AGAIN_TRIALS)
            except (InfeasibleBudgetError, BudgetBrokenError) as error:
                progress(f"no plan is left below: {error}")
                break
            plan, rounds = plan_of(result), [*rounds, *result.rounds]
            tables.write_trials(run.trials, result.trials)
            tables.write_pareto(run.pareto_csv, result.pareto)
            final = _measure_afresh(measure, budget, plan)
        error_there = fidelity(model, plan, router, split="evaluation", samples=EVALUATION_SAMPLES, seed=settings.seed)
    _finish(run, model, device, plan, final, budget, rounds, error_there, clock.seconds, result.note)
    if settings.model == "fashion-dit":
        with clock("generate"):
            _draw_samples(run, model, plan, router, count=10, steps=20, guidance_scale=2.5, seed=0, progress=progress)
    return _answer(run)


def _run_name(settings: Settings) -> str:
    limits = "-".join(text.replace("%", "pct").replace(" ", "") for text in settings.budget.values())
    return f"{Path(settings.model).name}-{limits}"


def _measure_afresh(measure: Callable[..., Measurement], budget: Budget, plan: Plan) -> Measurement:
    """A fresh measurement; a longer one where only the width of the interval speaks against the plan."""
    final = measure(plan, FINAL_SECONDS)
    if not holds(budget, final) and holds(budget, replace(final, ratio_high=final.ratio)):
        final = measure(plan, 2 * FINAL_SECONDS)
    return final


def _tighter(budget: Budget, factor: float) -> Budget:
    """The budget with latency, the noisy one, scaled down."""
    shares = {name: share * (factor if name == "latency_ms" else 1.0) for name, share in budget.shares.items()}
    latency_ms = None if budget.latency_ms is None else budget.latency_ms * factor
    return replace(budget, latency_ms=latency_ms, shares=shares)


def _warm_router(
    model: Model, settings: Settings, folder: Path, progress: Progress
) -> tuple[Router, list[dict[str, Any]]]:
    """A router that serves every ratio: the shipped one, the one kept beside the profile, or a new one, then kept."""
    shipped, kept = shipped_router(model), folder / "router.safetensors"
    if settings.warmup_steps is None and shipped is not None:
        progress("router: the warmed-up one that ships with the model")
        return load_selector(shipped), []
    steps = WARM_UP_STEPS if settings.warmup_steps is None else settings.warmup_steps
    if kept.is_file():
        router = load_selector(kept)
        trained = router.origin.get("steps")
        if router.model == model.fingerprint() and (settings.warmup_steps is None or trained == steps):
            progress(f"router: kept from before, {trained} steps of warm-up ({kept})")
            return router, []
    if steps == 0:
        return Router.for_model(model, seed=settings.seed), []
    router, curve = warm_up(
        model, steps=steps, seed=settings.seed, checkpoint=folder / ".warm_up.pt", progress=progress
    )
    router.save(kept)
    (folder / ".warm_up.pt").unlink(missing_ok=True)
    return router, curve


def _finish(
    run: RunFolder,
    model: Model,
    device: Device,
    plan: Plan,
    final: Measurement,
    budget: Budget,
    rounds: list[dict[str, Any]],
    error: float,
    seconds: dict[str, float],
    note: str | None,
) -> None:
    """Write plan.json, measurements.csv and summary.json."""
    kept = holds(budget, final)
    measured = {name: value for name, value in final.as_dict().items() if name not in ("tokens_kept", "conditions")}
    plan = plan.with_(
        measured=measured,
        fidelity={**plan.fidelity, "evaluation_error": error, "evaluation_samples": EVALUATION_SAMPLES},
    )
    plan.save(run.plan)
    known = tables.read_rows(run.measurements) or []
    row = {
        "round": len(known) + 1,
        "plan": "chosen",
        "tokens_kept": [list(k) for k in plan.tokens_kept],
        "predicted_latency_ms": plan.predicted.get("latency_ms"),
        "predicted_ratio": _share(plan.predicted.get("latency_ms"), plan.predicted.get("dense_latency_ms")),
        "holds": kept,
        **{name: value for name, value in final.as_dict().items() if name in tables.MEASUREMENTS},
    }
    tables.write_measurements(run.measurements, [*known, row])
    dense = {name.removeprefix("dense_"): value for name, value in measured.items() if name.startswith("dense_")}
    planned = {name: value for name, value in measured.items() if name in (*tables.UNITS, "ratio", "ratio_low",
               "ratio_high", "latency_ms_low", "latency_ms_high")}  # fmt: skip
    write_json(
        run.summary,
        {
            "schema_version": 1,
            "model": model.fingerprint(),
            "device": device.describe(),
            "workload": model.workload.as_dict(),
            "budget": {**budget.resolve(_dense_cost(final)).as_dict(), "shares": dict(budget.shares)},
            "holds": kept,
            "dense": dense,
            "predicted": dict(plan.predicted),
            "measured": planned,
            "error": error,
            "error_split": "evaluation",
            "rounds": rounds,
            "seconds": seconds,
            "note": note,
            "reasons": dict(final.reasons),
            "conditions": dict(final.conditions),
            "provenance": {"version": __version__, "torch": torch.__version__, **dict(plan.origin)},
            "plan": str(run.plan),
            "tokens_kept": [list(k) for k in plan.tokens_kept],
        },
    )


def _dense_cost(measured: Measurement) -> CostEstimate:
    """The dense model's cost in the measurement: what a share of it means here and now."""
    return CostEstimate(
        latency_ms=measured.dense_latency_ms,
        energy_j=measured.dense_energy_j,
        power_w=measured.dense_power_w,
        peak_memory_mib=measured.dense_peak_memory_mib,
        gflops=measured.dense_gflops,
    )


def _answer(run: RunFolder) -> Answer:
    """Rebuild the report and say how the run stands."""
    files = build_report(run.path)
    summary, plan = read_json(run.summary, "summary"), Plan.from_file(run.plan)
    written = [path for path in sorted(run.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
    broken = None
    if not summary.get("holds"):
        limits = ", ".join(tables.limits_in_words(summary).values())  # type: ignore[arg-type]
        broken = (
            f"the measured plan takes {summary['measured']['latency_ms']:.2f} ms "
            f"({summary['measured']['ratio']:.1%} of dense), over the budget of {limits} after all corrections; "
            "allow more, or measure again on a quieter machine with `shiva-search measure`"
        )

    def text() -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(tables.closing_table(summary, plan, written or files))  # type: ignore[arg-type]
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    return Answer(summary, text, broken)


# ---- commands on a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenRun:
    """A run's folder with its model and device at hand."""

    folder: RunFolder
    settings: Settings
    model: Model
    device: Device
    plan: Plan

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        return Budget.parse(self.settings.budget, self.settings.per, self.settings.steps)

    def scorer(self) -> Router | str:
        """The trained selector where there is one."""
        return load_selector(self.folder.selector) if self.folder.selector.is_file() else "stride"


def _open_run(path: Path, device_name: str | None = None) -> _OpenRun:
    folder = RunFolder(path)
    if not path.is_dir():
        raise InputError(f"a run is a folder, {path} is none; make one with `shiva-search optimize --out {path}`")
    stored = read_json(path / "run.json", "run")
    try:
        settings = Settings(**stored["settings"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'run.json'} does not describe a run ({error}); run `optimize` again") from None
    plan = Plan.from_file(folder.plan)
    device, model = _open(settings.model, device_name or settings.device, settings.workload, settings.seed)
    plan.check_model(model.fingerprint())
    return _OpenRun(folder, settings, model, device, plan)


def train_command(path: Path, train_steps: int, *, seed: int, resume: bool, progress: Progress) -> Answer:
    """`shiva-search train RUN`: tune the run's selector at its plan."""
    run = _open_run(path)
    checkpoint = run.folder.path / ".tune.pt"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    start = run.scorer()
    if not isinstance(start, Router):
        start = Router.for_model(run.model, seed=seed)
    router, curve = tune(
        run.model, start, run.plan, steps=train_steps, seed=seed, checkpoint=checkpoint, progress=progress
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
        write_json(run.folder.summary, {**read_json(run.folder.summary, "summary"), "error": error})
    build_report(path)
    summary = {"run": str(path), "steps": train_steps, "error": error, "selector": str(run.folder.selector)}
    return Answer(summary, lambda: f"error on held-out inputs after {train_steps} steps: {error:.4f}")


def measure_command(path: Path, *, device: str | None, seconds: float, seed: int, progress: Progress) -> Answer:
    """`shiva-search measure RUN`: apply, measure again, predicted next to measured."""
    run = _open_run(path, device)
    scorer = run.scorer()
    progress(f"measuring for {seconds:.0f} s")
    final = measure_plans(run.model, [run.plan], run.device, scorer_for=lambda _: scorer, seconds=seconds, seed=seed)[0]
    error = fidelity(run.model, run.plan, scorer, split="evaluation", samples=EVALUATION_SAMPLES, seed=seed)
    before = read_json(run.folder.summary, "summary") if run.folder.summary.is_file() else {}
    _finish(
        run.folder, run.model, run.device, run.plan, final, run.budget, before.get("rounds", []), error,
        before.get("seconds", {}), before.get("note"),
    )  # fmt: skip
    return _answer(run.folder)


def compare_command(path: Path, *, seconds: float, seed: int, progress: Progress) -> Answer:
    """`shiva-search compare RUN`: the plan against the alternatives a user has, on one device in one run."""
    run = _open_run(path)
    model, plan, budget = run.model, run.plan, run.budget
    cost = load_cost_model(path)
    trained = run.scorer()
    rows: list[tuple[str, Plan, TokenScorer | str]] = [("searched plan, trained selector", plan, trained)]
    rows += [(f"searched plan, {name}", plan, name) for name in SCORERS]
    progress("choosing plans of the same latency: uniform keep, and whole blocks skipped")
    uniform = _uniform_like(model, cost, plan)
    rows += [("uniform keep, trained selector", uniform, trained), ("uniform keep, stride", uniform, "stride")]
    target = Budget(latency_ms=cost.predict(plan).latency_ms)
    try:
        skipping = search(
            model, WholeBlocks(cost), target, trials=40, seed=seed, scorer="stride", progress=progress
        ).plan
        rows.append(("whole blocks skipped", skipping, "stride"))
    except InfeasibleBudgetError:
        progress("no plan that only skips whole blocks is as fast")
    rows.append(("dense", Plan.dense(model), "stride"))
    progress(f"measuring {len(rows)} alternatives for {seconds:.0f} s")
    copies = [candidate.with_() for _, candidate, _ in rows]
    scorer_of = {id(copy): scorer for copy, (_, _, scorer) in zip(copies, rows, strict=True)}
    measured = measure_plans(
        model, copies, run.device, scorer_for=lambda p: scorer_of[id(p)], seconds=seconds, seed=seed
    )
    table = []
    for (name, candidate, scorer), found in zip(rows, measured, strict=True):
        error = fidelity(model, candidate, scorer, split="evaluation", samples=EVALUATION_SAMPLES, seed=seed)
        progress(f"{name}: {found.ratio:.1%} of dense, error {error:.4f}")
        table.append(
            {
                "method": name,
                "settings": [list(row) for row in candidate.tokens_kept],
                **{
                    field: getattr(found, field)
                    for field in ("latency_ms", "latency_ms_low", "latency_ms_high", "ratio")
                },
                "error": error,
                "note": "holds the budget" if holds(budget, found) else "breaks the budget",
            }
        )
    tables.write_compare(run.folder.compare, table)
    build_report(path)
    lines = [f"{row['method']:<34} {row['ratio']:7.1%}  error {row['error']:.4f}  {row['note']}" for row in table]
    return Answer({"run": str(path), "alternatives": table}, lambda: "\n".join(lines))


def _uniform_like(model: Model, cost: CostModel, plan: Plan) -> Plan:
    """The uniform plan with the most tokens that is predicted to be no slower than a plan."""
    limit_ms = cost.predict(plan).latency_ms or 0.0
    shares = [kept / model.tokens for kept in sorted(range(1, model.tokens + 1), reverse=True)]
    plans = (Plan.uniform(model, share) for share in shares)
    return next((p for p in plans if (cost.predict(p).latency_ms or 0.0) <= limit_ms), Plan.uniform(model, shares[-1]))


def report_command(path: Path) -> Answer:
    """`shiva-search report RUN`: rebuild tables, plots and page from files."""
    if not path.is_dir():
        raise InputError(f"a run is a folder, {path} is none; make one with `shiva-search optimize --out {path}`")
    files = build_report(path)
    return Answer({"files": [str(file) for file in files]}, lambda: "\n".join(map(str, files)))


def generate_command(
    path: Path, *, count: int, steps: int, guidance_scale: float, seed: int, progress: Progress
) -> Answer:
    """`shiva-search generate RUN`: images of dense and planned side by side, same seeds."""
    run = _open_run(path)
    figures = _draw_samples(
        run.folder, run.model, run.plan, run.scorer(), count=count, steps=steps, guidance_scale=guidance_scale,
        seed=seed, progress=progress,
    )  # fmt: skip
    if run.folder.summary.is_file():
        build_report(path)
    summary = {"images": str(run.folder.samples_png), "count": count, **figures}
    return Answer(summary, lambda: f"{count} pairs of images in {run.folder.samples_png}")


# ---- devices, models -------------------------------------------------------------------------------------------------


def devices_command() -> Answer:
    """`shiva-search devices`: what each device and sensor can do, and why not."""
    found: list[dict[str, Any]] = []
    for name in list_devices():
        try:
            device = open_device(name)
        except ShivaError as error:
            found.append({"device": name, "available": False, "reason": str(error), "sensors": []})
            continue
        sensors = [asdict(sensor) for sensor in device.sensors()]
        found.append({"device": name, "available": True, **device.describe(), "sensors": sensors})
    lines = []
    for entry in found:
        lines.append(f"{entry['device']}: {entry.get('reason') or entry['device_name']}")
        for sensor in entry["sensors"]:
            state = "yes" if sensor["available"] else "no "
            lines.append(f"  {sensor['what']:<16} {state}  {sensor['name']}: {sensor['how']}")
    return Answer({"devices": found}, lambda: "\n".join(lines))


def models_command() -> Answer:
    """`shiva-search models`: what --model accepts."""
    rows = list_models()
    lines = [f"{row['name']:<34} {row['kind']:<22} {row.get('verified', '')}" for row in rows]
    return Answer({"models": rows}, lambda: "\n".join(lines))


# ---- shared ----------------------------------------------------------------------------------------------------------


def _open(model_name: str, device_name: str, workload: dict[str, Any], seed: int) -> tuple[Device, Model]:
    device = open_device(device_name)
    model = load_model(model_name, device=str(device.torch_device), seed=seed, **workload)
    if model.workload.threads is not None:
        torch.set_num_threads(model.workload.threads)
    return device, model


class _Clock:
    """Wall time by stage, for summary.json."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - started, 1)


def worker_command(path: Path, *, storage: str, study: str, trials: int | None, progress: Progress) -> Answer:
    """`shiva-search worker RUN`: judge plans of a search that another process started."""
    stored = read_json(path / "run.json", "run")
    settings = Settings(**stored["settings"])
    device, model = _open(settings.model, settings.device, settings.workload, settings.seed)
    folder = Path(settings.profile) if settings.profile else _profile_folder(device, model)
    router, _ = _warm_router(model, settings, folder, progress)
    done = join_study(storage, study, model, scorer=router, trials=trials, progress=progress)
    return Answer({"study": study, "trials": done}, lambda: f"{done} plans judged for study {study}")


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _numbers(values: Any) -> dict[str, float]:
    return {name: value for name, value in dict(values).items() if isinstance(value, (int, float))}


def _draw_samples(
    run: RunFolder, model: Model, plan: Plan, selector: Router | str, *, progress: Progress, **options: Any
) -> dict[str, Any]:
    progress("drawing images, dense and planned, from the same seeds")
    pairs = generate_pairs(model, plan, selector, **options)
    figure = plots.samples_figure(pairs.dense.numpy(), pairs.planned.numpy(), pairs.titles)
    plots.save(figure, run.samples_png)
    return pairs.figures
