"""The Python API: one function per stage; every command is built of these. In and out: models, profiles, plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shiva_search.arguments import check_model, model_for, plan_of, scorer_of, transformer_of
from shiva_search.cost.cost_model import CostModel
from shiva_search.cost.cost_model import fit_cost_model as _fit_cost_model
from shiva_search.errors import InputError
from shiva_search.models.catalog import load_model, shipped_bypass
from shiva_search.models.families import family_of
from shiva_search.models.model import Model
from shiva_search.records.budget import Budget
from shiva_search.records.plan import Plan
from shiva_search.records.profile import Profile, load_profile
from shiva_search.records.workload import Workload
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.sharing import ADAPTERS, SELECTOR, beside_plan, from_pretrained, save_pretrained

if TYPE_CHECKING:
    from torch import nn

    from shiva_search.records.measurement import Measurement
    from shiva_search.runtime.bypass import BypassBank
    from shiva_search.runtime.selector import Selector as TrainedSelector
    from shiva_search.search import SearchResult
    from shiva_search.selection.router import Router

Progress = Callable[[str], None]
Selector = TokenScorer | str | None

__all__ = [
    "apply_plan", "fidelity", "fit_bypasses", "fit_cost_model", "from_pretrained", "load_model", "load_profile",
    "load_selector", "measure", "optimize", "profile", "remove_plan", "save_pretrained", "search", "train_selector",
    "warm_up", "wrap",
]  # fmt: skip


def wrap(
    module: nn.Module, example: Mapping[str, Any] | None = None, workload: Workload | None = None, name: str = ""
) -> Model:
    """Tell the package about a transformer you hold.

    Args:
        module: a diffusers transformer of a known class, or any transformer, which is then probed.
        example: keyword arguments of one forward as you call it; batch, dtype and shapes are read from it. A probe
            needs two samples or more, and its findings are for images of this size.
        workload: the conditions it is deployed in, where no example says so.

    Raises:
        InputError: the class has no adapter, and no example is given or the probe finds that plans are not sound.
    """
    from shiva_search.models.catalog import as_model

    if example is not None and not isinstance(example, Mapping):
        raise InputError(
            f"an example is a dict of one forward's keyword arguments, got a {type(example).__name__}; "
            "write for example dict(hidden_states=x, timestep=t)"
        )
    if example is not None and family_of(type(module).__name__) is None:
        return _probed(module, example, name or type(module).__name__)
    model = as_model(module, name or type(module).__name__, "wrapped", workload.as_dict() if workload else None)
    return model if example is None else model.like(example)


def profile(
    model: Model,
    device: str = "cpu",
    *,
    seconds: float = 60.0,
    seed: int = 0,
    folder: str | Path | None = None,
    bypass: str = "affine",
    progress: Progress | None = None,
) -> Profile:
    """Measure every block of the model at many token counts on the device.

    Args:
        seconds: time to spend measuring.
        folder: where raw samples are kept as they come, so that an interrupted profile resumes.
        bypass: what rejected tokens may do: none, mean or affine.

    Raises:
        InputError, UnavailableError: the device is not known or not there.
    """
    from shiva_search.devices import open_device
    from shiva_search.profiling.block_profiler import profile_model

    return profile_model(
        model,
        open_device(device),
        seconds=seconds,
        seed=seed,
        folder=None if folder is None else Path(folder),
        scorer=_untrained(model, bypass),
        progress=progress,
    )


def fit_cost_model(profile: Profile | str | Path) -> CostModel:
    """Fit what plans cost; `held_out` of the result says how far off it is on plans it was not fit on.

    Args:
        profile: from `profile` or `load_profile`, or the folder of one.

    Raises:
        InputError: no profile there, or a signature of the model is missing in it.
    """
    return _fit_cost_model(profile if isinstance(profile, Profile) else load_profile(Path(profile)))


def search(
    model: Model,
    cost: CostModel,
    budget: Budget,
    *,
    trials: int = 100,
    seed: int = 0,
    scorer: Selector = None,
    measure: Callable[[Plan], Measurement] | None = None,
    **options: Any,
) -> SearchResult:
    """Search tokens kept per layer within the budget; the quality of a plan is the model's own output error.

    Args:
        budget: limits in numbers, `Budget(latency_ms=50.0)`, `Budget(shares={"latency_ms": 0.6})`, or read from texts,
            `Budget.parse({"latency_ms": "60%", "memory_mib": "6GiB"})`.
        scorer: ranks tokens while plans are judged; None takes the bypasses that ship with the model, else stride.
            See `fit_bypasses` and `warm_up` for selectors of your own model.
        measure: measures a plan on the device, closing the loop; None trusts the cost model.
        **options: storage, study_name, min_keep, segments, sampler, attend, folder, effects, progress
                (search/run_search.py).

    Raises:
        InfeasibleBudgetError: no plan fits; names the floor and the budget that binds.
        BudgetBrokenError: none holds it as measured; its `nearest` is the result that came nearest.
        InputError: bad options, or costs of another model or workload.
    """
    from shiva_search.profiling.block_profiler import check_same
    from shiva_search.search import search as run

    if not isinstance(budget, Budget):
        raise InputError(
            f'a budget is a Budget, got {budget!r}; write for example Budget.parse({{"latency_ms": "60%"}})'
        )
    check_same(cost, model, None, "the cost model", "profile this model as it will be used, and fit its costs")
    resolved = scorer_of(scorer, shipped_bypass(model))
    return run(model, cost, budget, trials=trials, seed=seed, scorer=resolved, measure=measure, **options)


def train_selector(
    model: Model,
    plan: Plan,
    steps: int = 500,
    *,
    selector: TrainedSelector | None = None,
    seed: int = 0,
    **options: Any,
) -> TrainedSelector:
    """Train the selector at the plan: `selector`, else bypasses where the plan has some, or a warmed-up router.

    Raises:
        InputError: the plan does not fit the model.
    """
    from shiva_search.selection.training import tune

    if selector is None:
        selector = warm_up(model, seed=seed) if plan.bypass["kind"] == "none" else fit_bypasses(model, seed=seed)
    return tune(model, selector, plan, steps=steps, seed=seed, **options)[0]


def warm_up(model: Model, steps: int | None = None, *, seed: int = 0, **options: Any) -> Router:
    """A router that serves every ratio: the one that ships with the model, or one trained now for `steps`."""
    from shiva_search.models.catalog import shipped_router
    from shiva_search.selection.loading import load_selector as load
    from shiva_search.selection.training import warm_up as train

    shipped = shipped_router(model)
    if shipped is not None and steps is None:
        return cast("Router", load(shipped))
    return train(model, steps=180 if steps is None else steps, seed=seed, **options)[0]


def fit_bypasses(model: Model, kind: str = "affine", ranks: Sequence[int] | None = None, **options: Any) -> BypassBank:
    """What rejected tokens do instead of standing still, fit in closed form; it also ranks tokens by what it misses.

    Args:
        kind: "affine" or "mean".
        ranks: of the affine bypass, for the search to choose from; None: those that ship with the model, or 16 and 32.
        **options: of selection.closed_form.fit_bypasses (samples, passes, segments, gates, seed, progress).

    Raises:
        InputError: bad settings.
    """
    from shiva_search.selection.closed_form import RANKS
    from shiva_search.selection.closed_form import fit_bypasses as fit

    shipped = shipped_bypass(model)
    if shipped is not None and kind == "affine" and ranks is None and options.keys() <= {"seed", "progress"}:
        return load_selector(shipped)  # type: ignore[return-value]
    return fit(model, kind, RANKS if ranks is None else ranks, **options)[0]


def load_selector(path: str | Path) -> TrainedSelector:
    """Read selector.safetensors, or the one in a run's folder.

    Raises:
        InputError: missing, unreadable or not a selector.
    """
    from shiva_search.selection.loading import load_selector as load

    return load(path)


def apply_plan(
    target: Any,
    plan: Plan | str | Path,
    selector: Selector = None,
    *,
    guidance: bool | None = None,
    reuse_updates: int = 0,
) -> AppliedPlan:
    """Put a plan on a model: for the body of a `with`, until `remove()` of the handle, or for good.

        with ss.apply_plan(pipe, "reports/run"):            # off again at the end, also after an error
            image = pipe(prompt).images[0]
        handle = ss.apply_plan(pipe, "reports/run")         # off with handle.remove()
        ss.apply_plan(pipe, "reports/run")                  # stays on, with no handle to keep; a new plan replaces it,
        ss.remove_plan(pipe)                                # and this takes it off

    Adapters (LoRA), offloading and caching hooks may be put on and taken off before or after, in any order.

    Args:
        target: a Model, a transformer module, or a pipeline with one.
        plan: a Plan, plan.json, a run's folder, or a folder or hub id that `save_pretrained` filled.
        selector: a scorer by name, a callable, a trained selector; None takes the plan's own where it has one, else
            "stride".
        guidance: whether the two halves of a batch share one selection; None: where both hold the same images, as
            pipelines build them for guidance.
        reuse_updates: a rejected token is moved as its block last moved it, if that was no more than so many steps of
            the sampler ago; 0: never. Outside of what was measured for the plan: see `make bench-reuse`. A sampler that
            starts below where the last image was left needs the handle's `forget_updates()` in between.

    Raises:
        InputError: no such folder or no plan in it; the plan, or what was trained for it, does not fit the model,
            naming what differs; a negative reuse; an argument of the wrong kind.
        UnavailableError: a hub id whose repository is neither here nor to be had.
    """
    plan = plan_of(plan)
    model = model_for(target, plan)
    plan.check_model(model.fingerprint())
    scorer = scorer_of(selector, beside_plan(plan, SELECTOR))
    if selector is None and hasattr(scorer, "check_model"):
        scorer.check_model(model.fingerprint())
    applied = AppliedPlan(model, plan, scorer, guidance=guidance, reuse_updates=reuse_updates)
    adapters = beside_plan(plan, ADAPTERS)
    if adapters is not None:
        try:
            applied.when_removed(_put_on_adapters(model, adapters))
        except BaseException:
            applied.remove()
            raise
    return applied


def remove_plan(target: Any) -> None:
    """Take off whatever plan is on a model, a transformer or a pipeline; nothing happens where there is none."""
    from shiva_search.runtime.apply import remove_plan as remove

    remove(target.module if isinstance(target, Model) else transformer_of(target))


def measure(
    model: Model,
    plan: Plan | str | Path,
    device: str = "cpu",
    *,
    selector: Selector = None,
    seconds: float = 20.0,
    seed: int = 0,
) -> Measurement:
    """Measure the planned model against the dense one, interleaved, on the device.

    Args:
        plan: a Plan, or what `apply_plan` reads one from: plan.json, a run's folder, a hub id.
        selector: see `apply_plan`.
        seconds: of measuring.

    Raises:
        InputError: an argument of the wrong kind, no time to measure in, or the plan is not there or does not fit.
        UnavailableError: the device is not there, or the hub does not give the plan.
    """
    from shiva_search.devices import open_device
    from shiva_search.profiling.end_to_end import measure_plans

    check_model("measure", model)
    if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise InputError(f"measuring takes a finite number of seconds above zero, got {seconds!r}; try seconds=20.0")
    plan = plan_of(plan)
    scorer = scorer_of(selector, beside_plan(plan, SELECTOR))
    return measure_plans(model, [plan], open_device(device), scorer_for=lambda _: scorer, seconds=seconds, seed=seed)[0]


def fidelity(
    model: Model,
    plan: Plan | str | Path,
    selector: Selector = None,
    *,
    split: str = "calibration",
    samples: int = 64,
    seed: int = 0,
) -> float:
    """The quality figure the search minimises: normalised squared error of the output against the dense model's.

    sum ||v_planned - v_dense||^2 / sum ||v_dense||^2 over samples at stratified timesteps; 0 is identical, lower is
    better. The plan is a Plan, or what `apply_plan` reads one from.

    Raises:
        InputError: an argument of the wrong kind, or the plan is not there or does not fit.
        UnavailableError: the hub does not give the plan.
    """
    from shiva_search.search.fidelity import fidelity as evaluate

    check_model("fidelity", model)
    plan = plan_of(plan)
    return evaluate(
        model, plan, scorer_of(selector, beside_plan(plan, SELECTOR)), split=split, samples=samples, seed=seed
    )


def optimize(
    model: str = "fashion-dit",
    out: str | Path | None = None,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The whole job, as `shiva-search optimize` does it; the run's summary.

    Args:
        **settings: fields of workflow.Settings (budget={"latency_ms": "60%"}, trials, train_steps, ...).
    """
    from shiva_search.workflow import Settings, optimize_command

    return optimize_command(
        Settings(model=model, **settings),
        out=None if out is None else Path(out),
        resume=resume,
        progress=progress or (lambda _: None),
    ).summary


