"""A plan to share: from a run's folder to one as model hubs keep them, and back. Safetensors and JSON, no code.

plan.json               tokens kept, the model it is for, what it costs
selector.safetensors    the trained selector, where there is one
adapters.safetensors    low-rank adapters trained along with it, where there are some
README.md               a model card
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiva_search import __version__
from shiva_search.errors import InputError, UnavailableError
from shiva_search.records.files import write_text
from shiva_search.records.plan import Plan, row_in_words
from shiva_search.reporting.words import number, percent

if TYPE_CHECKING:
    import torch

    from shiva_search.runtime.selector import Selector

PLAN, SELECTOR, ADAPTERS, CARD = "plan.json", "selector.safetensors", "adapters.safetensors", "README.md"
_COSTS = {
    "latency_ms": "latency, ms", "energy_j": "energy, J", "power_w": "power, W", "peak_memory_mib": "peak memory, MiB",
    "gflops": "GFLOPs",
}  # fmt: skip


def save_pretrained(
    plan: Plan | str | Path,
    folder: str | Path,
    *,
    selector: Selector | None = None,
    adapters: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a plan, and what was trained for it, to a folder that `from_pretrained` and `apply_plan` take.

    Args:
        plan: a Plan, plan.json, or a run's folder.
        folder: may exist; files of the same names are replaced, and ones that do not belong to this plan removed.
        selector: the trained selector; None takes the one beside the plan, where there is one.
        adapters: values by parameter name, as tune_jointly gives them; None takes the ones beside the plan.

    Returns:
        The folder.

    Raises:
        InputError: no model is named in the plan, selector or adapters do not belong to it, or nothing can be written.
    """
    from shiva_search.selection.adapters import load_adapters, rank_of, save_adapters
    from shiva_search.selection.loading import load_selector

    plan = plan if isinstance(plan, Plan) else Plan.from_file(plan)
    if not plan.model:
        raise InputError("this plan does not say which model it is for; make it with Plan.from_rows(model, rows)")
    if selector is None:
        beside = beside_plan(plan, SELECTOR)
        selector = None if beside is None else load_selector(beside)
    if adapters is None:
        beside = beside_plan(plan, ADAPTERS)
        adapters = None if beside is None else load_adapters(beside)
    if selector is not None:
        selector.check_model(plan.model)
    rank = None if adapters is None else rank_of(adapters)
    place = Path(folder)
    plan = plan.with_(model=_nameable(plan.model))
    plan.save(place / PLAN)
    if selector is None:
        (place / SELECTOR).unlink(missing_ok=True)
    else:
        shared = copy.copy(selector)
        shared.model = _nameable(selector.model)
        shared.save(place / SELECTOR)
    if adapters is None:
        (place / ADAPTERS).unlink(missing_ok=True)
    else:
        save_adapters(place / ADAPTERS, adapters, plan.model)
    write_text(place / CARD, card(plan, has_selector=selector is not None, rank=rank))
    return place


