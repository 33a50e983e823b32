"""Requests to deployments over HTTP: answers as they are, and what is no answer told apart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import Any, cast

import httpx2
import pytest
import trustme
from tests.ports import free_port

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.deployment import Deployment, Timeouts
from asgi_llm_guard.gateway.errors import CannotExpress
from asgi_llm_guard.gateway.providers.base import ModelRequest, TransportFailed, Upstream, read_whole
from asgi_llm_guard.gateway.providers.http import HttpProvider
from asgi_llm_guard.gateway.providers.registry import Providers
from asgi_llm_guard.testing import Behaviour, FakeProvider, Rerouted
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Answer, Head

pytestmark = pytest.mark.anyio

CANARY = "sk-canary-5f3a9c"
MESSAGES = [{"role": "user", "content": "say hello to everybody"}]
CHAT: dict[str, object] = {"messages": MESSAGES, "max_tokens": 50}
# What to ask in each dialect, and where.
ASKED: dict[str, tuple[str, dict[str, object]]] = {
    "openai": ("openai", CHAT),
    "anthropic": ("anthropic", CHAT),
    "openai_responses": ("openai", {"input": "say hello to everybody"}),
    "openai_embeddings": ("openai", {"input": "say hello to everybody"}),
    "openai_completions": ("openai", {"prompt": "say hello to everybody", "max_tokens": 50}),
}
STREAMED = [name for name in ASKED if name != "openai_embeddings"]


@contextlib.asynccontextmanager
async def http(**options: Any) -> AsyncIterator[HttpProvider]:
    """A provider that is closed at the end."""
    provider = HttpProvider(**options)
    try:
        yield provider
    finally:
        await provider.aclose()


@contextlib.asynccontextmanager
async def inside(fake: FakeProvider) -> AsyncIterator[tuple[str, HttpProvider]]:
    """The fake provider without a socket: its answers arrive whole."""
    async with http(transport=lambda: httpx2.ASGITransport(app=fake)) as provider:
        yield "http://fake.example/v1", provider


def at(base_url: str, provider: str = "openai", **fields: Any) -> Deployment:
    root = base_url.removesuffix("/v1") if provider == "anthropic" else base_url
    return Deployment(
        **{"provider": provider, "model": "m", "api_key": CANARY, "api_base": root, "name": "d", **fields}
    )


def metered(upstream: Upstream, pieces: list[bytes]) -> Answer:
    """What the dialect that an answer names reads in it."""
    meter = dialect_named(upstream.dialect).meter(Head(upstream.status, upstream.headers, upstream.path))
    for piece in pieces:
        meter.feed(piece)
    meter.finish()
    return meter.answer()


async def failed(provider: HttpProvider, deployment: Deployment, **fields: Any) -> TransportFailed:
    """How a request fails, if it does."""
    request = ModelRequest(**{"dialect": "openai", "body": CHAT, **fields})
    with pytest.raises(TransportFailed) as raised:
        await read_whole(await provider.send(deployment, request))
    return raised.value


# ------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("dialect", ASKED)
async def test_whole_answers(dialect: str) -> None:
    """Every dialect: the answer arrives as it is, and what it used is what was billed."""
    provider, body = ASKED[dialect]
    fake = FakeProvider()
    async with inside(fake) as (url, carrier):
        upstream = await carrier.send(at(url, provider), ModelRequest(dialect=dialect, body=body))
        content = await read_whole(upstream)

    answer = metered(upstream, [content])
    assert (upstream.status, upstream.dialect) == (200, dialect)
    assert answer.usage is not None
    assert answer.usage.total_tokens == fake.bill[0].usage.total_tokens
    assert fake.requests[0].model == "m"


@pytest.mark.parametrize("dialect", STREAMED)
@pytest.mark.parametrize("zipped", [False, True])
async def test_streams(dialect: str, zipped: bool) -> None:
    """Every dialect that streams: chunk by chunk, gzip undone, and with its usage, asked for or not."""
    provider, body = ASKED[dialect]
    fake = FakeProvider(default=Behaviour().zipped() if zipped else Behaviour())
    async with fake.serve() as url, http() as carrier:
        upstream = await carrier.send(at(url, provider), ModelRequest(dialect=dialect, body=body, stream=True))
        pieces = [piece async for piece in upstream]

    answer = metered(upstream, pieces)
    assert fake.requests[0].stream
    assert answer.finished
    assert answer.usage is not None
    assert answer.usage.total_tokens == fake.bill[0].usage.total_tokens
    assert not {name for name, _ in upstream.headers} & {b"content-encoding", b"content-length", b"set-cookie"}


async def test_bodies_are_the_clients_but_for_the_model() -> None:
    """A body is sent as it is; the model is the deployment's, and `stream` what is asked for."""
    fake = FakeProvider()
    body = {**CHAT, "model": "openai/expensive", "stream": True, "temperature": 0.5, "x_field": {"a": [1, None]}}
    del body["max_tokens"]
    async with inside(fake) as (url, carrier):
        await read_whole(await carrier.send(at(url), ModelRequest(dialect="openai", body=body)))

    assert fake.requests[0].body == {
        "messages": MESSAGES,
        "model": "m",
        "temperature": 0.5,
        "x_field": {"a": [1, None]},
    }


