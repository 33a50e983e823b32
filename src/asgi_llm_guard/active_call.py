"""One LLM call while it lasts: what is recorded of it, and how it is settled.

Its rules are in `admission.py`; what it holds is in `claimed.py`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, TypeVar

from asgi_llm_guard.charge import Charge, actuals, believed, charge_of, charged_nanousd, draft, finished
from asgi_llm_guard.claimed import Claimed, State, request_settlement
from asgi_llm_guard.claims import Claim, Receipt, Settled, Settlement, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.describe import as_used
from asgi_llm_guard.engine.holds import Hold
from asgi_llm_guard.errors import LimitExceeded
from asgi_llm_guard.events import CallEnded, UsageAnomaly, emit
from asgi_llm_guard.gaps import Gaps
from asgi_llm_guard.halting import Halted, Wait
from asgi_llm_guard.outcomes import error_status, outcome_of, says_nothing, together
from asgi_llm_guard.plan import ask
from asgi_llm_guard.pricing import Cost
from asgi_llm_guard.scope import current_scope
from asgi_llm_guard.storage.base import Completed, Pending
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord
from asgi_llm_guard.wire import item_meter, meter_object
from asgi_llm_guard.wire.base import Answer

__all__ = ["NOTHING", "ActiveCall"]

_log = logging.getLogger("asgi_llm_guard")

T = TypeVar("T")

NOTHING: Final = Completed(())
_OPEN: Final = State.OPEN
_ADOPTED: Final = State.ADOPTED
_ENDED: Final = State.ENDED


class ActiveCall(Claimed):
    """One LLM call while it lasts. Record what came back; leaving its block settles it."""

    __slots__ = ()

    parent: ActiveCall | None

    def attempt(self, call: Call | None = None) -> ActiveCall:
        """Another attempt of the same call, which has claimed nothing yet; `call`: what it asks for, if that differs.

        It holds and settles its own money and tokens. What is counted in calls is the call's, and taken once; so is
        its slot while it is held. What an enclosing scope holds is adopted first, as by any call.

        Raises:
            ContextError: this call was never claimed.
        """
        if isinstance(self._adopter, ActiveCall):
            return self._adopter.attempt(call)
        siblings = self._with_siblings()
        scope = current_scope()
        parent = scope if isinstance(scope, ActiveCall) and scope.admission is self.admission else self.parent
        again = type(self)(self.admission, self.parent if parent is self else parent, self.policies, call or self.call)
        again.siblings = siblings
        return again

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

    def gaps(self) -> Gaps | None:
        """Where the times between the parts of its answer are kept; `None`: nobody observes them."""
        if self._gaps is None and self.admission.engine.observers:
            self._gaps = Gaps()
        return self._gaps

    def seen_by(self, seen: Callable[[], Answer | None]) -> None:
        """`seen` tells what has come of the answer so far, should this call end before it was `answered`."""
        self._seen = seen

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
            self.gaps()
        if self._gaps is not None:
            self._gaps.part()
        if self._items is None:
            self._items = item_meter()
        self._items.add(chunk)

    async def stream(self, chunks: AsyncIterator[T]) -> AsyncIterator[T]:
        """Pass the chunks of an SDK's stream on, metering them."""
        self.dispatched()
        wait, parts = Wait(self), aiter(chunks)
        while True:
            try:
                chunk = await wait.on(anext, parts)
            except StopAsyncIteration:
                return
            except Halted as halted:
                await _close(parts)
                raise halted.refused() from None
            self.record_chunk(chunk)
            yield chunk

    def stream_sync(self, chunks: Iterator[T]) -> Iterator[T]:
        """As `stream`, for a synchronous SDK."""
        self.dispatched()
        for chunk in chunks:
            self.record_chunk(chunk)
            yield chunk
            if self.halted is not None:
                close = getattr(chunks, "close", None)
                if callable(close):
                    close()
                raise LimitExceeded(self.halted)

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
            self.failed = charge.outcome in _FAILED or self._broke_off(error)
            settlements = self._ended(charge, error)
        with self._lock:
            side, self.side = self.side, None
        if side is not None:
            settlements.append(request_settlement(side))
        return settlements

    def _broke_off(self, error: BaseException | None) -> bool:
        """Whether it was answered by an error, or has ended in one before its answer was complete."""
        answer = self._answer
        if answer is None or answer.usage is None:
            return error is not None
        return answer.kind == "error" or (error is not None and not answer.finished)

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
        seen, self._seen = self._seen, None  # it knows this call, too
        if answer is None and seen is not None and not self._released:
            answer = seen()
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
        call, usage, engine = self.call, charge.usage, self.admission.engine
        if usage is not None and call is not None and charge.outcome == "measured":
            times = engine.max_overage
            if times is not None and (
                (charge.tokens or 0) > times * call.total_tokens
                or (charge.cost_nanousd or 0) > times * (call.cost_nanousd or 0)
            ):
                charge = believed(charge, engine.describer.most(call, times))
            if charge.doubted is None:
                engine.describer.learn(self.admission.context.route, call, usage)
        if charge.doubted is not None:
            self._tell_doubt(charge, charge.doubted)
        return charge

    def _tell_doubt(self, charge: Charge, usage: Usage) -> None:
        _log.warning("a usage was reported that cannot be, and is not charged as it is: %s", usage)
        anomaly = UsageAnomaly(self.admission.context, self.call, usage, charge.tokens, charge.cost_nanousd)
        emit(self.admission.engine.observers, anomaly)

    def _tell_end(self, charge: Charge, error: BaseException | None) -> None:
        assert self.hold is not None  # noqa: S101 - `_close` saw it
        engine, answer = self.admission.engine, self._answer
        failure = None if error is None else type(error).__name__
        if failure is None and answer is not None and answer.kind == "error":
            failure = answer.error or "other"
        ended = CallEnded(
            context=self.admission.context,
            call=self.call,
            call_id=self.hold.call_id,
            outcome=charge.outcome,
            usage=charge.usage,
            cost_nanousd=charged_nanousd(self.call, charge),
            failure=failure,
            attempt=self.attempt_number[1],
            began_ms=self._started_ms,
            first_ms=self._first_ms,
            ended_ms=engine.clock.now_ms(),
            streamed=self._gaps is not None or (self.call is not None and self.call.stream),
            gaps_s=() if self._gaps is None else self._gaps.seconds,
        )
        emit(engine.observers, ended)

    def _ended(self, charge: Charge, error: BaseException | None = None) -> list[Settlement]:
        """What to hand over for a call that has just ended like this."""
        self.outcome = charge.outcome
        if self.admission.engine.observers:
            self._tell_end(charge, error)
        donor = self._donated_by
        while donor is not None:
            donor.outcome, donor.failed, donor.hold = charge.outcome, self.failed, self.hold
            donor._adopter = None  # noqa: SLF001 - it is of the same class
            donor = donor._donated_by  # noqa: SLF001 - as above
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
        described, now_ms = as_used(usage, cost_nanousd), self.admission.engine.clock.now_ms()
        held = {claim.meter.key for claim in self.hold.claims}
        debits: dict[str, Claim] = {}
        for policy in self.policies:  # one by one: a policy that would have refused does not hide the others
            asked = ask((policy,), self.admission.context, described, now_ms, requests=False)
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


async def _close(parts: object) -> None:
    """Close a stream that nobody reads on: not only once it is collected."""
    close = getattr(parts, "aclose", None)
    if callable(close):
        await close()


def _debit(receipt: Receipt, amount: int | None) -> Claim:
    claim = receipt.claim
    return Claim(claim.meter, claim.amount if amount is None else amount, claim.member)
