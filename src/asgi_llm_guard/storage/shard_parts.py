"""What a storage over several shards is made of: where meters lie, how plans are cut up, how answers are put together.

All of it without I/O and without state; `sharded.py` has the rules.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Final, TypeVar

import msgspec

from asgi_llm_guard.claims import Bundle, Claim, Meter, Plan, Reading, Receipt, Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.storage.cells import Hold, Owner, Tombstone
from asgi_llm_guard.storage.export import Snapshot
from asgi_llm_guard.storage.pending import Handed, again
from asgi_llm_guard.usage import UsageRecord
from asgi_llm_guard.windows import BUCKET, DISTINCT, SLIDING

__all__ = [
    "NOBODY",
    "Chained",
    "Group",
    "Held",
    "Part",
    "Place",
    "Together",
    "call_of",
    "cut",
    "exact",
    "holds_of_call",
    "merge",
    "not_taken",
    "place_by_subject",
    "settled_of",
    "split",
    "state_of",
    "union",
]

Place = Callable[[str], int]
"""From the key of a meter to a number; modulo the number of shards, it is the meter's shard."""

NOBODY: Final = frozenset({"anonymous", "global"})
"""Kinds of subjects that have no name: what follows in a key is something else."""

_CALLERS: Final = frozenset({"session", "user", "caller"})
_SUB: Final = re.compile(r"~\d+(?:\.[0-9a-f.]+|@[0-9.]*)?$")
_PIECE: Final = re.compile(r"~\d+@([0-9.]*)$")

T = TypeVar("T")


def place_by_subject(key: str) -> int:
    """A number from the kind and the name of a meter's subject: the same for all policies, units and windows.

    What belongs to one caller is together: its own limits, those of its sessions, and their ids.
    """
    kind, _, rest = key.split(":", 3)[-1].partition(":")
    return zlib.crc32((kind if kind in NOBODY else f"{kind}:{rest.partition(':')[0]}").encode())


def call_of(call_id: str) -> str:
    """The call that a hold belongs to: its own id, without what names a group."""
    return _SUB.sub("", call_id) if "~" in call_id else call_id


def first_of(claims: Sequence[Claim]) -> Meter | None:
    """The meter whose shard is a plan's home."""
    for claim in claims:
        if claim.meter.scope in _CALLERS:
            return claim.meter
    return claims[0].meter if claims else None


# -------------------------------------------------------------------------------------- holds


class Group:
    """What one shard holds of a call."""

    __slots__ = ("call_id", "claims")

    def __init__(self, call_id: str, claims: tuple[Claim, ...]) -> None:
        self.call_id = call_id
        self.claims = claims
        """As they were last sent there. Once there, a meter keeps its place."""


class Held:
    """One call of this process whose claims lie in several shards."""

    __slots__ = ("asked", "claims", "groups", "home", "owner", "plan", "receipts")

    def __init__(self, owner: str, home: int, claims: tuple[Claim, ...], groups: dict[int, Group], plan: int) -> None:
        self.owner = owner
        self.home = home
        self.claims = claims
        self.groups = groups
        """By shard, without home. One without an id is another process's."""
        self.plan = plan
        self.receipts: tuple[Receipt, ...] = ()
        """Empty until it is granted."""
        self.asked = False
        """Home was asked: it may know of the call."""


class Part:
    """What one shard is asked for."""

    __slots__ = ("at", "bundles")

    def __init__(self) -> None:
        self.bundles: list[Bundle] = []
        self.at: list[int] = []
        """For each claim its place in the whole plan."""

    @property
    def claims(self) -> Iterator[Claim]:
        return (claim for bundle in self.bundles for claim in bundle.claims)


def cut(plan: Plan, home: int, place: Place, name: Callable[[str, int], str]) -> dict[int, Part]:
    """A plan by shards. Home has all bundles, even empty ones; the others have theirs under the ids that `name` gives."""
    parts = {home: Part()}
    at = 0
    for bundle in plan:
        claims: dict[int, list[Claim]] = {home: []}
        for claim in bundle.claims:
            shard = place(claim.meter.key)
            claims.setdefault(shard, []).append(claim)
            parts.setdefault(shard, Part()).at.append(at)
            at += 1
        for shard, some in claims.items():
            own = Bundle(bundle.call_id, tuple(some), bundle.draft)
            parts[shard].bundles.append(own if shard == home else Bundle(name(bundle.call_id, shard), tuple(some)))
    return parts


def union(group: Group, wanted: Mapping[str, Claim]) -> tuple[Claim, ...]:
    """What holds the old claims and the wanted ones alike. What was there keeps its place, the new is at the end."""
    left = dict(wanted)
    claims = []
    for old in group.claims:
        new = left.pop(old.meter.key, None)
        claims.append(old if new is None else Claim(new.meter, max(old.amount, new.amount), new.member))
    return (*claims, *left.values())


def exact(claims: Iterable[Claim], wanted: Mapping[str, Claim]) -> tuple[Claim, ...]:
    """Of a union only what is wanted: nothing of the rest, which keeps its place."""
    return tuple(
        [
            wanted.get(claim.meter.key)
            or (claim if claim.meter.kind == DISTINCT else Claim(claim.meter, 0, claim.member))
            for claim in claims
        ]
    )


