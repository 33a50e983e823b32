"""What a guarded client gives without sending, and what it keeps apart at the provider."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import APIError, OpenAI
from tests.exits.kit import BILL, BILLED, CONTEXT, PRICES, Stage
from tests.exits.kit import Settlements as Seen
from tests.hooks.kit import Way, asked, hooked, in_thread, library_of, over, text_of
from tests.hooks.test_answers import ANSWER

from asgi_llm_guard import Budget, CacheScope, Context, Guard, Iterations
from asgi_llm_guard.cache import Cache, scoped_prompt_cache_key
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.httpx import AsyncGuardTransport
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.testing import Behaviour, FakeProvider, FrozenClock

pytestmark = pytest.mark.anyio

ADA = Context(caller="ada", session="s")
SECRET = "a secret of sixteen bytes"


@pytest.fixture
async def caching() -> AsyncIterator[Stage]:
    """A stage whose guard keeps answers."""
    clock = FrozenClock(1_800_000_000_000)
    provider, seen = FakeProvider(prices=BILL), Seen()
    policies = (Iterations(1_000), Budget("$10/1d", per="global"), CacheScope())
    storage = MemoryStorage(clock=clock)
    cache = Cache(ttl="1h", streams=True)
    guard = Guard(policies, storage=storage, clock=clock, prices=PRICES, observers=[seen], cache=cache)
    async with provider.serve() as base_url, guard:
        yield Stage(guard.storage, provider, base_url, guard, seen)


async def outcomes(stage: Stage) -> list[str]:
    assert await stage.storage.open_holds() == 0
    return [record.outcome for record in await stage.storage.records()]


async def test_kept(caching: Stage, way: Way) -> None:
    """C14: what was answered once is given again to the same caller: nothing is sent, and nothing is charged."""
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        first = await client.post(asked())
        again = await client.post(asked())

    assert type(again) is library_of(way).Response
    assert again.json() == first.json()
    assert caching.provider.calls == 1
    assert await outcomes(caching) == ["measured", "cached"]
    records = await caching.storage.records()
    assert sum(record.cost_nanousd or 0 for record in records) == caching.provider.total_nanousd


async def test_answers_that_were_not_sent_for_are_like_others(caching: Stage, way: Way) -> None:
    """What is kept, and what is refused, comes as an answer of the network does: it is read, and took some time."""
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        sent, kept = [await client.post(asked()) for _ in range(2)]
        async with caching.guard.open(ADA, extra=[Budget("$0.000001/1d", name="small")]):
            refused = await client.post(asked("another"))

    assert (kept.status_code, refused.status_code) == (200, 402)
    for response in (sent, kept, refused):
        assert response.elapsed.total_seconds() >= 0
        assert response.is_closed
        assert response.num_bytes_downloaded == len(response.content)


async def test_not_for_others(caching: Stage, way: Way) -> None:
    """T5: what one caller was answered is given to no other one, and to nobody without a name."""
    async with hooked(caching, way) as client:
        for context in (ADA, Context(caller="bob"), CONTEXT, CONTEXT):
            async with caching.guard.open(context):
                await client.post(asked())

    assert caching.provider.calls == 4


async def test_servers_on_one_host(offline: Stage, way: Way) -> None:
    """C11: two servers on one host are two: by their ports, and by the host that a request names itself."""
    guard = Guard([CacheScope()], cache=Cache(), prices=PRICES)
    stage = Stage(guard.storage, offline.provider, offline.base_url, guard, Seen())
    sent: list[str] = []

    def provider(request: Any) -> Any:
        sent.append(str(request.url))
        return library_of(way).Response(200, json=ANSWER)

    async with over(stage, way, provider) as client, guard.open(ADA):
        for _ in range(2):
            for port in (8000, 8001):
                await client.post(asked(), path=f"http://localhost:{port}/v1/chat/completions")
            for host in ("one", "two"):
                await client.post(asked(), path="http://10.0.0.1/v1/chat/completions", headers={"host": host})
    assert len(sent) == 4


async def test_streams(caching: Stage, way: Way) -> None:
    """A stream that was read to its end is given again, in one piece, as the client got it."""
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        first = await client.chunks(asked(stream=True))
        again = await client.chunks(asked(stream=True))

    assert b"".join(first) == b"".join(again)
    assert text_of(again) == "Echo: one two three"
    assert b"prompt_tokens" not in b"".join(again)
    assert caching.provider.calls == 1


async def test_streams_of_the_sdk(caching: Stage) -> None:
    """OpenAI's SDK closes a stream at its last event, before the end of the body: it is whole, and kept."""
    messages: Any = asked()["messages"]

    def ask(text: str) -> str:
        stream = client.chat.completions.create(model=BILLED, max_tokens=50, messages=messages, stream=True, user=text)
        return "".join(choice.delta.content or "" for part in stream for choice in part.choices)

    with caching.guard.httpx_client_sync(trust_env=False) as http:
        client = OpenAI(api_key="any", base_url=caching.base_url, http_client=http)
        async with caching.guard.open(ADA):
            texts = [await in_thread(lambda: ask("one")) for _ in range(2)]
            caching.provider.script(Behaviour.cut())
            with contextlib.suppress(APIError, library_of("httpx2 sync").HTTPError):
                await in_thread(lambda: ask("cut"))
            assert caching.provider.calls == 2
            texts.append(await in_thread(lambda: ask("cut")))

    assert texts == ["Echo: one two three"] * 3
    assert caching.provider.calls == 3


