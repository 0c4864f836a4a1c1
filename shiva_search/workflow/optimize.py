"""`shiva-search optimize`: profile, search, train, apply, measure again. In: Settings. Out: a run's folder.

Stages that are done are not repeated: a stage's file counts when it was made from the same settings.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiva_search import __version__
from shiva_search.cost.cost_model import load_cost_model
from shiva_search.errors import BudgetBrokenError, InfeasibleBudgetError, InputError
from shiva_search.profiling.end_to_end import measure_plans, measure_settled
from shiva_search.records.budget import Budget
from shiva_search.records.files import check_folder_writable, read_json, write_json
from shiva_search.records.measurement import Measurement
from shiva_search.records.plan import Plan
from shiva_search.records.run import RunFolder
from shiva_search.reporting import tables
from shiva_search.search import SearchResult, check_attend, check_budget, check_layout, holds, search
from shiva_search.search.fidelity import fidelity
from shiva_search.search.samplers import SAMPLERS
from shiva_search.workflow.answer import Answer, Progress
from shiva_search.workflow.images import draw_samples
from shiva_search.workflow.opening import open_both, profile_folder
from shiva_search.workflow.outcome import EVALUATION_SAMPLES, answer_of, write_outcome
from shiva_search.workflow.profiles import Costs, take_profile, use_profile
from shiva_search.workflow.selectors import check_bypass, ready_selector, tuned_selector, untrained_selector
from shiva_search.workflow.settings import Settings

if TYPE_CHECKING:
    from shiva_search.devices.base import Device
    from shiva_search.models.model import Model

#: Seconds of one interleaved measurement: of each round while the loop closes, and for the final figure.
MEASURE_SECONDS = 20.0
#: Plans searched anew because the tuned plan's final measurement broke the budget.
FINAL_ROUNDS, AGAIN_TRIALS = 3, 30
#: Share of the latency budget that the search aims for, so that a fresh, noisy measurement holds it too.
AIM = 0.99


def optimize_command(settings: Settings, *, out: Path | None, resume: bool, progress: Progress) -> Answer:
    """`shiva-search optimize`: profile, search, train, apply, measure again, report.

    Raises:
        ShivaError: see the contract's exit codes.
    """
    budget = Budget.parse(settings.budget, settings.per, settings.steps)
    if not budget:
        raise InputError("optimize needs a budget; write for example --max-latency 50ms or --max-latency 60%")
    check_bypass(settings.bypass, settings.bypass_rank)
    check_attend(settings.attend)
    check_layout(settings.min_keep, settings.segments)
    if settings.sampler not in SAMPLERS:
        raise InputError(f"--sampler is one of {', '.join(SAMPLERS)}, got {settings.sampler!r}")
    run = RunFolder(out or Path("reports") / _run_name(settings))
    check_folder_writable(run.path)
    device, model = open_both(
        settings.model, settings.device, settings.workload, settings.seed, limited=settings.budget
    )
    _refuse_another_models_run(run, model)
    clock = _Clock()

    with clock("profile"):
        folder = _folder_of(settings, device, model)
        ranking = untrained_selector(model, settings.bypass, settings.bypass_rank)
        if resume and _is_under_way(run, settings):
            # Checked when the run began; other costs would make it another problem and its trials void.
            progress(f"going on with the run in {run.path} and its cost model")
            costs = Costs(load_cost_model(run.path), read_json(run.settings, "run").get("drift"))
        elif settings.profile:
            costs = use_profile(model, device, folder, scorer=ranking, progress=progress)
        else:
            costs = take_profile(
                model, device, folder, seconds=settings.profile_seconds, seed=settings.seed, resume=resume,
                scorer=ranking, progress=progress,
            )  # fmt: skip
        cost = costs.model
    check_budget(model, cost, budget, min_keep=settings.min_keep, segments=settings.segments)
    cost.save(run.path)
    started = {"schema_version": 1, "settings": asdict(settings), "version": __version__, "drift": costs.drift}
    write_json(run.settings, {**started, "finished": False})

    with clock("warm_up"):
        router, curve = ready_selector(model, settings, folder, progress)
        router.save(run.warm_router)
    untuned = copy.deepcopy(router)  # what plans are judged with, also after training: errors stay comparable

    def measure(plan: Plan, seconds: float = MEASURE_SECONDS) -> Measurement:
        def once() -> Measurement:
            [found] = measure_plans(
                model, [plan], device, scorer_for=lambda _: router, seconds=seconds, seed=settings.seed
            )
            return found

        return measure_settled(once, progress)

    find = partial(
        search, model, seed=settings.seed, scorer=untuned, measure=measure,
        storage=settings.storage, min_keep=settings.min_keep, segments=settings.segments, sampler=settings.sampler,
        attend=settings.attend,
        folder=run.path, progress=progress,
    )  # fmt: skip

    def plan_of(found: SearchResult) -> Plan:
        return found.plan.with_(
            device=device.name,
            workload=model.workload.as_dict(),
            budget=budget.resolve(cost.dense).as_dict() | ({"shares": dict(budget.shares)} if budget.shares else {}),
            origin={
                "settings": settings.digest(),
                "seed": settings.seed,
                "version": __version__,
                "study": found.study_name,
                "drift": costs.drift,
            },
        )

    broken = False
    with clock("search"):
        try:
            try:
                result = find(cost, _tighter(budget, AIM), trials=settings.trials)
            except InfeasibleBudgetError:  # the floor lies between the aim and the budget
                result = find(cost, budget, trials=settings.trials)
        except BudgetBrokenError as error:
            if error.nearest is None or error.nearest.measurement is None:
                raise
            result = error.nearest
            broken = not holds(budget, error.nearest.measurement)  # it may lie between the aim and the budget
            if broken:
                progress("no plan holds the budget as measured; the nearest one is kept, untrained")
    plan, rounds = plan_of(result), list(result.rounds)
    plan.save(run.plan)
    tables.write_trials(run.trials, result.trials)
    tables.write_pareto(run.pareto_csv, result.pareto)

    def train(plan: Plan, steps: int, seed: int, checkpoint: Path | None) -> None:
        nonlocal router, curve
        if steps and not plan.is_dense:
            router, tuned, _ = tuned_selector(
                model, plan, router, steps=steps, seed=seed, checkpoint=checkpoint, progress=progress
            )
            curve = [*curve, *tuned]
        router.save(run.selector)
        if curve:
            tables.write_training(run.training_csv, curve)

    with clock("tune"):
        train(plan, 0 if broken else settings.train_steps, settings.seed, run.path / ".tune.pt")
    (run.path / ".tune.pt").unlink(missing_ok=True)  # done: a later training starts from the selector

    with clock("measure"):
        # The loop has measured the plan; what counts is that a fresh measurement holds as well.
        trained_at, final = plan, result.measurement
        if not broken or final is None:
            progress("measuring the plan against the dense model")
            final = _measure_afresh(measure, budget, plan)
        for again in range(1, FINAL_ROUNDS + 1):
            if broken or holds(budget, final):
                break
            progress(f"a fresh measurement takes {final.ratio:.1%} of dense and breaks the budget; searching below it")
            try:
                result = find(
                    result.cost or cost, _tighter(budget, AIM - 0.015 * again), trials=AGAIN_TRIALS,
                    effects=result.effects,
                )  # fmt: skip
            except (InfeasibleBudgetError, BudgetBrokenError) as error:
                progress(f"no plan is left below: {error}")
                break
            plan, rounds = plan_of(result), [*rounds, *result.rounds]
            tables.write_trials(run.trials, result.trials)
            tables.write_pareto(run.pareto_csv, result.pareto)
            final = _measure_afresh(measure, budget, plan)
    if plan is not trained_at:
        with clock("tune_again"):  # half the steps will do: the selector knows a plan much like this one
            train(plan, settings.train_steps // 2, settings.seed + 1, None)
    with clock("evaluate"):
        error_there = fidelity(model, plan, router, split="evaluation", samples=EVALUATION_SAMPLES, seed=settings.seed)
    note = "; ".join(filter(None, [_scope(settings), result.note])) or None
    write_outcome(run, model, device, plan, final, budget, rounds, error_there, clock.seconds, note)
    if settings.model == "fashion-dit":
        with clock("generate"):
            draw_samples(run, model, plan, router, count=10, steps=20, guidance_scale=2.5, seed=0, progress=progress)
    write_json(run.settings, {**started, "finished": True})
    return answer_of(run)


def _folder_of(settings: Settings, device: Device, model: Model) -> Path:
    if settings.profile:
        return Path(settings.profile)
    return profile_folder(device, model, settings.bypass, settings.bypass_rank)


def _is_under_way(run: RunFolder, settings: Settings) -> bool:
    """Whether the folder holds an interrupted run of the same problem, with the cost model it searched on."""
    if not (run.settings.is_file() and run.cost_model.is_file()):
        return False
    stored = read_json(run.settings, "run")
    try:
        before = Settings(**stored["settings"])
    except (KeyError, TypeError):
        return False
    same = replace(before, trials=settings.trials, sampler=settings.sampler, train_steps=settings.train_steps)
    return stored.get("finished") is False and same.digest() == settings.digest()


def _refuse_another_models_run(run: RunFolder, model: Model) -> None:
    """What a run holds is about one model: tables and pictures of two in one folder would be read as one's."""
    try:
        plan = Plan.from_file(run.plan)
    except InputError:
        return  # none, or none that can be read
    try:
        plan.check_model(model.fingerprint())
    except InputError as error:
        raise InputError(
            f"{run.path} holds a run of another model; name another folder with --out ({error})"
        ) from error


