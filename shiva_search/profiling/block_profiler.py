"""Profile a model block by block. In: a model and a device. Out: a Profile, saved as it grows.

The profile on disk can be loaded from the first second on: estimates are written every few rounds, raw samples at the
end of each, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shiva_search.devices.base import Device
from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.profiling.assembly import assemble
from shiva_search.profiling.bench import Bench
from shiva_search.profiling.conditions import check_place, deployed, is_meta, record_inputs
from shiva_search.profiling.end_to_end import Progress, summary_of
from shiva_search.profiling.flops import ModelFlops
from shiva_search.profiling.sample_log import SampleLog
from shiva_search.profiling.sampler import Sampler
from shiva_search.records.cost_table import CostTable
from shiva_search.records.plan import row_as_json, row_from_json
from shiva_search.records.profile import Profile, load_profile
from shiva_search.records.workload import Workload
from shiva_search.runtime.apply import remove_plan
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name

_OTHER_SHARE = 0.05  # of the time, for memory; more where there is an energy sensor
_ENERGY_SHARE = 0.3
_SAVE_EVERY = 5  # rounds


def profile_model(
    model: Model,
    device: Device,
    *,
    scorer: TokenScorer | str = "stride",
    seconds: float = 60.0,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = True,
    counts: Sequence[int] | None = None,
    plans: int | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure what a model costs on a device.

    Args:
        model: real, or on the meta device: then one block of each signature is made real, with random weights, and
            no plan is measured from end to end.
        device: where it runs; a replay device hands out its recording.
        scorer: what selects tokens inside each pruned cell; pass one that costs what the deployed one will.
        seconds: in all; each cell gets a sample in any case.
        seed: of orders, plans, inputs and made-up weights.
        folder: where the profile grows; an interrupted one found there is taken up, a complete one is returned.
        resume: False starts anew in any case.
        counts: tokens kept to measure; None: a grid that fits the device.
        plans: random plans from end to end; None: as many as the time allows.
        progress: told what is going on, a short line at a time.
        clock: seconds.

    Returns:
        The profile; complete.

    Raises:
        InputError: the folder holds a profile of something else, or cannot be written.
    """
    recorded: Profile | None = getattr(device, "profile", None)
    if recorded is not None:
        check_same(recorded, model, None, f"the recording {device.name}")
        return recorded
    check_place(model, device.torch_device)
    begun = clock()
    say = progress or (lambda line: None)
    place = None if folder is None else Path(folder)
    scorer = scorer_by_name(scorer) if isinstance(scorer, str) else scorer
    before = _found(place, model, device) if resume else None
    if before is not None and before.complete:
        say(f"{place} holds a complete profile")
        return before
    log = None if place is None else SampleLog(place)
    if log is not None and before is None:
        log.restart()
    if before is not None:
        seed = int(before.provenance["seed"])
        say(f"going on with the profile in {place}")
    remove_plan(model.module)
    flops = ModelFlops(model, record_inputs(model, model.example(seed)))
    with deployed(model):
        bench = Bench(model, device, scorer, seed, counts, clock)
        rows = _rows_of(before) if before is not None else bench.choose_rows(plans, seconds)
        bench.prepare(rows, log)
        header = _header(bench, flops, scorer, seconds)

        def on_round(sampler: Sampler) -> None:
            bench.look_for_steps()
            if place is not None and len(sampler.rounds) % _SAVE_EVERY == 1:
                assemble(bench, header, flops, sampler.finish()).save_estimates(place)
            if len(sampler.rounds) % _SAVE_EVERY == 1:
                say(_how_far(sampler, seconds, bench.open_count()))

        try:
            if place is not None:
                header.save_estimates(place)
            share = _ENERGY_SHARE if bench.has_energy else _OTHER_SHARE
            spent_s = clock() - begun
            bench.sampler.run(max(0.0, seconds * (1 - share) - spent_s), on_round)
            say("memory and energy")
            bench.other_costs(seconds * share)
            found = assemble(bench, header, flops, bench.sampler.finish())
        finally:
            remove_plan(model.module)
    provenance = {**found.provenance, "seconds": bench.sampler.elapsed_s, "conditions": summary_of(bench.sampler)}
    found = replace(found, complete=True, provenance=provenance)
    if place is not None:
        found.save(place)
    return found


def _how_far(sampler: Sampler, seconds: float, still_open: int) -> str:
    """One line of progress; past the time asked, what is still waited for."""
    if sampler.elapsed_s <= seconds:
        return f"{sampler.elapsed_s:.0f} of {seconds:.0f} s, {still_open} cells open"
    over = f"the {seconds:g} s asked for are over ({sampler.elapsed_s:.0f} s by now)"
    unseen = sum(not samples for samples in sampler.samples.values())
    if not unseen:
        return f"{over}; every cell has a sample now"
    return f"{over}; finishing the first samples, which every cell gets: {unseen} of {len(sampler.samples)} to go"


def _found(place: Path | None, model: Model, device: Device) -> Profile | None:
    """The profile in a folder, if there is one and it is of this model, workload and device.

    Raises:
        InputError: it is of something else.
    """
    if place is None or not (place / "profile.json").exists():
        return None
    found = load_profile(place)
    step = "choose another folder with `shiva-search profile --out DIR`, or replace what is there with --no-resume"
    check_same(found, model, device, f"the profile in {place}", step)
    return found


def _rows_of(before: Profile) -> list[tuple[int, ...]]:
    return [row_from_json(row) for row in before.provenance["plans"]]


def _header(bench: Bench, flops: ModelFlops, scorer: TokenScorer, seconds: float) -> Profile:
    model, device = bench.model, bench.device
    return Profile(
        model=model.fingerprint(),
        device=device.name,
        tokens=model.tokens,
        layers=tuple(layer.signature for layer in model.layers),
        workload=model.workload.as_dict(),
        dense={"gflops": flops.dense},
        rest={"gflops": flops.rest},
        provenance={
            "device": device.describe(),
            "scorer": type(scorer).__name__,
            "seed": bench.seed,
            "seconds_asked": seconds,
            "token_alignment": bench.alignment,
            "plans": [row_as_json(row) for row in bench.rows],
            "threads": torch.get_num_threads(),
            "attention": _attention_backends(),
            "whole_model": not is_meta(model),
        },
        complete=False,
    )


def check_same(
    found: Profile | CostTable,
    model: Model,
    device: Device | None,
    what: str,
    step: str = "ask for what was recorded, or choose another folder",
) -> None:
    """Refuse to mix profiles of different things.

    Args:
        found: a profile, or the cost model of one.
        what: the profile, as the user knows it.
        step: what the user may do next.

    Raises:
        InputError: names what differs, in words.
    """
    fingerprint = model.fingerprint()
    pairs: list[tuple[str, Any, Any]] = [
        (name, found.model.get(name), fingerprint[name]) for name in ("architecture", "config_hash", "tokens")
    ]
    if device is not None:
        pairs.append(("device", found.device, device.name))
    differing = [f"{name} {was!r}, not {now!r}" for name, was, now in pairs if was != now]
    recorded = Workload.from_dict(dict(found.workload))
    differing += [f"{was}, not {now}" for was, now in recorded.differences(model.workload)]
    if differing:
        raise InputError(f"{what} is of {'; '.join(differing)}; {step}")


def _attention_backends() -> dict[str, bool]:
    """Which kernels scaled_dot_product_attention may choose from."""
    backends = torch.backends.cuda
    return {
        "flash": backends.flash_sdp_enabled(),
        "memory_efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
    }


__all__ = ["profile_model"]
