"""LiteLLM's own cache, told for whom it keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import litellm
import pytest

from asgi_llm_guard import CacheScope, Context, Guard
from asgi_llm_guard.cache import litellm_cache

pytestmark = pytest.mark.anyio

ASKED: list[Any] = [{"role": "user", "content": "one two three"}]


@pytest.fixture(autouse=True)
def _local_cache() -> Iterator[None]:
    litellm.callbacks = []
    litellm.cache = litellm.Cache(type="local")
    yield
    litellm.cache = None


async def until_kept(count: int) -> None:
    """LiteLLM keeps an answer in a task of its own."""
    assert litellm.cache is not None
    async with asyncio.timeout(10):
        while len(litellm.cache.cache.cache_dict) < count:  # noqa: ASYNC110 - it does not say when it has
            await asyncio.sleep(0.001)


async def ask(guard: Guard, context: Context, answer: str) -> str:
    """What LiteLLM answers; `answer`, unless its cache has another one."""
    async with guard.open(context):
        response = await litellm.acompletion(
            model="openai/gpt-test", messages=ASKED, mock_response=answer, caching=True, cache=litellm_cache()
        )
    content: str = response.choices[0].message.content
    return content


async def test_each_caller_has_a_cache_of_their_own() -> None:
    """T5, C11: LiteLLM gives what it keeps to the caller who asked for it, and to nobody else."""
    guard = Guard([CacheScope()])
    ada, bob = Context(caller="ada"), Context(caller="bob")
    assert await ask(guard, ada, "for ada") == "for ada"
    await until_kept(1)
    assert await ask(guard, ada, "anew") == "for ada"
    assert await ask(guard, bob, "for bob") == "for bob"
    await until_kept(2)
    assert await ask(guard, bob, "anew") == "for bob"
    assert await ask(guard, Context(caller="ada", user="u"), "for u") == "for u"
    assert [await ask(guard, Context(), text) for text in "12"] == ["1", "2"]
    assert [await ask(Guard([]), ada, text) for text in "12"] == ["1", "2"]
