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

Rule 6: a call may take several attempts; see `attempts.py`.

Rule 7: a refusal inside a call says that nothing was sent only if nothing can have been: every call
is seen, or nothing was waited for but the refused one. Else the hold is charged.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Awaitable, Sequence
from typing import Protocol

from asgi_llm_guard.active_call import NOTHING, ActiveCall
from asgi_llm_guard.attempts import Attempts
from asgi_llm_guard.claimed import Claimed, request_settlement
from asgi_llm_guard.claims import Receipt, Settled, Settlement
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Denied
from asgi_llm_guard.denials import together
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.engine.holds import Hold
from asgi_llm_guard.errors import ContextError, StorageError
from asgi_llm_guard.halting import Front, call_back
from asgi_llm_guard.outcomes import Refusals
from asgi_llm_guard.policies.base import CacheDirective, Policy
from asgi_llm_guard.scope import current_scope, enter, leave
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.wire.base import Answer

__all__ = ["ActiveCall", "Admission", "Scope", "current_admission", "current_scope", "enter", "leave"]


class Deferred(Protocol):
    """What ends with its admission."""

    def settlements(self, error: BaseException | None, *, complete: bool) -> Sequence[Settlement]:
        """End it, and give what is to be handed over for it."""
        ...


class Admission:
    """One request or job: who asks, what was granted, and the calls made inside it."""

    __slots__ = (
        "_attempts",
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
        "front",
        "halted",
        "hold",
        "opaque",
        "policies",
        "receipts",
        "refusals",
        "refused",
        "release_on_4xx",
        "root",
        "seen",
        "shared",
        "stopped",
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
        self.halted: Denied | None = None
        """Why it was ended from outside: nothing is claimed in it any more. See `halting.py`."""
        self.stopped: Denied | None = None
        """Why it, or the last call inside it that was, was ended from outside."""
        self.front: Front | None = None
        """What stands between its application and the client."""
        self._attempts: Attempts | None = None
        self.refusals: Refusals | None = None
        """What client hooks have answered inside it."""
        self._lock = threading.Lock()
        self._deferred: list[Deferred] = []
        self._ended = False
        self._pending: Pending[tuple[Settled, ...]] = NOTHING
        self.calls: set[Claimed] = set()
        """Those inside it that hold something."""
        self._handed: list[Pending[tuple[Settled, ...]]] = []

    async def open(
        self, call: Call | None, *, requests: bool = True, calls: bool = True, clamp: bool = False
    ) -> Denied | None:
        """Claim what the request costs, and with `calls` one call. A `Denied` has taken nothing.

        Of a call that is one of several, the first one that fits is held for; what is made of it changes the hold.
        """
        route, describer = self.context.route, self.engine.describer
        one_of: Sequence[Call | None] = (call,) if call is None or not call.one_of else call.one_of
        candidates = [(self.policies, None if each is None else describer.held(route, each)) for each in one_of]
        answer = await self.engine.reserve_any(candidates, self.context, requests=requests, calls=calls, clamp=clamp)
        if isinstance(answer, list):
            return together(answer, disclose=self.engine.disclose)
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

    @property
    def attempts(self) -> Attempts:
        """The attempts inside it that may be repeated."""
        with self._lock:
            if self._attempts is None:
                self._attempts = Attempts()
            return self._attempts

    def refusal_token(self, denied: Denied) -> str:
        """What the answer of a client hook says so that a refusal is recognised in what a library makes of it."""
        if self.refusals is None:
            self.refusals = Refusals()
        return self.refusals.token(denied)

    def refusal_answered(self) -> None:
        """The response to this request is a refusal of a call inside it: nothing was sent that nobody saw."""
        if self.root is not None:
            self.root.release()

    def defer(self, call: Deferred) -> None:
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
        settlements: list[Settlement] = []
        for call in deferred:
            settlements += call.settlements(None, complete=complete)
        if root is not None:
            settlements += root.close_unseen(answer, status=status, complete=complete)
        if self.hold is not None:
            settlements.append(request_settlement(self.hold))
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
                    if call.leave is not None:
                        call.leave()
                    if call.task is task:  # else its answer is read on, in a task of its own
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

    def halt(self, denied: Denied) -> None:
        """End it from outside, and everything inside it: who waits for a provider is called back, a stream ends with
        `denied` for its last event, and nothing more is claimed. From any thread."""
        if self._ended and not self.calls:
            return
        if self.halted is None:
            self.halted = self.stopped = denied
            self.refused = True
            waiting = self.halt_calls(denied, tuple(self.calls))
            if self.front is not None:
                self.front.halt(denied, patiently=waiting)

    def halt_calls(self, denied: Denied, calls: Sequence[Claimed]) -> bool:
        """As `halt`, for some of the calls inside it. Whether any of them has an answer of its own to end."""
        for call in calls:
            call.halt(denied)
        ending = [call for call in calls if call.is_open and (call.wait is not None or call.leave is not None)]
        call_back([call.wait for call in ending if call.wait is not None])
        return bool(ending)

    def abort(self) -> None:
        """End it and every call inside it, though they are still running: by what was seen of them."""
        self.end(complete=False)
        for call in tuple(self.calls):
            call.end(complete=False)
            if call.leave is not None:
                call.leave()


async def _over(pending: Awaitable[object]) -> None:
    # What the storage does not take is the engine's to try again, and nobody's here. Here, and not where it is
    # awaited: whoever waits may be cancelled.
    with contextlib.suppress(StorageError):
        await pending


Scope = Admission | ActiveCall


def current_admission() -> Admission:
    """The admission that this code runs in.

    Raises:
        ContextError: there is none.
    """
    scope = current_scope()
    if scope is None:
        raise ContextError(
            "no admission is open here: add GuardMiddleware to the application, or open one with "
            "`async with guard.open(Context(...))`"
        )
    return scope.admission if isinstance(scope, ActiveCall) else scope
