"""What the fake provider bills is what the guard's own reading of the answer comes to.

The two were written apart from each other, so that they are not wrong together.
"""

from __future__ import annotations

import pytest
from tests.testing.speech.requests import WAYS, Way

from asgi_llm_guard.testing import Attempt, Behaviour, FakeProvider, Trouble, asgi_client
from asgi_llm_guard.wire import dialect_for
from asgi_llm_guard.wire.base import Answer, Head

pytestmark = pytest.mark.anyio

COUNTS = Behaviour.answer(
    "one two three",
    input_tokens=100,
    cache_read_tokens=40,
    cache_write_tokens=20,
    cache_write_1h_tokens=5,
    reasoning_tokens=7,
)
HOSTS = {"mistral": "api.mistral.ai", "groq": "api.groq.com"}
KINDS: dict[Trouble, str] = {
    "rate_limit": "rate_limit",
    "quota": "quota",
    "overloaded": "overload",
    "context": "context_overflow",
}

every_dialect = pytest.mark.parametrize("dialect", WAYS)
plain_and_streamed = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


async def read(way: Way, behaviour: Behaviour, *, streamed: bool) -> tuple[Answer, Attempt]:
    """What the guard reads out of an answer, in pieces of seven bytes, and what the provider wrote down."""
    provider = FakeProvider(default=behaviour, platform=way.platform)
    path = way.streamed if streamed else way.plain
    body = way.body | (way.asks if streamed else {})
    async with asgi_client(provider) as client:
        answer = await client.post(path, json=body, headers={"accept-encoding": "identity"})
    spoken = dialect_for(path.partition("?")[0], HOSTS.get(way.platform, ""))
    assert spoken is not None
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    meter = spoken.meter(Head(answer.status_code, headers, path))
    forwarded = b"".join(meter.feed(answer.content[start : start + 7]) for start in range(0, len(answer.content), 7))
    assert forwarded + meter.finish() == answer.content
    return meter.answer(), provider.attempts[0]


@every_dialect
@plain_and_streamed
@pytest.mark.parametrize("behaviour", [COUNTS, Behaviour(), Behaviour.call_tool("search", q="a b")])
async def test_usage_is_what_is_billed(dialect: str, behaviour: Behaviour, *, streamed: bool) -> None:
    """Every bucket that the bill has is read, plain and streamed, with words and with a tool."""
    answer, attempt = await read(WAYS[dialect], behaviour, streamed=streamed)

    assert answer.finished
    assert answer.usage is not None
    assert attempt.bill is not None
    billed = attempt.bill.usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (billed.input_tokens, billed.output_tokens)
    assert (answer.usage.cache_read_tokens or 0) == billed.cache_read_tokens
    assert (answer.usage.cache_write_tokens or 0) == billed.cache_write_tokens
    assert (answer.usage.cache_write_1h_tokens or 0) == billed.cache_write_1h_tokens
    assert (answer.usage.reasoning_tokens or 0) == billed.reasoning_tokens


@every_dialect
@plain_and_streamed
@pytest.mark.parametrize("behaviour", [Behaviour.no_usage(), Behaviour.malformed(), Behaviour.empty()])
async def test_what_is_not_told_is_not_read(dialect: str, behaviour: Behaviour, *, streamed: bool) -> None:
    """Where the provider tells nothing, nothing is made up."""
    answer, attempt = await read(WAYS[dialect], behaviour, streamed=streamed)

    assert answer.usage is None
    assert not attempt.reported


@every_dialect
async def test_error_inside_a_stream_is_read_as_one(dialect: str) -> None:
    """A stream that breaks off with an error is an error, and its words are counted."""
    answer, _ = await read(WAYS[dialect], Behaviour.stream_error(after_chunks=2), streamed=True)

    assert (answer.kind, answer.finished) == ("error", False)
    assert answer.text_bytes == len("Echo: say ")


@pytest.mark.parametrize(
    ("dialect", "trouble"),
    # Who runs vLLM has no account that could be used up.
    [(dialect, trouble) for dialect in WAYS for trouble in KINDS if (dialect, trouble) != ("vllm_chat", "quota")],
)
async def test_errors_are_of_their_kind(dialect: str, trouble: Trouble) -> None:
    """Each provider's own way to say it is understood."""
    answer, _ = await read(WAYS[dialect], Behaviour.refuse(trouble), streamed=True)

    assert (answer.kind, answer.error) == ("error", KINDS[trouble])
