"""The database file: what must be true of it, how it is opened, and the queue in front of its lock."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from asgi_llm_guard.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["SCHEMA_VERSION", "QueueLock", "Synchronous", "connect", "file_system", "prepare"]

Synchronous = Literal["NORMAL", "FULL"]

SCHEMA_VERSION: Final = 3
"""Counts up with every change of sqlite.sql."""

APPLICATION_ID: Final = 0x4C4C4D47
"""`LLMG`, in the header of the file."""

_OLDEST_SQLITE: Final = (3, 35, 0)

# While a file is opened, SQLite waits for others this long; switching to WAL alone needs its exclusive lock.
_OPENING_S: Final = 30.0

# Neither SQLite's shared memory nor its locks work across hosts.
_NETWORK: Final = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs",
})  # fmt: skip


def prepare(path: Path) -> None:
    """Check that `path` can hold the database, and make its tables if there are none.

    Raises:
        ConfigurationError: it cannot; the message says why, and what to do.
    """
    check_sqlite(sqlite3.sqlite_version_info)
    folder = path.parent
    if not folder.is_dir():
        raise ConfigurationError(f"{path}: the folder {folder} does not exist; make it, or give another path")
    if path.is_dir():
        raise ConfigurationError(f"{path}: is a folder; give the path of a file in it")
    check_file_system(path, file_system(folder.resolve(), _mounts()))
    try:
        with closing(sqlite3.connect(path, timeout=_OPENING_S, isolation_level=None)) as connection:
            _make_tables(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(f"{path}: {error}; {_next_step(error)}") from error


def check_sqlite(version: tuple[int, ...]) -> None:
    """Whether the SQLite library is new enough.

    Raises:
        ConfigurationError: it is not.
    """
    if version < _OLDEST_SQLITE:
        seen, needed = ".".join(map(str, version)), ".".join(map(str, _OLDEST_SQLITE))
        raise ConfigurationError(
            f"SQLite {needed} or newer is needed, this Python has {seen}; use a newer Python build"
        )


def check_file_system(path: Path, kind: str) -> None:
    """Whether SQLite's locks work on this type of file system.

    Raises:
        ConfigurationError: it is one of the network.
    """
    if kind in _NETWORK:
        raise ConfigurationError(
            f"{path}: lies on a network file system ({kind}), where SQLite's locks are not reliable; "
            "use a local disk: its counters are for the processes of one host"
        )


def connect(path: Path, *, synchronous: Synchronous, timeout_s: float) -> sqlite3.Connection:
    """A connection to a file that was prepared; without implicit transactions, usable from any thread.

    Raises:
        sqlite3.Error: the file is gone or cannot be opened.
    """
    uri = f"{path.resolve().as_uri()}?mode=rw"  # not rwc: a file that is gone must not come back empty
    connection = sqlite3.connect(
        uri, uri=True, timeout=_OPENING_S, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(f"PRAGMA busy_timeout = {int(timeout_s * 1000)}")
    return connection


def file_system(folder: Path, mounts: str) -> str:
    """The type of the file system that `folder` lies on, by a table in the format of /proc/self/mounts.

    Empty if the table does not say.
    """
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, its_kind, *_ = line.split(" ", 3)
        point = point.replace("\\040", " ")
        # Of two mounts on one point the later one lies on top.
        if folder.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), its_kind
    return kind


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: nothing to ask
        return ""


def _make_tables(connection: sqlite3.Connection, path: Path) -> None:
    # In one transaction with the look: of several processes that start together one makes the tables.
    # BEGIN IMMEDIATE also shows whether the file can be written.
    connection.execute("BEGIN IMMEDIATE")
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION_ID:
        raise ConfigurationError(f"{path}: is the database of another program; give another path")
    if tables and version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"{path}: its tables have version {version}, this release works with version {SCHEMA_VERSION}; "
            "export it with the release that made it and import it into a new file"
        )
    if not tables:
        for statement in resources.files(__package__).joinpath("sqlite.sql").read_text("utf-8").split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _next_step(error: sqlite3.DatabaseError) -> str:
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return "restore it from a backup, or give another path"
    if "locked" in text:
        return f"another program has kept it locked for {_OPENING_S:.0f} s; find and end that program"
    return "let this user write to the file and its folder, or give another path"


_PAUSES_S: Final = (0.0,) + (0.000_2,) * 100
"""How a process looks for its turn before it queues: about 30 ms, the turns of a handful of others."""


class QueueLock:
    """A queue of processes in front of the database's lock, by `flock` on a file beside it.

    SQLite's busy handler polls with growing pauses, so under load one process can wait for long
    while others come and go; those who wait here are woken by the kernel. The lock orders, it
    does not protect: that is SQLite's.

    Windows has no `flock`; there SQLite's lock alone decides.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._waiting = False
        self._granted = threading.Semaphore(0)

    if sys.platform == "win32":

        def acquire(self, timeout_s: float) -> bool:  # noqa: ARG002 - one signature on every system
            return True

        def release(self) -> None: ...

        def close(self) -> None:
            os.close(self._file)

    else:

        def acquire(self, timeout_s: float) -> bool:
            """Wait for this process's turn, at most `timeout_s`. If that was in vain, the next call goes on waiting."""
            if not self._waiting:
                # Most waits are short, and a second thread takes longer to hand over than they last.
                for pause_s in _PAUSES_S:
                    if self._try():
                        return True
                    time.sleep(pause_s)
                # `flock` either does not wait, or waits without end: another thread does that, so that
                # this one can give up. It stands in the kernel's queue, so nobody is passed over for long.
                self._waiting = True
                threading.Thread(target=self._wait, name="asgi-llm-guard-flock", daemon=True).start()
            if not self._granted.acquire(timeout=timeout_s):
                return False
            self._waiting = False
            return True

        def release(self) -> None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

        def close(self) -> None:
            """Let go of the file; if a thread still waits for the lock, as soon as it has it."""
            if not self._waiting:
                os.close(self._file)
                return
            threading.Thread(target=self._close_later, name="asgi-llm-guard-flock", daemon=True).start()

        def _try(self) -> bool:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        def _wait(self) -> None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._granted.release()

        def _close_later(self) -> None:
            self._granted.acquire()
            # By name, not by closing: a process forked meanwhile has a copy that would keep the lock.
            self.release()
            os.close(self._file)