def _run_name(settings: Settings) -> str:
    limits = "-".join(text.replace("%", "pct").replace(" ", "") for text in settings.budget.values())
    if settings.per == "image":
        limits += f"-per-image-of-{settings.steps}"
    said = "".join(
        f".{name.replace('_', '-')}-{_in_a_name(value)}" for name, value in sorted(settings.workload.items())
    )
    return f"{Path(settings.model).name}-{limits}{said}"


def _scope(settings: Settings) -> str | None:
    """What to say of a budget that was not given for one step, since all figures are of one."""
    if settings.per != "image":
        return None
    return f"the budget was given for an image of {settings.steps} steps; figures and limits are of one step"


def _in_a_name(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _measure_afresh(measure: Callable[..., Measurement], budget: Budget, plan: Plan) -> Measurement:
    """A fresh measurement; a longer one where only the width of the interval speaks against the plan."""
    final = measure(plan)
    if not holds(budget, final) and holds(budget, replace(final, ratio_high=final.ratio)):
        final = measure(plan, 2 * MEASURE_SECONDS)
    return final


def _tighter(budget: Budget, factor: float) -> Budget:
    """The budget with latency, the noisy one, scaled down."""
    shares = {name: share * (factor if name == "latency_ms" else 1.0) for name, share in budget.shares.items()}
    latency_ms = None if budget.latency_ms is None else budget.latency_ms * factor
    return replace(budget, latency_ms=latency_ms, shares=shares)


class _Clock:
    """Wall time by stage, for summary.json."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - started, 1)
