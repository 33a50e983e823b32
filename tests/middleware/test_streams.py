"""Streams of guarded routes: cut, timed and read on, as the client and the application see it. Time is virtual."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as Path_
from tests.denials.virtual import run

from asgi_llm_guard import Budget, Concurrency, Guard, GuardMiddleware, Route
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.pricing import PriceBook
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.streams import SURE_BYTES, StreamRules
from asgi_llm_guard.usage import UsageRecord

PATH = "/v1/chat/completions"
PRICES = PriceBook.snapshot(overrides={"openai/gpt-test": {"input": 1, "output": 2}})
READ = StreamRules(drain="read", total_s=600)

Source = Callable[["Server"], AsyncIterator[bytes]]


def event(text: str = "", **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice], **more}).encode() + b"\n\n"


def usage(output_tokens: int) -> bytes:
    return event(usage={"prompt_tokens": 10, "completion_tokens": output_tokens, "total_tokens": 10 + output_tokens})


class Server:
    """Plays the server and the client for one request: the client may leave, or stop reading."""

    def __init__(
        self, *, spec: str = "2.4", leave_after: int | None = None, reads: bool = True, stream: bool = True
    ) -> None:
        self.body = {"model": "gpt-test", "messages": [], "stream": stream}
        self.spec = spec
        self.leave_after = leave_after
        self.reads = reads
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.upstream: list[str] = []
        """What happened to the provider's stream."""
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.left.is_set():
            if self.spec == "2.4":
                raise OSError("the client has left")
            return
        self.sent.append(dict(message))
        parts = [each for each in self.sent if each["type"] == "http.response.body"]
        if self.leave_after is not None and len(parts) >= self.leave_after:
            self.left.set()
        if not self.reads and parts:
            await asyncio.Event().wait()

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def over(self) -> bool:
        return self.sent[-1]["type"] == "http.response.body" and not self.sent[-1].get("more_body", False)

    @property
    def events(self) -> list[Any]:
        return [
            json.loads(each.removeprefix(b"data: ")) for each in self.text.split(b"\n\n") if each.startswith(b"data: {")
        ]


def application(source: Source, server: Server, media_type: str) -> Starlette:
    async def watched() -> AsyncIterator[bytes]:
        ending = "closed"
        try:
            async for chunk in source(server):
                yield chunk
            ending = "read"
        finally:
            server.upstream.append(ending)

    async def endpoint(request: Request) -> Response:
        await request.body()
        return StreamingResponse(watched(), media_type=media_type)

    return Starlette(routes=[Path_(PATH, endpoint, methods=["POST"]), Path_("/other", endpoint, methods=["POST"])])


async def serve(
    source: Source,
    rules: StreamRules | None,
    *policies: Any,
    server: Server | None = None,
    path: str = PATH,
    routes: Sequence[Route] | None = None,
    raises: bool = False,
    **options: Any,
) -> tuple[Server, UsageRecord | None]:
    """Serve one streamed answer; gives what the client got, and the record. Nothing is held afterwards."""
    server = server or Server()
    guard = Guard(
        policies or (Budget("$1/1d"), Concurrency(1)),
        storage=MemoryStorage(),
        prices=PRICES,
        hold_wait_s=0,
        streams=rules,
        **options,
    )
    app = GuardMiddleware(
        application(source, server, "text/event-stream" if server.body["stream"] else "application/json"),
        guard,
        routes=routes or [Route(PATH), Route("/other")],
    )
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": server.spec},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    with contextlib.nullcontext() if raises else contextlib.suppress(ClientDisconnect):
        await app(scope, server.receive, server.send)
    gc.collect()
    for _ in range(100):  # a generator that was left is closed in turns of its own, and tells nobody
        await asyncio.sleep(0)
    assert await guard.storage.open_holds() == 0
    records = await guard.storage.records()
    await guard.aclose()
    return server, records[0] if records else None


async def words(server: Server) -> AsyncIterator[bytes]:
    for _ in range(50):
        yield event("x" * 100)
    yield usage(77)


