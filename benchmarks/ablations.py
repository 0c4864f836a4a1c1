"""What each part of training a router is worth: the same steps without it, or with another in its place.

Routers for tokens that stand still when rejected (the paper's method) are trained from scratch on fashion-dit for the
same number of steps over all ratios, then judged at uniform keep on held-out images. Estimators of a gate's slope:

    soft        update scaled by its inclusion score, with a margin of tokens beyond k: what this package trains with
    update      dL/dpi_i = <dL/dy_i, f_i> for kept tokens, f_i being the block's update; 0 for rejected ones
    literal     features gated as printed in the paper (eq. 7, 23)
    predicted   as update, and for rejected tokens <dL/dx_i, p_i>, p_i being the update that a bypass predicts
    robust      <., p_i + (f_i - p_i) / pi_i> for kept tokens, <., p_i> for rejected: the prediction as a control
                variate (Horvitz-Thompson with a model, as in doubly robust estimation)

    python -m benchmarks.ablations [--steps 60] [--keep 0.6 0.4] [--only soft update predicted] [--seeds 2]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

import shiva_search as ss
from benchmarks.timing import print_result
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.bypass import BypassBank
from shiva_search.runtime.scorers import History, TokenScorer
from shiva_search.runtime.token_ops import gather_tokens
from shiva_search.selection import training_gate
from shiva_search.selection.gates import UpdateGated, gate_update
from shiva_search.selection.router import Router
from shiva_search.selection.training import warm_up

#: A kept token's inclusion score is not taken for smaller than this where something is divided by it.
LEAST_SCORE = 0.1


class NotingRouter(Router):
    """A router that notes what the layer under way was called with, for an estimator that predicts its update."""

    noted: tuple[torch.Tensor, torch.Tensor, int]

    def forward(
        self,
        x_BND: torch.Tensor,
        t_B: torch.Tensor,
        condition_BC: torch.Tensor,
        layer: int,
        history: History | None = None,
    ) -> torch.Tensor:
        """Scores [B, N]."""
        self.noted = x_BND.detach(), condition_BC.detach(), layer
        return super().forward(x_BND, t_B, condition_BC, layer, history)


class Predicted(UpdateGated):
    """Rejected tokens get the gradient that their update would give them if it were what a bypass predicts.

    Args:
        router: notes layer and condition.
        bank: predicts.
        robust: the prediction is a control variate for kept tokens as well.
    """

    gates_rejected = True

    def __init__(self, router: NotingRouter, bank: BypassBank, robust: bool) -> None:
        self.router, self.bank, self.robust = router, bank, robust

    def updates(self) -> torch.Tensor:
        """The predicted updates of all tokens of the layer under way [B, N, D]."""
        (x_BND, condition_BC, layer), rank = self.router.noted, max(self.bank.ranks)
        bypass = self.bank.bypasses[layer]
        with torch.no_grad():
            return bypass.move(x_BND, bypass.read(x_BND, condition_BC, 0, rank), rank, 0) - x_BND

    def updates_of(self, x_kept_BKD: torch.Tensor) -> torch.Tensor:
        """Those of the kept tokens, which are found among all by their values."""
        x_BND, updates_BND = self.router.noted[0], self.updates()
        # A gate knows no indices. Kept tokens are rows of x, so the nearest row is the token itself.
        found_BK = torch.cdist(x_kept_BKD, x_BND, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
        return gather_tokens(updates_BND, found_BK)

    def leave(self, x_kept_BKD: torch.Tensor, out_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor:
        """See Estimator."""
        if not self.robust:
            return super().leave(x_kept_BKD, out_kept_BKD, pi_kept_BK)
        guess_BKD = self.updates_of(x_kept_BKD.detach())
        missed_BKD = (out_kept_BKD - x_kept_BKD).detach() - guess_BKD
        difference_BKD = guess_BKD + missed_BKD / pi_kept_BK.detach().clamp_min(LEAST_SCORE).unsqueeze(-1)
        return gate_update(out_kept_BKD.detach() - difference_BKD, out_kept_BKD, pi_kept_BK)

    def stay(self, x_rejected_BRD: torch.Tensor, pi_rejected_BR: torch.Tensor) -> torch.Tensor:
        """See Estimator."""
        return gate_update(x_rejected_BRD.detach() - self.updates(), x_rejected_BRD, pi_rejected_BR)


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        estimator: of the list above.
        recipe: fields of Recipe that differ.
        shape: fields of RouterConfig that differ.
    """

    estimator: str = "soft"
    recipe: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "soft": Way(),
    "update": Way("update"),
    "literal": Way("literal"),
    "predicted": Way("predicted"),
    "robust": Way("robust"),
    "soft, no margin": Way(recipe={"margin": 0.0}),
    "soft, no noise": Way(recipe={"sigma": 0.0}),
    "soft, output alone": Way(recipe={"feature_weight": 0.0, "diffusion_weight": 0.0}),
    "soft, knows no age": Way(shape={"features": ("spread",)}),
    "soft, no spread to start from": Way(shape={"features": ("age",)}),
}
UNTRAINED = ("stride", "random")


def trained(model: Model, bank: BypassBank, way: Way, steps: int, batch_size: int, seed: int) -> Router:
    """A router trained from scratch in one way."""
    router = NotingRouter.for_model(model, seed, **way.shape)
    assert isinstance(router, NotingRouter)
    ours = {name: Predicted(router, bank, robust=name == "robust") for name in ("predicted", "robust")}
    with patch.dict(training_gate.TRAINING_ESTIMATORS, ours):
        warm_up(
            model, router=router, steps=steps, batch_size=batch_size, seed=seed, progress=tell,
            estimator=way.estimator, **way.recipe,
        )  # fmt: skip
    return router


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--images", type=int, default=128, help="held-out images per error")
    parser.add_argument("--seeds", type=int, default=2, help="routers trained in each way; errors are their means")
    options = parser.parse_args()
    model = ss.load_model()
    bank = ss.fit_bypasses(model)
    plans = {keep: Plan.uniform(model, keep) for keep in options.keep}
    rows: list[dict[str, Any]] = []
    for name in (*UNTRAINED, *options.only):
        begun = time.perf_counter()
        scorers: list[TokenScorer | str] = [name]
        if name not in UNTRAINED:
            scorers = [
                trained(model, bank, WAYS[name], options.steps, options.batch_size, seed)
                for seed in range(options.seeds)
            ]
        row: dict[str, Any] = {"trained": name, "steps": 0 if name in UNTRAINED else options.steps}
        for keep, plan in plans.items():
            errors = [
                ss.fidelity(model, plan, scorer, split="evaluation", samples=options.images) for scorer in scorers
            ]
            row[f"error_{keep}"] = sum(errors) / len(errors)
            row[f"range_{keep}"] = max(errors) - min(errors)
        rows.append(row)
        figures = "  ".join(
            f"keep {keep}: {row[f'error_{keep}']:.4f} (range {row[f'range_{keep}']:.4f})" for keep in plans
        )
        print(f"{name:<32} {figures}  {time.perf_counter() - begun:.0f} s", flush=True)
    print_result({"rows": rows, "images": options.images})


if __name__ == "__main__":
    main()
