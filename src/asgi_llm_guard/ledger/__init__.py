"""The ledger: what was used, by whom, and what it cost.

ledger = Ledger.open("sqlite:///guard.db")
report = await ledger.usage(UsageQuery(since_ms=…, until_ms=…, by=("department", "day"), tz="Europe/Berlin"))
"""

from __future__ import annotations

from asgi_llm_guard.ledger.book import Ledger
from asgi_llm_guard.ledger.values import (
    AMOUNTS,
    DIMENSIONS,
    FILTERS,
    OTHER,
    Amounts,
    Difference,
    Dimension,
    Filter,
    NotKeptError,
    Order,
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
    UsageRow,
)

__all__ = [
    "AMOUNTS",
    "DIMENSIONS",
    "FILTERS",
    "OTHER",
    "Amounts",
    "Difference",
    "Dimension",
    "Filter",
    "Ledger",
    "NotKeptError",
    "Order",
    "Page",
    "Reconciliation",
    "RecordQuery",
    "RefusalCount",
    "RefusalQuery",
    "Retained",
    "Retention",
    "SessionUsage",
    "UsageQuery",
    "UsageReport",
    "UsageRow",
]
