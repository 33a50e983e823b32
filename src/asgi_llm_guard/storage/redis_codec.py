"""Values as the scripts in `lua/` read and write them, and back.

What the claims of a bundle have in common with those of all bundles like it (kinds and lengths of
windows, key prefixes, scopes, rules) is a *shape*: sent once, kept by the store under a digest, and
named by it from then on. A claim then is the end of its key, its amount and its limit.

All is MessagePack, of the kind the server's Lua library knows: text and bytes alike are "str".
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec

from asgi_llm_guard.claims import Bundle, Claim, Durable, Meter, Plan, Receipt, Rule, Settlement, Unit, escape
from asgi_llm_guard.usage import Usage, UsageRecord
from asgi_llm_guard.windows import (
    CALENDAR,
    DISTINCT,
    LIFETIME,
    ROLLING,
    SLIDING,
    SLOTS,
    Bucket,
    Calendar,
    Distinct,
    Lifetime,
    Rolling,
    Sliding,
    Slots,
    Window,
)

__all__ = ["Codec", "Flat", "pack_text", "read_record", "write_record"]

Flat = list[Any]
"""A script's argument before it is encoded: nested lists of numbers, texts and `None`."""

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder().decode

_decode_common: Final = msgspec.msgpack.Decoder(list[tuple[msgspec.Raw, int]]).decode

_MAX_METERS: Final = 10_000
"""How many meters are remembered in their written form; policies make one per subject and share it."""

_ENFORCED, _REFUNDED, _RENEWED, _SUBJECT = 1, 2, 4, 8
_WINDOWS: Final[dict[int, type[Window]]] = {
    window.kind: window for window in (Lifetime, Rolling, Calendar, Sliding, Bucket, Slots, Distinct)
}
_COMMON: Final = (
    "policy",
    "scope",
    "unit",
    "rule",
    "enforce",
    "expiry_charge",
    "owned",
    "status",
    "on_outage",
    "lease",
    "durable",
)


def pack_text(data: bytes) -> msgspec.Raw:
    """`data` as a MessagePack text, which for the server's Lua is any bytes."""
    length = len(data)
    if length < 1 << 16:
        return msgspec.Raw(b"\xda" + length.to_bytes(2, "big") + data)
    return msgspec.Raw(b"\xdb" + length.to_bytes(4, "big") + data)


# ---------------------------------------------------------------------------------- records

_FIELDS: Final = UsageRecord.__struct_fields__[1:]  # the call id stands beside the record
_USAGE_AT: Final = _FIELDS.index("usage")
_DEFAULTS: Final = {"departments": (), "tags": (), "outcome": "measured", "late": False}
_DEFAULTS_AT: Final = tuple((_FIELDS.index(name), value) for name, value in _DEFAULTS.items())


def write_record(record: UsageRecord) -> bytes:
    """A usage record without its call id: its fields in their order, what is as usual as `None`, the last of those left out."""
    values: list[Any] = list(msgspec.structs.astuple(record)[1:])
    if record.usage is not None:
        values[_USAGE_AT] = msgspec.structs.astuple(record.usage)
    for at, usual in _DEFAULTS_AT:
        if values[at] == usual:
            values[at] = None
    while values[-1] is None:
        values.pop()
    return _encode(values)


def read_record(call_id: str, data: bytes) -> UsageRecord:
    """The record that `write_record` gave these bytes for."""
    fields = dict(zip(_FIELDS, _decode(data), strict=False))
    for name, usual in _DEFAULTS.items():
        value = fields.get(name)
        fields[name] = usual if value is None else tuple(value) if isinstance(value, list) else value
    usage = fields.get("usage")
    if usage is not None:
        known = dict(zip(Usage.__struct_fields__, usage, strict=True))
        known["extra"] = msgspec.convert(known["extra"] or (), tuple[Usage, ...])
        fields["usage"] = Usage(**known)
    return UsageRecord(call_id=call_id, **fields)


# ----------------------------------------------------------------------------------- shapes


