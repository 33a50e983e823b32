"""What no database expects: texts that it cannot keep, or not in an index; numbers that it has no room for."""

from __future__ import annotations

import random
import string

import pytest
from tests.ledger.kit import record, roll_all

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import Ledger, RecordQuery, RefusalQuery, UsageQuery
from asgi_llm_guard.usage import Usage

pytestmark = pytest.mark.anyio

ALL = UsageQuery(since_ms=0, until_ms=2**52)


@pytest.mark.parametrize("bad", ["\0", "\ud800", "a\0b\udfffc"])
async def test_texts_that_cannot_be_kept_hold_up_nothing(ledger: Ledger, bad: str) -> None:
    """C9: a record with NUL or half of a surrogate pair in its texts is kept without, and those beside it as they are; every
    report goes on."""
    odd = record("odd", model=bad, user=bad, departments=(bad, "sales"), tags=(bad,), cost_nanousd=1)
    await ledger.append([odd, record("even", model="m", departments=("sales",), cost_nanousd=2)])
    for _ in range(2):
        for by in ("department", "tag", "user", "model", "session"):
            for where in ({}, {"department": "sales"}):
                report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=(by,), where=where))
                assert report.total.cost_nanousd == 3
        await roll_all(ledger)
    assert (await ledger.reconcile(0, 2**52)).equal
    kept = {one.call_id: one.departments for one in (await ledger.records(RecordQuery())).items}
    assert kept["even"] == ("sales",)
    assert "\ufffd" in kept["odd"][0]


async def test_counts_beyond_all_reason_are_unknown(ledger: Ledger) -> None:
    """C9: a count that no database has room for is not kept as another one, and holds up nothing."""
    odd = record("odd", usage=Usage(input_tokens=2**70, images=2**64, output_tokens=3), tokens=2**63, cost_nanousd=1)
    await ledger.append([odd, record("even", tokens=5, cost_nanousd=2**53 - 1)])
    await roll_all(ledger)
    kept = {one.call_id: one for one in (await ledger.records(RecordQuery())).items}
    total = (await ledger.usage(ALL)).total

    assert kept["odd"].usage == Usage(output_tokens=3)
    assert kept["odd"].tokens is None
    assert (total.tokens, total.output_tokens, total.cost_nanousd) == (5, 3, 2**53)


async def test_texts_of_any_length_are_summed_up(ledger: Ledger) -> None:
    """C9: ids of ten thousand characters, and a record of three hundred departments, are in every sum."""
    letters = random.Random(1)

    def text(length: int) -> str:
        return "".join(letters.choices(string.ascii_letters, k=length))

    departments = tuple(text(40) for _ in range(300))
    long = record("long", model=text(10_000), user=text(10_000), departments=(text(10_000),), cost_nanousd=1)
    await ledger.append([long, record("many", departments=departments, tags=departments, cost_nanousd=2)])
    await roll_all(ledger)
    by_user = UsageQuery(since_ms=0, until_ms=2**52, by=("user",), where={"user": long.user})
    by_department = UsageQuery(since_ms=0, until_ms=2**52, by=("department",), where={"department": departments[7]})

    assert (await ledger.usage(by_user)).total.cost_nanousd == 1
    assert (await ledger.usage(by_department)).total.cost_nanousd == 2
    assert len((await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("tag",)))).rows) == 301
    assert (await ledger.usage(ALL)).total.cost_nanousd == 3
    assert (await ledger.reconcile(0, 2**52)).equal


@pytest.mark.parametrize("bad", ["a\0b", "\ud800"])
def test_texts_that_no_record_has_are_not_asked_for(bad: str) -> None:
    """A filter that could never match is said to be wrong, on every database."""
    with pytest.raises(ConfigurationError, match=r"where\.user"):
        UsageQuery(since_ms=0, until_ms=1, where={"user": bad})
    with pytest.raises(ConfigurationError, match=r"where\.user"):
        RecordQuery(where={"user": bad})
    with pytest.raises(ConfigurationError, match="policy"):
        RefusalQuery(since_ms=0, until_ms=1, policy=bad)


@pytest.mark.parametrize("after", ["99999999999999999999-1", "1-9999999999999999999"])
def test_pages_that_there_cannot_be(after: str) -> None:
    """A place beyond all numbers of a database is not one that a page gave."""
    with pytest.raises(ConfigurationError, match="after"):
        RecordQuery(after=after)


DIGITS = ("negative", "too large", "65 bits", "5,000 digits", "a fraction", "true")


@pytest.mark.parametrize("absurd", [-1, 2**53, 2**64, 10**5_000, 1.5, True], ids=DIGITS)
async def test_absurd_instants_are_refused_by_name(ledger: Ledger, absurd: int) -> None:
    """An instant that no record can have, of however many digits, is refused by the name of its argument, before the
    database is asked."""
    for query in (UsageQuery, RecordQuery, RefusalQuery):
        with pytest.raises(ConfigurationError, match="since_ms: expected milliseconds"):
            query(since_ms=absurd, until_ms=5)
        with pytest.raises(ConfigurationError, match="until_ms: expected milliseconds"):
            query(since_ms=0, until_ms=absurd)
    with pytest.raises(ConfigurationError, match="since_ms: expected milliseconds"):
        await ledger.sessions(since_ms=-(2**64) if absurd == -1 else absurd)
    with pytest.raises(ConfigurationError, match="since_ms: expected milliseconds"):
        await ledger.reconcile(absurd, 5)
    with pytest.raises(ConfigurationError, match="until_ms: expected milliseconds"):
        await ledger.reconcile(0, absurd)


@pytest.mark.parametrize("absurd", [-1, 10_000_001, 2**64, 10**5_000, 1.5, True], ids=DIGITS)
async def test_absurd_limits_are_refused_by_name(ledger: Ledger, absurd: int) -> None:
    """A limit that is no number of rows, of however many digits, is refused by its name."""
    for query in (UsageQuery, RecordQuery, RefusalQuery):
        with pytest.raises(ConfigurationError, match="limit: expected a whole number from 1"):
            query(since_ms=0, until_ms=5, limit=absurd)
    with pytest.raises(ConfigurationError, match="limit: expected a whole number from 1"):
        await ledger.sessions(since_ms=0, limit=absurd)


async def test_any_number_of_records_may_be_asked_to_be_rolled_up(ledger: Ledger) -> None:
    """`at_most` is a bound, however large."""
    await ledger.append([record("1")])
    assert await ledger.roll_up(at_most=10**5_000) == 1
