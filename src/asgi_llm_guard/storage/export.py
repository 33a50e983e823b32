"""A whole storage as lines of JSON: what `Storage.export` gives and `Storage.load` takes.

An export is one header line, one line for each value, and a last line with counts, sums and a
digest of all lines before it. Every storage writes the same lines, so what one has exported
another can load. Each line is an object with one member, which names what it is:

    {"export": {"schema": 1, "exported_ms": …}}
    {"cell": [key, kind, used, held, start, end, [[sub-bucket, used, held], …] | null]}
    {"member": [key, id, until_ms]}
    {"owner": [name, lapse_at_ms, lapsed_ms]}
    {"hold": [call_id, owner, at_ms, plan, receipts, draft]}
    {"tombstone": [call_id, [reason, until_ms, hold | null]]}
    {"record": {…}}
    {"end": {"cells": …, "used": …, "held": …, …, "sha256": "…"}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final, Literal, cast

import msgspec

from asgi_llm_guard.claims import Claim, Durable, Meter, OnOutage, Receipt, Rule, Unit
from asgi_llm_guard.errors import GuardError, StorageError
from asgi_llm_guard.storage.counting import Cell
from asgi_llm_guard.storage.state import Hold, Owner, Tombstone
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

__all__ = ["SCHEMA", "Line", "Snapshot", "cell_of_line", "parse_lines", "read_line", "write_line", "write_lines"]

SCHEMA: Final = 1
"""The version of the lines. Raised by every change that older code would misread."""

# ---------------------------------------------------------------------------- packed values

# Decoding straight into nested tuples makes a packed meter hashable, so that each one is built once.
_PackedWindow = tuple[int | str | bool, ...]
_Rest = tuple[bool, Literal["hold", "nothing"], bool, int | None, OnOutage, int, Durable | None]
_PackedMeter = tuple[
    str,
    str,
    str,
    str,
    str,
    str,
    int | None,
    _PackedWindow,
    bool,
    Literal["hold", "nothing"],
    bool,
    int | None,
    OnOutage,
    int,
    Durable | None,
]
_PackedReceipt = tuple[_PackedMeter, int, str | None, bool, bool, int, int, int, int | None]
_PackedHold = tuple[str, str, int, int, tuple[_PackedReceipt, ...], UsageRecord | None]
_PackedTombstone = tuple[Literal["settled", "cancelled", "expired"], int, _PackedHold | None]

_WINDOWS: Final[tuple[type[Window], ...]] = (Lifetime, Rolling, Calendar, Sliding, Bucket, Slots, Distinct)


def _flat_hold(hold: Hold) -> _PackedHold:
    return hold.call_id, hold.owner, hold.at_ms, hold.plan, tuple(map(_flat_receipt, hold.receipts)), hold.draft


def _hold(flat: _PackedHold) -> Hold:
    call_id, owner, at_ms, plan, receipts, draft = flat
    return Hold(call_id, owner, tuple(map(_receipt, receipts)), draft, at_ms, plan)


def _flat_tombstone(tombstone: Tombstone) -> _PackedTombstone:
    hold = tombstone.hold
    return tombstone.reason, tombstone.until_ms, None if hold is None else _flat_hold(hold)


def _tombstone(flat: _PackedTombstone) -> Tombstone:
    reason, until_ms, hold = flat
    return Tombstone(reason, until_ms, None if hold is None else _hold(hold))


def _flat_receipt(r: Receipt) -> _PackedReceipt:
    meter = _flat_meter(r.claim.meter)
    return meter, r.claim.amount, r.claim.member, r.taken, r.fits, r.used, r.held, r.pin, r.resets_at_ms


def _receipt(flat: _PackedReceipt) -> Receipt:
    meter, amount, member, taken, fits, used, held, pin, resets_at_ms = flat
    return Receipt(Claim(_meter(meter), amount, member), taken, fits, used, held, pin, resets_at_ms)


def _flat_meter(m: Meter) -> _PackedMeter:
    window = _flat_window(m.window)
    head = (m.key, m.policy, m.scope, m.subject, m.unit.value, m.rule.value, m.limit, window)
    return (*head, m.enforce, m.expiry_charge, m.owned, m.status, m.on_outage, m.lease, m.durable)


@lru_cache(maxsize=4096)
def _meter(flat: _PackedMeter) -> Meter:
    key, policy, scope, subject, unit, rule, limit, window, *rest = flat
    enforce, expiry_charge, owned, status, on_outage, lease, durable = cast("_Rest", tuple(rest))
    return Meter(
        key=key,
        policy=policy,
        scope=scope,
        subject=subject,
        unit=Unit(unit),
        rule=Rule(rule),
        limit=limit,
        window=_window(window),
        enforce=enforce,
        expiry_charge=expiry_charge,
        owned=owned,
        status=status,
        on_outage=on_outage,
        lease=lease,
        durable=durable,
    )


@lru_cache(maxsize=1024)
def _flat_window(window: Window) -> _PackedWindow:
    return (window.kind, *(getattr(window, name) for name in window.__struct_fields__))


@lru_cache(maxsize=1024)
def _window(flat: _PackedWindow) -> Window:
    kind, *fields = flat
    build = cast("Any", _WINDOWS[cast("int", kind)])
    return cast("Window", build(*fields))


# ------------------------------------------------------------------------------------ lines


class Snapshot(msgspec.Struct, kw_only=True):
    """The whole state of a storage at one instant. To be written, the parts may come from a cursor."""

    cells: Iterable[tuple[str, Cell]] = ()
    members: Iterable[tuple[str, str, int]] = ()
    """Meter key, id, until when; for one meter in the order in which they expire."""
    owners: Iterable[tuple[str, Owner]] = ()
    holds: Iterable[Hold] = ()
    tombstones: Iterable[tuple[str, Tombstone]] = ()
    """In the order in which they may be forgotten."""
    records: Iterable[UsageRecord] = ()


class _Sums(msgspec.Struct):
    """What the last line says of the lines before it."""

    cells: int = 0
    members: int = 0
    owners: int = 0
    holds: int = 0
    tombstones: int = 0
    records: int = 0
    used: int = 0
    held: int = 0
    cost_nanousd: int = 0
    sha256: str = ""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    schema: int
    exported_ms: int


_PackedCell = tuple[str, int, int, int, int, int, list[tuple[int, int, int]] | None]


class Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One line; exactly one member is set."""

    export: _Header | None = None
    cell: _PackedCell | None = None
    member: tuple[str, str, int] | None = None
    owner: tuple[str, int, int] | None = None
    hold: _PackedHold | None = None
    tombstone: tuple[str, _PackedTombstone] | None = None
    record: UsageRecord | None = None
    end: _Sums | None = None


