"""The thread that writes: a queue of jobs, taken many at a time, each turn in one transaction.

Rule 1: jobs are decided in the order in which they were handed over. A job that was handed over
is decided even if nobody waits for it any more.

Rule 2: a turn takes what has gathered while the last one was written (group commit), so its cost
is shared by all who wait, and nobody waits for more than the turn before.

Rule 3: answers are given after the commit, never before. Each event loop is woken once per turn.

Rule 4: a turn that fails as a whole is rolled back and repeated job by job, so only the jobs that
cannot be done fail. Jobs are safe to repeat: call ids make them idempotent.

Rule 5: a process never uses the thread or the connection of the process it was forked from, and no
connection is open while a process forks (`park`): SQLite keeps its file locks per process, and a
copy of an open connection would make the child believe that it holds them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Protocol, TypeVar, cast

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.pending import Handed, tell

__all__ = ["MAX_TURN", "Database", "Job", "LockTimeoutError", "Writer"]

logger = logging.getLogger("asgi_llm_guard.storage")

MAX_TURN: Final = 256
"""At most this many jobs share a transaction: bounds how long other processes wait for it."""

T = TypeVar("T")


class LockTimeoutError(StorageError):
    """Other processes kept the file locked for longer than the timeout. Repeating job by job is no use."""


class Job(Handed[T]):
    """One operation on its way through the writer, and its answer. A `Pending`, from any thread."""

    __slots__ = ("operation",)

    def __init__(self, operation: object) -> None:
        super().__init__()
        self.operation = operation


class Database(Protocol):
    """What a writer writes to. Never used by two threads at once."""

    def apply(self, operations: Sequence[object]) -> Sequence[object]:
        """Decide the operations in order, in one transaction, and give their replies.

        Raises:
            Exception: nothing was changed.
        """
        ...

    def tidy(self) -> None:
        """Remove a bounded number of rows whose time is over, if it is time to."""
        ...

    def close(self) -> None: ...


class Writer:
    """A daemon thread, started by the first job, and the queue in front of it."""

    def __init__(self, open_database: Callable[[], Database], *, name: str) -> None:
        self.pid = os.getpid()
        self._open_database = open_database
        self._name = name
        self._database: Database | None = None
        self._jobs: SimpleQueue[Job[object] | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._turn = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job[T]) -> Job[T]:
        """Hand over a job.

        Raises:
            StorageError: the writer was stopped; the job has no effect.
        """
        with self._gate:
            if self._closed:
                raise StorageError(f"{self._name}: this storage is closed; open a new one to go on")
            self._jobs.put(cast("Job[object]", job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="asgi-llm-guard-sqlite", daemon=True)
                self._thread.start()
        return job

    def stop(self, timeout_s: float | None) -> bool:
        """Finish what was handed over, close the file and end the thread; whether all that was in time."""
        if self.pid != os.getpid():
            return True  # the parent's, and the parent's to stop
        with self._gate:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return thread is None
        thread.join(timeout_s)
        return not thread.is_alive()

    def park(self) -> None:
        """Let the turn under way end, close the file, and begin no other turn until `resume`."""
        self._turn.acquire()
        if self._database is not None:
            self._database.close()
            self._database = None

    def resume(self) -> None:
        self._turn.release()

    # ------------------------------------------------------------------ on the writer's thread

    def _run(self) -> None:
        stopping = False
        while not stopping:
            jobs, stopping = self._gather()
            with self._turn:
                self._decide(jobs)
            tell(jobs)
            with self._turn:
                self._tidy()
        with self._turn:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _gather(self) -> tuple[list[Job[object]], bool]:
        """Wait for a job, then take all that are there; and whether to stop after them."""
        jobs: list[Job[object]] = []
        job = self._jobs.get()
        with contextlib.suppress(Empty):
            while job is not None:
                jobs.append(job)
                if len(jobs) == MAX_TURN:
                    break
                job = self._jobs.get_nowait()
        return jobs, job is None

    def _decide(self, jobs: list[Job[object]]) -> None:
        try:
            replies = self._apply(jobs)
        except LockTimeoutError as error:
            for job in jobs:
                job.decide(None, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread or fail the neighbours
            if len(jobs) == 1:
                jobs[0].decide(None, self._failure(error))
                return
            logger.warning("%s: %d operations failed together (%s); repeating one by one", self._name, len(jobs), error)
            for job in jobs:
                self._decide([job])
        else:
            for job, reply in zip(jobs, replies, strict=True):
                job.decide(reply, None)

    def _apply(self, jobs: list[Job[object]]) -> Sequence[object]:
        if not jobs:
            return ()
        if self._database is None:
            self._database = self._open_database()
        return self._database.apply([job.operation for job in jobs])

    def _tidy(self) -> None:
        try:
            if self._database is not None:
                self._database.tidy()
        except Exception:  # nobody asked for it: the next turn tries again
            logger.warning("%s: could not remove old rows", self._name, exc_info=True)

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, StorageError | ValueError):  # said by a verb to who called it
            return error
        logger.error("%s: an operation failed", self._name, exc_info=error)
        failure = StorageError(f"{self._name}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
