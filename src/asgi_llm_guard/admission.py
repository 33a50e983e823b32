"""One request or job, and the calls inside it.

Rule 1: scopes nest: admission, `@guarded`, `guard.call`, client hook. The current scope travels in
a context variable, as one mutable object that threads, tasks and generators share.

Rule 2: a call adopts the nearest enclosing call that is open, not dispatched and not adopted: it
takes over its hold, changed to its own claims in one step. Exactly one adopts; every further call
claims its own. So one call inside a request is charged once, and ten are charged ten times.

Rule 3: whoever has the hold settles it, once. An adopted call has none any more, and what is
recorded on it changes nothing: the child's measured usage stands.

Rule 4: settling is handing over to the storage. It does not wait, and nothing that happens to the
task afterwards takes it back.

Rule 5: after an admission has ended, calls under it claim their own.

Rule 6: a refusal inside a call says that nothing was sent only if nothing can have been: every call
is seen, or nothing was waited for but the refused one. Else the hold is charged.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from asgi_llm_guard.charge import Charge, actuals, draft
from asgi_llm_guard.claims import Claim, Receipt, Settled, Settlement, Unit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.engine import Asking, Engine, Hold
from asgi_llm_guard.errors import ContextError, LimitExceeded, StorageError
from asgi_llm_guard.moment import Moment, this_moment
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import CacheDirective, Policy
from asgi_llm_guard.pricing import Cost
from asgi_llm_guard.storage.base import Completed, Pending
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord
from asgi_llm_guard.wire import item_meter, meter_object
from asgi_llm_guard.wire.base import Answer, ItemMeter

if TYPE_CHECKING:
    from contextvars import Token

__all__ = ["ActiveCall", "Admission", "Scope", "current_admission", "current_scope", "enter", "leave"]

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


class Admission:
    """One request or job: who asks, what was granted, and the calls made inside it."""

    __slots__ = (
        "_deferred",
        "_ended",
        "_handed",
        "_lock",
        "_pending",
        "cache",
        "cache_control",
        "calls",
        "context",
        "degraded",
        "engine",
        "hold",
        "opaque",
        "policies",
        "receipts",
        "refused",
        "release_on_4xx",
        "root",
        "seen",
        "shared",
    )

    def __init__(self, engine: Engine, context: Context, policies: Sequence[Policy], *, opaque: bool) -> None:
        self.engine = engine
        self.context = context
        self.policies = tuple(policies)
        self.opaque = opaque
        """A call may have been made that nobody saw; the hold is charged for it."""
        self.release_on_4xx = False
        self.hold: Hold | None = None
        """What the request itself holds: rates and slots."""
        self.root: ActiveCall | None = None
        """The call that the request stands for, until it has ended."""
        self.receipts: tuple[Receipt, ...] = ()
        """Everything that was granted when it was opened."""
        self.cache: CacheDirective | None = None
        self.cache_control = ""
        """The header of this name that the request came with: a cache keeps and gives no more than it allows."""
        self.degraded = False
        """It, or a call inside it, was admitted by this process alone: the storage did not answer."""
        self.seen = False
        """A call was seen inside it: granted, and made."""
        self.shared = False
        """Its session counts together with others: the caller has too many."""
        self.refused = False
        """A call was refused inside it."""
        self._lock = threading.Lock()
        self._deferred: list[ActiveCall] = []
        self._ended = False
        self._pending: Pending[tuple[Settled, ...]] = _NOTHING
        self.calls: set[ActiveCall] = set()
        """Those inside it that hold something."""
        self._handed: list[Pending[tuple[Settled, ...]]] = []

    async def open(
        self, call: Call | None, *, requests: bool = True, calls: bool = True, clamp: bool = False
    ) -> Denied | None:
        """Claim what the request costs, and with `calls` one call. A `Denied` has taken nothing."""
        answer = await self.engine.reserve(
            self.policies, self.context, call, requests=requests, calls=calls, clamp=clamp
        )
        if isinstance(answer, Denied):
            return answer
        self.hold = answer.request
        self.shared = answer.shared
        self.degraded = answer.degraded
        self.receipts = answer.granted.receipts
        self.cache = answer.cache
        if answer.call is not None:
            self.root = ActiveCall(self, None, self.policies, answer.described)
            self.root.hold = answer.call
        return None

    @property
    def ended(self) -> bool:
        """Whether it was settled."""
        return self._ended

    @property
    def scope(self) -> Scope:
        """Where calls inside this admission start looking for a hold to adopt."""
        return self.root or self

    def refusal_answered(self) -> None:
        """The response to this request is a refusal of a call inside it: nothing was sent that nobody saw."""
        if self.root is not None:
            self.root.release()

    def defer(self, call: ActiveCall) -> None:
        """End `call` with this admission at the latest: its response is still streaming."""
        with self._lock:
            self._deferred.append(call)

    def end(
        self, answer: Answer | None = None, *, status: int | None = None, complete: bool = True
    ) -> Pending[tuple[Settled, ...]]:
        """Settle what is open, by what the response body said. Once; later calls give the first one's answer.

        `answer`: what was read from the response body, if its dialect is known. `complete`: the
        response was sent to its end.
        """
        with self._lock:
            if self._ended:
                return self._pending
            self._ended = True
            deferred, self._deferred = self._deferred, []
            # Calls name their admission: without this, only the garbage collector would free the two of them.
            root, self.root = self.root, None
        settlements = []
        for call in deferred:
            settlements += call.settlements(None, complete=complete)
        if root is not None:
            settlement = root.close_unseen(answer, status=status, complete=complete)
            if settlement is not None:
                settlements.append(settlement)
        if self.hold is not None:
            settlements.append(_request_settlement(self.hold))
        if settlements:
            self._pending = self.settle(settlements)
        return self._pending

    def settle(self, settlements: Sequence[Settlement]) -> Pending[tuple[Settled, ...]]:
        """Hand over what was used inside this admission; `close` waits until it is written."""
        pending = self.engine.settle(settlements)
        if not pending.done():
            self._handed = [*(before for before in self._handed if not before.done()), pending]
        return pending

    async def close(self) -> None:
        """End it, and the calls that nobody can go on with; wait until everything is written.

        Those are the calls that were begun in this task, or in one that is over: in a stream that was
        left before its end, and that the garbage collector would find some day. Calls of tasks that
        are still running go on.
        """
        self.end(complete=False)
        if self.calls:
            this = asyncio.current_task()
            loop = asyncio.get_running_loop()
            for call in tuple(self.calls):
                task = call.task
                if task is not None and (task is this or (task.done() and task.get_loop() is loop)):
                    call.end(complete=False)
        if isinstance(sys.exception(), GeneratorExit):
            return  # a coroutine that is being closed must not wait
        for pending in self._handed:
            if not pending.done():
                await asyncio.shield(_over(pending))

    def close_sync(self) -> None:
        """As `close`, for synchronous code, which leaves no call behind: its blocks end with their function."""
        self.end(complete=False)
        for pending in self._handed:
            with contextlib.suppress(StorageError):
                pending.result()

    def abort(self) -> None:
        """End it and every call inside it, though they are still running: by what was seen of them."""
        self.end(complete=False)
        for call in tuple(self.calls):
            call.end(complete=False)


async def _over(pending: Awaitable[object]) -> None:
    # What the storage does not take is the engine's to try again, and nobody's here. Here, and not where it is
    # awaited: whoever waits may be cancelled.
    with contextlib.suppress(StorageError):
        await pending


_NOTHING = Completed(())


class ActiveCall:
    """One LLM call while it lasts. Record what came back; leaving its block settles it."""

    __slots__ = (
        "_answer",
        "_began_ms",
        "_dispatched",
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
        "admission",
        "call",
        "function",
        "hold",
        "parent",
        "policies",
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
        self.call = call
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
            answer = await engine.reserve(
                self.policies, admission.context, self.call, requests=requests, taken=outer, shared=admission.shared
            )
            if isinstance(answer, Denied):
                raise LimitExceeded(answer)  # noqa: TRY301 - handled as one of `_adopt`'s
        except BaseException as error:
            self._state = _ENDED
            if self.side is not None:
                admission.settle([_request_settlement(self.side)])
                self.side = None
            admission.refused |= isinstance(error, LimitExceeded)
            raise
        self._begin(answer.call)
        if requests:
            self._keep_side(answer.request)

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
        if requests:
            self._keep_side(answer.request)
        if donor is not None and lent is not None:
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
            settlement = self.close_unseen(None, status=None, complete=False)
            if settlement is not None:
                self.admission.settle([settlement])

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
            amended = await engine.amend(
                hold, self.policies, context, self.call, shared=self.admission.shared, asking=asking
            )
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
            return False
        self._begin(amended)
        return True

    # ------------------------------------------------------------------------------- record

    def dispatched(self) -> None:
        """The request is on its way to the provider: from here on the hold is this call's alone."""
        with self._lock:
            self._dispatched = True
        self._started_ms = self.admission.engine.clock.now_ms()

    def record(self, response: object) -> None:
        """Take the usage of `response`: an SDK's object, a dict, an HTTP response, or a `Usage`.

        What it does not recognise is logged by type and leaves the call unmetered, which charges the hold.
        """
        self._dispatched = True
        if isinstance(response, Usage):
            answer: Answer | None = Answer(kind="success", usage=response, model=response.model, finished=True)
        else:
            answer = meter_object(response)
            if answer is None and _error_status(response):  # a proxy's page in front of the provider, for example
                answer = Answer(kind="error")
        if answer is None:
            _log.warning("call.record: no usage is known in a %s; the call is charged what it holds", type(response))
            return
        self._answer = _together(self._answer, answer)

    @property
    def recorded(self) -> bool:
        """Whether something has been recorded."""
        return self._answer is not None or self._items is not None

    def record_if_known(self, result: object) -> None:
        """As `record`, for values that need not be a response: one of unknown shape says nothing."""
        answer = meter_object(result)
        if answer is not None and not _says_nothing(answer):
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
        return self.admission.settle(settlements) if settlements else _NOTHING

    def settlements(self, error: BaseException | None, *, complete: bool = True) -> list[Settlement]:
        """End this call, and give what the caller has to hand over for it."""
        self.admission.calls.discard(self)
        settlements = []
        if self._close():
            settlements.append(self._settlement(self._charge(error, complete=complete)))
        with self._lock:
            side, self.side = self.side, None
        if side is not None:
            settlements.append(_request_settlement(side))
        return settlements

    def close_unseen(self, answer: Answer | None, *, status: int | None, complete: bool) -> Settlement | None:
        """End the call that a request stood for, by what its response body said."""
        if not self._close():
            return None
        if self._answer is None and answer is not None and not _says_nothing(answer):
            self._answer = answer
        if self._answer is not None or self._items is not None or self._released:
            return self._settlement(self._charge(None, complete=complete))
        admission = self.admission
        released = admission.release_on_4xx and status is not None and 400 <= status < 500
        released |= admission.refused and status is not None and status >= 400  # a refusal, answered by the application
        if released or admission.seen or not admission.opaque:
            # Calls are seen here, and none took this hold over: it was not needed.
            hold = self.hold
            assert hold is not None  # noqa: S101 - `_close` saw it
            return Settlement(hold.call_id, (), None, hold.receipts)
        return self._settlement(Charge(outcome="unseen"))

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
        usage = answer.usage if answer is not None else None
        if answer is not None and usage is not None and not usage.output_tokens and answer.text_bytes:
            usage = None  # text that cost no tokens: some servers fill in zeros where they do not count
        if usage is not None and (tokens := usage.total_tokens) is not None:
            return self._measured(usage, tokens)
        if self._released and answer is None:
            return Charge(outcome="not_dispatched")
        if answer is not None:
            if answer.kind == "error" and not answer.text_bytes:
                return Charge(outcome="provider_error")
            if answer.text_bytes and (not answer.finished or not complete or error is not None):
                return self._counted(answer)
            if answer.finished and complete:
                return Charge(outcome="unmetered")
        if error is not None:
            unsent = not self._dispatched and (not self.admission.opaque or self._is_idle())
            refused: Outcome = "not_dispatched" if unsent else "unknown"
            return Charge(outcome=outcome_of(error, of_client=self.function, refused=refused))
        return Charge(outcome="unmetered" if complete and answer is None else "unknown")

    def _measured(self, usage: Usage, tokens: int) -> Charge:
        cost = self._cost(usage)
        if cost.nanousd is None and (self.call is None or self.call.cost_nanousd is not None):
            # Tokens are known and their price is not: tokens as measured, money as held.
            return Charge(outcome="measured", usage=usage, tokens=tokens)
        return Charge(
            outcome="measured",
            usage=usage,
            tokens=tokens,
            cost_nanousd=cost.nanousd or 0,
            price_source=cost.source,
            billed_model=cost.billed_model,
        )

    def _counted(self, answer: Answer) -> Charge:
        """A cut stream: the text so far plus the input, by the same bound as the hold (a token is at
        least one byte); never above it."""
        call = self.call
        if call is None:
            return Charge(outcome="unknown")
        output = min(answer.text_bytes, call.output_tokens)
        usage = Usage(input_tokens=call.input_tokens, output_tokens=output, model=answer.model)
        cost = self._cost(usage).nanousd
        if cost is not None and call.cost_nanousd is not None:
            cost = min(cost, call.cost_nanousd)
        return Charge(outcome="estimated", usage=usage, tokens=call.input_tokens + output, cost_nanousd=cost)

    def _cost(self, usage: Usage) -> Cost:
        engine, call = self.admission.engine, self.call
        provider = call.provider if call is not None else None
        model = call.model if call is not None else (usage.model or "")
        return engine.describer.prices.cost(provider, model, usage, engine.clock.now_ms(), call=call)

    def _settlement(self, charge: Charge, *, recorded: bool = True) -> Settlement:
        hold = self.hold
        assert hold is not None  # noqa: S101 - `_close` saw it
        now_ms = self.admission.engine.clock.now_ms()
        amounts = actuals(hold.claims, charge)
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
            return Settlement(hold.call_id, amounts, None, receipts)
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
        base = hold.draft or draft(hold.call_id, self.admission.context, self.call, self._started_ms)
        call, usage = self.call, charge.usage
        cost_nanousd, tokens = charge.cost_nanousd, charge.tokens
        if charge.outcome == "provider_error":
            cost_nanousd = tokens = 0
        elif call is not None:
            cost_nanousd = call.cost_nanousd if cost_nanousd is None else cost_nanousd
            tokens = call.total_tokens if tokens is None else tokens
        return msgspec.structs.replace(
            base,
            ended_ms=now_ms,
            model=base.model or (usage.model if usage is not None else None),
            billed_model=charge.billed_model or base.billed_model,
            usage=usage,
            cost_nanousd=cost_nanousd,
            estimate_nanousd=0 if charge.outcome == "cached" else base.estimate_nanousd,
            tokens=tokens,
            outcome=charge.outcome,
            price_source=charge.price_source or base.price_source,
            dispatched_ms=self._started_ms,
            first_token_ms=None if self._first_ms is None else max(0, self._first_ms - self._started_ms),
            latency_ms=max(0, now_ms - self._started_ms),
        )