# -------------------------------------------------------------------------------------- states


def not_taken(receipt: Receipt) -> Receipt:
    """The same state, of a claim that is not held."""
    r = receipt
    return Receipt(r.claim, False, r.fits, r.used, r.held, r.pin, r.resets_at_ms) if r.taken else r


def state_of(claim: Claim, reading: Reading, mine: int, now_ms: int) -> Receipt:
    """The state of a claim that was not judged, from a reading of its meter of which `mine` is this call's own."""
    meter = claim.meter
    held = max(0, reading.held - mine)
    fits = meter.limit is None or reading.used + held + claim.amount <= meter.limit
    resets = reading.resets_at_ms
    if fits and meter.kind in (SLIDING, BUCKET):
        resets = now_ms
    elif meter.limit is not None and claim.amount > meter.limit:
        resets = None
    return Receipt(claim, False, fits, reading.used, held, 0, resets)


# ---------------------------------------------------------------------------------- settlements


def split(call: Held, settlement: Settlement) -> tuple[Settlement, list[tuple[int, Settlement]]]:
    """A settlement, but for its debits, by the groups of its call: that of home, and those of the others."""
    given: dict[str, int | None] = {}
    if settlement.actuals:
        actuals = (*settlement.actuals, *(None,) * len(call.claims))
        given = {claim.meter.key: actual for claim, actual in zip(call.claims, actuals, strict=False)}
    amounts = {claim.meter.key: claim.amount for claim in call.claims}
    receipts = {receipt.claim.meter.key: receipt for receipt in settlement.receipts}
    away = {claim.meter.key for group in call.groups.values() for claim in group.claims}
    rest = []
    for shard, group in call.groups.items():
        if not group.call_id:
            continue
        if not call.asked:  # home will refuse it, so that nothing comes of it
            rest.append((shard, Settlement(group.call_id, ())))
            continue
        part: list[int | None] = []
        theirs: list[Receipt] = []
        for claim in group.claims:
            key = claim.meter.key
            actual = given.get(key, 0)
            part.append(amounts[key] if actual is None and amounts[key] != claim.amount else actual)
            theirs.append(receipts.get(key) or Receipt(claim, False, False, 0, 0, 0, None))
        some = any(claim.meter.key in receipts for claim in group.claims)
        actuals = tuple(part) if settlement.actuals else ()
        rest.append((shard, Settlement(group.call_id, actuals, None, tuple(theirs) if some else ())))
    home = Settlement(
        settlement.call_id,
        tuple([given[claim.meter.key] for claim in call.claims if claim.meter.key not in away]) if given else (),
        settlement.record,
        tuple([receipt for receipt in settlement.receipts if receipt.claim.meter.key not in away]),
    )
    return home, rest


def settled_of(call: Held, home: Settled, others: Sequence[tuple[int, Settled]]) -> Settled:
    """The answer for a whole call: what home says, with the overages of all groups in the order of its claims."""
    if not home.overages and (home.status in ("duplicate", "cancelled") or not any(s.overages for _, s in others)):
        return home
    over: dict[str, int] = {}
    for shard, settled in others:
        for claim, overage in zip(call.groups[shard].claims, settled.overages, strict=False):
            over[claim.meter.key] = overage
    away = {claim.meter.key for group in call.groups.values() for claim in group.claims}
    theirs = iter(home.overages)
    overages = [over.get(claim.meter.key, 0) if claim.meter.key in away else next(theirs, 0) for claim in call.claims]
    return Settled(home.call_id, home.status, tuple(overages))


class Together:
    """One answer made of several. A `Pending`; it fails when all are there and one has failed."""

    __slots__ = ("_lock", "_make", "_pendings", "_waited")

    def __init__(
        self,
        pendings: Sequence[Pending[tuple[Settled, ...]]],
        make: Callable[[Sequence[tuple[Settled, ...]]], tuple[Settled, ...]],
    ) -> None:
        self._pendings = pendings
        self._make = make
        self._lock = threading.Lock()
        self._waited = 0

    def done(self) -> bool:
        return all(pending.done() for pending in self._pendings)

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        until = None if timeout is None else monotonic() + timeout
        answers: list[tuple[Settled, ...] | StorageError] = []
        for pending in self._pendings:
            try:
                answers.append(pending.result(None if until is None else max(0.0, until - monotonic())))
            except StorageError as error:
                answers.append(error)
        return self._of(answers)

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        answers: list[tuple[Settled, ...] | StorageError] = []
        for pending in self._pendings:
            try:
                answers.append((yield from pending.__await__()))
            except StorageError as error:
                answers.append(error)
        return self._of(answers)

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        left = [len(self._pendings)]

        def one(_: Pending[tuple[Settled, ...]]) -> None:
            with self._lock:
                left[0] -= 1
                last = not left[0]
            if last:
                callback(self)

        for pending in self._pendings:
            pending.add_done_callback(one)

    def _of(self, answers: Sequence[tuple[Settled, ...] | StorageError]) -> tuple[Settled, ...]:
        good = []
        for answer in answers:
            if isinstance(answer, StorageError):
                raise again(answer) from answer.__cause__
            good.append(answer)
        return self._make(good)


