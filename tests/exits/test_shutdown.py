"""Processes that end, by SIGTERM and by `kill -9`, and guards that are drained: the file they leave says it all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from tests.exits.kit import BILL, CONTEXT, PRICES, Server, Stage
from tests.exits.service import policies
from tests.exits.test_returns import app_of

from asgi_llm_guard import Guard, Usage
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

LAPSED_MS = 60_000


class Service:
    """A guarded application in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.server = Server(port)

    async def says(self, words: bytes) -> None:
        """Wait until the process has written `words` to its log."""
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while words not in (line := await self.process.stderr.readline()):
                assert line, f"the service ended without saying {words!r}"

    async def end(self, number: signal.Signals) -> int:
        """Send the signal; gives how the process ended."""
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(60):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def service(path: Path | str, base_url: str, *options: str) -> AsyncIterator[Service]:
    """Run the application over the storage in the file `path`; killed at the end if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.exits.service", f"--fd={listener.fileno()}", f"--path={path}", f"--base-url={base_url}"),
            *options,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(listener.fileno(),),
        )
        port: int = listener.getsockname()[1]
    try:
        yield Service(process, port)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def left_behind(path: Path, *, later_ms: int = 0) -> tuple[int, list[UsageRecord]]:
    """Open holds and records in the file, as another process finds them; `later_ms` after now."""
    storage = SqliteStorage(path, clock=FrozenClock(time.time_ns() // 1_000_000 + later_ms))
    try:
        await storage.heartbeat("another")
        return await storage.open_holds(), list(await storage.records())
    finally:
        await storage.aclose()


def sums(records: list[UsageRecord]) -> tuple[int, int]:
    """What was charged and what was held, in nano-USD."""
    charged = sum(record.cost_nanousd or 0 for record in records)
    return charged, sum(record.estimate_nanousd or 0 for record in records)


@pytest.mark.parametrize("options", [(), ("--mounted",), ("--lifespan=off",)], ids=["lifespan", "mounted", "off"])
async def test_sigterm_lets_open_calls_end(tmp_path: Path, options: tuple[str, ...]) -> None:
    """S10: after SIGTERM, streams and calls that are open end well, and nothing of them is lost: bill and ledger agree."""
    provider = FakeProvider(prices=BILL, default=Behaviour.slow())
    path = tmp_path / "guard.db"
    async with provider.serve() as base_url, service(path, base_url, *options) as running:
        ways = ["/call", "/stream", "/detached"] * 4
        answers = [asyncio.create_task(running.server.request(way, timeout=60)) for way in ways]
        await provider.until(lambda: provider.open == len(ways), timeout_s=60)
        running.process.send_signal(signal.SIGTERM)
        await running.says(b"Shutting down")
        provider.release()
        assert {answer.status_code for answer in await asyncio.gather(*answers)} == {200}
        assert await running.ended() == -signal.SIGTERM
    holds, records = await left_behind(path)
    assert (holds, len(records)) == (0, len(ways))
    assert sums(records)[0] == provider.total_nanousd


async def test_sigterm_with_a_provider_that_hangs(tmp_path: Path) -> None:
    """S10: when the server's patience is over, calls that hang are charged what they hold, and nothing stays held."""
    provider = FakeProvider(prices=BILL, default=Behaviour.hang())
    path = tmp_path / "guard.db"
    options = ("--timeout-graceful-shutdown=1",)
    async with provider.serve() as base_url, service(path, base_url, *options) as running:
        ways = ["/call", "/stream", "/detached"] * 4
        answers = [asyncio.create_task(running.server.request(way, timeout=60)) for way in ways]
        await provider.until(lambda: provider.open == len(ways), timeout_s=60)
        assert await running.end(signal.SIGTERM) == -signal.SIGTERM
        await asyncio.gather(*answers, return_exceptions=True)
        await provider.idle()
    holds, records = await left_behind(path)
    assert (holds, len(records)) == (0, len(ways))
    charged, held = sums(records)
    assert provider.total_nanousd <= charged <= held


async def test_sigterm_without_a_lifespan_and_patience(tmp_path: Path) -> None:
    """Where no lifespan event comes and the server cuts calls off, they are charged at the lapse at the latest."""
    provider = FakeProvider(prices=BILL, default=Behaviour.hang())
    path = tmp_path / "guard.db"
    options = ("--timeout-graceful-shutdown=1", "--mounted", "--lifespan=off")
    async with provider.serve() as base_url, service(path, base_url, *options) as running:
        answers = [asyncio.create_task(running.server.request("/call", timeout=60)) for _ in range(4)]
        await provider.until(lambda: provider.open == 4, timeout_s=60)
        assert await running.end(signal.SIGTERM) == -signal.SIGTERM
        await asyncio.gather(*answers, return_exceptions=True)
        await provider.idle()
    holds, records = await left_behind(path, later_ms=LAPSED_MS)
    assert (holds, len(records)) == (0, 4)
    charged, held = sums(records)
    assert provider.total_nanousd <= charged <= held


