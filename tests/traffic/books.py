"""Compares, after a day of traffic, everything that says what it cost: the bill, the ledger, its sums, its exports."""

from __future__ import annotations

import csv
import io
from collections import Counter
from decimal import Decimal
from typing import Final

from tests.traffic.day import BEGINS, LASTS_S
from tests.traffic.service import ZONE, Service

from asgi_llm_guard.ledger import Dimension, Ledger, RecordQuery, RefusalQuery, UsageQuery
from asgi_llm_guard.ledger.export import export
from asgi_llm_guard.money import from_nano

SINCE_MS: Final = round(BEGINS.timestamp() * 1000)
UNTIL_MS: Final = SINCE_MS + LASTS_S * 1000


async def _differences(service: Service, ledger: Ledger) -> str:
    """The records whose cost is on no line of the bill, and the lines that no record has."""
    lines = Counter((line.model, line.cost_nanousd) for line in service.provider.bill if line.cost_nanousd)
    left, strange = Counter(lines), []
    async for batch in ledger.stream(RecordQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS, limit=1_000)):
        for record in batch:
            line = (record.model or "", record.cost_nanousd or 0)
            if left[line]:
                left[line] -= 1
            elif record.cost_nanousd:
                strange.append(record)
    return f"billed and not in the ledger: {+left}; in the ledger and not billed: {strange[:10]} of {len(strange)}"


async def compare(service: Service, ledger: Ledger) -> None:
    """The books of the day agree to the nano-dollar, in total and by everything that they can be told apart by."""
    billed_nanousd = service.provider.total_nanousd
    by_model: Counter[str] = Counter()
    for line in service.provider.bill:
        by_model[line.model] += line.cost_nanousd
    assert billed_nanousd > 0

    # What the ledger's records say, added up here.
    by_department: Counter[str | None] = Counter()
    by_user: Counter[str | None] = Counter()
    records = departments = 0
    late = cached = 0
    async for batch in ledger.stream(RecordQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS, limit=1_000)):
        for record in batch:
            cost = record.cost_nanousd or 0
            records += 1
            late += record.late
            cached += record.outcome == "cached"
            by_user[record.user] += cost
            for name in record.departments or (None,):
                by_department[name] += cost
            departments += cost * len(record.departments or (None,))
    assert late > 0
    assert cached > 0
    assert sum(by_user.values()) == billed_nanousd, await _differences(service, ledger)
    assert billed_nanousd < departments

    # What its sums say.
    whole = await ledger.reconcile(SINCE_MS, UNTIL_MS)
    assert whole.equal, whole
    compared: list[tuple[Dimension, Counter[str | None]]] = [("user", by_user), ("department", by_department)]
    for by, expected in compared:
        report = await ledger.usage(UsageQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS, by=(by,)))
        assert {row.key[0]: row.amounts.cost_nanousd for row in report.rows} == dict(expected)
        assert report.total.cost_nanousd == billed_nanousd
        assert report.total.records == records
        assert report.total.unpriced == 0
    models = await ledger.usage(UsageQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS, by=("model",)))
    priced = {row.key[0]: row.amounts.cost_nanousd for row in models.rows if row.amounts.cost_nanousd}
    assert priced == dict(by_model)
    hours = await ledger.usage(UsageQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS, by=("hour",), tz=ZONE, order="key"))
    assert sum(row.amounts.cost_nanousd for row in hours.rows) == billed_nanousd
    assert len({row.key for row in hours.rows}) == len(hours.rows) <= 25
    days = await ledger.usage(UsageQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS, by=("day",), tz=ZONE))
    assert [(row.key, row.amounts.cost_nanousd) for row in days.rows] == [(("2026-10-25",), billed_nanousd)]

    # What leaves the house.
    query = RecordQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS)
    table = io.BytesIO()
    exported = await export(ledger, query, table, "csv")
    assert (exported.records, exported.cost_nanousd) == (records, billed_nanousd)
    rows = csv.DictReader(io.StringIO(table.getvalue().decode("utf-8-sig")))
    assert sum(Decimal(row["cost_usd"] or 0) for row in rows) == from_nano(billed_nanousd)

    # What was refused.
    refusals: Counter[str] = Counter()
    for count in await ledger.refusals(RefusalQuery(since_ms=SINCE_MS, until_ms=UNTIL_MS)):
        refusals[count.code] += count.count
    assert refusals == service.refused, (refusals, service.refused)
