"""What callers may pass, turned into what stages take. In: arguments of the Python API. Out: models, plans, scorers.

An argument of the wrong kind is refused here in words: the rule, what was passed, what to write instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shiva_search.errors import InputError
from shiva_search.models.families import family_of
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.records.workload import Workload
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name
from shiva_search.sharing import from_pretrained


def plan_of(plan: Plan | str | Path) -> Plan:
    """A plan, or the one in a run's folder, a file or a hub repository."""
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, Path)):
        raise InputError(
            f"a plan is a Plan, a path or a hub id, got {plan!r}; make one with Plan.uniform(model, keep=0.6), or "
            "Plan.from_rows(model, rows) with a list of k per segment"
        )
    return from_pretrained(plan)


def check_model(stage: str, model: Model) -> None:
    """Refuse what is no Model."""
    if not isinstance(model, Model):
        raise InputError(
            f"{stage} takes a Model, got a {type(model).__name__}; make one with load_model(name) or wrap(module)"
        )


def model_for(target: Any, plan: Plan) -> Model:
    """A Model, or one of a transformer or a pipeline, with the workload of the plan."""
    if isinstance(target, Model):
        return target
    module = transformer_of(target)
    family = family_of(type(module).__name__)
    if family is None:
        raise InputError(
            f"apply_plan takes a Model, a diffusers transformer or a pipeline with one, got {type(target).__name__}; "
            "wrap other transformers with shiva_search.wrap(module, example=...)"
        )
    if plan.workload:
        workload = Workload.from_dict(dict(plan.workload))
    else:  # a plan made by hand
        config = dict(module.config)
        workload = family.defaults(config).override(resolution=family.resolution_of(config, plan.tokens))
    return Model(module, type(module).__name__, family, workload)


def transformer_of(target: Any) -> Any:
    """The transformer of a pipeline, or the module itself; what torch.compile wraps around it left off."""
    module = getattr(target, "transformer", target)
    return getattr(module, "_orig_mod", module)


def scorer_of(selector: TokenScorer | str | None, usual: Path | None) -> TokenScorer:
    """A scorer, or the one of this name; None: the trained one in a file where there is one, else every nth token."""
    if selector is None and usual is not None:
        from shiva_search.selection.loading import load_selector

        return load_selector(usual)
    selector = "stride" if selector is None else selector
    if isinstance(selector, str):
        return scorer_by_name(selector)
    if not callable(selector):
        raise InputError(
            f"a selector is a scorer's name, a callable or a trained selector, got {selector!r}; read one from a file "
            "with load_selector(path), or leave it out for the plan's own"
        )
    return selector