_line_encoder: Final = msgspec.json.Encoder()
_line_decoder: Final = msgspec.json.Decoder(Line)


def write_line(line: Line) -> bytes:
    """One line, with its line feed."""
    return _line_encoder.encode(line) + b"\n"


def read_line(data: bytes, number: int = 1) -> Line:
    """One line; `number` is its place, for the message.

    Raises:
        StorageError: it is not a line of an export.
    """
    try:
        return _line_decoder.decode(data)
    except msgspec.DecodeError as error:
        raise StorageError(f"import: line {number} is not a line of an export: {error}") from error


def cell_of_line(packed: _PackedCell) -> tuple[str, Cell]:
    """The meter key and the cell of a line."""
    key, kind, used, held, start, end, parts = packed
    return key, Cell(kind, used, held, start, end, None if parts is None else {index: [u, h] for index, u, h in parts})


def write_lines(snapshot: Snapshot, now_ms: int) -> Iterator[bytes]:
    """The lines of an export, each with its line feed."""
    sums = _Sums()
    digest = hashlib.sha256()
    for line in _lines(snapshot, now_ms):
        _add(sums, line)
        data = write_line(line)
        digest.update(data)
        yield data
    sums.sha256 = digest.hexdigest()
    yield write_line(Line(end=sums))


