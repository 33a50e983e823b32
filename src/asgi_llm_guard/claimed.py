"""What one LLM call holds: claimed, adopted from the scope around it, changed, and shared by its attempts.

Its rules are in `admission.py`, those of attempts in `attempts.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asgi_llm_guard.attempts import Siblings, Turns
from asgi_llm_guard.charge import FIRST, Attempt, Charge
from asgi_llm_guard.claims import Settled, Settlement, Unit
from asgi_llm_guard.context import Call
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.engine.holds import Asking, Hold, Reserved
from asgi_llm_guard.engine.plans import Candidate
from asgi_llm_guard.engine.telling import Untold
from asgi_llm_guard.errors import ContextError, LimitExceeded
from asgi_llm_guard.gaps import Gaps
from asgi_llm_guard.halting import Wait
from asgi_llm_guard.moment import Moment, this_moment
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.usage import Outcome, Usage, UsageRecord
from asgi_llm_guard.wire.base import Answer, ItemMeter

if TYPE_CHECKING:
    from asgi_llm_guard.admission import Admission

__all__ = ["Claimed", "State", "request_settlement"]


class State(Enum):
    """Whose the hold is."""

    OPEN = "open"
    ADOPTED = "adopted"
    ENDED = "ended"


# Kept, because looking a member up costs more than what is done with it, and every request does.
_OPEN: Final = State.OPEN
_ENDED: Final = State.ENDED
_ADOPTED: Final = State.ADOPTED
_SLOTS: Final = Unit.SLOTS

_ANSWER_MS: Final = 5
"""What takes longer may have been a provider's answer, in code that blocks the event loop."""

_NONE: Final[AbstractSet[str]] = frozenset()


