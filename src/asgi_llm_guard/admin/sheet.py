"""What a page sums up, as a file for spreadsheets: a row for each hour or day and model. Pure."""

from __future__ import annotations

import csv
import io
from typing import Final

from asgi_llm_guard.admin.periods import Period
from asgi_llm_guard.admin.shown import dollars
from asgi_llm_guard.ledger import UsageReport
from asgi_llm_guard.ledger.columns import guarded

__all__ = ["MOST_ROWS", "file_name", "sheet"]

MOST_ROWS: Final = 10_000


def sheet(report: UsageReport, period: Period) -> str:
    """The rows of a report by hour or day and model, as CSV (RFC 4180). Dollars are exact; unknown ones are in no sum, and
    the number of their records stands beside it. No cell is a formula."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(
        [
            f"{period.unit} ({period.tz})", "model", "calls", "errors", "cached",
            "input_tokens", "output_tokens", "tokens", "cost_usd", "records_of_unknown_cost",
        ]
    )  # fmt: skip
    for row in report.rows:
        at, model = row.key
        sums = row.amounts
        rows.writerow(
            [
                at, guarded(model or ""), sums.calls, sums.errors, sums.cached,
                sums.input_tokens, sums.output_tokens, sums.tokens, dollars(sums.cost_nanousd), sums.unpriced,
            ]
        )  # fmt: skip
    return text.getvalue()


def file_name(period: Period) -> str:
    """`usage-2026-11-01-2026-11-30.csv`."""
    return f"usage-{period.local(period.since_ms)[:10]}-{period.local(period.until_ms - 1)[:10]}.csv"
