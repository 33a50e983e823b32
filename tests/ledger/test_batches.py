"""What is read before it is added: whatever happens in between, each record is in the sums once, as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.ledger import fill
from tests.ledger.kit import START_MS, record, roll_all

from asgi_llm_guard.ledger import Ledger, UsageQuery
from asgi_llm_guard.ledger.pace import ALONE, LARGE, SMALL
from asgi_llm_guard.ledger.pieces import Batch, look
from asgi_llm_guard.ledger.rollups import Roller

pytestmark = pytest.mark.anyio


async def read(ledger: Ledger, most: int = 10) -> Batch:
    await ledger.prepare()
    batch = await ledger.database.read(lambda connection: look(connection, most))
    assert batch is not None
    return batch


async def add(ledger: Ledger, roller: Roller, batch: Batch) -> int | None:
    added = await ledger.database.write(lambda connection: roller.add(connection, batch))
    if added is not None:
        roller.confirm()
    return added


async def check(ledger: Ledger, costs: dict[str, int]) -> None:
    """What each user has cost, by the sums; and these agree with the records."""
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("user",)))
    assert {row.key[0]: row.amounts.cost_nanousd for row in report.rows} == costs
    found = await ledger.reconcile(0, 2**52)
    assert found.equal, found.differences


async def test_replaced_between_reading_and_adding(ledger: Ledger) -> None:
    """C9: an estimate that is replaced after it was read for the sums, and before it is added to them, is corrected; and so
    is a correction that is corrected once more in between."""
    roller = Roller()
    await ledger.append([record("1", START_MS, user="ann", outcome="expired", cost_nanousd=100)])
    estimate = await read(ledger)
    await ledger.append([record("1", START_MS, user="ann", cost_nanousd=5)])
    assert await add(ledger, roller, estimate) == 1
    await check(ledger, {"ann": 5})
    correction = await read(ledger)
    await ledger.append([record("1", START_MS, user="bob", cost_nanousd=7, late=True)])
    await check(ledger, {"bob": 7})
    assert await add(ledger, roller, correction) == 1
    await check(ledger, {"bob": 7})
    assert await roll_all(ledger) == 1
    await check(ledger, {"bob": 7})


async def test_replaced_before_it_is_read_is_no_correction(ledger: Ledger) -> None:
    """C9: what replaced an estimate before that was read is added as it is, and corrected by nothing."""
    await ledger.append([record("1", START_MS, user="ann", outcome="expired", cost_nanousd=100)])
    await ledger.append([record("1", START_MS, user="ann", cost_nanousd=5)])
    assert await add(ledger, Roller(), await read(ledger)) == 1
    assert await roll_all(ledger) == 0
    await check(ledger, {"ann": 5})


async def test_who_is_overtaken_adds_nothing(ledger: Ledger) -> None:
    """C9: of two that have read the same records the first adds them; so it is with corrections."""
    one, other = Roller(), Roller()
    await ledger.append([record("1", START_MS, user="ann", outcome="expired", cost_nanousd=100)])
    for cost in (100, 5):
        first, second = await read(ledger), await read(ledger)
        assert await add(ledger, one, first) == 1
        assert await add(ledger, other, second) is None
        await check(ledger, {"ann": cost})
        await ledger.append([record("1", START_MS, user="ann", cost_nanousd=5)])
        one, other = other, one
    assert await roll_all(ledger) == 0


async def test_much_is_not_added_where_others_begin_to_write(tmp_path: Path) -> None:
    """C9: what was read while nobody else wrote is not added at once when somebody does: in small steps, each once."""
    path = tmp_path / "guard.db"
    fill(path, SMALL * (ALONE + 1) + LARGE)
    ledger, other = (Ledger.open(f"sqlite:///{path}") for _ in range(2))
    await ledger.prepare()
    roller = Roller()
    while roller.pace.most("sqlite") == SMALL:
        assert await add(ledger, roller, await read(ledger, SMALL)) == SMALL
    large = await read(ledger, LARGE)
    await other.append([record("another")])
    assert await add(ledger, roller, large) is None
    assert await ledger.database.write(lambda connection: roller.step(connection, LARGE)) == SMALL
    roller.confirm()
    await roll_all(ledger)
    found = await ledger.reconcile(0, 2**52)
    assert found.equal, found.differences
    await ledger.aclose()
    await other.aclose()
