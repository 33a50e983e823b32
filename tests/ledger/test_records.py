"""Single records: added once, replaced, looked at by page, streamed; sessions, cursors and refusals."""

from __future__ import annotations

import pytest
from tests.ledger.kit import HOUR_MS, START_MS, record, roll_all

from asgi_llm_guard.errors import ConfigurationError, StorageError
from asgi_llm_guard.ledger import OTHER, Ledger, RecordQuery, RefusalCount, RefusalQuery, UsageQuery
from asgi_llm_guard.ledger.rollups import Roller
from asgi_llm_guard.ledger.rows import MAX_REFUSALS
from asgi_llm_guard.ledger.tables import GRAINS
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage import Usage, UsageRecord

pytestmark = pytest.mark.anyio

ALL = UsageQuery(since_ms=0, until_ms=2**52)


def full(call_id: str) -> UsageRecord:
    """A record with something in every field."""
    usage = Usage(
        input_tokens=1, output_tokens=2, service_tier="flex", model="m-1", images=3, extra=(Usage(model="x"),)
    )
    return UsageRecord(
        call_id=call_id, at_ms=START_MS, ended_ms=2, request_id="r", caller="c", user="u'", departments=("a", 'ü"'),
        agent="ag", session="s", tags=("t",), route="/r", provider="p", model="m", billed_model="b", usage=usage,
        cost_nanousd=2**53 - 1, estimate_nanousd=4, tokens=5, outcome="estimated", late=True, price_source="src",
        dispatched_ms=6, first_token_ms=7, latency_ms=8, attempt_of="other", attempt=2, deployment="d",
    )  # fmt: skip


async def test_a_record_comes_back_whole(ledger: Ledger) -> None:
    """Every field of a record survives, on every database."""
    await ledger.append([full("a"), record("b")])
    page = await ledger.records(RecordQuery())
    assert {each.call_id: each for each in page.items} == {"a": full("a"), "b": record("b")}


async def test_an_id_is_counted_once(ledger: Ledger) -> None:
    """C9: a record that is appended again changes nothing; only new ids are told."""
    assert await ledger.append([record("a", cost_nanousd=1), record("b", cost_nanousd=2)]) == 2
    await roll_all(ledger)
    assert await ledger.append([record("b", cost_nanousd=2), record("c", cost_nanousd=4)]) == 1
    await roll_all(ledger)
    assert (await ledger.usage(ALL)).total.cost_nanousd == 7
    assert (await ledger.reconcile(0, 2**52)).equal


async def test_a_late_settlement_replaces_the_estimate(ledger: Ledger) -> None:
    """C9: the estimate of an expired hold is taken out of every sum to the nano-dollar, whenever it was rolled up, and
    never comes back."""
    estimate = record("a", departments=("red",), outcome="expired", cost_nanousd=50)
    late = record("a", departments=("red",), user="ann", outcome="measured", cost_nanousd=20, late=True)
    await ledger.append([estimate])
    assert await roll_all(ledger) == 1
    await ledger.append([late])
    for again in range(2):
        for by in ("department", "user", "outcome", "day"):
            report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=(by,)))
            assert [row.amounts.cost_nanousd for row in report.rows] == [20], (by, again)
            assert report.total.estimated == 0
        assert (await ledger.reconcile(0, 2**52)).equal
        await roll_all(ledger)
    await ledger.append([estimate])
    assert (await ledger.usage(ALL)).total.cost_nanousd == 20


async def test_a_database_that_is_restored_while_in_use(ledger: Ledger) -> None:
    """C9: after a restore from an older copy, a process that goes on adds to the sums by the numbers that the copy has."""
    tables = ["ledger", *(f"ledger_{name}" for name in ("meta", "sets", "members", "series"))]
    tables += [grain.table for grain in GRAINS]

    def keep(connection: Connection) -> None:
        for table in tables:
            connection.execute(f"CREATE TABLE old_{table} AS SELECT * FROM {table}")

    def restore(connection: Connection) -> None:
        for table in tables:
            connection.execute(f"DELETE FROM {table}")
            connection.execute(f"INSERT INTO {table} SELECT * FROM old_{table}")

    await ledger.append([record("a", departments=("a",), model="a", cost_nanousd=1)])
    await roll_all(ledger)
    await ledger.database.write(keep)
    await ledger.append([record("b", departments=("b",), model="b", cost_nanousd=2)])
    await roll_all(ledger)
    await ledger.database.write(restore)
    await ledger.append([record("b", departments=("b",), model="b", cost_nanousd=2)])
    await roll_all(ledger)

    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department", "model"), order="key"))
    assert [(row.key, row.amounts.cost_nanousd) for row in report.rows] == [(("a", "a"), 1), (("b", "b"), 2)]
    assert (await ledger.reconcile(0, 2**52)).equal