def from_pretrained(name: str | Path, *, revision: str | None = None) -> Plan:
    """The plan in a folder or hub repository that `save_pretrained` filled; its selector and adapters come along.

    Args:
        name: a folder, or a hub id (owner/name); a Path is always a folder.
        revision: branch, tag or commit of a hub repository.

    Raises:
        UnavailableError: a hub id whose repository is neither here nor to be had.
        InputError: no such folder, or there is no plan in it.
    """
    is_hub_id = isinstance(name, str) and name.count("/") == 1 and name[0] not in "./~" and not name.endswith(".json")
    if Path(name).exists() or not is_hub_id:
        return Plan.from_file(name)
    from huggingface_hub import snapshot_download

    try:
        place = snapshot_download(str(name), revision=revision, allow_patterns=[PLAN, SELECTOR, ADAPTERS, CARD])
    except (OSError, ValueError, RuntimeError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnavailableError(
            f"{str(name)!r} is no folder here, and the hub does not give it ({line}); check the name and the network"
        ) from error
    return Plan.from_file(place)


def _nameable(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's fingerprint without the folders around it: where it lies here is nobody else's business."""
    name = str(model.get("name") or "")
    if not name or not (Path(name).is_dir() or Path(name).is_absolute() or name[0] in ".~"):
        return dict(model)
    return {**model, "name": Path(name).resolve().name}


def beside_plan(plan: Plan, name: str) -> Path | None:
    """The file of that name beside a plan that was read from a folder, where there is one."""
    path = None if plan.folder is None else plan.folder / name
    return path if path is not None and path.is_file() else None


def card(plan: Plan, *, has_selector: bool, rank: int | None) -> str:
    """The model card, Markdown with the front matter that hubs read."""
    model, workload = _nameable(plan.model), plan.workload
    parts = [
        "a trained token selector" if has_selector else "no selector of its own (tokens are spread evenly)",
        *([] if rank is None else [f"low-rank adapters (DoRA, rank {rank})"]),
    ]
    conditions = ", ".join(f"{name} {value}" for name, value in workload.items() if value is not None)
    return "\n".join(
        [
            "---",
            "library_name: shiva-search",
            "tags: [diffusion, diffusion-transformer, token-pruning]",
            "---",
            "",
            f"# A token plan for {model.get('name', 'a diffusion transformer')}",
            "",
            f"Made by shiva-search {__version__}. It says how many of {plan.tokens} image tokens each of "
            f"{plan.layer_count} blocks processes, {100 * plan.mean_keep:.0f} % on average, "
            f"and brings {' and '.join(parts)}.",
            "The model itself is not in here.",
            "",
            "```python",
            "import shiva_search as ss",
            "",
            'plan = ss.from_pretrained("this folder or its hub id")',
            "with ss.apply_plan(pipe, plan):   # or handle = ss.apply_plan(...), handle.remove()",
            "    image = pipe(prompt).images[0]",
            "```",
            "",
            "## Model",
            "",
            "It is refused on any other, and what differs is named.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | `{value}` |" for name, value in model.items()),
            "",
            "## Tokens kept",
            "",
            "+r16: rejected tokens take a bypass of rank 16 instead of standing still. *: kept tokens attend to all.",
            "",
            "| time (1 is noise) | tokens kept per block, 0 skips it (or, with a bypass, replaces it) |",
            "|---|---|",
            *(
                f"| {low:g} to {high:g} | {row_in_words(row, plan.tokens)} |"
                for (low, high), row in zip(plan.segments, plan.rows, strict=True)
            ),
            "",
            "## Cost of one denoising step",
            "",
            f"Device: {plan.device or 'not known'}. Workload: {conditions or 'not known'}.",
            "",
            *_cost_table(plan),
        ]
    )


def _cost_table(plan: Plan) -> list[str]:
    """What was measured together, and shares of dense; columns of which nothing is known are left out.

    A machine's speed is another one in a profile and in a measurement, so a prediction is a share of the dense cost it
    was predicted with, and has figures of its own only where nothing was measured.
    """
    measured, predicted = plan.measured, plan.predicted
    source = "predicted from a recording" if measured.get("replayed") else "measured"
    only_predicted = {} if measured.get("latency_ms") else predicted

    def column(
        title: str, values: Iterable[float | None], in_words: Callable[[float], str] = number
    ) -> tuple[str, list[str]]:
        return title, ["" if value is None else in_words(value) for value in values]

    columns = [
        column(f"dense, {source}", (measured.get(f"dense_{name}") for name in _COSTS)),
        column(f"plan, {source}", (measured.get(name) for name in _COSTS)),
        column(f"of dense, {source}", (_share_of_dense(measured, name) for name in _COSTS), percent),
        column("plan, predicted", (only_predicted.get(name) for name in _COSTS)),
        column("of dense, predicted", (_share_of_dense(predicted, name) for name in _COSTS), percent),
    ]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    if not columns:
        return ["Not measured.", ""]
    rows = [cells for cells in zip(_COSTS.values(), *(cells for _, cells in columns), strict=True) if any(cells[1:])]
    lines = [("", *(title for title, _ in columns)), ("---",) * (len(columns) + 1), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _share_of_dense(costs: Mapping[str, Any], name: str) -> float | None:
    """Of the dense cost from the same source; None where that is not known."""
    if name == "latency_ms" and costs.get("ratio") is not None:
        return float(costs["ratio"])
    cost, dense = costs.get(name), costs.get(f"dense_{name}")
    return cost / dense if cost is not None and dense else None
