"""A call that the hook sees is charged once, whatever stands around it, and each of many on its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from tests.exits.kit import BILL, CONTEXT, HEADERS, MAX_TOKENS, MODEL, Stage, new_stage
from tests.exits.test_await_points import SlowMemory, Turn, drive
from tests.hooks.kit import LIBRARIES, Way, admitted, asked, hooked
from tests.hooks.test_answers import STREAM, STREAMED

from asgi_llm_guard import Guard, GuardMiddleware, Iterations, Route, guarded
from asgi_llm_guard.httpx import AsyncGuardTransport, GuardTransport
from asgi_llm_guard.testing import FakeProvider, FrozenClock

pytestmark = pytest.mark.anyio


async def test_many_at_a_time(stage: Stage, way: Way) -> None:
    """64 calls at a time, streams among them, are each charged to the nano-dollar."""
    async with admitted(stage, way) as client:
        whole = [client.post(asked(f"one two three {number}")) for number in range(32)]
        streams = [client.chunks(asked(f"one two three {number}", stream=True)) for number in range(32)]
        await asyncio.gather(*whole, *streams)

    await stage.settled(calls=64)


async def test_no_more_than_fits(stage: Stage, way: Way) -> None:
    """Of 20 calls at a time, as many reach the provider as the session may make."""
    async with hooked(stage, way) as client, stage.guard.open(CONTEXT, extra=[Iterations(7, name="seven")]):
        responses = await asyncio.gather(*(client.post(asked(f"number {number}")) for number in range(20)))

    assert sorted(response.status_code for response in responses) == [200] * 7 + [429] * 13
    await stage.settled(calls=7)


async def test_nested(stage: Stage, way: Way) -> None:
    """Request, guarded function, `guard.call` and hook around one call are one call; what is recorded changes nothing."""
    async with hooked(stage, way) as client:

        @guarded(model=MODEL, max_output_tokens=MAX_TOKENS)
        async def function(text: str) -> Any:
            async with stage.guard.call(**stage.describe(text)) as call:
                response = await client.post(asked(text))
                call.record(response)
            return response.json()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await function("one two three")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        await ask(GuardMiddleware(app, stage.guard))

    (record,) = await stage.settled(calls=1)
    assert record.outcome == "measured"


@pytest.mark.parametrize("around", ["nothing", "call", "function"])
async def test_ten_calls(stage: Stage, way: Way, around: str) -> None:
    """Ten calls are ten calls, whatever stands around them."""
    async with hooked(stage, way) as client:

        async def ten() -> None:
            for _ in range(10):
                await client.post(asked())

        function = guarded(model=MODEL, max_output_tokens=MAX_TOKENS)(ten)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if around == "call":
                async with stage.guard.call(**stage.describe("one two three")):
                    await ten()
            else:
                await (function if around == "function" else ten)()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        await ask(GuardMiddleware(app, stage.guard))

    await stage.settled(calls=10)


async def test_request_that_is_passed_on(stage: Stage, way: Way) -> None:
    """A proxy's call takes over what its request was admitted for; its response body is not charged a second time."""
    async with hooked(stage, way) as client:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = (await receive())["body"]
            response = await client.post(content=body)
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": response.content})

        response = await ask(GuardMiddleware(app, stage.guard), "/v1/chat/completions", json=asked())

    assert response.json()["usage"]
    await stage.settled(calls=1)


async def test_request_without_a_call(stage: Stage) -> None:
    """Once a hook is installed, a request in which no call was seen has made none."""
    async with hooked(stage, "httpx2 async"):

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        await ask(GuardMiddleware(app, stage.guard), "/v1/chat/completions", json=asked())

    await stage.settled(calls=0)


async def test_after_the_response(stage: Stage, way: Way) -> None:
    """A call in a background task claims its own, under the same context."""
    async with hooked(stage, way) as client:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            await client.post(asked())

        await ask(GuardMiddleware(app, stage.guard))

    (record,) = await stage.settled(calls=1)
    assert record.session == "s"


async def test_stream_that_is_passed_on(stage: Stage) -> None:
    """A stream inside a streamed response is settled before its end can be seen."""
    seen: list[int] = []
    async with hooked(stage, "httpx2 async") as client:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            async with client.client.stream("POST", "/chat/completions", json=asked(stream=True)) as response:
                async for chunk in response.aiter_bytes():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                seen.append(len(stage.settlements.seen))
            await send({"type": "http.response.body", "body": b""})

        await ask(GuardMiddleware(app, stage.guard, routes=[Route("/{rest:path}", dialect=None)]))

    assert seen == [1]
    await stage.settled(calls=1)


async def ask(app: Any, path: str = "/ask", **options: Any) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://service", headers=HEADERS) as client:
        return await client.post(path, **options)


# ----------------------------------------------------------------------------- await points


class SlowTransport:
    """Waits where a network does."""

    def __init__(self, library: Any) -> None:
        self.library = library

    async def handle_async_request(self, request: Any) -> Any:
        await Turn()
        async for _ in request.stream:
            await Turn()
        return self.library.Response(200, headers=STREAMED, content=self.parts())

    async def parts(self) -> AsyncIterator[bytes]:
        for start in range(0, len(STREAM), 150):
            await Turn()
            yield STREAM[start : start + 150]
        await Turn()

    async def aclose(self) -> None:
        await Turn()


async def whole_stream(stage: Stage, client: Any) -> None:
    async with stage.guard.open(CONTEXT):
        await client.post("/chat/completions", json=asked(stream=True))


