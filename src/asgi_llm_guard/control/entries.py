"""One entry of the administration data, changed inside a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from asgi_llm_guard.control.changes import Change, Conflict, NotThere
from asgi_llm_guard.control.data import kind_of, read, written
from asgi_llm_guard.control.numbers import check_sizes
from asgi_llm_guard.control.state import NewerRelease, kept_row
from asgi_llm_guard.control.values import Key, Kind, Price, Value, check_kind, check_name, name_of
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.overlay import Raise
from asgi_llm_guard.pricing.overrides import key_of
from asgi_llm_guard.sql import Connection
from asgi_llm_guard.stops import Stop

__all__ = ["MAX_SIZE", "apply", "check_size", "entry_of", "target_of", "warm_prices"]

MAX_SIZE: Final = 4_000_000
"""The most characters that all entries may have together: every process reads them as one document."""


def target_of(change: Change) -> tuple[Kind, str]:
    """What a change is about.

    Raises:
        ConfigurationError: there is no such kind, the name is none, or what was seen is no version.
    """
    for part in "kind", "name", "expected":
        check_sizes(getattr(change, part), part)
    kind = check_kind(change.kind)
    name = check_name(kind, change.name)
    if kind == "price":
        name = key_of(name)  # one entry for all spellings of a model
    return kind, name


def apply(
    connection: Connection, change: Change, kind: Kind, name: str, version: int, now_ms: int
) -> tuple[Value | None, Value | None]:
    """Change one entry; what it was, and what it is now.

    Raises:
        ConfigurationError, Conflict, NotThere: nothing was changed.
    """
    there, data = _row(connection, kind, name)
    if change.expected is not None and change.expected != there:
        raise Conflict(kind, name, expected=change.expected, version=there, by=_changed_by(connection, kind, name))
    old = None if data is None else kept_row(kind, name, data)
    if change.value is None:
        if old is None:
            raise NotThere(kind, name)
        connection.execute("DELETE FROM control_entries WHERE kind = ? AND name = ?", (kind, name))
        return old, None
    new = _new(change, kind, name, old, now_ms)
    if new != old:
        kept = msgspec.json.encode(written(new), order="deterministic").decode()
        _check_kept(kind, name, kept)
        connection.execute(
            "INSERT INTO control_entries (kind, name, version, value) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (kind, name) DO UPDATE SET version = excluded.version, value = excluded.value",
            (kind, name, version, kept),
        )
    return old, new


def entry_of(connection: Connection, kind: Kind, name: str) -> tuple[Value | None, int]:
    """One entry and its version, whatever else there is; `None` and 0: there is none.

    Raises:
        NewerRelease: this release cannot read it.
    """
    there, data = _row(connection, kind, name)
    return (None if data is None else kept_row(kind, name, data)), there


def _row(connection: Connection, kind: Kind, name: str) -> tuple[int, str | None]:
    rows = connection.execute("SELECT version, value FROM control_entries WHERE kind = ? AND name = ?", (kind, name))
    return rows[0] if rows else (0, None)


def _new(change: Change, kind: Kind, name: str, old: Value | None, now_ms: int) -> Value:
    given = change.value
    if isinstance(given, Mapping):
        if kind == "key" and old is None:
            raise NotThere(kind, name)  # keys are made by `new_key`
        new = read(kind, name, given, old=old, ours=False)
        # What has ended is kept and exported, but nobody makes it.
        if isinstance(new, (Raise, Stop)):
            ends: int | None = new.until_ms
            if ends is not None and ends <= now_ms:
                raise ConfigurationError(f"{kind} {name!r}: until_ms: {ends} has passed")
    else:
        assert given is not None  # noqa: S101 - a removal, which was made before
        if kind_of(given) != kind:
            raise ConfigurationError(f"{kind} {name!r}: expected a {kind}, got a {type(given).__name__}")
        _check_names(given, name)
        new = read(kind, name, written(given))
        if isinstance(new, Key) and isinstance(old, Key) and old.revoked_ms is not None and new.revoked_ms is None:
            # As in a document of before, which must not bring a key back that has leaked since.
            new = msgspec.structs.replace(new, revoked_ms=old.revoked_ms)
    _check_price(new)
    return new


def _check_kept(kind: Kind, name: str, kept: str) -> None:
    """See that every process can read what is about to be kept: one entry that cannot be read keeps all others away.

    Raises:
        ConfigurationError: it cannot be.
    """
    try:
        kept_row(kind, name, kept)
    except NewerRelease as error:
        raise ConfigurationError(f"{kind} {name!r}: a value cannot be kept: {error}") from None


def _check_names(given: Value, name: str) -> None:
    """Models have several spellings, and raises and stops may be made without an id; others say their name."""
    said = name_of(given)
    if said in (name, "") or (isinstance(given, Price) and key_of(said) == name):
        return
    raise ConfigurationError(f"{kind_of(given)} {name!r}: the value says {said!r}")


def _check_price(value: Value) -> None:
    if isinstance(value, Price):
        from asgi_llm_guard.pricing import PriceBook

        PriceBook.snapshot(overrides={value.model: value.entry})


def warm_prices() -> None:
    """Reading the list of prices takes a moment: not while others wait for their turn to write."""
    from asgi_llm_guard.pricing.snapshot import bundled

    bundled()


def check_size(connection: Connection) -> None:
    ((size,),) = connection.execute("SELECT COALESCE(SUM(LENGTH(name) + LENGTH(value) + 40), 0) FROM control_entries")
    if size > MAX_SIZE:
        raise ConfigurationError(
            f"control: all entries together may have {MAX_SIZE} characters, and would have {size}; "
            "remove keys that are over, and raises and stops that have ended"
        )


def _changed_by(connection: Connection, kind: Kind, name: str) -> str | None:
    rows = connection.execute(
        "SELECT actor FROM control_audit WHERE target = ? AND refused IS NULL ORDER BY seq DESC LIMIT 1",
        (f"{kind}:{name}",),
    )
    return None if not rows else str(rows[0][0])
