"""One worker process: many tasks that make calls through a guard until they are told to stop, or killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import multiprocessing
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.torture.load import Load, Planned, Task, cost_nanousd, new_guard
from tests.torture.naive import CheckThenRecord
from tests.torture.truth import CallRow, CallStage, JobRow, JobStage, Kind, Truth

from asgi_llm_guard import Guard, LimitExceeded, Usage
from asgi_llm_guard.admission import ActiveCall
from asgi_llm_guard.background import let_go
from asgi_llm_guard.claims import Settlement
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.events import Event, Expired, SettledCall, SlotOverrun, StorageFailed
from asgi_llm_guard.guard import OpenCall
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.leases import LeasingStorage

__all__ = ["COUNTED", "SLOW_BEATS", "Spec", "open_for", "run", "work"]

COUNTED: Final = (
    "refused jobs",
    "refused calls",
    "store away",
    "lapsed alive",
    "overruns",
    "settled again",
    "settled twice",
    "cancelled",
    "outages",
    "slow beats",
)
"""What the counters of a truth file count."""
_REFUSED_JOB, _REFUSED_CALL, _AWAY, _LAPSED, _OVERRUN, _DUPLICATE, _NOT_DUPLICATE, _CANCELLED, _OUTAGE, _SLOW = range(
    len(COUNTED)
)
SLOW_BEATS: Final = _SLOW

_SETTLED: Final = {"settled": 1, "late": 2, "duplicate": 4}
_GIVE_UP_S: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a worker has to know."""

    load: Load
    url: str
    lapse_ms: int
    timeout_s: float | None
    """Of each call to the store; `None`: as usual."""
    naive: bool
    name: str
    """Of this incarnation; part of its seeds."""
    tasks: int
    truth: Path
    calls: int
    jobs: int
    control: Path
    """A file of one byte: 1 = stop."""
    began_ns: int
    stop_at_ns: int
    """`CLOCK_MONOTONIC`; then it stops whatever `control` says."""


