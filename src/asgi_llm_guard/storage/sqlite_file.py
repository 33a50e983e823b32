"""The database file: how it is opened, and its tables made."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.sql.files import (
    APPLICATION_ID,
    QueueLock,
    check_file_system,
    check_sqlite,
    file_system,
    mounts,
    next_step,
)
from asgi_llm_guard.usage_rows import create_ledger

__all__ = [
    "SCHEMA_VERSION",
    "QueueLock",
    "Synchronous",
    "check_file_system",
    "check_sqlite",
    "connect",
    "file_system",
    "prepare",
]

Synchronous = Literal["NORMAL", "FULL"]

SCHEMA_VERSION: Final = 4
"""Counts up with every change of sqlite.sql and of usage_rows.py."""

_UPGRADED: Final = 3
"""Files of this version get what is new in the next one when they are opened."""


# While a file is opened, SQLite waits for others this long; switching to WAL alone needs its exclusive lock.
_OPENING_S: Final = 30.0


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
    check_file_system(path, file_system(folder.resolve(), mounts()))
    try:
        with closing(sqlite3.connect(path, timeout=_OPENING_S, isolation_level=None)) as connection:
            _make_tables(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(f"{path}: {error}; {next_step(error, waited_s=_OPENING_S)}") from error


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


def _make_tables(connection: sqlite3.Connection, path: Path) -> None:
    # In one transaction with the look: of several processes that start together one makes the tables.
    # BEGIN IMMEDIATE also shows whether the file can be written.
    connection.execute("BEGIN IMMEDIATE")
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise ConfigurationError(f"{path}: is the database of another program; give another path")
    # A ledger, or administration data, may have made the file before there was a storage.
    tables = version or connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'cells'").fetchone()
    if tables and version not in {SCHEMA_VERSION, _UPGRADED}:
        raise ConfigurationError(
            f"{path}: its tables have version {version}, this release works with version {SCHEMA_VERSION}; "
            "export it with the release that made it and import it into a new file"
        )
    if not tables:
        for statement in resources.files(__package__).joinpath("sqlite.sql").read_text("utf-8").split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    if not tables or version == _UPGRADED:
        for statement in create_ledger("sqlite"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