async def part_of_a_stream(stage: Stage, client: Any) -> None:
    async with (
        stage.guard.open(CONTEXT),
        stage.guard.call(**stage.describe("text")),
        client.stream("POST", "/chat/completions", json=asked(stream=True)) as response,
    ):
        async for _ in response.aiter_raw():
            await Turn()
            break


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("job", [whole_stream, part_of_a_stream])
@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt])
async def test_every_await_point(library: str, job: Any, error: type[BaseException]) -> None:
    """Wherever a call is stopped, nothing is held afterwards, and every call is settled once."""
    clock = FrozenClock(1_800_000_000_000)
    storage = SlowMemory(clock=clock)
    stage = new_stage(storage, FakeProvider(prices=BILL), "http://llm/v1", clock)
    module = LIBRARIES[library]
    for late in (False, True):
        stop_at = 0
        while True:
            client = module.AsyncClient(
                transport=AsyncGuardTransport(stage.guard, SlowTransport(module)), base_url=stage.base_url
            )
            if not await drive(job(stage, client), stop_at, error, late=late):
                break
            for _ in range(20):  # generators that were left are closed by tasks
                await asyncio.sleep(0)
            await nothing_is_held(stage, f"stopped at point {stop_at}, late={late}")
            stop_at += 1
        assert stop_at > 8
    await stage.guard.aclose()
    await storage.aclose()


async def nothing_is_held(stage: Stage, when: str) -> None:
    assert await stage.storage.open_holds() == 0, when
    records = await stage.storage.records()
    iterations, nanousd, slots = await stage.counters()
    assert (len(records), slots) == (iterations, 0), when
    assert sum(record.cost_nanousd or 0 for record in records) == nanousd, when
    assert {event.settled.status for event in stage.settlements.seen} <= {"settled"}, when
    assert not stage.guard.open_admissions, when


# --------------------------------------------------------------------------------- clients


@pytest.mark.parametrize("library", LIBRARIES)
async def test_client_closes_its_pool(stage: Stage, library: Any) -> None:
    """The transport below is entered and closed with the client."""
    seen: list[str] = []

    class Recorded:
        async def handle_async_request(self, request: Any) -> Any:
            raise AssertionError

        async def aclose(self) -> None:
            seen.append("aclose")

        async def __aenter__(self) -> None:
            seen.append("enter")

        async def __aexit__(self, *exc_info: object) -> None:
            seen.append("exit")

    client = LIBRARIES[library].AsyncClient
    async with client(transport=AsyncGuardTransport(stage.guard, Recorded())):
        pass
    await client(transport=AsyncGuardTransport(stage.guard, Recorded())).aclose()
    assert seen == ["enter", "exit", "aclose"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_synchronous_client_closes_its_pool(library: Any) -> None:
    """As above, synchronous."""
    seen: list[str] = []

    class Recorded:
        def handle_request(self, request: Any) -> Any:
            raise AssertionError

        def close(self) -> None:
            seen.append("close")

        def __enter__(self) -> None:
            seen.append("enter")

        def __exit__(self, *exc_info: object) -> None:
            seen.append("exit")

    client = LIBRARIES[library].Client
    with client(transport=GuardTransport(Guard(), Recorded())):
        pass
    client(transport=GuardTransport(Guard(), Recorded())).close()
    assert seen == ["enter", "exit", "close"]


@pytest.mark.parametrize("library", LIBRARIES)
async def test_client_of_the_guard(stage: Stage, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of the guard takes what its library's takes; proxies of the environment count, and are guarded too."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "local")
    stage.guard.hooked = False
    module = LIBRARIES[library]
    async with stage.guard.httpx_client(library=library, headers={"x-of-ours": "1"}) as client:
        assert type(client) is module.AsyncClient
        assert (client.headers["x-of-ours"], client.follow_redirects) == ("1", True)
        assert (client.timeout.read, client.timeout.connect) == (600, 5)
        for url in ("https://api.openai.com", "http://api.openai.com", "https://local"):
            assert isinstance(client._transport_for_url(module.URL(url)), AsyncGuardTransport)
        proxied = client._transport_for_url(module.URL("https://api.openai.com"))
        assert proxied is not client._transport
    assert stage.guard.hooked
    with stage.guard.httpx_client_sync(library=library, timeout=3, http2=False, follow_redirects=False) as sync:
        assert type(sync) is module.Client
        assert (sync.timeout.read, sync.follow_redirects) == (3, False)
        assert isinstance(sync._transport, GuardTransport)


ALIASED = """
import asyncio, httpx2
httpx2.alias_httpx()
import httpx
from asgi_llm_guard import Context, Guard
from asgi_llm_guard.httpx import AsyncGuardTransport

async def main():
    guard = Guard()
    mock = httpx2.MockTransport(lambda request: httpx2.Response(200, json={"usage": {}}))
    for client in (
        httpx.AsyncClient(transport=AsyncGuardTransport(guard, mock, context=Context(caller="a"))),
        httpx2.AsyncClient(transport=AsyncGuardTransport(guard, mock)),
        guard.httpx_client(library="httpx"),
    ):
        body = {"model": "gpt-4o-mini", "max_tokens": 5, "messages": []}
        response = await client.post("http://nowhere.invalid/v1/chat/completions", json=body)
        assert type(response) is httpx2.Response, type(response)
        print(response.status_code)

asyncio.run(main())
"""


def test_alias() -> None:
    """Where `import httpx` gives httpx2, responses are of the class that the client expects."""
    run = subprocess.run([sys.executable, "-c", ALIASED], capture_output=True, text=True, check=True, timeout=60)

    assert run.stdout.split() == ["200", "400", "400"]
