"""Holds and tombstones as rows, in MessagePack.

A hold names its meters by what is theirs alone (key and subject) and a number for the rest, which
many meters share: its *template*. So a hold takes some 100 bytes per claim and not 400.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from asgi_llm_guard.claims import Claim, Meter, Receipt, Rule, Unit
from asgi_llm_guard.storage.state import Hold
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

__all__ = ["HoldCodec"]

_WINDOWS: Final[dict[int, type[Window]]] = {
    window.kind: window for window in (Lifetime, Rolling, Calendar, Sliding, Bucket, Slots, Distinct)
}
_TEMPLATE: Final = (
    "policy",
    "scope",
    "unit",
    "rule",
    "limit",
    "enforce",
    "expiry_charge",
    "owned",
    "status",
    "on_outage",
    "lease",
    "durable",
)
_MAX_METERS: Final = 10_000
"""How many meters are remembered in their written form; policies make one per subject and share it."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

# ------------------------------------------------------------------------------------ holds


class HoldCodec:
    """Holds to bytes and back. Keeps the templates' numbers, which are rows of the file.

    After a rollback the numbers given out in between mean nothing: make a new codec.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._numbers: dict[bytes, int] = {}
        self._templates: dict[int, dict[str, Any]] = {}
        # By identity, for hashing a meter takes longer than writing it; the meter is kept, so that
        # its identity stays its own.
        self._written: dict[int, tuple[Meter, msgspec.Raw]] = {}

    def encode(self, hold: Hold) -> bytes:
        written = self._written
        receipts = []
        for receipt in hold.receipts:
            claim = receipt.claim
            known = written.get(id(claim.meter))
            receipts.append(
                (
                    self._write(claim.meter) if known is None else known[1],
                    claim.amount,
                    claim.member,
                    receipt.taken,
                    receipt.fits,
                    receipt.used,
                    receipt.held,
                    receipt.pin,
                    receipt.resets_at_ms,
                )
            )
        draft = hold.draft
        return _encode(
            (
                hold.call_id,
                hold.owner,
                receipts,
                None if draft is None else msgspec.structs.astuple(draft),
                hold.at_ms,
                hold.plan,
            )
        )

    def decode(self, data: bytes) -> Hold:
        call_id, owner, receipts, draft, at_ms, plan = _decode(data)
        return Hold(
            call_id,
            owner,
            tuple(
                Receipt(Claim(self._meter(*meter), amount, member), *state)
                for meter, amount, member, *state in receipts
            ),
            None if draft is None else _record_of_values(draft),
            at_ms,
            plan,
        )

    def _write(self, meter: Meter) -> msgspec.Raw:
        if len(self._written) >= _MAX_METERS:
            self._written.clear()
        raw = msgspec.Raw(_encode((self._number(meter), meter.key, meter.subject)))
        self._written[id(meter)] = (meter, raw)
        return raw

    def _number(self, meter: Meter) -> int:
        window = meter.window
        common = [getattr(meter, name) for name in _TEMPLATE]
        data = _encode([*common, window.kind, [getattr(window, name) for name in window.__struct_fields__]])
        number = self._numbers.get(data)
        if number is None:
            self._connection.execute("INSERT INTO templates (data) VALUES (?) ON CONFLICT DO NOTHING", (data,))
            row = self._connection.execute("SELECT id FROM templates WHERE data = ?", (data,)).fetchone()
            number = self._numbers[data] = cast("int", row[0])
        return number

    def _meter(self, number: int, key: str, subject: str) -> Meter:
        template = self._templates.get(number)
        if template is None:
            row = self._connection.execute("SELECT data FROM templates WHERE id = ?", (number,)).fetchone()
            *common, kind, fields = _decode(row[0])
            template = dict(zip(_TEMPLATE, common, strict=True))
            template["unit"], template["rule"] = Unit(template["unit"]), Rule(template["rule"])
            template["window"] = _WINDOWS[kind](*fields)
            self._templates[number] = template
        return Meter(key=key, subject=subject, **template)


def _record_of_values(values: Sequence[Any]) -> UsageRecord:
    fields = dict(zip(UsageRecord.__struct_fields__, values, strict=True))
    return msgspec.convert(fields, UsageRecord)
