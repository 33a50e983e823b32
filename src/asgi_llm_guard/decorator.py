"""`@guarded`: a function that is an LLM call, or makes them.

Works on handlers (with or without a `request` parameter, `Depends`, class-based), and on any
function: coroutine functions, plain ones, generators of both kinds, and functions that return a
streaming response. A plain function stays one: frameworks run it in a worker thread as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from asgi_llm_guard import background
from asgi_llm_guard.admission import ActiveCall, Admission, current_scope, enter, leave
from asgi_llm_guard.cache import FunctionCache, Lookup, Unfit
from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.describe import check_description
from asgi_llm_guard.errors import ConfigurationError, ContextError, LimitExceeded
from asgi_llm_guard.estimate import message_tokens
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.halting import Halted, Wait
from asgi_llm_guard.marks import mark
from asgi_llm_guard.opening import refuse_while_draining
from asgi_llm_guard.policies.base import Policy

__all__ = ["guarded", "policies_of"]

F = TypeVar("F", bound=Callable[..., Any])

_METHODS: Final = ("get", "head", "post", "put", "patch", "delete", "options")


def guarded(
    *policies: Policy,
    model: str | None = None,
    provider: str | None = None,
    max_output_tokens: int | None = None,
    input: Callable[..., object] | None = None,  # noqa: A002 - the providers' own word
    input_tokens: int | None = None,
    choices: int = 1,
    guard: Guard | None = None,
    context: Context | Callable[..., Context] | None = None,
    cache: bool | Callable[..., object] = False,
) -> Callable[[F], F]:
    """Admit each call of the function under the guard's policies and these, and settle what it used.

    Usage is taken from calls made inside it, else from the return value or the streamed items.

    Args:
        policies: in addition to the guard's.
        model: describes the call: what is reserved before the function runs. Without it, the call
            that the request described is meant, else only what one call costs whatever it is.
        provider: where the model's name does not tell.
        max_output_tokens: the most it may generate; `None`: the model's maximum is held.
        input: gives the text or messages that will be sent, from the function's arguments, so that
            their tokens can be bounded.
        input_tokens: a bound that is known. With neither, the texts, messages and models among the
            arguments are counted, plus the guard's `assumed_input_tokens` for what the function adds.
        choices: how many answers it asks for.
        guard: for use outside a guarded application. `None`: the current admission's guard.
        context: with `guard`, outside any admission: who asks, or what gives it from the arguments.
            `None`: the shared anonymous caller.
        cache: give the return value again to calls with the same arguments, as the guard's cache and the `CacheScope`
            among the policies allow. A function makes the key from the arguments. See `docs/cache.md`.

    Raises:
        ConfigurationError: wrong arguments; when the module is loaded.
        ContextError: when called: no admission is open, and no `guard` was given.
        LimitExceeded: when called: refused. In a handler, the middleware answers it.
    """
    if len(policies) == 1 and callable(policies[0]) and not isinstance(policies[0], Policy):
        raise ConfigurationError("@guarded needs parentheses: @guarded() or @guarded(Iterations(5))")
    for policy in policies:
        if not isinstance(policy, Policy):
            raise ConfigurationError(f"@guarded: expected policies such as Iterations(5), got {policy!r}")
    described = {"provider": provider, "max_output_tokens": max_output_tokens, "choices": choices}
    if model is None and (provider, max_output_tokens, input, input_tokens, choices) != (None, None, None, None, 1):
        raise ConfigurationError("@guarded: provider, max_output_tokens, input and choices need a model")
    if model is not None:
        check_description(model, input_tokens=input_tokens, max_output_tokens=max_output_tokens, choices=choices)
    if context is not None and guard is None:
        raise ConfigurationError("@guarded: context= is for use with guard=; inside a request the caller is known")
    if not isinstance(cache, bool) and not callable(cache):
        raise ConfigurationError(f"@guarded: cache= is True, False or a function of the arguments, got {cache!r}")
    work = _Work(policies, model, described, input, input_tokens, guard, context, cache)

    def decorate(function: F) -> F:
        if inspect.isclass(function):
            return cast("F", _class(function, work))
        return cast("F", _wrap(function, work))

    return decorate


class _Work:
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

    def start(self, function: Callable[..., Any], stacked: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Run:
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
        return _Run(call, own, guard)

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


class _Run:
    """One call of a guarded function. As a block: what the function does, and the end of the call after it."""

    __slots__ = ("_guard", "call", "claimed", "deferred", "inside", "own")

    def __init__(self, call: ActiveCall, own: Admission | None, guard: Guard | None) -> None:
        self.call = call
        self.own = own
        self._guard = guard
        self.claimed = False
        self.deferred = False
        """The function has returned, and its response is still to be streamed: the call ends with it."""
        self.inside = _Inside(call)

    async def claim(self) -> None:
        if not self.claimed:
            if self.own is not None and self._guard is not None:
                refuse_while_draining(self._guard, self.own)
            await self.call.claim(requests=True)
            self.claimed = True
            if self.own is not None and self._guard is not None:
                self._guard.track(self.own)

    def claim_sync(self) -> None:
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

    def returned(self, result: object) -> object:
        """Take the usage of a return value; a streaming response is metered while it is sent."""
        body = getattr(result, "body_iterator", None)
        if body is None:
            if result is not None and not self.call.recorded:
                self.call.record_if_known(_content(result))
            return result
        kind = _generator if isinstance(body, Iterator) else _async_generator
        streamed = kind(lambda: body, lambda *_: self)()
        self.call.admission.defer(self.call)
        # A response that nobody sends never runs its body, and so never comes to the end of it.
        weakref.finalize(streamed, self._abandoned).atexit = False
        result.body_iterator = streamed  # type: ignore[attr-defined]  # it was there above
        self.deferred = True
        return result

    def _abandoned(self) -> None:
        self.call.end(complete=False)
        self._end_own(complete=False)

    def _end_own(self, *, complete: bool) -> None:
        if self.own is not None and self._guard is not None:
            self.own.end(complete=complete)
            self._guard.untrack(self.own)

    def end(self, error: BaseException | None) -> None:
        self.call.end(error)
        self._end_own(complete=True)


class _Inside:
    """As a block, again and again: the code in it sees the call as its scope."""

    __slots__ = ("_call", "_token")

    def __init__(self, call: ActiveCall) -> None:
        self._call = call

    def __enter__(self) -> None:
        self._token = enter(self._call)

    def __exit__(self, *_: object) -> None:
        leave(self._token)


# ------------------------------------------------------------------------------------ wrappers

_wrappers: weakref.WeakKeyDictionary[Callable[..., Any], tuple[Policy, ...]] = weakref.WeakKeyDictionary()
"""Every guarded function, and its policies."""

_Start = Callable[[tuple[Any, ...], dict[str, Any]], _Run]


def _wrap(function: Callable[..., Any], work: _Work) -> Callable[..., Any]:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_wrap(function.__func__, work))
    if not callable(function):
        raise ConfigurationError(f"@guarded: expected a function, got {function!r}")
    target = _code(function)
    if inspect.isasyncgenfunction(target):
        kind = _async_generator
    elif inspect.isgeneratorfunction(target):
        kind = _generator
    elif inspect.iscoroutinefunction(target):
        kind = _coroutine
    else:
        kind = _plain
    start = functools.partial(work.start, function, target in _wrappers)
    if work.cache is False:
        wrapper = kind(function, start)
    else:
        cached = FunctionCache(function, None if work.cache is True else work.cache)
        wrapper = (_cached_coroutine if kind is _coroutine else _cached_plain)(function, start, cached)
    functools.update_wrapper(wrapper, function)
    _keep_signature(function, wrapper)
    mark(function, wrapper)
    _wrappers[wrapper] = work.policies
    return wrapper


def policies_of(function: object) -> tuple[Policy, ...]:
    """The policies that `@guarded` adds to a function; none to others."""
    return _wrappers.get(function, ()) if callable(function) else ()


def _coroutine(function: Callable[..., Any], start: _Start) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start(args, kwargs)
        await run.claim()
        with run:
            return run.returned(await function(*args, **kwargs))

    return wrapper


def _plain(function: Callable[..., Any], start: _Start) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start(args, kwargs)
        run.claim_sync()
        with run:
            return run.returned(function(*args, **kwargs))

    return wrapper


def _cached_coroutine(function: Callable[..., Any], start: _Start, cached: FunctionCache) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start(args, kwargs)
        found = await run.look_up(cached, args, kwargs)
        if found is not None and found.hit:
            with contextlib.suppress(Unfit):
                return run.given(cached, found)
            run, found = start(args, kwargs), None
        with contextlib.nullcontext() if found is None else found:
            await run.claim()
            with run:
                result = run.returned(await function(*args, **kwargs))
            if found is not None:
                await run.keep(cached, found, result)
        return result

    return wrapper


def _cached_plain(function: Callable[..., Any], start: _Start, cached: FunctionCache) -> Callable[..., Any]:
    """As `_cached_coroutine`, for synchronous code."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start(args, kwargs)
        found = background.run(run.look_up(cached, args, kwargs), undo=run.call.discard)
        if found is not None and found.hit:
            with contextlib.suppress(Unfit):
                return run.given(cached, found)
            run, found = start(args, kwargs), None
        with contextlib.nullcontext() if found is None else found:
            run.claim_sync()
            with run:
                result = run.returned(function(*args, **kwargs))
            if found is not None:
                background.run(run.keep(cached, found, result))
        return result

    return wrapper


