"""One round: worker processes under load, what is done to them meanwhile, and what is left in the end."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Final

from tests.servers import FaultProxy, RedisServer, unique_namespace
from tests.torture.judge import Process, Stored, Verdict, judge
from tests.torture.load import MOST_COST, Load, Meters
from tests.torture.truth import Truth
from tests.torture.worker import COUNTED, SLOW_BEATS, Spec, open_for, run, work

from asgi_llm_guard.errors import StorageError
from asgi_llm_guard.storage.base import Storage

__all__ = ["Plan", "Result", "play", "start_up"]

_CALLS_PER_PROCESS: Final = 200_000
"""Room in a truth file; it takes disk only for what is written."""
_AFTER_S: Final = 0.5
"""How long the load goes on when the money is spent."""
_JOIN_S: Final = 30.0
_GRACE_S: Final = 2.0
_RECOVERY_S: Final = 1.5
_PATIENT_S: Final = 5.0
"""How long a storage may take where nothing is done to it: a busy machine is no fault of the storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done in one round."""

    name: str
    storage: str
    """`sqlite`, `redis` or `memory`."""
    load: Load
    seconds: float
    """The load ends then, if the money is not spent before."""
    processes: int = 4
    tasks: int = 64
    lapse_ms: int = 3_000
    kill_every_s: float | None = None
    """On average, `kill -9` of one process, and another in its place."""
    fault_every_s: float | None = None
    """On average, a fault of the network, or a restart of the server. Redis only."""
    naive: bool = False


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of it."""

    plan: Plan
    verdict: Verdict
    seconds: float
    kills: int
    faults: Counter[str]
    counted: Counter[str]
    """What workers counted, those that were killed included."""
    looks: int
    """How often the counters were looked at during the load."""


@dataclass(slots=True)
class _Running:
    """One worker process."""

    spec: Spec
    process: ForkServerProcess
    killed_ns: int | None = None


