"""One number everywhere: counters, ledger, reports, exports, pages and metrics say what was charged."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest
from tests.gateway.kit import PRICES, fleet
from tests.telemetry.kit import Telemetry

from asgi_llm_guard import Budget, Context, Guard, Usage
from asgi_llm_guard.ledger import Ledger, RecordQuery, UsageQuery
from asgi_llm_guard.ledger.export import Format, export
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.testing import Behaviour, FrozenClock

pytestmark = pytest.mark.anyio

ALWAYS = 2**50
NANO = 10**9


async def metered(guard: Guard, told: Telemetry) -> dict[str, int]:
    """What was charged, as each place tells it, in nano-dollars."""
    books, ledger = guard.books, guard.ledger
    assert books is not None
    assert ledger is not None
    await books.catch_up()
    by_day = await ledger.usage(UsageQuery(since_ms=0, until_ms=ALWAYS, by=("day", "model", "department")))
    by_user = await ledger.usage(UsageQuery(since_ms=0, until_ms=ALWAYS, by=("user",)))
    points = told.collect().get("llm_guard.cost", [])
    ((_, reading),) = await guard.meters_of("global")
    return {
        "counter": reading.used,
        "sums": by_day.total.cost_nanousd,
        "rows": sum(row.amounts.cost_nanousd for row in by_user.rows),
        "records": sum(record.cost_nanousd or 0 for record in await guard.storage.records()),
        "csv": await written(ledger, "csv", "cost_usd"),
        "csv, each": await written(ledger, "csv", "cost_usd", each=True),
        "focus": await written(ledger, "focus", "BilledCost"),
        "metrics": round(sum(point.value for point in points) * NANO),
    }


async def written(ledger: Ledger, format: Format, column: str, *, each: bool = False) -> int:  # noqa: A002 - as of `export`
    out = io.BytesIO()
    await export(ledger, RecordQuery(), out, format, departments="each" if each else "once")
    rows = list(csv.DictReader(io.StringIO(out.getvalue().decode())))
    counted = [row for row in rows if not each or row["counted"] == "true"]
    return int(sum(Decimal(row[column] or 0) for row in counted) * NANO)


async def cut() -> AsyncIterator[dict[str, Any]]:
    yield {
        "object": "chat.completion.chunk",
        "model": "model-a",
        "choices": [{"index": 0, "delta": {"content": "word " * 9}}],
    }
    raise ConnectionError("cut")


MANY = Context(caller="acme", user="ann", departments=("research", "sales", "research"))


async def measured(call: Any) -> None:
    call.record(Usage(input_tokens=90, output_tokens=7))


async def above_its_hold(call: Any) -> None:
    call.record(Usage(input_tokens=200, output_tokens=40))


async def unmetered(call: Any) -> None:
    call.dispatched()
    call.record({"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "hello"}}]})


async def unknown(call: Any) -> None:
    call.dispatched()
    raise TimeoutError


async def refused_by_the_provider(call: Any) -> None:
    call.dispatched()
    call.record({"error": {"message": "no", "type": "server_error"}})


async def cut_off(call: Any) -> None:
    async for _ in call.stream(cut()):
        pass


async def never_sent(call: Any) -> None:
    call.release()


ENDS = [measured, above_its_hold, unmetered, unknown, refused_by_the_provider, cut_off, never_sent]


@pytest.mark.parametrize("end", ENDS)
async def test_whatever_becomes_of_a_call(clock: FrozenClock, end: Any) -> None:
    """C9, C15: counter, records, sums, CSV, FOCUS and metrics charge the same for a call of several departments, however it ends."""
    told = Telemetry()
    guard = Guard([Budget("$10/daily", per="global")], clock=clock, prices=PRICES)
    told.instrument(guard)
    async with guard:
        try:
            async with guard.open(MANY), guard.call(
                model="openai/model-a", input_tokens=100, max_output_tokens=20
            ) as call:  # fmt: skip
                await end(call)
        except (TimeoutError, ConnectionError):
            pass
        found = await metered(guard, told)
        assert set(found.values()) == {found["records"]}, found
        assert (found["records"] > 0) == (end not in (refused_by_the_provider, never_sent))


async def test_a_model_without_a_price(clock: FrozenClock) -> None:
    """C9: a call that is allowed without a price is charged nothing anywhere."""
    told = Telemetry()
    guard = Guard([Budget("$10/daily", per="global")], clock=clock, prices=PriceBook.snapshot(unknown="allow"))
    told.instrument(guard)
    async with guard:
        async with guard.open(MANY), guard.call(model="nobody/knows", input_tokens=100, max_output_tokens=20) as call:
            await measured(call)
        assert set((await metered(guard, told)).values()) == {0}


async def test_retries_and_fallbacks_of_a_gateway(clock: FrozenClock) -> None:
    """C9, C15: attempts that failed, were cut, or were answered by another deployment are the same sum everywhere, which is
    the providers' bill where all of them were measured."""
    told = Telemetry()
    async with fleet(clock, "a", "b", "d", policies=[Budget("$10/daily", per="global")]) as made:
        told.instrument(made.guard)
        made["a"].script(Behaviour.error(503), Behaviour.error(500))
        made["b"].script(Behaviour.error(429))
        for _ in range(6):
            await made.chat()
        await made.stream()
        await made.settled()
        found = await metered(made.guard, told)
        assert set(found.values()) == {made.billed_nanousd}, found