async def test_a_step_that_was_undone_leaves_nothing_behind(ledger: Ledger) -> None:
    """A step is undone by the database and done again, as after a deadlock: no sum goes to a number that is nobody's."""
    await ledger.append([record("a", departments=("red",), user="ann", cost_nanousd=3)])
    roller = Roller()

    def undone(connection: Connection) -> None:
        assert roller.step(connection, 10) == 1
        raise LookupError

    with pytest.raises(LookupError):
        await ledger.database.write(undone)
    await ledger.append([record("b", departments=("blue",), user="bob", cost_nanousd=4)])
    assert await ledger.database.write(lambda connection: roller.step(connection, 10)) == 2
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department", "user")))
    assert {row.key: row.amounts.cost_nanousd for row in report.rows} == {("red", "ann"): 3, ("blue", "bob"): 4}


async def test_the_cursor_moves_with_the_records(ledger: Ledger) -> None:
    """What a source's cursor says was read is in the ledger; where the records fail, it stays."""
    assert await ledger.cursor("stream-1") is None
    await ledger.append([record("a")], source="stream-1", cursor="5-0")
    assert await ledger.cursor("stream-1") == "5-0"
    with pytest.raises(StorageError):
        await ledger.append([record("b"), record("c", outcome=None)], source="stream-1", cursor="9-0")
    assert await ledger.cursor("stream-1") == "5-0"
    assert [each.call_id for each in (await ledger.records(RecordQuery())).items] == ["a"]


