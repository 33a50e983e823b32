"""What is refused is answered in the provider's words, and nothing is sent."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from tests.exits.kit import CONTEXT, Stage
from tests.hooks.kit import Way, admitted, asked, hooked, in_thread, library_of, over, pieces

from asgi_llm_guard import Budget, Context, Denied, Iterations, ModelAllow, RateLimit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.httpx import AsyncGuardTransport, GuardTransport
from asgi_llm_guard.policies.base import Policy

pytestmark = pytest.mark.anyio

ROOM = Budget("$0.005/1d", name="room")

REFUSALS = {
    "iterations": (Iterations(1, name="one"), 429, "session_iterations_exhausted"),
    "budget": (Budget("$0.000001/1d", name="small"), 402, "request_exceeds_budget"),
    "model": (ModelAllow(["openai/other"]), 403, "model_not_allowed"),
}


@pytest.mark.parametrize("policy, status, code", REFUSALS.values(), ids=REFUSALS)
async def test_refused(stage: Stage, way: Way, policy: Policy, status: int, code: str) -> None:
    """A refusal is a response of the client's library, in OpenAI's shape; the provider hears nothing of it."""
    before = int(isinstance(policy, Iterations))
    async with hooked(stage, way) as client, stage.guard.open(CONTEXT, extra=[policy]):
        for _ in range(before):
            await client.post(asked())
        response = await client.post(asked())

    assert type(response) is library_of(way).Response
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-should-retry"] == "false"
    assert response.extensions["asgi_llm_guard"].code == code
    assert stage.provider.calls == before
    await stage.settled(calls=before)


async def test_worth_a_retry(stage: Stage, way: Way) -> None:
    """A refusal by what is free again soon says when, and does not keep clients from asking again."""
    async with (
        hooked(stage, way) as client,
        stage.guard.open(CONTEXT, extra=[RateLimit("1/second", counts="calls")]),
    ):
        await client.post(asked())
        response = await client.post(asked())

    assert response.status_code == 429
    assert "x-should-retry" not in response.headers
    assert 1 <= int(response.headers["retry-after"]) <= 2
    assert '"iterations";q=1000;w=3600' in response.headers["ratelimit-policy"]


async def test_outside_of_an_admission(stage: Stage, way: Way) -> None:
    """Where nobody is known to ask, the answer says what to do; an exception would be taken for a lost connection."""
    async with hooked(stage, way) as client:
        response = await client.post(asked())

    assert response.status_code == 400
    assert response.headers["x-should-retry"] == "false"
    for way_out in ("GuardMiddleware", "guard.open(", "context="):
        assert way_out in response.json()["error"]["message"]
    await stage.settled(calls=0)


async def test_admission_of_another_guard(stage: Stage, offline: Stage, way: Way) -> None:
    """An admission of another guard is none: its limits are not those of this client."""
    async with hooked(stage, way) as client, offline.guard.open(CONTEXT):
        response = await client.post(asked())

    assert response.status_code == 400
    await stage.settled(calls=0)


@pytest.mark.parametrize("callable_", [False, True])
async def test_context_of_the_client(stage: Stage, way: Way, callable_: bool) -> None:
    """A client with a context is admitted wherever it is used, request by request; an open admission goes first."""
    own = Context(caller="job:nightly", session="job")
    async with hooked(stage, way, context=(lambda: own) if callable_ else own) as client:
        await client.post(asked())
        seen = await client.chunks(asked(stream=True))
        async with stage.guard.open(CONTEXT):
            await client.post(asked())

    assert seen
    records = await stage.storage.records()
    assert [(record.caller, record.outcome) for record in records] == [("job:nightly", "measured")] * 2 + [
        (None, "measured")
    ]
    assert await stage.storage.open_holds() == 0
    assert not stage.guard.open_admissions


async def test_refused_by_the_request_of_a_context(stage: Stage, way: Way) -> None:
    """A request of a client with a context claims what requests claim, and is refused like one."""
    guard = stage.guard
    guard.policies = (*guard.policies, *guard.engine.bind([RateLimit("1/day", per="global")]))
    async with hooked(stage, way, context=Context(caller="job")) as client:
        statuses = [(await client.post(asked())).status_code for _ in range(2)]

    assert statuses == [200, 429]
    assert await stage.storage.open_holds() == 0
    assert not guard.open_admissions


async def test_drained(stage: Stage, way: Way) -> None:
    """When the guard is drained, clients with a context are told to come back; open admissions go on."""
    async with hooked(stage, way, context=Context(caller="job")) as client, stage.guard.open(CONTEXT):
        stage.guard._draining.begun = True
        assert (await client.post(asked())).status_code == 200
    async with hooked(stage, way, context=Context(caller="job")) as client:
        response = await client.post(asked())

    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_draining")


BROKEN: list[tuple[Any, int]] = [
    (b'{"model": "gpt-test"', 400),
    (b'{"messages": []}', 400),
    (b'{"model": "gpt-test", "model": "gpt-test"}', 400),
    (b'{"model": "gpt-test", "max_tokens": -1}', 400),
    (b"[]", 400),
    (b" " * (8 * 1024 * 1024 + 1), 413),
]


@pytest.mark.parametrize("body, status", BROKEN, ids=range(len(BROKEN)))
async def test_body_that_cannot_be_read(offline: Stage, way: Way, body: bytes, status: int) -> None:
    """What cannot be bounded is not sent."""

    def provider(request: Any) -> Any:
        raise AssertionError

    async with over(offline, way, provider) as client:
        whole = await client.post(content=body)
        streamed = await client.post(content=pieces(way, [body[:9], body[9:]]))

    assert (whole.status_code, streamed.status_code) == (status, status)
    assert await offline.storage.records() == []


async def test_body_that_is_encoded(offline: Stage, way: Way) -> None:
    """A compressed body is not read, and not sent."""

    def provider(request: Any) -> Any:
        raise AssertionError

    async with over(offline, way, provider) as client:
        response = await client.post(asked(), headers={"content-encoding": "gzip"})

    assert response.status_code == 415


async def test_streamed_body(stage: Stage, way: Way) -> None:
    """A body that comes in pieces is read first, and sent as a whole."""
    body = b'{"model":"gpt-test","max_tokens":20,"messages":[{"role":"user","content":"one two three"}]}'
    async with admitted(stage, way) as client:
        response = await client.post(content=pieces(way, [body[:20], body[20:]]))

    assert response.json()["choices"][0]["message"]["content"] == "Echo: one two three"
    await stage.settled(calls=1)


async def test_hosts(offline: Stage, way: Way) -> None:
    """T14: a client with a list of hosts sends nothing anywhere else, whatever the path and wherever it is led."""
    asked_hosts = []

    def provider(request: Any) -> Any:
        asked_hosts.append(request.url.host)
        return library_of(way).Response(307, headers={"location": "http://169.254.169.254/v1/chat/completions"})

    async with over(offline, way, provider, hosts=["LLM"]) as client:
        client.client.follow_redirects = True
        led_away = await client.post(asked(api_base="http://elsewhere/v1"))
        other = await client.post({}, path="http://metadata/latest")

    assert asked_hosts == ["llm"]
    assert (led_away.status_code, other.status_code) == (403, 403)
    assert led_away.json()["error"]["code"] == "route_not_listed"
    assert await offline.storage.records() == []
    assert (await offline.counters())[0] == 0


async def test_url_in_a_body_is_not_followed(offline: Stage, way: Way) -> None:
    """T14: an address that a body names leads the request nowhere else."""
    asked_hosts = []

    def provider(request: Any) -> Any:
        asked_hosts.append(request.url.host)
        return library_of(way).Response(200, json={})

    async with over(offline, way, provider) as client:
        await client.post(asked(api_base="http://elsewhere", base_url="http://elsewhere", extra={"url": "http://a"}))

    assert asked_hosts == ["llm"]


async def test_clamped(stage: Stage, way: Way) -> None:
    """With `clamp`, a request whose answer may be too dear is sent with the limit that fits."""
    room = Budget("$0.0003/1d", name="room")
    async with hooked(stage, way, clamp=True) as client, stage.guard.open(CONTEXT, extra=[room]):
        response = await client.post(asked(max_tokens=10_000))

    assert response.status_code == 200
    sent = stage.provider.requests[0].body["max_tokens"]
    assert 0 < sent < 200
    (record,) = await stage.settled(calls=1)
    assert record.estimate_nanousd is not None
    assert record.estimate_nanousd <= 300_000


async def test_clamped_without_room(stage: Stage, way: Way) -> None:
    """Where no answer fits at all, nothing is sent."""
    async with (
        hooked(stage, way, clamp=True) as client,
        stage.guard.open(CONTEXT, extra=[Budget("$0.000001/1d", name="none")]),
    ):
        response = await client.post(asked(max_tokens=10_000))

    assert response.status_code == 402
    await stage.settled(calls=0)


async def test_wrong_arguments(offline: Stage) -> None:
    """What is wrong is said when the transport is made."""
    guard = offline.guard
    with pytest.raises(ConfigurationError, match="guard: expected a Guard"):
        AsyncGuardTransport("guard")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="transport: expected an asynchronous transport"):
        AsyncGuardTransport(guard, httpx2.HTTPTransport())
    with pytest.raises(ConfigurationError, match="transport: expected a synchronous transport"):
        GuardTransport(guard, httpx2.AsyncHTTPTransport())
    with pytest.raises(ConfigurationError, match="library: expected 'auto', 'httpx' or 'httpx2'"):
        GuardTransport(guard, library="requests")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="context: expected a Context"):
        GuardTransport(guard, context="me")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="hosts: expected a list"):
        GuardTransport(guard, hosts="api.openai.com")


async def test_denied_is_at_hand(stage: Stage, way: Way) -> None:
    """The decision itself stands in the response, for code that wants more than the words."""
    async with hooked(stage, way) as client, stage.guard.open(CONTEXT, extra=[Budget("$0.000001/1d", name="small")]):
        response = await client.post(asked())

    denied = response.extensions["asgi_llm_guard"]
    assert isinstance(denied, Denied)
    assert (denied.policy, denied.unit) == ("small", "nanousd")


async def test_on_the_thread_of_an_event_loop(stage: Stage) -> None:
    """A synchronous client blocks the loop that it is used on, as it always did, and nothing else."""
    with stage.guard.httpx_client_sync(base_url=stage.base_url, trust_env=False) as client:
        async with stage.guard.open(CONTEXT):
            answered = client.post("/chat/completions", json=asked())
            with client.stream("POST", "/chat/completions", json=asked(stream=True)) as response:
                streamed = list(response.iter_bytes())

    assert answered.status_code == 200
    assert streamed
    await stage.settled(calls=2)
    await in_thread(client.close)


async def test_clamped_body_that_cannot_be_changed(offline: Stage, way: Way) -> None:
    """A body in which no limit can be lowered is refused, and nothing is charged: it was not sent."""
    model = "claude-haiku-4-5"
    body = asked(model=model, max_tokens=10_000, fallbacks=[{"model": model, "thinking": "deep"}])

    def provider(request: Any) -> Any:
        raise AssertionError("nothing is to be sent")

    async with over(offline, way, provider, clamp=True) as client, offline.guard.open(CONTEXT, extra=[ROOM]):
        response = await client.post(body, path="/messages")

    assert response.status_code == 400
    assert "thinking" in response.json()["error"]["message"]
    assert await offline.storage.records() == []
    assert (await offline.counters())[:2] == (0, 0)
