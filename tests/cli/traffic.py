"""Traffic of a working day through a real guard, many calls at a time, in virtual time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Sequence
from typing import Any

from asgi_llm_guard import Context, Guard, LimitExceeded, Usage
from asgi_llm_guard.events import Event, Refused, ShadowMisfit
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.simulate.report import plain_name
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord

MODELS = ("openai/gpt-4o-mini", "openai/gpt-4o", "anthropic/claude-haiku-4-5")
DEPARTMENTS = ("research", "sales", "support")
BEGIN_MS = 1_767_225_600_000 + 8 * 3_600_000  # 2026-01-01 08:00 UTC


class Timeline:
    """Virtual time: tasks wait for instants, and go on one instant after the other."""

    def __init__(self, clock: FrozenClock) -> None:
        self.clock = clock
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._running = 0

    async def until(self, at_ms: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (at_ms, next(self._order), future))
        self._running -= 1
        await future

    async def run(self, work: Sequence[Any]) -> None:
        async def counted(coroutine: Any) -> None:
            try:
                await coroutine
            finally:
                self._running -= 1

        self._running = len(work)
        tasks = [asyncio.ensure_future(counted(coroutine)) for coroutine in work]
        while True:
            while self._running:  # noqa: ASYNC110 - they run in this loop, and each turn lets them
                await asyncio.sleep(0)
            if not self._waiting:
                break
            at_ms, _, future = heapq.heappop(self._waiting)
            self.clock.set(max(at_ms, self.clock.now_ms()))
            self._running += 1
            future.set_result(None)
        await asyncio.gather(*tasks)


class Traffic:
    """What a guard was asked, what its ledger has, and what its shadows reported."""

    def __init__(self, policies: Sequence[Policy], *, requests: int, seed: int = 7, span_s: int = 3_600) -> None:
        self.clock = FrozenClock(BEGIN_MS)
        self.storage = MemoryStorage(clock=self.clock, lapse_ms=10**12, max_records=10**6)
        self.misfits: set[tuple[str, str]] = set()
        """Call ids, and the policies whose shadows said no."""
        self.refused: list[Refused] = []
        self.guard = Guard(policies, storage=self.storage, clock=self.clock, observers=[self._observe], hold_wait_s=0)
        self._random = random.Random(seed)
        self._said: list[str] = []
        self._requests = requests
        self._span_ms = span_s * 1000

    def _observe(self, event: Event) -> None:
        if isinstance(event, ShadowMisfit):
            self._said.append(plain_name(event.policy))
        elif isinstance(event, Refused):
            self.refused.append(event)

    async def run(self) -> Sequence[UsageRecord]:
        timeline = Timeline(self.clock)
        await timeline.run([self._request(timeline, number) for number in range(self._requests)])
        records = await self.storage.records()
        await self.guard.aclose()
        return records

    async def _request(self, timeline: Timeline, number: int) -> None:
        draw = self._random
        user = f"user-{min(int(draw.expovariate(0.25)), 30)}"
        context = Context(
            caller=f"caller-{draw.randrange(4)}",
            user=user,
            departments=tuple(draw.sample(DEPARTMENTS, draw.choice((1, 1, 1, 2)))),
            agent=draw.choice((None, "researcher", "writer")),
            session=f"session-{draw.randrange(max(1, self._requests // 6))}",
            request_id=f"request-{number}",
        )
        plan = [
            (draw.choice(MODELS), draw.randrange(50, 3_000), draw.randrange(200, 2_000)) for _ in range(_calls(draw))
        ]
        begin_ms = BEGIN_MS + draw.randrange(self._span_ms)
        ways = [(draw.random(), draw.randrange(1, 8_000)) for _ in plan]
        await timeline.until(begin_ms)
        self._said.clear()
        try:
            async with self.guard.open(context):
                said = list(self._said)
                for (model, tokens, limit), (way, lasts_ms) in zip(plan, ways, strict=True):
                    self._said[:] = said
                    said = []
                    await self._call(timeline, model, tokens, limit, way, lasts_ms)
        except LimitExceeded:
            return

    async def _call(self, timeline: Timeline, model: str, tokens: int, limit: int, way: float, lasts_ms: int) -> None:
        async with self.guard.call(model=model, input_tokens=tokens, max_output_tokens=limit) as call:
            assert call.hold is not None
            self.misfits.update((call.hold.call_id, policy) for policy in self._said)
            call.dispatched()
            await timeline.until(self.clock.now_ms() + lasts_ms)
            if way < 0.9:
                call.record(Usage(input_tokens=tokens, output_tokens=int(limit * way)))
            elif way < 0.95:
                call.record({"error": {"message": "busy", "type": "server_error"}})
            elif way < 0.96:
                call.release()
            # else nothing is known of it, and it is charged what it holds


def _calls(draw: random.Random) -> int:
    return draw.choice((1, 1, 1, 1, 2, 3, 6))
