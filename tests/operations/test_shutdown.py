"""SIGTERM with the guard's own handlers: what is new is refused, streams get their time and an end, nothing stays held."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.exits.kit import BILL, CONTEXT, MODEL, PRICES, Stage
from tests.exits.test_shutdown import Service, left_behind, sums
from tests.middleware.asgi import request
from tests.operations.kit import CHAT, reading, served

from asgi_llm_guard import Budget, Guard, GuardMiddleware, LimitExceeded, Usage, guarded
from asgi_llm_guard.claims import Ended, Granted, Plan, Refused
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import Behaviour, FakeProvider

pytestmark = pytest.mark.anyio


class Gated(MemoryStorage):
    """Grants nothing while its gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def reserve(self, owner: str, plans: Sequence[Plan]) -> Granted | Refused | Ended:
        if not self.gate.is_set():
            self.asked.set()
            await self.gate.wait()
        return await super().reserve(owner, plans)


@asynccontextmanager
async def service(path: Path, base_url: str, *options: str) -> AsyncIterator[Service]:
    """As that of `tests.exits`, with handlers of the guard's own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.operations.service"),
            *(f"--fd={listener.fileno()}", f"--path={path}", f"--base-url={base_url}"),
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


@pytest.mark.parametrize("lifespan", ["on", "off"])
async def test_sigterm_ends_streams_that_do_not_end(tmp_path: Path, lifespan: str) -> None:
    """S10: a server that waits for its streams for ever ends in good order all the same, with a lifespan and without:
    they end after their time, are charged for what was seen, and nothing stays held."""
    provider = FakeProvider(prices=BILL, default=Behaviour.slow())
    path = tmp_path / "guard.db"
    async with provider.serve() as base_url, service(path, base_url, f"--lifespan={lifespan}") as running:
        answers = [asyncio.create_task(running.server.request("/stream", timeout=60)) for _ in range(3)]
        await provider.until(lambda: provider.open == 3, timeout_s=60)
        provider.release(6)
        assert await running.end(signal.SIGTERM) == 0
        await asyncio.gather(*answers, return_exceptions=True)
        await provider.idle()
    holds, records = await left_behind(path)
    assert (holds, len(records)) == (0, 3)
    charged, held = sums(records)
    assert 0 < provider.total_nanousd <= charged <= held


async def test_sigterm_lets_streams_end_in_their_time(tmp_path: Path) -> None:
    """S10: streams that end within their time are charged exactly, and nobody is cut."""
    provider = FakeProvider(prices=BILL, default=Behaviour.slow())
    path = tmp_path / "guard.db"
    async with provider.serve() as base_url, service(path, base_url, "--lifespan=off", "--timeout=20") as running:
        answers = [asyncio.create_task(running.server.request("/stream", timeout=60)) for _ in range(3)]
        await provider.until(lambda: provider.open == 3, timeout_s=60)
        running.process.send_signal(signal.SIGTERM)
        await running.says(b"draining")
        provider.release()
        assert {answer.text for answer in await asyncio.gather(*answers)} == {"Echo: one two three"}
        assert await running.ended() == 0
    holds, records = await left_behind(path)
    assert (holds, len(records)) == (0, 3)
    assert sums(records)[0] == provider.total_nanousd


async def test_sigterm_without_a_server(tmp_path: Path) -> None:
    """S10: a job in a process where nobody handles signals is ended, settled, and the process ends: by the signal, or
    with what has become of the job, if that comes first."""
    provider = FakeProvider(prices=BILL, default=Behaviour.slow())
    path = tmp_path / "guard.db"
    async with provider.serve() as base_url, service(path, base_url, "--job", "--timeout=0.2") as running:
        provider.release(3)
        await running.says(b"word")
        assert await running.end(signal.SIGTERM) in {-signal.SIGTERM, 1}
        await provider.idle()
    holds, records = await left_behind(path)
    assert (holds, len(records)) == (0, 1)
    charged, held = sums(records)
    assert 0 < provider.total_nanousd <= charged <= held


@pytest.mark.parametrize("path", ["/own", "/hook" + CHAT, "/opaque" + CHAT, "/llm" + CHAT])
async def test_a_drain_says_so_in_the_stream(stage: Stage, path: str) -> None:
    """S10: a stream that is still running when its time is over ends with an event that says why, and is charged for
    what was seen."""
    stage.provider.script(Behaviour.slow())
    stage.provider.release(3)
    async with served(stage) as server, reading(server, path) as answer:
        await answer.until(b"two")
        drained = await stage.guard.drain(0.05)
        await answer.rest()
        assert drained == 1
        assert "shutting down" in str(answer.events[-1])
        await stage.provider.until(lambda: stage.provider.open == 0)
        await stage.settled(calls=1, exact=False)
        stage.guard.resume()


async def test_a_drain_does_what_is_to_be_done_last(stage: Stage) -> None:
    """Chores that are to be done last are done once by a drain, and all chores begin again when the guard resumes."""
    done: list[str] = []

    async def last() -> None:
        done.append("last")

    async def other() -> None:
        done.append("other")

    stage.guard.chores.add("last", 3600, last, last=True)
    stage.guard.chores.add("other", 3600, other)
    async with stage.guard.open(CONTEXT):
        pass
    await stage.guard.drain(0)
    assert done == ["last"]
    with pytest.raises(LimitExceeded, match="shutting down"):
        async with stage.guard.open(CONTEXT):
            pass
    stage.guard.resume()
    async with stage.guard.open(CONTEXT):
        assert stage.guard.chores.begun


@pytest.mark.parametrize("timeout_s", [-1, True, "5", 1e9])
def test_malformed_times(timeout_s: object) -> None:
    """The time of a drain is checked when handlers are installed, and then none are."""
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(ConfigurationError, match="install_signal_handlers"):
        Guard(storage=MemoryStorage()).install_signal_handlers(timeout_s)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) is before


async def test_drains_at_the_same_time_end_together() -> None:
    """S10: a signal and the end of the lifespan drain at the same time: neither waits longer than what is open lasts."""
    guard = Guard(storage=MemoryStorage())
    async with guard.open(CONTEXT):
        drains = [asyncio.create_task(guard.drain(60)) for _ in range(3)]
        await asyncio.sleep(0.01)
    assert await asyncio.wait_for(asyncio.gather(*drains), 30) == [0, 0, 0]
    await guard.aclose()


def test_a_drain_that_was_cancelled_leaves_nothing_behind() -> None:
    """S10: a drain that its server gave up, whose event loop is gone, is in the way of no request afterwards."""
    guard = Guard(storage=MemoryStorage())

    async def give_up() -> None:
        async with guard.open(CONTEXT):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(guard.drain(60), 0.01)
        guard.resume()

    async def work() -> None:
        async with guard.open(CONTEXT):
            pass
        await guard.aclose()

    asyncio.run(give_up())
    asyncio.run(work())


def test_a_child_leaves_to_its_parent_what_is_open_there(tmp_path: Path) -> None:
    """S10: a forked child that drains, or stops everything, ends no job of its parent, whose call is charged as it was."""
    guard = Guard([Budget("$1/1d", per="global")], storage=f"sqlite:///{tmp_path}/guard.db", prices=PRICES)

    async def work() -> None:
        async with guard.open(CONTEXT), guard.call(model=MODEL, input_tokens=1000, max_output_tokens=1000) as call:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = 0 if (guard.open_admissions, guard.stop(Stop(scope="all"))) == (0, 0) else 2
                    guard.set_stops([Stop(scope="all")])
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            call.record(Usage(input_tokens=1, output_tokens=1))
        await guard.aclose()

    asyncio.run(work())
    holds, records = asyncio.run(left_behind(tmp_path / "guard.db"))
    assert (holds, [record.outcome for record in records]) == (0, ["measured"])


async def test_nothing_new_is_called_while_the_service_goes_down() -> None:
    """S10: once it drains, calls of requests that are not guarded, of guarded functions, and of requests that were still
    being granted are refused; a request that calls nobody is answered."""
    storage = Gated()
    guard = Guard([Budget("$1/1d", per="global")], storage=storage, prices=PRICES)

    @guarded(model=MODEL, max_output_tokens=1, guard=guard, context=CONTEXT)
    async def work() -> str:
        return "done"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/page":
            async with guard.call(model=MODEL, input_tokens=1, max_output_tokens=1):
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    served = GuardMiddleware(app, guard)

    async def status(path: str, method: str) -> int | None:
        return (await request(path, method=method).run(served)).status

    assert [await status("/call", "GET"), await status("/page", "GET"), await work()] == [200, 200, "done"]
    storage.gate.clear()
    late = asyncio.create_task(status("/call", "POST"))
    await storage.asked.wait()
    await guard.drain(0.01)
    storage.gate.set()
    assert await asyncio.wait_for(late, 30) == 503
    assert [await status("/call", "GET"), await status("/page", "GET")] == [503, 200]
    with pytest.raises(LimitExceeded, match="shutting down"):
        await work()
    assert await storage.open_holds() == 0
    assert guard.open_admissions == 0
    await guard.aclose()
