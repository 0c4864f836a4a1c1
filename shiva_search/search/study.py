"""The search as an Optuna study. In: a space, effects, an evaluator, any Optuna storage. Out: judged plans.

Two objectives (error, latency), the limits as constraints, one integer parameter per position.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import ThreadpoolController

from shiva_search.search.candidates import Ints, Space, pick
from shiva_search.search.early_stop import LIKE
from shiva_search.search.fidelity import FidelityEvaluator, Judged
from shiva_search.search.moves import repair
from shiva_search.search.samplers import make_sampler
from shiva_search.search.sensitivity import Effects
from shiva_search.search.sketches import encode, parts_as_text, parts_from_text
from shiva_search.search.storages import RETRIES, quiet
from shiva_search.search.surrogate import Surrogate
from shiva_search.search.trade_sampler import distributions, from_params, parameter_name, to_params

#: A plan is dropped early only against one that costs no more than this share above it.
_AS_CHEAP = 1.02


@dataclass(frozen=True)
class Record:
    """A judged plan of a study.

    Attributes:
        number: of its trial.
        plan_P: choice indices.
        error: judged error; an estimate where `complete` is false.
        complete: judged on the whole batch.
        origin: where it came from ("exact", "front", "trade", ...).
        attributes: what the trial holds besides ("sketch", "parts", "forwards", "samples").
    """

    number: int
    plan_P: Ints
    error: float
    complete: bool
    origin: str
    attributes: Mapping[str, Any]


class PlanStudy:
    """A study whose trials are plans, with what is needed to judge them here.

    Args:
        study: from shared_problem.create.
        space: choices, costs, limits.
        effects: first-order effects.
        evaluator: judges plans in this process.
        settings: "seed", "sampler", "trials" of the search.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        effects: Effects,
        evaluator: FidelityEvaluator,
        settings: Mapping[str, Any],
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.study, self.space, self.effects, self.evaluator = study, space, effects, evaluator
        self.settings = settings
        self.say = progress or (lambda line: None)
        sampler = make_sampler(settings["sampler"], space, effects, settings["seed"])
        self.study.sampler = sampler
        self._surrogate = Surrogate(space, effects)  # first order only: moves other samplers' proposals onto the budget
        self._best = np.inf
        self._read: dict[int, Record] = {}
        self._judged: int | None = None  # the trial under way, until its result is told
        self._own_error: Exception | None = None

    # ---- what is known -----------------------------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """Judged plans in order, each once: a plan judged again counts by its first complete judgement."""
        seen: dict[bytes, Record] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.number not in self._read:  # what is complete does not change
                self._read[trial.number] = self._record(trial)
            record = self._read[trial.number]
            key = record.plan_P.tobytes()
            if key not in seen or (record.complete and not seen[key].complete):
                seen[key] = record
        return list(seen.values())

    def _record(self, trial: FrozenTrial) -> Record:
        attributes = trial.user_attrs
        origin = attributes.get("origin", self.settings["sampler"])
        complete = bool(attributes.get("complete", True))
        return Record(
            trial.number, from_params(self.space, trial.params), trial.values[0], complete, origin, attributes
        )

    def best(self, space: Space | None = None, without: frozenset[bytes] = frozenset()) -> Record | None:
        """The completely judged plan of least error that holds the limits of `space` (default: the study's own)."""
        space = space or self.space
        complete = [r for r in self.records() if r.complete and r.plan_P.tobytes() not in without]
        if not complete:
            return None
        holds = space.feasible(np.array([r.plan_P for r in complete]))
        return min((r for r, ok in zip(complete, holds, strict=True) if ok), key=lambda r: r.error, default=None)

    # ---- judging -----------------------------------------------------------------------------------------------------

    def judge(self, plan_P: Ints, origin: str) -> Record:
        """Judge a plan completely and keep it in the study; plans known already cost nothing."""
        for record in self.records():
            if record.complete and np.array_equal(record.plan_P, plan_P):
                return record
        started = time.monotonic()
        judged = self.evaluator.judge(self.space.rows(plan_P))
        trial = optuna.trial.create_trial(
            params=to_params(self.space, plan_P),
            distributions=distributions(self.space),
            values=self._values(plan_P, judged),
            user_attrs={**self._attributes(judged, started), "origin": origin},
            constraints={name: float(value[0]) for name, value in self.space.excess(plan_P[None]).items()},
        )
        self.study.add_trial(trial)
        return self._record(self.study.get_trials(deepcopy=False)[-1])

    def run(self, trials: int, most_here: int | None = None, forwards: float = np.inf) -> None:
        """Judge plans until the study holds `trials` of them.

        Args:
            trials: plans judged in the study as a whole.
            most_here: stop after this many by this process.
            forwards: stop when this process has done so much work, in dense forward passes over the batch.

        Raises:
            KeyboardInterrupt: passed on; the trial under way is marked failed and taken up again by the next run.
        """
        self._take_up_again()
        done_here = lost = 0
        if len(self.records()) >= trials:
            return

        def stop(study: optuna.Study, trial: FrozenTrial) -> None:
            nonlocal done_here, lost
            self._judged, lost = None, 0
            done_here += trial.state == TrialState.COMPLETE
            known = len(self.records())
            self._tell(trial, known, trials)
            exhausted = getattr(study.sampler, "exhausted", False)
            # Samplers may repeat plans for ever where the space is small.
            stuck = len(study.get_trials(deepcopy=False)) > 20 * trials + 200
            enough = known >= trials or (most_here is not None and done_here >= most_here)
            if enough or exhausted or stuck or self.evaluator.forwards >= forwards:
                study.stop()

        with quiet(), _one_thread_beside_torch():
            while True:
                try:
                    return self.study.optimize(self._attempt, callbacks=[stop], n_trials=None)
                except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
                    if not self._was_taken(error):
                        raise
                    self.say("a plan was given to another worker while this process stood still; going on with others")
                except optuna.exceptions.StorageInternalError:
                    lost += 1
                    if lost > RETRIES:
                        raise
                    self.say("the database ended this process's connection; going on with a new one")
                    time.sleep(lost)

    def enqueue(self, plan_P: Ints, origin: str) -> None:
        """Have a plan judged next, unless the study has it already."""
        params = to_params(self.space, plan_P)
        names = params.keys()
        for trial in self.study.get_trials(deepcopy=False):
            fixed = trial.system_attrs.get("fixed_params", trial.params)
            if trial.state != TrialState.FAIL and names <= fixed.keys() and all(fixed[n] == params[n] for n in names):
                return
        self.study.enqueue_trial(params, user_attrs={"origin": origin})

    def _attempt(self, trial: optuna.Trial) -> tuple[float, ...] | float:
        """The objective; notes which trial is under way and what went wrong in judging it."""
        self._judged, self._own_error = trial._trial_id, None
        try:
            return self._objective(trial)
        except Exception as error:
            self._own_error = error
            raise

    def _was_taken(self, error: Exception) -> bool:
        """Whether the trial was finished by another process, which took this one for dead."""
        if isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
            return True
        # Optuna complains of a ValueError when it is to finish such a trial itself.
        if error is self._own_error or self._judged is None:
            return False
        return self.study._storage.get_trial(self._judged).state.is_finished()

    def _objective(self, trial: optuna.Trial) -> tuple[float, ...] | float:
        started = time.monotonic()
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
        for p in map(int, self.space.free):
            trial.suggest_int(parameter_name(self.space, p), 0, int(self.space.sizes[p]) - 1)
        plan_P = from_params(self.space, trial.params)
        excess = {name: float(value[0]) for name, value in self.space.excess(plan_P[None]).items()}
        for name, value in excess.items():
            trial.set_constraint(name, value)
        origin = trial.user_attrs.get("origin")
        if origin is None:
            trial.set_user_attr("origin", self.settings["sampler"])
            if any(value > 0 for value in excess.values()):
                # Judging it would be work for nothing; the nearest plan on the budget is judged instead.
                moved = repair(self.space, plan_P, self._surrogate.errors)
                if moved is not None:
                    self.enqueue(moved, "repaired")
                raise optuna.TrialPruned
        judged = self.evaluator.judge(self.space.rows(plan_P), *self._known(plan_P))
        for name, item in self._attributes(judged, started).items():
            trial.set_user_attr(name, item)
        values = self._values(plan_P, judged)
        return values if len(values) > 1 else values[0]

    def _values(self, plan_P: Ints, judged: Judged) -> tuple[float, ...]:
        """Error, and latency (mean keep where the profile has none) where the study has two objectives."""
        if len(self.study.directions) == 1:
            return (judged.error,)
        metric = "latency_ms" if "latency_ms" in self.space.tables else "mean_keep"
        return judged.error, float(self.space.total(metric, plan_P[None])[0])

    def _attributes(self, judged: Judged, started: float) -> dict[str, Any]:
        return {
            "complete": judged.complete,
            "samples": judged.samples,
            "sketch": encode(judged.sketch),
            "parts": parts_as_text(judged.parts),
            "forwards": self.evaluator.forwards,
            "seconds": time.monotonic() - started,
        }

    def _known(self, plan_P: Ints) -> tuple[Judged | None, list[Judged]]:
        """What a plan is held against while it is judged.

        Returns:
            The best completely judged plan that costs about as much or less, since one clearly worse than it is
            hopeless, and the completely judged plans that are most like this one, which tell how hard samples are.
        """
        metric = "latency_ms" if "latency_ms" in self.space.tables else "mean_keep"
        known = [r for r in self.records() if r.complete and r.error > 0 and "parts" in r.attributes]
        if not known:
            return None, []
        plans_nP = np.array([r.plan_P for r in known])
        affordable = self.space.total(metric, plans_nP) <= self.space.total(metric, plan_P[None])[0] * _AS_CHEAP
        cheap = [r for r, ok in zip(known, affordable, strict=True) if ok]
        if not cheap:
            return None, []
        kept_PC = self.space.kept.astype(float)
        distance_n = np.abs(pick(kept_PC, plans_nP) - pick(kept_PC, plan_P)).sum(1)
        nearest = [known[i] for i in np.argsort(distance_n, kind="stable")[:LIKE]]
        return _judged(min(cheap, key=lambda r: r.error)), [_judged(r) for r in nearest]

    def _take_up_again(self) -> None:
        """Give trials back that died with their process, or failed: each is enqueued again, with its parameters.

        Databases do this by heartbeats while a search runs; files have none, but their processes were on this host.
        """
        trials = self.study.get_trials(deepcopy=False)
        host = socket.gethostname()
        for trial in trials:
            worker = trial.user_attrs.get("worker")
            dead = worker is not None and worker[0] == host and worker[1] != os.getpid() and not _alive(worker[1])
            nobody = worker is None and not isinstance(self.study._storage, RDBStorage) and len(trial.params) == 0
            if trial.state == TrialState.RUNNING and (dead or nobody):
                # Another process that starts at this moment may be first.
                with quiet(), suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if distributions(self.space).keys() <= trial.params.keys():
                tries = int(trial.user_attrs.get("tries", 0)) + 1
                if tries <= RETRIES:
                    self.enqueue(from_params(self.space, trial.params), trial.user_attrs.get("origin", "retried"))

    def _tell(self, trial: FrozenTrial, known: int, trials: int) -> None:
        if trial.state != TrialState.COMPLETE:
            return
        best = self.best()
        if best is not None and best.error < self._best:
            self._best = best.error
            self.say(f"plan {known} of {trials}: error {best.error:.4f} within the budget ({best.origin})")
        elif known % 25 == 0:
            self.say(f"plan {known} of {trials}: best error {self._best:.4f}")


def _judged(record: Record) -> Judged:
    """What is known of a plan that was judged in full."""
    parts = parts_from_text(record.attributes["parts"])
    return Judged(record.error, len(parts), True, parts, np.zeros(0))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _one_thread_beside_torch() -> AbstractContextManager[Any]:
    """The BLAS that numpy and scipy bring works on one thread.

    Between two forwards torch's threads wait for more to do, and threads of another pool would take turns with them on
    the same cores: proposals then take more than twice as long, and forwards a little longer.
    """
    return ThreadpoolController().select(prefix="libscipy_openblas").limit(limits=1)
