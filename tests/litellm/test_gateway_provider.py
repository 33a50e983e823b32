"""The gateway's requests through LiteLLM: answers as OpenAI's API would give them, failures told apart."""

from __future__ import annotations

import json
import traceback
from typing import Any

import litellm
import pytest
from tests.ports import free_port

from asgi_llm_guard.gateway.deployment import Deployment, Timeouts
from asgi_llm_guard.gateway.errors import CannotExpress
from asgi_llm_guard.gateway.providers.base import ModelRequest, TransportFailed, Upstream, read_whole
from asgi_llm_guard.gateway.providers.litellm import LiteLLMProvider
from asgi_llm_guard.gateway.providers.registry import Providers
from asgi_llm_guard.testing import Behaviour, FakeProvider
from asgi_llm_guard.wire import dialect_named
from asgi_llm_guard.wire.base import Answer, Head

pytestmark = pytest.mark.anyio

CANARY = "sk-canary-5f3a9c"
MESSAGES = [{"role": "user", "content": "say hello to everybody"}]
CHAT: dict[str, object] = {"messages": MESSAGES, "max_tokens": 50}
PATHS = {"openai": "/v1", "anthropic": "", "gemini": "/v1beta", "azure": ""}


def at(root: str, provider: str = "openai", **fields: Any) -> Deployment:
    options = {"api_version": "2026-01-01"} if provider == "azure" else {}
    said = {"provider": provider, "model": "m", "name": "d", "api_key": CANARY, "options": options, "via": "litellm"}
    return Deployment(**{**said, "api_base": root + PATHS.get(provider, "/v1"), **fields})


def metered(upstream: Upstream, pieces: list[bytes]) -> Answer:
    meter = dialect_named(upstream.dialect).meter(Head(upstream.status, upstream.headers, upstream.path))
    for piece in pieces:
        meter.feed(piece)
    meter.finish()
    return meter.answer()


@pytest.mark.parametrize("provider", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_openais(provider: str, stream: bool) -> None:
    """D1: whole and streamed, other providers answer as OpenAI's API would, with what was billed as their usage."""
    fake = FakeProvider()
    async with fake.serve() as url:
        request = ModelRequest(dialect="openai", body=CHAT, stream=stream)
        upstream = await LiteLLMProvider().send(at(url.root, provider), request)
        pieces = [piece async for piece in upstream]

    answer = metered(upstream, pieces)
    assert upstream.status == 200
    assert answer.finished
    assert answer.usage is not None
    assert answer.usage.total_tokens == fake.bill[0].usage.total_tokens
    assert b"Echo:" in b"".join(pieces)
    assert fake.requests[0].stream is stream


async def test_tools_are_streamed() -> None:
    """Tool calls arrive as deltas of OpenAI's."""
    fake = FakeProvider(default=Behaviour.call_tool("look_up", word="hello"))
    async with fake.serve() as url:
        tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
        request = ModelRequest(dialect="openai", body={**CHAT, "tools": tools}, stream=True)
        upstream = await LiteLLMProvider().send(at(url.root, "anthropic"), request)
        events = [json.loads(piece[6:]) async for piece in upstream if piece != b"data: [DONE]\n\n"]

    calls = [
        call for event in events for choice in event["choices"] for call in choice["delta"].get("tool_calls") or ()
    ]
    assert [call["function"]["name"] for call in calls if call["function"].get("name")] == ["look_up"]
    assert json.loads("".join(call["function"].get("arguments") or "" for call in calls)) == {"word": "hello"}


async def test_embeddings() -> None:
    """Embeddings as well."""
    fake = FakeProvider()
    async with fake.serve() as url:
        request = ModelRequest(dialect="openai_embeddings", body={"input": "hello"})
        upstream = await LiteLLMProvider().send(at(url.root), request)
        content = await read_whole(upstream)

    usage = metered(upstream, [content]).usage
    assert usage is not None
    assert usage.input_tokens == fake.bill[0].usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
async def test_errors_are_answers(status: int, stream: bool) -> None:
    """An error of the provider is an answer with its status, once; it does not repeat the key."""
    fake = FakeProvider(default=Behaviour.error(status, message=f"no, {CANARY}", retry_after=7))
    async with fake.serve() as url:
        upstream = await LiteLLMProvider().send(at(url.root), ModelRequest(dialect="openai", body=CHAT, stream=stream))
        content = await read_whole(upstream)

    assert upstream.status == status
    assert "no, ***" in json.loads(content)["error"]["message"]
    assert fake.calls == 1
    assert dict(upstream.headers).get(b"retry-after") == b"7"


async def test_overflows_keep_their_code() -> None:
    """D5: an input that is too large is told by its code."""
    fake = FakeProvider(default=Behaviour.refuse("context"))
    async with fake.serve() as url:
        upstream = await LiteLLMProvider().send(at(url.root, "anthropic"), ModelRequest(dialect="openai", body=CHAT))
        content = await read_whole(upstream)

    assert upstream.status == 400
    assert dialect_named("openai").read_response(400, content).error == "context_overflow"


async def test_nobody_listens() -> None:
    """A connection that was refused was surely not a request; the failure shows no key."""
    made = at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransportFailed) as raised:
        await LiteLLMProvider().send(made, ModelRequest(dialect="openai", body=CHAT))

    assert (raised.value.kind, raised.value.sent) == ("connect", False)
    assert raised.value.__context__ is None
    assert CANARY not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("times", [Timeouts(read_s=0.5), Timeouts(total_s=2.0)])