class _Template(NamedTuple):
    """What a claim has in common with those on other subjects' meters."""

    kind: int
    p1: int
    p2: int
    flags: int
    prefix: str
    common: bytes
    """The meter's other fields, in MessagePack."""
    subject_at: int
    """Which part of the key's end is the subject, from the last: -1, -2, …; 0: the subject is empty, or written out."""


class _Written(NamedTuple):
    """A meter in the form that claims on it need."""

    meter: Meter
    """Kept, so that its identity stays its own."""
    template: _Template
    suffix: str
    limit: int


class Shape(NamedTuple):
    """What a bundle's claims have in common with all bundles like it."""

    digest: str
    script: bytes
    """For the scripts: kind, p1, p2, flags and prefix of each claim."""
    common: bytes
    """For the client: the rest of each claim's meter."""
    durable: Durable | None
    """The most that one of its meters asks for."""


class Codec:
    """Plans, holds and settlements to the scripts' arguments, and their replies back."""

    def __init__(self) -> None:
        # By identity, for hashing a meter takes longer than writing it.
        self._written: dict[int, _Written] = {}
        self._shapes: dict[tuple[_Template, ...], Shape] = {}
        self._by_ids: dict[tuple[int, ...], Shape] = {}
        self._templates: dict[str, tuple[_Template, ...]] = {}
        self._learned: dict[str, Shape] = {}

    # -------------------------------------------------------------------------------- write

    def plans(self, owner: str, plans: Sequence[Plan], now_ms: int, shapes: list[Shape]) -> bytes:
        """The argument for `reserve`; adds to `shapes` what it refers to."""
        first = plans[0]
        flat: Flat = [owner, len(plans), len(first)]
        for bundle in first:
            flat.append(bundle.call_id)
        for plan in plans:
            for bundle in plan:
                self._bundle(flat, bundle, now_ms, shapes)
        return _encode(flat)

    def bundle(self, bundle: Bundle, now_ms: int, shapes: list[Shape]) -> bytes:
        """The argument for `amend`."""
        flat: Flat = []
        self._bundle(flat, bundle, now_ms, shapes)
        return _encode(flat)

    def _bundle(self, flat: Flat, bundle: Bundle, now_ms: int, shapes: list[Shape]) -> None:
        draft = bundle.draft
        shape = self._shape(bundle.claims)
        shapes.append(shape)
        flat.append(None if draft is None else pack_text(write_record(draft)))
        flat.append(shape.digest)
        self._claims(flat, bundle.claims, now_ms)

    def _claims(self, flat: Flat, claims: Iterable[Claim], now_ms: int) -> None:
        add = flat.append
        for claim in claims:
            written = self._written.get(id(claim.meter)) or self._write(claim.meter)
            add(written.suffix)
            template = written.template
            kind = template.kind
            if kind == DISTINCT:
                add(claim.member)
            if template.flags >= _SUBJECT:
                add(claim.meter.subject)
            add(claim.amount)
            add(written.limit)
            if kind == CALENDAR:
                flat += cast("Calendar", claim.meter.window).bounds(now_ms)

    def settlement(
        self, settlement: Settlement, now_ms: int, shapes: list[Shape], *, with_receipts: bool = False
    ) -> bytes:
        """The argument for `settle`."""
        record = settlement.record
        actuals = settlement.actuals
        flat: Flat = [
            settlement.call_id,
            None if record is None else record.call_id,
            None if record is None else pack_text(write_record(record)),
            len(actuals),
            *actuals,
            bool(settlement.receipts),
        ]
        flat.append(self._receipts(settlement.receipts, shapes) if with_receipts else None)
        if settlement.debits:
            shape = self._shape(settlement.debits)
            shapes.append(shape)
            debits: Flat = [shape.digest]
            self._claims(debits, settlement.debits, now_ms)
            flat.append(debits)
        else:
            flat.append(None)
        return _encode(flat)

    def _receipts(self, receipts: Sequence[Receipt], shapes: list[Shape]) -> Flat:
        shape = self._shape([receipt.claim for receipt in receipts])
        shapes.append(shape)
        flat: Flat = [shape.digest, 0]
        self.hold_claims(flat, receipts, at_ms=0)
        return flat

    def hold_claims(self, flat: Flat, receipts: Sequence[Receipt], *, at_ms: int) -> None:
        """Add the claims of a hold that was granted at `at_ms`, as the scripts store them."""
        for receipt in receipts:
            claim = receipt.claim
            written = self._written.get(id(claim.meter)) or self._write(claim.meter)
            kind = written.template.kind
            flat.append(written.suffix)
            if kind == DISTINCT:
                flat.append(claim.member)
            if written.template.flags >= _SUBJECT:
                flat.append(claim.meter.subject)
            pin = receipt.pin if kind in (SLIDING, SLOTS, DISTINCT) else at_ms - receipt.pin
            resets = receipt.resets_at_ms
            if resets is not None:
                resets -= receipt.pin + written.template.p1 if kind <= ROLLING else at_ms
            amount = claim.amount if receipt.taken else -1 - claim.amount
            flat += (amount, written.limit, receipt.used, receipt.held, pin, resets)

    def meters(self, meters: Iterable[Meter]) -> bytes:
        """The argument for `read` and `reset`."""
        flat: Flat = []
        for meter in meters:
            p1, p2 = _lengths(meter.window)
            flat += (meter.kind, p1, p2, -1 if meter.limit is None else meter.limit, meter.key)
        return _encode(flat)

    def shape_of(self, receipts: Sequence[Receipt]) -> Shape:
        """The shape of a hold's claims."""
        return self._shape([receipt.claim for receipt in receipts])

    def _shape(self, claims: Sequence[Claim]) -> Shape:
        written = self._written
        templates = []
        for claim in claims:
            known = written.get(id(claim.meter))
            templates.append((self._write(claim.meter) if known is None else known).template)
        key = tuple(map(id, templates))  # templates are interned, so that their identities tell them apart
        shape = self._by_ids.get(key)
        return shape or self._new_shape(tuple(templates), key)

    def _new_shape(self, templates: tuple[_Template, ...], key: tuple[int, ...]) -> Shape:
        shape = self._shapes.get(templates)
        if shape is None:
            flat: Flat = []
            for template in templates:
                flat += (template.kind, template.p1, template.p2, template.flags, template.prefix)
            script = _encode(flat)
            common = _encode([(pack_text(template.common), template.subject_at) for template in templates])
            digest = hashlib.blake2b(script + common, digest_size=6).digest()
            asked = {_decode(template.common)[_COMMON.index("durable")] for template in templates}
            durable: Durable | None = "disk" if "disk" in asked else "replica" if "replica" in asked else None
            shape = Shape(base64.b64encode(digest).decode(), script, common, durable)
            self._shapes[templates] = shape
            self._templates[shape.digest] = templates
        self._by_ids[key] = shape
        return shape

    def _write(self, meter: Meter) -> _Written:
        if len(self._written) >= _MAX_METERS:
            self._written.clear()
        head, colon, suffix = _split(meter.key)
        subject_at, flags = _subject_at(meter.subject, suffix)
        window = meter.window
        flags |= _ENFORCED * meter.enforce | _REFUNDED * (meter.expiry_charge == "nothing")
        flags |= _RENEWED * (meter.kind == LIFETIME and cast("Lifetime", window).renew)
        p1, p2 = _lengths(window)
        fields = [getattr(window, name) for name in window.__struct_fields__]
        common = _encode([*(getattr(meter, name) for name in _COMMON), fields])
        template = _intern(_Template(meter.kind, p1, p2, flags, head + colon, common, subject_at))
        written = _Written(meter, template, suffix, -1 if meter.limit is None else meter.limit)
        self._written[id(meter)] = written
        return written

    # --------------------------------------------------------------------------------- read

    def learn(self, digest: str, script: bytes, common: bytes) -> None:
        """Remember a shape that another process has made."""
        flat = _decode(script)
        templates = []
        for n, (written, subject_at) in enumerate(_decode_common(common)):
            kind, p1, p2, flags, prefix = flat[5 * n : 5 * n + 5]
            templates.append(_intern(_Template(kind, p1, p2, flags, prefix, _unpack(written), subject_at)))
        self._templates[digest] = tuple(templates)
        self._learned[digest] = Shape(digest, script, common, None)

    def all_shapes(self) -> list[Shape]:
        """Every shape that is known here, made or learned: for a store that has lost them."""
        return [*self._learned.values(), *self._shapes.values()]

    def knows(self, digest: str) -> bool:
        """Whether `claims` can read a hold of this shape."""
        return digest in self._templates

    def receipts(self, digest: str, rows: Sequence[Sequence[Any]]) -> tuple[Receipt, ...]:
        """A hold's receipts: for each claim suffix, id, subject, amount, limit, taken, used, held, pin, resets."""
        receipts = []
        for template, row in zip(self._templates[digest], rows, strict=True):
            suffix, member, subject, amount, limit, taken, used, held, pin, resets = row
            meter = _meter(template, suffix.decode(), subject.decode(), limit)
            claim = Claim(meter, amount, member.decode() if template.kind == DISTINCT else None)
            receipts.append(Receipt(claim, bool(taken), bool(taken), used, held, pin, None if resets < 0 else resets))
        return tuple(receipts)


