"""Names go with the last sum that needs them, and no sum is left without its name."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ledger.kit import DAY_MS, START_MS, check_numbers, expected, record, roll_all, shown, unused_names
from tests.ledger.test_properties import Book, scaled

from asgi_llm_guard.ledger import Ledger, Retention, UsageQuery
from asgi_llm_guard.ledger.keeping import remove
from asgi_llm_guard.ledger.pieces import Batch, look
from asgi_llm_guard.ledger.reports import sources, usage
from asgi_llm_guard.ledger.rollups import Roller
from asgi_llm_guard.ledger.tables import GRAINS
from asgi_llm_guard.ledger.unused import sweep
from asgi_llm_guard.ledger.values import Retained
from asgi_llm_guard.sql import Connection, Database, open_database
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord

ALL_OF_ONE_DAY = Retention(hours="1d", days="1d", people="1d")
ALL_TIME = UsageQuery(since_ms=0, until_ms=2**52)


def names(connection: Connection) -> dict[str, set[Any]]:
    """Every name that the sums' tables have."""
    return {
        "users": {user for (user,) in connection.execute('SELECT "user" FROM ledger_series') if user is not None},
        "series": {name for (name,) in connection.execute("SELECT name FROM ledger_series")},
        "lists": {members for (members,) in connection.execute("SELECT members FROM ledger_sets")},
        "members": {member for (member,) in connection.execute("SELECT member FROM ledger_members")},
    }


@pytest.mark.anyio
async def test_names_go_with_the_last_sum(ledger: Ledger, clock: FrozenClock) -> None:
    """C9: when retention has removed all sums of a user, of a list of departments or of tags, nothing names them any
    more; what sums are left of keeps its names, and reports say what they said."""
    ledger.retention = Retention(raw="1d", hours="1d", people="2d")
    await ledger.append([
        record("1", START_MS, user="ann", departments=("red",), tags=("t",), agent="a", cost_nanousd=1),
        record("2", START_MS + 3 * DAY_MS, user="bob", departments=("blue",), agent="b", cost_nanousd=2),
        record("3", START_MS + 3 * DAY_MS, user="bob", departments=("blue",), agent="b", cost_nanousd=4),
    ])  # fmt: skip
    await roll_all(ledger)
    clock.set(START_MS + 4 * DAY_MS)
    await ledger.retain()
    found = await ledger.database.read(names)
    assert found["users"] == {"bob"}
    assert found["members"] == {"red", "t", "blue"}  # sums per day of departments and tags are kept for ever
    by_department = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department",)))
    assert {row.key: row.amounts.cost_nanousd for row in by_department.rows} == {("red",): 1, ("blue",): 6}

    ledger.retention = ALL_OF_ONE_DAY
    clock.set(START_MS + 9 * DAY_MS)
    await ledger.retain()
    assert await ledger.database.read(names) == {"users": set(), "series": set(), "lists": set(), "members": set()}


@pytest.mark.anyio
async def test_what_an_earlier_release_has_left_goes_too(ledger: Ledger, clock: FrozenClock) -> None:
    """Names whose sums went long ago are removed by the next retention, though it removes no sum."""
    await ledger.append([record("1", user="ann", departments=("red",))])
    await roll_all(ledger)

    def leave(connection: Connection) -> None:
        for grain in GRAINS:
            connection.execute(f"DELETE FROM {grain.table}")

    await ledger.database.write(leave)
    clock.set(START_MS)
    assert await ledger.retain() == Retained()
    assert await ledger.database.read(unused_names) == 0


