"""How what is running is ended from outside: by a stop, or because the service goes down.

Rule 1: an admission, or one call inside it, is halted once, with the refusal that everybody is told. From then on
nothing is claimed in it any more.

Rule 2: whoever waits for a provider is called back where it waits, by cancelling its task, and says itself what
comes of it: the last event of a stream, a refusal in place of an answer. Nobody else's task is cancelled.

Rule 3: what was used until then is charged as of a client that leaves: a hold is never given back because of a halt.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from asgi_llm_guard.errors import LimitExceeded

if TYPE_CHECKING:
    from asgi_llm_guard.claimed import Claimed
    from asgi_llm_guard.decision import Denied

__all__ = ["EVENT_S", "Front", "Halted", "Wait", "call_back"]

EVENT_S: Final = 1.0
"""How long a stream that is in the middle of an event is given to end it."""

_order: Final = itertools.count()

T = TypeVar("T")


class Halted(Exception):  # noqa: N818 - no error: somebody has said so
    """What was waited for was ended by a halt."""

    def __init__(self, denied: Denied) -> None:
        super().__init__(denied.message)
        self.denied = denied

    def refused(self) -> LimitExceeded:
        """The same for code that reads streams by itself."""
        return LimitExceeded(self.denied)


class Front(Protocol):
    """What stands between an admission's application and its client."""

    def halt(self, denied: Denied, *, patiently: bool) -> None:
        """End what the client gets. From any thread. `patiently`: what is inside ends its own stream, if it can."""
        ...


class Wait:
    """Where one call waits for its provider.

    Args:
        call: whose wait it is.
        whole: ends the stream for the client, and says whether that could be done at once: else an event has begun,
            and its rest has to come first. `None`: the client has nothing of an answer.
    """

    __slots__ = ("_call", "_fired", "_since", "_task", "_whole")

    def __init__(self, call: Claimed, whole: Callable[[], bool] | None = None) -> None:
        self._call = call
        self._whole = whole
        self._task: asyncio.Task[object] | None = None
        self._fired = False
        self._since = 0

    @property
    def place(self) -> tuple[asyncio.Task[object] | None, int]:
        """The task that waits, if one does, and since when in the order of all waits."""
        return self._task, self._since

    async def on(self, work: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """`await work(*arguments)`.

        Raises:
            Halted: the call was halted meanwhile, or before.
        """
        call = self._call
        if call.halted is not None and (self._whole is None or self._whole()):
            raise Halted(call.halted)
        self._since = next(_order)
        task = self._task = asyncio.current_task()
        around, call.wait = call.wait, self
        try:
            return await work(*arguments)
        except asyncio.CancelledError:
            if not self._fired or task is None or call.halted is None:
                raise
            self._fired = False
            if task.uncancel() > 0:  # by somebody else, too
                raise
            raise Halted(call.halted) from None
        finally:
            if self._fired and task is not None:  # it was caught inside
                self._fired = False
                task.uncancel()
            self._task = None
            call.wait = around

    def call_back(self) -> None:
        """The call was halted. From any thread."""
        task = self._task
        if task is not None:
            # A loop that was closed meanwhile has nobody waiting.
            with contextlib.suppress(RuntimeError):
                task.get_loop().call_soon_threadsafe(self._cancel, task, False)

    def _cancel(self, task: asyncio.Task[object], late: bool) -> None:
        if self._task is not task or self._fired:
            return
        if late or self._whole is None or self._whole():
            self._fired = True
            task.cancel()
        else:  # in the middle of an event, whose rest is on its way
            task.get_loop().call_later(EVENT_S, self._cancel, task, True)


def call_back(waits: Iterable[Wait]) -> None:
    """Call back those who wait: where several wait on one task, the innermost, whose end the others then see."""
    innermost: dict[asyncio.Task[object], Wait] = {}
    for wait in waits:
        task, since = wait.place
        if task is not None and (task not in innermost or innermost[task].place[1] < since):
            innermost[task] = wait
    for wait in innermost.values():
        wait.call_back()
