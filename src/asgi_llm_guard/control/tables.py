"""The tables of administration data, in SQLite and PostgreSQL.

    control_meta      one row: the version, and the last row of the audit. Whoever changes anything updates it first, which
                      lets one change after the other in on both databases
    control_entries   kind, name, the version of the last change, the value as JSON
    control_audit     one row for each change and each refused try, numbered without gaps, each with a digest over itself
                      and the digest before
    control_tries     how many tries of an actor and verb were refused within an hour (`tries.py`), and how many of them have
                      a row; an hour that is over is taken out, and put into the audit

Triggers refuse every change of an audited row, every removal, and gaps.
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.sql import Connection

__all__ = ["create"]

SCHEMA: Final = 1

_TABLES: Final = (
    """
    CREATE TABLE control_meta (
        id BIGINT PRIMARY KEY CHECK (id = 1),
        schema BIGINT NOT NULL,
        version BIGINT NOT NULL,
        audit_seq BIGINT NOT NULL,
        audit_digest TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE control_entries (
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        version BIGINT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (kind, name)
    )
    """,
    """
    CREATE TABLE control_audit (
        seq BIGINT PRIMARY KEY,
        at_ms BIGINT NOT NULL,
        version BIGINT NOT NULL,
        actor TEXT NOT NULL,
        role TEXT NOT NULL,
        address TEXT NOT NULL,
        verb TEXT NOT NULL,
        target TEXT NOT NULL,
        old TEXT,
        new TEXT,
        reason TEXT NOT NULL,
        refused TEXT,
        digest TEXT NOT NULL
    )
    """,
    "CREATE INDEX control_audit_target ON control_audit (target, seq)",
    "CREATE INDEX control_audit_at ON control_audit (at_ms, seq)",
)

_TRIES: Final = """
    CREATE TABLE IF NOT EXISTS control_tries (
        hour_ms BIGINT NOT NULL,
        actor TEXT NOT NULL,
        verb TEXT NOT NULL,
        tries BIGINT NOT NULL,
        told BIGINT NOT NULL,
        PRIMARY KEY (hour_ms, actor, verb)
    )
    """
"""Made beside the tables of a release that had none; one of before leaves it alone."""

_TRIGGERS: Final = {
    "sqlite": (
        """
        CREATE TRIGGER control_audit_update BEFORE UPDATE ON control_audit
        BEGIN SELECT RAISE(ABORT, 'control_audit is append-only'); END
        """,
        """
        CREATE TRIGGER control_audit_delete BEFORE DELETE ON control_audit
        BEGIN SELECT RAISE(ABORT, 'control_audit is append-only'); END
        """,
        # REPLACE removes a row without a word to the trigger above, but not to this one.
        """
        CREATE TRIGGER control_audit_insert BEFORE INSERT ON control_audit
        WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM control_audit)
        BEGIN SELECT RAISE(ABORT, 'control_audit is append-only'); END
        """,
    ),
    "postgresql": (
        """
        CREATE FUNCTION control_audit_refuse() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RAISE EXCEPTION ''control_audit is append-only''; END'
        """,
        """
        CREATE FUNCTION control_audit_next() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN IF NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM control_audit) THEN
        RAISE EXCEPTION ''control_audit is append-only''; END IF; RETURN NEW; END'
        """,
        """
        CREATE TRIGGER control_audit_change BEFORE UPDATE OR DELETE ON control_audit
        FOR EACH ROW EXECUTE FUNCTION control_audit_refuse()
        """,
        """
        CREATE TRIGGER control_audit_truncate BEFORE TRUNCATE ON control_audit
        FOR EACH STATEMENT EXECUTE FUNCTION control_audit_refuse()
        """,
        """
        CREATE TRIGGER control_audit_insert BEFORE INSERT ON control_audit
        FOR EACH ROW EXECUTE FUNCTION control_audit_next()
        """,
    ),
}

_EXISTS: Final = {
    "sqlite": "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = 'control_meta'",
    "postgresql": "SELECT COUNT(*) FROM pg_class WHERE oid = to_regclass('control_meta')",
}
_LOCK: Final = 0x6C6C6D67_63746C  # any number that nobody else locks in a PostgreSQL database


def create(connection: Connection, now_ms: int) -> None:
    """Make the tables, unless they are there.

    Raises:
        StorageError: they are those of another release.
    """
    if connection.dialect == "postgresql":
        connection.execute("SELECT pg_advisory_xact_lock(?)", (_LOCK,))
    if connection.execute(_EXISTS[connection.dialect])[0][0]:
        rows = connection.execute("SELECT schema FROM control_meta WHERE id = 1")
        if not rows:
            raise StorageError("control: the row of control_meta is gone; restore the database")
        schema = rows[0][0]
        if schema != SCHEMA:
            raise StorageError(
                f"control: the tables have schema {schema}; this release works with {SCHEMA}. Use the release that made "
                "them, or a database of its own"
            )
        connection.execute(_TRIES)
        return
    for statement in (*_TABLES, _TRIES, *_TRIGGERS[connection.dialect]):
        connection.execute(statement)
    # Not at 0: what another database published before must not be ahead of this one.
    connection.execute("INSERT INTO control_meta VALUES (1, ?, ?, 0, '')", (SCHEMA, max(1, now_ms)))