class Claimed:
    """One LLM call, as far as what it holds is concerned."""

    __slots__ = (
        "_adopter",
        "_answer",
        "_began_ms",
        "_dispatched",
        "_donated_by",
        "_first_ms",
        "_gaps",
        "_hit",
        "_idle",
        "_items",
        "_left",
        "_lock",
        "_moment",
        "_released",
        "_seen",
        "_started_ms",
        "_state",
        "_turns",
        "admission",
        "attempt_number",
        "call",
        "failed",
        "function",
        "halted",
        "hold",
        "leave",
        "outcome",
        "parent",
        "policies",
        "siblings",
        "side",
        "stacked",
        "taken",
        "task",
        "wait",
    )

    def __init__(
        self, admission: Admission, parent: Claimed | None, policies: Sequence[Policy], call: Call | None
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
        self.leave: Callable[[], None] | None = None
        """Reads no more of its answer: for when nobody can go on with it. Called in an event loop."""
        self.halted: Denied | None = None
        """Why it was ended from outside; see `halting.py`."""
        self.wait: Wait | None = None
        """Where it waits for its provider."""
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
        self._adopter: Claimed | None = None
        self._donated_by: Claimed | None = None
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
        self._seen: Callable[[], Answer | None] | None = None
        self._started_ms = admission.engine.clock.now_ms()
        self._first_ms: int | None = None
        self._gaps: Gaps | None = None
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------- claim

    async def claim(self, *, requests: bool = False) -> None:
        """Adopt the nearest enclosing hold, or claim an own one.

        `requests`: also claim the policies that count requests, where no scope around holds them.

        Raises:
            LimitExceeded: refused; nothing was taken, and an enclosing hold is as it was.
        """
        denied = await self._in_turn(((self.policies, self.call),), requests=requests)
        if denied:
            raise LimitExceeded(denied[0])

    async def claim_any(self, candidates: Sequence[Candidate], *, untold: Untold | None = None) -> Sequence[Denied]:
        """As `claim`, for the first of several candidates that fits, whose policies and call become this one's.

        In one trip; where there is a hold to adopt, in one for each that is tried. The refusal of each candidate, in
        order, if none fits: then nothing was taken, and an enclosing hold is as it was.

        `untold`: takes the refusals that observers are not told of here: whoever asks others then tells them
        (`Telling.denied_any`) if those do not answer either. `None`: they are told at once.
        """
        route, describer = self.admission.context.route, self.admission.engine.describer
        return await self._in_turn(
            [(tuple(policies), None if call is None else describer.held(route, call)) for policies, call in candidates],
            requests=False, untold=untold,
        )  # fmt: skip

    async def _in_turn(
        self, candidates: Sequence[Candidate], *, requests: bool, untold: Untold | None = None
    ) -> Sequence[Denied]:
        if self.siblings is None:
            return await self._claim(candidates, requests=requests, untold=untold)
        async with self.siblings.turns.take():
            return await self._claim(candidates, requests=requests, untold=untold)

    async def _claim(
        self, candidates: Sequence[Candidate], *, requests: bool, untold: Untold | None
    ) -> Sequence[Denied]:
        admission, engine = self.admission, self.admission.engine
        if (halted := admission.halted or self.halted) is not None:
            self._not_granted()
            return [halted] * len(candidates)
        outer = self.parent.taken if self.parent is not None else frozenset()
        if admission.hold is not None and not admission.ended:
            outer |= {claim.meter.key for claim in admission.hold.claims}
        self.taken = outer
        donor = self._donor()
        answer: bool | Reserved | list[Denied] = False
        try:
            if donor is not None:
                answer = await self._adopt(donor, candidates, requests=requests, untold=untold)
            if answer is False:
                requests = requests and self.side is None
                if self.siblings is not None:
                    self.attempt_number = self.siblings.next
                    outer = outer.union(self.siblings.taken())
                answer = await engine.reserve_any(
                    *(candidates, admission.context),
                    requests=requests, taken=outer, shared=admission.shared, attempt=self.attempt_number,
                    told=untold is None,
                )  # fmt: skip
                if untold is not None and isinstance(answer, list):
                    untold += [(call, denied) for (_, call), denied in zip(candidates, answer, strict=True)]
        except BaseException:
            self._not_granted()
            raise
        if isinstance(answer, list):
            self._not_granted()
            admission.refused = True
            return answer
        if isinstance(answer, Reserved):
            self.policies = tuple(candidates[answer.candidate][0])
            self.call = answer.described
            self._begin(answer.call)
            if self.siblings is not None and answer.call is not None:
                self.siblings.granted(self, answer.call, self._wanted() & self.siblings.taken(self))
            if requests:
                self._keep_side(answer.request)
        halted = admission.halted
        if halted is None and (stopped := engine.overrides.stopped(admission.context, self.call)) is not None:
            halted = engine.refused(admission.context, self.call, stopped)
        if halted is not None:  # meanwhile
            self.release()
            self.end()
            return [halted] * len(candidates)
        return ()

    def halt(self, denied: Denied) -> None:
        """End it from outside. Whoever waits for its provider has still to be called back."""
        if self.halted is None:
            self.halted = self.admission.stopped = denied
            self.admission.refused = True

    @property
    def is_open(self) -> bool:
        """It holds something, and no call inside it has taken that over."""
        return self._state is _OPEN and self.hold is not None

    def _not_granted(self) -> None:
        self._state = _ENDED
        self.failed = True
        if self.side is not None:
            self.admission.settle([request_settlement(self.side)])
            self.side = None

    def _wanted(self) -> AbstractSet[str]:
        """The meters that this call claims on by itself."""
        context, now_ms = self.admission.context, self.admission.engine.clock.now_ms()
        asked = ask(self.policies, context, self.call, now_ms, requests=False)
        return {claim.meter.key for claim in asked.calls}

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
        donor = self._donated_by
        while donor is not None:  # those that the hold was adopted from stand for the same attempt
            donor.siblings = self.siblings
            donor = donor._donated_by  # noqa: SLF001 - another one of this class
        return self.siblings

    async def amend(self, call: Call, *, told: bool = True) -> None:
        """Hold what `call` may cost in place of what is held: before it is sent to another model, for example.

        `told`: whether observers are told of a refusal; not, where the call is made as it is held then.

        Raises:
            LimitExceeded: refused; what is held is as it was.
            ContextError: the call is not open, or one inside it has taken its hold over.
        """
        answer = await self._change(call, told=told)
        if answer is None:  # it expired, and is charged: nothing can be put in its place but more
            raise ContextError("amend: the hold of this call has expired and is charged; make another attempt")
        if isinstance(answer, Denied):
            raise LimitExceeded(answer)

    async def grow(self, call: Call) -> Denied | None:
        """As `amend`, for a stream that goes on longer than expected: nobody is waited for, and a refusal is a value."""
        answer = await self._change(call, growing=True)
        return answer if isinstance(answer, Denied) else None

    async def _change(self, call: Call, *, growing: bool = False, told: bool = True) -> Hold | Denied | None:
        if self.halted is not None:
            return self.halted
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
                    one_of=not told,
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
        if admission.halted is not None:
            self._not_granted()
            raise LimitExceeded(admission.halted)
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

    def _donor(self) -> Claimed | None:
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

    async def _adopt(
        self, donor: Claimed, candidates: Sequence[Candidate], *, requests: bool, untold: Untold | None
    ) -> bool | list[Denied]:
        """Take the hold of `donor` over, for the first candidate that fits. `False`: it expired meanwhile."""
        engine, context = self.admission.engine, self.admission.context
        hold = donor.hold
        assert hold is not None  # noqa: S101 - `lend` saw it, and nobody else takes it
        side: Hold | None = None
        asking = Asking()
        amended: Hold | Denied | None = None
        denied: list[Denied] = []
        refused: Untold = []
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
                    return [answer]
                side = answer.request
            taken = _NONE
            if donor.siblings is not None:  # it is the same attempt
                self.siblings, self.attempt_number = donor.siblings, donor.attempt_number
                taken = donor.siblings.taken(donor)
            elif self.siblings is not None:
                self.attempt_number = self.siblings.next
                taken = self.siblings.taken()
            for policies, described in candidates:
                call = donor.call if described is None else described
                amended = await engine.amend(
                    *(hold, policies, context, call),
                    taken=taken, shared=self.admission.shared, asking=asking, attempt=self.attempt_number, one_of=True,
                )  # fmt: skip
                if not isinstance(amended, Denied):
                    self.policies, self.call = tuple(policies), call
                    break
                denied.append(amended)
                refused.append((call, amended))
                if asking.unknown:  # whose claims the hold has by now is not known, so no other is tried
                    denied += [amended] * (len(candidates) - len(denied))
                    break
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
            if untold is None:  # last: nothing is to be undone if observers are interrupted
                engine.telling.denied_any(context, refused)
            else:
                untold += refused
            return denied
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

    # ---------------------------------------------------------------- what `ActiveCall` does

    def release(self) -> None:
        raise NotImplementedError

    def end(self, error: BaseException | None = None, *, complete: bool = True) -> Pending[tuple[Settled, ...]]:
        raise NotImplementedError

    def settlements(self, error: BaseException | None, *, complete: bool = True) -> list[Settlement]:
        raise NotImplementedError

    def close_unseen(self, answer: Answer | None, *, status: int | None, complete: bool) -> list[Settlement]:
        raise NotImplementedError

    def _settlement(self, charge: Charge, *, recorded: bool = True, keep_calls: bool = False) -> Settlement:
        raise NotImplementedError

    def _record(self, hold: Hold, charge: Charge, now_ms: int) -> UsageRecord:
        raise NotImplementedError


def request_settlement(hold: Hold) -> Settlement:
    """Rates stay as they were taken; slots are free again."""
    amounts = tuple([0 if claim.meter.unit is _SLOTS else None for claim in hold.claims])
    return Settlement(hold.call_id, amounts, None, hold.receipts)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop is running
        return None
