"""What `guard.open` and `guard.call` give: blocks to enter, for asynchronous and synchronous code."""

from __future__ import annotations

from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING

from asgi_llm_guard import background
from asgi_llm_guard.admission import ActiveCall, Admission, Scope, current_scope, enter, leave
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.engine import Engine
from asgi_llm_guard.errors import ContextError, LimitExceeded
from asgi_llm_guard.policies.base import Policy

if TYPE_CHECKING:
    from asgi_llm_guard.guard import Guard

__all__ = [
    "DRAINING",
    "OpenAdmission",
    "OpenAdmissionSync",
    "OpenCall",
    "OpenCallSync",
    "new_call",
    "refuse_while_draining",
]

DRAINING = Refusal(
    policy="guard",
    code="guard_draining",
    message="This instance is shutting down and takes no new calls. Try again in a moment.",
)
"""The refusal of everything that begins after `Guard.drain`."""


class OpenAdmission:
    """What `guard.open` gives: enter it."""

    __slots__ = ("_admission", "_guard", "_token")

    def __init__(self, guard: Guard, context: Context, extra: tuple[Policy, ...]) -> None:
        self._guard = guard
        self._admission = guard.new_admission(context, extra=extra)
        self._token: Token[Scope | None] | None = None

    async def __aenter__(self) -> Admission:
        refuse_while_draining(self._guard, self._admission)
        denied = await self._admission.open(None, calls=False)
        if denied is not None:
            raise LimitExceeded(denied)
        self._guard.track(self._admission)
        self._token = enter(self._admission)
        return self._admission

    async def __aexit__(self, *exc_info: object) -> None:
        _leave(self._token)
        try:
            await self._admission.close()
        finally:
            self._guard.untrack(self._admission)


class OpenAdmissionSync:
    """What `guard.open_sync` gives: enter it."""

    __slots__ = ("_admission", "_guard", "_token")

    def __init__(self, guard: Guard, context: Context, extra: tuple[Policy, ...]) -> None:
        self._guard = guard
        self._admission = guard.new_admission(context, extra=extra)
        self._token: Token[Scope | None] | None = None

    def __enter__(self) -> Admission:
        refuse_while_draining(self._guard, self._admission)
        denied = background.run(self._admission.open(None, calls=False), undo=self._admission.end)
        if denied is not None:
            raise LimitExceeded(denied)
        self._guard.track(self._admission)
        self._token = enter(self._admission)
        return self._admission

    def __exit__(self, *exc_info: object) -> None:
        _leave(self._token)
        try:
            self._admission.close_sync()
        finally:
            self._guard.untrack(self._admission)


class OpenCall:
    """What `guard.call` gives: enter it."""

    __slots__ = ("_call", "_described", "_engine", "_extra", "_token")

    def __init__(self, engine: Engine, described: Call | None, extra: tuple[Policy, ...]) -> None:
        self._engine = engine
        self._described = described
        self._extra = extra
        self._call: ActiveCall | None = None
        self._token: Token[Scope | None] | None = None

    async def __aenter__(self) -> ActiveCall:
        call = new_call(self._engine, self._described, self._extra)
        await call.claim()
        self._call = call
        self._token = enter(call)
        return call

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self._token)
        if self._call is not None:
            self._call.end(error)


class OpenCallSync:
    """What `guard.call_sync` gives: enter it."""

    __slots__ = ("_call", "_described", "_engine", "_extra", "_token")

    def __init__(self, engine: Engine, described: Call | None, extra: tuple[Policy, ...]) -> None:
        self._engine = engine
        self._described = described
        self._extra = extra
        self._call: ActiveCall | None = None
        self._token: Token[Scope | None] | None = None

    def __enter__(self) -> ActiveCall:
        call = new_call(self._engine, self._described, self._extra)
        background.run(call.claim(), undo=call.discard)
        self._call = call
        self._token = enter(call)
        return call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self._token)
        if self._call is not None:
            self._call.end(error)


def new_call(engine: Engine, described: Call | None, extra: tuple[Policy, ...]) -> ActiveCall:
    """A call in the current scope that has claimed nothing yet.

    Raises:
        ContextError: no admission of `guard` is open here.
    """
    scope = current_scope()
    admission = scope.admission if isinstance(scope, ActiveCall) else scope
    if admission is None or admission.engine is not engine:
        raise ContextError(
            "guard.call: no admission of this guard is open here: add GuardMiddleware to the application, "
            "or wrap the job in `async with guard.open(Context(caller=...))`"
        )
    parent = scope if isinstance(scope, ActiveCall) else None
    inherited = parent.policies if parent is not None else admission.policies
    return ActiveCall(admission, parent, (*inherited, *extra), described)


def _leave(token: Token[Scope | None] | None) -> None:
    if token is not None:
        leave(token)


def refuse_while_draining(guard: Guard, admission: Admission) -> None:
    """Begin nothing while the service goes down.

    Raises:
        LimitExceeded: it does.
    """
    if guard.draining:
        raise LimitExceeded(admission.engine.refused(admission.context, None, DRAINING))
