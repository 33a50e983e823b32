"""Whatever happens to a ledger, in whatever order: its sums are those of its records, from every source."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ledger.kit import DAY_MS, HOUR_MS, START_MS, expected, record, roll_all, shown

from asgi_llm_guard.ledger import DIMENSIONS, Dimension, Ledger, RecordQuery, Retention, UsageQuery
from asgi_llm_guard.ledger.filters import column_of
from asgi_llm_guard.ledger.reports import sources, usage
from asgi_llm_guard.ledger.values import TIMES
from asgi_llm_guard.sql import Connection, open_database
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Auckland"]

names = st.sampled_from([None, "a", "b'\"", ","])
lists = st.lists(st.sampled_from(["a", 'b"', ",", "ü"]), max_size=3, unique=True).map(tuple)
counts = st.none() | st.integers(0, 10**6)
instants = st.integers(0, 4 * DAY_MS).map(lambda ms: START_MS + ms) | st.integers(0, 96).map(
    lambda hours: START_MS + hours * HOUR_MS
)
usages = st.none() | st.builds(
    Usage,
    input_tokens=counts,
    output_tokens=counts,
    cache_read_tokens=counts,
    cache_write_tokens=counts,
    reasoning_tokens=counts,
    images=counts,
)


@st.composite
def records(draw: st.DrawFn) -> UsageRecord:
    return record(
        draw(st.sampled_from([f"call-{number}" for number in range(14)])),
        draw(instants),
        caller=draw(names),
        user=draw(names),
        departments=draw(lists),
        agent=draw(names),
        session=draw(names),
        tags=draw(lists),
        route=draw(names),
        provider=draw(names),
        model=draw(names),
        deployment=draw(names),
        usage=draw(usages),
        cost_nanousd=draw(st.none() | st.integers(0, 2**45)),
        tokens=draw(counts),
        outcome=draw(st.sampled_from(get_args(Outcome))),
        late=draw(st.booleans()),
        latency_ms=draw(counts),
        first_token_ms=draw(counts),
        attempt_of=draw(st.sampled_from([None, "call-0"])),
    )


queries = st.builds(
    UsageQuery,
    since_ms=instants | st.just(0),
    until_ms=instants.map(lambda ms: ms + 5 * DAY_MS) | st.just(2**52),
    by=st.lists(st.sampled_from(DIMENSIONS), max_size=3, unique=True).map(tuple),
    where=st.dictionaries(
        st.sampled_from(["department", "agent", "user", "model", "tag", "session"]), names, max_size=2
    ),
    tz=st.sampled_from(ZONES),
    order=st.just("key"),
)

appended = st.lists(records(), min_size=1, max_size=6).map(lambda some: ("append", some))
rolled = st.integers(1, 8).map(lambda most: ("roll", most))
retained = st.integers(0, 6).map(lambda days: ("retain", days))
steps = st.lists(appended | rolled | retained, min_size=1, max_size=12)


def scaled(examples: int) -> int:
    """So many in every run, and more where the profile asks for thousands."""
    asked = settings().max_examples
    return asked // 10 if asked >= 1_000 else examples


class Book:
    """What the ledger has to know."""

    def __init__(self) -> None:
        self.records: dict[str, UsageRecord] = {}

    def append(self, some: Sequence[UsageRecord]) -> None:
        for each in some:
            known = self.records.get(each.call_id)
            if known is None or (each.outcome != "expired" and (known.outcome == "expired" or each.late > known.late)):
                self.records[each.call_id] = each


async def check(ledger: Ledger, book: Book, query: UsageQuery) -> None:
    """The report is that of the records, from every source that could answer."""
    rows, total = expected(book.records.values(), query)
    asked = {column_of(name) for name in (*query.by, *query.where) if name not in TIMES}

    def look(connection: Connection) -> None:
        for source in sources(asked, query.by):
            report = usage(connection, query, source)
            assert shown(report) == rows, source
            assert report.total == total, source

    await ledger.database.read(look)
    report = await ledger.usage(query)
    assert shown(report) == rows
    assert report.total == total


async def run(ledger: Ledger, done: Sequence[tuple[str, Any]], asked: Sequence[UsageQuery]) -> None:
    book = Book()
    await ledger.prepare()
    for name, argument in done:
        if name == "append":
            await ledger.append(argument)
            book.append(argument)
        elif name == "roll":
            await ledger.roll_up(at_most=argument)
    for query in asked:
        await check(ledger, book, query)
    assert (await ledger.reconcile(0, 2**52)).equal
    await roll_all(ledger)
    for query in asked:
        await check(ledger, book, query)
    found = await ledger.reconcile(0, 2**52)
    assert found.equal, found.differences
    assert found.total == expected(book.records.values(), UsageQuery(since_ms=0, until_ms=2**52))[1]
    page = await ledger.records(RecordQuery(limit=1000))
    assert {each.call_id: each for each in page.items} == book.records


@settings(max_examples=scaled(80))
@given(done=steps, asked=st.lists(queries, min_size=1, max_size=4))
def test_sums_are_those_of_the_records(done: list[tuple[str, Any]], asked: list[UsageQuery]) -> None:
    """C9: after any appends, replacements and roll-ups, the records, the hours, the days and plain Python agree on any
    report: by every dimension, in every zone, with departments that overlap; the total counts each record once."""

    async def work() -> None:
        ledger = Ledger.open("sqlite://:memory:")
        try:
            await run(ledger, done, asked)
        finally:
            await ledger.aclose()

    asyncio.run(work())


@settings(max_examples=scaled(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=steps, asked=st.lists(queries, min_size=1, max_size=2))
def test_sums_are_those_of_the_records_on_postgres(
    postgres_url: str, done: list[tuple[str, Any]], asked: list[UsageQuery]
) -> None:
    """C9: the same on PostgreSQL."""

    async def work() -> None:
        database = open_database(postgres_url)
        await database.write(
            lambda connection: (
                connection.execute("DROP SCHEMA IF EXISTS public CASCADE") + connection.execute("CREATE SCHEMA public")
            )
        )
        try:
            await run(Ledger(database), done, asked)
        finally:
            await database.aclose()

    asyncio.run(work())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@settings(max_examples=scaled(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=steps, query=queries)
def test_retention_changes_no_report_that_it_allows(
    request: pytest.FixtureRequest, kind: str, done: list[tuple[str, Any]], query: UsageQuery
) -> None:
    """After records were removed, reports of departments, agents, models and outcomes per UTC day say what they said."""
    by = tuple(name for name in query.by if name in {"department", "agent", "model", "provider", "outcome", "day"})
    query = msgspec.structs.replace(
        query, by=cast("tuple[Dimension, ...]", by), where={}, tz="UTC", since_ms=0, until_ms=2**52
    )
    url = "sqlite://:memory:" if kind == "sqlite" else str(request.getfixturevalue("postgres_url"))

    async def work() -> None:
        clock = FrozenClock(START_MS)
        database = open_database(url)
        if kind == "postgresql":
            await database.write(
                lambda connection: (
                    connection.execute("DROP SCHEMA IF EXISTS public CASCADE")
                    + connection.execute("CREATE SCHEMA public")
                )
            )
        ledger = Ledger(database, clock=clock, retention=Retention(raw="1d", hours="1d"))
        book = Book()
        seen: set[str] = set()
        try:
            for name, argument in done:
                if name == "append":
                    # A record that comes again after it was removed is a new one: not here.
                    fresh = [each for each in argument if each.call_id not in seen]
                    seen |= {each.call_id for each in fresh}
                    await ledger.append(fresh)
                    book.append(fresh)
                elif name == "roll":
                    await ledger.roll_up(at_most=argument)
                else:
                    clock.set(START_MS + argument * DAY_MS)
                    await ledger.retain()
            report = await ledger.usage(query)
            rows, total = expected(book.records.values(), query)
            assert (shown(report), report.total) == (rows, total)
            assert (await ledger.reconcile(0, 2**52)).equal
        finally:
            await ledger.aclose()

    asyncio.run(work())
