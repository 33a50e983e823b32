"""Which price a record was made with, where prices change while calls run."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from asgi_llm_guard import Budget, Context, Guard, Usage
from asgi_llm_guard.control import Actor, Control
from asgi_llm_guard.following import CHORE
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.usage import UsageRecord

pytestmark = pytest.mark.anyio

ANNA = Actor(name="anna", role="admin")
MODEL = "openai/acme-1"


async def cut_after(text: str) -> AsyncIterator[object]:
    yield {"object": "chat.completion.chunk", "model": "acme-1", "choices": [{"index": 0, "delta": {"content": text}}]}
    raise ConnectionError("cut")


async def changed(clock: FrozenClock, *, before: str, after: str, measured: bool) -> tuple[UsageRecord, str, str]:
    """The record of a call during which the price of its model changed, and the names of both prices."""
    control = Control("sqlite://:memory:", clock=clock)
    await control.put("price", MODEL, {"entry": {"input": before, "output": before}}, actor=ANNA)
    guard = Guard([Budget("$100/daily", per="caller")], clock=clock, control=control)
    async with guard:
        names = []
        try:
            async with guard.open(Context(caller="ada")), guard.call(
                model=MODEL, input_tokens=1_000, max_output_tokens=1_000
            ) as call:  # fmt: skip
                names.append(guard.prices.cost("openai", "acme-1", Usage(input_tokens=1, output_tokens=1), 0).source)
                await control.put("price", MODEL, {"entry": {"input": after, "output": after}}, actor=ANNA)
                await guard.chores.run(CHORE)
                names.append(guard.prices.cost("openai", "acme-1", Usage(input_tokens=1, output_tokens=1), 0).source)
                if measured:
                    call.record(Usage(input_tokens=1_000, output_tokens=60))
                else:
                    async for _ in call.stream(cut_after("x" * 60)):
                        pass
        except ConnectionError:
            pass
        (record,) = await guard.storage.records()
    first, second = names
    assert first is not None
    assert second is not None
    assert first != second
    return record, first, second


@pytest.mark.parametrize("measured", [True, False])
async def test_the_source_is_that_of_the_price_that_was_charged(clock: FrozenClock, measured: bool) -> None:
    """A call during which its price falls, measured or counted from a cut stream, is charged the new one, and says so."""
    record, _, second = await changed(clock, before="2", after="1", measured=measured)
    assert record.outcome == ("measured" if measured else "estimated")
    assert (record.cost_nanousd, record.price_source) == (1_060_000, second)


async def test_a_count_that_is_capped_by_the_hold_is_of_its_price(clock: FrozenClock) -> None:
    """A cut stream is never charged above its hold; where that caps it, the record names the price of the hold."""
    record, first, _ = await changed(clock, before="1", after="5", measured=False)
    assert record.outcome == "estimated"
    assert (record.cost_nanousd, record.price_source) == (2_000_000, first)
