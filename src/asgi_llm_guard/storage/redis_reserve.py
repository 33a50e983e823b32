"""Reserving and amending in Redis: asked again while the store wants to know more, or where a connection broke.

A call whose reply was lost is asked again under the same call ids and finds what it has done. What is not known even
then is told as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from asgi_llm_guard.claims import Bundle, Claim, Durable, Ended, Granted, Plan, Receipt, Refused
from asgi_llm_guard.errors import DataLost, StorageError
from asgi_llm_guard.storage.mistakes import called_twice, claimed_twice, no_member, no_plan, not_open
from asgi_llm_guard.storage.redis_codec import Shape
from asgi_llm_guard.storage.redis_hello import Greeting
from asgi_llm_guard.storage.redis_holds import Holds
from asgi_llm_guard.storage.redis_link import LinkError
from asgi_llm_guard.storage.redis_loops import Connected, Lanes
from asgi_llm_guard.storage.redis_namespace import Namespace
from asgi_llm_guard.storage.redis_owners import Owners
from asgi_llm_guard.storage.redis_refusals import Refusals
from asgi_llm_guard.storage.redis_replies import amended, granted, refused
from asgi_llm_guard.storage.redis_scripts import AMEND
from asgi_llm_guard.windows import DISTINCT

__all__ = ["Reserving"]

_MOST_ASKED: Final = 5
_REMEMBERED: Final = 1024
_STILL_UNKNOWN: Final = (
    "redis: a second try does not fit, but what became of the first, whose connection broke, is unknown"
)

_ENDED: Final = {b"settled": "settled", b"cancelled": "cancelled", b"expired": "expired", b"unknown": "unknown"}


class Reserving:
    """`RedisStorage.reserve` and `amend`."""

    def __init__(
        self, namespace: Namespace, lanes: Lanes, greeting: Greeting, owners: Owners, holds: Holds, refusals: Refusals
    ) -> None:
        self._namespace = namespace
        self._lanes = lanes
        self._greeting = greeting
        self._owners = owners
        self._holds = holds
        self._refusals = refusals
        self._unknown: set[str] = set()
        """Call ids of which it is not known whether the store holds them."""

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        _check(plans)
        namespace = self._namespace
        lane = self._lanes.lane()
        if namespace.lost is not None:
            raise DataLost(namespace.lost)
        if self._lanes.several:
            await self._lanes.settled_elsewhere(lane)
        claims: tuple[Claim, ...] = ()
        forgotten = 0
        if self._refusals.remember_s and len(plans) == 1:
            claims = plans[0][0].claims if len(plans[0]) == 1 else tuple([c for b in plans[0] for c in b.claims])
            remembered = self._refusals.of(claims)
            if remembered is not None and plans[0][0].call_id not in self._unknown:
                return remembered
            forgotten = self._refusals.forgotten
        if not namespace.epoch:
            await self._greeting.hello(lane)
        sent = False
        for asked in range(_MOST_ASKED):
            shapes: list[Shape] = []
            argument = namespace.codec.plans(owner, plans, namespace.now_ms(), shapes)
            namespace.will_send(shapes)
            try:
                before = tuple(lane.lane.unsettled)
                now_ms, epoch, reply = await lane.lane.reserve(argument, _durable(shapes))
            except LinkError as error:
                sent |= error.sent
                if asked or self._lanes.closed or not lane.link_up:
                    if sent:
                        self._is_unknown(plans[0])
                        if not error.sent:
                            raise _sent_before(error) from error
                    raise
                continue  # the connection broke: once more, under the same call ids
            namespace.heard(now_ms)
            if reply is None:
                namespace.data_lost(epoch)
                continue
            code = reply[0]
            if code == 1:
                return granted(plans[reply[1]], reply, now_ms)
            if code == 0:
                if before and asked < _MOST_ASKED - 1 and await lane.overtook(before):
                    continue
                if sent:
                    # The first try may arrive yet, and be granted: it has to be cancelled, and who is refused cancels nothing.
                    self._is_unknown(plans[0])
                    raise LinkError(_STILL_UNKNOWN, sent=True)
                answer = refused(plans, reply, now_ms)
                if claims and forgotten == self._refusals.forgotten:
                    self._refusals.remember(claims, answer)
                return answer
            if code == 2:
                return Ended(plans[0][reply[1] - 1].call_id, cast("Any", _ENDED[reply[2]]), now_ms)
            if code == 3:
                return await self._replayed(lane, reply, now_ms)
            if code == 7:
                raise not_open(plans[0][reply[1] - 1].call_id)
            await self._prepare(lane, code, owner)
        raise StorageError("redis: the store keeps asking for the reservation once more; nothing was taken")

    async def amend(self, owner: str, bundle: Bundle) -> Granted | Refused | Ended:
        _check(((bundle,),))
        namespace = self._namespace
        lane = self._lanes.lane()
        if namespace.lost is not None:
            raise DataLost(namespace.lost)
        if self._lanes.several:
            await self._lanes.settled_elsewhere(lane)
        if not namespace.epoch:
            await self._greeting.hello(lane)
        sent = False
        for asked in range(_MOST_ASKED):
            shapes: list[Shape] = []
            argument = namespace.codec.bundle(bundle, namespace.now_ms(), shapes)
            namespace.will_send(shapes)
            arguments = namespace.reserve_arguments([owner.encode(), bundle.call_id.encode(), argument])
            before = tuple(lane.lane.unsettled)
            lane.lane.flush()
            durable = _durable(shapes)
            try:
                changed = lane.submit(AMEND, arguments)
                confirmed = None if durable is None else lane.confirm(durable)
                reply = await changed
                if confirmed is not None:
                    await confirmed
            except LinkError as error:
                sent |= error.sent
                if asked or self._lanes.closed or not lane.link_up:
                    if sent and not error.sent:
                        raise _sent_before(error) from error
                    raise
                continue
            now_ms, epoch, answer = reply
            namespace.heard(now_ms)
            if answer == b"lost":
                namespace.data_lost(epoch)
                continue
            code = answer[0]
            if code == 0 and before and asked < _MOST_ASKED - 1 and await lane.overtook(before):
                continue
            if code == 0 and sent:
                raise LinkError(_STILL_UNKNOWN, sent=True)
            if code < 2:
                return amended(bundle, answer, now_ms)
            if code == 2:
                return Ended(bundle.call_id, cast("Any", _ENDED[answer[1]]), now_ms)
            await self._prepare(lane, code, owner)
        raise StorageError("redis: the store keeps asking for the change once more; nothing was changed")

    async def _prepare(self, lane: Connected, code: int, owner: str) -> None:
        """Do what has to be done before the same is asked again."""
        if code == 4:
            await self._owners.ask(lane, b"sweep", owner)
        elif code == 6:  # else a calendar window was over: the answer's clock says which one is current
            self._namespace.will_send_all()

    async def _replayed(self, lane: Connected, reply: Any, now_ms: int) -> Granted:
        receipts: list[Receipt] = []
        for digest, _at, *rows in reply[3]:
            receipts += await self._holds.receipts(lane, digest.decode(), rows)
        return Granted(tuple(receipts), now_ms, reply[1], True)

    def _is_unknown(self, plan: Plan) -> None:
        """The store may hold these call ids. Who asks for them again is to be told what became of them."""
        if len(self._unknown) >= _REMEMBERED:
            self._unknown.clear()
        self._unknown.update(bundle.call_id for bundle in plan)


def _sent_before(error: LinkError) -> LinkError:
    """What the last try failed with, where an earlier one may have been executed."""
    return LinkError(f"{error}; an earlier try may have been executed", sent=True, code=error.code)


def _durable(shapes: Sequence[Shape]) -> Durable | None:
    """The most that any of them asks for."""
    found: Durable | None = None
    for shape in shapes:
        if shape.durable is not None:
            found = "disk" if "disk" in (shape.durable, found) else shape.durable
    return found


def _check(plans: Sequence[Plan]) -> None:
    """Refuse what no storage takes, before anything is sent.

    Raises:
        ValueError: no plan, two claims on one meter or two bundles under one call id, or a `Distinct`
            claim without a member.
    """
    if not plans:
        raise no_plan()
    if len(plans[0]) > 1 and len({bundle.call_id for bundle in plans[0]}) < len(plans[0]):
        raise called_twice()
    for plan in plans:
        keys = [claim.meter.key for bundle in plan for claim in bundle.claims]
        if len(set(keys)) < len(keys):
            raise claimed_twice(next(key for key in keys if keys.count(key) > 1))
        for bundle in plan:
            for claim in bundle.claims:
                if claim.meter.kind == DISTINCT and claim.member is None:
                    raise no_member(claim.meter)
