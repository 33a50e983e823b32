"""Short ways to write records into a storage, and to say what is in a ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from tests.storage.values import ME, START_MS, meter

from asgi_llm_guard.claims import Bundle, Claim, Granted, Settlement
from asgi_llm_guard.ledger import Ledger, RecordQuery
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.streams import KeepsStreams, RecordStream
from asgi_llm_guard.usage import Usage, UsageRecord
from asgi_llm_guard.windows import Lifetime

CAP = meter(Lifetime(3_600_000), None)


def record(number: int, *, call_id: str | None = None, cost: int | None = 1_000) -> UsageRecord:
    return UsageRecord(
        call_id=call_id or f"call-{number}",
        at_ms=START_MS + number,
        ended_ms=START_MS + number + 5,
        caller=f"caller-{number % 13}",
        user=f"user-{number % 5}",
        departments=("research", "sales")[: number % 3],
        agent="researcher",
        session=f"session-{number % 7}",
        route="/v1/chat/completions",
        provider="openai",
        model="gpt-5.6-mini",
        usage=Usage(input_tokens=100 + number, output_tokens=10),
        cost_nanousd=cost if cost is None else cost + number,
        tokens=110 + number,
    )


async def write(storage: Storage, records: Iterable[UsageRecord]) -> None:
    """Settle calls that were never reserved, each with its record: a record is all that comes of it."""
    every = list(records)
    for at in range(0, len(every), 200):
        some = every[at : at + 200]
        await storage.settle([Settlement(call_id=one.call_id, actuals=(), record=one) for one in some])


async def admit(storage: Storage, number: int, owner: str = ME) -> Granted:
    """Open a call that is estimated to cost 1 $, and is recorded so if its owner dies."""
    estimate = msgspec.structs.replace(
        record(number), usage=None, cost_nanousd=None, estimate_nanousd=10**9, outcome="expired"
    )
    answer = await storage.reserve(owner, [[Bundle(estimate.call_id, (Claim(CAP, 10**9),), draft=estimate)]])
    assert isinstance(answer, Granted)
    return answer


async def settle(storage: Storage, number: int, cost: int) -> str:
    """Settle an admitted call; how the storage took it."""
    settled = await storage.settle(
        [
            Settlement(
                call_id=f"call-{number}",
                actuals=(cost,),
                record=msgspec.structs.replace(record(number), cost_nanousd=cost),
            )
        ]
    )
    return settled[0].status


def stream_of(storage: object) -> RecordStream:
    """The only stream of a storage."""
    assert isinstance(storage, KeepsStreams)
    (stream,) = storage.streams()
    return stream


async def read_all(
    stream: RecordStream, position: str | None = None, limit: int = 100
) -> tuple[list[UsageRecord], str]:
    """What is in a stream after a position, and the position behind it."""
    records: list[UsageRecord] = []
    while True:
        read = await stream.read(position, limit)
        records += read.records
        position = read.position
        if not read.behind:
            return records, position


async def kept(ledger: Ledger) -> dict[str, int | None]:
    """What a ledger has: cost by call id. No id is there twice."""
    costs: dict[str, int | None] = {}
    async for batch in ledger.stream(RecordQuery(limit=1_000)):
        for one in batch:
            assert one.call_id not in costs
            costs[one.call_id] = one.cost_nanousd
    return costs


def sqlite_url(folder: Path, name: str = "ledger.db") -> str:
    return f"sqlite:///{folder / name}"


def ids(records: Sequence[UsageRecord]) -> list[str]:
    return [one.call_id for one in records]
