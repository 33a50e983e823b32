"""The fake provider as LiteLLM reads it, which speaks most dialects with code of its own."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

from asgi_llm_guard.testing import Behaviour, FakeProvider

pytestmark = pytest.mark.anyio

ASKED: list[Any] = [{"role": "user", "content": "say hello to everybody here"}]
AWS = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "aws_region_name": "eu-central-1"}

WAYS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "openai_chat": ("openai/m", "api_base", "/v1", {"api_key": "any"}),
    "azure_chat": ("azure/m", "api_base", "", {"api_key": "any", "api_version": "2026-01-01"}),
    "anthropic_messages": ("anthropic/m", "api_base", "", {"api_key": "any"}),
    "gemini_content": ("gemini/m", "api_base", "/v1beta", {"api_key": "any"}),
    "bedrock_converse": ("bedrock/converse/anthropic.m", "aws_bedrock_runtime_endpoint", "", AWS),
}


@pytest.mark.parametrize("dialect", WAYS)
async def test_answers_are_read_as_billed(dialect: str) -> None:
    """Plain and streamed, LiteLLM reads the text, and the usage that is on the bill."""
    model, where, path, options = WAYS[dialect]
    provider = FakeProvider()
    async with provider.serve() as base_url:
        options = options | {where: base_url.root + path}
        answer = await litellm.acompletion(model=model, messages=ASKED, **options)
        chunks = await litellm.acompletion(
            model=model, messages=ASKED, stream=True, stream_options={"include_usage": True}, **options
        )
        streamed = [chunk async for chunk in chunks]

    assert answer.choices[0].message.content == f"Echo: {ASKED[0]['content']}"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        == f"Echo: {ASKED[0]['content']}"
    )
    assert [line.dialect for line in provider.bill] == [dialect, dialect]
    assert [line.usage.total_tokens for line in provider.bill] == [
        answer.usage.total_tokens,
        streamed[-1].usage.total_tokens,
    ]


async def test_errors_are_sorted() -> None:
    """A limit of the provider is LiteLLM's error for limits; nothing is billed."""
    provider = FakeProvider(default=Behaviour.refuse("rate_limit"))
    async with provider.serve() as base_url:
        with pytest.raises(litellm.exceptions.RateLimitError):
            await litellm.acompletion(
                model="openai/m", messages=ASKED, api_base=base_url, api_key="any", max_retries=0, num_retries=0
            )

    assert [(attempt.status, attempt.billed) for attempt in provider.attempts] == [(429, False)]
