"""What a guard does from time to time beside its calls: follow changes, move records, send what is due.

Rule 1: chores run on the background loop, so that a busy or blocked application does not hold them up.

Rule 2: a chore never overlaps with itself, and one that fails is tried again at its next turn. An error is logged
when its class changes, not each time.

Rule 3: they begin with the first admission, or when the application starts, and anew in a forked child. They stop
before the storage closes; one that is running then may end first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Final

from asgi_llm_guard import background
from asgi_llm_guard.errors import ConfigurationError, GuardError

__all__ = ["Chores", "Work"]

_log = logging.getLogger("asgi_llm_guard")

_END_S: Final = 5.0
"""How long a chore that is running is waited for when chores stop."""
_random: Final = random.SystemRandom()
"""Of its own: an application that seeds the module's generator must not be disturbed from another thread."""
_SPREAD: Final = 0.1
"""Pauses are up to so much longer or shorter, so that processes that began together do not stay together."""

Work = Callable[[], Awaitable[object]]


class _Chore:
    """One of them, in one process."""

    __slots__ = ("every_s", "failing", "last", "name", "running", "task", "work")

    def __init__(self, name: str, every_s: float, work: Work, *, last: bool) -> None:
        self.name = name
        self.every_s = every_s
        self.work = work
        self.last = last
        self.failing: type[BaseException] | None = None
        self.forget()

    def forget(self) -> None:
        """The loop that it ran on is gone."""
        self.running = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None

    async def once(self) -> None:
        async with self.running:
            await self.work()

    async def turn(self) -> None:
        """Do it, whatever comes of it."""
        try:
            await self.once()
        except (Exception, asyncio.CancelledError) as error:  # one chore's failure must not end it, nor the others
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # else it was only something that it waited for
            if self.failing is not type(error):
                self.failing = type(error)
                known = isinstance(error, GuardError)
                _log.warning("the chore %r fails and is tried again: %s", self.name, error, exc_info=not known)
        else:
            if self.failing is not None:
                self.failing = None
                _log.warning("the chore %r goes well again", self.name)


class Chores:
    """The chores of one guard. From any thread.

    Args:
        spread: gives a factor for each pause, around 1.
    """

    def __init__(self, *, spread: Callable[[], float] | None = None) -> None:
        self._spread = spread or _spread
        self._chores: dict[str, _Chore] = {}
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        for chore in self._chores.values():
            chore.forget()

    def forked(self) -> None:
        """This is a child process now: nothing runs in it yet."""
        self._forget()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all chores, in the order in which they were added."""
        return tuple(self._chores)

    @property
    def begun(self) -> bool:
        """Whether they are done from time to time."""
        return self._begun

    def add(self, name: str, every_s: float, work: Work, *, last: bool = False) -> None:
        """Do `work` every `every_s` seconds, for the first time after as long. In place of another one of that name.

        `last`: it is done once more when the guard drains.

        Raises:
            ConfigurationError: the name is empty, the pause is no number of seconds above 0, or nothing can be called.
        """
        if not isinstance(name, str) or not name.strip():
            raise ConfigurationError(f"chores: expected the name of a chore, got {name!r}")
        if isinstance(every_s, bool) or not isinstance(every_s, (int, float)) or not 0 < every_s < float("inf"):
            raise ConfigurationError(f"chores[{name!r}]: expected a pause in seconds above 0, got {every_s!r}")
        if not callable(work):
            raise ConfigurationError(f"chores[{name!r}]: expected a function without arguments, got {work!r}")
        before = self._drop(name)
        chore = _Chore(name, every_s, work, last=last)
        with self._lock:
            if before is not None:
                chore.running = before.running  # a turn of the other one may be running
            self._chores[name] = chore
            begun = self._begun
        if begun:
            background.later(lambda: self._start(chore))

    def remove(self, name: str) -> None:
        """Do it no more; one that is running ends. A name that there is not is no error."""
        self._drop(name)

    def _drop(self, name: str) -> _Chore | None:
        with self._lock:
            chore = self._chores.pop(name, None)
            begun = self._begun
        if chore is not None and begun:
            background.later(lambda: _cancel(chore))
        return chore

    def begin(self) -> None:
        """Do them from now on; where they are, nothing changes."""
        if self._begun:
            return
        with self._lock:
            if self._begun or not self._chores:
                self._begun = True
                return
            self._begun = True
        background.later(self._start_all)

    async def run(self, name: str) -> None:
        """Do one now, after the turn that it may be in.

        Raises:
            ConfigurationError: there is none of that name.
            Exception: whatever it raises.
        """
        chore = self._chores.get(name)
        if chore is None:
            known = ", ".join(self._chores) or "none"
            raise ConfigurationError(f"chores: there is no {name!r}; known are: {known}")
        await asyncio.wrap_future(background.begin(chore.once()))

    async def flush(self, timeout_s: float = _END_S) -> None:
        """Do those that are to be done last, all at the same time, in at most `timeout_s` seconds. Never raises."""
        due = [chore for chore in self._chores.values() if chore.last]
        if not due:
            return
        turns = asyncio.wrap_future(background.begin(_together(due, timeout_s)))
        await asyncio.shield(turns)

    async def stop(self) -> None:
        """Do them no more, until `begin`. Those that are running are waited for, and cancelled after 5 seconds."""
        with self._lock:
            begun, self._begun = self._begun, False
        if begun and self._chores:
            await asyncio.shield(asyncio.wrap_future(background.begin(self._stop_all())))

    # ------------------------------------------------------------------- on the background loop

    def _start_all(self) -> None:
        for chore in tuple(self._chores.values()):
            self._start(chore)

    def _start(self, chore: _Chore) -> None:
        if not self._begun or chore.task is not None or self._chores.get(chore.name) is not chore:
            return
        # Through a weak reference: a guard that nobody closed can be collected though its chores sleep.
        chore.task = asyncio.get_running_loop().create_task(_repeat(weakref.ref(self), chore.name))

    async def _stop_all(self) -> None:
        tasks = []
        for chore in tuple(self._chores.values()):
            task, chore.task = chore.task, None
            if task is None:
                continue
            tasks.append(task)
            if not chore.running.locked():
                task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_END_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _pause_s(self, name: str) -> float | None:
        """How long to the next turn; `None`: there is none."""
        chore = self._chores.get(name)
        if chore is None or chore.task is not asyncio.current_task():
            return None
        return chore.every_s * self._spread()


async def _repeat(reference: weakref.ref[Chores], name: str) -> None:
    while True:
        chores = reference()
        pause_s = None if chores is None else chores._pause_s(name)  # noqa: SLF001 - in this module
        del chores
        if pause_s is None:
            return
        await asyncio.sleep(pause_s)
        chores = reference()
        chore = None if chores is None else chores._chores.get(name)  # noqa: SLF001 - in this module
        if chore is None:
            return
        await chore.turn()
        del chore, chores


async def _together(due: list[_Chore], timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(chore.turn() for chore in due))


def _cancel(chore: _Chore) -> None:
    task, chore.task = chore.task, None
    if task is not None and not chore.running.locked():
        task.cancel()


def _spread() -> float:
    return _random.uniform(1 - _SPREAD, 1 + _SPREAD)