async def silent(server: Server) -> AsyncIterator[bytes]:
    yield event("x")
    await asyncio.Event().wait()


async def slow(server: Server) -> AsyncIterator[bytes]:
    for _ in range(100):
        await asyncio.sleep(3)
        yield event("word")
    yield usage(100)


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_cut_stream_ends_with_an_event(spec: str) -> None:
    """T18: a stream that has used up its hold ends for the client with an error event; the application sees it leave."""

    async def check() -> None:
        rules = StreamRules(cut=True)
        budget = Budget("$0.0003/1d")
        made = await serve(words, rules, budget, server=Server(spec=spec), assumed_output_tokens=50)
        server, record = made
        assert server.over
        assert server.events[-1]["error"]["code"] in ("budget_exhausted", "request_exceeds_budget")
        assert all("choices" in each for each in server.events[:-1])
        assert server.upstream == ["closed"]
        assert record is not None
        assert (record.outcome, record.cost_nanousd) == ("estimated", record.estimate_nanousd)
        assert record.estimate_nanousd is not None
        assert 0.00029e9 < record.estimate_nanousd <= 0.0003e9
        assert record.usage is not None
        tokens = record.usage.output_tokens or 0
        assert (len(server.events) - 1) * 100 >= tokens * SURE_BYTES > (len(server.events) - 2) * 100

    run(check())


def test_cut_stream_is_read_to_its_end_where_asked_for() -> None:
    """T18: with `drain="read"` the client of a cut stream has its end at once, and the call is charged what it used."""

    async def check() -> None:
        rules = StreamRules(cut=True, drain="read", total_s=60)
        server, record = await serve(words, rules, Budget("$0.0003/1d"), assumed_output_tokens=50)
        assert server.over
        assert "error" in server.events[-1]
        assert server.upstream == ["read"]
        assert record is not None
        assert record.usage is not None
        assert (record.outcome, record.usage.output_tokens) == ("measured", 77)

    run(check())


def test_uncut_stream_passes_whole() -> None:
    """Without rules a stream that is longer than what can be held passes to its end, and is charged what it used."""

    async def check() -> None:
        server, record = await serve(words, None, Budget("$0.0003/1d"), assumed_output_tokens=50)
        assert server.text == b"".join([event("x" * 100)] * 50 + [usage(77)])
        assert record is not None
        assert record.outcome == "measured"

    run(check())


def test_silent_stream_ends_at_its_deadline() -> None:
    """T18: a provider from which nothing comes is left after `idle_s`; the client is told, the slot is free."""

    async def check() -> None:
        server, record = await serve(silent, StreamRules(idle_s=20))
        assert server.events[-1]["error"]["code"] == "stream_timeout"
        assert server.over
        assert server.upstream == ["closed"]
        assert record is not None
        assert record.outcome == "estimated"

    _, slept = run(check())
    assert slept == pytest.approx(20, abs=0.5)


def test_slow_stream_that_sends_is_not_idle() -> None:
    """T18: a slow stream goes on for as long as it sends within `idle_s`."""

    async def check() -> None:
        server, record = await serve(slow, StreamRules(idle_s=5))
        assert server.upstream == ["read"]
        assert record is not None
        assert record.outcome == "measured"

    _, slept = run(check())
    assert slept == pytest.approx(300, abs=1)


def test_long_stream_ends_at_its_deadline() -> None:
    """T18: a stream that lasts longer than `total_s` is ended, however often it sends."""

    async def check() -> None:
        server, record = await serve(slow, StreamRules(total_s=31))
        assert server.events[-1]["error"]["code"] == "stream_timeout"
        assert "lasted 31 seconds" in server.events[-1]["error"]["message"]
        assert len(server.events) == 11
        assert record is not None
        assert record.outcome == "estimated"

    _, slept = run(check())
    assert slept == pytest.approx(31, abs=0.5)


