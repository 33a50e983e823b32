"""The times between the parts of a streamed answer: which are kept, and of whose answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from tests.decorator.values import BOUND, PRICES
from tests.decorator.values import event as sse
from tests.middleware.values import SSE_HEADERS, Provider, ask, guarded

from asgi_llm_guard import Budget, Context, Guard
from asgi_llm_guard.events import CallEnded, Event
from asgi_llm_guard.gaps import Gaps

pytestmark = pytest.mark.anyio


def kept(instants: list[float]) -> tuple[float, ...]:
    ticks = iter(instants)
    gaps = Gaps(time=lambda: next(ticks))
    for _ in instants:
        gaps.part()
    return gaps.seconds


def test_each_gap_is_kept() -> None:
    """C15: each part after the first one has the time since the one before it."""
    assert kept([]) == kept([5.0]) == ()
    assert kept([5.0, 5.5, 7.0, 7.0]) == (0.5, 1.5, 0.0)
    assert len(kept([float(number) for number in range(513)])) == 512


@pytest.mark.parametrize(("parts", "step"), [(514, 2), (1_026, 2), (1_027, 4), (20_000, 64)])
def test_long_streams_are_thinned_evenly(parts: int, step: int) -> None:
    """T11: of a long stream every second gap is kept, or every fourth, and so on, over the whole of it, and 512 at most."""
    instants = [float(number * number) for number in range(parts)]
    gaps = [later - earlier for earlier, later in pairwise(instants)]
    assert kept(instants) == tuple(gaps[step - 1 :: step])
    assert len(kept(instants)) <= 512


def ended(told: list[Event]) -> CallEnded:
    (found,) = [event for event in told if isinstance(event, CallEnded)]
    return found


async def test_parts_of_a_streamed_route() -> None:
    """C15: a streamed answer is told of with when it began and a gap for each part after the first, and one that is
    not, without."""
    told: list[Event] = []
    pieces = [sse("hel"), sse("l"), sse("o", last=True), b"data: [DONE]\n\n"]
    body: dict[str, Any] = {"model": "openai/gpt-4o-mini", "max_tokens": 50, "messages": []}
    for streamed in (True, False):
        async with Guard([Budget("$1/1d", per="global")], observers=(told.append,)) as guard:
            provider = Provider(pieces, headers=SSE_HEADERS) if streamed else Provider()
            assert (await ask(guarded(provider, guard), {**body, "stream": streamed})).status == 200
            (record,) = await guard.storage.records()
        found = ended(told)
        assert (found.streamed, len(found.gaps_s)) == ((True, 3) if streamed else (False, 0))
        assert (found.first_ms is not None, record.first_token_ms is not None) == (streamed, streamed)
        assert all(gap_s >= 0 for gap_s in found.gaps_s)
        told.clear()


async def test_what_is_no_part() -> None:
    """C15: an empty message, with which many applications end a stream, is no part of it."""
    told: list[Event] = []

    async def application(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        for piece in (b"", sse("hello"), sse("you", last=True)):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    body = {"model": "openai/gpt-4o-mini", "max_tokens": 50, "messages": [], "stream": True}
    async with Guard([Budget("$1/1d", per="global")], observers=(told.append,)) as guard:
        assert (await ask(guarded(application, guard), body)).status == 200
    assert len(ended(told).gaps_s) == 1


async def test_items_of_a_stream() -> None:
    """C15: the items of an SDK's stream are its parts, and nothing is kept where nobody observes."""
    told: list[Event] = []

    async def items() -> AsyncIterator[dict[str, Any]]:
        for _ in range(3):
            yield {"choices": [{"delta": {"content": "a"}}]}

    async with Guard([Budget("$1/1d", per="global")], prices=PRICES) as guard:
        for observed in (True, False):
            stop = guard.observe(told.append) if observed else None
            async with guard.open(Context(caller="ada")), guard.call(**BOUND) as call:
                assert [item async for item in call.stream(items())]
                assert (call.gaps() is not None) is observed
            if stop is not None:
                stop()
    found = ended(told)
    assert (found.streamed, len(found.gaps_s)) == (True, 2)
