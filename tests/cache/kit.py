"""What the tests of the cache are about: requests as a client hook sees them, and a provider that counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from asgi_llm_guard import Context, Guard, Usage
from asgi_llm_guard.cache import CacheRequest, Lookup, ProviderAnswer, ResponseCache
from asgi_llm_guard.guard import new_call

MODEL = "openai/gpt-4o-mini"
USAGE = Usage(input_tokens=100, output_tokens=20, model="gpt-4o-mini")
ADA = Context(caller="ada")
BOB = Context(caller="bob")


def chat(text: str = "Hello", **changes: Any) -> dict[str, Any]:
    """An answer of a chat, as JSON."""
    message = {"role": "assistant", "content": text, **changes.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": "stop", **changes.pop("choice", {})}
    return {"id": "c1", "object": "chat.completion", "model": "gpt-4o-mini", "choices": [choice], **changes}


def answer_of(body: dict[str, Any], *, status: int = 200) -> ProviderAnswer:
    return ProviderAnswer(status=status, content_type="application/json", body=json.dumps(body).encode())


def ask_for(
    prompt: str = "Hi",
    *,
    headers: Sequence[tuple[str, str]] = (),
    host: str = "api.openai.com",
    path: str = "/v1/chat/completions",
    stream: bool | None = None,
    **fields: Any,
) -> CacheRequest:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}], **fields}
    return CacheRequest(host=host, path=path, body=json.dumps(body).encode(), headers=headers, stream=stream)


def cache_of(guard: Guard) -> ResponseCache:
    assert guard.cache is not None
    return guard.cache


class Client:
    """Makes requests as a client hook does: looks them up, and makes those that are not hits."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.made = 0
        """How many requests the provider has seen."""

    async def send(
        self, context: Context, request: CacheRequest | None = None, *, answer: ProviderAnswer | None = None
    ) -> Lookup:
        """One request in an admission of its own; what was looked up, with the answer that the client was given."""
        async with self.guard.open(context):
            return await self.send_inside(request or ask_for(), answer=answer)

    async def send_inside(self, request: CacheRequest, *, answer: ProviderAnswer | None = None) -> Lookup:
        """One request in the admission that is open here."""
        described = self.guard.describe(MODEL, input_tokens=1_000, max_output_tokens=100)
        call = new_call(self.guard.engine, described, ())
        with await cache_of(self.guard).look_up(call, request) as found:
            if not found.hit:
                await call.claim()
                self.made += 1
                made = answer or answer_of(chat(f"answer {self.made}"))
                call.record(USAGE)
                call.end()
                await found.store(made)
                found.answer = made
        return found


def text_of(found: Lookup) -> str:
    assert found.answer is not None
    content: str = json.loads(found.answer.body)["choices"][0]["message"]["content"]
    return content
