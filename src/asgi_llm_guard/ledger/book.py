"""The ledger: usage records in SQL, their roll-ups, and how often was refused. START HERE.

Records come with the settlement (a SQLite storage writes them into the same file) or by `append` (drained from
Redis, or from memory). `roll_up` adds them to sums per hour and per day, exactly once each, in any process.
`usage` reads the sums, and for what they do not know the records.

`tables.py` says what is kept where, `rollups.py` how sums are made, `reports.py` which of them answer a question.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from asgi_llm_guard.clock import Clock, SystemClock
from asgi_llm_guard.ledger import keeping, pieces, reports, rollups, rows, unused
from asgi_llm_guard.ledger.tables import make_tables
from asgi_llm_guard.ledger.values import (
    Page,
    Reconciliation,
    RecordQuery,
    RefusalCount,
    RefusalQuery,
    Retained,
    Retention,
    SessionUsage,
    UsageQuery,
    UsageReport,
    check_instant,
    check_limit,
    check_period,
)
from asgi_llm_guard.sql import Connection, Database, open_database
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Ledger"]

T = TypeVar("T")


class Ledger:
    """A ledger in `database`, whose tables are made when it is first used. From any number of processes.

    Every operation raises `StorageError` where the database does not answer.
    """

    def __init__(self, database: Database, *, clock: Clock | None = None, retention: Retention | None = None) -> None:
        self.database = database
        self.retention = retention or Retention()
        self._clock = clock or SystemClock()
        self._rollers: list[rollups.Roller] = []
        self._made = False

    @classmethod
    def open(cls, url: str, *, clock: Clock | None = None, retention: Retention | None = None) -> Ledger:
        """The ledger in the database of this URL; see `open_database`. A SQLite storage's URL: its records.

        Raises:
            ConfigurationError: the URL names no usable database.
        """
        return cls(open_database(url, name="ledger"), clock=clock, retention=retention)

    # ------------------------------------------------------------------------------------ writing

    async def append(
        self,
        records: Sequence[UsageRecord],
        *,
        source: str | None = None,
        cursor: str | None = None,
        after: str | None = rows.ANY,
    ) -> int | None:
        """Add records, once per call id; how many of the ids are new.

        A later record of the same id (a late settlement) replaces the earlier one (the estimate), never the other
        way round. With `source`, its `cursor` moves in the same transaction: what was read up to there is here.
        With `after`, only if the cursor is there still (`None`: nowhere yet); else nothing is done, and that is `None`.
        """
        return await self._write(lambda connection: rows.append(connection, records, source, cursor, after))

    async def cursor(self, source: str) -> str | None:
        """Where `append` has left the cursor of this source; `None`: nowhere yet."""
        return await self._read(lambda connection: rows.cursor(connection, source))

    async def roll_up(self, *, at_most: int = 5_000) -> int:
        """Add records that are not in the sums yet to them, `at_most` so many; how many were. 0: up to date.

        Exactly once each, whoever else does it at the same time, and if the process dies in the middle. In short
        transactions, so that settlements in the same file need not wait.
        """
        roller = self._rollers.pop() if self._rollers else rollups.Roller()
        done = 0
        while done < at_most:
            most = min(roller.pace.most(self.database.dialect), at_most - done)
            batch = await self._read(partial(pieces.look, most=most))
            if batch is None:
                break
            count = await self._write(partial(roller.add, batch=batch))
            if count is None:  # and must not be again and again
                count = await self._write(partial(roller.step, most=most))
            roller.confirm()
            done += count
            if not count:
                break
        self._rollers.append(roller)
        return done

    async def retain(self) -> Retained:
        """Remove what `retention` no longer keeps, in short transactions. Records go only after they were rolled up.

        With the last sum of a user, or of anything else that sums are by, goes its name.
        """
        now_ms = self._clock.now_ms()
        removed = Retained()
        while True:
            more = await self._write(lambda connection: keeping.remove(connection, self.retention, now_ms))
            if more == Retained():
                break
            removed = Retained(
                **{name: getattr(removed, name) + getattr(more, name) for name in Retained.__struct_fields__}
            )
        await self._sweep()
        return removed

    async def add_refusals(
        self,
        counts: Sequence[RefusalCount],
        *,
        source: str | None = None,
        cursor: str | None = None,
        after: str | None = rows.ANY,
    ) -> bool:
        """Add to the counts of their hours; whether it was done. `source`, `cursor` and `after` as in `append`.

        Beyond 1,000 different ones in an hour, new ones are counted together under the policy `other`.
        """
        return await self._write(lambda connection: rows.add_refusals(connection, counts, source, cursor, after))

    # ------------------------------------------------------------------------------------ reading

    async def usage(self, query: UsageQuery) -> UsageReport:
        """Sums over records, those included that are not rolled up yet.

        Raises:
            NotKeptError: only rows that retention has removed could tell.
        """
        return await self._read(lambda connection: reports.usage(connection, query))

    async def records(self, query: RecordQuery) -> Page[UsageRecord]:
        """Single records, the newest first, a page at a time."""
        return await self._read(lambda connection: rows.page(connection, query))

    async def stream(self, query: RecordQuery) -> AsyncIterator[Sequence[UsageRecord]]:
        """All records of the query that are there now, the oldest first, in batches of `query.limit`.

        Raises:
            NotKeptError: retention has removed some of the period, before or while it is read.
        """
        last = await self._read(rows.last_row)
        position: tuple[int, int] | None = None
        while True:
            batch, position = await self._read(partial(rows.batch, query=query, after=position, last=last))
            if batch:
                yield batch
            if position is None:
                return

    async def sessions(self, *, since_ms: int, limit: int = 100) -> Sequence[SessionUsage]:
        """Sessions with calls since then, the latest first.

        Raises:
            ConfigurationError: an instant that is none, or a limit that is none.
        """
        check_instant("since_ms", since_ms)
        check_limit("limit", limit)
        return await self._read(lambda connection: rows.sessions(connection, since_ms, limit))

    async def refusals(self, query: RefusalQuery) -> Sequence[RefusalCount]:
        """How often was refused."""
        return await self._read(lambda connection: rows.refusals(connection, query))

    async def reconcile(self, since_ms: int, until_ms: int) -> Reconciliation:
        """Compare the sums of hours and days with the records themselves, day by day.

        Raises:
            ConfigurationError: a period that is none.
        """
        check_period(since_ms, until_ms)
        return await self._read(lambda connection: keeping.reconcile(connection, since_ms, until_ms))

    async def aclose(self) -> None:
        """Let go of the database."""
        await self.database.aclose()

    async def _sweep(self) -> None:
        transactions, done = unused.sweep(), None
        with suppress(StopIteration):
            while True:
                kind, work = transactions.send(done)
                done = await (self._read(work) if kind == "read" else self._write(work))

    # ------------------------------------------------------------------------------------ tables

    async def prepare(self) -> None:
        """Make the tables that are not there. Done by the first use of anything else."""
        await self._make()

    async def _write(self, work: Callable[[Connection], T]) -> T:
        await self._make()
        return await self.database.write(work)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        await self._make()
        return await self.database.read(work)

    async def _make(self) -> None:
        if not self._made:
            await self.database.write(make_tables)
            self._made = True
