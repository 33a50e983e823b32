"""Exports as Parquet, a group of rows at a time. Amounts are decimals with nine places, instants are UTC."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import IO, Any, Final

from asgi_llm_guard.errors import NotInstalledError
from asgi_llm_guard.ledger.columns import Column, Kind, Row

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:  # pragma: no cover - tests have it
    raise NotInstalledError("export as parquet", "parquet") from error

__all__ = ["ParquetWriter"]

_TYPES: Final[dict[Kind, Any]] = {
    "text": pa.string(),
    "count": pa.int64(),
    "flag": pa.bool_(),
    "instant": pa.timestamp("ms", tz="UTC"),
    "money": pa.decimal128(20, 9),
    "texts": pa.list_(pa.string()),
}
_GROUP: Final = 10_000
"""Rows in a group: what is in memory at a time."""


class ParquetWriter:
    """Writes rows to `out`, which needs to be written and told only."""

    def __init__(self, out: IO[bytes], columns: Sequence[Column]) -> None:
        self._columns = columns
        self._schema = pa.schema([(column.name, _TYPES[column.kind]) for column in columns])
        self._writer = pq.ParquetWriter(out, self._schema, compression="zstd")
        self._waiting: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self._waiting += rows
        while len(self._waiting) >= _GROUP:
            self._flush(self._waiting[:_GROUP])
            del self._waiting[:_GROUP]

    def finish(self) -> None:
        if self._waiting:
            self._flush(self._waiting)
        self._waiting = []
        self._writer.close()

    def _flush(self, rows: Sequence[Row]) -> None:
        arrays = [
            pa.array([_value(column.kind, column.value(row)) for row in rows], _TYPES[column.kind])
            for column in self._columns
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(rows))


def _value(kind: Kind, value: Any) -> Any:
    return Decimal(value).scaleb(-9) if kind == "money" and value is not None else value
