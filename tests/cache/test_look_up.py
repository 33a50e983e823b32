"""Answers that are given again: to whom, for how long, and what they cost."""

from __future__ import annotations

import asyncio

import pytest
from tests.cache.kit import ADA, BOB, MODEL, USAGE, Client, answer_of, ask_for, cache_of, chat, text_of

from asgi_llm_guard import (
    Budget,
    CacheScope,
    Context,
    Guard,
    Iterations,
    LimitExceeded,
    ModelAllow,
    Quota,
    RateLimit,
    events,
)
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.limits import LimitsStorage
from asgi_llm_guard.testing import FrozenClock

pytestmark = pytest.mark.anyio


async def test_an_answer_is_given_again() -> None:
    """C11, C14: the same request of the same caller gets the same answer, and no provider is asked."""
    client = Client(Guard([CacheScope()], cache=Cache()))
    first, second = await client.send(ADA), await client.send(ADA)
    assert (first.state, second.state, client.made) == ("lead", "hit", 1)
    assert first.answer == second.answer
    assert cache_of(client.guard).stats() == {
        "hits": 1, "waited": 0, "misses": 1, "passed": 0, "stored": 1, "unstored": 0, "reasons": {}
    }  # fmt: skip
