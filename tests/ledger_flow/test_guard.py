"""From a guard's calls and refusals to the ledger that it was given."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.servers import shared_redis, unique_namespace

from asgi_llm_guard import Budget, Context, Guard, Iterations, LimitExceeded, Usage, events
from asgi_llm_guard.ledger import Ledger, RefusalQuery, UsageQuery

pytestmark = pytest.mark.anyio


async def work(guard: Guard) -> None:
    """Three calls, two of them for departments, and one that is refused."""
    for number, departments in enumerate([("research", "sales"), ("sales",), ()]):
        context = Context(caller="ada", session=f"s-{number}", departments=departments)
        async with guard.open(context):
            async with guard.call(model="openai/gpt-4o-mini", input_tokens=100, max_output_tokens=50) as call:
                call.record(Usage(input_tokens=80, output_tokens=20))
            if number == 2:
                with pytest.raises(LimitExceeded):
                    async with guard.call(model="openai/gpt-4o-mini", input_tokens=100, max_output_tokens=50):
                        pass


@pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"])
async def test_calls_and_refusals_are_in_the_ledger(kind: str, tmp_path: Path) -> None:
    """C8, C9: calls of several departments count in full for each and once in the total; one without any counts once, under
    none; a refusal is a number beside them."""
    url = {
        "memory": "memory://",
        "sqlite": f"sqlite:///{tmp_path}/guard.db",
        "redis": f"{shared_redis().url}?namespace={unique_namespace()}&timeout=10",
    }[kind]
    ledger_url = f"sqlite:///{tmp_path}/ledger.db" if kind == "redis" else None
    guard = Guard([Iterations(1), Budget("$5/daily")], storage=url, ledger=ledger_url)
    assert guard.books is not None
    await work(guard)

    await guard.books.catch_up()

    assert guard.ledger is not None
    report = await guard.ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department",)))
    refusals = await guard.ledger.refusals(RefusalQuery(since_ms=0, until_ms=2**52))
    by_department = {row.key[0]: row.amounts.calls for row in report.rows}
    assert by_department == {"research": 1, "sales": 2, None: 1}
    assert (report.total.calls, report.total.tokens) == (3, 300)
    assert report.total.cost_nanousd == 3 * (80 * 150 + 20 * 600)
    assert [(one.scope, one.code, one.count) for one in refusals] == [("session", "session_iterations_exhausted", 1)]
    assert (await guard.ledger.reconcile(0, 2**52)).equal
    await guard.aclose()


async def test_observers_are_told_what_was_dropped_before_it_was_drained(tmp_path: Path) -> None:
    """A guard whose stream was too short for an outage of the ledger tells its observers, once, how many records are gone."""
    namespace = unique_namespace()
    url = f"{shared_redis().url}?namespace={namespace}&timeout=10&max_records=4"
    seen: list[events.Event] = []
    guard = Guard([Budget("$5/daily")], storage=url, ledger=f"sqlite:///{tmp_path}/ledger.db", observers=[seen.append])
    assert guard.books is not None
    for calls in (1, 9):
        async with guard.open(Context(caller="ada")):
            for _ in range(calls):
                async with guard.call(model="openai/gpt-4o-mini", input_tokens=100, max_output_tokens=50) as call:
                    call.record(Usage(input_tokens=80, output_tokens=20))
        await guard.books.catch_up()
        await guard.books.catch_up()
    await guard.aclose()

    lost = [event for event in seen if isinstance(event, events.RecordsLost)]
    assert lost == [events.RecordsLost(f"redis:{namespace}", 5)]


async def test_what_was_counted_is_handed_on_at_the_end(tmp_path: Path) -> None:
    """A guard that closes leaves nothing behind: its last records are drained, its last refusals handed on."""
    url = f"{shared_redis().url}?namespace={unique_namespace()}&timeout=10"
    ledger_url = f"sqlite:///{tmp_path}/ledger.db"
    guard = Guard([Iterations(1), Budget("$5/daily")], storage=url, ledger=ledger_url)
    await work(guard)
    await guard.aclose()

    ledger = Ledger.open(ledger_url)
    total = (await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52))).total
    await ledger.aclose()
    following = Guard([Iterations(1), Budget("$5/daily")], storage=url, ledger=ledger_url)
    assert following.books is not None
    await following.books.catch_up()
    assert following.ledger is not None
    refusals = await following.ledger.refusals(RefusalQuery(since_ms=0, until_ms=2**52))
    await following.aclose()

    assert total.calls == 3
    assert [one.count for one in refusals] == [1]


async def test_the_last_process_drains_after_its_last_call(tmp_path: Path) -> None:
    """C9: a guard that has drained a moment ago, and closes, takes what came since then over too."""
    url = f"{shared_redis().url}?namespace={unique_namespace()}&timeout=10"
    ledger_url = f"sqlite:///{tmp_path}/ledger.db"
    guard = Guard([Iterations(1), Budget("$5/daily")], storage=url, ledger=ledger_url)
    assert guard.books is not None
    await guard.heartbeat()
    await guard.books.drain()
    await work(guard)
    await guard.aclose()

    ledger = Ledger.open(ledger_url)
    total = (await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52))).total
    await ledger.aclose()
    assert total.calls == 3
