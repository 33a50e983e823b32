"""The way of one call through what its requests share: its policies are asked, and what they claim is reserved.

It knows policies, storages and prices by their protocols only. What it does for one request or
job is in `admission.py`; how it is configured is in `guard.py`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal

from asgi_llm_guard.background import keep_alive, let_go
from asgi_llm_guard.charge import FIRST, Attempt
from asgi_llm_guard.chores import Chores
from asgi_llm_guard.claims import Bundle, Ended, Granted, Refused, Rule, Settled, Settlement
from asgi_llm_guard.clock import Clock
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Code, Denied, Refusal
from asgi_llm_guard.describe import Describer
from asgi_llm_guard.engine.bindings import Bindings, Follows
from asgi_llm_guard.engine.cheaper import cheaper_models
from asgi_llm_guard.engine.data_loss import DataLoss, OnDataLoss
from asgi_llm_guard.engine.deciding import Deciding
from asgi_llm_guard.engine.heart import Heart
from asgi_llm_guard.engine.holds import Asking, Hold, Reserved
from asgi_llm_guard.engine.kept import Kept
from asgi_llm_guard.engine.overrides import Overrides
from asgi_llm_guard.engine.plans import Candidate, Offer, Planner, changed, drafted
from asgi_llm_guard.engine.session_ids import SessionIds, counted_as, overflows
from asgi_llm_guard.engine.settling import Settling
from asgi_llm_guard.engine.store import Store
from asgi_llm_guard.engine.telling import Telling
from asgi_llm_guard.engine.waiters import Waiters
from asgi_llm_guard.events import Observer
from asgi_llm_guard.plan import Asked, ask, only_rates
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.base import Leasing, Pending, Storage

if TYPE_CHECKING:
    from asgi_llm_guard.cache import ResponseCache

__all__ = ["Engine"]

_NONE: AbstractSet[str] = frozenset()


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
        self.clock = clock
        self.describer = describer
        self.max_overage = max_overage
        self.cache: ResponseCache | None = None
        """What the guard keeps answers in."""
        self.telling = Telling(
            clock=clock,
            observers=observers,
            disclose=disclose,
            statuses=statuses,
            approval_url=approval_url,
            jitter=jitter,
        )
        self.store = Store(storage, self.telling, local_storage=local_storage, with_leases=with_leases)
        self.loss = DataLoss(on_data_loss, self.store, self.telling)
        self.waiters = Waiters(hold_wait_s, max_waiting)
        self._kept = Kept(self.loss)
        self.settling = Settling(self.store, self.loss, self._kept, self.waiters, self.telling)
        self.heart = Heart(self.store, self.loss, self._kept, self.settling, self.telling)
        self.chores = Chores()
        """What is done from time to time."""
        self.bindings = Bindings(self.store, agents, sources)
        self.overrides = Overrides(clock)
        self.gate: Callable[[], Awaitable[Refusal | None]] | None = None
        """Why nothing may be admitted yet; `None`: something may."""
        self.forking: list[Callable[[], object]] = []
        """Who is told that this is a child process now."""
        self._deciding = Deciding(self.store, self.loss, self.settling, self.waiters)
        self._planner = Planner(self.store.new_id, SessionIds(session_limit, anonymous_session_limit, session_ttl_ms))
        self._shares_sessions = session_overflow == "share"
        self._begun = False
        _tell_of_forks(self)

    def forked(self) -> None:
        """This is a child process now: it holds nothing, and nothing runs in it yet."""
        self.store.forked()
        self.loss.forked()
        self._kept.forget()
        self.waiters.forked()
        self.overrides.forked()
        self._begun = False
        self.chores.forked()
        for tell in self.forking:
            tell()

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
        told: bool = True,
    ) -> Reserved | list[Denied]:
        """As `reserve`, for the first of several candidates that fits, in one step: `Reserved.candidate` says which.

        A list has the refusal of each candidate, in order; then nothing was changed. `told`: observers are told of it;
        if not, whoever asks tells them, once others were asked, too (`Telling.denied_any`).
        """
        if not self._begun:
            self._begun = True
            keep_alive(self.heart)
            self.chores.begin()
        telling, overrides = self.telling, self.overrides
        if self.gate is not None and (closed := await self.gate()) is not None:
            shut = telling.refuse(closed, self.clock.now_ms())
            return telling.denied_any(context, [(call, shut) for _, call in candidates], told=told)
        clamps = 2 if clamp else 0
        while True:
            now_ms = self.clock.now_ms()
            counted = counted_as(context, shared=shared)
            denied: dict[int, Denied] = {}
            offers: list[Offer] = []
            stops, raises = overrides.stops, overrides.raises
            for index, (policies, call) in enumerate(candidates):
                if stops is not None and (stopped := overrides.stopped(context, call)) is not None:
                    denied[index] = telling.refuse(stopped, now_ms)
                    continue
                asked = ask(policies, counted, call, now_ms, requests=requests, calls=calls, taken=taken)
                if asked.shadow_refusals:
                    telling.shadow_refused(asked, context, call)
                if asked.refusal is not None:
                    denied[index] = telling.refuse(asked.refusal, now_ms)
                else:
                    if raises is not None:
                        asked = raises.asked(asked, now_ms)
                    offers.append((index, only_rates(asked) if rates else asked))
            if offers:
                plans = self._planner.plans(offers, candidates, context, now_ms, attempt, calls=calls, shared=shared)
                answer, plans, degraded = await self._deciding.reserve(plans)
                if isinstance(answer, Granted):
                    index, asked = offers[answer.plan]
                    plan, call = plans[answer.plan], candidates[index][1]
                    return self._granted(
                        asked, plan, answer, context, call, shared=shared, degraded=degraded, candidate=index
                    )
                if self._shares_sessions and not shared and any(map(overflows, answer)):
                    shared = True
                    continue
                for (index, _), verdict in zip(offers, answer, strict=True):
                    policies, call = candidates[index]
                    if isinstance(verdict, Refusal):
                        denied[index] = telling.refuse(verdict, now_ms)
                    else:
                        denied[index] = self._denied(_in_order(verdict, policies), policies, counted, call, taken)
            if clamps and (smaller := self._clamped(candidates, denied)) is not None:
                candidates = smaller
                clamps -= 1
                continue
            refused = [(call, denied[index]) for index, (_, call) in enumerate(candidates)]
            return telling.denied_any(context, refused, told=told)

    def _denied(
        self, answer: Refused, policies: Sequence[Policy], context: Context, call: Call | None, taken: AbstractSet[str]
    ) -> Denied:
        """What the storage has refused, and what could be asked for instead."""
        telling = self.telling
        denied = telling.deny(answer, call)
        models = cheaper_models(
            denied, policies, context, call, describer=self.describer, disclose=telling.disclose, taken=taken
        )
        return telling.with_models(denied, models) if models else denied

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
            self._kept.keep(hold)
        if self.telling.observers:
            call_id = None if call_hold is None else call_hold.call_id
            self.telling.admitted(context, call, granted, call_id, degraded=degraded)
        return Reserved(request_hold, call_hold, call, granted, shared, asked.cache, degraded, candidate)

    # -------------------------------------------------------------------------------- amend

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
        is refused, another one may be asked for; whoever asks tells of refusals (`Telling.denied_any`).
        """
        telling, overrides, now_ms = self.telling, self.overrides, self.clock.now_ms()
        if (stopped := overrides.stopped(context, call)) is not None:
            return telling.denied(context, call, telling.refuse(stopped, now_ms), told=not one_of)
        asked = ask(policies, counted_as(context, shared=shared), call, now_ms, requests=False, taken=taken)
        if overrides.raises is not None:
            asked = overrides.raises.asked(asked, now_ms)
        if asked.shadow_refusals:
            telling.shadow_refused(asked, context, call)
        if asked.refusal is not None:
            return telling.denied(context, call, telling.refuse(asked.refusal, now_ms), told=not one_of)
        ids = tuple(claim for claim in hold.claims if claim.meter.rule is Rule.IDS)
        claims = ids + asked.calls
        if claims == hold.claims:
            return drafted(hold, context, call, attempt)
        bundle = changed(hold, claims, context, call, now_ms, attempt)
        asking = asking or Asking()
        answer, bundle, degraded = await self._deciding.amend(hold, bundle, asking, now_ms, patient=not growing)
        if isinstance(answer, Refusal):
            return telling.denied(context, call, telling.refuse(answer, now_ms), told=not one_of)
        if isinstance(answer, Ended):
            if hold.degraded or answer.reason == "unknown":
                self.settling.give_back(hold)  # nothing was charged for it
            return None
        if isinstance(answer, Refused):
            denied = self._denied(
                _in_order(answer, policies), policies, counted_as(context, shared=shared), call, taken
            )
            return telling.denied(context, call, denied, told=not one_of)
        amended = Hold(bundle.call_id, claims, answer.receipts, bundle.draft, degraded)
        if degraded:
            asking.unknown = False
            self.settling.give_back(hold)
        self._kept.keep(amended)
        if telling.observers and not growing:
            telling.admitted(context, call, answer, amended.call_id, degraded=degraded)
        return amended

    # ------------------------------------------------------------------------------- settle

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Hand settlements over to the storage. Never raises: what the storage does not take is tried again."""
        return self.settling.settle(settlements)

    def refused(self, context: Context, call: Call | None, refusal: Refusal) -> Denied:
        """The decision for a refusal that needed no storage, told to the observers."""
        return self.telling.denied(context, call, self.telling.refuse(refusal, self.clock.now_ms()))

    async def close(self) -> None:
        """Give back what this process holds, settle what the storage did not take before, and let go of it."""
        let_go(self.heart)
        await self.chores.stop()
        await self.heart.retire()
        self.store.closed = True
        await self.store.storage.aclose()
        self.settling.tell_lost()

    # ------------------------------------------------------------------------ what it is made of

    def bind(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """As `Bindings.bind`."""
        return self.bindings.bind(policies)

    def follow(self, follower: Follows) -> None:
        """Admit nothing until `follower` has loaded what it follows, and tell it of every policy that is bound."""
        self.bindings.follower, self.gate = follower, follower.closed
        self.forking.append(follower.forked)

    def keep_answers(self, cache: ResponseCache) -> None:
        """Keep answers in `cache`."""
        self.cache = self.loss.cache = cache

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell `observer` every event from now on, until what is given is called."""
        return self.telling.observe(observer)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who is told every event."""
        return self.telling.observers

    @property
    def disclose(self) -> Literal["owned", "all"]:
        """Of which scopes refusals show limits and counts."""
        return self.telling.disclose

    @property
    def storage(self) -> Storage:
        """Where the counters live."""
        return self.store.storage

    @property
    def owner(self) -> str:
        """Who this process is to the storage."""
        return self.store.owner

    def new_id(self) -> str:
        """A call id, unique over all processes and restarts."""
        return self.store.new_id()

    @property
    def waiting(self) -> int:
        """How many calls wait for the holds of others."""
        return len(self.waiters)

    @property
    def unsettled(self) -> int:
        """How many settlements wait for the storage to answer again."""
        return len(self.settling.unsettled)

    @property
    def degraded(self) -> int:
        """How many requests and calls are open that this process admitted by itself."""
        return len(self.store.here.open)


def _tell_of_forks(engine: Engine) -> None:
    reference = weakref.ref(engine)

    def after_fork() -> None:
        here = reference()
        if here is not None:
            here.forked()

    os.register_at_fork(after_in_child=after_fork)


def _in_order(answer: Refused, policies: Sequence[Policy]) -> Refused:
    """The same refusal with its claims in the order of the policies: in storage those of a call come first."""
    order = {policy.name: place for place, policy in reversed(tuple(enumerate(policies)))}
    states = tuple(
        tuple(sorted(receipts, key=lambda receipt: order.get(receipt.claim.meter.policy, -1)))
        for receipts in answer.states
    )
    return Refused(states, answer.now_ms)
