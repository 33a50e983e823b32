"""The sessions that are alive: who calls in them, what they have cost, and how much of their limit they have used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from asgi_llm_guard.admin.desk import Desk
from asgi_llm_guard.admin.gathered import held_nanousd
from asgi_llm_guard.claims import Meter, Rule
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.denials.receipts import capacity
from asgi_llm_guard.standing import claimed_meters
from asgi_llm_guard.storage.shared import OpenCall

__all__ = ["MOST_SESSIONS", "ORDERS", "Iterated", "LiveSession", "LiveSessions", "Order", "iterated", "live_sessions"]

_LIVE_MS: Final = 3_600_000
MOST_SESSIONS: Final = 2_000
"""So many are looked through for a name or an order, the latest."""
_ANY_CALL: Final = Call(model="any", cost_nanousd=0)

Order = Literal["last", "cost", "calls"]
ORDERS: Final[dict[Order, str]] = {"last": "Last call", "cost": "Cost", "calls": "Calls"}


class LiveSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session that made calls lately, or makes one."""

    caller: str | None
    session: str | None
    user: str | None
    agent: str | None
    departments: tuple[str, ...]
    first_ms: int
    last_ms: int
    calls: int
    """Settled ones."""
    cost_nanousd: int
    unpriced: int
    open: int
    held_nanousd: int


class LiveSessions(NamedTuple):
    """Those that were found."""

    sessions: Sequence[LiveSession]
    tells_open: bool
    """Whether the storage can tell which calls are open."""
    whole: bool
    """Whether these were chosen from all of the hour, and not from the latest of them."""


class Iterated(msgspec.Struct, frozen=True, kw_only=True):
    """How far a session is on its way to the end of its iterations."""

    used: int
    """Counted ones, open ones included."""
    limit: int | None
    """As policies and agents say it: a limit of the caller's own is not known here. `None`: there is none."""


async def live_sessions(desk: Desk, *, limit: int = 200, find: str = "", order: Order = "last") -> LiveSessions:
    """Sessions with calls within the last hour, those with open calls first.

    `find`: only those with this text in their own name or that of their caller, user, agent or a department.
    """
    calls = await desk.open_calls()
    found: dict[tuple[str | None, str | None], LiveSession] = {}
    whole = True
    if desk.ledger is not None:
        since_ms = max(0, desk.now_ms - _LIVE_MS)
        most = limit if order == "last" and not find else MOST_SESSIONS
        latest = await desk.ledger.sessions(since_ms=since_ms, limit=most + 1)
        whole = len(latest) <= most
        for each in latest[:most]:
            found[each.caller, each.session] = LiveSession(
                caller=each.caller,
                session=each.session,
                user=each.user,
                agent=each.agent,
                departments=each.departments,
                first_ms=each.first_ms,
                last_ms=each.last_ms,
                calls=each.calls,
                cost_nanousd=each.cost_nanousd,
                unpriced=each.unpriced,
                open=0,
                held_nanousd=0,
            )
    for call in calls or ():
        if call.draft is not None:
            key = (call.draft.caller, call.draft.session)
            found[key] = _with(found.get(key), call)
    wanted = find.casefold()
    chosen = [each for each in found.values() if not wanted or any(wanted in name.casefold() for name in _names(each))]
    chosen.sort(key=lambda each: (-min(each.open, 1), -_rank(each, order), -each.last_ms))
    return LiveSessions(chosen[:limit], calls is not None, whole)


def _rank(session: LiveSession, order: Order) -> int:
    return {"last": session.last_ms, "cost": session.cost_nanousd, "calls": session.calls}[order]


def _names(session: LiveSession) -> list[str]:
    given = (session.session, session.caller or "anonymous", session.user, session.agent, *session.departments)
    return [name for name in given if name is not None]


def _with(known: LiveSession | None, call: OpenCall) -> LiveSession:
    draft = call.draft
    assert draft is not None, "looked at before"  # noqa: S101
    session = known or LiveSession(
        caller=draft.caller,
        session=draft.session,
        user=draft.user,
        agent=draft.agent,
        departments=draft.departments,
        first_ms=call.at_ms,
        last_ms=call.at_ms,
        calls=0,
        cost_nanousd=0,
        unpriced=0,
        open=0,
        held_nanousd=0,
    )
    return msgspec.structs.replace(
        session,
        user=session.user or draft.user,
        last_ms=max(session.last_ms, call.at_ms),
        first_ms=min(session.first_ms, call.at_ms),
        open=session.open + 1,
        held_nanousd=session.held_nanousd + held_nanousd(call),
    )


async def iterated(desk: Desk, sessions: Sequence[LiveSession]) -> list[Iterated | None]:
    """The iterations of each, of which most is used; `None`: nothing counts them. One read of the storage for all."""
    meters = [
        [meter for meter in _claimed(desk, each) if meter.rule is Rule.ITERATIONS and meter.scope == "session"]
        for each in sessions
    ]
    raised = desk.guard.raised([meter for several in meters for meter in several])
    readings = iter(zip(raised, await desk.guard.storage.read(raised), strict=True))
    found = []
    for several in meters:
        counted = [
            Iterated(used=reading.used + reading.held, limit=None if meter.limit is None else capacity(meter))
            for meter, reading in (next(readings) for _ in several)
        ]
        found.append(min(counted, key=_left, default=None))
    return found


def _left(told: Iterated) -> float:
    return float("inf") if told.limit is None else told.limit - told.used


def _claimed(desk: Desk, session: LiveSession) -> list[Meter]:
    context = Context(
        caller=session.caller,
        user=session.user,
        departments=session.departments,
        agent=session.agent,
        session=session.session,
    )
    return claimed_meters(desk.guard.policies, context, _ANY_CALL, desk.now_ms)
