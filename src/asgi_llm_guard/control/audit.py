"""Who changed what: rows that are only ever added, in a chain of digests that shows where one is missing."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import msgspec

from asgi_llm_guard.control.changes import Actor, AuditEntry, AuditQuery, Verified, text_of
from asgi_llm_guard.control.state import Head
from asgi_llm_guard.sql import Connection

__all__ = ["Seals", "append", "find", "verify"]

_PERSON: Final = b"llm-guard-audit"
_BATCH: Final = "SELECT seq, at_ms, version, actor, role, address, verb, target, old, new, reason, refused, digest "


class Seals:
    """Makes the digest of a row: with the first secret, if there is one, so that nobody without it can make another."""

    __slots__ = ("_keys",)

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._keys = tuple(hashlib.blake2b(secret, digest_size=32, person=_PERSON).digest() for secret in secrets)

    def seal(self, previous: str, row: Sequence[object]) -> str:
        return _digest(previous, row, self._keys[0] if self._keys else b"")

    def check(self, previous: str, row: Sequence[object], digest: str) -> Literal["sealed", "unsealed", "wrong"]:
        """`unsealed`: it is sound, and could have been made without a secret."""
        if any(hmac.compare_digest(_digest(previous, row, key), digest) for key in self._keys):
            return "sealed"
        return "unsealed" if hmac.compare_digest(_digest(previous, row, b""), digest) else "wrong"


def _digest(previous: str, row: Sequence[object], key: bytes) -> str:
    content = msgspec.json.encode([previous, *row])
    return hashlib.blake2b(content, key=key, digest_size=32, person=_PERSON).hexdigest()


def append(
    connection: Connection,
    seals: Seals,
    head: Head,
    *,
    at_ms: int,
    version: int,
    actor: Actor,
    verb: str,
    target: str,
    old: Any = None,
    new: Any = None,
    reason: str = "",
    refused: str | None = None,
) -> Head:
    """Add a row after `head`; gives the new head. Whoever calls it has locked `control_meta`, and updates it."""
    row = (
        head.seq + 1,
        at_ms,
        version,
        actor.name,
        actor.role,
        actor.address,
        text_of(verb),
        text_of(target),
        None if old is None else msgspec.json.encode(old, order="deterministic").decode(),
        None if new is None else msgspec.json.encode(new, order="deterministic").decode(),
        text_of(reason),
        None if refused is None else text_of(refused),
    )
    digest = seals.seal(head.digest, row)
    connection.execute("INSERT INTO control_audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, digest))
    return Head(head.seq + 1, digest)


def find(connection: Connection, query: AuditQuery) -> list[AuditEntry]:
    """What a query asks for."""
    conditions: list[str] = ["at_ms >= ?"]
    values: list[object] = [query.since_ms]
    for condition, value in (
        ("at_ms < ?", query.until_ms),
        ("actor = ?", query.actor),
        ("verb = ?", query.verb),
        ("seq < ?", query.before),
    ):
        if value is not None:
            conditions.append(condition)
            values.append(value)
    if query.target is not None:
        whole_kind = query.target.endswith(":")
        conditions.append("SUBSTR(target, 1, ?) = ?" if whole_kind else "target = ?")
        values += [len(query.target), query.target] if whole_kind else [query.target]
    if query.refused is not None:
        conditions.append("refused IS NOT NULL" if query.refused else "refused IS NULL")
    where = " AND ".join(conditions)  # of the words above only
    rows = connection.execute(
        f"{_BATCH} FROM control_audit WHERE {where} ORDER BY seq DESC LIMIT ?",
        (*values, query.limit),
    )
    return [AuditEntry(**dict(zip(AuditEntry.__struct_fields__, row, strict=True))) for row in rows]


def verify(rows: Iterable[Sequence[Any]], seals: Seals, head: Head, since: Head | None) -> Verified:
    """Look through all rows, the oldest first, up to `head`, which is what `control_meta` says is the last."""
    last, unsealed = Head(0, ""), 0

    def broken(seq: int, why: str) -> Verified:
        return Verified(rows=last.seq, unsealed=unsealed, head=last, broken_at=seq, why=why)

    for *row, digest in rows:
        if row[0] != last.seq + 1:
            return broken(last.seq + 1, "a row is missing")
        state = seals.check(last.digest, row, digest)
        if state == "wrong":
            return broken(row[0], "the row was changed, or written with another secret")
        unsealed += state == "unsealed"
        last = Head(row[0], digest)
        if since is not None and since.seq == last.seq and since.digest != last.digest:
            return broken(row[0], "another row was there before")
    for known in (head, since):
        if known is not None and known.seq > last.seq:
            return broken(last.seq + 1, "rows at the end are missing")
    if head != last:
        return broken(head.seq, "the row was changed, or rows were added by somebody else")
    return Verified(rows=last.seq, unsealed=unsealed, head=last)
