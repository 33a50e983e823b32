"""What is done with the parts of a call over several shards: how plans are cut up, and how answers are put together.

All of it without I/O and without state; `sharded.py` has the rules.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from asgi_llm_guard.claims import Bundle, Claim, Meter, Plan, Reading, Receipt, Settled, Settlement
from asgi_llm_guard.storage.shard_calls import Group, Held
from asgi_llm_guard.windows import BUCKET, DISTINCT, SLIDING

__all__ = [
    "NOBODY",
    "Part",
    "Place",
    "call_of",
    "cut",
    "exact",
    "first_of",
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


# -------------------------------------------------------------------------------------- plans


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
