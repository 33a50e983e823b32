"""The records of a period as a file: CSV, JSON Lines, Parquet or FOCUS.

    exported = await export(ledger, RecordQuery(since_ms=…, until_ms=…), "july.csv")
    exported.cost_usd            # to the nano-dollar what the ledger says of the period

Memory is bounded by a batch, however long the period is. Amounts are exact decimals in every format, never floats.
"""

from __future__ import annotations

import asyncio
import csv
import gzip as gzips
import hashlib
import io
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final, Literal, Protocol, cast, get_args

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import focus
from asgi_llm_guard.ledger.columns import ATTRIBUTED, PLAIN, Column, Row, dollars, to_json, to_text
from asgi_llm_guard.ledger.values import RecordQuery
from asgi_llm_guard.usage import UsageRecord

__all__ = ["BATCH", "Attribution", "Exported", "Format", "Progress", "Streams", "export"]

Format = Literal["csv", "jsonl", "parquet", "focus"]
Attribution = Literal["once", "each"]

BATCH: Final = 1_000
"""Records that are read at a time."""

Progress = Callable[[int], object]
"""Is told how many records are written."""


class Streams(Protocol):
    """A ledger, as far as an export needs it."""

    def stream(self, query: RecordQuery) -> AsyncIterator[Sequence[UsageRecord]]:
        """All records, the oldest first, in batches of `query.limit`."""
        ...


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the file."""

    records: int
    rows: int
    """More than the records where each department of a record has one."""
    cost_nanousd: int
    """Of the records whose cost is known, each once."""
    cost_usd: str
    """The same as exact decimal text."""
    unpriced: int
    """Records whose cost is unknown."""
    bytes: int
    sha256: str
    """Of the file as it was written, compressed or not."""


async def export(
    ledger: Streams,
    query: RecordQuery,
    target: str | Path | IO[bytes],
    format: Format = "csv",  # noqa: A002 - what everybody calls it
    *,
    departments: Attribution = "once",
    gzip: bool = False,
    billing_account: str = "asgi-llm-guard",
    progress: Progress | None = None,
) -> Exported:
    """Write the records of `query` to a path, or to something that is open for writing bytes.

    A path is replaced when everything was written; until then there is nothing, or what was there before. `limit` of the
    query plays no part.

    `departments`: `once` writes a row for each record, with all its departments in one column. `each` writes one for each
    department, with all of the cost, and says in `counted` which of them makes a grand total. `gzip`: compress the file.
    `billing_account`: what FOCUS calls `BillingAccountId`.

    Raises:
        ConfigurationError: a format or an attribution that there is not, or that do not go together.
        NotInstalledError: `parquet` without its library.
        NotKeptError: retention has removed records of the period; nothing is left under a path.
        StorageError: the ledger does not answer; nothing is left under a path.
        OSError: the target cannot be written.
    """
    make = _writer(format, departments, billing_account, gzip=gzip)
    totals = _Totals()
    with ExitStack() as stack:
        out = stack.enter_context(_replacing(target))
        sink = _Sink(out)
        body = stack.enter_context(_compressing(sink)) if gzip else cast("IO[bytes]", sink)
        writer = await asyncio.to_thread(make, body)
        async for batch in ledger.stream(msgspec.structs.replace(query, limit=BATCH)):
            rows = totals.add(batch, departments)
            await asyncio.to_thread(writer.write, rows)
            if progress is not None:
                progress(totals.records)
        await asyncio.to_thread(writer.finish)
    return Exported(
        records=totals.records,
        rows=totals.rows,
        cost_nanousd=totals.cost_nanousd,
        cost_usd=dollars(totals.cost_nanousd),
        unpriced=totals.unpriced,
        bytes=sink.written,
        sha256=sink.digest.hexdigest(),
    )


class _Totals:
    """Counts records as they are turned into rows."""

    def __init__(self) -> None:
        self.records = self.rows = self.cost_nanousd = self.unpriced = 0

    def add(self, records: Sequence[UsageRecord], departments: Attribution) -> list[Row]:
        rows: list[Row] = []
        for record in records:
            if record.cost_nanousd is None:
                self.unpriced += 1
            else:
                self.cost_nanousd += record.cost_nanousd
            if departments == "each" and record.departments:
                each = dict.fromkeys(record.departments)  # as reports do: one that is named twice is one
                rows += [Row(record, name, counted=not at) for at, name in enumerate(each)]
            else:
                rows.append(Row(record))
        self.records += len(records)
        self.rows += len(rows)
        return rows


# ------------------------------------------------------------------------------------- formats


class _Writer(Protocol):
    def write(self, rows: Sequence[Row], /) -> None: ...

    def finish(self) -> None: ...


def _writer(
    format: Format,  # noqa: A002 - as above
    departments: Attribution,
    billing_account: str,
    *,
    gzip: bool,
) -> Callable[[IO[bytes]], _Writer]:
    if format not in get_args(Format):
        raise ConfigurationError(f"format: expected {', '.join(get_args(Format))}, got {format!r}")
    if departments not in get_args(Attribution):
        raise ConfigurationError(f"departments: expected once or each, got {departments!r}")
    columns = PLAIN if departments == "once" else ATTRIBUTED
    if format == "csv":
        return lambda out: _CsvWriter(out, columns)
    if format == "jsonl":
        return lambda out: _JsonWriter(out, columns)
    if format == "focus":
        if departments == "each":
            raise ConfigurationError(
                "departments: FOCUS sums up BilledCost over all rows, so a record has one row there, and its departments "
                "are in x_Departments; use departments='once'"
            )
        if not billing_account:
            raise ConfigurationError("billing_account: FOCUS needs one, got an empty name")
        return lambda out: _CsvWriter(out, focus.columns(billing_account))
    if gzip:
        raise ConfigurationError("gzip: Parquet is compressed by itself; leave gzip out")
    from asgi_llm_guard.ledger.parquet import ParquetWriter

    return lambda out: ParquetWriter(out, columns)


class _CsvWriter:
    """UTF-8 with a header, lines as RFC 4180 has them."""

    def __init__(self, out: IO[bytes], columns: Sequence[Column]) -> None:
        self._out = out
        self._columns = columns
        self._put([[column.name for column in columns]])

    def write(self, rows: Sequence[Row]) -> None:
        columns = self._columns
        self._put([[to_text(kind, value(row)) for _, kind, value in columns] for row in rows])

    def finish(self) -> None:
        pass

    def _put(self, cells: Sequence[Sequence[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(cells)
        self._out.write(text.getvalue().encode("utf-8", "backslashreplace"))


class _JsonWriter:
    """An object on each line."""

    def __init__(self, out: IO[bytes], columns: Sequence[Column]) -> None:
        self._out = out
        self._columns = columns
        self._encoder = msgspec.json.Encoder()

    def write(self, rows: Sequence[Row]) -> None:
        columns = self._columns
        self._out.write(
            self._encoder.encode_lines(
                [{name: to_json(kind, value(row)) for name, kind, value in columns} for row in rows]
            )
        )

    def finish(self) -> None:
        pass


# -------------------------------------------------------------------------------------- targets


class _Sink(io.RawIOBase):
    """Counts what goes through."""

    def __init__(self, out: IO[bytes]) -> None:
        super().__init__()
        self._out = out
        self.written = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        data = bytes(memoryview(data))  # type: ignore[arg-type] # a buffer of whichever sort
        self._out.write(data)
        self.digest.update(data)
        self.written += len(data)
        return len(data)

    def tell(self) -> int:
        return self.written

    def close(self) -> None:
        """What it writes to is somebody else's."""


@contextmanager
def _compressing(sink: _Sink) -> Iterator[IO[bytes]]:
    """The same bytes for the same rows: without a name and an instant."""
    with gzips.GzipFile(filename="", mode="wb", fileobj=sink, mtime=0) as packed:
        yield cast("IO[bytes]", packed)


@contextmanager
def _replacing(target: str | Path | IO[bytes]) -> Iterator[IO[bytes]]:
    """Something to write to; a path only gets its file when all went well."""
    if not isinstance(target, (str, Path)):
        yield target
        return
    path = Path(target)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
