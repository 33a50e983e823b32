"""Denial of wallet: a few huge calls. What they can cost is known before they are sent, and they are not."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from tests.middleware.asgi import JSON_HEADERS, request
from tests.middleware.values import CHAT, Provider, guarded, new_guard

from asgi_llm_guard import Budget
from asgi_llm_guard.pricing import PriceBook

pytestmark = pytest.mark.anyio

DAY = "$0.05/1d"
LINK = "https://example.org/x"
SOUND = base64.b64encode(bytes(60_000)).decode()


def body(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A small request for gpt-4o ($2.50 and $10 per million), with something in it."""
    content = [{"type": "text", "text": "hi"}, *parts]
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": content}], "max_tokens": 10, **more}


LARGE: dict[str, dict[str, Any]] = {
    "a long answer": body(max_tokens=10_000),
    "no limit at all": body(max_tokens=None),
    "many answers": body(n=128, max_tokens=100),
    "a long text": body({"type": "text", "text": "x" * 30_000}),
    "a text that grows when it is normalized": body({"type": "text", "text": "\ufdfa" * 1_000}),
    "many images": body(*[{"type": "image_url", "image_url": {"url": LINK}}] * 10),
    "a long file": body({"type": "file", "file": {"file_id": "file-1"}}),
    "audio": body({"type": "input_audio", "input_audio": {"format": "mp3", "data": SOUND}}, model="gpt-4o-audio-preview"),
    "searches": body(tools=[{"type": "web_search", "max_uses": 20}]),
    "a dear cache": body(
        {"type": "text", "text": "x" * 2_200, "cache_control": {"type": "ephemeral", "ttl": "1h"}}, model="claude-opus-4-1"
    ),
    "a dear tier": body({"type": "text", "text": "x" * 15_000}, service_tier="fast"),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(LARGE))
async def test_what_can_cost_more_than_is_left(what: str) -> None:
    """T4: a call that can cost more than is left is refused before it is sent, whatever makes it dear."""
    guard = new_guard(Budget(DAY, per="caller"), prices=PriceBook.snapshot())
    provider = Provider([b"{}"])
    app = guarded(provider, guard)
    refused = await request(CHAT, headers=JSON_HEADERS, body=json.dumps(LARGE[what]).encode()).run(app)
    assert refused.status == 402
    assert provider.bodies == []
    small = await request(CHAT, headers=JSON_HEADERS, body=json.dumps(body()).encode()).run(app)
    assert small.status == 200
    assert len(provider.bodies) == 1
