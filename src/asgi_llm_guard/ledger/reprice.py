"""What a past period would have cost by other prices. What was charged stays; the other cost stands beside it, named.

    repriced = await reprice(ledger, PriceBook.snapshot(), since_ms=…, until_ms=…, version="list of 2026-11-01")

A repricing is a report and changes no counter, no budget and no record. Only what was measured or counted can be priced
again: where the usage is unknown (a hold was charged) or has no price, the cost stays unknown, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from asgi_llm_guard.context import Call
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger.book import Ledger
from asgi_llm_guard.ledger.tables import make_alone
from asgi_llm_guard.ledger.values import OTHER, RecordQuery
from asgi_llm_guard.pricing import Cost, PriceBook
from asgi_llm_guard.pricing.book import UNPRICED
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.usage import UsageRecord

__all__ = [
    "ModelDifference",
    "Progress",
    "Repriced",
    "RepricedCost",
    "Version",
    "forget_version",
    "reprice",
    "repriced_costs",
    "versions",
]

_BATCH: Final = 500
_MOST_MODELS: Final = 10_000

_FREE: Final = frozenset({"cached", "not_dispatched", "provider_error"})
"""Charged nothing, whatever the prices are."""

_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS ledger_repriced (
        version TEXT NOT NULL,
        call_id TEXT NOT NULL,
        cost_nanousd BIGINT,
        price_source TEXT,
        PRIMARY KEY (version, call_id)
    )""",
    """CREATE TABLE IF NOT EXISTS ledger_repricings (
        version TEXT NOT NULL PRIMARY KEY,
        since_ms BIGINT NOT NULL,
        until_ms BIGINT NOT NULL,
        prices_date TEXT NOT NULL,
        finished INTEGER NOT NULL
    )""",
)


class ModelDifference(msgspec.Struct, frozen=True, kw_only=True):
    """What other prices make of one model's calls."""

    provider: str | None
    model: str | None
    """As it was asked for."""
    records: int = 0
    charged_nanousd: int = 0
    """As it was charged, over the records that have a cost in both versions."""
    repriced_nanousd: int = 0
    """The same records by the other prices."""
    unknown: int = 0
    """Records without a cost in one of the two: they are in neither sum."""

    @property
    def difference_nanousd(self) -> int:
        return self.repriced_nanousd - self.charged_nanousd