@pytest.mark.anyio
async def test_others_forget_the_numbers_that_are_gone(url: str, clock: FrozenClock) -> None:
    """C9: another process that remembers the number of a removed series does not use it: what it rolls up afterwards
    is in the sums of its own user, also where the database gives the number to somebody else meanwhile."""
    one, other = (Ledger.open(url, clock=clock, retention=ALL_OF_ONE_DAY) for _ in range(2))
    await one.append([record("1", START_MS, user="ann", departments=("red",), cost_nanousd=1)])
    assert await one.roll_up() == 1
    clock.set(START_MS + 5 * DAY_MS)
    assert (await other.retain()).people == 2
    await other.append([record("2", START_MS + 5 * DAY_MS, user="bob", departments=("blue",), cost_nanousd=2)])
    assert await other.roll_up() == 1
    await one.append([record("3", START_MS + 5 * DAY_MS, user="ann", departments=("red",), cost_nanousd=4)])
    assert await one.roll_up() == 1
    for by in ("user", "department"):
        report = await one.usage(UsageQuery(since_ms=START_MS + 5 * DAY_MS, until_ms=2**52, by=(by,)))
        assert [row.amounts.cost_nanousd for row in report.rows] == [4, 2]
        assert [row.key[0] for row in report.rows] == (["ann", "bob"] if by == "user" else ["red", "blue"])
    await one.aclose()
    await other.aclose()


# ------------------------------------------------------------------------------- every interleaving


class World:
    """A ledger with three rollers and some sweeps, each somewhere in its transactions."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.ledger = Ledger(database)
        self.rollers = [Roller() for _ in range(3)]
        self.batches: dict[int, Batch] = {}
        self.sweeps: dict[int, tuple[Generator[Any, Any, None], Any]] = {}
        self.book = Book()
        self.kept_days = 0

    async def append(self, some: Sequence[UsageRecord]) -> None:
        await self.ledger.append(some)
        self.book.append(some)

    async def roll(self, number: int, most: int, fails: bool) -> None:
        """A transaction of one of the rollers, which may come to nothing."""
        roller = self.rollers[number]
        if fails:
            with pytest.raises(ZeroDivisionError):
                await self.database.write(lambda connection: roller.step(connection, most) // 0)
            return
        await self.database.write(lambda connection: roller.step(connection, most))
        roller.confirm()

    async def look(self, number: int, most: int) -> None:
        """One of the rollers reads what it is to add later, or never."""
        batch = await self.database.read(lambda connection: look(connection, most))
        if batch is not None:
            self.batches[number] = batch

    async def add(self, number: int, fails: bool) -> None:
        """It adds what it has read, whatever has happened since."""
        roller, batch = self.rollers[number], self.batches.pop(number, None)
        if batch is None:
            return
        if fails:
            self.batches[number] = batch  # to be tried again, as after a deadlock
            with pytest.raises(ZeroDivisionError):
                await self.database.write(lambda connection: (roller.add(connection, batch) or 1) // 0)
        elif await self.database.write(lambda connection: roller.add(connection, batch)) is not None:
            roller.confirm()

    async def remove(self, day: int) -> None:
        """Remove the sums of the days before this one."""
        self.kept_days = max(self.kept_days, day)
        now_ms = START_MS + (day + 1) * DAY_MS
        retention = Retention(raw=None, hours="1d", days="1d", people="1d")
        while await self.database.write(lambda connection: remove(connection, retention, now_ms)) != Retained():
            pass

    async def sweep(self, number: int, transactions: int = 1) -> bool:
        """So many transactions of one of the sweeps; whether there are more."""
        for _ in range(transactions):
            generator, answer = self.sweeps.pop(number, None) or (sweep(), None)
            try:
                kind, work = generator.send(answer)
            except StopIteration:
                return False
            done = await (self.database.read(work) if kind == "read" else self.database.write(work))
            self.sweeps[number] = generator, done
        return True

    async def check(self) -> None:
        await self.database.read(check_numbers)
        for by in (("user", "day"), ("department",), ("tag",)):
            query = UsageQuery(since_ms=START_MS + self.kept_days * DAY_MS, until_ms=2**52, by=by, order="key")
            rows, total = expected(self.book.records.values(), query)

            def look(connection: Connection, query: UsageQuery = query, rows: Any = rows, total: Any = total) -> None:
                columns = {{"department": "departments", "tag": "tags"}.get(name, name) for name in query.by}
                for source in sources(columns - {"day"}, query.by):
                    report = usage(connection, query, source)
                    assert (shown(report), report.total) == (rows, total), source

            await self.database.read(look)

    async def end(self) -> None:
        """Everybody comes to the end of what was begun; then nothing is left that no sum needs."""
        for number in (0, 1):
            while number in self.sweeps:
                await self.sweep(number)
        await self.check()
        while await self.database.write(lambda connection: self.rollers[0].step(connection, 10**6)):
            self.rollers[0].confirm()
        await self.check()
        await self.remove(self.kept_days)
        while await self.sweep(0):
            pass
        await self.check()
        assert await self.database.read(unused_names) == 0


@pytest.mark.anyio
async def test_a_number_that_was_given_again_while_retentions_wait(ledger: Ledger) -> None:
    """C9: of three retentions one has looked for unused series, one for retired ones, and one has removed them; then
    their numbers are given to another user's. That user keeps every sum, whoever goes on first."""
    world = World(ledger.database)
    looked, retired, removed = 0, 1, 2
    await world.ledger.prepare()
    await world.append([record("1", START_MS, user="a", tags=("a",), departments=("a",), cost_nanousd=1)])
    await world.roll(0, 1, fails=False)
    await world.remove(2)
    await world.sweep(looked, 2)
    await world.sweep(retired, 4)
    while await world.sweep(removed):
        pass
    assert await ledger.database.read(names) == {"users": set(), "series": set(), "lists": set(), "members": set()}
    await world.append([record("2", START_MS + 3 * DAY_MS, user="b", tags=("b",), departments=("b",), cost_nanousd=2)])
    await world.roll(0, 1, fails=False)
    await world.sweep(looked)  # retires what has the numbers that it has seen
    await world.sweep(retired)
    await world.check()
    while any([await world.sweep(number) for number in (looked, retired) if number in world.sweeps]):
        await world.check()
    assert (await ledger.database.read(names))["users"] == {"b"}
    await world.end()