@pytest.mark.parametrize(
    ("provider", "given", "sent"),
    [
        ("openai", {"max_tokens": 5}, {"max_completion_tokens": 5}),
        ("openai", {"max_tokens": 5, "max_completion_tokens": 9}, {"max_completion_tokens": 9}),
        ("mistral", {"max_completion_tokens": 5}, {"max_tokens": 5}),
        ("groq", {"max_tokens": 5}, {"max_tokens": 5}),
        ("openai", {}, {"max_completion_tokens": 7, "temperature": 0.1}),
        ("groq", {"max_completion_tokens": 5, "temperature": 1}, {"max_completion_tokens": 5, "temperature": 1}),
    ],
)
async def test_limits_have_the_providers_name(provider: str, given: dict[str, Any], sent: dict[str, Any]) -> None:
    """The bound of an answer arrives under the name that the provider knows; a default gives way to the request's."""
    fake = FakeProvider()
    params = {"max_tokens": 7, "temperature": 0.1}
    async with inside(fake) as (url, carrier):
        made = at(url, provider, params=params if "temperature" in sent else {})
        await read_whole(await carrier.send(made, ModelRequest(dialect="openai", body={"messages": MESSAGES, **given})))

    assert {key: value for key, value in fake.requests[0].body.items() if key not in ("messages", "model")} == sent


async def test_defaults_fit_the_dialect() -> None:
    """A default bound is said as each API says it, and not at all to embeddings."""
    fake = FakeProvider()
    async with inside(fake) as (url, carrier):
        made = at(url, params={"max_tokens": 7})
        for dialect in ("openai_responses", "openai_embeddings", "openai_completions"):
            body = {name: value for name, value in ASKED[dialect][1].items() if name != "max_tokens"}
            await read_whole(await carrier.send(made, ModelRequest(dialect=dialect, body=body)))

    bounds = [{key: value for key, value in each.body.items() if "max" in key} for each in fake.requests]
    assert bounds == [{"max_output_tokens": 7}, {}, {"max_tokens": 7}]


@pytest.mark.parametrize(("provider", "asked"), [("groq", True), ("mistral", False)])
async def test_streams_are_asked_for_usage(provider: str, asked: bool) -> None:
    """Streams are asked what they used, where the provider knows the option; Mistral says it unasked."""
    fake = FakeProvider(platform="mistral" if provider == "mistral" else "openai")
    body = {**CHAT, "stream_options": {"x": 1}}
    async with inside(fake) as (url, carrier):
        upstream = await carrier.send(at(url, provider), ModelRequest(dialect="openai", body=body, stream=True))
        pieces = [piece async for piece in upstream]

    assert fake.requests[0].body.get("stream_options") == ({"x": 1, "include_usage": True} if asked else None)
    assert upstream.dialect == ("openai" if asked else "mistral")
    assert metered(upstream, pieces).usage is not None


async def test_requests_are_sent_on_in_part() -> None:
    """Of a request's headers only those that say nothing of the client are sent on; those of the deployment always."""
    fake = FakeProvider()
    headers = [(b"Idempotency-Key", b"k1"), (b"TraceParent", b"00-1"), (b"cookie", b"c"), (b"x-forwarded-for", b"1")]
    async with inside(fake) as (url, carrier):
        made = at(url, headers={"X-Team": "blue"})
        await read_whole(await carrier.send(made, ModelRequest(dialect="openai", body=CHAT, headers=headers)))

    got = fake.requests[0].headers
    assert (got["idempotency-key"], got["traceparent"], got["x-team"]) == ("k1", "00-1", "blue")
    assert not got.keys() & {"cookie", "x-forwarded-for"}