async def test_kill(tmp_path: Path) -> None:
    """After `kill -9` with 50 open calls, another process gives 50 slots back at the lapse, and charges 50 holds."""
    provider = FakeProvider(prices=BILL, default=Behaviour.hang())
    path = tmp_path / "guard.db"
    async with provider.serve() as base_url, service(path, base_url, "--slots=50") as running:
        answers = [asyncio.create_task(running.server.request("/call", timeout=60)) for _ in range(50)]
        await provider.until(lambda: provider.open == 50, timeout_s=60)
        assert (await running.server.request("/call")).status_code == 429
        assert await running.end(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.gather(*answers, return_exceptions=True)
        await provider.idle()
    assert await left_behind(path) == (100, [])  # 50 calls, and the slots of 50 requests
    holds, records = await left_behind(path, later_ms=LAPSED_MS)
    assert (holds, len(records)) == (0, 50)
    assert {record.outcome for record in records} == {"expired"}
    charged, held = sums(records)
    assert provider.total_nanousd <= charged == held

    clock = FrozenClock(time.time_ns() // 1_000_000 + LAPSED_MS)
    guard = Guard(policies("$10/1d", 50), storage=SqliteStorage(path, clock=clock), clock=clock, prices=PRICES)
    for _ in range(50):
        assert await guard.new_admission(CONTEXT).open(None, calls=False) is None
    call = guard.describe("openai/gpt-test", input_tokens=1, max_output_tokens=1)
    (claim,) = policies("$10/1d", 50)[1].plan(CONTEXT, call, clock.now_ms()).claims
    (reading,) = await guard.storage.read([claim.meter])
    assert (reading.used, reading.held) == (charged, 0)
    await guard.aclose()


# ------------------------------------------------------------------------------------- drain


async def test_drain_refuses_new_requests_and_waits(stage: Stage) -> None:
    """While a guard drains, new requests get a 503 and open streams go on to their end."""
    stage.provider.script(Behaviour.slow())

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async with stage.serve(app_of(stage, endpoint)) as server:
        open_one = asyncio.create_task(server.request("/"))
        await stage.provider.until(lambda: stage.provider.open == 1)
        draining = asyncio.create_task(stage.guard.drain(60))
        await asyncio.sleep(0)  # let it begin
        refused = await server.request("/")
        assert (refused.status_code, stage.guard.draining) == (503, True)
        assert int(refused.headers["retry-after"]) > 0
        stage.provider.release()
        assert (await open_one).text == "Echo: one two three"
        assert await draining == 0
        await stage.settled(calls=1, requests=2)


async def test_drain_settles_what_does_not_end(stage: Stage) -> None:
    """What is still open when the wait is over is charged for what was seen, and nothing is held from then on."""
    stage.provider.script(Behaviour.slow(), Behaviour.hang())

    async def endpoint(request: Request) -> Response:
        if request.url.path == "/stream":
            return StreamingResponse(stage.stream())
        return PlainTextResponse(await stage.complete())

    async with stage.serve(app_of(stage, endpoint)) as server, server.connection() as stream:
        stream.ask("/stream")
        stage.provider.release(2)
        await stream.until(b"one")
        whole = asyncio.create_task(server.request("/whole"))
        await stage.provider.until(lambda: stage.provider.open == 2)
        assert await stage.guard.drain(0) == 2
        assert await stage.storage.open_holds() == 0
        before = list(await stage.storage.records())
        assert sorted(record.outcome for record in before) == ["estimated", "unknown"]
        stage.provider.release()
        assert (await whole).status_code == 200
        await stream.until(b"0\r\n\r\n")
        records = await stage.settled(calls=2, exact=False, requests=2)
    assert records == before


async def test_drain_charges_what_outlives_its_request(stage: Stage) -> None:
    """A call in a task that outlives its request is charged what it holds, and corrected when it ends after all."""
    stage.provider.script(Behaviour.hang())
    tasks = []

    async def endpoint(request: Request) -> Response:
        tasks.append(asyncio.create_task(stage.complete()))
        await stage.provider.until(lambda: stage.provider.open == 1)
        return PlainTextResponse("started")

    async with stage.serve(app_of(stage, endpoint)) as server:
        assert (await server.request("/")).status_code == 200
        assert stage.watch is not None
        await stage.watch.idle()
        assert await stage.storage.open_holds() == 1
        assert await stage.guard.drain(0) == 0
        assert await stage.storage.open_holds() == 0
        (record,) = await stage.storage.records()
        assert (record.outcome, record.cost_nanousd) == ("expired", record.estimate_nanousd)
        stage.provider.release()
        await stage.settlements.until(1)
        await stage.provider.idle()
        (record,) = await stage.storage.records()
    assert (record.outcome, record.late, record.cost_nanousd) == ("measured", True, stage.provider.total_nanousd)


async def test_closing_charges_what_is_open(tmp_path: Path) -> None:
    """A guard that is closed while calls are open leaves nothing held: they are charged, and end in silence later."""
    path = tmp_path / "guard.db"
    clock = FrozenClock(time.time_ns() // 1_000_000)
    guard = Guard(policies("$10/1d", 50), storage=SqliteStorage(path, clock=clock), clock=clock, prices=PRICES)
    async with guard.open(CONTEXT), guard.call(model="openai/gpt-test", input_tokens=10, max_output_tokens=5) as call:
        call.dispatched()
        await guard.aclose()
        call.record(Usage(input_tokens=10, output_tokens=1))
    holds, records = await left_behind(path)
    assert (holds, [record.outcome for record in records]) == (0, ["unknown"])
    assert sums(records) == (20_000, 20_000)


async def test_closing_twice() -> None:
    """A guard may be closed twice, and by its own block."""
    guard = Guard(storage=MemoryStorage())
    async with guard, guard.open(CONTEXT), guard.call():
        pass
    await guard.aclose()
    assert guard.draining
