"""The calls of a library that tells of each by callbacks: one begins here, and ends there, under an id of the library's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from contextvars import Token

from asgi_llm_guard import background
from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.admission import Admission, Scope
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError, ContextError, LimitExceeded
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.scope import current_scope, enter, leave

__all__ = ["Begun", "BegunCalls"]


class _Told(ActiveCall):
    """A call that is told of by callbacks."""

    __slots__ = ()


class Begun:
    """One call between its two callbacks."""

    __slots__ = ("call", "group", "own", "task", "token", "used")

    def __init__(self, call: _Told, own: Admission | None, group: Hashable) -> None:
        self.call = call
        self.own = own
        """The admission that was opened for it alone."""
        self.group = group
        self.task = _task()
        self.token: Token[Scope | None] | None = None
        self.used = False
        """Something came back for it."""


class BegunCalls:
    """The calls of one callback handler that have begun and not ended.

    Args:
        guard: decides, and settles.
        context: who asks where no admission of the guard is open: a `Context`, or what gives one for each
            call. `None`: such calls are an error.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(self, guard: Guard, context: Context | Callable[[], Context] | None) -> None:
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"guard: expected a Guard, got {guard!r}")
        if context is not None and not isinstance(context, Context) and not callable(context):
            raise ConfigurationError(
                f"context: expected a Context, a function that gives one, or None, got {context!r}"
            )
        self.guard = guard
        self._context = context
        self._lock = threading.Lock()
        self._begun: dict[Hashable, Begun] = {}
        guard.hooked = True

    async def begin(self, key: Hashable, described: Call, *, group: Hashable = None) -> Begun:
        """Claim a call. Those that have begun for the same `group` in this task go with it: refused, none is made.

        Raises:
            LimitExceeded: refused; nothing was taken.
            ContextError: no admission of the guard is open here, and there is no context for such calls.
        """
        begun = self._new(described, group)
        await self._claim(begun)
        self._keep(key, begun)
        return begun

    def begin_sync(self, key: Hashable, described: Call, *, group: Hashable = None) -> Begun:
        """As `begin`, for synchronous code, on whatever thread it runs."""
        begun = self._new(described, group)
        background.run(self._claim(begun), undo=begun.call.discard, anywhere=True)
        self._keep(key, begun)
        return begun

    async def _claim(self, begun: Begun) -> None:
        try:
            if begun.own is not None:
                await self._open(begun.own, begun.call.call)
            await begun.call.claim()
        except BaseException:
            self._settle_own(begun)
            self._give_back(begun)
            raise

    async def _open(self, own: Admission, described: Call | None) -> None:
        if self.guard.draining:
            raise LimitExceeded(own.engine.refused(own.context, described, DRAINING))
        self.guard.track(own)
        denied = await own.open(None, calls=False)
        if denied is not None:
            raise LimitExceeded(denied)

    def _keep(self, key: Hashable, begun: Begun) -> None:
        with self._lock:
            self._begun[key] = begun
        begun.call.admission.defer(begun.call)  # a library that never tells of its end
        begun.token = enter(begun.call)

    def find(self, key: Hashable) -> Begun | None:
        """The call of this id, if it has begun and not ended."""
        with self._lock:
            return self._begun.get(key)

    def end(self, key: Hashable, error: BaseException | None = None, *, complete: bool = True) -> None:
        """The call has ended. Only the first time for an id does anything."""
        with self._lock:
            begun = self._begun.pop(key, None)
        if begun is not None:
            self._end(begun, error, complete=complete)

    def _new(self, described: Call, group: Hashable) -> Begun:
        scope = _outer_scope(current_scope())
        admission = scope.admission if isinstance(scope, ActiveCall) else scope
        if admission is None or admission.engine is not self.guard.engine:
            if self._context is None:
                raise ContextError(
                    "no admission of this guard is open where this model is called: add GuardMiddleware to the "
                    "application, wrap the job in `async with guard.open(Context(caller=...))`, or give the callback "
                    "a context=Context(caller=...)"
                )
            context = self._context if isinstance(self._context, Context) else self._context()
            own = self.guard.new_admission(context)
            return Begun(_Told(own, None, own.policies, described), own, group)
        parent = scope if isinstance(scope, ActiveCall) else None
        policies = admission.policies if parent is None else parent.policies
        return Begun(_Told(admission, parent, policies, described), None, group)

    def _give_back(self, refused: Begun) -> None:
        """Give back what has begun beside a call that was refused: the library stops before it sends any of them."""
        if refused.group is None:
            return
        with self._lock:
            beside = {
                key: begun
                for key, begun in self._begun.items()
                if begun.group == refused.group and begun.task is refused.task and not begun.used
            }
            for key in beside:
                del self._begun[key]
        for begun in beside.values():
            begun.call.release()
            self._end(begun, None, complete=True)

    def _end(self, begun: Begun, error: BaseException | None, *, complete: bool) -> None:
        if begun.token is not None:
            leave(begun.token)
        begun.call.end(error, complete=complete)
        self._settle_own(begun)

    def _settle_own(self, begun: Begun) -> None:
        if begun.own is not None:
            begun.own.end()
            self.guard.untrack(begun.own)


def _outer_scope(scope: Scope | None) -> Scope | None:
    """The nearest scope that is no call of a callback's: such a one runs beside this, or left its scope behind."""
    while isinstance(scope, _Told):
        scope = scope.parent or scope.admission
    return scope


def _task() -> object:
    """What runs here: a task, else a thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:
        return threading.current_thread()