def _async_generator(function: Callable[..., Any], start: _Start) -> Callable[..., Any]:
    """Meters what the function gives, and passes on to it what is sent or thrown; the call ends with it."""

    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        run = start(args, kwargs)
        await run.claim()
        items = function(*args, **kwargs)
        step, given = anext, items
        wait = Wait(run.call)
        error: BaseException | None = None
        try:
            while True:
                # Each step may be pulled from another task: the scope holds for the step, not for the generator.
                with run.inside:
                    try:
                        item = await wait.on(step, given)
                    except StopAsyncIteration:
                        return
                    except Halted as halted:
                        raise halted.refused() from None
                run.call.record_chunk(item)
                try:
                    sent = yield item
                except GeneratorExit:
                    raise
                except BaseException as thrown:
                    if not hasattr(items, "athrow"):
                        raise
                    step, given = items.athrow, thrown
                else:
                    step, given = (anext, items) if sent is None else (items.asend, sent)
        except BaseException as caught:
            error = caught
            raise
        finally:
            try:
                if hasattr(items, "aclose"):
                    with run.inside:
                        await items.aclose()
            finally:
                run.end(error)

    return wrapper


def _generator(function: Callable[..., Any], start: _Start) -> Callable[..., Any]:
    """As `_async_generator`, from which it differs in the names of what it calls."""

    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        run = start(args, kwargs)
        run.claim_sync()
        items = function(*args, **kwargs)
        step, given = next, items
        error: BaseException | None = None
        try:
            while True:
                with run.inside:
                    try:
                        item = step(given)
                    except StopIteration as stop:
                        return stop.value
                run.call.record_chunk(item)
                run.check_halted()
                try:
                    sent = yield item
                except GeneratorExit:
                    raise
                except BaseException as thrown:
                    if not hasattr(items, "throw"):
                        raise
                    step, given = items.throw, thrown
                else:
                    step, given = (next, items) if sent is None else (items.send, sent)
        except BaseException as caught:
            error = caught
            raise
        finally:
            try:
                if hasattr(items, "close"):
                    with run.inside:
                        items.close()
            finally:
                run.end(error)

    return wrapper


