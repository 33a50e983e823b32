"""A past period under other policies: who would have been refused, when, by which policy, and for how much money.

    usage records, oldest first   the clock is set to the instant of each admission and of each settlement
    reserve                       the guard's own engine over a storage in memory: what was held, under the candidates
    settle                        what was used, when it was known

Rule 1: the ledger has what was done. What was refused then is in no ledger and is not asked again; what a caller
would have done after a refusal is not known, so every call is asked by itself. Only further attempts of a refused
call, and further calls of a refused request, fall with it.

Rule 2: amounts are the record's. Money is held as it was (`estimate_nanousd`) and settled as it was. Held tokens are
not recorded: they are worked out from the money that was held, the output's price and the input that was measured.

Rule 3: calls of one request are recognised by its id, attempts by their call. What counts requests is asked once for
them, and its slots are kept from the first call to the end of the last. A request that made no call is in no ledger.

Rule 4: counters begin at zero with the first record. Give a time before the period that is as long as the longest
window, and they are as they were.

Rule 5: memory is bounded by what is open at the same time, and by the subjects that are counted.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Protocol

import msgspec

from asgi_llm_guard.charge import Charge, actuals
from asgi_llm_guard.claims import ATTEMPT_SCOPE, Claim, Settlement, Unit
from asgi_llm_guard.context import Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.describe import as_used
from asgi_llm_guard.engine.holds import Hold, Reserved
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Admission, Event, ShadowMisfit
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.identity.extract import DEFAULT_SESSION
from asgi_llm_guard.plan import ask
from asgi_llm_guard.policies._scoped import NamedPolicy
from asgi_llm_guard.policies.base import AgentAware, Policy, SessionAware
from asgi_llm_guard.routes import Route
from asgi_llm_guard.simulate.recorded import Place, Recorded, context_of, end_ms, misfit_of, place_of
from asgi_llm_guard.simulate.report import Misfit, Simulation, Tally, plain_name
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.usage import UsageRecord

__all__ = ["Simulator"]

_NEVER_MS: Final = 100 * 366 * 86_400_000
_AHEAD: Final = 5_000
"""How many records are looked ahead, to know when a request is over."""
_REQUEST_GAP_MS: Final = 600_000
"""Calls further apart than this are of different requests, whatever id they share: clients choose it."""
_STEP: Final = 1_000
_SAME: Final = (
    "agents",
    "prices",
    "session",
    "session_limit",
    "anonymous_session_limit",
    "session_overflow",
    "session_ttl",
    "statuses",
)
"""The arguments of `Guard` that decide; the others are about where and how."""
_NONE: Final[AbstractSet[str]] = frozenset()


class _Clock:
    """Stands at the instant that is replayed."""

    __slots__ = ("_now_ms",)

    def __init__(self) -> None:
        self._now_ms = 0

    def now_ms(self) -> int:
        return self._now_ms

    def reach(self, at_ms: int) -> None:
        """Go on to an instant; never back, as the storage's clock."""
        self._now_ms = max(self._now_ms, at_ms)


class _Request:
    """The calls that belong together."""

    __slots__ = ("calls", "denied", "end_ms", "hold", "key", "left", "open", "refused", "shared", "taken")

    def __init__(self, key: tuple[str | None, str]) -> None:
        self.key = key
        self.left = 0
        """Calls that were read and not replayed yet."""
        self.open = 0
        """Calls that wait, or are admitted and not settled yet."""
        self.end_ms = 0
        self.hold: Hold | None = None
        self.taken: AbstractSet[str] = _NONE
        self.calls: dict[str, AbstractSet[str]] = {}
        """For each call, by the id of its first attempt, the meters that its later attempts find taken."""
        self.refused: set[str] = set()
        """Calls whose first attempt was refused."""
        self.denied: Denied | None = None
        """The refusal of all of it."""
        self.shared = False


_Read = tuple[Place, UsageRecord, _Request]
_by_place: Final = operator.itemgetter(0)


class _Open(msgspec.Struct, frozen=True):
    """A call that was admitted and is not settled yet."""

    record: UsageRecord
    request: _Request
    hold: Hold
    described: bool
    policies: tuple[Policy, ...]
    context: Context


