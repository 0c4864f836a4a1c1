"""TradeSampler: an Optuna sampler whose proposals lie on the budget. In: a space and effects. Out: plans to judge.

Layers trade tokens: one gives some up, another takes what that pays for. Proposals start from the best plans judged so
far, hold every limit as predicted, and never repeat a plan. Where no trade helps any more, a few layers are forced to
do something else and the others pay for it. Usable with any Optuna study whose parameters are named by
`parameter_name` and hold choice indices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from shiva_search.search.candidates import Floats, Ints, Space
from shiva_search.search.knapsack import solve
from shiva_search.search.moves import fill, neighbours, repair, trades
from shiva_search.search.sensitivity import Effects
from shiva_search.search.sketches import decode
from shiva_search.search.surrogate import Surrogate

#: Pair trades in a row from one start, and how many of the best pairs are looked at closely each time.
_ROUNDS, _PAIRS = 6, 48
#: Standard deviations that the most curious proposal gives the unknown.
_CURIOSITY = 2.0
#: Judged plans without an improvement after which every other proposal forces some layers to something else.
_PATIENCE, _FORCES = 20, 0.5
#: Ways of forcing that are looked at for a proposal, and how many layers each forces at most.
_WAYS, _FORCED = 12, 3


def parameter_name(space: Space, position: int) -> str:
    """Name of a position's parameter: segment and layer."""
    segment, layer = divmod(position, space.layers)
    return f"s{segment}.l{layer}"


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The search space of a study: an index into the choices of each position that has more than one."""
    return {parameter_name(space, p): IntDistribution(0, int(space.sizes[p]) - 1) for p in map(int, space.free)}


def to_params(space: Space, plan_P: Ints) -> dict[str, int]:
    """Choice indices as parameters of a trial."""
    return {parameter_name(space, p): int(plan_P[p]) for p in map(int, space.free)}


def from_params(space: Space, params: dict[str, Any]) -> Ints:
    """Inverse of to_params [P]; positions with one choice have index 0."""
    plan_P = np.zeros(space.positions, dtype=np.int64)
    for p in map(int, space.free):
        plan_P[p] = int(params[parameter_name(space, p)])
    return plan_P


def _least(seen: Sequence[tuple[Ints, Floats]], tried: set[bytes]) -> Ints | None:
    """The plan of the least value that was not tried [P]; None where there is none."""
    if not seen:
        return None
    plans_MP, first = np.unique(np.concatenate([plans for plans, _ in seen]), axis=0, return_index=True)
    values = np.concatenate([values for _, values in seen])[first]
    new = np.array([plan.tobytes() not in tried for plan in plans_MP])
    if not new.any():
        return None
    found: Ints = plans_MP[new][int(np.argmin(values[new]))]
    return found


class TradeSampler(BaseSampler):
    """Proposes plans that trade tokens between layers and hold the budget.

    Args:
        space: choices, costs, limits.
        effects: first-order effects; `Effects.separable(errors)` will do where only errors are known.
        seed: same seed and same finished trials, same proposal.
        explore: share of proposals made by random trades instead of predicted ones; 0: none, and none that forces
            layers either.
        starts: how many of the best plans are traded from.
    """

    def __init__(self, space: Space, effects: Effects, seed: int = 0, explore: float = 0.05, starts: int = 3) -> None:
        self.space, self.effects = space, effects
        self.seed, self.explore, self.starts = seed, explore, starts
        self.surrogate = Surrogate(space, effects)
        #: Whether no plan was found that had not been proposed before.
        self.exhausted = False
        self._read: dict[int, Ints] = {}

    def reseed_rng(self) -> None:
        """Proposals depend on the trial's number, so parallel workers differ without reseeding."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space, known from the start."""
        return distributions(self.space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is not of this space: drawn uniformly."""
        assert isinstance(param_distribution, IntDistribution)
        rng = np.random.default_rng([self.seed, trial.number])
        return int(rng.integers(param_distribution.low, param_distribution.high + 1))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A plan that holds the limits and was not proposed before."""
        if not search_space:
            return {}
        names = distributions(self.space).keys()
        tried, judged = set(), []
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number or not names <= other.params.keys():
                continue
            if other.number not in self._read:
                self._read[other.number] = from_params(self.space, other.params)
            plan_P = self._read[other.number]
            tried.add(plan_P.tobytes())
            if other.state == TrialState.COMPLETE:
                judged.append((plan_P, other.values[0], other.user_attrs))
        rng = np.random.default_rng([self.seed, trial.number])
        plan = self.propose(judged, tried, rng)
        return to_params(self.space, plan)

    def propose(
        self, judged: Sequence[tuple[Ints, float, dict[str, Any]]], tried: set[bytes], rng: np.random.Generator
    ) -> Ints:
        """The next plan to judge [P].

        Args:
            judged: plan, error, and attributes ("sketch": the direction of its output's change; "complete").
            tried: plans not to propose again, as bytes of their indices.
            rng: decides the random part.
        """
        space = self.space
        if judged:
            plans_nP = np.array([plan for plan, _, _ in judged])
            errors_n = np.array([error for _, error, _ in judged])
            self.surrogate.fit(plans_nP, errors_n, [decode(attrs.get("sketch")) for _, _, attrs in judged])
            holds = np.flatnonzero(space.feasible(plans_nP))
            ranked = holds[np.argsort(errors_n[holds], kind="stable")]
            starts = [plans_nP[i] for i in ranked[: self.starts]]
            since = len(judged) - 1 - int(ranked[0]) if len(ranked) else 0
        else:
            starts, since = [], 0
        if not starts:
            starts = [solve(space, self.effects.errors_PC).plan_P]
        if rng.random() >= self.explore:
            # 0 just after an improvement, 1 when there was none for long.
            stuck = min(1.0, since / _PATIENCE)
            forces = self.explore > 0 and rng.random() < _FORCES * stuck
            found = self._forced(starts, tried, rng) if forces else self._predicted(starts, tried, rng, stuck)
            if found is not None:
                return found
        found = self._random(starts, tried, rng)
        if found is None:
            self.exhausted = True
            return starts[0]
        return found

    def _predicted(
        self, starts: Sequence[Ints], tried: set[bytes], rng: np.random.Generator, stuck: float
    ) -> Ints | None:
        """Best untried plan by an optimistic prediction, after rounds of exhaustive pair trades from a start or two.

        Args:
            starts: best plans first.
            tried: not to be proposed.
            rng: varies the optimism.
            stuck: from 0 to 1, how far to look around.
        """
        # How much the unknown may promise varies from proposal to proposal: from trusting to curious.
        curiosity = rng.uniform(0.0, _CURIOSITY) * stuck
        others = [starts[int(rng.integers(len(starts)))]] if rng.random() < stuck else []
        best_P = _least([seen for plan_P in [starts[0], *others] for seen in self._around(plan_P, curiosity)], tried)
        if best_P is None:
            return None
        filled = fill(self.space, best_P, partial(self._promise, curiosity=curiosity), steps=2)
        return best_P if filled.tobytes() in tried else filled

    def _forced(self, starts: Sequence[Ints], tried: set[bytes], rng: np.random.Generator) -> Ints | None:
        """As _predicted, from starts of which a few layers were forced to something else, which they keep doing.

        No trade of two layers may help, and a plan far away still be better: what one layer does is worth most where
        several others make room for it.
        """
        space = self.space
        curiosity = rng.uniform(0.0, _CURIOSITY)
        seen: list[tuple[Ints, Floats]] = []
        for _ in range(_WAYS if len(space.free) else 0):
            plan_P = starts[int(rng.integers(len(starts)))].copy()
            count = min(len(space.free), int(rng.integers(1, _FORCED + 1)))
            forced = {int(p) for p in rng.choice(space.free, size=count, replace=False)}
            for p in sorted(forced):
                plan_P[p] = rng.integers(space.sizes[p])
            moved = repair(space, plan_P, self.surrogate.errors, forced)
            if moved is not None:
                seen += self._around(moved, curiosity, forced)
        return _least(seen, tried)

    def _around(self, plan_P: Ints, curiosity: float, held: Collection[int] = ()) -> list[tuple[Ints, Floats]]:
        """Plans met on the way down from one, by trades of two layers, and what each promises."""
        space, surrogate = self.space, self.surrogate
        seen: list[tuple[Ints, Floats]] = []
        for _ in range(_ROUNDS):
            around = np.concatenate([plan_P[None], neighbours(space, plan_P, held)])
            change_MS, left_M = surrogate.change(around)
            errors, spread = surrogate.judge(change_MS, left_M)
            holds = space.feasible(around)
            pairs = trades(space, plan_P, change_MS[1:] - change_MS[0], around[1:], change_MS[0], most=_PAIRS)
            plans_MP = np.concatenate([around[holds], pairs])
            values = np.concatenate([errors[holds] - curiosity * spread[holds], self._promise(pairs, curiosity)])
            seen.append((plans_MP, values))
            best = int(np.argmin(values))
            if np.array_equal(plans_MP[best], plan_P):
                break
            plan_P = plans_MP[best]
        return seen

    def _promise(self, plans_MP: Ints, curiosity: float) -> Floats:
        """Expected errors less what the unknown may promise [M]."""
        errors, spread = self.surrogate.predict(plans_MP)
        return np.asarray(errors - curiosity * spread)

    def _random(self, starts: Sequence[Ints], tried: set[bytes], rng: np.random.Generator) -> Ints | None:
        """A few random changes to one of the starts, moved back onto the budget; wider and wider until one is new."""
        space = self.space
        if not len(space.free):
            return None
        for attempt in range(200):
            plan_P = starts[int(rng.integers(len(starts)))].copy()
            count = min(len(space.free), 2 + attempt // 20)
            for p in rng.choice(space.free, size=count, replace=False):
                plan_P[p] = rng.integers(space.sizes[p])
            moved = repair(space, plan_P, self._rough(rng))
            if moved is None:
                continue
            if attempt < 100:
                moved = fill(space, moved, self._rough(rng), steps=space.positions)
            if moved.tobytes() not in tried:
                return moved
        return None

    def _rough(self, rng: np.random.Generator) -> Any:
        """Predictions with noise, so that moving onto the budget does not always take the same way."""

        def predict(plans_MP: Ints) -> Floats:
            return np.asarray(self.surrogate.errors(plans_MP) * rng.uniform(0.7, 1.3, len(plans_MP)))

        return predict
