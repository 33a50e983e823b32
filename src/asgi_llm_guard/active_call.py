"""One LLM call while it lasts: what it claims, what is recorded of it, and how it is settled.

Its rules are in `admission.py`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from asgi_llm_guard.attempts import Siblings, Turns
from asgi_llm_guard.charge import FIRST, Attempt, Charge, actuals, believed, charge_of, draft, finished
from asgi_llm_guard.claims import Claim, Receipt, Settled, Settlement, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.engine import Asking, Hold
from asgi_llm_guard.errors import ContextError, LimitExceeded
from asgi_llm_guard.events import UsageAnomaly, emit
from asgi_llm_guard.moment import Moment, this_moment
from asgi_llm_guard.outcomes import error_status, outcome_of, says_nothing, together
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import Cost
from asgi_llm_guard.scope import current_scope
from asgi_llm_guard.storage.base import Completed, Pending
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord
from asgi_llm_guard.wire import item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, ItemMeter

if TYPE_CHECKING:
    from asgi_llm_guard.admission import Admission

__all__ = ["NOTHING", "ActiveCall", "request_settlement"]

_log = logging.getLogger("asgi_llm_guard")

T = TypeVar("T")


class _State(Enum):
    OPEN = "open"
    ADOPTED = "adopted"
    ENDED = "ended"


# Kept, because looking a member up costs more than what is done with it, and every request does.
_OPEN: Final = _State.OPEN
_ENDED: Final = _State.ENDED
_ADOPTED: Final = _State.ADOPTED
_SLOTS: Final = Unit.SLOTS

_ANSWER_MS: Final = 5
"""What takes longer may have been a provider's answer, in code that blocks the event loop."""

NOTHING: Final = Completed(())
_NONE: Final[AbstractSet[str]] = frozenset()