few = st.sampled_from(["a", "b"])
lists = st.sampled_from([(), ("a",), ("b",), ("a", "b")])
some_records = st.lists(
    st.builds(
        lambda number, day, **fields: record(f"call-{number}", START_MS + day * DAY_MS, **fields),
        st.integers(0, 9),
        st.integers(0, 3),
        user=few,
        departments=lists,
        tags=lists,
        outcome=st.sampled_from(["measured", "expired"]),
        cost_nanousd=st.integers(1, 99),
    ),
    min_size=1,
    max_size=4,
)
acts = st.lists(
    st.tuples(st.just("append"), some_records)
    | st.tuples(st.just("roll"), st.integers(0, 2), st.integers(1, 5), st.sampled_from([False, False, False, True]))
    | st.tuples(st.just("look"), st.integers(0, 2), st.integers(1, 5))
    | st.tuples(st.just("add"), st.integers(0, 2), st.sampled_from([False, False, False, True]))
    | st.tuples(st.just("remove"), st.integers(1, 3))
    | st.tuples(st.just("sweep"), st.integers(0, 1), st.integers(1, 6)),
    min_size=4,
    max_size=30,
)


async def happen(database: Database, done: Sequence[tuple[Any, ...]]) -> None:
    world = World(database)
    await world.ledger.prepare()
    for name, *arguments in done:
        await getattr(world, name)(*arguments)
    await world.end()


@settings(max_examples=scaled(150))
@given(done=acts)
def test_rollers_and_retention_in_any_order(done: list[tuple[Any, ...]]) -> None:
    """C9: three rollers that remember numbers and what they have read, some of whose transactions fail, and two retentions
    that are each anywhere between their transactions, while records are replaced: every sum is its own user's, departments' and tags', and in the end no name is left that
    no sum needs."""

    async def work() -> None:
        database = open_database("sqlite://:memory:")
        try:
            await happen(database, done)
        finally:
            await database.aclose()

    asyncio.run(work())


@settings(max_examples=scaled(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=acts)
def test_rollers_and_retention_in_any_order_on_postgres(postgres_url: str, done: list[tuple[Any, ...]]) -> None:
    """C9: the same on PostgreSQL."""

    async def work() -> None:
        database = open_database(postgres_url)
        await database.write(
            lambda connection: (
                connection.execute("DROP SCHEMA IF EXISTS public CASCADE") + connection.execute("CREATE SCHEMA public")
            )
        )
        try:
            await happen(database, done)
        finally:
            await database.aclose()

    asyncio.run(work())
