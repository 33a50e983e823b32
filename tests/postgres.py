"""A real PostgreSQL server for tests, the distribution's: own process, own folder, free port.

    server = shared_postgres()
    url = server.new_database()

It starts in about two seconds, when the first test asks, and ends with the process, in whatever way that ends.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from tests.ports import HOST, free_port
from tests.servers import ServerError, _new_folder, _root, wait_until

__all__ = ["PASSWORD", "PostgresServer", "find_postgres", "shared_postgres"]

USER: Final = "guard"
PASSWORD: Final = "pg-secret-42"
_NUMBERS: Final = itertools.count(1)


def find_postgres() -> Path:
    """The folder of the server's programs.

    Raises:
        ServerError: it is not installed; the message says how to install it.
    """
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if folders:
        return folders[-1].parent
    raise ServerError(
        "initdb is neither in PATH nor in /usr/lib/postgresql, and these tests start a real PostgreSQL; run "
        "scripts/install-servers, or install it yourself (Debian and Ubuntu: apt-get install postgresql)"
    )


class PostgresServer:
    """One PostgreSQL process, with a password. It forgets with the machine: nothing is synced to disk."""

    def __init__(self) -> None:
        self.port = 0
        self.folder = _new_folder()
        self._programs = find_postgres()
        self._process: subprocess.Popen[bytes] | None = None
        self._emptied: list[str] = []
        self._log = self.folder / "log"
        # It refuses to run as root.
        self._user = _unprivileged() if os.geteuid() == 0 else None

    def start(self) -> Self:
        """Make the cluster if there is none, start the server, and wait until it answers.

        Raises:
            ServerError: it does not come up; with the end of its log.
        """
        data = self.folder / "data"
        if not data.exists():
            self._make(data)
        for _ in range(10):
            self.port = self.port or free_port()
            options: list[str | Path] = [
                "-D", data, "-h", HOST, "-p", str(self.port), "-k", self.folder,
                "-F", "-c", "full_page_writes=off", "-c", "synchronous_commit=off", "-c", "max_connections=60",
                "-c", "autovacuum=off", "-c", "shared_buffers=64MB", "-c", "timezone=UTC",
            ]  # fmt: skip
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [self._programs / "postgres", *options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    user=self._user,
                    cwd=self.folder,
                )
            (self.folder / "pid").write_text(f"{self._process.pid}\n", "utf-8")
            try:
                wait_until(self._answers, f"{self!r} answers", log=self._log_tail)
            except ServerError:
                self.kill()
                if "could not bind" not in self._log_tail():
                    raise
                self.port = 0
            else:
                return self
        raise ServerError(f"no free port in ten tries\n{self._log_tail()}")

    def __repr__(self) -> str:
        return f"<PostgreSQL on port {self.port}>"

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{PASSWORD}@{HOST}:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database that nobody else has."""
        name = f"test_{os.getpid()}_{next(_NUMBERS)}"
        if self._emptied:
            self.execute(f"ALTER DATABASE {self._emptied.pop()} RENAME TO {name}")
        else:
            self.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """End the connections to a database, and empty it.

        The next one is made of it under another name: that takes a tenth of the time, and whoever has kept the URL
        finds no database there.
        """
        name = url.rpartition("/")[2]
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        emptied = f"{name}_emptied"
        try:
            self.execute(f"ALTER DATABASE {name} RENAME TO {emptied}")
        except psycopg.errors.ObjectInUse:  # somebody connects again and again
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")
        else:
            self._emptied.append(emptied)

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode(), parameters)

    def stop(self) -> None:
        """End it in order, and everybody's connections with it; its data stay."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # at once, its children too
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self, data: Path) -> None:
        _root().chmod(0o711)  # for the server's own user
        self.folder.chmod(0o755)
        data.mkdir(mode=0o700)
        password = self.folder / "password"
        password.write_text(PASSWORD + "\n", "utf-8")
        if self._user is not None:
            os.chown(data, self._user, -1)
            os.chown(self.folder, self._user, -1)
            os.chown(password, self._user, -1)
        done = subprocess.run(
            [
                self._programs / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}",
                "-N", "--encoding=UTF8", "--locale=C", "--no-instructions",
            ],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, user=self._user, cwd=self.folder,
        )  # fmt: skip
        if done.returncode:
            raise ServerError(f"initdb failed:\n{(done.stdout + done.stderr).decode('utf-8', 'replace')}")

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"{self!r} ended while it started\n{self._log_tail()}")
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _log_tail(self) -> str:
        text = self._log.read_text("utf-8", "replace") if self._log.exists() else ""
        return "\n".join([f"end of the log of {self!r}:", *text.splitlines()[-25:]])


def _unprivileged() -> int:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    return 65534


@cache
def shared_postgres() -> PostgresServer:
    """This process's server, for tests that keep to databases of their own."""
    server = PostgresServer()
    atexit.register(server.close)
    return server.start()