_interned: dict[_Template, _Template] = {}


def _intern(template: _Template) -> _Template:
    """The one template that equals `template`: as many as there are policies and windows, so never forgotten."""
    return _interned.setdefault(template, template)


_KINDS_OF_SUBJECTS: Final = frozenset({"agent", "caller", "department", "model", "provider", "tag", "user"})
"""A part of the shape and not of the claim: there are few of them, whereas anything else may be somebody's id."""


def _split(key: str) -> tuple[str, str, str]:
    """Policy, unit, window and the kind of the subject; a colon; and the rest of a meter's key."""
    parts = key.split(":", 4)
    upto = 4 if len(parts) == 5 and parts[3] in _KINDS_OF_SUBJECTS else 3
    if len(parts) <= upto:
        return "", "", key
    return ":".join(parts[:upto]), ":", ":".join(parts[upto:])


def _subject_at(subject: str, suffix: str) -> tuple[int, int]:
    """Where in the key's end the subject stands, and the flag if it has to be written out."""
    if not subject:
        return 0, 0
    parts = suffix.split(":")
    written = escape(subject)
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] == written:
            return place - len(parts), 0
    return 0, _SUBJECT


_UNESCAPED: Final = {"%3A": ":", "%7B": "{", "%7D": "}", "%25": "%"}


def _unescape(part: str) -> str:
    for written, character in _UNESCAPED.items():
        part = part.replace(written, character)
    return part


def _lengths(window: Window) -> tuple[int, int]:
    if isinstance(window, Rolling):
        return window.period_ms, 0
    if isinstance(window, (Lifetime, Distinct)):
        return window.ttl_ms, 0
    if isinstance(window, Sliding):
        return window.bucket_ms, window.buckets
    if isinstance(window, Bucket):
        return window.period_ms, window.burst
    return 0, 0


def _meter(template: _Template, suffix: str, subject: str, limit: int) -> Meter:
    *common, window = _decode(template.common)
    fields = dict(zip(_COMMON, common, strict=True))
    fields["unit"], fields["rule"] = Unit(fields["unit"]), Rule(fields["rule"])
    if template.subject_at:
        subject = _unescape(suffix.split(":")[template.subject_at])
    return Meter(
        key=template.prefix + suffix,
        subject=subject,
        limit=None if limit < 0 else limit,
        window=_WINDOWS[template.kind](*window),
        **fields,
    )


def _unpack(text: msgspec.Raw) -> bytes:
    """The bytes that `pack_text` was given."""
    data = bytes(text)
    return data[3:] if data[0] == 0xDA else data[5:]