def _put_on_adapters(model: Model, path: Path) -> Callable[[], object]:
    """Put trained adapters on; what takes them off."""
    from contextlib import ExitStack

    from shiva_search.selection.adapters import adapted, load_adapters, rank_of

    state = load_adapters(path)
    with ExitStack() as stack:
        parameters = stack.enter_context(adapted(model, rank_of(state), state))
        parameters.requires_grad_(False)
        return stack.pop_all().close


def _probed(module: nn.Module, example: Mapping[str, Any], name: str) -> Model:
    """A model of no known class; refused unless a plan that keeps all tokens gives the module's own bits."""
    import torch

    from shiva_search.models.catalog import refuse_known
    from shiva_search.models.probe import at_rest, probe

    refuse_known(type(module).__name__)
    family, workload = probe(module, example)
    model = Model(module, name, family, workload, origin="wrapped")
    with at_rest(module):
        dense = model.predict(example)
        with AppliedPlan(model, Plan.dense(model)):
            kept = model.predict(example)
    if not torch.equal(kept, dense):
        raise InputError(
            f"a plan that keeps all tokens does not give the bits of {name}; it cannot be used without an adapter"
        )
    return model


def _untrained(model: Model, bypass: str) -> TokenScorer:
    """What a profile selects with: the cost of selecting does not depend on what was learned."""
    from shiva_search.workflow.selectors import check_bypass, untrained_selector

    check_bypass(bypass, None)
    return untrained_selector(model, bypass, None)
