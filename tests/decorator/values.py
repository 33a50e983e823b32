"""Guards, answers and ledgers that the tests of `@guarded` share. Runs without pytest."""

from __future__ import annotations

import json
from typing import Any

from tests.middleware.asgi import JSON_HEADERS, App, Exchange, request

from asgi_llm_guard import Context, Guard
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.pricing import PriceBook

MODEL = "openai/test-model"
CONTEXT = Context(session="s")

#: $1 per million tokens in, $2 per million out: 1,000 and 2,000 nano-USD a token.
PRICES = PriceBook.snapshot(overrides={MODEL: {"input": 1, "output": 2}})

#: What a call of 100 tokens in and 50 out is held for.
BOUND: Any = {"model": MODEL, "input_tokens": 100, "max_output_tokens": 50}
HELD = 200_000

ANSWER: dict[str, Any] = {
    "object": "chat.completion",
    "model": "test-model",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
}
USED = 20_000
"""The cost of `ANSWER`, in nano-USD."""


def chunk(text: str | None, *, last: bool = False) -> dict[str, Any]:
    """One streamed item; the `last` one tells the usage."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if last else None}
    told = {"usage": ANSWER["usage"]} if last else {}
    return {"object": "chat.completion.chunk", "model": "test-model", "choices": [choice], **told}


def event(text: str | None, *, last: bool = False) -> bytes:
    """The same item as a server-sent event."""
    return b"data: " + json.dumps(chunk(text, last=last)).encode() + b"\n\n"


def new_guard(*policies: Policy, **options: Any) -> Guard:
    return Guard(policies, **{"prices": PRICES, "hold_wait_s": 0, **options})


async def post(app: App, path: str, body: object = None, *, session: str = "s", method: str = "POST") -> Exchange:
    """Send a JSON body in one session."""
    content = b"" if body is None else json.dumps(body).encode()
    length = (b"content-length", b"%d" % len(content))
    headers = (*JSON_HEADERS, length, (b"x-session-id", session.encode()))
    return await request(path, method=method, headers=headers, body=content).run(app)


async def ledger(guard: Guard) -> list[tuple[str, int | None]]:
    """Outcome and cost of every call so far; nothing may be left open."""
    assert await guard.storage.open_holds() == 0
    return [(record.outcome, record.cost_nanousd) for record in await guard.storage.records()]


async def iterations(guard: Guard, context: Context = CONTEXT) -> int:
    """How many calls the first policy of the guard has counted for `context`."""
    claims = guard.policies[0].plan(context, None, guard.clock.now_ms()).claims
    (reading,) = await guard.storage.read([claims[0].meter])
    return reading.used + reading.held
