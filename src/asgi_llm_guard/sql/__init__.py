"""Databases for what outlives the counters: the ledger and the administration data. SQLite, or PostgreSQL.

database = open_database("sqlite:///ledger.db")
rows = await database.read(lambda connection: connection.execute("SELECT ? + 1", (1,)))
"""

from __future__ import annotations

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.sql.base import Connection, Database, Dialect

__all__ = ["Connection", "Database", "Dialect", "open_database"]


def open_database(url: str, *, name: str = "database") -> Database:
    """The database that a URL names.

    `sqlite:///file.db` (relative), `sqlite:////var/lib/file.db`, `sqlite://:memory:`, or
    `postgresql://user:password@host:5432/name` (extra `postgres`). `name` is what errors call the setting.

    Raises:
        ConfigurationError: not a URL of a known database, or one that cannot be used. It never shows a password.
        NotInstalledError: the driver is missing.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigurationError(f"{name}: expected a URL such as sqlite:///ledger.db; this one has no ://")
    if scheme == "sqlite":
        from asgi_llm_guard.sql.sqlite import SqliteDatabase

        if rest == ":memory:":
            return SqliteDatabase(None)
        path, question, _ = rest.partition("?")
        if question or not path.startswith("/") or len(path) < 2:
            raise ConfigurationError(
                f"{name}: expected sqlite:///file.db (relative), sqlite:////absolute/file.db or sqlite://:memory:, "
                f"without options, got {url!r}"
            )
        return SqliteDatabase(path[1:])
    if scheme in {"postgresql", "postgres"}:
        from asgi_llm_guard.sql.postgres import PostgresDatabase

        return PostgresDatabase(url, name=name)
    raise ConfigurationError(f"{name}: expected sqlite:///file.db or postgresql://…, got the scheme {scheme!r}")