async def test_pages_and_streams_give_each_record_once(ledger: Ledger) -> None:
    """Pages go back in time, streams forwards, without gaps or repeats, also among records of one instant."""
    ids = [f"{number:02}" for number in range(25)]
    await ledger.append(
        [record(call_id, START_MS + int(call_id) // 10, user=f"u{int(call_id) % 2}") for call_id in ids]
    )
    seen: list[str] = []
    after = None
    while True:
        page = await ledger.records(RecordQuery(limit=4, after=after))
        seen += [each.call_id for each in page.items]
        after = page.next
        if after is None:
            break
    assert seen == ids[::-1]
    batches = [[each.call_id for each in batch] async for batch in ledger.stream(RecordQuery(limit=4))]
    assert [call_id for batch in batches for call_id in batch] == ids
    assert max(map(len, batches)) == 4
    filtered = RecordQuery(where={"user": "u1"}, since_ms=START_MS + 1, until_ms=START_MS + 2)
    assert [each.call_id for each in (await ledger.records(filtered)).items] == ids[10:20][::-2]


async def test_a_stream_is_of_what_was_there_when_it_began(ledger: Ledger) -> None:
    """Records that come while a stream is read are not in it."""
    await ledger.append([record(str(number), START_MS + number) for number in range(4)])
    seen: list[str] = []
    async for batch in ledger.stream(RecordQuery(limit=2)):
        seen += [each.call_id for each in batch]
        await ledger.append([record(f"new-{len(seen)}", START_MS + 100)])
    assert seen == ["0", "1", "2", "3"]


@pytest.mark.parametrize("after", ["x", "1", "-1", "1-", "1-2-3", "\u0661-\u0662", "9" * 60 + "-1"])
def test_a_position_of_ones_own_making(after: str) -> None:
    """A page begins where the one before ended, and nowhere else."""
    with pytest.raises(ConfigurationError, match="after: expected what the page before gave"):
        RecordQuery(after=after)


async def test_sessions(ledger: Ledger) -> None:
    """Sessions since an instant, the latest first, with what they have used; those of two callers are two."""
    await ledger.append([
        record("1", START_MS, caller="a", session="s", agent="x", departments=("d",), cost_nanousd=1, tokens=5),
        record("2", START_MS + 9, caller="a", session="s", agent="x", departments=("d",), cost_nanousd=2),
        record("3", START_MS + 9, caller="a", session="s", agent="x", departments=("d",), attempt_of="2"),
        record("4", START_MS + 5, caller="b", session="s"),
        record("5", START_MS - 1, caller="c", session="s"),
        record("6", START_MS + 5, caller="c"),
    ])  # fmt: skip
    first, second = await ledger.sessions(since_ms=START_MS, limit=10)
    assert (first.caller, first.session, first.agent, first.departments) == ("a", "s", "x", ("d",))
    assert (first.first_ms, first.last_ms, first.calls, first.cost_nanousd, first.unpriced) == (
        START_MS,
        START_MS + 9,
        2,
        3,
        1,
    )
    assert (second.caller, second.tokens) == ("b", 0)
    assert len(await ledger.sessions(since_ms=START_MS, limit=1)) == 1


async def test_a_session_of_several_agents_is_one(ledger: Ledger) -> None:
    """A session whose calls are of several agents and departments is one row with all of them; the last call names it."""
    await ledger.append([
        record("1", START_MS, caller="a", session="s", agent="z", departments=("d",), cost_nanousd=1, tokens=5),
        record("2", START_MS + 7, caller="a", session="s", agent="b", departments=("e", "f"), cost_nanousd=2, tokens=6),
        record("3", START_MS + 5, caller="a", session="s", cost_nanousd=None, tokens=7),
        record("4", START_MS + 6, caller="a", session="s", agent="z", departments=("d",), cost_nanousd=4),
        record("5", START_MS + 9, caller=None, session="s", agent="b"),
        record("6", START_MS + 8, caller=None, session="s"),
    ])  # fmt: skip
    nobodys, first = await ledger.sessions(since_ms=START_MS, limit=2)
    assert (first.agent, first.departments, first.first_ms, first.last_ms) == ("b", ("e", "f"), START_MS, START_MS + 7)
    assert (first.calls, first.cost_nanousd, first.unpriced, first.tokens) == (4, 7, 1, 18)
    assert (nobodys.caller, nobodys.agent, nobodys.calls) == (None, "b", 2)


async def test_refusals_are_counts(ledger: Ledger) -> None:
    """Refusals add up per hour, policy, scope, code and route, and are never records."""
    refused = RefusalCount(
        hour_ms=START_MS, policy="quota", scope="department", code="quota_exceeded", route="/chat", count=2
    )
    await ledger.add_refusals([refused, refused], source="tally", cursor="7")
    await ledger.add_refusals([RefusalCount(hour_ms=START_MS + HOUR_MS, policy="rate", scope="user", code="rate")])
    later, first = await ledger.refusals(RefusalQuery(since_ms=START_MS, until_ms=START_MS + 2 * HOUR_MS))
    assert (first.policy, first.route, first.count) == ("quota", "/chat", 4)
    assert (later.policy, later.route, later.count) == ("rate", None, 1)
    assert await ledger.refusals(RefusalQuery(since_ms=START_MS, until_ms=START_MS + HOUR_MS, policy="rate")) == ()
    assert await ledger.cursor("tally") == "7"
    assert (await ledger.usage(ALL)).total.records == 0


async def test_refusals_are_bounded(ledger: Ledger) -> None:
    """However many different refusals an hour has, the ledger keeps 1,000 of them, and all are counted."""
    flood = [
        RefusalCount(hour_ms=START_MS, policy="rate", scope="user", code="rate", route=f"/{number}")
        for number in range(MAX_REFUSALS + 50)
    ]
    await ledger.add_refusals(flood)
    counts = await ledger.refusals(RefusalQuery(since_ms=0, until_ms=2**52))
    assert len(counts) == MAX_REFUSALS
    assert sum(each.count for each in counts) == len(flood)
    assert [each.count for each in counts if each.policy == OTHER] == [51]
