"""How many records a transaction rolls up: few where others write to the same file, many where nobody does.

On SQLite settlements and admissions in the same file wait for the transaction. So its steps are small as long as anybody
else writes, and grow only after that many of them in a row between which nobody has: in a service a second goes by in
small steps after each write of others, so that at most one of them in a second waits for a large step. Who catches up
with a backlog that nobody adds to (a file that was brought along, a service that does not run yet) takes small steps for
a second only.
"""

from __future__ import annotations

from typing import Final

from asgi_llm_guard.sql import Connection, Dialect

__all__ = ["ALONE", "LARGE", "SMALL", "TOGETHER", "Pace"]

SMALL: Final = 300
"""Records of a step on SQLite: the file is kept for some 10 ms."""

LARGE: Final = 5_000
"""Of one where nobody else writes: some 100 ms, for two thirds of the work."""

ALONE: Final = 80
"""So many small steps, about a second, nobody else must have written before a large one."""

TOGETHER: Final = 2_000
"""Records of a step on PostgreSQL, where only those wait who append to the ledger."""


class Pace:
    """Of one user of a database."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._alone = 0

    def most(self, dialect: Dialect) -> int:
        """How many records the next transaction may take."""
        if dialect == "postgresql":
            return TOGETHER
        return SMALL if self._alone < ALONE else LARGE

    def note(self, connection: Connection) -> None:
        """Look who else writes, in each transaction that does."""
        if connection.dialect == "postgresql":
            return
        # It changes with what other connections commit, and only with that.
        version: int = connection.execute("PRAGMA data_version")[0][0]
        self._alone = self._alone + 1 if version == self._version else 0
        self._version = version