Scope = Admission | ActiveCall

_MEASURED = frozenset({Unit.TOKENS, Unit.NANOUSD})


def _together(before: Answer | None, answer: Answer) -> Answer:
    """What two answers of one call say: an attempt that failed takes nothing away, two that were billed add up."""
    if before is None or before.usage is None:
        return answer
    if answer.usage is None:
        return before
    one, other = before.usage, answer.usage
    summed = {
        name: None
        if getattr(one, name) is None and getattr(other, name) is None
        else (getattr(one, name) or 0) + (getattr(other, name) or 0)
        for name in _COUNTS
    }
    for name in ("input_tokens", "output_tokens"):
        if getattr(one, name) is None or getattr(other, name) is None:
            summed[name] = None  # one of the two is not known, so the sum is not
    return msgspec.structs.replace(answer, usage=msgspec.structs.replace(other, **summed))


_COUNTS = tuple(name for name in Usage.__struct_fields__ if name.endswith("_tokens"))


def _says_nothing(answer: Answer) -> bool:
    """An error that the application answers is its own word: a call may have been made and billed before it."""
    return answer.kind == "error" and answer.usage is None and not answer.text_bytes


def _debit(receipt: Receipt, amount: int | None) -> Claim:
    claim = receipt.claim
    return Claim(claim.meter, claim.amount if amount is None else amount, claim.member)


