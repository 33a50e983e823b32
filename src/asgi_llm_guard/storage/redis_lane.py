"""What one event loop hands over to the server: gathered into few script calls, in order.

Rule 1: a reservation goes out at once while nothing is in flight. Otherwise what gathers in a tick, or
until one of the calls in flight comes back, goes out together, at most `MOST_PLANS` to a call: a
call keeps the server busy for as long as it takes, and all others wait for it.

Rule 2: settlements go out before every reservation that was handed over after them.

Rule 3: what was handed over and may not have arrived is handed over once more, under the same call
ids, while its time lasts: the scripts know what they have done before.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Protocol

from asgi_llm_guard.claims import Durable, Settled, Settlement
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.pending import Handed, again, tell

__all__ = ["MOST_FLYING", "MOST_PLANS", "MOST_SETTLEMENTS", "Group", "Lane", "Sender"]

MOST_PLANS: Final = 16
MOST_SETTLEMENTS: Final = 32
MOST_FLYING: Final = 6
"""So many script calls are in flight before more is gathered."""
_MOST_TRIES: Final = 4

Reply = Any
Batch = list[tuple[bytes, "asyncio.Future[Reply]", Durable | None]]


_numbers = itertools.count()


class _Handed(Handed[tuple[Settled, ...]]):
    """The answer to a group. It comes through an event loop, which must not be blocked by waiting for it."""

    __slots__ = ("loop",)

    def __init__(self) -> None:
        super().__init__()
        self.loop: asyncio.AbstractEventLoop | None = None

    def result(self, timeout: float | None = None) -> tuple[Settled, ...]:
        if not self.done() and self.loop is not None and self.loop is asyncio._get_running_loop():  # noqa: SLF001 - the documented way to ask without an exception
            raise StorageError("redis: this event loop brings the answer, and would wait for itself; await it instead")
        return super().result(timeout)


class Group:
    """Settlements that were handed over together: one step, as far as the store knows their holds."""

    __slots__ = ("handed", "left", "left_behind", "number", "replies", "sent", "settlements", "tries")

    def __init__(self, settlements: Sequence[Settlement], arguments: list[bytes]) -> None:
        self.number = next(_numbers)
        self.settlements = settlements
        self.handed: _Handed = _Handed()
        self.replies: list[Settled | None] = [None] * len(settlements)
        self.left = list(enumerate(arguments))
        """Which of them have no answer yet, and their arguments. Set as a whole: another thread may make a twin."""
        self.tries = 0
        self.sent = False
        """A try that failed may have been executed."""
        self.left_behind = False
        """Another lane gives the answer."""

    def twin(self) -> Group:
        """What has no answer yet, for another lane. Whichever of the two is answered first decides."""
        twin = Group(self.settlements, [])
        twin.number, twin.handed, twin.sent = self.number, self.handed, True
        twin.replies, twin.left = list(self.replies), list(self.left)
        return twin


class Sender(Protocol):
    """What a lane needs of the storage it belongs to."""

    def send_reserves(self, arguments: list[bytes]) -> asyncio.Future[Reply]:
        """Hand a call of the reserve script over, at once; the reply has one answer for each argument, after two more."""
        ...

    def confirm(self, durable: Durable) -> asyncio.Future[None]:
        """Wait until what was sent before is where `durable` says. The future fails with a `StorageError` if it is not."""
        ...

    def send_settles(self, arguments: list[bytes]) -> asyncio.Future[Reply]:
        """The same for the settle script; its reply has one more before the answers."""
        ...

    def settled(self, group: Group, replies: Sequence[Reply], now_ms: int) -> bool:
        """Take the answers for what is left of a group; whether all is answered. Else its arguments were made anew."""
        ...


class Lane:
    """The queue in front of one event loop's connection. Used by that loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sender: Sender) -> None:
        self.loop = loop
        self._sender = sender
        self._reserves: Batch = []
        self._groups: list[Group] = []
        self._flying = 0
        self._scheduled = False
        self.unsettled: set[Group] = set()

    def reserve(self, argument: bytes, durable: Durable | None = None) -> asyncio.Future[Reply]:
        """Hand over one reservation. The future fails with a `StorageError`; the epoch's loss is in the reply."""
        future: asyncio.Future[Reply] = self.loop.create_future()
        self._reserves.append((argument, future, durable))
        if not self._flying:
            self._flush()
        elif not self._scheduled and self._flying < MOST_FLYING:
            self._scheduled = True
            self.loop.call_soon(self._tick)
        return future

    def settle(self, group: Group) -> None:
        """Hand settlements over. Their answer is `group.handed`."""
        self.unsettled.add(group)
        group.handed.loop = self.loop
        self._groups.append(group)
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._scheduled = False
        self._flush()

    def flush(self) -> None:
        """Send all settlements that are still here: something that is sent past the queue comes after them."""
        while self._groups:
            self._send_groups(_first(self._groups, MOST_SETTLEMENTS))

    def _flush(self) -> None:
        groups = self._groups
        while groups and (self._flying < MOST_FLYING or self._reserves):
            self._send_groups(_first(groups, MOST_SETTLEMENTS))
        reserves = self._reserves
        while reserves and self._flying < MOST_FLYING:
            batch = reserves[:MOST_PLANS]
            del reserves[:MOST_PLANS]
            self._send_reserves(batch)

    def _send_reserves(self, batch: Batch) -> None:
        batch = [one for one in batch if not one[1].done()]  # cancelled before it went out
        if not batch:
            return
        self._flying += 1
        sent = self._sender.send_reserves([argument for argument, _, _ in batch])
        sent.add_done_callback(lambda done: self._reserved(batch, done))
        for durable in {asked for _, _, asked in batch if asked is not None}:
            waiting = [future for _, future, asked in batch if asked == durable]
            self._sender.confirm(durable).add_done_callback(partial(_confirm, waiting, sent, batch))

    def _reserved(self, batch: Batch, done: asyncio.Future[Reply]) -> None:
        self._flying -= 1
        error = _error(done)
        if error is not None:
            for _, future, _ in batch:
                if not future.done():
                    future.set_exception(error if len(batch) == 1 else again(error))
        else:
            for n, (_, future, durable) in enumerate(batch):
                if durable is None and not future.done():
                    future.set_result(_answer(done.result(), n))
        if self._groups or self._reserves:
            self._flush()

    def _send_groups(self, batch: list[Group]) -> None:
        self._flying += 1
        arguments = [argument for group in batch for _, argument in group.left]
        sent = self._sender.send_settles(arguments)
        sent.add_done_callback(lambda done: self._came_back(batch, done))

    def _came_back(self, batch: list[Group], done: asyncio.Future[Reply]) -> None:
        self._flying -= 1
        error = _error(done)
        decided: list[Handed[Any]] = []
        retried: list[Group] = []
        at = 1
        for group in batch:
            group.tries += 1
            first, at = at, at + len(group.left)
            if group.left_behind:
                continue
            if error is None and self._answered(group, done.result()[first:at], done.result()[0], decided):
                continue
            failure = error or StorageError("redis: the settlement keeps coming back; nothing was charged twice")
            group.sent |= error is not None and error.sent
            if group.tries < _MOST_TRIES:
                retried.append(group)
                continue
            failed = again(failure)
            failed.sent |= group.sent
            self._decide(group, failed, decided)
        self._groups[:0] = retried
        if decided:
            tell(decided)
        if self._groups or self._reserves:
            self._flush()

    def _answered(self, group: Group, replies: Sequence[Reply], now_ms: int, decided: list[Handed[Any]]) -> bool:
        if not self._sender.settled(group, replies, now_ms):
            return False
        self._decide(group, None, decided)
        return True

    def _decide(self, group: Group, error: StorageError | None, decided: list[Handed[Any]]) -> None:
        self.unsettled.discard(group)
        if not group.handed.done():
            group.handed.decide(None if error is not None else tuple(group.replies), error)
            decided.append(group.handed)

    def abandoned(self) -> list[Group]:
        """What has no answer, after the event loop was closed or stopped: to be settled by another lane."""
        left = sorted(self.unsettled, key=lambda group: group.number)
        self.unsettled.clear()
        self._groups.clear()
        for group in left:
            group.left_behind = True
        return [group.twin() for group in left]

    def fail(self, error: StorageError) -> None:
        """Nobody will send what is still here."""
        for _, future, _ in self._reserves:
            if not future.done():
                future.set_exception(again(error))
        self._reserves.clear()
        decided: list[Handed[Any]] = []
        for group in self._groups:
            self._decide(group, again(error), decided)
        self._groups.clear()
        tell(decided)


