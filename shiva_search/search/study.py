"""The search as an Optuna study. In: a space, effects, an evaluator, any Optuna storage. Out: judged plans.

Two objectives (error, latency), the limits as constraints, one integer parameter per position. Everything another
process needs to take part, the space first of all, is kept in the study, so that all workers agree on what is feasible.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError

from shiva_search.errors import InputError, UnavailableError
from shiva_search.search.candidates import Floats, Ints, Space
from shiva_search.search.fidelity import FidelityEvaluator, Judged
from shiva_search.search.moves import repair
from shiva_search.search.sensitivity import Effects
from shiva_search.search.sketches import decode, encode
from shiva_search.search.surrogate import Surrogate
from shiva_search.search.trade_sampler import TradeSampler, distributions, from_params, parameter_name, to_params

SAMPLERS = ("trade", "tpe", "nsga2", "nsga3", "gp", "cmaes", "random")
#: Heartbeats of workers on a database, seconds; a trial that misses them is given to another worker.
HEARTBEAT_S, GRACE_S = 15, 60
_RETRIES = 3
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


def open_storage(storage: str | BaseStorage | None) -> BaseStorage | None:
    """Any Optuna storage; None stays in memory.

    Args:
        storage: a storage object, a database URL (sqlite:///, postgresql://, mysql://; with heartbeats), redis://, or
            a journal file as a path or journal:PATH.

    Raises:
        InputError, UnavailableError: cannot be opened.
    """
    if storage is None or isinstance(storage, BaseStorage):
        return storage
    scheme = storage.split("://", 1)[0] if "://" in storage else ""
    try:
        if scheme == "redis":
            return JournalStorage(JournalRedisBackend(storage))
        if scheme:
            with _quiet():
                return _database(_with_driver(storage))
        path = storage.removeprefix("journal:")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        return JournalStorage(JournalFileBackend(path))
    except ImportError as error:
        raise UnavailableError(f"storage {scheme}:// needs a driver that is not installed: {error}") from error
    except OSError as error:
        raise InputError(f"cannot open storage {storage!r}: {error.strerror or error}; check the path") from error
    except Exception as error:  # every database driver has its own family of errors
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(f"cannot open storage {storage!r}: {first}; check that the database is up") from error


def _database(url: str) -> RDBStorage:
    """A database with heartbeats. Of several processes that open an empty one at once, one gets to make the tables."""
    for wait_s in (0.2, 1.0, 0.0):
        try:
            return RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES),
            )
        except (IntegrityError, ProgrammingError):  # made by another between our look and our attempt
            if not wait_s:
                raise
            time.sleep(wait_s)
    raise AssertionError


def _with_driver(url: str) -> str:
    """Name PostgreSQL's driver, the one our extra installs: which one SQLAlchemy takes depends on its release."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg2{separator}{rest}" if scheme in ("postgresql", "postgres") else url


def make_sampler(name: str, space: Space, effects: Effects, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by name, seeded.

    Raises:
        InputError: unknown name.
        UnavailableError: its library is not installed.
    """
    samplers = optuna.samplers
    if name == "trade":
        return TradeSampler(space, effects, seed)
    with _quiet():
        if name == "tpe":
            return samplers.TPESampler(seed=seed)
        if name == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        if name == "nsga3":
            return samplers.NSGAIIISampler(seed=seed)
        if name == "gp":
            return samplers.GPSampler(seed=seed)
        if name == "random":
            return samplers.RandomSampler(seed=seed)
        if name == "cmaes":
            try:
                import cmaes  # noqa: F401  # Optuna's sampler imports it only at the first proposal
            except ImportError:
                raise UnavailableError("--sampler cmaes needs a library: pip install cmaes") from None
            return samplers.CmaEsSampler(seed=seed)
    raise InputError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")


class PlanStudy:
    """A study whose trials are plans, with what is needed to judge them here.

    Args:
        study: from `create` or `load`.
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
        self._was_taken = False

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
        done_here = 0
        if len(self.records()) >= trials:
            return

        def stop(study: optuna.Study, trial: FrozenTrial) -> None:
            nonlocal done_here
            done_here += trial.state == TrialState.COMPLETE
            known = len(self.records())
            self._tell(trial, known, trials)
            exhausted = getattr(study.sampler, "exhausted", False)
            # Samplers may repeat plans for ever where the space is small.
            stuck = len(study.get_trials(deepcopy=False)) > 20 * trials + 200
            enough = known >= trials or (most_here is not None and done_here >= most_here)
            if enough or exhausted or stuck or self.evaluator.forwards >= forwards:
                study.stop()

        with _quiet():
            while True:
                try:
                    return self.study.optimize(self._attempt, callbacks=[stop], n_trials=None)
                except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    if not self._was_taken:
                        raise
                    self.say("a plan was given to another worker while this process stood still; going on with others")

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
        """The objective; notes where the trial was finished by another, which took this process for dead."""
        self._was_taken = False
        try:
            values = self._objective(trial)
        except optuna.exceptions.UpdateFinishedTrialError:
            self._was_taken = True
            raise
        self._was_taken = self.study._storage.get_trial(trial._trial_id).state.is_finished()
        return values

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
        judged = self.evaluator.judge(self.space.rows(plan_P), self._rival(plan_P))
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
            "parts": base64.b64encode(judged.parts.astype("<f4").tobytes()).decode("ascii"),
            "forwards": self.evaluator.forwards,
            "seconds": time.monotonic() - started,
        }

    def _rival(self, plan_P: Ints) -> Judged | None:
        """The best completely judged plan that costs about as much or less: one clearly worse than it is hopeless."""
        metric = "latency_ms" if "latency_ms" in self.space.tables else "mean_keep"
        known = [r for r in self.records() if r.complete and "parts" in r.attributes]
        if not known:
            return None
        costs = self.space.total(metric, np.array([r.plan_P for r in known]))
        allowed = float(self.space.total(metric, plan_P[None])[0]) * _AS_CHEAP
        cheap = [r for r, value in zip(known, costs, strict=True) if value <= allowed]
        if not cheap:
            return None
        rival = min(cheap, key=lambda r: r.error)
        parts = np.frombuffer(base64.b64decode(rival.attributes["parts"]), dtype="<f4").astype(np.float64)
        if len(parts) != self.evaluator.samples or rival.error <= 0:
            return None
        return Judged(rival.error, len(parts), True, parts, np.zeros(0))

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
                with _quiet():
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if distributions(self.space).keys() <= trial.params.keys():
                tries = int(trial.user_attrs.get("tries", 0)) + 1
                if tries <= _RETRIES:
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


# ---- studies in storages ---------------------------------------------------------------------------------------------


def create(name: str, storage: BaseStorage | None, objectives: int, digest: str) -> optuna.Study:
    """A study for this problem: the one of this name where it is about the same problem, else a new one.

    Args:
        name: wanted; a study of this name about another problem is left alone and a suffix is added.
        storage: from open_storage.
        objectives: 2 (error, latency) or 1 (error).
        digest: identifies the problem: space, model, scorer, batch.
    """
    with _quiet():
        for attempt in (name, f"{name}-{digest[:8]}"):
            study = optuna.create_study(
                study_name=attempt, storage=storage, directions=["minimize"] * objectives, load_if_exists=True
            )
            known = study.user_attrs.get("digest")
            if known is None:
                study.set_user_attr("digest", digest)
                return study
            if known == digest and len(study.directions) == objectives:
                return study
    return study


def share_problem(study: optuna.Study, space: Space, effects: Effects, settings: Mapping[str, Any]) -> None:
    """Write into the study what a worker needs."""
    study.set_user_attr("settings", dict(settings))
    study.set_user_attr("space", json.dumps(space.as_dict()))
    for p in map(int, space.free):
        rows = [
            {"error": float(effects.errors_PC[p, c]), "sketch": encode(effects.vectors_PCS[p, c])}
            for c in range(int(space.sizes[p]))
        ]
        # One attribute per choice keeps each within what every database stores.
        for c, row in enumerate(rows):
            study.set_user_attr(f"effect.{p}.{c}", row)
    study.set_user_attr("ready", True)


def read_problem(study: optuna.Study) -> tuple[Space, Effects, dict[str, Any]] | None:
    """Inverse of share_problem; None while the study has not been prepared."""
    attributes = study.user_attrs
    if not attributes.get("ready"):
        return None
    space = Space.from_dict(json.loads(attributes["space"]))
    errors: Floats = np.zeros(space.kept.shape)
    vectors: Floats | None = None
    for p in map(int, space.free):
        for c in range(int(space.sizes[p])):
            row = attributes[f"effect.{p}.{c}"]
            direction = decode(row["sketch"])
            assert direction is not None
            if vectors is None:
                vectors = np.zeros((*space.kept.shape, len(direction)))
            errors[p, c] = row["error"]
            norm = float(np.linalg.norm(direction))
            vectors[p, c] = direction * (max(row["error"], 0.0) ** 0.5 / norm) if norm > 0 else 0.0
        errors[p, space.sizes[p] :] = errors[p, space.sizes[p] - 1]
        if vectors is not None:
            vectors[p, space.sizes[p] :] = vectors[p, space.sizes[p] - 1]
    if vectors is None:
        vectors = np.zeros((*space.kept.shape, 1))
    return space, Effects(errors, vectors), dict(attributes["settings"])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says nothing of its own: progress is reported in our words."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
