"""What the ledger and the administration data ask of a database: short transactions of portable SQL.

Statements mark their parameters with `?` on every database. All blocking work is done in threads of the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

__all__ = ["Connection", "Database", "Dialect"]

Dialect = Literal["sqlite", "postgresql"]

T = TypeVar("T")


class Connection(Protocol):
    """A connection inside a transaction. Only for the function that it is given to, and only while that runs."""

    dialect: Dialect

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement; its rows, or none."""
        ...

    def execute_many(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        """Run one statement for each row of parameters."""
        ...

    def iterate(self, statement: str, parameters: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query as they are read, for those that are too many to be kept at once."""
        ...


class Database(Protocol):
    """A database. From any thread and any event loop.

    What `work` raises goes through, and the transaction is as if it had never begun. Errors of the database are
    `StorageError`s. Who stops waiting for `write` (a cancelled task) does not know whether it was done.
    """

    dialect: Dialect

    @property
    def place(self) -> str:
        """Where it is: its URL without user and password."""
        ...

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction that may write: all of it, or nothing.

        `work` may be run again where the database asks for it (a deadlock, a lost connection), so it must not
        change anything but the database.

        Raises:
            StorageError: the database did not answer in time, or refused; `sent=False`: surely nothing was done.
        """
        ...

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on one consistent state of the database.

        Raises:
            StorageError: as `write`.
        """
        ...

    def write_sync(self, work: Callable[[Connection], T]) -> T:
        """As `write`, in this thread."""
        ...

    def read_sync(self, work: Callable[[Connection], T]) -> T:
        """As `read`, in this thread."""
        ...

    async def aclose(self) -> None:
        """Let what was begun end, then let go of files, connections and threads."""
        ...

    def close(self) -> None:
        """As `aclose`, in this thread."""
        ...