def start_up() -> ForkServerContext:
    """A process that workers are forked from: it has imported everything, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.torture.worker"])
    return context


def play(plan: Plan, context: ForkServerContext, folder: Path) -> Result:
    """Play one round. Whatever happens, no process outlives it."""
    folder.mkdir()
    with _store(plan, folder) as (url, faults):
        return asyncio.run(_Round(plan, context, folder, url, faults).play())


class _Faults:
    """What is done to the connections, and to the server, of a Redis round."""

    def __init__(self, server: RedisServer, proxy: FaultProxy) -> None:
        self.server = server
        self.proxy = proxy
        self.done: Counter[str] = Counter()
        self._deck: list[tuple[str, Callable[[], float]]] = []

    def strike(self, rng: random.Random) -> None:
        """One fault, and its end. Each kind comes in its turn, in an order that the seed decides."""
        if not self._deck:
            self._deck = [
                *[("reply cut", self._cut_reply)] * 3,
                *[("request cut", self._cut_request)] * 2,
                ("all cut", self._cut),
                ("replies slow", self._slow),
                ("requests slow", self._slow_requests),
                ("server stopped", self._pause),
                ("replies swallowed", self._swallow),
                ("server killed", self._restart),
            ]
            rng.shuffle(self._deck)
        name, fault = self._deck.pop()
        lasts_s = fault()
        self.done[name] += 1
        if lasts_s:
            time.sleep(lasts_s)
            self.proxy.heal()

    def _cut_reply(self) -> float:
        self.proxy.cut_at_reply(of="EVALSHA")
        return 0

    def _cut_request(self) -> float:
        self.proxy.cut_at_request(of="EVALSHA")
        return 0

    def _cut(self) -> float:
        self.proxy.cut()
        return 0

    def _slow(self) -> float:
        self.proxy.to_client.delay_ms = 350
        return 0.4

    def _slow_requests(self) -> float:
        self.proxy.to_server.delay_ms = 350
        return 0.4

    def _pause(self) -> float:
        self.server.pause()
        time.sleep(0.35)
        self.server.resume()
        return 0

    def _swallow(self) -> float:
        self.proxy.to_client.drop = True
        return 0.3

    def _restart(self) -> float:
        self.server.restart()
        return 0


@contextmanager
def _store(plan: Plan, folder: Path) -> Iterator[tuple[str, _Faults | None]]:
    """The URL that workers use, and what can be done to it."""
    if plan.storage != "redis":
        yield f"{plan.storage}://{folder / 'store.db' if plan.storage == 'sqlite' else ''}", None
        return
    with RedisServer(appendonly=True) as server, FaultProxy(server.url) as proxy:
        namespace = unique_namespace()
        url = proxy.url if plan.fault_every_s else server.url
        yield f"{url}?namespace={namespace}", _Faults(server, proxy) if plan.fault_every_s else None


@dataclass(slots=True)
class _Round:
    plan: Plan
    context: ForkServerContext
    folder: Path
    url: str
    faults: _Faults | None
    running: list[_Running] = field(default_factory=list)
    ended: list[_Running] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    looks: int = 0
    started: int = 0

    async def play(self) -> Result:
        plan, begun = self.plan, time.monotonic()
        control = self.folder / "control"
        control.write_bytes(b"\0")
        storage = open_for(self.url, lapse_ms=plan.lapse_ms, timeout_s=_PATIENT_S)
        own = Truth(self._spec("inside").truth, calls=_CALLS_PER_PROCESS, jobs=_CALLS_PER_PROCESS, create=True)
        try:
            if plan.storage == "memory":
                await self._inside(storage, own)
            else:
                await self._processes(storage, control)
            stored = await self._stored(storage)
        finally:
            own.close()
            for worker in self.running:
                worker.process.kill()
                worker.process.join()
            await storage.aclose()
        processes, counted = self._left()
        verdict = judge(plan.load, processes, stored, naive=plan.naive)
        verdict.check(not counted["settled twice"], f"{counted['settled twice']} settlements were applied twice")
        for problem in self.problems:
            verdict.problem(problem)
        return Result(
            plan=plan,
            verdict=verdict,
            seconds=time.monotonic() - begun,
            kills=sum(worker.killed_ns is not None for worker in self.ended),
            faults=self.faults.done if self.faults is not None else Counter(),
            counted=counted,
            looks=self.looks,
        )

    # ------------------------------------------------------------------------------ the load

    async def _inside(self, storage: Storage, truth: Truth) -> None:
        """The same load, in this process."""
        spec = replace(self._spec("inside"), tasks=self.plan.tasks * self.plan.processes)
        watching = asyncio.create_task(self._until_spent(storage))
        try:
            await work(spec, storage, truth, watching.done)
        finally:
            watching.cancel()

    async def _processes(self, storage: Storage, control: Path) -> None:
        plan = self.plan
        for _ in range(plan.processes):
            self._start()
        rng = random.Random(f"{plan.load.seed}/{plan.name}/rig")
        doing = [asyncio.create_task(self._until_spent(storage))]
        if plan.kill_every_s is not None:
            doing.append(asyncio.create_task(self._kill_some(rng, plan.kill_every_s)))
        if plan.fault_every_s is not None:
            doing.append(asyncio.create_task(self._strike(rng, plan.fault_every_s)))
        await asyncio.wait(doing, return_when=asyncio.FIRST_COMPLETED)
        for task in doing:
            task.cancel()
        for ended in await asyncio.gather(*doing, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        if self.faults is not None:
            # Whoever is told to stop while the store is away is charged what it holds; here the sums shall be exact.
            await asyncio.to_thread(self.faults.proxy.heal)
            await asyncio.sleep(_RECOVERY_S)
        with control.open("r+b") as file:  # never truncated: workers have it mapped
            file.write(b"\1")
        await asyncio.to_thread(self._join)

    async def _until_spent(self, storage: Storage) -> None:
        """Look at all counters, over and over, until the money is spent or the time is over."""
        plan, meters = self.plan, Meters(self.plan.load).watched()
        end = time.monotonic() + plan.seconds
        while (now := time.monotonic()) < end:
            await asyncio.sleep(0.05)
            try:
                readings = await storage.read(meters)
            except StorageError:
                continue
            self.looks += 1
            for meter, reading in zip(meters, readings, strict=True):
                assert meter.limit is not None
                if reading.used + reading.held > meter.limit and not plan.naive:
                    self.problems.append(f"{meter.key}: {reading} is above {meter.limit}")
            everything = readings[0].used
            if everything > plan.load.budget_nanousd - MOST_COST:
                end = min(end, now + _AFTER_S)

    async def _kill_some(self, rng: random.Random, every_s: float) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * every_s)
            worker = rng.choice(self.running)
            worker.killed_ns = time.monotonic_ns()
            worker.process.kill()
            await asyncio.to_thread(worker.process.join)
            self.running.remove(worker)
            self.ended.append(worker)
            self._start()

    async def _strike(self, rng: random.Random, every_s: float) -> None:
        assert self.faults is not None
        while True:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * every_s)
            await asyncio.shield(asyncio.to_thread(self.faults.strike, rng))

    # --------------------------------------------------------------------------- the processes

    def _spec(self, name: str) -> Spec:
        now_ns = time.monotonic_ns()
        return Spec(
            load=self.plan.load,
            url=self.url,
            lapse_ms=self.plan.lapse_ms,
            timeout_s=None if self.plan.fault_every_s else _PATIENT_S,
            naive=self.plan.naive,
            name=name,
            tasks=self.plan.tasks,
            truth=self.folder / f"truth-{name}",
            calls=_CALLS_PER_PROCESS,
            jobs=_CALLS_PER_PROCESS,
            control=self.folder / "control",
            began_ns=now_ns,
            stop_at_ns=now_ns + int((self.plan.seconds + 5) * 1e9),
        )

    def _start(self) -> None:
        spec = self._spec(f"{self.started}")
        self.started += 1
        Truth(spec.truth, calls=spec.calls, jobs=spec.jobs, create=True).close()
        process = self.context.Process(target=run, args=(spec,), daemon=True)
        process.start()
        self.running.append(_Running(spec, process))

    def _join(self) -> None:
        """Wait for all that were not killed; they have been told to stop."""
        for worker in tuple(self.running):
            worker.process.join(_JOIN_S)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
                self.problems.append(f"process {worker.spec.name} did not end {_JOIN_S:g} s after it was told to")
            elif worker.process.exitcode and worker.killed_ns is None:
                self.problems.append(f"process {worker.spec.name} ended with status {worker.process.exitcode}")
            self.running.remove(worker)
            self.ended.append(worker)

    def _left(self) -> tuple[list[Process], Counter[str]]:
        """What the processes have left."""
        processes: list[Process] = []
        counted: Counter[str] = Counter()
        workers = [(worker.spec, worker.killed_ns) for worker in self.ended] or [(self._spec("inside"), None)]
        for spec, killed_ns in workers:
            with Truth(spec.truth, calls=spec.calls, jobs=spec.jobs) as truth:
                process = Process(
                    name=spec.name,
                    calls=list(truth.calls()),
                    jobs=list(truth.jobs()),
                    clean=truth.ended_well,
                    slow=truth.counter(SLOW_BEATS) > 0,
                    ended_ns=killed_ns or time.monotonic_ns(),
                )
                counted.update({name: truth.counter(number) for number, name in enumerate(COUNTED)})
            processes.append(process)
            if not process.clean and killed_ns is None:
                self.problems.append(f"process {spec.name} could not settle everything")
        return processes, counted

    # ------------------------------------------------------------------------------- the store

    async def _stored(self, storage: Storage) -> Stored:
        """What the store says, once the owners that were killed have lapsed."""
        plan, meters = self.plan, Meters(self.plan.load)
        # What a killed worker sent may reach the server after its death, and keeps its owner alive from then on.
        give_up = time.monotonic() + plan.lapse_ms / 1000 + _GRACE_S
        await storage.heartbeat("the rig")
        while await storage.open_holds() and time.monotonic() < give_up:
            await asyncio.sleep(0.1)
            await storage.heartbeat("the rig")
        await storage.retire("the rig")
        sessions = sorted({row.session for process in self._left()[0] for row in process.calls})
        return Stored(
            records=await storage.records(),
            everything=(await storage.read([meters.everything]))[0],
            providers=await storage.read(meters.providers),
            departments=await storage.read(meters.departments),
            slots=await storage.read(meters.slots),
            sessions=dict(
                zip(sessions, await storage.read([meters.session(session) for session in sessions]), strict=True)
            ),
            open_holds=await storage.open_holds(),
        )
