"""The calls of a library that tells of each by callbacks: one begins here, and ends there, under an id of the library's."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Token
from typing import Final

from asgi_llm_guard import background
from asgi_llm_guard.active_call import ActiveCall
from asgi_llm_guard.admission import Admission, Scope
from asgi_llm_guard.claims import Settlement
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError, ContextError, LimitExceeded
from asgi_llm_guard.guard import DRAINING, Guard
from asgi_llm_guard.scope import current_scope, enter, leave

__all__ = ["Begun", "BegunCalls"]

_log = logging.getLogger("asgi_llm_guard")

_TOLD_WITHIN_S: Final = 5.0


class _Told(ActiveCall):
    """A call that is told of by callbacks."""

    __slots__ = ()


class Begun:
    """One call between its two callbacks."""

    __slots__ = ("call", "group", "own", "repeats", "task", "token", "used")

    def __init__(self, call: ActiveCall, own: Admission | None, group: Hashable, repeats: bytes | None) -> None:
        self.call = call
        self.own = own
        """The admission that was opened for it alone."""
        self.group = group
        self.repeats = repeats
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
        told_late: waits until the library has told of what has ended, for a library that does so in a task of
            its own: its calls are left open until then, though their admission has ended.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        guard: Guard,
        context: Context | Callable[[], Context] | None,
        *,
        told_late: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"guard: expected a Guard, got {guard!r}")
        if context is not None and not isinstance(context, Context) and not callable(context):
            raise ConfigurationError(
                f"context: expected a Context, a function that gives one, or None, got {context!r}"
            )
        self.guard = guard
        self._context = context
        self._told_late = told_late
        self._looking: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._begun: dict[Hashable, Begun] = {}
        guard.hooked = True

    async def begin(
        self, key: Hashable, described: Call, *, group: Hashable = None, repeats: bytes | None = None
    ) -> Begun:
        """Claim a call. Those that have begun for the same `group` in this task go with it: refused, none is made.

        `repeats`: what is the same for all attempts of one call; after one that failed, this is another of them.

        Raises:
            LimitExceeded: refused; nothing was taken.
            ContextError: no admission of the guard is open here, and there is no context for such calls.
        """
        begun = self._new(described, group, repeats)
        await self._claim(begun)
        self._keep(key, begun)
        return begun

    def begin_sync(self, key: Hashable, described: Call, *, group: Hashable = None) -> Begun:
        """As `begin`, for synchronous code, on whatever thread it runs."""
        begun = self._new(described, group, None)
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
        # For a library that never tells of its end.
        if self._told_late is None:
            begun.call.admission.defer(begun.call)
        else:
            begun.call.task = None  # nor does the admission end it when it is closed
            begun.call.admission.defer(_Late(self, key, begun))
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

    def _new(self, described: Call, group: Hashable, repeats: bytes | None) -> Begun:
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
            return Begun(_Told(own, None, own.policies, described), own, group, repeats)
        if repeats is not None and (failed := admission.attempts.find(repeats)) is not None:
            return Begun(failed.attempt(described), None, group, repeats)
        parent = scope if isinstance(scope, ActiveCall) else None
        policies = admission.policies if parent is None else parent.policies
        return Begun(_Told(admission, parent, policies, described), None, group, repeats)

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
        if begun.repeats is not None:
            begun.call.admission.attempts.note(begun.repeats, begun.call)
        self._settle_own(begun)

    def look_once_more(self, key: Hashable) -> None:
        """The admission of a call has ended: end it when the library has told of all that it will."""
        look = asyncio.get_running_loop().create_task(self._look(key))
        self._looking.add(look)
        look.add_done_callback(self._looking.discard)

    async def _look(self, key: Hashable) -> None:
        try:
            if self._told_late is not None:
                async with asyncio.timeout(_TOLD_WITHIN_S):
                    await self._told_late()
        except Exception:  # noqa: BLE001 - the library's own code
            _log.warning("a library did not tell of a call that has ended; it is charged what it holds", exc_info=True)
        finally:
            self.end(key, complete=False)

    def _settle_own(self, begun: Begun) -> None:
        if begun.own is not None:
            begun.own.end()
            self.guard.untrack(begun.own)


class _Late:
    """A call that its library may tell of after its admission has ended."""

    def __init__(self, calls: BegunCalls, key: Hashable, begun: Begun) -> None:
        self._calls = calls
        self._key = key
        self._begun = begun

    def settlements(self, error: BaseException | None, *, complete: bool) -> Sequence[Settlement]:
        """Nothing yet, in an event loop that goes on; the call's own, elsewhere."""
        if self._calls.find(self._key) is not self._begun:
            return ()
        try:
            self._calls.look_once_more(self._key)
        except RuntimeError:  # no event loop is running
            return self._begun.call.settlements(error, complete=complete)
        return ()


def _outer_scope(scope: Scope | None) -> Scope | None:
    """The nearest scope that is no call of a callback's: such a one runs beside this, or left its scope behind."""
    while isinstance(scope, _Told):
        scope = scope.parent if isinstance(scope.parent, ActiveCall) else scope.admission
    return scope


def _task() -> object:
    """What runs here: a task, else a thread."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:
        return threading.current_thread()