async def test_no_answer_in_time(times: Timeouts) -> None:
    """A request whose answer does not come in time was sent, once."""
    fake = FakeProvider(default=Behaviour.hang())
    async with fake.serve() as url:
        with pytest.raises(TransportFailed) as raised:
            await LiteLLMProvider().send(at(url.root, timeouts=times), ModelRequest(dialect="openai", body=CHAT))

    assert (raised.value.kind, raised.value.sent) == ("timeout", True)
    assert fake.calls <= 1


@pytest.mark.parametrize("chunks", [1, 3])
async def test_streams_that_break_off(chunks: int) -> None:
    """A stream that is cut gives what came before, and no end that looks like its own."""
    fake = FakeProvider(default=Behaviour.cut(after_chunks=chunks))
    pieces: list[bytes] = []
    async with fake.serve() as url:
        upstream = await LiteLLMProvider().send(at(url.root), ModelRequest(dialect="openai", body=CHAT, stream=True))
        with pytest.raises(TransportFailed) as raised:
            async for piece in upstream:
                pieces.append(piece)

    assert (raised.value.kind, raised.value.sent) == ("cut", True)
    assert not metered(upstream, pieces).finished


async def test_clients_that_leave() -> None:
    """When nobody reads a stream any more, the provider's connection is closed."""
    fake = FakeProvider(default=Behaviour.slow())
    fake.release(2)
    async with fake.serve() as url:
        upstream = await LiteLLMProvider().send(at(url.root), ModelRequest(dialect="openai", body=CHAT, stream=True))
        await anext(aiter(upstream))
        await upstream.aclose()
        await fake.until(lambda: fake.disconnects == 1)


@pytest.mark.parametrize("name", ["api_base", "fallbacks", "metadata", "mock_response", "extra_body", "custom_field"])
async def test_what_is_no_parameter_is_refused(name: str) -> None:
    """T14: LiteLLM would take it for a setting of its own; the error names it, and nothing is sent."""
    fake = FakeProvider()
    async with fake.serve() as url:
        with pytest.raises(CannotExpress, match=name) as raised:
            await LiteLLMProvider().send(at(url.root), ModelRequest(dialect="openai", body={**CHAT, name: "x"}))

    assert raised.value.status == 400
    assert fake.calls == 0


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": " HTTPS://intern.example/"},
        {"type": "file", "file": {"file_id": "file:///etc/passwd"}},
    ],
)
async def test_nothing_is_fetched(part: dict[str, object]) -> None:
    """T14: what a client names by URL is not fetched from here."""
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "http://x is fine"}, part]}]}
    with pytest.raises(CannotExpress, match="by URL"):
        await LiteLLMProvider().send(at("http://127.0.0.1:1"), ModelRequest(dialect="openai", body=body))


async def test_defaults_and_limits() -> None:
    """A deployment's defaults are sent where the request says nothing; its bound gives way to the request's."""
    fake = FakeProvider()
    async with fake.serve() as url:
        made = at(url.root, params={"temperature": 0.25, "max_tokens": 7})
        for body in (CHAT, {"messages": MESSAGES}, {"messages": MESSAGES, "max_completion_tokens": 9}):
            await read_whole(await LiteLLMProvider().send(made, ModelRequest(dialect="openai", body=body)))

    sent = [{key: each.body.get(key) for key in ("max_tokens", "max_completion_tokens")} for each in fake.requests]
    assert [each.body["temperature"] for each in fake.requests] == [0.25] * 3
    assert sent == [
        {"max_tokens": 50, "max_completion_tokens": None},
        {"max_tokens": 7, "max_completion_tokens": None},
        {"max_tokens": None, "max_completion_tokens": 9},
    ]


def test_deployments_find_it() -> None:
    """What has no API like OpenAI's is carried by LiteLLM without being told."""
    made = Deployment(provider="REPLICATE", model="meta/llama", api_key="any", environ={})

    assert isinstance(Providers().of(made), LiteLLMProvider)
    assert litellm.get_llm_provider(f"{made.platform.litellm or made.provider}/{made.model}")[1] == "replicate"


@pytest.mark.parametrize(
    "name",
    ["openai", "azure", "anthropic", "cohere", "gemini", "ollama", "bedrock", "vertex_ai", "vllm", "zai", "ai21"],
)
def test_names_are_litellms(name: str) -> None:
    """The name that a provider has there is one that LiteLLM knows."""
    made = Deployment(provider=name, model="m", api_key="any", via="litellm", api_base="https://host.example")
    known = made.platform.litellm or made.provider

    assert litellm.get_llm_provider(f"{known}/m")[1] == known
