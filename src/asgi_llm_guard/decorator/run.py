"""One call of a guarded function: what it claims before, and how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from asgi_llm_guard import background
from asgi_llm_guard.admission import ActiveCall, Admission, current_scope, enter, leave
from asgi_llm_guard.cache import FunctionCache, Lookup
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ContextError, LimitExceeded
from asgi_llm_guard.estimate import message_tokens
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.opening import refuse_while_draining
from asgi_llm_guard.policies.base import Policy

__all__ = ["Run", "Work"]


class Work:
    """What one `@guarded` was told, and what it does at each call."""

    def __init__(
        self,
        policies: tuple[Policy, ...],
        model: str | None,
        described: dict[str, Any],
        given: Callable[..., object] | None,
        input_tokens: int | None,
        guard: Guard | None,
        context: Context | Callable[..., Context] | None,
        cache: bool | Callable[..., object],
    ) -> None:
        self.policies = policies
        self.model = model
        self.described = described
        self.input = given
        self.input_tokens = input_tokens
        self.guard = guard
        self.context = context
        self.cache = cache
        self._bound: tuple[object, tuple[Policy, ...]] | None = None

    def start(self, function: Callable[..., Any], stacked: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """The call, which has claimed nothing yet, and the admission that it opens if there is none."""
        scope = current_scope()
        admission = scope.admission if isinstance(scope, ActiveCall) else scope
        own: Admission | None = None
        guard = self.guard
        if admission is None or (guard is not None and admission.engine is not guard.engine):
            if guard is None:
                raise ContextError(
                    f"@guarded {_name(function)}: no admission is open here. Add GuardMiddleware to the "
                    "application, wrap the job in `async with guard.open(Context(...))`, or name the guard: "
                    "@guarded(..., guard=guard)"
                )
            own = admission = guard.new_admission(self._context(args, kwargs))
            scope = own
        parent = scope if isinstance(scope, ActiveCall) else None
        inherited = parent.policies if parent is not None else admission.policies
        described = None if self.model is None else self._describe(admission, args, kwargs)
        call = ActiveCall(admission, parent, (*inherited, *self._extra(admission)), described)
        call.function = True
        call.stacked = stacked
        return Run(call, own, guard)

    def _context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
        if self.context is None:
            return Context()
        return self.context if isinstance(self.context, Context) else self.context(*args, **kwargs)

    def _extra(self, admission: Admission) -> tuple[Policy, ...]:
        if not self.policies:
            return ()
        engine = admission.engine
        if self._bound is None or self._bound[0] is not engine:
            self._bound = (engine, engine.bind(self.policies))
        return self._bound[1]

    def _describe(self, admission: Admission, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        assert self.model is not None  # noqa: S101 - asked for with a model only
        describer = admission.engine.describer
        if self.input_tokens is not None:
            return describer.describe(self.model, input_tokens=self.input_tokens, **self.described)
        if self.input is not None:
            return describer.describe(self.model, input=self.input(*args, **kwargs), **self.described)
        tokens = describer.assumed_input_tokens + sum(map(_text_tokens, (*args, *kwargs.values())))
        call = describer.describe(self.model, input_tokens=tokens, **self.described)
        return msgspec.structs.replace(call, assumed=True)  # the function may add what it likes


class Run:
    """One call of a guarded function. As a block: what the function does, and the end of the call after it."""

    __slots__ = ("_guard", "call", "claimed", "deferred", "inside", "own")

    def __init__(self, call: ActiveCall, own: Admission | None, guard: Guard | None) -> None:
        self.call = call
        self.own = own
        self._guard = guard
        self.claimed = False
        self.deferred = False
        """The function has returned, and its response is still to be streamed: the call ends with it."""
        self.inside = Inside(call)

    async def claim(self) -> None:
        """Take what the call costs, once.

        Raises:
            LimitExceeded: refused; nothing was taken.
        """
        if not self.claimed:
            if self.own is not None and self._guard is not None:
                refuse_while_draining(self._guard, self.own)
            await self.call.claim(requests=True)
            self.claimed = True
            if self.own is not None and self._guard is not None:
                self._guard.track(self.own)

    def claim_sync(self) -> None:
        """As `claim`, for synchronous code."""
        if not self.claimed:
            background.run(self.claim(), undo=self.call.discard)

    async def look_up(self, cached: FunctionCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lookup | None:
        """Whether the return value is kept; `None`: the guard keeps nothing."""
        cache = self.call.admission.engine.cache
        if cache is None:
            return None
        return await cache.look_up_value(self.call, cached.kind, cached.key(args, kwargs), requests=True)

    def given(self, cached: FunctionCache, found: Lookup) -> Any:
        """The return value that was kept.

        Raises:
            Unfit: it is of no use; it is forgotten.
        """
        if self.own is not None:
            self.own.end()
        return cached.value(found)

    async def keep(self, cached: FunctionCache, found: Lookup, result: object) -> None:
        """Keep the return value of a call that has ended, if it may be kept."""
        answer = "it is still being streamed" if self.deferred else cached.answer(result)
        if isinstance(answer, str):
            found.refuse(answer)
        else:
            await found.store_judged(answer)

    def check_halted(self) -> None:
        """Raises `LimitExceeded` if it was ended from outside."""
        if self.call.halted is not None:
            raise LimitExceeded(self.call.halted)

    def __enter__(self) -> None:
        self.inside.__enter__()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.inside.__exit__()
        if not self.deferred:
            self.end(error)

    def abandoned(self) -> None:
        """Its response is never sent."""
        self.call.end(complete=False)
        self._end_own(complete=False)

    def _end_own(self, *, complete: bool) -> None:
        if self.own is not None and self._guard is not None:
            self.own.end(complete=complete)
            self._guard.untrack(self.own)

    def end(self, error: BaseException | None) -> None:
        """The function has ended, or the stream that it returned."""
        self.call.end(error)
        self._end_own(complete=True)


class Inside:
    """As a block, again and again: the code in it sees the call as its scope."""

    __slots__ = ("_call", "_token")

    def __init__(self, call: ActiveCall) -> None:
        self._call = call

    def __enter__(self) -> None:
        self._token = enter(self._call)

    def __exit__(self, *_: object) -> None:
        leave(self._token)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))


def _text_tokens(argument: object) -> int:
    if getattr(argument, "scope", None) is not None:  # a request: its body is what the function adds
        return 0
    modelled = callable(getattr(argument, "model_dump", None)) or dataclasses.is_dataclass(argument)
    if modelled or isinstance(argument, (str, bytes, Mapping, Sequence, msgspec.Struct)):
        return message_tokens(argument)
    return 0