def _answer(reply: Reply, n: int) -> tuple[int, bytes, Reply]:
    """Clock, epoch, and the answer to the n-th request; `None`: the epoch is another one."""
    lost = len(reply) > 2 and reply[2] == b"lost"
    return reply[0], reply[1], None if lost else reply[2 + n]


def _confirm(
    waiting: Sequence[asyncio.Future[Reply]], sent: asyncio.Future[Reply], batch: Batch, done: asyncio.Future[None]
) -> None:
    """Give the answers that had to wait. What was refused needs no confirmation."""
    error = _error(done)
    for n, (_, future, _) in enumerate(batch):
        if future in waiting and not future.done():
            answer = _answer(sent.result(), n)  # it came before the confirmation, or has failed the future
            if error is None or answer[2] is None or answer[2][0] not in (1, 3):
                future.set_result(answer)
            else:
                future.set_exception(again(error))


def _first(groups: list[Group], most: int) -> list[Group]:
    """Take groups off the front: `most` settlements, or one group."""
    count = taken = 0
    for group in groups:
        count += len(group.left)
        if taken and count > most:
            break
        taken += 1
    batch = groups[:taken]
    del groups[:taken]
    return batch


def _error(done: asyncio.Future[Reply]) -> StorageError | None:
    if done.cancelled():
        return StorageError("redis: the connection was closed before the answer came")
    error = done.exception()
    if error is None or isinstance(error, StorageError):
        return error
    return StorageError(f"redis: {type(error).__name__}: {error}")
