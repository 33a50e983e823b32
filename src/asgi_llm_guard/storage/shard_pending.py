"""Answers that are made of several: of settlements in many shards at once, or in one and then in others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from time import monotonic

from asgi_llm_guard.claims import Settled
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Pending
from asgi_llm_guard.storage.pending import Handed, again

__all__ = ["Chained", "Together"]


class Together:
    """One answer made of several. A `Pending`; it fails when all are there and one has failed."""

    __slots__ = ("_lock", "_make", "_pendings", "_waited")

    def __init__(
        self,
        pendings: Sequence[Pending[tuple[Settled, ...]]],
        make: Callable[[Sequence[tuple[Settled, ...]]], tuple[Settled, ...]],
    ) -> None:
        self._pendings = pendings
        self._make = make
        self._lock = threading.Lock()
        self._waited = 0

    def done(self) -> bool:
        return all(pending.done() for pending in self._pendings)

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        until = None if timeout is None else monotonic() + timeout
        answers: list[tuple[Settled, ...] | StorageError] = []
        for pending in self._pendings:
            try:
                answers.append(pending.result(None if until is None else max(0.0, until - monotonic())))
            except StorageError as error:
                answers.append(error)
        return self._of(answers)

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        answers: list[tuple[Settled, ...] | StorageError] = []
        for pending in self._pendings:
            try:
                answers.append((yield from pending.__await__()))
            except StorageError as error:
                answers.append(error)
        return self._of(answers)

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        left = [len(self._pendings)]

        def one(_: Pending[tuple[Settled, ...]]) -> None:
            with self._lock:
                left[0] -= 1
                last = not left[0]
            if last:
                callback(self)

        for pending in self._pendings:
            pending.add_done_callback(one)

    def _of(self, answers: Sequence[tuple[Settled, ...] | StorageError]) -> tuple[Settled, ...]:
        good = []
        for answer in answers:
            if isinstance(answer, StorageError):
                raise again(answer) from answer.__cause__
            good.append(answer)
        return self._make(good)


class Chained:
    """An answer that asks for one more. A `Pending`; `then` is called once, by whoever hears of the first one first."""

    __slots__ = ("_first", "_lock", "_second", "_then")

    def __init__(
        self,
        first: Pending[tuple[Settled, ...]],
        then: Callable[[tuple[Settled, ...]], Pending[tuple[Settled, ...]]],
    ) -> None:
        self._first = first
        self._then = then
        self._lock = threading.RLock()
        self._second: Pending[tuple[Settled, ...]] | None = None
        first.add_done_callback(self._heard)

    def _heard(self, _: Pending[tuple[Settled, ...]]) -> None:
        self._next()

    def _next(self) -> Pending[tuple[Settled, ...]]:
        """The second one; the first is there."""
        with self._lock:
            if self._second is None:
                try:
                    self._second = self._then(self._first.result())
                except StorageError as error:
                    failed: Handed[tuple[Settled, ...]] = Handed()
                    failed.decide(None, error)
                    self._second = failed
            return self._second

    def done(self) -> bool:
        return self._first.done() and self._next().done()

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        until = None if timeout is None else monotonic() + timeout
        self._first.result(timeout)
        return self._next().result(None if until is None else max(0.0, until - monotonic()))

    def __await__(self) -> Generator[object, None, tuple[Settled, ...]]:
        yield from self._first.__await__()
        return (yield from self._next().__await__())

    def add_done_callback(self, callback: Callable[[Pending[tuple[Settled, ...]]], object], /) -> None:
        def first(_: Pending[tuple[Settled, ...]]) -> None:
            self._next().add_done_callback(lambda _: callback(self))

        self._first.add_done_callback(first)
