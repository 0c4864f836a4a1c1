"""A PostgreSQL of the tests' own: made, started and removed here, and reached through a socket, so it takes no port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """The folder with initdb and postgres; Debian keeps them out of the PATH."""
    on_path = shutil.which("initdb")
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((f for f in folders if (f / "initdb").is_file() and (f / "postgres").is_file()), None)


class Server:
    """A running server.

    Args:
        folder: holds its data and its socket.
        bin_folder: its programs.
    """

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self._folder = folder
        self._databases = 0
        # The server refuses to run as root; Debian's package makes a user for it.
        user = "postgres" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(folder, user)
        data = str(folder / "data")
        subprocess.run(
            [bin_folder / "initdb", "-D", data, "-U", "test", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"],
            user=user, cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        self._process = subprocess.Popen(
            [bin_folder / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off",
             "-c", "max_connections=500"],
            user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Returns once it takes connections."""
        import psycopg2

        until = time.monotonic() + seconds
        while True:
            assert self._process.poll() is None and time.monotonic() < until, "PostgreSQL did not start"
            try:
                self._connect().close()
                return
            except psycopg2.OperationalError:
                time.sleep(0.1)

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"test{self._databases}"
        connection = self._connect()
        connection.autocommit = True  # databases are not made inside a transaction
        connection.cursor().execute(f"CREATE DATABASE {name}")
        connection.close()
        return f"postgresql://test@/{name}?host={self._folder}"

    def stop(self) -> None:
        """Ends sessions and the server."""
        self._process.send_signal(signal.SIGINT)  # the fast way: sessions are rolled back
        self._process.wait(30)

    def _connect(self) -> Any:
        import psycopg2

        return psycopg2.connect(host=str(self._folder), user="test", dbname="postgres")


@contextmanager
def running(bin_folder: Path) -> Iterator[Server]:
    """A server in a folder of its own under /tmp: a socket's path is short, and pytest's folders are root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        server = Server(folder, bin_folder)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
