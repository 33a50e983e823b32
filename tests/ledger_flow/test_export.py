"""A period as a file: in each format what the ledger says, to the nano-dollar, and nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import tracemalloc
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from tests.ledger_flow.kit import record

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import Ledger, RecordQuery, UsageQuery
from asgi_llm_guard.ledger.columns import guarded
from asgi_llm_guard.ledger.export import Exported, Format, export
from asgi_llm_guard.money import from_nano
from asgi_llm_guard.usage import Usage, UsageRecord

pytestmark = pytest.mark.anyio

EVER = RecordQuery()
HOUR_MS = 3_600_000


def records() -> list[UsageRecord]:
    """Of all departments, prices and outcomes, with costs that no float holds exactly."""
    many = [msgspec.structs.replace(record(n), cost_nanousd=1_234_567_891 * n + 1) for n in range(2_500)]
    many[3] = msgspec.structs.replace(many[3], cost_nanousd=None, usage=None, outcome="unknown", provider=None)
    many[4] = msgspec.structs.replace(many[4], cost_nanousd=0, outcome="cached", tags=("a;b", '"c"'))
    many[5] = msgspec.structs.replace(
        many[5], usage=Usage(input_tokens=1, output_tokens=2, extra=(Usage(web_searches=3, model="helper"),))
    )
    many[6] = msgspec.structs.replace(many[6], departments=("research", "sales", "legal, and more"))
    return many


async def filled(url: str, given: Iterable[UsageRecord]) -> Ledger:
    ledger = Ledger.open(url)
    await ledger.append(list(given))
    return ledger


async def exported(ledger: Ledger, format: Format = "csv", **options: Any) -> tuple[bytes, Exported]:  # noqa: A002
    out = io.BytesIO()
    told = await export(ledger, EVER, out, format, **options)
    return out.getvalue(), told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cells(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_every_format_says_what_the_ledger_says(database: str, request: pytest.FixtureRequest) -> None:
    """S7: rows and costs of CSV, JSON Lines, Parquet and FOCUS are those of the ledger, exactly."""
    url = "sqlite://:memory:" if database == "sqlite" else request.getfixturevalue("postgres_url")
    given = records()
    ledger = await filled(url, given)
    total = (await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52))).total
    sums: dict[str, tuple[int, Decimal]] = {}
    for name in ("csv", "jsonl", "parquet", "focus"):
        data, told = await exported(ledger, name)
        rows: list[dict[str, Any]]
        if name == "parquet":
            rows = pq.read_table(io.BytesIO(data)).to_pylist()
        elif name == "jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
        else:
            rows = cells(data)
        column = "BilledCost" if name == "focus" else "cost_usd"
        sums[name] = len(rows), sum((Decimal(row[column]) for row in rows if row[column]), Decimal(0))
        assert (told.records, told.rows, told.cost_nanousd, told.unpriced) == (2_500, 2_500, total.cost_nanousd, 1)
        assert Decimal(told.cost_usd) == from_nano(total.cost_nanousd)
        assert (told.bytes, told.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    await ledger.aclose()

    assert total.cost_nanousd == sum(one.cost_nanousd or 0 for one in given)
    assert sums == dict.fromkeys(sums, (2_500, from_nano(total.cost_nanousd)))


async def test_a_row_says_all_of_its_record() -> None:
    """What is unknown is empty and not 0, amounts are decimals, lists are JSON, instants are UTC."""
    given = records()
    ledger = await filled("sqlite://:memory:", given[:10])
    csv_rows = cells((await exported(ledger))[0])
    json_rows = [json.loads(line) for line in (await exported(ledger, "jsonl"))[0].splitlines()]
    parquet_rows = pq.read_table(io.BytesIO((await exported(ledger, "parquet"))[0])).to_pylist()
    await ledger.aclose()

    assert (csv_rows[3]["cost_usd"], csv_rows[3]["input_tokens"], csv_rows[3]["provider"]) == ("", "", "")
    assert (json_rows[3]["cost_usd"], json_rows[3]["input_tokens"]) == (None, None)
    assert (parquet_rows[3]["cost_usd"], parquet_rows[3]["input_tokens"]) == (None, None)
    assert (csv_rows[4]["cost_usd"], csv_rows[4]["outcome"]) == ("0.000000000", "cached")
    assert json.loads(csv_rows[4]["tags"]) == json_rows[4]["tags"] == parquet_rows[4]["tags"] == ["a;b", '"c"']
    assert json.loads(json_rows[5]["beside"]) == [{"web_searches": 3, "model": "helper"}]
    assert json_rows[7]["cost_usd"] == "8.641975238"
    assert parquet_rows[7]["cost_usd"] == Decimal("8.641975238")
    assert csv_rows[1]["at"] == "2027-01-15T08:00:00.001Z"
    assert parquet_rows[1]["at"].isoformat() == "2027-01-15T08:00:00.001000+00:00"
    assert json.loads(csv_rows[6]["departments"]) == ["research", "sales", "legal, and more"]


@pytest.mark.parametrize("name", ["csv", "jsonl", "parquet"])
async def test_departments_are_attributed_once_or_each(name: Format) -> None:
    """C9: with a row for each department the parts are in full, and those that are `counted` make the grand total."""
    ledger = await filled("sqlite://:memory:", records()[:60])
    data, told = await exported(ledger, name, departments="each")
    by_department = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department",)))
    await ledger.aclose()
    rows: list[dict[str, Any]]
    if name == "parquet":
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
    else:
        rows = cells(data) if name == "csv" else [json.loads(line) for line in data.splitlines()]

    sums: dict[str | None, Decimal] = {}
    for row in rows:
        key = row["department"] or None
        sums[key] = sums.get(key, Decimal(0)) + Decimal(row["cost_usd"] or 0)
    counted = sum(Decimal(row["cost_usd"] or 0) for row in rows if row["counted"] in (True, "true"))

    assert sums == {row.key[0]: from_nano(row.amounts.cost_nanousd) for row in by_department.rows}
    assert counted == from_nano(by_department.total.cost_nanousd) == Decimal(told.cost_usd)
    assert (told.records, told.rows) == (60, len(rows))
    assert told.rows > 60


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'quoted"])
async def test_no_cell_is_a_formula(text: str) -> None:
    """S7: what a caller has chosen is never run by a spreadsheet, and one apostrophe taken away gives it back."""
    hostile = msgspec.structs.replace(
        record(1), user=text, session=text, model=text, departments=(text,), tags=(text,), request_id=text, agent=text
    )
    ledger = await filled("sqlite://:memory:", [hostile])
    (row,) = cells((await exported(ledger))[0])
    (each,) = cells((await exported(ledger, departments="each"))[0])
    (focus,) = cells((await exported(ledger, "focus"))[0])
    await ledger.aclose()

    for found in (row, each, focus):
        assert not [cell for cell in found.values() if cell[:1] in {"=", "+", "-", "@", "\t", "\r", "\n"} and cell]
    assert row["user"] == f"'{text}" == each["department"]
    assert row["user"][1:] == text
    assert json.loads(row["departments"]) == [text]


def test_what_is_harmless_is_left_as_it_is() -> None:
    """Only the first character makes a formula."""
    assert [guarded(text) for text in ("", "a=1", "2026-03-01", "é", "[1]")] == ["", "a=1", "2026-03-01", "é", "[1]"]


async def test_focus_has_its_mandatory_columns() -> None:
    """S7: FOCUS 1.2: the mandatory columns are there, never empty but for ChargeClass; ours begin with x_; the four costs
    agree; an unknown cost is marked."""
    ledger = await filled("sqlite://:memory:", records()[:8])
    data, _ = await exported(ledger, "focus", billing_account="acme")
    await ledger.aclose()
    rows = cells(data)
    mandatory = [
        "BilledCost",
        "BillingAccountId",
        "BillingAccountName",
        "BillingCurrency",
        "BillingPeriodEnd",
        "BillingPeriodStart",
        "ChargeCategory",
        "ChargeClass",
        "ChargeDescription",
        "ChargePeriodEnd",
        "ChargePeriodStart",
        "ContractedCost",
        "EffectiveCost",
        "InvoiceIssuerName",
        "ListCost",
        "PricingQuantity",
        "PricingUnit",
        "ProviderName",
        "PublisherName",
        "ServiceCategory",
        "ServiceName",
    ]

    assert list(rows[0])[: len(mandatory)] == mandatory
    assert all(row[name] for row in rows for name in mandatory if name != "ChargeClass")
    assert all(
        len({row[name] for name in ("BilledCost", "EffectiveCost", "ListCost", "ContractedCost")}) == 1 for row in rows
    )
    first = rows[1]
    assert (first["BillingPeriodStart"], first["BillingPeriodEnd"]) == ("2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z")
    assert (first["ChargePeriodStart"], first["ChargePeriodEnd"]) == ("2027-01-15T08:00:00Z", "2027-01-15T09:00:00Z")
    assert (first["ConsumedQuantity"], first["ConsumedUnit"], first["SkuId"]) == ("111", "Tokens", "gpt-5.6-mini")
    assert (first["BillingAccountId"], first["SubAccountId"], first["x_Departments"]) == (
        "acme",
        "research",
        '["research"]',
    )
    assert (rows[6]["SubAccountId"], rows[2]["SubAccountId"]) == ("", "")
    assert json.loads(rows[4]["Tags"]) == {"a;b": True, '"c"': True}
    unknown = rows[3]
    assert (unknown["BilledCost"], unknown["x_CostUnknown"], unknown["ConsumedUnit"]) == (
        "0.000000000",
        "true",
        "Requests",
    )
    assert [row["x_CostUnknown"] for row in rows].count("true") == 1


async def test_the_year_of_a_billing_period_turns() -> None:
    """A month that ends with its year ends with the first of January."""
    december = msgspec.structs.replace(record(1), at_ms=1_798_761_599_999)
    ledger = await filled("sqlite://:memory:", [december])
    (row,) = cells((await exported(ledger, "focus"))[0])
    await ledger.aclose()

    assert (row["BillingPeriodStart"], row["BillingPeriodEnd"]) == ("2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z")
    assert row["ChargePeriodEnd"] == "2027-01-01T00:00:00Z"


async def test_a_compressed_file_has_the_same_rows(tmp_path: Path) -> None:
    """`gzip` changes the file and not what is in it; the checksum is that of the file, the same each time."""
    ledger = await filled("sqlite://:memory:", records()[:100])
    plain, _ = await exported(ledger)
    told = await export(ledger, EVER, tmp_path / "a.csv.gz", gzip=True)
    again = await export(ledger, EVER, str(tmp_path / "b.csv.gz"), gzip=True)
    await ledger.aclose()

    data = (tmp_path / "a.csv.gz").read_bytes()
    assert gzip.decompress(data) == plain
    assert told.sha256 == again.sha256 == hashlib.sha256(data).hexdigest()
    assert names(tmp_path) == ["a.csv.gz", "b.csv.gz"]


async def test_a_file_is_there_when_all_of_it_is(tmp_path: Path) -> None:
    """An export that is broken off leaves what was there before, and no part of itself."""
    ledger = await filled("sqlite://:memory:", records())
    path = tmp_path / "usage.csv"
    path.write_text("before")

    def stop(done: int) -> None:
        if done >= 2_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await export(ledger, EVER, path, progress=stop)
    await ledger.aclose()

    assert path.read_text() == "before"
    assert names(tmp_path) == ["usage.csv"]


async def test_a_department_that_is_named_twice_has_one_row() -> None:
    """C9: the rows of each department sum up to what the report says of it."""
    ledger = await filled(
        "sqlite://:memory:", [record(0), UsageRecord(call_id="twice", at_ms=1, departments=("a", "a"))]
    )
    rows = cells((await exported(ledger, departments="each"))[0])
    (focus,) = [row for row in cells((await exported(ledger, "focus"))[0]) if row["x_CallId"] == "twice"]
    report = await ledger.usage(UsageQuery(since_ms=0, until_ms=2**52, by=("department",)))
    await ledger.aclose()

    assert [(row["department"], row["of_departments"]) for row in rows if row["call_id"] == "twice"] == [("a", "1")]
    assert {row.key[0]: row.amounts.records for row in report.rows} == {None: 1, "a": 1}
    assert focus["SubAccountId"] == "a"


async def test_only_what_was_asked_for_is_exported() -> None:
    """The period and the filters of the query hold; its limit plays no part."""
    ledger = await filled("sqlite://:memory:", records()[:100])
    start = record(0).at_ms
    out = io.BytesIO()
    query = RecordQuery(since_ms=start + 10, until_ms=start + 50, where={"department": "sales"}, limit=3)
    told = await export(ledger, query, out)
    await ledger.aclose()

    assert told.records == len([n for n in range(10, 50) if n % 3 == 2])
    assert {row["user"] for row in cells(out.getvalue())} <= {f"user-{n}" for n in range(5)}


@pytest.mark.parametrize(
    ("name", "first", "more"), [("csv", 4_000, 12_000), pytest.param("parquet", 10_000, 30_000, marks=pytest.mark.slow)]
)
async def test_memory_does_not_grow_with_the_period(name: Format, first: int, more: int, tmp_path: Path) -> None:
    """A period four times as long takes no more memory at a time."""
    ledger = await filled(f"sqlite:///{tmp_path}/ledger.db", ())
    peaks = []
    base = 0
    for count in (first, more):
        await ledger.append([record(n) for n in range(base, base + count)])
        base += count
        tracemalloc.start()
        await export(ledger, EVER, tmp_path / f"out.{name}", name)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    await ledger.aclose()

    assert peaks[1] < 1.3 * peaks[0]


async def test_what_does_not_go_together_is_refused_at_once() -> None:
    """A wrong format, attribution or combination names itself, before anything is written."""
    ledger = Ledger.open("sqlite://:memory:")
    out = io.BytesIO()
    with pytest.raises(ConfigurationError, match="expected csv, jsonl, parquet, focus, got 'xlsx'"):
        await export(ledger, EVER, out, "xlsx")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="expected once or each, got 'share'"):
        await export(ledger, EVER, out, departments="share")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="FOCUS sums up BilledCost"):
        await export(ledger, EVER, out, "focus", departments="each")
    with pytest.raises(ConfigurationError, match="Parquet is compressed by itself"):
        await export(ledger, EVER, out, "parquet", gzip=True)
    with pytest.raises(ConfigurationError, match="billing_account"):
        await export(ledger, EVER, out, "focus", billing_account="")
    await ledger.aclose()

    assert out.getvalue() == b""