def _request_settlement(hold: Hold) -> Settlement:
    """Rates stay as they were taken; slots are free again."""
    amounts = tuple([0 if claim.meter.unit is _SLOTS else None for claim in hold.claims])
    return Settlement(hold.call_id, amounts, None, hold.receipts)


_NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})


def outcome_of(error: BaseException, *, of_client: bool, refused: Outcome) -> Outcome:
    """What an exception says about the call that raised it, by its shape; `unknown` unless it says so.

    A status of 400 or above is the provider's answer. A connection that was never made means that
    nothing was sent. `of_client`: only what a provider's client library raises counts; an error of
    another service proves nothing. `refused`: what a refusal of a call inside says.
    """
    seen: BaseException | None = error
    for _ in range(8):  # causes may form a ring
        if seen is None:
            break
        if isinstance(seen, LimitExceeded):
            return refused
        if type(seen).__name__ in _NEVER_SENT and (not of_client or seen is not error):
            return "not_dispatched"  # client libraries raise their own error from it
        if _error_status(seen) and hasattr(seen, "response") and hasattr(seen, "body"):
            return "provider_error"
        if not of_client and _error_status(seen) and (hasattr(seen, "response") or hasattr(seen, "body")):
            return "provider_error"
        if not of_client and _error_status(getattr(seen, "response", None)):  # of `raise_for_status`
            return "provider_error"
        seen = seen.__cause__
    return "unknown"


def _error_status(value: object) -> bool:
    status = getattr(value, "status_code", None)
    return isinstance(status, int) and status >= 400


# --------------------------------------------------------------------------------- current scope


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop is running
        return None


_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("asgi_llm_guard_scope", default=None)


def current_scope() -> Scope | None:
    """The innermost scope that this code runs in."""
    return _scope.get()


def current_admission() -> Admission:
    """The admission that this code runs in.

    Raises:
        ContextError: there is none.
    """
    scope = _scope.get()
    if scope is None:
        raise ContextError(
            "no admission is open here: add GuardMiddleware to the application, or open one with "
            "`async with guard.open(Context(...))`"
        )
    return scope.admission if isinstance(scope, ActiveCall) else scope


def enter(scope: Scope) -> Token[Scope | None]:
    """Make `scope` the current one."""
    return _scope.set(scope)


def leave(token: Token[Scope | None]) -> None:
    """Make the scope before it the current one again."""
    # A block may be left by another task than entered it, as streams are that nobody reads to their end.
    # That task's context never had the scope, so there is nothing to restore.
    with contextlib.suppress(ValueError):
        _scope.reset(token)
