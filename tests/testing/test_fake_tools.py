"""Tool calls of the fake provider, against the real OpenAI SDK."""

from __future__ import annotations

import json

import pytest
from tests.testing.test_fake_provider import sdk

from asgi_llm_guard.testing import Behaviour, FakeProvider

pytestmark = pytest.mark.anyio


async def test_tool_call_is_read_by_the_sdk() -> None:
    """A scripted tool call comes with its name and arguments, is billed, and says why the answer ended."""
    provider = FakeProvider()
    provider.script(Behaviour.call_tool("search", query="llamas and alpacas", limit=2))
    async with sdk(provider) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "go"}])

    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "search",
        {"query": "llamas and alpacas", "limit": 2},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == provider.bill[0].output_tokens == 6


async def test_streamed_tool_call_is_assembled_by_the_sdk() -> None:
    """In a stream the arguments come in parts, which the SDK puts together."""
    provider = FakeProvider()
    provider.script(Behaviour.call_tool("search", query="llamas and alpacas"))
    async with (
        sdk(provider) as client,
        client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "go"}]) as stream,
    ):
        answer = await stream.get_final_completion()

    assert answer.choices[0].message.tool_calls is not None
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"query": "llamas and alpacas"})
    assert answer.choices[0].finish_reason == "tool_calls"