async def test_bodies_that_cannot_be_written() -> None:
    """What is no JSON is refused as the request's fault, before anything is sent."""
    fake = FakeProvider()
    async with inside(fake) as (url, carrier):
        for value in (object(), "\ud800"):
            with pytest.raises(CannotExpress, match="cannot be written as JSON"):
                await carrier.send(at(url), ModelRequest(dialect="openai", body={**CHAT, "user": value}))

    assert fake.calls == 0


@pytest.mark.parametrize(
    ("provider", "asked", "taken"),
    [
        ("openai", "openai", "openai"),
        ("openai", "anthropic", "openai"),
        ("anthropic", "openai", "anthropic"),
        ("anthropic", "anthropic", "anthropic"),
        ("anthropic", "openai_embeddings", None),
        ("groq", "openai_responses", "openai_responses"),
        ("deepseek", "openai_responses", None),
        ("voyage", "openai", None),
    ],
)
def test_dialects(provider: str, asked: str, taken: str | None) -> None:
    """A request is sent in its own dialect if that is taken, else in the one that it can be translated to."""
    assert HttpProvider().dialect(at("https://host.example/v1", provider), asked) == taken


# ---------------------------------------------------------------------------- error answers


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 500, 503, 529])
async def test_errors_are_answers(provider: str, status: int) -> None:
    """Every status is an answer, with its body and its Retry-After; nothing is repeated."""
    fake = FakeProvider(default=Behaviour.error(status, message="no", retry_after=7))
    async with inside(fake) as (url, carrier):
        upstream = await carrier.send(at(url, provider), ModelRequest(dialect=provider, body=CHAT))
        content = await read_whole(upstream)

    assert upstream.status == status
    assert (b"retry-after", b"7") in [*upstream.headers]
    assert json.loads(content)["error"]["message"] == "no"
    assert fake.calls == 1


async def test_redirects_are_answers() -> None:
    """T14: a redirect is not followed: it would take the key to another host."""
    hosts: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        hosts.append(request.url.host)
        return httpx2.Response(307, headers={"location": "https://elsewhere.example/"})

    async with http(transport=lambda: httpx2.MockTransport(answer)) as carrier:
        upstream = await carrier.send(at("https://host.example/v1"), ModelRequest(dialect="openai", body=CHAT))
        await upstream.aclose()

    assert (upstream.status, hosts) == (307, ["host.example"])


async def test_keys_that_errors_repeat() -> None:
    """T15: a provider that repeats the key in its error is not repeated."""
    fake = FakeProvider(default=Behaviour.error(401, message=f"Incorrect API key: {CANARY}.").zipped())
    async with inside(fake) as (url, carrier):
        content = await read_whole(await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT)))

    assert json.loads(content)["error"]["message"] == "Incorrect API key: ***."


async def test_endless_errors_end() -> None:
    """An error's body is read up to a bound, where it does not end with the half of a key."""
    fake = FakeProvider(default=Behaviour.error(500, message=CANARY * 100_000))
    async with inside(fake) as (url, carrier):
        content = await read_whole(await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT)))

    assert 100_000 < len(content) < 1_000_000
    assert b"sk-" not in content


async def test_malformed_bodies_are_passed_on() -> None:
    """Broken JSON is the answer's, and read by whoever asked."""
    fake = FakeProvider(default=Behaviour.malformed())
    async with inside(fake) as (url, carrier):
        content = await read_whole(await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT)))

    with pytest.raises(ValueError):
        json.loads(content)


# ------------------------------------------------------------------------------ no answers


async def test_nobody_listens() -> None:
    """A connection that is refused was surely not a request."""
    async with http() as carrier:
        error = await failed(carrier, at(f"http://127.0.0.1:{free_port()}/v1"))

    assert (error.kind, error.sent, error.deployment, error.status) == ("connect", False, "d", 502)