def _lines(snapshot: Snapshot, now_ms: int) -> Iterator[Line]:
    yield Line(export=_Header(SCHEMA, now_ms))
    for key, cell in snapshot.cells:
        parts = None if cell.parts is None else [(index, used, held) for index, (used, held) in cell.parts.items()]
        yield Line(cell=(key, cell.kind, cell.used, cell.held, cell.start, cell.end, parts))
    for member in snapshot.members:
        yield Line(member=member)
    for name, owner in snapshot.owners:
        yield Line(owner=(name, owner.lapse_at_ms, owner.lapsed_ms))
    for hold in snapshot.holds:
        yield Line(hold=_flat_hold(hold))
    for call_id, tombstone in snapshot.tombstones:
        yield Line(tombstone=(call_id, _flat_tombstone(tombstone)))
    for record in snapshot.records:
        yield Line(record=record)


def _add(sums: _Sums, line: Line) -> None:
    if line.cell is not None:
        sums.cells += 1
        sums.used += line.cell[2]
        sums.held += line.cell[3]
    elif line.member is not None:
        sums.members += 1
    elif line.owner is not None:
        sums.owners += 1
    elif line.hold is not None:
        sums.holds += 1
    elif line.tombstone is not None:
        sums.tombstones += 1
    elif line.record is not None:
        sums.records += 1
        sums.cost_nanousd += line.record.cost_nanousd or 0


def parse_lines(lines: Iterable[bytes]) -> Snapshot:
    """The state that the lines of an export hold, checked against its last line.

    Raises:
        StorageError: not an export, one of another schema, cut short, or changed since; the message
            names the line.
    """
    cells: list[tuple[str, Cell]] = []
    members: list[tuple[str, str, int]] = []
    owners: list[tuple[str, Owner]] = []
    holds: list[Hold] = []
    tombstones: list[tuple[str, Tombstone]] = []
    records: list[UsageRecord] = []
    sums = _Sums()
    digest = hashlib.sha256()
    ended = False
    number = 0
    for data in lines:
        if not data.strip():
            continue
        number += 1
        line = read_line(data, number)
        if ended:
            raise StorageError(f"import: line {number} comes after the last line; load one export at a time")
        if number == 1 and (line.export is None or line.export.schema != SCHEMA):
            seen = "no header" if line.export is None else f"schema {line.export.schema}"
            raise StorageError(f"import: line 1: expected an export of schema {SCHEMA}, got {seen}")
        if line.end is not None:
            sums.sha256 = digest.hexdigest()
            _compare(line.end, sums)
            ended = True
            continue
        digest.update(data.rstrip(b"\r\n") + b"\n")
        _add(sums, line)
        try:
            if line.cell is not None:
                cells.append(cell_of_line(line.cell))
            elif line.member is not None:
                members.append(line.member)
            elif line.owner is not None:
                owners.append((line.owner[0], Owner(line.owner[1], line.owner[2])))
            elif line.hold is not None:
                holds.append(_hold(line.hold))
            elif line.tombstone is not None:
                tombstones.append((line.tombstone[0], _tombstone(line.tombstone[1])))
            elif line.record is not None:
                records.append(line.record)
        except (GuardError, ValueError, TypeError, IndexError) as error:  # a meter or window that cannot be
            raise StorageError(f"import: line {number} cannot be read: {error}") from error
    if not ended:
        raise StorageError(f"import: the export is cut short: line {number} is not a last line; export it again")
    return Snapshot(cells=cells, members=members, owners=owners, holds=holds, tombstones=tombstones, records=records)


def _compare(said: _Sums, counted: _Sums) -> None:
    for name in said.__struct_fields__:
        if getattr(said, name) != getattr(counted, name):
            raise StorageError(
                f"import: the last line says {name} = {getattr(said, name)}, the lines before it make "
                f"{getattr(counted, name)}; the file was changed or damaged, export it again"
            )