class ActiveCall:
    """One LLM call while it lasts. Record what came back; leaving its block settles it."""

    __slots__ = (
        "_adopter",
        "_answer",
        "_began_ms",
        "_dispatched",
        "_donated_by",
        "_first_ms",
        "_hit",
        "_idle",
        "_items",
        "_left",
        "_lock",
        "_moment",
        "_released",
        "_started_ms",
        "_state",
        "_turns",
        "admission",
        "attempt_number",
        "call",
        "failed",
        "function",
        "hold",
        "outcome",
        "parent",
        "policies",
        "siblings",
        "side",
        "stacked",
        "taken",
        "task",
    )

    def __init__(
        self, admission: Admission, parent: ActiveCall | None, policies: Sequence[Policy], call: Call | None
    ) -> None:
        self.admission = admission
        self.parent = parent
        self.policies = tuple(policies)
        self.call = None if call is None else admission.engine.describer.held(admission.context.route, call)
        """What is known of the call; `None`: it was not described."""
        self.hold: Hold | None = None
        self.side: Hold | None = None
        """Rates and slots of a `@guarded` function, which last as long as the call."""
        self.taken: frozenset[str] = frozenset()
        """The meters of rates and slots that this scope and those around it hold."""
        self.task: asyncio.Task[Any] | None = None
        """The task in which it was claimed."""
        self.function = False
        """It stands for a function, which may do more than make its call: an error need not be the provider's."""
        self.stacked = False
        """It stands for a function that is itself guarded: all that it does is to ask for the call inside."""
        self.siblings: Siblings | None = None
        """What it has in common with other attempts of the same call, once there is another one."""
        self.attempt_number: Attempt = FIRST
        self.outcome: Outcome | None = None
        """What became of it, once it has ended."""
        self.failed = False
        """It was refused, or has ended in an error: whoever makes it again repeats it."""
        self._adopter: ActiveCall | None = None
        self._donated_by: ActiveCall | None = None
        self._turns: Turns | None = None
        self._left = False
        self._idle = False
        self._moment: Moment | None = None
        self._began_ms = 0
        self._state = _OPEN
        self._dispatched = False
        self._released = False
        self._hit: Charge | None = None
        self._answer: Answer | None = None
        self._items: ItemMeter | None = None
        self._started_ms = admission.engine.clock.now_ms()
        self._first_ms: int | None = None
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------- claim

    async def claim(self, *, requests: bool = False) -> None:
        """Adopt the nearest enclosing hold, or claim an own one.

        `requests`: also claim the policies that count requests, where no scope around holds them.

        Raises:
            LimitExceeded: refused; nothing was taken, and an enclosing hold is as it was.
        """
        if self.siblings is None:
            await self._claim(requests)
            return
        async with self.siblings.turns.take():
            await self._claim(requests)

    async def _claim(self, requests: bool) -> None:
        admission, engine = self.admission, self.admission.engine
        outer = self.parent.taken if self.parent is not None else frozenset()
        if admission.hold is not None and not admission.ended:
            outer |= {claim.meter.key for claim in admission.hold.claims}
        self.taken = outer
        donor = self._donor()
        try:
            if donor is not None and await self._adopt(donor, requests=requests):
                return
            requests = requests and self.side is None
            if self.siblings is not None:
                self.attempt_number = self.siblings.next
                outer = outer.union(self.siblings.taken())
            answer = await engine.reserve(
                *(self.policies, admission.context, self.call),
                requests=requests, taken=outer, shared=admission.shared, attempt=self.attempt_number,
            )  # fmt: skip
            if isinstance(answer, Denied):
                raise LimitExceeded(answer)  # noqa: TRY301 - handled as one of `_adopt`'s
        except BaseException as error:
            self._state = _ENDED
            self.failed = True
            if self.side is not None:
                admission.settle([request_settlement(self.side)])
                self.side = None
            admission.refused |= isinstance(error, LimitExceeded)
            raise
        self._begin(answer.call)
        if self.siblings is not None and answer.call is not None:
            self.siblings.granted(self, answer.call, self._wanted() & self.siblings.taken(self))
        if requests:
            self._keep_side(answer.request)

    def _wanted(self) -> AbstractSet[str]:
        """The meters that this call claims on by itself."""
        context, now_ms = self.admission.context, self.admission.engine.clock.now_ms()
        asked = ask(self.policies, context, self.call, now_ms, requests=False)
        return {claim.meter.key for claim in asked.calls}

    def attempt(self, call: Call | None = None) -> ActiveCall:
        """Another attempt of the same call, which has claimed nothing yet; `call`: what it asks for, if that differs.

        It holds and settles its own money and tokens. What is counted in calls is the call's, and taken once; so is
        its slot while it is held. What an enclosing scope holds is adopted first, as by any call.

        Raises:
            ContextError: this call was never claimed.
        """
        if self._adopter is not None:
            return self._adopter.attempt(call)
        siblings = self._with_siblings()
        scope = current_scope()
        parent = scope if isinstance(scope, ActiveCall) and scope.admission is self.admission else self.parent
        again = type(self)(self.admission, self.parent if parent is self else parent, self.policies, call or self.call)
        again.siblings = siblings
        return again

    def _with_siblings(self) -> Siblings:
        with self._lock:
            if self.siblings is None:
                if self._state is _OPEN and self.hold is None:
                    raise ContextError(
                        "attempt: this call has claimed nothing yet; only what was asked for can be repeated"
                    )
                siblings = Siblings()
                if self._state is _OPEN and self.hold is not None:
                    siblings.granted(self, self.hold)
                elif self.hold is not None and self.outcome not in (None, "not_dispatched"):
                    siblings.was_charged(self.hold)
                self.siblings = siblings
        for donor in self._donors():
            donor.siblings = self.siblings
        return self.siblings

    def _donors(self) -> Iterator[ActiveCall]:
        """Those that the hold was adopted from, one after the other: they stand for the same attempt."""
        donor = self._donated_by
        while donor is not None:
            yield donor
            donor = donor._donated_by  # noqa: SLF001 - another one of this class

    async def amend(self, call: Call) -> None:
        """Hold what `call` may cost in place of what is held: before it is sent to another model, for example.

        Raises:
            LimitExceeded: refused; what is held is as it was.
            ContextError: the call is not open, or one inside it has taken its hold over.
        """
        answer = await self._change(call)
        if answer is None:  # it expired, and is charged: nothing can be put in its place but more
            raise ContextError("amend: the hold of this call has expired and is charged; make another attempt")
        if isinstance(answer, Denied):
            raise LimitExceeded(answer)

    async def grow(self, call: Call) -> Denied | None:
        """As `amend`, for a stream that goes on longer than expected: nobody is waited for, and a refusal is a value."""
        answer = await self._change(call, growing=True)
        return answer if isinstance(answer, Denied) else None

    async def _change(self, call: Call, *, growing: bool = False) -> Hold | Denied | None:
        with self._lock:
            turns = self._turns = self._turns or Turns()
        async with turns.take():
            with self._lock:
                hold = self.hold
                if self._state is not _OPEN or hold is None:
                    raise ContextError("amend: this call is not open, or one inside it has taken its hold over")
                # Should it end meanwhile, nobody knows which of the two it has.
                pending = self.hold = msgspec.structs.replace(hold, uncertain=True)
            asking = Asking()
            answer: Hold | Denied | None = None
            try:
                answer = await self.admission.engine.amend(
                    *(hold, self.policies, self.admission.context, call),
                    taken=self.siblings.taken(self) if self.siblings is not None else _NONE,
                    shared=self.admission.shared, asking=asking, attempt=self.attempt_number, growing=growing,
                )  # fmt: skip
            finally:
                self._changed(pending, hold, answer, call, unknown=asking.unknown)
            return answer

    def _changed(self, pending: Hold, hold: Hold, answer: Hold | Denied | None, call: Call, *, unknown: bool) -> None:
        late: Hold | None = None
        with self._lock:
            if self.hold is not pending or self._state is not _OPEN:  # it ended meanwhile, and was settled as uncertain
                late = answer if isinstance(answer, Hold) and answer.call_id != hold.call_id else None
            elif isinstance(answer, Hold):
                self.hold, self.call = answer, call
                self.admission.degraded |= answer.degraded
                if self.siblings is not None:
                    self.siblings.amended(self, answer)
            elif not unknown and not hold.uncertain:
                self.hold = hold
        if late is not None:  # decided here, under an id of its own, while the storage was away
            self.admission.settle([Settlement(late.call_id, (), None, late.receipts)])

    async def claim_hit(self, usage: Usage | None, *, requests: bool = False) -> None:
        """Take what an answer costs that is kept: rates, and nothing else. `usage`: what the kept one had used.

        The nearest enclosing hold that is free is not needed, and given back. `requests`: as `claim`.

        Raises:
            LimitExceeded: refused; nothing was taken, and an enclosing hold is as it was.
        """
        admission = self.admission
        outer = self.parent.taken if self.parent is not None else frozenset()
        if admission.hold is not None and not admission.ended:
            outer |= {claim.meter.key for claim in admission.hold.claims}
        donor = self._donor()
        lent = None if donor is None else donor.hold
        taken = outer if lent is None else outer | {claim.meter.key for claim in lent.claims}
        if self.siblings is not None:
            taken = taken.union(self.siblings.taken())
        try:
            answer = await admission.engine.reserve(
                *(self.policies, admission.context, self.call),
                requests=requests, taken=taken, shared=admission.shared, rates=True,
            )  # fmt: skip
            if isinstance(answer, Denied):
                raise LimitExceeded(answer)  # noqa: TRY301 - handled like being cancelled
        except BaseException as error:
            self._state = _ENDED
            if donor is not None:
                donor._take_back()  # noqa: SLF001 - another one of this class
            admission.refused |= isinstance(error, LimitExceeded)
            raise
        self._hit = Charge(outcome="cached", usage=usage, tokens=0, cost_nanousd=0)
        self.taken = outer
        self._begin(answer.call)
        if self.siblings is not None and answer.call is not None:
            self.siblings.granted(self, answer.call)
        if requests:
            self._keep_side(answer.request)
        if donor is not None and lent is not None:
            if donor.siblings is not None:
                donor.siblings.lost(donor, charged=False)
            admission.settle([donor._settlement(self._hit, recorded=False)])  # noqa: SLF001 - as above

    def _begin(self, hold: Hold | None) -> None:
        self.hold = hold
        self.admission.degraded |= hold is not None and hold.degraded
        self.admission.seen = True
        self.task = _current_task()
        self._begin_moment()
        self.admission.calls.add(self)

    def _begin_moment(self) -> None:
        if not self.admission.opaque:
            return  # nobody will ask
        self._moment = this_moment()
        self._began_ms = self.admission.engine.clock.now_ms()

    def _is_idle(self) -> bool:
        """Whether this has not waited, nor blocked, since it was granted: nothing was sent in it."""
        moment = self._moment
        if moment is None or moment.over:
            return False
        return 0 <= self.admission.engine.clock.now_ms() - self._began_ms < _ANSWER_MS

    def _keep_side(self, side: Hold | None) -> None:
        self.side = side
        if side is not None:
            self.taken |= {claim.meter.key for claim in side.claims}

    def _donor(self) -> ActiveCall | None:
        scope = self.parent
        while scope is not None:
            if scope.lend():
                return scope
            scope = scope.parent
        return None

    def lend(self) -> bool:
        """Let a call inside take over the hold, if it is free. True for exactly one of those who ask."""
        with self._lock:
            if self._state is not _OPEN or self._dispatched or self.hold is None or self.admission.ended:
                return False
            self._state = _ADOPTED
        self._idle = self._is_idle()
        return True

    def _take_back(self) -> None:
        """The adopter was refused: this call has its hold again, and settles it if its admission is over."""
        if self.stacked:
            self.release()  # the function did not run
        elif self._idle and _current_task() is self.task:
            self._begin_moment()  # the refused call is all that it has waited for
        with self._lock:
            self._state = _OPEN
            left, self._left = self._left, False
        if left:  # its block was left meanwhile
            self.admission.settle(self.settlements(None, complete=False))
        elif self.admission.ended:
            settlements = self.close_unseen(None, status=None, complete=False)
            if settlements:
                self.admission.settle(settlements)

    async def _adopt(self, donor: ActiveCall, *, requests: bool) -> bool:
        engine, context = self.admission.engine, self.admission.context
        hold = donor.hold
        assert hold is not None  # noqa: S101 - `lend` saw it, and nobody else takes it
        side: Hold | None = None
        asking = Asking()
        try:
            if requests:
                answer = await engine.reserve(
                    self.policies,
                    context,
                    self.call,
                    requests=True,
                    calls=False,
                    taken=self.taken,
                    shared=self.admission.shared,
                )
                if isinstance(answer, Denied):
                    donor._take_back()
                    raise LimitExceeded(answer)  # noqa: TRY301 - and it passes the handler below
                side = answer.request
            if self.call is None:
                self.call = donor.call
            taken = _NONE
            if donor.siblings is not None:  # it is the same attempt
                self.siblings, self.attempt_number = donor.siblings, donor.attempt_number
                taken = donor.siblings.taken(donor)
            elif self.siblings is not None:
                self.attempt_number = self.siblings.next
                taken = self.siblings.taken()
            amended = await engine.amend(
                *(hold, self.policies, context, self.call),
                taken=taken, shared=self.admission.shared, asking=asking, attempt=self.attempt_number,
            )  # fmt: skip
        except LimitExceeded:
            raise
        except BaseException:
            # Cancelled on the way: this call was not sent.
            back = [] if side is None else [Settlement(side.call_id, (), None, side.receipts)]
            if not asking.unknown:
                donor._take_back()
            else:
                # Whether the hold has this call's claims already is not known, so nobody can go on with it: it is
                # given back whole. What it stood for may have made a call of its own, unless all calls are seen;
                # that is charged as it was held.
                with donor._lock:
                    donor._state = _ENDED
                if donor.siblings is not None:
                    donor.siblings.lost(donor, charged=True)
                if donor.parent is None and not self.admission.opaque:
                    back.append(Settlement(hold.call_id, ()))
                else:
                    lost = donor._record(hold, Charge(outcome="unknown"), engine.clock.now_ms())
                    back.append(Settlement(hold.call_id, (), lost, (), hold.claims))
            if back:
                self.admission.settle(back)
            raise
        if isinstance(amended, Denied):
            if asking.unknown:
                donor.hold = msgspec.structs.replace(hold, uncertain=True)
            donor._take_back()
            if side is not None:
                self.admission.settle([Settlement(side.call_id, (), None, side.receipts)])
            raise LimitExceeded(amended)
        self._keep_side(side)
        if amended is None:  # it expired meanwhile and is charged; this call claims its own
            with donor._lock:
                donor._state = _ENDED
            if donor.siblings is not None:
                donor.siblings.lost(donor, charged=True)
            return False
        self._begin(amended)
        self._donated_by, donor._adopter = donor, self
        if donor.siblings is not None:
            donor.siblings.adopted(donor, self, amended)
        elif self.siblings is not None:
            self.siblings.granted(self, amended, self._wanted() & self.siblings.taken(self))
        return True

    # ------------------------------------------------------------------------------- record

    def dispatched(self) -> None:
        """The request is on its way to the provider: from here on the hold is this call's alone."""
        with self._lock:
            self._dispatched = True
        self._started_ms = self.admission.engine.clock.now_ms()

    def record(self, response: object, *, attempt_id: str | None = None) -> None:
        """Take the usage of `response`: an SDK's object, a dict, an HTTP response, or a `Usage`.

        What it does not recognise is logged by type and leaves the call unmetered, which charges the hold.

        `attempt_id`: the provider's or the client library's own id of what is reported. An attempt that was reported
        before in this admission changes nothing; if it was another call's, this one is given back.
        """
        if attempt_id is not None and self._is_reported(attempt_id):
            return
        self._dispatched = True
        if isinstance(response, Usage):
            answer: Answer | None = Answer(kind="success", usage=response, model=response.model, finished=True)
        else:
            answer = meter_object(response)
            if answer is None and error_status(response):  # a proxy's page in front of the provider, for example
                answer = Answer(kind="error")
        if answer is None:
            _log.warning("call.record: no usage is known in a %s; the call is charged what it holds", type(response))
            return
        self._answer = together(self._answer, answer)

    @property
    def usage(self) -> Usage | None:
        """What has been recorded so far; `None`: nothing that says what was used."""
        answer = self._answer
        if answer is None and self._items is not None:
            answer = self._items.answer()
        return None if answer is None else answer.usage

    def _is_reported(self, attempt_id: str) -> bool:
        hold = self.hold
        if hold is None or self._state is not _OPEN:
            return False
        reported_to = self.admission.attempts.reported(attempt_id, hold.call_id)
        if reported_to is None:
            return False
        if reported_to != hold.call_id and self._answer is None:
            self._items = None
            self._released = True  # it stands for what another call is charged for
        return True

    def first_part(self) -> None:
        """The first part of the answer has come."""
        if self._first_ms is None:
            self._first_ms = self.admission.engine.clock.now_ms()

    def answered(self, answer: Answer) -> None:
        """Take what a meter has read of the answer, in place of what was recorded before."""
        self._dispatched = True
        self._answer = answer

    @property
    def recorded(self) -> bool:
        """Whether something has been recorded."""
        return self._answer is not None or self._items is not None

    def record_if_known(self, result: object) -> None:
        """As `record`, for values that need not be a response: one of unknown shape says nothing."""
        answer = meter_object(result)
        if answer is not None and not says_nothing(answer):
            self._dispatched = True
            self._answer = answer

    def record_chunk(self, chunk: object) -> None:
        """Take what one streamed item says: text so far, and usage on the last one."""
        self._dispatched = True
        if self._first_ms is None:
            self._first_ms = self.admission.engine.clock.now_ms()
        if self._items is None:
            self._items = item_meter()
        self._items.add(chunk)

    async def stream(self, chunks: AsyncIterator[T]) -> AsyncIterator[T]:
        """Pass the chunks of an SDK's stream on, metering them."""
        self.dispatched()
        async for chunk in chunks:
            self.record_chunk(chunk)
            yield chunk

    def stream_sync(self, chunks: Iterator[T]) -> Iterator[T]:
        """As `stream`, for a synchronous SDK."""
        self.dispatched()
        for chunk in chunks:
            self.record_chunk(chunk)
            yield chunk

    def release(self) -> None:
        """Nothing was sent: give all of it back when the call ends."""
        self._released = True

    def discard(self) -> None:
        """Nobody will use it: give all of it back now."""
        self.release()
        self.end()

    # ---------------------------------------------------------------------------------- end

    def end(self, error: BaseException | None = None, *, complete: bool = True) -> Pending[tuple[Settled, ...]]:
        """Settle this call. Once; later calls change nothing. An adopted call has nothing to settle.

        `complete`: nothing more was to come.
        """
        settlements = self.settlements(error, complete=complete)
        return self.admission.settle(settlements) if settlements else NOTHING

    def settlements(self, error: BaseException | None, *, complete: bool = True) -> list[Settlement]:
        """End this call, and give what the caller has to hand over for it."""
        self.admission.calls.discard(self)
        settlements: list[Settlement] = []
        if self._close():
            charge = self._charge(error, complete=complete)
            self.failed = error is not None or charge.outcome in _FAILED
            settlements = self._ended(charge)
        with self._lock:
            side, self.side = self.side, None
        if side is not None:
            settlements.append(request_settlement(side))
        return settlements

    def close_unseen(self, answer: Answer | None, *, status: int | None, complete: bool) -> list[Settlement]:
        """End the call that a request stood for, by what its response body said."""
        if not self._close():
            return []
        if self._answer is None and answer is not None and not says_nothing(answer):
            self._answer = answer
        if self._answer is not None or self._items is not None or self._released:
            return self._ended(self._charge(None, complete=complete))
        admission = self.admission
        released = admission.release_on_4xx and status is not None and 400 <= status < 500
        released |= admission.refused and status is not None and status >= 400  # a refusal, answered by the application
        if released or admission.seen or not admission.opaque:
            # Calls are seen here, and none took this hold over: it was not needed.
            return self._ended(Charge(outcome="not_dispatched"))
        return self._ended(Charge(outcome="unseen"))

    def _close(self) -> bool:
        with self._lock:
            if self._state is not _OPEN:
                self._left = self._state is _ADOPTED
                return False
            self._state = _ENDED
        return self.hold is not None

    def _charge(self, error: BaseException | None, *, complete: bool = True) -> Charge:
        if self._hit is not None:
            return self._hit
        answer = self._answer
        if answer is None and self._items is not None:
            answer = self._items.answer()
        failure: Outcome | None = None
        if error is not None:
            unsent = not self._dispatched and (not self.admission.opaque or self._is_idle())
            failure = outcome_of(
                error,
                of_client=self.function,
                refused="not_dispatched" if unsent else "unknown",
                refusals=self.admission.refusals,
            )
        charge = charge_of(self.call, answer, self._cost, complete=complete, released=self._released, failure=failure)
        if charge.outcome == "measured" and charge.usage is not None and self.call is not None:
            charge = self._believed(charge, self.call)
            if charge.doubted is None and charge.usage is not None:
                self.admission.engine.describer.learn(self.admission.context.route, self.call, charge.usage)
        if charge.doubted is not None:
            self._tell_doubt(charge, charge.doubted)
        return charge

    def _believed(self, charge: Charge, call: Call) -> Charge:
        engine = self.admission.engine
        times = engine.max_overage
        if times is None or (
            (charge.tokens or 0) <= times * call.total_tokens
            and (charge.cost_nanousd or 0) <= times * (call.cost_nanousd or 0)
        ):
            return charge
        return believed(charge, engine.describer.most(call, times))

    def _tell_doubt(self, charge: Charge, usage: Usage) -> None:
        _log.warning("a usage was reported that cannot be, and is not charged as it is: %s", usage)
        anomaly = UsageAnomaly(self.admission.context, self.call, usage, charge.tokens, charge.cost_nanousd)
        emit(self.admission.engine.observers, anomaly)

    def _ended(self, charge: Charge) -> list[Settlement]:
        """What to hand over for a call that has just ended like this."""
        self.outcome = charge.outcome
        for donor in self._donors():
            donor.outcome, donor.failed, donor.hold = charge.outcome, self.failed, self.hold
            donor._adopter = None  # noqa: SLF001 - as above
        settlement = self._settlement(charge)
        if self.siblings is None:
            return [settlement]
        unsent = charge.outcome == "not_dispatched"
        return self.siblings.ended(self, settlement, self._settlement(charge, keep_calls=True) if unsent else None)

    def _cost(self, usage: Usage) -> Cost:
        engine, call = self.admission.engine, self.call
        provider = call.provider if call is not None else None
        model = call.model if call is not None else (usage.model or "")
        return engine.describer.prices.cost(provider, model, usage, engine.clock.now_ms(), call=call)

    def _settlement(self, charge: Charge, *, recorded: bool = True, keep_calls: bool = False) -> Settlement:
        hold = self.hold
        assert hold is not None  # noqa: S101 - `_close` saw it
        now_ms = self.admission.engine.clock.now_ms()
        amounts = actuals(hold.claims, charge, keep_calls=keep_calls)
        debits: tuple[Claim, ...] = ()
        if self.call is None and charge.usage is not None and charge.outcome != "cached":
            debits = self._debits(charge.usage, charge.cost_nanousd)
        receipts = hold.receipts
        if hold.uncertain:
            # Amounts are in the order of the claims, and which claims the storage has is not known: whatever they
            # are, they are given back, and what was used is charged beside them.
            taken = zip(receipts, amounts, strict=True)
            debits += tuple([_debit(receipt, amount) for receipt, amount in taken if receipt.taken])
            amounts, receipts = (), ()
        if charge.outcome == "not_dispatched":
            return Settlement(hold.call_id, amounts, None, receipts, debits if keep_calls else ())
        if not recorded:
            return Settlement(hold.call_id, amounts, None, receipts, debits)
        record = self._record(hold, charge, now_ms)
        return Settlement(hold.call_id, amounts, record, receipts, debits)

    def _debits(self, usage: Usage, cost_nanousd: int | None) -> tuple[Claim, ...]:
        """What policies would have claimed, had the call been described: charged although it was not held."""
        assert self.hold is not None  # noqa: S101 - asked for by `_settlement` only
        engine = self.admission.engine
        described = engine.describe_used(usage, cost_nanousd)
        held = {claim.meter.key for claim in self.hold.claims}
        debits: dict[str, Claim] = {}
        for policy in self.policies:  # one by one: a policy that would have refused does not hide the others
            asked = ask((policy,), self.admission.context, described, engine.clock.now_ms(), requests=False)
            for claim in asked.calls:
                if claim.meter.key not in held and claim.meter.unit in _MEASURED:
                    debits[claim.meter.key] = claim
        return tuple(debits.values())

    def _record(self, hold: Hold, charge: Charge, now_ms: int) -> UsageRecord:
        began_ms = self._started_ms
        record = hold.draft or draft(hold.call_id, self.admission.context, self.call, began_ms, self.attempt_number)
        return finished(record, self.call, charge, began_ms=began_ms, first_ms=self._first_ms, now_ms=now_ms)


_FAILED: Final = frozenset({"provider_error", "not_dispatched", "unknown"})
_MEASURED = frozenset({Unit.TOKENS, Unit.NANOUSD})


def _debit(receipt: Receipt, amount: int | None) -> Claim:
    claim = receipt.claim
    return Claim(claim.meter, claim.amount if amount is None else amount, claim.member)


def request_settlement(hold: Hold) -> Settlement:
    """Rates stay as they were taken; slots are free again."""
    amounts = tuple([0 if claim.meter.unit is _SLOTS else None for claim in hold.claims])
    return Settlement(hold.call_id, amounts, None, hold.receipts)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop is running
        return None