async def test_no_such_host() -> None:
    """Neither was one to a host that does not exist; the message names the host."""
    async with http() as carrier:
        error = await failed(carrier, at("http://nowhere.invalid/v1"))

    assert (error.kind, error.sent) == ("connect", False)
    assert "nowhere.invalid: no such host" in str(error)


async def test_certificates_that_nobody_trusts() -> None:
    """A certificate of an unknown authority ends before the key is sent; the message says what is wrong with it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert("localhost").configure_cert(context)
    async with listening(silent, tls=context) as port, http() as carrier:
        error = await failed(carrier, at(f"https://localhost:{port}/v1"))

    assert (error.kind, error.sent) == ("tls", False)
    assert "certificate" in str(error)


async def test_servers_without_tls() -> None:
    """A server that does not speak TLS is told as that."""
    async with FakeProvider().serve() as url, http() as carrier:
        error = await failed(carrier, at(url.replace("http://", "https://")))

    assert (error.kind, error.sent) == ("tls", False)


async def test_trusted_authorities() -> None:
    """`verify` says whose certificates are trusted."""
    context, trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority = trustme.CA()
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(trusted)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")

    async with listening(answer, tls=context) as port, http(verify=trusted) as carrier:
        upstream = await carrier.send(at(f"https://localhost:{port}/v1"), ModelRequest(dialect="openai", body=CHAT))
        assert await read_whole(upstream) == b"{}"


@pytest.mark.parametrize("times", [Timeouts(read_s=0.1), Timeouts(total_s=1.0)])
@pytest.mark.parametrize("per_request", [False, True])
async def test_no_byte_in_time(times: Timeouts, per_request: bool) -> None:
    """A request whose answer does not begin in time was sent; the connection is given up."""
    left = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the other side goes away
        left.set()

    async with listening(hang) as port, http() as carrier:
        url = f"http://localhost:{port}/v1"
        if per_request:
            error = await failed(carrier, at(url), timeouts=times)
        else:
            error = await failed(carrier, at(url, timeouts=times))
        async with asyncio.timeout(60):
            await left.wait()

    assert (error.kind, error.sent, error.status) == ("timeout", True, 504)


@pytest.mark.parametrize("times", [Timeouts(read_s=1.0), Timeouts(total_s=2.0)])
async def test_no_next_byte_in_time(times: Timeouts) -> None:
    """After the first byte as well: what came is given, then the failure."""
    fake = FakeProvider(default=Behaviour.slow())
    fake.release(1)
    pieces: list[bytes] = []
    async with fake.serve() as url, http() as carrier:
        request = ModelRequest(dialect="openai", body=CHAT, stream=True)
        upstream = await carrier.send(at(url, timeouts=times), request)
        with pytest.raises(TransportFailed) as raised:
            async for piece in upstream:
                pieces.append(piece)
        await fake.until(lambda: fake.disconnects == 1)

    assert (raised.value.kind, raised.value.sent) == ("timeout", True)
    assert b"Echo:" in b"".join(pieces)


@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_streams_that_break_off(chunks: int) -> None:
    """A stream that is cut gives what came before, and never an end that looks like its own."""
    fake = FakeProvider(default=Behaviour.cut(after_chunks=chunks))
    pieces: list[bytes] = []
    async with fake.serve() as url, http() as carrier:
        upstream = await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT, stream=True))
        with pytest.raises(TransportFailed) as raised:
            async for piece in upstream:
                pieces.append(piece)

    assert (raised.value.kind, raised.value.sent) == ("cut", True)
    assert not metered(upstream, pieces).finished


async def test_whole_answers_that_break_off() -> None:
    """A JSON body that is cut is no answer."""
    fake = FakeProvider(default=Behaviour.cut())
    async with fake.serve() as url, http() as carrier:
        error = await failed(carrier, at(url))

    assert (error.kind, error.sent) == ("cut", True)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take what comes, and leave without a word."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"}")


@contextlib.asynccontextmanager
async def listening(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that answers with bytes; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "localhost", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"", "cut"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort", "cut"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 5\r\n\r\nplain", "malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: rot13\r\ncontent-length: 5\r\n\r\nplain", "malformed"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "malformed"),
    ],
)
async def test_what_is_no_answer(said: bytes, kind: str) -> None:
    """A server that leaves, or says what is no HTTP, may have done the work; the message shows nothing that it said."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(said)
        await writer.drain()

    async with listening(answer) as port, http() as carrier:
        error = await failed(carrier, at(f"http://localhost:{port}/v1"))

    assert (error.kind, error.sent) == (kind, True)
    assert "SSH" not in str(error)