class _Waiting(msgspec.Struct, frozen=True):
    """A call that only the holds of others keep out."""

    record: UsageRecord
    request: _Request
    denied: Denied
    misfits: tuple[Misfit, ...]
    """What shadows have said of it."""


class Progress(Protocol):
    """Is told how many records have been replayed: every thousand, and at the end."""

    def __call__(self, records: int, /) -> object: ...


class Simulator:
    """Replays usage records under candidate policies.

    Args:
        policies: asked in this order, as by a guard.
        routes: their `extra` policies are added for records of these routes, and where they say `clamp`, the output limit
            is lowered before a call is refused.
        apart: ask each policy by itself, as a shadow: one that refuses takes nothing from the others. Else they admit
            together or not at all, as when they are in force.
        hold_wait_s: how long a call waits where only the holds of others stand in its way.
        found: is told every misfit, for lists of them.
        params: gives the limits that belong to whoever made a record's call (`max_iterations`), as their key says.
        arguments: those of `Guard` that decide (`agents`, `prices`, `session_limit`, …); others are ignored.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        *,
        routes: Sequence[Route] = (),
        apart: bool = False,
        hold_wait_s: float = 0.25,
        found: Callable[[Misfit], object] | None = None,
        params: Callable[[UsageRecord], Mapping[str, object]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        given = arguments or {}
        self._clock = _Clock()
        storage = MemoryStorage(clock=self._clock, lapse_ms=_NEVER_MS, max_records=1)
        decide = {name: given[name] for name in _SAME if name in given}
        self._guard = Guard(storage=storage, clock=self._clock, disclose="all", hold_wait_s=0, **decide)
        self._engine = self._guard.engine
        self._recorded = Recorded(self._guard.prices)
        self._agents = given.get("agents") or {}
        self._sources = given.get("session", DEFAULT_SESSION).names
        self._apart = apart
        self._policies = self._bound(policies)
        self._routes = {route.path: (*self._policies, *self._bound(route.extra)) for route in routes if route.extra}
        # A shadow lowers no limit.
        self._clamps = frozenset(route.path for route in routes if route.clamp and not apart)
        self._params = params
        everywhere = itertools.chain(self._policies, *self._routes.values())
        if any(plain_name(policy.name) != policy.name for policy in everywhere):
            self._engine.observe(self._observe)
        self._wait_ms = 0 if apart else round(hold_wait_s * 1000)
        self._found = found
        self._requests: dict[tuple[str | None, str], _Request] = {}
        self._ends: list[tuple[int, int, _Open]] = []
        self._order = itertools.count()
        self._waiting: list[_Waiting] = []
        self._misfits: list[Misfit] = []
        """Of shadows, since the last question."""
        self._admitted = False
        self._record: UsageRecord | None = None
        self._tally = Tally(0)

    async def run(
        self, records: AsyncIterator[Sequence[UsageRecord]], *, since_ms: int = 0, progress: Progress | None = None
    ) -> Simulation:
        """Replay batches of records, oldest first. Those before `since_ms` fill the counters and are not reported.

        Can be run once.
        """
        self._tally = Tally(since_ms)
        ahead: list[_Read] = []
        number = 0
        async for batch in records:
            ahead += [self._read(record) for record in batch]
            ahead.sort(key=_by_place)
            if len(ahead) > _AHEAD:
                due, ahead = ahead[:-_AHEAD], ahead[-_AHEAD:]
                number = await self._replay(due, number, progress)
        number = await self._replay(ahead, number, progress)
        await self._advance(_NEVER_MS * 10, clock=False)
        if progress is not None:
            progress(number)
        await self._guard.aclose()
        return self._tally.result()

    async def _replay(self, read: Sequence[_Read], number: int, progress: Progress | None) -> int:
        for _, record, request in read:
            await self._advance(record.at_ms)
            await self._admit(record, request)
            number += 1
            if progress is not None and not number % _STEP:
                progress(number)
        return number

    # ------------------------------------------------------------------------------- admit

    def _read(self, record: UsageRecord) -> _Read:
        """A record and the request that it belongs to, which is not over before it."""
        key = (record.caller, record.request_id or f"\x00{record.attempt_of or record.call_id}")
        request = self._requests.get(key)
        if request is None or record.at_ms > request.end_ms + _REQUEST_GAP_MS:
            request = self._requests[key] = _Request(key)
        request.left += 1
        request.end_ms = max(request.end_ms, end_ms(record))
        return place_of(record), record, request

    async def _admit(self, record: UsageRecord, request: _Request) -> None:
        request.left -= 1
        request.open += 1
        self._tally.saw(record, first=record.attempt_of is None)
        first_id = record.attempt_of or record.call_id
        if request.denied is not None:
            self._refuse(record, request, request.denied)
        elif first_id in request.refused:
            self._tally.follows(record)
            self._end(request)
        else:
            await self._ask(record, request)

    async def _ask(self, record: UsageRecord, request: _Request) -> None:
        """Reserve for a record, or have it wait for the holds of others."""
        policies = self._routes.get(record.route or "", self._policies)
        context = context_of(record) if self._params is None else context_of(record, self._params(record))
        call = self._recorded.call(record)
        first_id = record.attempt_of or record.call_id
        known = request.calls.get(first_id)
        taken = request.taken if known is None else request.taken | known
        self._misfits.clear()
        self._admitted = False
        self._record = record
        answer = await self._engine.reserve(
            policies,
            context,
            call,
            requests=request.hold is None,
            taken=taken,
            clamp=record.route in self._clamps,
            shared=request.shared,
            rates=record.outcome == "cached",
        )
        if isinstance(answer, Denied):
            if answer.code == "held_by_others" and self._wait_ms:
                self._waiting.append(_Waiting(record, request, answer, tuple(self._misfits)))
                return
            self._deny(record, request, answer)
        else:
            self._granted(record, request, answer, policies, context, described=call is not None)

    def _granted(
        self,
        record: UsageRecord,
        request: _Request,
        answer: Reserved,
        policies: tuple[Policy, ...],
        context: Context,
        *,
        described: bool,
    ) -> None:
        for misfit in self._misfits:
            self._report(misfit)
        if answer.request is not None:
            request.hold = answer.request
            request.taken = {claim.meter.key for claim in answer.request.claims}
        request.shared |= answer.shared
        hold = answer.call
        assert hold is not None  # noqa: S101 - a call was asked for
        if request.left or record.attempt_of is not None:
            first_id = record.attempt_of or record.call_id
            request.calls[first_id] = request.calls.get(first_id, _NONE) | _of_the_call(hold)
        limit = None if answer.described is None else answer.described.max_output_tokens
        if limit is not None:  # none was known: it was lowered
            record, cut = self._recorded.cut(record, limit)
            self._tally.clamped(record, cut=cut)
        entry = _Open(record, request, hold, described, policies, context)
        heapq.heappush(self._ends, (end_ms(record), next(self._order), entry))

    def _deny(self, record: UsageRecord, request: _Request, denied: Denied) -> None:
        policies = self._routes.get(record.route or "", self._policies)
        counts = next((policy.counts for policy in policies if policy.name == denied.policy), "calls")
        if counts == "requests":
            request.denied = denied
        request.refused.add(record.attempt_of or record.call_id)
        self._refuse(record, request, denied)

    def _refuse(self, record: UsageRecord, request: _Request, denied: Denied) -> None:
        for misfit in self._misfits:
            self._report(misfit)
        self._misfits.clear()
        self._report(
            misfit_of(
                record,
                denied.policy,
                denied.code,
                denied.scope,
                denied.subject,
                enforced=True,
                requested=denied.requested,
                used=denied.used,
                held=denied.held,
                limit=denied.limit,
            )
        )
        self._tally.refused(record, shorter=denied.fits_max_tokens is not None)
        self._end(request)

    def _report(self, misfit: Misfit) -> None:
        if self._tally.add(misfit) and self._found is not None:
            self._found(misfit)

    def _observe(self, event: Event) -> None:
        """Take what shadows say about the record that is being asked for."""
        record = self._record
        if record is None:
            return
        if isinstance(event, Admission):
            self._admitted = True
            for receipt in event.granted.receipts:
                meter = receipt.claim.meter
                if not meter.enforce and not receipt.fits and meter.limit is not None:
                    self._misfits.append(
                        misfit_of(
                            record,
                            meter.policy,
                            "shadow",
                            meter.scope,
                            meter.subject,
                            enforced=False,
                            requested=receipt.claim.amount,
                            used=receipt.used,
                            held=receipt.held,
                            limit=meter.limit,
                        )
                    )
        elif isinstance(event, ShadowMisfit) and not self._admitted:  # after it, they say the same again
            self._misfits.append(misfit_of(record, event.policy, "shadow", "", "", enforced=False))

    # -------------------------------------------------------------------------------- settle

    async def _advance(self, until_ms: int, *, clock: bool = True) -> None:
        """Settle what had ended by then, and let those in who waited for it."""
        while self._ends and self._ends[0][0] <= until_ms:
            at_ms, _, entry = heapq.heappop(self._ends)
            self._give_up(at_ms)
            self._clock.reach(at_ms)
            self._settle(entry)
            if self._waiting:
                await self._try_waiting()
        self._give_up(until_ms)
        if clock:
            self._clock.reach(until_ms)

    async def _try_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            await self._ask(each.record, each.request)

    def _give_up(self, now_ms: int) -> None:
        """Refuse those who have waited long enough."""
        while self._waiting and self._waiting[0].record.at_ms + self._wait_ms < now_ms:
            each = self._waiting.pop(0)
            self._misfits = list(each.misfits)
            self._deny(each.record, each.request, each.denied)

    def _settle(self, entry: _Open) -> None:
        record, hold = entry.record, entry.hold
        cost_nanousd = self._recorded.cost(record)
        charge = Charge(outcome=record.outcome, tokens=record.tokens, cost_nanousd=cost_nanousd)
        amounts = actuals(hold.claims, charge)
        if record.late:  # what was held stayed charged when it expired; only more than that was added
            amounts = tuple(
                None if amount is not None and amount < claim.amount and claim.meter.unit in _MEASURED else amount
                for claim, amount in zip(hold.claims, amounts, strict=True)
            )
        debits = () if entry.described else self._debits(entry, cost_nanousd)
        self._engine.settle([Settlement(hold.call_id, amounts, None, hold.receipts, debits)])
        self._end(entry.request)

    def _debits(self, entry: _Open, cost_nanousd: int | None) -> tuple[Claim, ...]:
        """What a call is charged that was not described before it was made."""
        usage = entry.record.usage
        if usage is None or entry.record.outcome == "cached":
            return ()
        described = as_used(usage, cost_nanousd)
        held = {claim.meter.key for claim in entry.hold.claims}
        debits: dict[str, Claim] = {}
        for policy in entry.policies:
            asked = ask((policy,), entry.context, described, self._clock.now_ms(), requests=False)
            debits.update(
                (claim.meter.key, claim)
                for claim in asked.calls
                if claim.meter.key not in held and claim.meter.unit in _MEASURED
            )
        return tuple(debits.values())

    def _end(self, request: _Request) -> None:
        """One of its calls is over. With the last one, what the request itself holds is given back."""
        request.open -= 1
        if request.left or request.open:
            return
        if request.hold is not None:
            hold = request.hold
            amounts = tuple(0 if claim.meter.unit is Unit.SLOTS else None for claim in hold.claims)
            self._engine.settle([Settlement(hold.call_id, amounts, None, hold.receipts)])
        if self._requests.get(request.key) is request:
            del self._requests[request.key]

    def _bound(self, policies: Sequence[Policy]) -> tuple[Policy, ...]:
        """The policies as a guard would have them, without what only several processes need."""
        bound: list[Policy] = []
        for policy in policies:
            if not isinstance(policy, Policy):
                raise ConfigurationError(f"policies: expected policies such as Iterations(25), got {policy!r}")
            known: Policy = policy
            if self._agents and isinstance(known, AgentAware):
                known = known.with_agents(self._agents)
            if isinstance(known, SessionAware):
                known = known.with_sources(self._sources)
            if self._apart:
                if not isinstance(known, NamedPolicy):
                    raise ConfigurationError(f"policies: {policy.name} has no shadow to be asked by itself")
                known = known.shadow()
            bound.append(known)
        return tuple(bound)


_MEASURED: Final = frozenset({Unit.TOKENS, Unit.NANOUSD})


def _of_the_call(hold: Hold) -> AbstractSet[str]:
    """The meters that count calls: taken once, whatever the number of attempts."""
    return {
        claim.meter.key
        for claim in hold.claims
        if claim.meter.unit is Unit.CALLS and claim.meter.scope != ATTEMPT_SCOPE
    }
