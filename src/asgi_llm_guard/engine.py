"""The engine: asks policies, reserves, waits for the holds of others, settles, and keeps the owner alive.

It knows policies, storages and prices by their protocols only. What it does for one request or
job is in `admission.py`; how it is configured is in `guard.py`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

from asgi_llm_guard.background import keep_alive, let_go
from asgi_llm_guard.charge import FIRST, Attempt, draft
from asgi_llm_guard.chores import Chores
from asgi_llm_guard.claims import Bundle, Claim, Ended, Granted, Meter, Refused, Rule, Settled, Settlement, Unit
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.denials import check_approval_url, deny, refuse, with_approval
from asgi_llm_guard.describe import Describer
from asgi_llm_guard.errors import ConfigurationError, DataLost, StorageError
from asgi_llm_guard.events import (
    Admission,
    BacklogFull,
    Expired,
    Observer,
    SettledCall,
    ShadowMisfit,
    SlotOverrun,
    StorageFailed,
    StorageRecovered,
    emit,
)
from asgi_llm_guard.events import DataLost as DataLostEvent
from asgi_llm_guard.events import Refused as RefusedEvent
from asgi_llm_guard.holds import Asking, Hold, Reserved
from asgi_llm_guard.loss import Totals
from asgi_llm_guard.outage import Fallback, lifted_bundle
from asgi_llm_guard.overlay import Raise, Raises
from asgi_llm_guard.plan import Asked, ask, only_rates
from asgi_llm_guard.policies.base import AgentAware, Leased, Policy, SessionAware
from asgi_llm_guard.policies.providers import provider_of
from asgi_llm_guard.session_ids import SessionIds, counted_as, overflows
from asgi_llm_guard.stops import Stop, Stops
from asgi_llm_guard.storage.base import Completed, Interruptible, Leasing, LossAware, Pending, Selective, Storage, Verbs
from asgi_llm_guard.usage import Usage
from asgi_llm_guard.waiters import Answer, Waiters

if TYPE_CHECKING:
    from asgi_llm_guard.cache import ResponseCache

__all__ = ["Asking", "Candidate", "Engine", "Hold", "OnDataLoss", "Reserved", "State"]

_log = logging.getLogger("asgi_llm_guard")

_NONE: AbstractSet[str] = frozenset()
_MOST_SEEN: Final = 1_000
_MOST_UNSETTLED: Final = 10_000
"""How many cancellations are kept while the storage does not answer."""
_HANDED_OVER: Final = 256
"""How many settlements are handed over in one step: the first of them also show whether the storage is back."""
_CHARGED: Final = frozenset({Unit.NANOUSD, Unit.TOKENS})
_SLOTS: Final = Unit.SLOTS  # kept: looking it up costs more than the rest of the loop that asks for it

_UNAVAILABLE: Final = Refusal(
    policy="guard",
    code="guard_unavailable",
    message="The usage store does not answer, so this call cannot be admitted. Try again in a moment.",
)

State = Literal["ok", "failed", "lost"]
OnDataLoss = Literal["deny", "accept", "rebuild"]


Candidate = tuple[Sequence[Policy], Call | None]
"""A call that could be made, and the policies that it is asked of."""

_Offer = tuple[int, Asked]
"""The number of a candidate that no policy refuses by itself, and what its policies claim."""
_Plans = tuple[tuple[Bundle, ...], ...]


class Follows(Protocol):
    """Follows what operators change while calls are made."""

    async def closed(self) -> Refusal | None:
        """Why nothing may be admitted yet; `None`: something may."""
        ...

    def bound(self, policy: Policy, /) -> None:
        """A policy was bound: what it keeps to is followed from now on."""
        ...

    def forked(self) -> None:
        """This is a child process now: nothing runs in it yet."""
        ...


class Engine:
    """One guard's engine: everything that is shared by its requests."""

    def __init__(
        self,
        *,
        storage: Storage,
        describer: Describer,
        clock: Clock,
        observers: Sequence[Observer],
        hold_wait_s: float,
        max_waiting: int,
        max_overage: int | None,
        disclose: Literal["owned", "all"],
        statuses: Mapping[Code | Rule, int],
        session_limit: int,
        anonymous_session_limit: int,
        session_overflow: Literal["deny", "share"],
        session_ttl_ms: int,
        agents: Mapping[str, Mapping[str, object]],
        sources: Sequence[str],
        local_storage: Callable[[], Storage],
        with_leases: Callable[[Storage], Leasing],
        on_data_loss: OnDataLoss = "deny",
        jitter: Callable[[int], int] | None = None,
        approval_url: str | None = None,
    ) -> None:
        self.approval_url = check_approval_url(approval_url)
        self.storage = storage
        self.verbs: Verbs = storage
        """What is asked: the storage, or something around it that measures how long it takes."""
        self._around: Callable[[Storage], Verbs] | None = None
        self.cache: ResponseCache | None = None
        """What the guard keeps answers in."""
        self._with_leases = with_leases
        self._leasing: Leasing | None = None
        self._interruptible = storage if isinstance(storage, Interruptible) else None
        self._loss_aware = storage if isinstance(storage, LossAware) else None
        self.on_data_loss: OnDataLoss = on_data_loss
        self._local_storage = local_storage
        self._selective = storage if isinstance(storage, Selective) else None
        self.describer = describer
        self.clock = clock
        self.observers = tuple(observers)
        self.hold_wait_s = hold_wait_s
        self.max_overage = max_overage
        self.disclose: Literal["owned", "all"] = disclose
        self.statuses = statuses
        self.session_overflow = session_overflow
        self.state: State = "ok"
        self.since_ms = clock.now_ms()
        """When `state` changed last."""
        self.beat_ms: int | None = None
        """When the storage answered a heartbeat last; `None`: never."""
        self.skew_ms = 0
        """How far its clock was ahead of this process's then."""
        self.last_error: str | None = None
        """The class of the last error of the storage."""
        self._backlog_told = False
        self._closed = False
        self._agents = agents
        self._sources = sources
        self._session_ids = SessionIds(session_limit, anonymous_session_limit, session_ttl_ms)
        self._jitter = jitter or _jitter
        self.chores = Chores()
        """What is done from time to time."""
        self.raises: Raises | None = None
        """Limits that are higher for a while; `None`: none is."""
        self.stops: Stops | None = None
        """What may call no more; `None`: nothing is stopped."""
        self._raises: list[Sequence[Raise]] = [(), ()]
        self._stops: list[Sequence[Stop]] = [(), ()]
        """By code, and as administration data: both hold together."""
        self.seen: dict[tuple[str, str], Policy] = {}
        """Policies that were bound, by their kind and name: those of routes and functions among them."""
        self.stopping: list[Callable[[Stops], object]] = []
        """Who ends what is running when something is stopped."""
        self.forking: list[Callable[[], object]] = []
        """Who is told that this is a child process now."""
        self.gate: Callable[[], Awaitable[Refusal | None]] | None = None
        """Why nothing may be admitted yet; `None`: something may."""
        self._follower: Follows | None = None
        self._waiters = Waiters(hold_wait_s, max_waiting)
        self._unsettled: deque[Settlement] = deque()
        self._tried: set[str] = set()
        """Calls that were settled without an answer: if they turn out to be settled, it was by us."""
        self._new_owner()
        reference = weakref.ref(self)

        def after_fork() -> None:
            engine = reference()
            if engine is not None:
                engine._new_owner()  # noqa: SLF001 - its own method, through a weak reference
                for tell in engine.forking:
                    tell()
                if engine._follower is not None:  # noqa: SLF001 - as above
                    engine._follower.forked()  # noqa: SLF001 - as above

        os.register_at_fork(after_in_child=after_fork)

    def _new_owner(self) -> None:
        # A forked child is another owner, or its call ids would repeat its parent's.
        self.owner = os.urandom(9).hex()
        self._numbers = itertools.count(1)
        self._slots: dict[str, Hold] = {}
        self._retaken: dict[str, Hold] = {}
        self._retake: deque[Hold] = deque()
        self._here = Fallback(self._local_storage, self.clock)
        rebuilds = self.on_data_loss == "rebuild" and self._loss_aware is not None
        self._totals = Totals(self.clock) if rebuilds else None
        self._epoch = ""
        self._state_lock = threading.Lock()
        self._accepting: concurrent.futures.Future[bool] | None = None
        self._alive = False
        self.chores.forked()

    def set_raises(
        self, raises: Sequence[Raise], policies: Sequence[Policy] = (), *, administered: bool = False
    ) -> None:
        """From now on these limits are higher, each until it ends, and no others but those that were set the other way:
        by code, or as administration data. From any thread.

        Raises:
            ConfigurationError: one of them cannot be, for one of the `policies`; nothing was changed.
        """
        laid = Raises(raises)
        for each in laid.raises:
            each.check(policies)
        with self._state_lock:
            self._raises[administered] = laid.raises
            self.raises = Raises((*self._raises[False], *self._raises[True])) or None

    def set_stops(self, stops: Sequence[Stop], *, administered: bool = False) -> None:
        """From now on these may call no more, each until it ends, and no others but those that were set the other way: by
        code, or as administration data. What is running ends. From any thread.

        Raises:
            ConfigurationError: one of them is no `Stop`; nothing was changed.
        """
        stopped = Stops(stops)
        with self._state_lock:
            self._stops[administered] = stopped.stops
            stopped = Stops((*self._stops[False], *self._stops[True]))
            self.stops = stopped or None
        for tell in self.stopping:
            tell(stopped)

    def stopped(self, context: Context, call: Call | None) -> Refusal | None:
        """The refusal of a request or call that is stopped now; `None`: it may be made."""
        stops = self.stops
        stop = None if stops is None else stops.find(context, call, self.clock.now_ms())
        return None if stop is None else stop.refusal

    def raised(self, meters: Sequence[Meter]) -> tuple[Meter, ...]:
        """The meters under the limits that hold now."""
        raises = self.raises
        return tuple(meters) if raises is None else raises.meters(meters, self.clock.now_ms())

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell `observer` every event from now on, until what is given is called."""
        self.observers = (*self.observers, observer)

        def stop() -> None:
            self.observers = tuple([each for each in self.observers if each is not observer])

        return stop

    def measure(self, around: Callable[[Storage], Verbs] | None) -> None:
        """Ask the storage through what `around` makes of it; `None`: directly."""
        self._around = around
        self.verbs = self.storage if around is None else around(self.storage)

    def follow(self, follower: Follows) -> None:
        """Admit nothing until `follower` has loaded what it follows, and tell it of every policy that is bound."""
        self._follower, self.gate = follower, follower.closed

    def new_id(self) -> str:
        """A call id, unique over all processes and restarts."""
        return f"{self.owner}-{next(self._numbers):x}"

    def bind(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """`policies`, told of the agents and of where session ids come from.

        Raises:
            ConfigurationError: something else is among them, or one that the storage cannot keep.
        """
        bound = self._bound(policies)
        if self._selective is None and self._leasing is None and _lease(bound):
            self.storage = self._leasing = self._with_leases(self.storage)
            self.measure(self._around)
        self.know(bound)
        return bound

    def bind_later(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """As `bind`, while calls are admitted. Nothing is changed by it: `know` those that come to be in force.

        Raises:
            ConfigurationError: as `bind`; or they are the first that lease, which cannot begin with calls that are open.
        """
        bound = self._bound(policies)
        if self._leasing is None and _lease(bound):
            raise ConfigurationError("lease: no policy had any when the service was started; start it again")
        return bound

    def _bound(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        if isinstance(policies, Policy) or not isinstance(policies, Sequence):
            raise ConfigurationError(f"policies: expected a list such as [Iterations(25)], got {policies!r}")
        bound: list[Policy] = []
        for policy in policies:
            if not isinstance(policy, Policy):
                raise ConfigurationError(f"policies: expected policies such as Iterations(25), got {policy!r}")
            known: Policy = policy
            if isinstance(known, AgentAware):
                known = known.with_agents(self._agents)
            if isinstance(known, SessionAware):
                known = known.with_sources(self._sources)
            bound.append(known)
        if bound and self._selective is not None:
            self._selective.check(bound)
        return tuple(bound)

    def know(self, policies: Sequence[Policy], *, instead_of: Sequence[Policy] = ()) -> None:
        """These that were bound are in force, and those that they replace are not any more."""
        for policy in instead_of:
            key = type(policy).__name__, policy.name
            if self.seen.get(key) is policy:
                del self.seen[key]
        for policy in policies:
            if self._follower is not None:
                self._follower.bound(policy)
            if len(self.seen) < _MOST_SEEN:  # names may be made up for each job
                self.seen[type(policy).__name__, policy.name] = policy

    # ------------------------------------------------------------------------------ reserve

    async def reserve(
        self,
        policies: Sequence[Policy],
        context: Context,
        call: Call | None,
        *,
        requests: bool = True,
        calls: bool = True,
        taken: AbstractSet[str] = _NONE,
        clamp: bool = False,
        shared: bool = False,
        rates: bool = False,
        attempt: Attempt = FIRST,
    ) -> Reserved | Denied:
        """Ask the policies, and take what they claim in one step. A `Denied` has changed nothing.

        `requests`, `calls`: which policies are asked. `taken`: meters that an enclosing scope
        holds. `clamp`: where only the output bound does not fit, hold for what does. `shared`: the
        session is one of those beyond its caller's bound, which count as one. `rates`: take nothing else.
        `attempt`: which one of its call this is.
        """
        answer = await self.reserve_any(
            ((policies, call),), context,
            requests=requests, calls=calls, taken=taken, clamp=clamp, shared=shared, rates=rates, attempt=attempt,
        )  # fmt: skip
        return answer[0] if isinstance(answer, list) else answer

    async def reserve_any(
        self,
        candidates: Sequence[Candidate],
        context: Context,
        *,
        requests: bool = True,
        calls: bool = True,
        taken: AbstractSet[str] = _NONE,
        clamp: bool = False,
        shared: bool = False,
        rates: bool = False,
        attempt: Attempt = FIRST,
    ) -> Reserved | list[Denied]:
        """As `reserve`, for the first of several candidates that fits, in one step: `Reserved.candidate` says which.

        A list has the refusal of each candidate, in order; then nothing was changed.
        """
        if not self._alive:
            self._alive = True
            keep_alive(self)
            self.chores.begin()
        if self.gate is not None and (closed := await self.gate()) is not None:
            shut = self._refuse(closed, self.clock.now_ms())
            return self.tell_refused(context, [(call, shut) for _, call in candidates])
        clamps = 2 if clamp else 0
        while True:
            now_ms = self.clock.now_ms()
            counted = counted_as(context, shared=shared)
            denied: dict[int, Denied] = {}
            offers: list[_Offer] = []
            stops, raises = self.stops, self.raises
            for index, (policies, call) in enumerate(candidates):
                if stops is not None and (stopped := self.stopped(context, call)) is not None:
                    denied[index] = self._refuse(stopped, now_ms)
                    continue
                asked = ask(policies, counted, call, now_ms, requests=requests, calls=calls, taken=taken)
                if asked.shadow_refusals:
                    self._shadow_refused(asked, context, call)
                if asked.refusal is not None:
                    denied[index] = self._refuse(asked.refusal, now_ms)
                else:
                    if raises is not None:
                        asked = raises.asked(asked, now_ms)
                    offers.append((index, only_rates(asked) if rates else asked))
            if offers:
                plans = self._plans(offers, candidates, context, now_ms, attempt, calls=calls, shared=shared)
                answer, plans, degraded = await self._ask_storage(plans)
                if isinstance(answer, Granted):
                    index, asked = offers[answer.plan]
                    plan, call = plans[answer.plan], candidates[index][1]
                    return self._granted(
                        asked, plan, answer, context, call, shared=shared, degraded=degraded, candidate=index
                    )
                if self.session_overflow == "share" and not shared and any(map(overflows, answer)):
                    shared = True
                    continue
                for (index, _), verdict in zip(offers, answer, strict=True):
                    policies, call = candidates[index]
                    if isinstance(verdict, Refusal):
                        denied[index] = self._refuse(verdict, now_ms)
                    else:
                        denied[index] = self._deny(_in_order(verdict, policies), call)
            if clamps and (smaller := self._clamped(candidates, denied)) is not None:
                candidates = smaller
                clamps -= 1
                continue
            return self.tell_refused(context, [(call, denied[index]) for index, (_, call) in enumerate(candidates)])

    def _clamped(self, candidates: Sequence[Candidate], denied: Mapping[int, Denied]) -> Sequence[Candidate] | None:
        """The candidates, with a lower output bound where only that was too much; `None`: it was for none."""
        smaller = [
            (
                policies,
                self.describer.clamped(call, most) if call is not None and (most := why.fits_max_tokens) else call,
            )
            for (policies, call), (_, why) in zip(candidates, sorted(denied.items()), strict=True)
        ]
        changed = any(one is not other for (_, one), (_, other) in zip(smaller, candidates, strict=True))
        return smaller if changed else None

    async def amend(
        self,
        hold: Hold,
        policies: Sequence[Policy],
        context: Context,
        call: Call | None,
        *,
        taken: AbstractSet[str] = _NONE,
        shared: bool = False,
        asking: Asking | None = None,
        attempt: Attempt = FIRST,
        growing: bool = False,
        one_of: bool = False,
    ) -> Hold | Denied | None:
        """Change an open hold to what the policies claim for `call`. `None`: the hold is gone (it expired).

        `asking` says, should this be cancelled, whether the hold may have been changed. `growing`: the call is on
        its way and only needs more: nobody is waited for, and it is not told as another admission. `one_of`: where this
        is refused, another one may be asked for; whoever asks tells of refusals (`tell_refused`).
        """
        now_ms = self.clock.now_ms()
        if (stopped := self.stopped(context, call)) is not None:
            return self._denied(context, call, self._refuse(stopped, now_ms), told=not one_of)
        asked = ask(policies, counted_as(context, shared=shared), call, now_ms, requests=False, taken=taken)
        if self.raises is not None:
            asked = self.raises.asked(asked, now_ms)
        if asked.shadow_refusals:
            self._shadow_refused(asked, context, call)
        if asked.refusal is not None:
            return self._denied(context, call, self._refuse(asked.refusal, now_ms), told=not one_of)
        ids = tuple(claim for claim in hold.claims if claim.meter.rule is Rule.IDS)
        claims = ids + asked.calls
        if claims == hold.claims:
            return _drafted(hold, context, call, attempt)
        at_ms = hold.draft.at_ms if hold.draft is not None and _same_amounts(hold.claims, claims) else now_ms
        bundle = Bundle(hold.call_id, claims, draft(hold.call_id, context, call, at_ms, attempt))
        asking = asking or Asking()
        degraded = False
        answer: Answer | Refusal
        try:
            answer = await self._amend(bundle, asking)
            if isinstance(answer, Refused) and self.hold_wait_s and not growing:
                answer = await self._waiters.wait(answer, lambda: self._amend(bundle, asking))
        except DataLost as error:
            asking.unknown = False
            answer = Ended(hold.call_id, "unknown", now_ms) if await self._lose(error) else _UNAVAILABLE
        except StorageError as error:
            asking.unknown &= error.sent
            self._storage_failed(error)
            answer = _UNAVAILABLE
            if self._here.may_decide(claims):
                call_id = self.new_id()  # rule 3 of `outage.py`
                bundle = Bundle(call_id, claims, draft(call_id, context, call, now_ms, attempt))
                answer, degraded = await self._here.amend(self.owner, hold.call_id, bundle), True
        else:
            if self.failed:
                self._recovered()
            if isinstance(answer, Granted):
                self._here.forget(hold.call_id)  # the storage had granted it after all
        if isinstance(answer, Refusal):
            return self._denied(context, call, self._refuse(answer, now_ms), told=not one_of)
        if isinstance(answer, Ended):
            if hold.degraded or answer.reason == "unknown":
                self._give_back(hold)  # nothing was charged for it
            return None
        if isinstance(answer, Refused):
            return self._denied(context, call, self._deny(_in_order(answer, policies), call), told=not one_of)
        amended = Hold(bundle.call_id, claims, answer.receipts, bundle.draft, degraded)
        if degraded:
            asking.unknown = False
            self._give_back(hold)
        self._keep(amended)
        if self.observers and not growing:
            self._observe(context, call, answer, amended.call_id, degraded=degraded)
        return amended

    async def _amend(self, bundle: Bundle, asking: Asking) -> Granted | Refused | Ended:
        if self._unsettled:
            await self._reconcile()
        self._check_available()
        asking.unknown = True
        answer = await self.verbs.amend(self.owner, bundle)
        asking.unknown = False
        return answer

    def _give_back(self, hold: Hold) -> None:
        """Nothing was used of it, whatever the storage knows of it."""
        self.settle([Settlement(hold.call_id, (), None, hold.receipts)])

    def _plans(
        self,
        offers: Sequence[_Offer],
        candidates: Sequence[Candidate],
        context: Context,
        now_ms: int,
        attempt: Attempt,
        *,
        calls: bool,
        shared: bool,
    ) -> tuple[tuple[Bundle, ...], ...]:
        """A plan for each offer, all with the same ids: one for the call, and one for the request where any needs it."""
        call_id = self.new_id() if calls else ""
        if len(offers) == 1:  # nearly always, so it is spared the steps of the others
            index, asked = offers[0]
            call_claims, request_claims = self._claims(asked, context, calls=calls, shared=shared)
            if not calls:
                return ((Bundle(self.new_id(), request_claims),) if request_claims else (),)
            bundle = Bundle(call_id, call_claims, draft(call_id, context, candidates[index][1], now_ms, attempt))
            return ((bundle, Bundle(self.new_id(), request_claims)) if request_claims else (bundle,),)
        claims = [self._claims(asked, context, calls=calls, shared=shared) for _, asked in offers]
        request_id = self.new_id() if any(request_claims for _, request_claims in claims) else ""
        plans = []
        for (index, _), (call_claims, request_claims) in zip(offers, claims, strict=True):
            request = (Bundle(request_id, request_claims),) if request_id else ()
            if calls:
                record = draft(call_id, context, candidates[index][1], now_ms, attempt)
                plans.append((Bundle(call_id, call_claims, record), *request))
            else:
                plans.append(request)
        return tuple(plans)

    def _claims(
        self, asked: Asked, context: Context, *, calls: bool, shared: bool
    ) -> tuple[tuple[Claim, ...], tuple[Claim, ...]]:
        """What the call and the request claim, the id of the session included."""
        if context.session is None or shared:
            return asked.calls, asked.requests
        ids = self._session_ids.claim(context, asked.calls, asked.requests)
        if ids is None:
            return asked.calls, asked.requests
        return ((ids, *asked.calls), asked.requests) if calls else (asked.calls, (ids, *asked.requests))

    async def _ask_storage(
        self, plans: _Plans, *, again: bool = True
    ) -> tuple[Granted | Sequence[Refused | Refusal], _Plans, bool]:
        """The storage's answer, or this process's own where the storage has none; and whether it is the latter.

        A refusal is one for each plan. With it come the plans, which may have got other ids.
        """
        first = plans[0]
        if not first:
            return Granted((), self.clock.now_ms()), plans, False
        if self._leasing is not None and (granted := self._leasing.admit(self.owner, first)) is not None:
            return granted, plans, False
        try:
            if self._unsettled:
                await self._reconcile()
            if self._interruptible is not None:
                self._check_available()
            if self._totals is not None:
                await self._follow(self._totals)
            answer = await self.verbs.reserve(self.owner, plans)
            if isinstance(answer, Refused) and self.hold_wait_s:
                answer = await self._waiters.wait(answer, lambda: self.verbs.reserve(self.owner, plans))
        except DataLost as error:
            if again and await self._lose(error):
                return await self._ask_storage(plans, again=False)
            return (_UNAVAILABLE,) * len(plans), plans, False
        except StorageError as error:
            return await self._undecided(plans, error)
        except BaseException:
            # Cancelled, or closed (GeneratorExit) or interrupted while it waited: nobody will take what is granted.
            self._cancel(first)
            raise
        if self.state != "ok":  # not `failed`: a property costs more than the rest of the line
            self._recovered()
        if self._totals is not None and self._is_same_data():
            self._totals.decided()
        if isinstance(answer, Ended):
            return (_UNAVAILABLE,) * len(plans), plans, False
        if isinstance(answer, Granted):
            self._here.seen.keep(answer.receipts)
            return answer, plans, False
        for state in answer.states:
            self._here.seen.keep(state)
        return _each(answer), plans, False

    async def _undecided(
        self, plans: _Plans, error: StorageError
    ) -> tuple[Granted | Sequence[Refused | Refusal], _Plans, bool]:
        """The storage did not answer: what this process says by itself. See the rules of `outage.py`."""
        self._storage_failed(error)
        unknown = plans[0] if error.sent else ()
        if unknown and len(plans) > 1:  # rule 4 of `outage.py`
            self._cancel(unknown)
            unknown = ()
            plans = self._renamed(plans)
        verdicts: list[Refused | Refusal] = []
        for number, bundles in enumerate(plans):
            if not self._here.may_decide([claim for bundle in bundles for claim in bundle.claims]):
                verdicts.append(_UNAVAILABLE)
                continue
            answer = await self._here.reserve(self.owner, bundles)
            if isinstance(answer, Granted):
                return msgspec.structs.replace(answer, plan=number) if number else answer, plans, True
            verdicts.append(answer)
        if unknown:
            # The outcome is unknown: if it was granted it is given back, if it comes late it is refused.
            self._cancel(unknown)
        return verdicts, plans, True

    def _renamed(self, plans: _Plans) -> _Plans:
        """The same plans under new ids."""
        ids = {bundle.call_id: self.new_id() for bundle in plans[0]}
        return tuple(
            tuple(
                Bundle(
                    ids[bundle.call_id],
                    bundle.claims,
                    None
                    if bundle.draft is None
                    else msgspec.structs.replace(bundle.draft, call_id=ids[bundle.call_id]),
                )
                for bundle in plan
            )
            for plan in plans
        )

    def _granted(
        self,
        asked: Asked,
        bundles: tuple[Bundle, ...],
        granted: Granted,
        context: Context,
        call: Call | None,
        *,
        shared: bool,
        degraded: bool,
        candidate: int = 0,
    ) -> Reserved:
        call_hold = request_hold = None
        first = 0
        for bundle in bundles:
            last = first + len(bundle.claims)
            hold = Hold(bundle.call_id, bundle.claims, granted.receipts[first:last], bundle.draft, degraded)
            first = last
            if bundle.draft is not None:
                call_hold = hold
            else:
                request_hold = hold
            if degraded:
                continue
            if _SLOTS in [claim.meter.unit for claim in bundle.claims]:
                self._slots[hold.call_id] = hold
            if self._totals is not None:
                self._totals.opened(bundle)
        if self.observers:
            self._observe(context, call, granted, None if call_hold is None else call_hold.call_id, degraded=degraded)
        return Reserved(request_hold, call_hold, call, granted, shared, asked.cache, degraded, candidate)

    def _observe(
        self, context: Context, call: Call | None, granted: Granted, call_id: str | None, *, degraded: bool
    ) -> None:
        emit(self.observers, Admission(context, call, granted, degraded, call_id))
        for receipt in granted.receipts:
            meter = receipt.claim.meter
            if not meter.enforce and not receipt.fits and meter.limit is not None:
                misfit = ShadowMisfit(
                    context, call, meter.policy, receipt.claim.amount, receipt.used, receipt.held, meter.limit
                )
                emit(self.observers, misfit)

    # ------------------------------------------------------------------------------- refuse

    def _refuse(self, refusal: Refusal, now_ms: int) -> Denied:
        return refuse(refusal, statuses=self.statuses, now_ms=now_ms, disclose=self.disclose)

    def refused(self, context: Context, call: Call | None, refusal: Refusal) -> Denied:
        """The decision for a refusal that needed no storage, told to the observers."""
        denied = self._refuse(refusal, self.clock.now_ms())
        return self._denied(context, call, denied)

    def _deny(self, answer: Refused, call: Call | None) -> Denied:
        return deny(answer, call, disclose=self.disclose, jitter=self._jitter, statuses=self.statuses)

    def tell_refused(self, context: Context, refused: Sequence[tuple[Call | None, Denied]]) -> list[Denied]:
        """The decision for a call that none of several could answer, each with its refusal: told once for each policy."""
        told: set[tuple[str, str, str]] = set()
        answer = []
        for call, denied in refused:
            why = denied.policy, denied.scope, denied.code
            answer.append(self._denied(context, call, denied, told=why not in told))
            told.add(why)
        return answer

    def _denied(self, context: Context, call: Call | None, denied: Denied, *, told: bool = True) -> Denied:
        if self.approval_url is not None:
            denied = with_approval(denied, self.approval_url)
        if told and self.observers:
            emit(self.observers, RefusedEvent(context, call, denied))
        return denied

    def _shadow_refused(self, asked: Asked, context: Context, call: Call | None) -> None:
        for refusal in asked.shadow_refusals:
            emit(self.observers, ShadowMisfit(context, call, refusal.policy, 1, 0, 0, 0))

    # ------------------------------------------------------------------------------- outage

    @property
    def failed(self) -> bool:
        """Whether the storage did not answer, or had lost its data, when it was last asked."""
        return self.state != "ok"

    @property
    def available(self) -> bool:
        """Whether calls are decided by the storage."""
        return not self.failed and (self._interruptible is None or self._interruptible.available())

    def _check_available(self) -> None:
        if self._interruptible is not None and not self._interruptible.available():
            raise _unsent("it is known to be away")

    def _change(self, state: State, error: Exception | None = None) -> bool:
        """Enter a state. True for exactly one of those who see the change."""
        if error is not None:
            self.last_error = type(error).__name__
        with self._state_lock:
            if self.state == state:
                return False
            self.state = state
            self.since_ms = self.clock.now_ms()
            self._backlog_told = False
            return True

    def _storage_failed(self, error: Exception) -> None:
        if self._change("failed", error):
            _log.error("the usage store failed; what its policies say for an outage (on_outage) holds: %s", error)
            emit(self.observers, StorageFailed(str(error)))

    def _recovered(self) -> None:
        if self._change("ok"):
            self._here.end()
            _log.warning("the usage store answers again, and decides")
            emit(self.observers, StorageRecovered())

    async def _reconcile(self) -> None:
        """Hand over what waits to be settled, so that it counts in what is decided next.

        Raises:
            StorageError: the storage does not take it; nothing was asked.
        """
        try:
            pending = self._hand_over(_HANDED_OVER)
            while self._unsettled:  # more than one step takes; whether it is taken shows in the first
                await pending
                pending = self._hand_over(_HANDED_OVER)
        except StorageError as error:
            raise _unsent(str(error)) from error

    def _hand_over(self, most: int) -> Pending[tuple[Settled, ...]]:
        """Hand over the first of what waits.

        Raises:
            StorageError: as `Storage.settle`; they wait again.
        """
        first: list[Settlement] = []
        while self._unsettled and len(first) < most:  # one by one: the storage's thread may add to them meanwhile
            first.append(self._unsettled.popleft())
        return self._deliver(first) if first else Completed(())

    async def _lose(self, error: DataLost) -> bool:
        """The storage has lost its data: do as the guard was told. Gives whether to go on with it."""
        if self._change("lost", error):
            if self._leasing is not None:
                self._leasing.abandon()  # it need not have seen the loss: what leases nothing passes through it
            _log.error(
                "the usage store has lost its data (on_data_loss=%r)%s: %s",
                self.on_data_loss,
                "; calls are refused until `await guard.accept_data_loss()`" if self.on_data_loss == "deny" else "",
                error,
            )
            emit(self.observers, DataLostEvent(str(error), self.on_data_loss))
        if self.on_data_loss == "deny" or self._loss_aware is None:
            return False
        mine: concurrent.futures.Future[bool] = concurrent.futures.Future()
        mine.set_running_or_notify_cancel()  # those who wait cannot cancel it
        with self._state_lock:  # one of those who have noticed accepts, the others wait for it
            first = self._accepting is None
            accepting = self._accepting = self._accepting or mine
        if not first:
            return await asyncio.wrap_future(accepting)
        try:
            await self.accept_loss()
            mine.set_result(True)
        except StorageError as failure:
            self._storage_failed(failure)
        finally:
            self._accepting = None
            if not mine.done():
                mine.set_result(False)
        return mine.result()

    async def accept_loss(self) -> None:
        """Go on with the data that there is; with `rebuild`, tell it what this process has settled.

        Raises:
            StorageError: the storage does not answer.
        """
        if self._loss_aware is None or (self._totals is not None and self.state != "lost"):
            return  # what is told where nothing was lost would count twice
        if self.cache is not None:
            await self.cache.forget_lost(self._loss_aware)  # what was revoked lately may be there again
        await self._loss_aware.accept_loss()
        if self._totals is not None:
            await self._follow(self._totals)  # before this, nothing is decided here: every call would do it, too
        self._recovered()

    def _is_same_data(self) -> bool:
        """Whether the storage goes by the data that it went by when this was asked last."""
        epoch = self._loss_aware.epoch if self._loss_aware is not None else ""
        self._epoch = self._epoch or epoch
        return self._epoch == epoch

    async def _follow(self, totals: Totals) -> None:
        """If the storage goes by other data since a loss was accepted, here or elsewhere, tell it what this process knows.

        Raises:
            DataLost: it has lost its data once more.
            StorageError: it does not answer; what was told is told again, and counts once.
        """
        if self._is_same_data() or self._loss_aware is None:
            return
        accepted = self._loss_aware.epoch
        await self._see_whether_lost()
        told = totals.settlements(self.owner, accepted)
        for first in range(0, len(told), _HANDED_OVER):
            await self.verbs.settle(told[first : first + _HANDED_OVER])
        for bundle in totals.bundles:
            await self.verbs.reserve(self.owner, ((lifted_bundle(bundle),),))
        self._epoch = accepted

    async def _see_whether_lost(self) -> None:
        """Raise `DataLost` if the storage has lost its data, and nobody has accepted it.

        Settling and heartbeats never ask which data it is; changing a hold that there is not does, and changes nothing.
        """
        await self.verbs.amend(self.owner, Bundle(self.new_id(), ()))

    async def _reopen(self) -> None:
        """Make holds of what was admitted here and is still open: it holds its slots, and is charged if we die."""
        for bundle in self._here.bundles:
            try:
                answer = await self.verbs.reserve(self.owner, ((lifted_bundle(bundle),),))
            except StorageError as error:
                self._storage_failed(error)
                return
            # If it ended meanwhile, its settlement has come before, and this was refused; or it will, and is no loss.
            if self._here.forget(bundle.call_id) and isinstance(answer, Granted):
                self._keep(Hold(bundle.call_id, bundle.claims, answer.receipts, bundle.draft))

    def _keep(self, hold: Hold) -> None:
        """Remember what the storage holds for us, as far as it may have to be asked for again."""
        if hold.degraded:
            return
        if _SLOTS in [claim.meter.unit for claim in hold.claims]:
            self._slots[hold.call_id] = hold
        if self._totals is not None:
            self._totals.opened(Bundle(hold.call_id, hold.claims, hold.draft))

    # ------------------------------------------------------------------------------- settle

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Hand settlements over to the storage. Never raises: what the storage does not take is tried again."""
        if self._slots:
            settlements = self._without_slots(settlements)
        if self._here.open:
            self._here.settle(settlements)
        if self._totals is not None:
            self._totals.closed(settlements)
        try:
            return self._deliver(settlements)
        except StorageError:
            return Completed(())  # it waits to be tried again

    def _deliver(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        try:
            # Leases take note of a settlement in any case: they are spent while the storage is away.
            if self._interruptible is not None and self._leasing is None:
                self._check_available()
            pending = self.verbs.settle(settlements)
        except StorageError as error:
            self._try_again(settlements, error)
            raise
        if pending.done():
            self._settled(settlements, pending)
        else:
            pending.add_done_callback(lambda done: self._settled(settlements, done))
        return pending

    def _without_slots(self, settlements: Sequence[Settlement]) -> Sequence[Settlement]:
        more = []
        for settlement in settlements:
            self._slots.pop(settlement.call_id, None)
            if self._retaken and (retaken := self._retaken.pop(settlement.call_id, None)) is not None:
                more.append(Settlement(retaken.call_id, (), None, retaken.receipts))
        return (*settlements, *more) if more else settlements

    def _settled(self, settlements: Sequence[Settlement], pending: Pending[tuple[Settled, ...]]) -> None:
        try:
            replies = pending.result()
        except StorageError as error:
            self._try_again(settlements, error)
            return
        self._waiters.wake()
        if self.observers or self._totals is not None or self._tried:
            for settlement, settled in zip(settlements, replies, strict=True):
                if settled.status != "duplicate" or settlement.call_id in self._tried:
                    if self._totals is not None:
                        self._totals.settled(settlement, settled, is_old=self._is_same_data())
                    if settlement.record is not None:
                        emit(self.observers, SettledCall(settlement.record, settled))
                self._tried.discard(settlement.call_id)

    def _try_again(self, settlements: Sequence[Settlement], error: StorageError) -> None:
        if not self._closed:
            self._storage_failed(error)
        for settlement in settlements:
            # A cancellation undoes what was never granted, most likely; what calls have used is kept whatever comes.
            if len(self._unsettled) < _MOST_UNSETTLED or _matters(settlement):
                self._unsettled.append(settlement)
                if error.sent and _matters(settlement):
                    self._tried.add(settlement.call_id)
            elif not self._backlog_told:
                self._backlog_told = True
                _log.error("%s settlements wait for the usage store; cancellations are dropped", len(self._unsettled))
                emit(self.observers, BacklogFull(len(self._unsettled)))

    # ---------------------------------------------------------------------------- heartbeat

    async def heartbeat(self) -> None:
        """Keep this process's holds alive, expire those of dead ones, and retry what could not be settled."""
        # Settled before the beat, for holds that it may find lapsed; but not all of it, if nobody takes it.
        with contextlib.suppress(StorageError):
            self._hand_over(_HANDED_OVER)
        try:
            beat = await self.verbs.heartbeat(self.owner)
            if self._totals is not None:
                await self._follow(self._totals)
            if self.state == "lost":
                await self._see_whether_lost()
        except DataLost as error:
            await self._lose(error)
            return
        except StorageError as error:
            if not self._closed:  # else it was closed while this beat was on its way
                self._storage_failed(error)
            return
        self._here.processes = max(1, beat.owners)
        self.beat_ms = self.clock.now_ms()
        self.skew_ms = beat.now_ms - self.beat_ms
        self._recovered()
        self._settle_again()
        if self._here.open:
            await self._reopen()
        if beat.expired:
            emit(self.observers, Expired(beat.expired))
        if beat.lapsed:
            _log.warning("this process sent no heartbeat in time and its holds were expired; taking slots again")
            self._retake = deque(self._slots.values())
        if self._retake:
            await self._retake_slots()

    async def _retake_slots(self) -> None:
        while self._retake:
            hold = self._retake.popleft()
            if hold.call_id not in self._slots:
                continue  # it has ended
            claims = tuple(claim for claim in hold.claims if claim.meter.unit is Unit.SLOTS)
            again = Bundle(self.new_id(), claims)
            try:
                answer = await self.verbs.reserve(self.owner, ((again,),))
            except StorageError as error:
                self._storage_failed(error)
                if error.sent:
                    self._cancel((again,))
                self._retake.appendleft(hold)  # for the next heartbeat
                return
            if isinstance(answer, Granted) and hold.call_id in self._slots:
                self._retaken[hold.call_id] = Hold(again.call_id, claims, answer.receipts)
            elif isinstance(answer, Granted):  # it ended while we asked
                self.settle([Settlement(again.call_id, (), None, answer.receipts)])
            else:
                emit(self.observers, SlotOverrun(hold.call_id, tuple(claim.meter.policy for claim in claims)))

    def _settle_again(self) -> None:
        with contextlib.suppress(StorageError):
            for _ in range(0, len(self._unsettled), _HANDED_OVER):
                self._hand_over(_HANDED_OVER)

    async def retire(self) -> None:
        """Expire, and charge, what this process still holds, as if it had died. Later settlements correct it.

        When it returns, everything that was handed over before is written.
        """
        self._settle_again()
        self._slots.clear()  # they are given back, and not to be taken again
        self._retaken.clear()
        self._retake.clear()
        try:
            await self.storage.retire(self.owner)
        except StorageError as error:
            self._storage_failed(error)

    async def close(self) -> None:
        """As `retire`, and let go of the storage."""
        let_go(self)
        await self.chores.stop()
        await self.retire()
        self._closed = True
        await self.storage.aclose()
        lost = sum(settlement.record is not None for settlement in self._unsettled)
        if lost:
            _log.error(
                "the usage store was still away when the guard was closed: what %s calls have used is not in it; "
                "of these, it charges those that it knew as what they held",
                lost,
            )

    def describe_used(self, usage: Usage, cost_nanousd: int | None) -> Call:
        """A call as it turned out to be, for policies that are asked after it."""
        provider, model = provider_of(usage.model)
        return Call(
            provider=provider,
            model=model or "unknown",
            input_tokens=usage.input_tokens or 0,
            output_tokens=usage.output_tokens or 0,
            cost_nanousd=cost_nanousd,
        )

    @property
    def waiting(self) -> int:
        """How many calls wait for the holds of others."""
        return len(self._waiters)

    @property
    def unsettled(self) -> int:
        """How many settlements wait for the storage to answer again."""
        return len(self._unsettled)

    @property
    def degraded(self) -> int:
        """How many requests and calls are open that this process admitted by itself."""
        return len(self._here.open)

    @property
    def processes(self) -> int:
        """How many processes shared the storage when it last answered a heartbeat."""
        return self._here.processes

    def _cancel(self, bundles: Sequence[Bundle]) -> None:
        self.settle([Settlement(bundle.call_id, ()) for bundle in bundles])


def _lease(policies: Sequence[Policy]) -> bool:
    return any(isinstance(policy, Leased) and policy.leased for policy in policies)


def _same_amounts(before: Sequence[Claim], claims: Sequence[Claim]) -> bool:
    """Whether tokens and money stay as they were taken, in the windows of then (`Storage.amend`): the record is of then, too."""
    held = {claim.meter.key: claim for claim in before if claim.meter.unit in _CHARGED}
    for claim in claims:
        if claim.meter.unit not in _CHARGED:
            continue
        old = held.get(claim.meter.key)
        if old is None or old.amount != claim.amount:
            return False
        limit = claim.meter.limit
        if limit is not None and (old.meter.limit is None or limit < old.meter.limit):
            return False
    return True


def _drafted(hold: Hold, context: Context, call: Call | None, attempt: Attempt) -> Hold:
    """The hold, whose record tells of `call`: another model may cost the same."""
    before = hold.draft
    if before is None:
        return hold
    record = draft(hold.call_id, context, call, before.at_ms, attempt)
    return hold if record == before else msgspec.structs.replace(hold, draft=record)


def _unsent(why: str) -> StorageError:
    error = StorageError(f"{why}; nothing was asked")
    error.sent = False
    return error


def _matters(settlement: Settlement) -> bool:
    """Whether a settlement says more than that nothing was used of what was most likely never granted."""
    return settlement.record is not None or bool(settlement.receipts) or bool(settlement.debits)


def _in_order(answer: Refused, policies: Sequence[Policy]) -> Refused:
    """The same refusal with its claims in the order of the policies: in storage those of a call come first."""
    order = {policy.name: place for place, policy in reversed(tuple(enumerate(policies)))}
    states = tuple(
        tuple(sorted(receipts, key=lambda receipt: order.get(receipt.claim.meter.policy, -1)))
        for receipts in answer.states
    )
    return Refused(states, answer.now_ms)


def _each(answer: Refused) -> Sequence[Refused]:
    """A refusal for each plan."""
    return (answer,) if len(answer.states) == 1 else [Refused((state,), answer.now_ms) for state in answer.states]


def _jitter(wait_s: int) -> int:
    return random.randint(0, wait_s // 10)  # noqa: S311 - spreads retries; nothing secret