class Repriced(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    dry_run: bool
    """Nothing was written."""
    models: tuple[ModelDifference, ...]
    """The largest differences first."""
    total: ModelDifference
    """Over all models; `provider` and `model` are `None`."""


class RepricedCost(msgspec.Struct, frozen=True, kw_only=True):
    """One call by the prices of one version."""

    call_id: str
    cost_nanousd: int | None
    price_source: str | None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A repricing that is kept."""

    version: str
    since_ms: int
    until_ms: int
    prices_date: str
    """The day that the list prices are from."""
    finished: bool
    """`False`: it was broken off; run it again under the same name."""


Progress = Callable[[int], object]
"""Is told how many records were priced."""


async def reprice(
    ledger: Ledger,
    prices: PriceBook,
    *,
    since_ms: int,
    until_ms: int,
    version: str,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Repriced:
    """Price the records again that were admitted from `since_ms` until before `until_ms`, and keep the costs as `version`.

    Each record is priced by its own usage, at the instant it ended. A run that was broken off is begun again under the
    same name, and gives the same. `dry_run`: only say what would differ.

    Raises:
        ConfigurationError: the name is empty or too long, or a finished repricing has it.
        NotKeptError: retention has removed records of the period.
        StorageError: the ledger does not answer.
    """
    if not 0 < len(version) <= 200:
        raise ConfigurationError(f"version: expected a name of 1 to 200 characters, got {version!r}")
    differences = _Differences()
    query = RecordQuery(since_ms=since_ms, until_ms=until_ms, limit=_BATCH)
    if not dry_run:
        entry = Version(version=version, since_ms=since_ms, until_ms=until_ms, prices_date=prices.date, finished=False)
        await ledger.database.write(lambda connection: _begin(connection, entry))
    done = 0
    async for records in ledger.stream(query):
        costs = [_again(prices, record) for record in records]
        for record, cost in zip(records, costs, strict=True):
            differences.add(record, cost.nanousd)
        if not dry_run:
            rows = [
                (version, record.call_id, cost.nanousd, cost.source)
                for record, cost in zip(records, costs, strict=True)
            ]
            await ledger.database.write(partial(_keep, rows=rows))
        done += len(records)
        if progress is not None:
            progress(done)
    if not dry_run:
        await ledger.database.write(lambda connection: _finish(connection, version))
    return differences.result(version, dry_run=dry_run)


async def versions(ledger: Ledger) -> Sequence[Version]:
    """The repricings that are kept, by name."""
    return await ledger.database.write(_versions)


async def repriced_costs(ledger: Ledger, version: str, call_ids: Sequence[str]) -> Sequence[RepricedCost]:
    """What these calls cost in this version, in the order of their ids; those that it does not have are not there."""
    return await ledger.database.write(lambda connection: _costs(connection, version, call_ids))


async def forget_version(ledger: Ledger, version: str) -> int:
    """Remove a repricing; of how many records it was."""
    return await ledger.database.write(lambda connection: _forget(connection, version))


# -------------------------------------------------------------------------------------- pricing


def _again(prices: PriceBook, record: UsageRecord) -> Cost:
    """The cost of a record by these prices; `None`: unknown."""
    if record.outcome in _FREE and (record.usage is None or record.outcome == "cached"):
        return Cost(record.cost_nanousd, record.price_source)
    if record.usage is None or _doubted(record):
        return Cost(None)
    at_ms = record.at_ms if record.ended_ms is None else record.ended_ms
    asked = None if record.model is None else Call(provider=record.provider, model=record.model)
    cost = prices.cost(record.provider, record.model, record.usage, at_ms, call=asked)
    if cost.nanousd is None and record.billed_model not in (None, record.model):
        # A deployment's name has no price of its own; it was charged as this model.
        cost = prices.cost(record.provider, record.billed_model, record.usage, at_ms)
    return Cost(None) if cost.source == UNPRICED else cost


def _doubted(record: UsageRecord) -> bool:
    """Whether its usage is a report that cannot be, and was not charged as told."""
    return record.price_source is not None and record.price_source.endswith("clamped")


class _Differences:
    """Sums by provider and model. Models beyond a bound, which callers may have made up, are together."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str | None, str | None], list[int]] = {}

    def add(self, record: UsageRecord, repriced: int | None) -> None:
        key = record.provider, record.model
        if key not in self._sums and len(self._sums) >= _MOST_MODELS:
            key = None, OTHER
        sums = self._sums.setdefault(key, [0, 0, 0, 0])
        sums[0] += 1
        if repriced is None or record.cost_nanousd is None:
            sums[3] += 1
        else:
            sums[1] += record.cost_nanousd
            sums[2] += repriced

    def result(self, version: str, *, dry_run: bool) -> Repriced:
        models = [_difference(key, sums) for key, sums in self._sums.items()]
        models.sort(key=lambda one: (-abs(one.difference_nanousd), one.provider or "", one.model or ""))
        total = [sum(column) for column in zip(*self._sums.values(), strict=True)] or [0, 0, 0, 0]
        return Repriced(version=version, dry_run=dry_run, models=tuple(models), total=_difference((None, None), total))


def _difference(key: tuple[str | None, str | None], sums: Sequence[int]) -> ModelDifference:
    records, charged, repriced, unknown = sums
    return ModelDifference(
        provider=key[0],
        model=key[1],
        records=records,
        charged_nanousd=charged,
        repriced_nanousd=repriced,
        unknown=unknown,
    )


# --------------------------------------------------------------------------------------- tables


def _make(connection: Connection) -> None:
    make_alone(connection)
    for statement in _TABLES:
        connection.execute(statement)


def _begin(connection: Connection, entry: Version) -> None:
    _make(connection)
    for (finished,) in connection.execute("SELECT finished FROM ledger_repricings WHERE version = ?", (entry.version,)):
        if finished:
            raise ConfigurationError(
                f"version: {entry.version!r} was repriced before and is kept; choose another name, or forget that one"
            )
    connection.execute("DELETE FROM ledger_repriced WHERE version = ?", (entry.version,))
    connection.execute(
        "INSERT INTO ledger_repricings (version, since_ms, until_ms, prices_date, finished) VALUES (?, ?, ?, ?, 0) "
        "ON CONFLICT (version) DO UPDATE SET since_ms = excluded.since_ms, until_ms = excluded.until_ms, "
        "prices_date = excluded.prices_date",
        (entry.version, entry.since_ms, entry.until_ms, entry.prices_date),
    )


def _keep(connection: Connection, rows: Sequence[tuple[str, str, int | None, str | None]]) -> None:
    connection.execute_many(
        "INSERT INTO ledger_repriced (version, call_id, cost_nanousd, price_source) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (version, call_id) DO UPDATE SET cost_nanousd = excluded.cost_nanousd, "
        "price_source = excluded.price_source",
        rows,
    )


def _finish(connection: Connection, version: str) -> None:
    connection.execute("UPDATE ledger_repricings SET finished = 1 WHERE version = ?", (version,))


def _versions(connection: Connection) -> list[Version]:
    _make(connection)
    rows = connection.execute(
        "SELECT version, since_ms, until_ms, prices_date, finished FROM ledger_repricings ORDER BY version"
    )
    return [
        Version(version=version, since_ms=since, until_ms=until, prices_date=date, finished=bool(finished))
        for version, since, until, date, finished in rows
    ]


def _costs(connection: Connection, version: str, call_ids: Sequence[str]) -> list[RepricedCost]:
    _make(connection)
    found = []
    for call_id in sorted(set(call_ids)):
        for cost, source in connection.execute(
            "SELECT cost_nanousd, price_source FROM ledger_repriced WHERE version = ? AND call_id = ?",
            (version, call_id),
        ):
            found.append(RepricedCost(call_id=call_id, cost_nanousd=cost, price_source=source))
    return found


def _forget(connection: Connection, version: str) -> int:
    _make(connection)
    ((count,),) = connection.execute("SELECT count(*) FROM ledger_repriced WHERE version = ?", (version,))
    connection.execute("DELETE FROM ledger_repriced WHERE version = ?", (version,))
    connection.execute("DELETE FROM ledger_repricings WHERE version = ?", (version,))
    return int(count)