async def test_failures_do_not_show_keys() -> None:
    """T15: neither a failure nor what it came from has the key or the prompt in it."""

    def fails(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.LocalProtocolError(
            f"illegal header value {request.headers['authorization']!r} {request.content!r}"
        )

    async with http(transport=lambda: httpx2.MockTransport(fails)) as carrier:
        error = await failed(carrier, at("https://host.example/v1"))

    assert (error.kind, error.sent) == ("connect", False)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert CANARY not in "".join(traceback.format_exception(error))


async def test_logs_do_not_show_keys(caplog: pytest.LogCaptureFixture) -> None:
    """T15: not even with every logger at its loudest is there a key or a prompt in the log."""
    fake = FakeProvider()
    fake.script(Behaviour(), Behaviour.error(401, message=f"wrong: {CANARY}"), Behaviour.cut())
    with caplog.at_level(logging.DEBUG):
        async with fake.serve() as url, http() as carrier:
            for _ in range(3):
                with contextlib.suppress(TransportFailed):
                    await read_whole(await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT)))

    assert fake.calls == 3
    assert CANARY not in caplog.text
    assert "everybody" not in caplog.text


# ------------------------------------------------------------------------------ connections


async def test_clients_that_leave() -> None:
    """When nobody reads a stream any more, the provider's connection is closed, and it bills what it had made."""
    fake = FakeProvider(default=Behaviour.slow())
    fake.release(2)
    async with fake.serve() as url, http() as carrier:
        upstream = await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT, stream=True))
        pieces = aiter(upstream)
        await anext(pieces)
        await upstream.aclose()
        await fake.until(lambda: fake.disconnects == 1)
        await upstream.aclose()

    assert fake.attempts[0].left


class Watched(httpx2.AsyncByteStream):
    """A body that never ends, and knows whether it was closed."""

    closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_readers_that_stop(encoding: str) -> None:
    """Whoever stops reading in the middle closes the connection, as does a body that cannot be decoded."""
    body = Watched()
    answer = httpx2.Response(200, headers={"content-encoding": encoding}, stream=body)
    async with http(transport=lambda: httpx2.MockTransport(lambda _: answer)) as carrier:
        upstream = await carrier.send(at("http://host.example"), ModelRequest(dialect="openai", body=CHAT, stream=True))
        with contextlib.suppress(TransportFailed):
            async with contextlib.aclosing(cast("AsyncGenerator[bytes]", aiter(upstream))) as pieces:
                await anext(pieces)

    assert body.closed