def open_for(url: str, *, lapse_ms: int, timeout_s: float | None) -> Storage:
    """The storage of a URL, with another lapse than usual.

    `open_storage` has no such option, for a service has no use for it.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        from asgi_llm_guard.storage.memory import MemoryStorage

        return MemoryStorage(clock=SystemClock(), lapse_ms=lapse_ms)
    if scheme == "sqlite":
        from asgi_llm_guard.storage.sqlite import SqliteStorage

        return SqliteStorage(Path(rest), lapse_ms=lapse_ms, timeout_s=timeout_s or 5.0)
    from asgi_llm_guard.storage.redis import RedisStorage

    return RedisStorage(url, lapse_ms=lapse_ms, timeout_s=timeout_s, max_records=10_000_000)


def run(spec: Spec) -> None:
    """The whole life of a worker process."""
    logging.getLogger("asgi_llm_guard").setLevel(logging.CRITICAL)  # that the store is away is no news here
    parent = multiprocessing.parent_process()
    with (
        Truth(spec.truth, calls=spec.calls, jobs=spec.jobs) as truth,
        spec.control.open("rb") as file,
        mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as control,
    ):

        def stopped() -> bool:
            return control[0] == 1 or time.monotonic_ns() > spec.stop_at_ns or truth.full or not _lives(parent)

        async def main() -> None:
            storage = open_for(spec.url, lapse_ms=spec.lapse_ms, timeout_s=spec.timeout_s)
            if spec.load.leased:
                storage = LeasingStorage(storage)
            await work(spec, storage, truth, stopped)
            await storage.aclose()

        asyncio.run(main())


def _lives(parent: multiprocessing.process.BaseProcess | None) -> bool:
    return parent is None or parent.is_alive()


async def work(spec: Spec, storage: Storage, truth: Truth, stopped: Callable[[], bool]) -> None:
    """All tasks until `stopped()`; then settle everything. The storage stays open."""
    worker = _Worker(spec, CheckThenRecord(storage) if spec.naive else storage, truth, stopped)
    await worker.run()


class ProviderError(Exception):
    """An answer that is an error; shaped as SDKs shape it."""

    status_code = 529
    response = None
    body = None


class ConnectError(Exception):
    """No connection was made; named as clients name it."""


class _Worker:
    def __init__(self, spec: Spec, storage: Storage, truth: Truth, stopped: Callable[[], bool]) -> None:
        self.spec = spec
        self.truth = truth
        self.stopped = stopped
        self.rows: dict[str, int] = {}
        self.storage = storage
        self.guard: Guard = new_guard(spec.load, storage, self.observe)
        self._again: list[str] = []
        self._stop = False

    def observe(self, event: Event) -> None:
        truth = self.truth
        if isinstance(event, SettledCall):
            index = self.rows.pop(event.record.call_id, None)
            if index is not None:
                truth.put_settled(index, _SETTLED.get(event.settled.status, 3))
                if index % 32 == 0:
                    self._again.append(event.record.call_id)
        elif isinstance(event, Expired):
            truth.count(_LAPSED, sum(call_id in self.rows for call_id in event.call_ids))
        elif isinstance(event, SlotOverrun):
            truth.count(_OVERRUN)
        elif isinstance(event, StorageFailed):
            truth.count(_OUTAGE)

    async def run(self) -> None:
        beating = asyncio.create_task(self._beat())
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.spec.tasks):
                tasks.create_task(self._task(number))
        await self.guard.drain(5)
        give_up = time.monotonic() + _GIVE_UP_S
        while self.guard.engine.unsettled and time.monotonic() < give_up:  # noqa: ASYNC110 - the engine has no event
            await asyncio.sleep(0.05)
        beating.cancel()
        let_go(self.guard.engine.heart)
        if not self.guard.engine.unsettled:
            self.truth.end_well()

    async def _beat(self) -> None:
        """Heartbeats, in proportion to the lapse; meanwhile see whether to stop, and settle some calls again."""
        beat = time.monotonic()
        while True:
            for _ in range(10):
                await asyncio.sleep(self.spec.lapse_ms / 50_000)
                self._stop = self.stopped()
            await self.guard.heartbeat()
            if self.guard.engine.store.state != "failed":
                last, beat = beat, time.monotonic()
                if beat - last > self.spec.lapse_ms / 1000 * 0.8:
                    self.truth.count(_SLOW)
            ended, self._again = self._again, []
            with contextlib.suppress(StorageError):
                replies = await self.storage.settle([Settlement(call_id, ()) for call_id in ended])
                self.truth.count(_DUPLICATE, len(replies))
                self.truth.count(_NOT_DUPLICATE, sum(reply.status != "duplicate" for reply in replies))

    async def _task(self, number: int) -> None:
        task = Task(f"{self.spec.load.seed}/{self.spec.name}/{number}")
        await asyncio.sleep(task.random.uniform(0, 0.05))
        while not (self._stop or self.truth.full):
            try:
                async with asyncio.timeout(task.patience_s()):
                    await self._job(task)
            except TimeoutError:
                self.truth.count(_CANCELLED)
            except (ProviderError, ConnectError, ConnectionError):
                pass
            except LimitExceeded as refused:
                self.truth.count(_AWAY if refused.denied.code == "guard_unavailable" else _REFUSED_CALL)
                await asyncio.sleep(task.random.uniform(0.002, 0.02))

    async def _job(self, task: Task) -> None:
        truth = self.truth
        context, session, user, departments = task.job((time.monotonic_ns() - self.spec.began_ns) / 1e9)
        job = JobRow(user, time.monotonic_ns())
        index = truth.new_job(job)
        opening = self.guard.open(context)
        try:
            await opening.__aenter__()
        except BaseException:
            truth.put_job(index, job, JobStage.REFUSED)
            truth.count(_REFUSED_JOB)
            raise
        job = job._replace(opened_ns=time.monotonic_ns())
        truth.put_job(index, job, JobStage.OPEN)
        try:
            for planned in task.calls():
                call = _Call(self, planned, session, departments)
                await (call.make_inside(task.outer()) if planned.inside else call.make())
        finally:
            truth.put_job(index, job._replace(closing_ns=time.monotonic_ns()), JobStage.CLOSING)
            await opening.__aexit__(None, None, None)


class _Call:
    """One call, step by step, each written down before it is taken."""

    def __init__(self, worker: _Worker, planned: Planned, session: int, departments: int) -> None:
        self.guard = worker.guard
        self.truth = worker.truth
        self.rows = worker.rows
        self.planned = planned
        self.row = CallRow(planned.kind, planned.provider, departments, session)
        self.index = -1
        self.stage = CallStage.ASKED

    async def make(self) -> None:
        planned = self.planned
        async with self._claimed(planned, self._first) as call:
            await self._provider(call)

    async def make_inside(self, outer: Planned) -> None:
        """Claim `outer`, then make the call inside it, which takes its hold over."""
        async with self._claimed(outer, self._first) as around:
            second, second_tokens = _bound(self.planned)
            self._put(CallStage.AMENDING, second=second, second_tokens=second_tokens)
            try:
                async with self._claimed(self.planned, self._second) as call:
                    await self._provider(call)
            except LimitExceeded:
                around.release()  # what it stands for was not sent
                self._put(CallStage.AMENDING, kind=Kind.NOT_SENT)
                raise

    # -------------------------------------------------------------------------------- the steps

    @asynccontextmanager
    async def _claimed(
        self, planned: Planned, step: Callable[[Planned, OpenCall], Awaitable[ActiveCall]]
    ) -> AsyncGenerator[ActiveCall]:
        opening = self.guard.call(
            model=planned.model, input_tokens=planned.bound_input, max_output_tokens=planned.bound_output
        )
        call = await step(planned, opening)
        error: BaseException | None = None
        try:
            yield call
        except BaseException as raised:
            error = raised
            if isinstance(raised, asyncio.CancelledError) and self.stage is not CallStage.LEFT:
                # Nobody knows what the provider does with it, so here it does the worst.
                bill, tokens = self._held()
                self._put(self.stage, kind=Kind.CANCELLED, bill=bill, bill_tokens=tokens)
            raise
        finally:
            await opening.__aexit__(type(error) if error else None, error, None)
            self._put(CallStage.LEFT)

    async def _first(self, planned: Planned, opening: OpenCall) -> ActiveCall:
        self._begin(planned)
        try:
            call = await opening.__aenter__()
        except LimitExceeded as refused:
            away = refused.denied.code == "guard_unavailable"
            self._put(CallStage.DROPPED if away else CallStage.REFUSED)
            raise
        except BaseException:
            self._put(CallStage.DROPPED)
            raise
        self._admitted(call)
        return call

    async def _second(self, planned: Planned, opening: OpenCall) -> ActiveCall:
        call = await opening.__aenter__()
        if call.hold is not None and call.hold.call_id != self.row.call_id:
            # The outer one has lapsed, and stays charged; this one has claimed its own.
            self._put(CallStage.LEFT, kind=Kind.CANCELLED, bill=self.row.bound, bill_tokens=self.row.bound_tokens)
            self.row = CallRow(planned.kind, planned.provider, self.row.departments, self.row.session)
            self._begin(planned)
        self._admitted(call, provider=planned.provider)
        return call

    async def _provider(self, call: ActiveCall) -> None:
        planned = self.planned
        if planned.kind is not Kind.NOT_SENT:
            bill, tokens = planned.bill
            self._put(CallStage.DISPATCHED, bill=bill, bill_tokens=tokens)
            call.dispatched()
        await asyncio.sleep(planned.latency_s)
        match planned.kind:
            case Kind.MEASURED:
                call.record(Usage(input_tokens=planned.input_tokens, output_tokens=planned.output_tokens))
            case Kind.ERROR:
                raise ProviderError
            case Kind.UNKNOWN:
                raise ConnectionResetError
            case Kind.NOT_SENT:
                raise ConnectError

    def _begin(self, planned: Planned) -> None:
        bound, bound_tokens = _bound(planned)
        self.row = self.row._replace(provider=planned.provider, bound=bound, bound_tokens=bound_tokens)
        self.stage = CallStage.ASKED
        self.index = self.truth.new_call(self.row)

    def _admitted(self, call: ActiveCall, **changed: int) -> None:
        hold = call.hold
        assert hold is not None
        pins = {receipt.claim.meter.policy: receipt.pin for receipt in hold.receipts}
        self.rows[hold.call_id] = self.index
        self._put(
            CallStage.ADMITTED,
            call_id=hold.call_id,
            provider_pin=pins["providers"],
            day_pin=pins["quota"],
            **changed,
        )

    def _held(self) -> tuple[int, int]:
        """What the guard holds, and charges if it hears no more."""
        row = self.row
        taken_over = self.stage is not CallStage.AMENDING and row.second >= 0
        return (row.second, row.second_tokens) if taken_over else (row.bound, row.bound_tokens)

    def _put(self, stage: CallStage, **changed: int | str) -> None:
        self.row = self.row._replace(**changed)  # type: ignore[arg-type]
        self.stage = stage
        self.truth.put_call(self.index, self.row, stage)


def _bound(planned: Planned) -> tuple[int, int]:
    cost = cost_nanousd(planned.bound_input, planned.bound_output)
    return cost, planned.bound_input + planned.bound_output
