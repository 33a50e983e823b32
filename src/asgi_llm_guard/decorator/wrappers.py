"""What stands in the place of a guarded function: one wrapper for each kind of function.

Each asks for a `Run` of its arguments, claims, does what the function does inside it, and takes the usage of what comes
back. Those of synchronous code are written out beside the others: they differ in what may be awaited, and nowhere else.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any

from asgi_llm_guard import background
from asgi_llm_guard.cache import FunctionCache, Unfit
from asgi_llm_guard.decorator.run import Run
from asgi_llm_guard.halting import Halted, Wait

__all__ = ["Start", "async_generator", "cached_coroutine", "cached_plain", "coroutine", "generator", "plain"]

Start = Callable[[tuple[Any, ...], dict[str, Any]], Run]
"""Begins a call with these arguments."""


def coroutine(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start(args, kwargs)
        await run.claim()
        with run:
            return returned(run, await function(*args, **kwargs))

    return wrapper


def plain(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start(args, kwargs)
        run.claim_sync()
        with run:
            return returned(run, function(*args, **kwargs))

    return wrapper


def cached_coroutine(function: Callable[..., Any], start: Start, cached: FunctionCache) -> Callable[..., Any]:
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
                result = returned(run, await function(*args, **kwargs))
            if found is not None:
                await run.keep(cached, found, result)
        return result

    return wrapper


def cached_plain(function: Callable[..., Any], start: Start, cached: FunctionCache) -> Callable[..., Any]:
    """As `cached_coroutine`, for synchronous code."""

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
                result = returned(run, function(*args, **kwargs))
            if found is not None:
                background.run(run.keep(cached, found, result))
        return result

    return wrapper


def async_generator(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
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


def generator(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    """As `async_generator`, from which it differs in the names of what it calls."""

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


# -------------------------------------------------------------------------- what functions return


def returned(run: Run, result: object) -> object:
    """Take the usage of a return value; a streaming response is metered while it is sent."""
    body = getattr(result, "body_iterator", None)
    if body is None:
        if result is not None and not run.call.recorded:
            run.call.record_if_known(_content(result))
        return result
    kind = generator if isinstance(body, Iterator) else async_generator
    streamed = kind(lambda: body, lambda *_: run)()
    run.call.admission.defer(run.call)
    # A response that nobody sends never runs its body, and so never comes to the end of it.
    weakref.finalize(streamed, run.abandoned).atexit = False
    result.body_iterator = streamed  # type: ignore[attr-defined]  # it was there above
    run.deferred = True
    return result


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
