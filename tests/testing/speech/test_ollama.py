"""Ollama's APIs as Ollama's SDK reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from tests.plain import PLAIN
from tests.testing.speech.requests import ECHO, HELLO

from asgi_llm_guard.testing import Behaviour, FakeProvider, asgi_client

ASKED: Any = [{"role": "user", "content": HELLO}]


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def client(provider: FakeProvider) -> Iterator[ollama.Client]:
    with provider.serve() as base_url:
        made = ollama.Client(host=base_url.root, **PLAIN)
        yield made
        made._client.close()


def test_chat(provider: FakeProvider, client: ollama.Client) -> None:
    """Plain and streamed, the counts are those of the bill; what is zero is left out."""
    provider.script(Behaviour.answer("one two", input_tokens=0), Behaviour())
    answer = client.chat(model="m", messages=ASKED)
    lines = list(client.chat(model="m", messages=ASKED, stream=True))

    assert (answer.message.content, answer.prompt_eval_count, answer.eval_count) == ("one two", None, 2)
    assert "".join(line.message.content or "" for line in lines) == ECHO
    assert [line.done for line in lines] == [False] * 6 + [True]
    assert (lines[-1].prompt_eval_count, lines[-1].eval_count) == (13, 6)
    assert [line.reported for line in provider.bill] == [True, True]


def test_generate(client: ollama.Client) -> None:
    """A prompt is continued, plain and streamed, up to the limit."""
    answer = client.generate(model="m", prompt=HELLO, options={"num_predict": 2})
    lines = list(client.generate(model="m", prompt=HELLO, stream=True, system="be brief", options={"num_predict": -1}))

    assert (answer.response, answer.done_reason) == ("Echo: say", "length")
    assert "".join(line.response or "" for line in lines) == ECHO
    assert lines[-1].eval_count == 6


@pytest.mark.anyio
async def test_streams_unless_told_not_to() -> None:
    """A request that does not say is answered line by line."""
    provider = FakeProvider()
    async with asgi_client(provider) as http:
        answer = await http.post("/api/chat", json={"model": "m", "messages": ASKED})

    assert answer.headers["content-type"] == "application/x-ndjson"
    assert len(answer.text.splitlines()) == 7


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_call(provider: FakeProvider, client: ollama.Client, *, streamed: bool) -> None:
    """The call of a tool comes whole, in a stream as well."""
    provider.script(Behaviour.call_tool("search", query="llamas and alpacas"))
    if streamed:
        answers = list(client.chat(model="m", messages=ASKED, stream=True))
    else:
        answers = [client.chat(model="m", messages=ASKED)]

    (call,) = [call for answer in answers for call in answer.message.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("search", {"query": "llamas and alpacas"})


def test_errors(provider: FakeProvider, client: ollama.Client) -> None:
    """An error is a line of text, before a stream and inside one."""
    provider.script(Behaviour.refuse("overloaded"), Behaviour.stream_error(after_chunks=1))
    with pytest.raises(ollama.ResponseError, match="busy") as caught:
        client.chat(model="m", messages=ASKED)
    with pytest.raises(ollama.ResponseError, match="fails inside"):
        list(client.chat(model="m", messages=ASKED, stream=True))

    assert caught.value.status_code == 503
    assert [(attempt.billed, attempt.reported) for attempt in provider.attempts] == [(False, False), (True, False)]
