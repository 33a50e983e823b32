"""The storage of one guard as its engine sees it: how and as whom it is asked, and whether it answers."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Literal

from asgi_llm_guard.engine.outage import Fallback
from asgi_llm_guard.engine.telling import Telling
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import StorageFailed, StorageRecovered
from asgi_llm_guard.storage.base import Interruptible, Leasing, LossAware, Selective, Storage, Verbs

__all__ = ["State", "Store", "unsent"]

_log = logging.getLogger("asgi_llm_guard")

State = Literal["ok", "failed", "lost"]


class Store:
    """One storage, and this process as its owner.

    Args:
        local_storage: makes what this process counts in while the storage does not answer.
        with_leases: makes a storage that leases, around this one.
    """

    def __init__(
        self,
        storage: Storage,
        telling: Telling,
        *,
        local_storage: Callable[[], Storage],
        with_leases: Callable[[Storage], Leasing],
    ) -> None:
        self.storage = storage
        self.verbs: Verbs = storage
        """What is asked: the storage, or something around it that measures how long it takes."""
        self.leasing: Leasing | None = None
        self.interruptible = storage if isinstance(storage, Interruptible) else None
        self.loss_aware = storage if isinstance(storage, LossAware) else None
        self.selective = storage if isinstance(storage, Selective) else None
        self.clock = telling.clock
        self.state: State = "ok"
        self.since_ms = self.clock.now_ms()
        """When `state` changed last."""
        self.changes = 0
        """How often it has changed."""
        self.last_error: str | None = None
        """The class of the last error of the storage."""
        self.closed = False
        self._telling = telling
        self._local_storage = local_storage
        self._with_leases = with_leases
        self._around: Callable[[Storage], Verbs] | None = None
        self.forked()

    def forked(self) -> None:
        """This is a new process, so it is another owner, or its call ids would repeat its parent's."""
        self.owner = os.urandom(9).hex()
        self._numbers = itertools.count(1)
        self.here = Fallback(self._local_storage, self.clock)
        """Decides while the storage does not answer."""
        self._lock = threading.Lock()

    def new_id(self) -> str:
        """A call id, unique over all processes and restarts."""
        return f"{self.owner}-{next(self._numbers):x}"

    # ----------------------------------------------------------------------------- how it is asked

    def measure(self, around: Callable[[Storage], Verbs] | None) -> None:
        """Ask the storage through what `around` makes of it; `None`: directly."""
        self._around = around
        self.verbs = self.storage if around is None else around(self.storage)

    def lease(self) -> None:
        """Put leases around the storage, which is asked through them from now on."""
        self.storage = self.leasing = self._with_leases(self.storage)
        self.measure(self._around)

    # -------------------------------------------------------------------------- whether it answers

    @property
    def available(self) -> bool:
        """Whether calls are decided by the storage."""
        return self.state == "ok" and (self.interruptible is None or self.interruptible.available())

    def check_available(self) -> None:
        """Ask nothing of a storage that is known to be away.

        Raises:
            StorageError: it is.
        """
        if self.interruptible is not None and not self.interruptible.available():
            raise unsent("it is known to be away")

    def change(self, state: State, error: Exception | None = None) -> bool:
        """Enter a state. True for exactly one of those who see the change, from whatever thread."""
        if error is not None:
            self.last_error = type(error).__name__
        with self._lock:
            if self.state == state:
                return False
            self.state = state
            self.since_ms = self.clock.now_ms()
            self.changes += 1
            return True

    def failed(self, error: Exception) -> None:
        """It did not answer."""
        if self.change("failed", error):
            _log.error("the usage store failed; what its policies say for an outage (on_outage) holds: %s", error)
            self._telling.tell(StorageFailed(str(error)))

    def answered(self) -> None:
        """It has answered, and goes by data that hold."""
        if self.change("ok"):
            self.here.end()
            _log.warning("the usage store answers again, and decides")
            self._telling.tell(StorageRecovered())


def unsent(why: str) -> StorageError:
    """The error of a question that never left this process."""
    error = StorageError(f"{why}; nothing was asked")
    error.sent = False
    return error
