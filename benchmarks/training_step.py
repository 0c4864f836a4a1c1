"""What a training step costs, relative to one of fine-tuning the dense model on the same samples.

    router  teacher, pruned student and router at keep 0.6, the backbone frozen; against full fine-tuning
    joint   the same with DoRA adapters on the backbone; against fine-tuning these adapters on the dense model

Steps are interleaved in rounds; figures are medians of the rounds' ratios. The model has fashion-dit's shape and random
weights, on which time does not depend.

    python -m benchmarks.training_step [--batch 8] [--rounds 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.timing import print_result, random_dit
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.selection.adapters import adapted
from shiva_search.selection.batches import planned_groups
from shiva_search.selection.distilling import Distiller, frozen, prefers_bfloat16
from shiva_search.selection.joint import AdaptedDistiller
from shiva_search.selection.losses import diffusion_loss
from shiva_search.selection.router import Router
from shiva_search.selection.training_gate import Recipe

KEEP = 0.6
Step = Callable[[], None]


def dense_step(model: Model, parameters: list[torch.nn.Parameter], batch_size: int) -> Step:
    """Forward, backward and update of the dense model on the diffusion loss."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    batch = model.batch("train", batch_size)
    target = torch.randn_like(batch.inputs["hidden_states"])
    half = prefers_bfloat16(model.module)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model.predict(batch.inputs)
        diffusion_loss(output, target).backward()
        optimizer.step()

    return step


def planned_step(model: Model, kind: type[Distiller], parameters: list[torch.nn.Parameter], batch_size: int) -> Step:
    """Teacher, student, update of the router (and of what else is trained); hooks are put on anew in each step."""
    plan, router, recipe = Plan.uniform(model, KEEP), Router.for_model(model), Recipe()
    optimizer = torch.optim.AdamW([*router.parameters(), *parameters], lr=0.0)
    batch = model.batch("train", batch_size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with AppliedPlan(model, plan, router, guidance=False) as applied:
            distiller = kind(applied, recipe)
            distiller.step(planned_groups(plan, batch, batch_size), distiller.gate(0, 0.5))
        optimizer.step()

    return step


def ratios(planned: Step, dense: Step, rounds: int) -> list[float]:
    """Planned over dense, one ratio per round; the first round warms up."""
    found = []
    for _ in range(rounds + 1):
        took_s = []
        for step in (dense, planned, dense):
            begun = time.perf_counter()
            step()
            took_s.append(time.perf_counter() - begun)
        found.append(took_s[1] / ((took_s[0] + took_s[2]) / 2))
    return found[1:]


def router_ratio(model: Model, batch_size: int, rounds: int) -> float:
    """A step of the router's training over one of fine-tuning all weights."""
    planned = planned_step(model, Distiller, [], batch_size)
    dense = dense_step(model, list(model.module.parameters()), batch_size)

    def frozen_planned() -> None:
        with frozen(model.module):
            planned()

    model.module.requires_grad_(True)
    found = ratios(frozen_planned, dense, rounds)
    model.module.requires_grad_(False)
    return statistics.median(found)


def joint_ratio(model: Model, batch_size: int, rounds: int) -> float:
    """A step of joint tuning over one of fine-tuning the same adapters on the dense model."""
    with adapted(model) as adapters:
        parameters = list(adapters.values())
        planned = planned_step(model, AdaptedDistiller, parameters, batch_size)
        return statistics.median(ratios(planned, dense_step(model, parameters, batch_size), rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    model = random_dit(heads=4, head_width=32, layers=7, side=28, batch=2)
    ratio = router_ratio(model, options.batch, options.rounds)
    joint = joint_ratio(model, options.batch, options.rounds)
    print(f"a step at keep {KEEP} takes {ratio:.2f} of dense fine-tuning; with adapters {joint:.2f} of theirs")
    print_result({"ratio": ratio, "joint_ratio": joint, "keep": KEEP, "batch": options.batch})


if __name__ == "__main__":
    main()
