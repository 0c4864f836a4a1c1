"""Where studies are kept. In: a URL or a path. Out: any Optuna storage, with heartbeats where it is a database."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from sqlalchemy.exc import IntegrityError, ProgrammingError

from shiva_search.errors import InputError, UnavailableError

#: Heartbeats of workers on a database, seconds; a trial that misses them is given to another worker.
HEARTBEAT_S, GRACE_S = 15, 60
#: How often a trial that failed, or whose process died, is tried again.
RETRIES = 3


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
            with quiet():
                return _database(_with_driver(storage))
        path = _journal_path(storage)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        return JournalStorage(JournalFileBackend(path))
    except ImportError as error:
        raise UnavailableError(f"storage {scheme}:// needs a driver that is not installed: {error}") from error
    except OSError as error:
        raise InputError(f"cannot open storage {storage!r}: {error.strerror or error}; check the path") from error
    except Exception as error:  # every database driver has its own family of errors
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(f"cannot open storage {storage!r}: {first}; check that the database is up") from error


def is_there(storage: str | BaseStorage) -> bool:
    """False for a journal file that nobody has made yet; what a database holds shows only when it is opened."""
    return isinstance(storage, BaseStorage) or "://" in storage or os.path.exists(_journal_path(storage))


def _journal_path(storage: str) -> str:
    return storage.removeprefix("journal:")


class _Database(RDBStorage):
    """Beats that the database refuses are missed, without a word: the trial's own calls say what is wrong."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)


def _engine(url: str) -> dict[str, Any]:
    """How to connect.

    A process that stands still amid a transaction (a laptop that sleeps) would hold its locks, and with them all other
    processes, for as long; so the database ends such transactions. Connections that were ended are replaced.
    """
    if not url.startswith("postgresql"):
        return {}
    most_ms = round(GRACE_S * 1000)
    return {
        "pool_pre_ping": True,
        "connect_args": {"options": f"-c idle_in_transaction_session_timeout={most_ms}"},
    }


def _database(url: str) -> RDBStorage:
    """A database with heartbeats. Of several processes that open an empty one at once, one gets to make the tables."""
    for wait_s in (0.2, 1.0, 0.0):
        try:
            return _Database(
                url,
                _engine(url),
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
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


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing of its own: progress is reported in our words."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def database_errors() -> Iterator[None]:
    """A database that fails amid a search is said in one line.

    Raises:
        UnavailableError: instead of Optuna's StorageInternalError.
    """
    try:
        yield
    except StorageInternalError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UnavailableError(
            f"the search's database failed: {cause}; check that it is up, and the same command goes on where it was"
        ) from error
