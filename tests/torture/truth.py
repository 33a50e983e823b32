"""What really happened, kept outside the store: one file per worker process, mapped into memory.

A worker writes each step of a call here before it takes it; above all what the provider will bill, before
the provider is asked. The pages belong to the kernel, so they survive `kill -9`. A row's body is written
first and its stage last, so that what a stage promises is there.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple, Self

__all__ = ["CallRow", "CallStage", "JobRow", "JobStage", "Kind", "Truth"]


class CallStage(IntEnum):
    """How far a call has come. Each is written before what it names can have an effect."""

    ASKED = 1
    """The store is asked for its bound; no call id is known."""
    REFUSED = 2
    """Refused by a limit: nothing may be charged."""
    DROPPED = 3
    """The store did not answer, or nobody waited for its answer: nothing may be charged in the end."""
    ADMITTED = 4
    """Granted, under a call id; `bound` may be charged."""
    AMENDING = 5
    """A call inside takes the hold over: `second` may be charged instead of `bound`."""
    DISPATCHED = 6
    """The provider bills `bill`."""
    LEFT = 7
    """Settled, as far as the worker can: `bill` has to be charged."""


class Kind(IntEnum):
    """What becomes of a call."""

    MEASURED = 0
    UNMETERED = 1
    """The answer names no usage: charged its bound."""
    ERROR = 2
    """The provider answers an error: no money, one iteration."""
    UNKNOWN = 3
    """The connection breaks: charged its bound."""
    NOT_SENT = 4
    """No connection: nothing, not even an iteration."""
    CANCELLED = 5
    """The task is cancelled on the way: charged its bound."""


class JobStage(IntEnum):
    """How far a job, which takes a rate and a slot, has come."""

    ASKED = 1
    REFUSED = 2
    OPEN = 3
    CLOSING = 4
    """Its slot may be another's from here on."""


class CallRow(NamedTuple):
    """One call. Amounts are nano-USD and tokens; times are `CLOCK_MONOTONIC` in ns; -1 is not known."""

    kind: int
    provider: int
    departments: int
    """A bit for each."""
    session: int
    bound: int = 0
    bound_tokens: int = 0
    second: int = -1
    second_tokens: int = -1
    bill: int = 0
    bill_tokens: int = 0
    provider_pin: int = -1
    day_pin: int = -1
    call_id: str = ""
    stage: int = 0
    settled: int = 0
    """The store's word, heard by the worker: 0 none, 1 settled, 2 late, 4 settled before, unheard; 3 another."""


class JobRow(NamedTuple):
    """One job."""

    user: int
    asked_ns: int
    opened_ns: int = -1
    closing_ns: int = -1
    stage: int = 0


_CALL: Final = struct.Struct("=BBHIqqqqqqqq48s")
_CALL_MARKS: Final = 2
_CALL_SIZE: Final = 128
_JOB: Final = struct.Struct("=Iqqq")
_JOB_SIZE: Final = 32
_HEAD_SIZE: Final = 256
COUNTERS: Final = 16


class Truth:
    """The file of one worker process."""

    def __init__(self, path: Path, *, calls: int, jobs: int, create: bool = False) -> None:
        size = _HEAD_SIZE + calls * _CALL_SIZE + jobs * _JOB_SIZE
        if create:
            with path.open("wb") as file:
                file.truncate(size)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._jobs_at = _HEAD_SIZE + calls * _CALL_SIZE
        self._most_calls = calls
        self._most_jobs = jobs
        self._calls = 0
        self._jobs = 0

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- the worker

    @property
    def full(self) -> bool:
        """Whether there may be no room for what the tasks that are under way will write."""
        return self._calls > self._most_calls - 1024 or self._jobs > self._most_jobs - 512

    @property
    def calls_begun(self) -> int:
        return self._calls

    @property
    def ended_well(self) -> bool:
        """The process has settled everything, and said so."""
        return self._map[0] == 1

    def end_well(self) -> None:
        self._map[0] = 1

    def count(self, counter: int, more: int = 1) -> None:
        at = 16 + 8 * counter
        struct.pack_into("=q", self._map, at, struct.unpack_from("=q", self._map, at)[0] + more)

    def counter(self, counter: int) -> int:
        return int(struct.unpack_from("=q", self._map, 16 + 8 * counter)[0])

    def new_call(self, row: CallRow) -> int:
        index = self._calls
        self._calls += 1
        self.put_call(index, row, CallStage.ASKED)
        return index

    def put_call(self, index: int, row: CallRow, stage: CallStage) -> None:
        at = _HEAD_SIZE + index * _CALL_SIZE
        _CALL.pack_into(self._map, at + _CALL_MARKS, *row[:12], row.call_id.encode())
        self._map[at] = stage

    def put_settled(self, index: int, word: int) -> None:
        self._map[_HEAD_SIZE + index * _CALL_SIZE + 1] = word

    def new_job(self, row: JobRow) -> int:
        index = self._jobs
        self._jobs += 1
        self.put_job(index, row, JobStage.ASKED)
        return index

    def put_job(self, index: int, row: JobRow, stage: JobStage) -> None:
        at = self._jobs_at + index * _JOB_SIZE
        _JOB.pack_into(self._map, at + 1, *row[:4])
        self._map[at] = stage

    # ----------------------------------------------------------------------------------- the judge

    def calls(self) -> Iterator[CallRow]:
        for at in range(_HEAD_SIZE, self._jobs_at, _CALL_SIZE):
            stage, settled = self._map[at], self._map[at + 1]
            if not stage:
                return
            *body, call_id = _CALL.unpack_from(self._map, at + _CALL_MARKS)
            yield CallRow._make((*body, call_id.rstrip(b"\0").decode(), stage, settled))

    def jobs(self) -> Iterator[JobRow]:
        for at in range(self._jobs_at, self._jobs_at + self._most_jobs * _JOB_SIZE, _JOB_SIZE):
            stage = self._map[at]
            if not stage:
                return
            yield JobRow._make((*_JOB.unpack_from(self._map, at + 1), stage))
