"""What `where` means, as SQL: on the records, and on the series of rolled-up rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from asgi_llm_guard.ledger.tables import SETS
from asgi_llm_guard.sql import Dialect
from asgi_llm_guard.usage_rows import quoted

__all__ = ["column_of", "record_conditions", "series_conditions"]

_CONTAINS = {
    "sqlite": "EXISTS (SELECT 1 FROM json_each({column}) WHERE value = ?)",
    "postgresql": "jsonb_exists({column}::jsonb, ?)",
}


def column_of(name: str) -> str:
    """The column of the ledger that a dimension or a filter is about."""
    return f"{name}s" if name in {"department", "tag"} else name


def record_conditions(where: Mapping[str, str | None], dialect: Dialect) -> tuple[str, list[str]]:
    """` AND …` for rows of the ledger, and its parameters."""
    parameters: list[str] = []

    def conditions() -> Iterator[str]:
        for name, value in where.items():
            column = column_of(name)
            if value is None:
                yield f"{column} = '[]'" if column in SETS else f"{quoted(column)} IS NULL"
                continue
            parameters.append(value)
            yield _CONTAINS[dialect].format(column=column) if column in SETS else f"{quoted(column)} = ?"

    text = "".join(f" AND {condition}" for condition in conditions())
    return text, parameters


def series_conditions(where: Mapping[str, str | None]) -> tuple[str, list[str]]:
    """` AND …` for rows of ledger_series, named `s`, and its parameters."""
    parameters: list[str] = []

    def conditions() -> Iterator[str]:
        for name, value in where.items():
            column = column_of(name)
            if column in SETS:
                parameters.append("[]" if value is None else value)
                table, key = ("ledger_sets", "members") if value is None else ("ledger_members", "member")
                yield f"s.{column} IN (SELECT id FROM {table} WHERE {key} = ?)"  # noqa: S608 - our names
            elif value is None:
                yield f"s.{quoted(column)} IS NULL"
            else:
                parameters.append(value)
                yield f"s.{quoted(column)} = ?"

    text = "".join(f" AND {condition}" for condition in conditions())
    return text, parameters