async def test_proxies() -> None:
    """Through a proxy the provider's host is asked for, and not looked up here."""
    lines: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with listening(answer) as port, http(proxy=f"http://localhost:{port}") as carrier:
        request = ModelRequest(dialect="openai", body=CHAT)
        assert await read_whole(await carrier.send(at("http://nowhere.invalid/v1"), request)) == b"{}"

    assert lines == [b"POST http://nowhere.invalid/v1/chat/completions HTTP/1.1\r\n"]


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelled_requests(stream: bool) -> None:
    """A request that is cancelled before its answer closes its connection."""
    fake = FakeProvider(default=Behaviour.hang())
    async with fake.serve() as url, http() as carrier:
        request = ModelRequest(dialect="openai", body=CHAT, stream=stream)
        running = asyncio.create_task(carrier.send(at(url), request))
        await fake.until(lambda: fake.open == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await fake.until(lambda: fake.disconnects == 1)


async def test_cancelled_readers() -> None:
    """A reader that is cancelled between two chunks closes the connection."""
    fake = FakeProvider(default=Behaviour.slow())
    fake.release(1)
    async with fake.serve() as url, http() as carrier:

        async def read() -> None:
            upstream = await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT, stream=True))
            await read_whole(upstream)

        running = asyncio.create_task(read())
        await fake.until(lambda: fake.open == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await fake.until(lambda: fake.disconnects == 1)


async def test_connections_are_used_again() -> None:
    """Deployments of one host share its connections, one after the other."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with listening(answer) as port:
        async with http() as carrier:
            for name in ("first", "second", "first"):
                made = at(f"http://localhost:{port}/v1", name=name)
                await read_whole(await carrier.send(made, ModelRequest(dialect="openai", body=CHAT)))
        assert connections == 1


def test_event_loops_have_their_own_connections() -> None:
    """One provider serves several event loops, one after the other."""
    fake, carrier = FakeProvider(), HttpProvider()

    async def ask(url: str) -> None:
        await read_whole(await carrier.send(at(url), ModelRequest(dialect="openai", body=CHAT)))
        await carrier.aclose()

    with fake.serve() as url:
        for _ in range(2):
            asyncio.run(ask(url))

    assert fake.calls == 2


async def test_one_deployment_for_two_models() -> None:
    """A deployment that serves every model is asked for the one of the request."""
    fake = FakeProvider()
    async with inside(fake) as (url, carrier):
        anything = at(url, model="*")
        for model in ("one", "two"):
            made = replace(anything, model=model)
            await read_whole(await carrier.send(made, ModelRequest(dialect="openai", body=CHAT)))

    assert [request.model for request in fake.requests] == ["one", "two"]


async def test_real_hosts() -> None:
    """With its real host names, each provider answers in its own words, and is read in them."""
    fake = FakeProvider()
    async with fake.serve() as url:
        factory = lambda: Rerouted(httpx2.AsyncHTTPTransport(), url)  # noqa: E731 - made for each host
        async with http(transport=factory) as carrier:
            for provider in ("openai", "mistral", "groq", "openrouter", "anthropic", "gemini", "bedrock", "azure"):
                address = "https://x.openai.azure.com" if provider == "azure" else None
                options = {"region": "eu-central-1", "api_version": "2026-01-01"}
                made = Deployment(provider=provider, model="m", api_key="any", api_base=address, options=options)
                dialect = made.platform.dialects[0]
                upstream = await carrier.send(made, ModelRequest(dialect=dialect, body=CHAT, stream=True))
                pieces = [piece async for piece in upstream]
                answer = metered(upstream, pieces)
                assert answer.finished, provider
                assert answer.usage is not None, provider
                assert answer.usage.output_tokens == fake.bill[-1].usage.output_tokens, provider


# --------------------------------------------------------------------------------- registry


class Own:
    """A provider of one's own: it answers by itself."""

    def __init__(self) -> None:
        self.closed = False

    def dialect(self, deployment: Deployment, asked: str) -> str | None:
        return "openai" if asked == "openai" else None

    async def send(self, deployment: Deployment, request: ModelRequest) -> Upstream:
        async def answer(request: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, content=b"{}")

        carrier = HttpProvider(transport=lambda: httpx2.MockTransport(answer))
        return await carrier.send(at("https://host.example"), request)

    async def aclose(self) -> None:
        self.closed = True


async def test_providers_of_ones_own() -> None:
    """Whoever is registered carries the requests of the deployments that name it, and is closed with the others."""
    own = Own()
    providers = Providers({"acme": own})
    made = Deployment(provider="acme", model="m", via="acme", environ={})

    assert providers.of(made) is own
    assert isinstance(providers.of(at("http://127.0.0.1/v1")), HttpProvider)
    assert providers.of(at("http://127.0.0.1/v1")) is providers.of(at("http://127.0.0.2/v1"))
    assert providers.names == ("acme", "http")
    upstream = await providers.of(made).send(made, ModelRequest(dialect="openai", body=CHAT))
    assert await read_whole(upstream) == b"{}"
    await providers.aclose()
    assert own.closed


def test_nobody_is_registered() -> None:
    """A deployment that names nobody who is known is a configuration error."""
    made = Deployment(provider="acme", model="m", via="acme", environ={})

    with pytest.raises(ConfigurationError, match="via='acme' is no provider"):
        Providers().of(made)
    with pytest.raises(ConfigurationError, match="expected a name"):
        Providers({"": Own()})


async def test_answers_that_are_too_long() -> None:
    """A whole answer is read up to a bound."""
    fake = FakeProvider(default=Behaviour.big(100_000))
    async with inside(fake) as (url, carrier):
        upstream = await carrier.send(at(url), ModelRequest(dialect="openai", body={"messages": MESSAGES}))
        with pytest.raises(TransportFailed, match="longer than 1000 bytes"):
            await read_whole(upstream, most=1000)