def _class(endpoint: type, work: _Work) -> type:
    """A class-based endpoint: each of its HTTP methods is guarded."""
    names = [name for name in _METHODS if name in vars(endpoint)]
    if not names:
        raise ConfigurationError(
            f"@guarded on the class {endpoint.__qualname__}: it has no get, post or other HTTP method of its own; "
            "decorate the method that makes the call"
        )
    for name in names:
        setattr(endpoint, name, _wrap(vars(endpoint)[name], work))
    return endpoint


def _keep_signature(function: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """Give the wrapper the function's signature, with postponed annotations evaluated where they were written.

    FastAPI before 0.11x looks names up in the wrapper's module, where they are not known.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError):
        return  # names that exist for type checkers only: newer frameworks unwrap and look for themselves
    wrapper.__signature__ = signature  # type: ignore[attr-defined]  # functions may have one
    annotations = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation is not inspect.Parameter.empty
    }
    if signature.return_annotation is not inspect.Signature.empty:
        annotations["return"] = signature.return_annotation
    wrapper.__annotations__ = annotations


def _code(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs when `function` is called: says which kind of function it is."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__  # an object that is called


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))


class _Sent:
    """A response object of a web framework, with its body where an HTTP client's has it."""

    __slots__ = ("content", "status_code")

    def __init__(self, content: bytes, status_code: int) -> None:
        self.content = content
        self.status_code = status_code


def _content(result: object) -> object:
    """What may tell usage in a return value: the body of a response to send; else the value itself."""
    body, status = getattr(result, "body", None), getattr(result, "status_code", None)
    if isinstance(body, bytes) and isinstance(status, int) and not isinstance(result, BaseException):
        # An error is the application's word: a call may have been made and billed before it.
        return _Sent(body, status) if status < 400 else None
    return result


def _text_tokens(argument: object) -> int:
    if getattr(argument, "scope", None) is not None:  # a request: its body is what the function adds
        return 0
    modelled = callable(getattr(argument, "model_dump", None)) or dataclasses.is_dataclass(argument)
    if modelled or isinstance(argument, (str, bytes, Mapping, Sequence, msgspec.Struct)):
        return message_tokens(argument)
    return 0
