"""`inject_usage`: the provider is asked for usage, and clients that did not ask do not see it."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route as StarletteRoute

from asgi_llm_guard import Guard, GuardMiddleware, Route
from asgi_llm_guard.testing import FakeProvider, asgi_client

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
ASKED = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("own_call", [False, True], ids=["metered by the middleware", "in a guard.call"])
@pytest.mark.parametrize("wanted", [False, True])
async def test_usage_chunk_reaches_only_clients_that_asked(own_call: bool, wanted: bool) -> None:
    """The usage chunk is taken out for clients that did not ask for it, whoever meters the call."""
    provider = FakeProvider()
    guard = Guard()

    async def chat(request: Request) -> StreamingResponse:
        async with asgi_client(provider) as client:
            answer = await client.post(PATH, content=await request.body())
        if own_call:
            async with guard.call() as call:
                call.record_chunk(answer.content)
        return StreamingResponse(iter([answer.content]), media_type="text/event-stream")

    app = Starlette(routes=[StarletteRoute(PATH, chat, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard, routes=[Route(PATH, inject_usage=True)])
    async with guard, asgi_client(app) as client:
        options = {"stream_options": {"include_usage": True}} if wanted else {}
        response = await client.post(PATH, json={**ASKED, **options})

        assert ('"prompt_tokens"' in response.text) is wanted
        assert response.text.endswith("data: [DONE]\n\n")
        (record,) = await guard.storage.records()
        assert (record.outcome, record.cost_nanousd) == ("measured", provider.total_nanousd)
        assert await guard.storage.open_holds() == 0