def test_client_that_does_not_read_is_left() -> None:
    """T18: a client that stops reading holds its slot and its stream until the deadline, no longer."""

    async def check() -> None:
        server, _ = await serve(words, StreamRules(total_s=30), server=Server(reads=False))
        assert server.upstream == ["closed"]

    _, slept = run(check())
    assert 30 <= slept <= 32


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_client_leaves_and_the_stream_is_read_on(spec: str) -> None:
    """T18: with `drain="read"` a client that leaves after chunk 5 does not end the stream: its bill is known exactly."""

    async def check() -> None:
        server, record = await serve(slow, READ, server=Server(spec=spec, leave_after=5))
        assert server.upstream == ["read"]
        assert len(server.events) == 5
        assert record is not None
        assert record.usage is not None
        assert (record.outcome, record.usage.output_tokens) == ("measured", 100)

    run(check())


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
def test_client_leaves_and_the_stream_is_closed(spec: str) -> None:
    """T18: by default a client that leaves after chunk 5 ends the provider's stream, which is charged by its text."""

    async def check() -> None:
        server, record = await serve(slow, StreamRules(total_s=600), server=Server(spec=spec, leave_after=5))
        assert server.upstream == ["closed"]
        assert record is not None
        assert record.outcome == "estimated"
        assert record.usage is not None
        assert record.usage.output_tokens in (20, 24)  # as told to the application, with the next chunk or before

    run(check())


def test_reading_on_ends_at_the_deadline() -> None:
    """T18: a stream that nobody waits for is read until `total_s`, and then charged by its text."""

    async def check() -> None:
        server, record = await serve(silent, StreamRules(drain="read", total_s=40), server=Server(leave_after=1))
        assert server.upstream == ["closed"]
        assert record is not None
        assert record.outcome == "estimated"

    _, slept = run(check())
    assert slept == pytest.approx(40, abs=0.5)


def test_deadlines_hold_without_a_dialect() -> None:
    """A stream whose dialect is not known has its deadlines, and ends without an event."""

    async def check() -> None:
        server, _ = await serve(silent, StreamRules(idle_s=20), path="/other")
        assert server.text == event("x")
        assert server.over

    _, slept = run(check())
    assert slept == pytest.approx(20, abs=0.5)


def test_routes_have_rules_of_their_own() -> None:
    """A route's rules stand in place of the guard's."""

    async def check() -> None:
        routes = [Route(PATH, streams=StreamRules(total_s=7))]
        server, _ = await serve(slow, StreamRules(total_s=100), routes=routes)
        assert "lasted 7 seconds" in server.events[-1]["error"]["message"]

    run(check())


def test_timeouts_of_the_application_are_its_own() -> None:
    """A timeout that the application runs into is not taken for a deadline."""

    async def failing(server: Server) -> AsyncIterator[bytes]:
        yield event("x")
        raise TimeoutError("own")

    async def check() -> None:
        with pytest.raises(ClientDisconnect):  # which Starlette makes of it
            await serve(failing, StreamRules(total_s=600), raises=True)

    run(check())


@pytest.mark.parametrize("rules", [None, StreamRules(total_s=60)])
def test_answers_that_are_no_streams_have_no_deadline(rules: StreamRules | None) -> None:
    """What the client did not ask to be streamed is passed on as before, however long it takes."""

    async def late(server: Server) -> AsyncIterator[bytes]:
        await asyncio.sleep(100)
        yield json.dumps({"object": "chat.completion", "model": "gpt-test", "choices": [], "usage": USAGE}).encode()

    async def check() -> None:
        server, record = await serve(late, rules, server=Server(stream=False))
        assert server.over
        assert record is not None
        assert record.outcome == "measured"

    run(check())


USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def test_rules_are_rules() -> None:
    """Anything else in their place is refused at construction."""
    with pytest.raises(ConfigurationError, match="StreamRules"):
        Route(PATH, streams=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="StreamRules"):
        Guard(streams="cut")  # type: ignore[arg-type]
