"""Answers to what was handed over: a `Pending` that threads and event loops alike may wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar, cast

from asgi_llm_guard.errors import StorageError

__all__ = ["Handed", "again", "tell"]

logger = logging.getLogger("asgi_llm_guard.storage")

T = TypeVar("T")
Raised = TypeVar("Raised", bound=Exception)

Future = asyncio.Future  # by its short name: it is named often below


class Handed(Generic[T]):
    """The answer to one operation on its way. Whoever decides some calls `decide` on each, then `tell` once."""

    __slots__ = ("_decided", "_error", "_reply", "callbacks", "sleepers")

    def __init__(self) -> None:
        self._reply: object = None
        self._error: Exception | None = None
        self._decided = False
        # Tuples, for most have one sleeper or callback: no lists to be made and collected.
        self.sleepers: tuple[tuple[asyncio.AbstractEventLoop, Future[None]], ...] = ()
        self.callbacks: tuple[Callable[[Any], object], ...] = ()

    def done(self) -> bool:
        return self._decided

    def result(self, timeout: float | None = None) -> T:
        if not self._decided:
            decided = threading.Event()
            self.add_done_callback(lambda _: decided.set())
            if not decided.wait(timeout):
                raise StorageError(f"no answer within {timeout} s; the operation is under way, its outcome unknown")
        return self._outcome()

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        with _deciding:
            if not self._decided:
                self.callbacks += (callback,)
                return
        callback(self)

    def __await__(self) -> Generator[object, None, T]:
        loop = asyncio.get_running_loop()
        with _deciding:
            sleeper: Future[None] | None = None if self._decided else loop.create_future()
            if sleeper is not None:
                self.sleepers += ((loop, sleeper),)
        if sleeper is not None:
            yield from sleeper
        return self._outcome()

    def decide(self, reply: object, error: Exception | None) -> None:
        """Set the answer; nobody is told yet."""
        self._reply, self._error = reply, error
        self._decided = True

    def _outcome(self) -> T:
        if self._error is not None:
            raise again(self._error) from self._error.__cause__
        return cast("T", self._reply)


# Between "is it decided?" and "then tell me" no decision may fall. One lock serves all, for it
# is held for a few instructions only. A fork renews it: another thread may have held it.
_deciding = threading.Lock()


def _renew_lock() -> None:
    global _deciding  # noqa: PLW0603 - a lock that nobody will release cannot be repaired in place
    _deciding = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_lock)


def again(error: Raised) -> Raised:
    """The same error for another asker: one that is raised twice collects two tracebacks."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


def tell(decided: Iterable[Handed[Any]]) -> None:
    """Wake all who wait for these: each event loop once. A callback that raises is logged."""
    loops: dict[asyncio.AbstractEventLoop, list[Future[None]]] = {}
    calls: list[tuple[Callable[[Any], object], Handed[Any]]] = []
    with _deciding:
        for handed in decided:
            for loop, sleeper in handed.sleepers:
                loops.setdefault(loop, []).append(sleeper)
            if handed.callbacks:
                calls += [(callback, handed) for callback in handed.callbacks]
    for loop, sleepers in loops.items():
        with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile: nobody is left to tell
            loop.call_soon_threadsafe(_wake, sleepers)
    for callback, handed in calls:
        try:
            callback(handed)
        except Exception:  # a callback's failure is its own
            logger.exception("a callback failed")


def _wake(sleepers: list[Future[None]]) -> None:
    for sleeper in sleepers:
        if not sleeper.done():  # cancelled meanwhile
            sleeper.set_result(None)
