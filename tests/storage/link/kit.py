"""What the tests of the link share: scripts, a link that is closed after its test, and its changes of state."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from asgi_llm_guard.storage.redis_address import Address
from asgi_llm_guard.storage.redis_link import Link, LinkError, LinkState, Script

PATIENT_S = 20.0
"""A timeout that only something that is broken reaches."""

QUICK_S = 0.2
"""For calls that are to get no answer; those that get one have more time."""

COUNT = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
"""Adds to the key, and gives the sum."""
PUSH = Script("redis.call('RPUSH', KEYS[1], ARGV[1]) return ARGV[1]")
"""Appends to the list, and gives what was appended: the list is the order of execution."""
SCRIPTS = (COUNT, PUSH)


class Changes:
    """What a link has told of its state, in order; and waiting for what it tells next."""

    def __init__(self) -> None:
        self.told: list[LinkState] = []
        self.reasons: list[str] = []
        self._news = asyncio.Event()

    def __call__(self, state: LinkState, reason: str) -> None:
        self.told.append(state)
        self.reasons.append(reason)
        self._news.set()

    async def last(self, state: LinkState) -> None:
        """Wait until the last word is `state`."""
        async with asyncio.timeout(PATIENT_S):
            while not self.told or self.told[-1] != state:
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def linked(
    url: str, *, timeout_s: float = PATIENT_S, scripts: Iterable[Script] = SCRIPTS, **options: Any
) -> AsyncIterator[Link]:
    """A link to the URL, closed afterwards, with a timeout that is not reached unless the test says so."""
    link = Link(Address.parse(url)[0], scripts=tuple(scripts), timeout_s=timeout_s, **options)
    try:
        yield link
    finally:
        await link.aclose()


async def outcome(future: asyncio.Future[Any]) -> Any:
    """The reply, or the `LinkError`; never later than a test can wait for."""
    async with asyncio.timeout(2 * PATIENT_S):
        try:
            return await future
        except LinkError as error:
            return error


async def outcomes(futures: Iterable[asyncio.Future[Any]]) -> list[Any]:
    return list(await asyncio.gather(*map(outcome, futures)))


async def fail_until_down(link: Link) -> list[Any]:
    """Call until the link leaves its server alone; the outcomes."""
    seen = []
    async with asyncio.timeout(PATIENT_S):
        while link.state == "up":
            seen.append(await outcome(link.submit(COUNT, b"{down}", [b"0"])))
    return seen


async def until(done: Callable[[], bool]) -> None:
    """Give way to the event loop until something is so."""
    async with asyncio.timeout(PATIENT_S):
        while not done():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