class Chained:
    """An answer that asks for one more. A `Pending`; `then` is called once, by whoever hears of the first one first."""

    __slots__ = ("_first", "_lock", "_second", "_then")

    def __init__(
        self,
        first: Pending[tuple[Settled, ...]],
        then: Callable[[tuple[Settled, ...]], Pending[tuple[Settled, ...]]],
    ) -> None:
        self._first = first
        self._then = then
        self._lock = threading.RLock()
        self._second: Pending[tuple[Settled, ...]] | None = None
        first.add_done_callback(self._heard)

    def _heard(self, _: Pending[tuple[Settled, ...]]) -> None:
        self._next()

    def _next(self) -> Pending[tuple[Settled, ...]]:
        """The second one; the first is there."""
        with self._lock:
            if self._second is None:
                try:
                    self._second = self._then(self._first.result())
                except StorageError as error:
                    failed: Handed[tuple[Settled, ...]] = Handed()
                    failed.decide(None, error)
                    self._second = failed
            return self._second

    def done(self) -> bool:
        return self._first.done() and self._next().done()

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        until = None if timeout is None else monotonic() + timeout
        self._first.result(timeout)
        return self._next().result(None if until is None else max(0.0, until - monotonic()))

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        yield from self._first.__await__()
        return (yield from self._next().__await__())

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        def first(_: Pending[tuple[Settled, ...]]) -> None:
            self._next().add_done_callback(lambda _: callback(self))

        self._first.add_done_callback(first)


# --------------------------------------------------------------------------------------- copies


def holds_of_call(hold: Hold, home: int, place: Place) -> dict[int, Hold]:
    """A hold by shards, each with its receipts. The ids of the others say which places their receipts have."""
    at: dict[int, list[int]] = {home: []}
    for number, receipt in enumerate(hold.receipts):
        at.setdefault(place(receipt.claim.meter.key), []).append(number)
    return {
        shard: msgspec.structs.replace(
            hold,
            call_id=hold.call_id if shard == home else f"{hold.call_id}~{shard}@{'.'.join(map(str, numbers))}",
            receipts=tuple([hold.receipts[number] for number in numbers]),
            draft=hold.draft if shard == home else None,
        )
        for shard, numbers in at.items()
    }


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The state of all shards as that of one storage."""
    owners: dict[str, Owner] = {}
    tombstones: dict[str, Tombstone] = {}
    records: dict[str, UsageRecord] = {}
    for snapshot in snapshots:
        for name, owner in snapshot.owners:
            mine = owners.setdefault(name, Owner(0))
            mine.lapse_at_ms = max(mine.lapse_at_ms, owner.lapse_at_ms)
            mine.lapsed_ms = max(mine.lapsed_ms, owner.lapsed_ms)
        for call_id, tombstone in snapshot.tombstones:
            known = tombstones.get(call_id)
            if known is None or known.reason == "cancelled":
                tombstones[call_id] = tombstone
        for record in snapshot.records:
            records[record.call_id] = record
    holds = _joined({hold.call_id: hold for snapshot in snapshots for hold in snapshot.holds})
    expired = _joined({call_id: t.hold for call_id, t in tombstones.items() if t.hold is not None})
    ended = [
        (call_id, msgspec.structs.replace(tombstone, hold=expired.get(call_id)))
        for call_id, tombstone in tombstones.items()
        if tombstone.hold is None or call_id in expired
    ]
    return Snapshot(
        cells=[cell for snapshot in snapshots for cell in snapshot.cells],
        members=[member for snapshot in snapshots for member in snapshot.members],
        owners=sorted(owners.items()),
        holds=sorted(holds.values(), key=lambda hold: (hold.at_ms, hold.call_id)),
        tombstones=sorted(ended, key=lambda entry: (entry[1].until_ms, entry[0])),
        records=sorted(records.values(), key=lambda record: (record.at_ms, record.call_id)),
    )


def _joined(holds: dict[str, Hold]) -> dict[str, Hold]:
    """Holds with those put together again that `holds_of_call` has cut up, as far as all of a call are there."""
    pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for call_id in holds:
        piece = _PIECE.search(call_id)
        if piece is not None and call_id[: piece.start()] in holds:
            places = tuple([int(number) for number in piece[1].split(".") if number])
            pieces.setdefault(call_id[: piece.start()], []).append((call_id, places))
    for call_id, parts in sorted(pieces.items(), key=lambda piece: -len(piece[0])):  # pieces of pieces first
        home = holds[call_id]
        receipts = dict[int, Receipt]()
        for piece_id, places in parts:
            receipts.update(zip(places, holds.pop(piece_id).receipts, strict=True))
        theirs = iter(home.receipts)
        total = len(receipts) + len(home.receipts)
        whole = tuple([receipts[n] if n in receipts else next(theirs) for n in range(total)])
        holds[call_id] = msgspec.structs.replace(home, receipts=whole)
    return holds
