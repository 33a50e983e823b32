"""What the pages show is what the ledger says: sums, bars, months and forecasts."""

from __future__ import annotations

import csv
import html
import io
import re
from decimal import Decimal
from pathlib import Path

import pytest
from tests.admin.kit import NOW_MS, Desk, desk, fill, options, record

from asgi_llm_guard import RateLimit
from asgi_llm_guard.admin import gathered
from asgi_llm_guard.admin.budgets import forecast
from asgi_llm_guard.admin.desk import Desk as Behind
from asgi_llm_guard.admin.periods import Period, slots
from asgi_llm_guard.admin.sheet import MOST_ROWS
from asgi_llm_guard.claims import Reading
from asgi_llm_guard.ledger import Ledger, RefusalCount, UsageQuery
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.windows import Calendar

pytestmark = pytest.mark.anyio

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
_OCTOBER_24_MS = 1_792_800_000_000  # 2026-10-24T00:00:00Z, the day before summer time ends in Europe


def _ledger(page: Desk) -> Ledger:
    assert page.guard.ledger is not None
    return page.guard.ledger


@pytest.mark.parametrize(
    "tz", ["UTC", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe", "Africa/Cairo", "America/St_Johns"]
)
@pytest.mark.parametrize("days", [2, 40])
async def test_bars_are_the_sum(tz: str, days: int, page: Desk) -> None:
    """C9: hours and days together are the total of the ledger, where summer time begins or ends and wherever days begin; a
    call of unknown cost is in no sum and is said."""
    records = [
        record(
            number,
            at_ms=_OCTOBER_24_MS + number * 29 * 60_000,
            ended_ms=_OCTOBER_24_MS + number * 29 * 60_000 + 900,
            cost_nanousd=None if number % 11 == 3 else 1_000_003 + number,
        )
        for number in range(200)
    ]
    await fill(page.guard, records)
    behind = Behind(page.guard, options())
    since_ms = _OCTOBER_24_MS - (days - 2) * _DAY_MS
    period = Period(name="custom", since_ms=since_ms, until_ms=since_ms + days * _DAY_MS, tz=tz)
    report = await gathered.over_time(behind, period)
    assert report is not None
    spend, calls = gathered.charts(report, period)
    inside = [each for each in records if period.since_ms <= each.at_ms < period.until_ms]
    assert sum(bar.value for bar in spend.series) == report.total.cost_nanousd
    assert report.total.cost_nanousd == sum(each.cost_nanousd or 0 for each in inside)
    assert sum(bar.value for bar in calls.series) == report.total.calls == len(inside)
    assert any("unknown cost" in bar.told for bar in spend.series)
    assert len(spend.series) == len(slots(period))


async def test_months_are_whole(page: Desk) -> None:
    """The bars of the last months show all that a month has cost, its first days included, and what is not known of it."""
    await fill(
        page.guard,
        [
            record(
                number,
                at_ms=NOW_MS - number * _DAY_MS,
                ended_ms=NOW_MS - number * _DAY_MS + 5,
                cost_nanousd=None if number % 50 == 1 else 12_500_000,
            )
            for number in range(360)
        ],
    )
    text = (await page.client("viewer").get("/admin/department?name=research")).text
    table = text.partition('<caption class="hidden">Spend per month</caption>')[2].partition("</table>")[0]
    bars = dict(re.findall(r'<th scope="row">(\d{4}-\d\d)</th><td class="number">\$([\d.]+)', html.unescape(table)))
    months = [f"2025-{12:02}", *(f"2026-{month:02}" for month in range(1, 12))]
    assert sorted(bars) == months
    assert "$0.36 and 1 call of unknown cost" in table
    for month in months[:-1]:
        start_ms, end_ms = Calendar("month", "UTC").bounds(_instant(month))
        exact = await _ledger(page).usage(UsageQuery(since_ms=start_ms, until_ms=end_ms))
        assert bars[month] == f"{exact.total.cost_nanousd / 1e9:.2f}", month


def _instant(month: str) -> int:
    from datetime import UTC, datetime

    return int(datetime.fromisoformat(f"{month}-15").replace(tzinfo=UTC).timestamp()) * 1000


async def test_departments_of_a_time_long_past(page: Desk) -> None:
    """A department that has called in the time that is shown is in the list, though it has not since; its own page shows it."""
    then_ms = NOW_MS - 100 * _DAY_MS
    await fill(page.guard, [record(1, at_ms=then_ms, ended_ms=then_ms + 1, departments=("closed",))])
    client = page.client("viewer")
    asked = "range=custom&since=2026-08-01T00:00&until=2026-09-01T00:00&tz=UTC"
    assert "closed" in (await client.get(f"/admin/departments?{asked}")).text
    assert "closed" not in (await client.get("/admin/departments")).text
    for since, until in (("2026-08-01T00:00", "2026-09-01T00:00"), ("2024-01-01T00:00", "2024-02-01T00:00")):
        own = await client.get(f"/admin/department?name=closed&range=custom&since={since}&until={until}&tz=UTC")
        assert own.status_code in {200, 422}, own.text
    assert (await client.get(f"/admin/department?name=closed&{asked}")).status_code == 200


@pytest.mark.parametrize("path", ["", "departments", "department", "refusals"])
@pytest.mark.parametrize("tz", ["UTC", "America/Los_Angeles", "Asia/Tokyo"])
async def test_times_at_the_ends_of_the_calendar(path: str, tz: str, page: Desk) -> None:
    """A range at the beginning or the end of what can be written is shown or said to be none; it breaks nothing."""
    for since, until in (("1970-01-02T00:00", "1970-01-03T00:00"), ("9998-12-31T00:00", "9999-12-31T23:59")):
        asked = f"name=research&range=custom&since={since}&until={until}&tz={tz}"
        answer = await page.client("viewer").get(f"/admin/{path}?{asked}")
        assert answer.status_code in {200, 422}, (since, answer.text)


async def test_all_refusals_are_counted(page: Desk) -> None:
    """The sum of refusals of a month is exact, however many policies and routes there are."""
    hours = [NOW_MS // _HOUR_MS * _HOUR_MS - hour * _HOUR_MS for hour in range(600)]
    counts = [
        RefusalCount(
            hour_ms=hour_ms, policy="budget", scope="user", code="budget_exhausted", route=f"/{route}", count=3
        )
        for hour_ms in hours
        for route in range(20)
    ]
    await _ledger(page).add_refusals(counts)
    text = (await page.client("viewer").get("/admin/refusals?range=30d")).text
    assert f"{3 * len(counts):,}" in text


async def test_counts_of_refusals_are_read_in_whole(page: Desk) -> None:
    """The API leaves no count out without a word: it says from where on to ask again, and what is asked so is all there is,
    each hour once."""
    newest = NOW_MS // _HOUR_MS * _HOUR_MS
    counts = [
        RefusalCount(hour_ms=newest - hour * _HOUR_MS, policy="p", scope="", code="c", route=f"/{route}", count=1)
        for hour in range(30)
        for route in range(700)
    ]
    await _ledger(page).add_refusals(counts)
    client = page.client("viewer")
    asked: dict[str, int | str] = {"since_ms": newest - 30 * _HOUR_MS, "until_ms": NOW_MS + 1}
    rows, turns = [], 0
    while asked["until_ms"] is not None:
        told = (await client.get("/admin/api/v1/refusals", params=asked)).json()
        rows += [(row["hour_ms"], row["route"]) for row in told["counts"]]
        asked["until_ms"] = told["next_until_ms"]
        turns += 1
    assert (turns, len(rows), len(set(rows))) == (3, len(counts), len(counts))


@pytest.mark.parametrize("name", [None, "research"])
async def test_the_file_is_what_the_page_sums_up(name: str | None, page: Desk) -> None:
    """C9: the file of a page has the page's sums, to the nano-dollar, whole and without a formula; a call of several
    departments is in it once."""
    await fill(
        page.guard,
        [
            record(1, at_ms=NOW_MS - _DAY_MS, cost_nanousd=1, model='=HYPERLINK("x")'),
            record(2, departments=("research", "sales"), cost_nanousd=10**9 + 1),
            record(3, departments=("sales",), cost_nanousd=7),
            record(4, cost_nanousd=None),
        ],
    )
    client = page.client("viewer")
    asked = {"range": "7d", "tz": "Europe/Berlin"} | ({} if name is None else {"name": name})
    answer = await client.get("/admin/usage.csv", params=asked)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="usage-2026-11-16-2026-11-22.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["model"] for row in rows] == ['\'=HYPERLINK("x")', "gpt-5.6-mini"]
    assert [row["day (Europe/Berlin)"] for row in rows] == ["2026-11-21", "2026-11-22"]
    total = sum(Decimal(row["cost_usd"]) for row in rows)
    assert total == (Decimal("1.000000002") if name else Decimal("1.000000009"))
    assert [sum(int(row[field]) for row in rows) for field in ("calls", "records_of_unknown_cost")] == [
        3 + (not name),
        1,
    ]
    links = html.unescape((await client.get(f"/admin/{'department' if name else ''}", params=asked)).text)
    assert "/admin/usage.csv?" + ("name=research&" if name else "") + "range=7d&tz=Europe%2FBerlin" in links


async def test_a_file_that_cannot_be(page: Desk, tmp_path: Path) -> None:
    """A file of a time that is none, of too many rows or without a ledger is a problem that says what to do, and no part of
    what was asked for."""
    await fill(page.guard, [record(number, model=f"model-{number}") for number in range(MOST_ROWS + 3)])
    client = page.client("viewer")
    many = await client.get("/admin/usage.csv")
    assert (many.status_code, "10,003 rows" in many.text, "ledger export" in many.text) == (422, True, True)
    assert (await client.get("/admin/usage.csv?range=nine")).status_code == 422
    made = desk(
        tmp_path, control=False, storage=LimitsStorage("memory://"), policies=[RateLimit("60/minute", per="caller")]
    )
    assert (await made.client("viewer").get("/admin/usage.csv")).status_code == 409
    await made.aclose()


def test_forecasts_where_summer_time_changes() -> None:
    """Half of a day of 25 hours makes a forecast of twice what was used, and so does half of a month with such a day."""
    for window in (Calendar("day", "Europe/Berlin"), Calendar("month", "Europe/Berlin")):
        start, end = window.bounds(_OCTOBER_24_MS + _DAY_MS + _HOUR_MS)
        assert (end - start) % _DAY_MS == _HOUR_MS
        assert forecast(window, Reading(used=70, held=30, resets_at_ms=end), (start + end) // 2) == 200
        assert forecast(window, Reading(used=70, held=30, resets_at_ms=end), start) is None


async def test_what_shadows_report_is_no_refusal(page: Desk) -> None:
    """What a shadow would have refused was not refused: it stands apart, and is in no sum."""
    hour_ms = NOW_MS // _HOUR_MS * _HOUR_MS - _HOUR_MS
    await fill(page.guard, [record(1)])
    await _ledger(page).add_refusals(
        [
            RefusalCount(hour_ms=hour_ms, policy="budget.shadow", scope="", code="shadow", count=7_000),
            RefusalCount(hour_ms=hour_ms, policy="budget", scope="user", code="budget_exhausted", count=1),
        ]
    )
    text = (await page.client("viewer").get("/admin/")).text
    tile = text.partition("<dt>Refused</dt>")[2].partition("</div>")[0]
    assert re.findall(r">([^<>\n]+)<", tile) == ["1", "50\N{NO-BREAK SPACE}% of what was asked"]
    for path in ("", "refusals"):
        shown = (await page.client("viewer").get(f"/admin/{path}")).text
        assert "would have been refused" in shown
        assert "7,000" in shown


async def test_a_live_session_of_several_agents_is_whole(page: Desk) -> None:
    """A live session that works with several agents shows all that it has cost, in one row."""
    agents = ("writer", "critic", None)
    await fill(page.guard, [record(number, agent=agent, cost_nanousd=10**9) for number, agent in enumerate(agents)])
    (told,) = (await page.client("viewer").get("/admin/api/v1/sessions")).json()
    assert (told["session"], told["calls"], told["cost_usd"]) == ("session-1", 3, "3.00")