async def test_stream_that_is_left(caching: Stage, way: Way) -> None:
    """A stream that its client leaves is not kept."""
    caching.provider.script(Behaviour.slow())
    caching.provider.release(2)
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        await client.chunks(asked(stream=True), most=1)
        caching.provider.release()
        assert text_of(await client.chunks(asked(stream=True))) == "Echo: one two three"

    assert caching.provider.calls == 2


@pytest.mark.parametrize("behaviour", [Behaviour.error(500), Behaviour.call_tool("look"), Behaviour.malformed()])
async def test_not_kept(caching: Stage, way: Way, behaviour: Behaviour) -> None:
    """C13: errors, calls of tools and broken answers are not kept."""
    caching.provider.script(behaviour)
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        await client.post(asked())
        assert (await client.post(asked())).status_code == 200

    assert caching.provider.calls == 2


async def test_compressed_answers(caching: Stage, way: Way) -> None:
    """A compressed answer is kept as what it says, and given without the compression."""
    caching.provider.script(Behaviour.answer().zipped())
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        first = await client.post(asked())
        again = await client.post(asked())

    assert first.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in again.headers
    assert first.json() == again.json()


async def test_asked_at_the_same_time(caching: Stage, way: Way) -> None:
    """Of many who ask the same at the same time, one request is sent."""
    caching.provider.script(Behaviour.hang())
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        asking = [asyncio.create_task(client.post(asked())) for _ in range(8)]
        await caching.provider.until(lambda: caching.provider.open == 1)
        caching.provider.release()
        answers = [response.json() for response in await asyncio.gather(*asking)]

    assert answers == [answers[0]] * 8
    assert caching.provider.calls == 1
    assert sorted(await outcomes(caching)) == ["cached"] * 7 + ["measured"]


async def test_refused_and_followed(caching: Stage, way: Way) -> None:
    """Who leads and is refused lets the next one lead at once."""
    async with hooked(caching, way) as client:
        async with caching.guard.open(ADA, extra=[Budget("$0.000001/1d", name="small")]):
            assert (await client.post(asked())).status_code == 402
        async with caching.guard.open(ADA):
            assert (await client.post(asked())).status_code == 200


async def test_no_store(caching: Stage, way: Way) -> None:
    """A request that says `no-store` is neither answered from the cache nor kept."""
    async with hooked(caching, way) as client, caching.guard.open(ADA):
        for _ in range(2):
            await client.post(asked(), headers={"cache-control": "no-store"})

    assert caching.provider.calls == 2


@pytest.mark.parametrize("field", ["prompt_cache_key", "cache_salt"])
async def test_prompt_cache(offline: Stage, way: Way, field: Any) -> None:
    """The provider's cache of prompts is another one for each caller, whatever the request says of it."""
    sent: list[Any] = []

    def provider(request: Any) -> Any:
        sent.append(json.loads(request.content))
        return library_of(way).Response(200, json=ANSWER)

    async with over(offline, way, provider, prompt_cache_secret=SECRET, prompt_cache_field=field) as client:
        for context in (ADA, Context(caller="bob")):
            async with offline.guard.open(context):
                await client.post(asked(**{field: "mine"}))
                await client.post(asked(stream=True))

    keys = [body.pop(field) for body in sent]
    assert keys == [scoped_prompt_cache_key(Context(caller=name), SECRET) for name in ("ada", "ada", "bob", "bob")]
    assert sent[0] == asked()
    assert sent[1] == asked(stream=True, stream_options={"include_usage": True})


async def test_wrong_arguments(offline: Stage) -> None:
    """What is wrong is said when the client is made."""
    for wrong in ({"prompt_cache_secret": "short"}, {"prompt_cache_field": "user"}, {"unmeterable": "maybe"}):
        options: Any = wrong
        with pytest.raises(ConfigurationError):
            AsyncGuardTransport(offline.guard, **options)
    with pytest.raises(TypeError, match="no such option: streem"):
        AsyncGuardTransport(offline.guard, streem=True)  # type: ignore[call-arg]


# -------------------------------------------------------------------------------- surfaces


async def test_what_cannot_be_metered(offline: Stage, way: Way) -> None:
    """Billed work that no answer tells the cost of is refused, unless the client was made for it."""
    sent: list[str] = []

    def provider(request: Any) -> Any:
        sent.append(request.url.path)
        return library_of(way).Response(200, json={})

    async with over(offline, way, provider) as client:
        refused = await client.post({}, path="https://api.openai.com/v1/batches")
        free = await client.post({}, path="https://api.openai.com/v1/files")
        unknown = await client.post({}, path="https://elsewhere.example/v1/batches")
    async with over(offline, way, provider, unmeterable="pass", unknown="deny") as client:
        passed = await client.post({}, path="https://api.openai.com/v1/batches")
        denied = await client.post({}, path="https://elsewhere.example/v1/batches")

    assert [each.status_code for each in (refused, free, unknown, passed, denied)] == [403, 200, 200, 200, 403]
    assert "unmeterable='pass'" in refused.text
    assert sent == ["/v1/files", "/v1/batches", "/v1/batches"]
    assert await offline.storage.records() == []
