"""What providers, clients and operators may do to a gateway that nobody expects of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.gateway.app_kit import service
from tests.gateway.kit import CONTEXT, MESSAGES, fleet
from tests.gateway.test_app import CHAT, Words, body
from tests.gateway.test_gateway import own
from tests.gateway.test_router import in_order

from asgi_llm_guard import Budget, Iterations
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway import CooldownRules, Deployment, Gateway, ProviderFailed, RetryRules, TierDown
from asgi_llm_guard.testing import Behaviour, FrozenClock

pytestmark = pytest.mark.anyio

NO_RETRY = RetryRules(retries=0)
CHUNK = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(1_800_000_000_000)


# -------------------------------------------------------------------------------------- providers


class Upstreamed:
    """Somebody's own provider: its answer gives `pieces`, raises `error` after them, and `closing` when it is closed."""

    def __init__(
        self, *pieces: bytes, error: Exception | None = None, closing: Exception | None = None, kind: bytes = b""
    ) -> None:
        self.pieces = pieces
        self.error = error
        self.closing = closing
        self.headers = ((b"content-type", kind or b"text/event-stream"),)

    def dialect(self, deployment: Deployment, asked: str) -> str | None:
        return asked

    async def send(self, deployment: Deployment, request: Any) -> Any:
        return _Upstream(self)

    async def aclose(self) -> None:
        pass


class _Upstream:
    status = 200
    dialect = "openai"
    path = "/chat/completions"

    def __init__(self, made: Upstreamed) -> None:
        self._made = made
        self.headers = made.headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._made.pieces:
            yield piece
        if self._made.error is not None:
            raise self._made.error

    async def aclose(self) -> None:
        if self._made.closing is not None:
            raise self._made.closing


@pytest.mark.parametrize("streamed", [False, True])
async def test_answer_of_an_own_provider_may_raise_anything(clock: FrozenClock, streamed: bool) -> None:
    """C4: whatever somebody's own answer raises before its first words is a failure, and its text is told to nobody."""
    provider = Upstreamed(error=RuntimeError("secret of its own"))
    guard, gateway = own(clock, provider, context=CONTEXT)
    with pytest.raises(ProviderFailed) as failed:
        if streamed:
            [chunk async for chunk in gateway.stream("mine/model", MESSAGES)]
        else:
            await gateway.chat("mine/model", MESSAGES)

    assert len(failed.value.failures) == 1
    assert "secret" not in str(failed.value) + failed.value.failures[0].message
    assert await guard.storage.open_holds() == 0
    await guard.aclose()


@pytest.mark.parametrize("streamed", [False, True])
async def test_answer_that_cannot_be_closed_is_settled(clock: FrozenClock, streamed: bool) -> None:
    """An answer whose closing fails is settled like any other, and not charged twice."""
    provider = Upstreamed(CHUNK, error=RuntimeError("broken"), closing=OSError("closing"))
    guard, gateway = own(clock, provider)
    async with guard.open(CONTEXT):
        if streamed:
            chunks = [chunk async for chunk in gateway.stream("mine/model", MESSAGES)]
            assert chunks[-1].error is not None
        else:
            with pytest.raises(ProviderFailed):
                await gateway.chat("mine/model", MESSAGES)
        await asyncio.sleep(0)
        assert await guard.storage.open_holds() == 0
    assert len(await guard.storage.records()) == 1
    await guard.aclose()


@pytest.mark.parametrize("value", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "-7", "nan", "1e999"])
async def test_retry_after_that_nobody_can_read(clock: FrozenClock, value: str) -> None:
    """D3: a `Retry-After` that is no time is none: the next deployment answers."""
    async with in_order(clock, "a", "b") as made:
        made["a"].script(Behaviour.error(503, retry_after=value))
        assert (await made.chat("auto")).deployment == "b"
        await made.settled()


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("key", ["openai/model-a", "OpenAI/Model-A", "model-a", "openai:model-a", "MODEL-A"])
@pytest.mark.parametrize("asked", ["openai/model-a", "model-a", "openai:model-a", "small"])
async def test_fallbacks_are_found_in_any_spelling(clock: FrozenClock, key: str, asked: str) -> None:
    """C2: the fallbacks of a model are found however the model is spelled, there and in the request."""
    options: dict[str, Any] = {"aliases": {"small": "model-a"}, "fallbacks": {key: ["openai/model-b"]}}
    async with fleet(clock, "a", "b", retry=NO_RETRY, **options) as made:
        made["a"].script(Behaviour.error(500))
        assert (await made.chat(asked)).deployment == "b"


@pytest.mark.parametrize("key", ["Team", "team"])
@pytest.mark.parametrize("asked", ["Team", "team", "TEAM"])
async def test_rules_of_a_group_hold_in_any_spelling(clock: FrozenClock, key: str, asked: str) -> None:
    """D2: retries and fallbacks of a group are found in any case, as the group itself is."""
    options: dict[str, Any] = {"retry": RetryRules(groups={key: NO_RETRY}), "fallbacks": {key: ["model-b"]}}
    async with fleet(clock, "a", "b", limits={"a": {"groups": ("Team",)}}, **options) as made:
        made["a"].script(Behaviour.error(500), Behaviour.error(500))
        assert (await made.chat(asked)).deployment == "b"
        assert made["a"].calls == 1


async def test_tier_down_is_found_in_any_spelling(clock: FrozenClock) -> None:
    """The cheaper model of a model is found however the model is spelled."""
    lower = TierDown(to={"openai/model-c": "openai/model-a"}, at=0.000001)
    async with fleet(clock, "a", "c", policies=[Budget("$1/1d")], tier_down=lower) as made:
        for name in ("model-c", "OpenAI/model-c", "openai:model-c"):
            assert (await made.chat(name)).deployment == "a"


async def test_any_model_of_a_name_that_is_none() -> None:
    """C1: a name that no model can have is unknown, also where every model of a provider is served."""
    async with service(deployments={"berlin": {"model": "*"}}) as app:
        http = await app.http()
        for name in ("openai/a b", "openai/a\x7f", "openai/\tx y", "openai/" + "x" * 255, "openai/é\n"):
            answer = await http.post(CHAT, json=body(model=name))
            told = (answer.status_code, answer.json()["error"]["code"])
            assert told in ((400, "invalid_request"), (404, "model_not_found")), name


async def test_nobody_serves_it() -> None:
    """C1: a model that nobody serves is unknown, with whatever policies: 404, and nothing is claimed."""
    for policies in ((), (Budget("$1/1d"),), (Iterations(5),)):
        async with service(*policies) as app:
            http = await app.http()
            for name in ("openai/nobody", "nobody", "x/y/z"):
                answer = await http.post(CHAT, json=body(model=name))
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), policies
            assert await app.records() == []


# ---------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("limit", [{"rpm": 0}, {"tpm": 1}, {"budget": "$0/1d"}])
async def test_who_may_not_be_asked_is_no_alternative(clock: FrozenClock, limit: dict[str, Any]) -> None:
    """Conformance 80: where our limits keep every other deployment, the one that failed is asked again, as if alone."""
    async with fleet(clock, "a", "b", limits={"b": limit}, cooldowns=CooldownRules(cooldown_s=0)) as made:
        made["a"].script(Behaviour.error(503), Behaviour.error(503))
        assert (await made.chat("auto")).deployment == "a"
        assert len(made.slept) == 2
        made["a"].script(*[Behaviour.error(500)] * 9)
        with pytest.raises(ProviderFailed) as failed:
            await made.chat("auto", fallbacks=False)
        assert len(failed.value.failures) == 4
        assert made["b"].calls == 0
        await made.settled()


# ------------------------------------------------------------------------------------ at run time


async def test_cheaper_model_that_is_gone(clock: FrozenClock) -> None:
    """A cheaper model whose last deployment is removed lowers nothing, and the model itself is served as before."""
    async with fleet(clock, "a", "c", tier_down=TierDown(to={"openai/model-c": "openai/model-a"})) as made:
        made.gateway.remove("a")
        assert (await made.chat("openai/model-c")).deployment == "c"


async def test_removed_deployment_is_not_asked_again(clock: FrozenClock) -> None:
    """From its removal on a deployment is not asked, by calls that wait before their next attempt neither."""
    async with fleet(clock, "a", limits={"a": {"rpm": 100}}) as made:
        slept = made.sleep

        async def sleep(seconds: float) -> None:
            await slept(seconds)
            made.gateway.remove("a")

        made.gateway = Gateway(made.guard, made.deployments.values(), sleep=sleep)
        made["a"].script(Behaviour.error(500))
        with pytest.raises(ProviderFailed):
            await made.chat("a")
        assert made["a"].calls == 1
        await made.gateway.aclose()
        await made.settled()


async def test_added_before_the_rest(clock: FrozenClock) -> None:
    """D6: what is added before `initialise` is not all that there is."""
    async with fleet(clock, "a", "b") as made:
        gateway = Gateway(made.guard)
        gateway.add(made.deployments["a"])
        assert gateway.initialise([made.deployments["b"]]) == 2


async def test_limits_that_cannot_be_kept_add_nobody(clock: FrozenClock) -> None:
    """A deployment whose limits cannot be counted is not added, rather than served without them."""
    async with fleet(clock, "a") as made:
        with pytest.raises(ConfigurationError):
            made.gateway.add(Deployment(provider="openai", model="model-b", name="n" * 240, api_key="k", rpm=1))
        assert len(made.gateway) == 1


# --------------------------------------------------------------------------------------- exposure


@pytest.mark.parametrize("streamed", [False, True])
async def test_names_of_deployments_stay_here(streamed: bool) -> None:
    """T15: no error tells a client where a request went, however little the provider says of it."""
    async with service() as app:
        http = await app.http()
        for code in (None, "context_length_exceeded"):
            app.provider.script(Behaviour.error(400, code=code, message=""))
            answer = await http.post(CHAT, json=body(stream=streamed))
            assert answer.status_code == 400
            assert "berlin" not in answer.text


async def test_names_of_deployments_that_speak_otherwise_stay_here() -> None:
    """T15: a dialect that a deployment does not take is told without its name."""
    async with service() as app:
        http = await app.http()
        answer = await http.post("/v1/embeddings", json={"model": "anthropic/model-d", "input": "x"})
        assert answer.status_code == 400
        assert "lugano" not in answer.text


async def test_strangers_count_no_tokens() -> None:
    """What is not for everybody asks who is there: `count_tokens` as the list of models does."""
    async with service(Iterations(1), guard={"counter": Words()}) as app:
        http = await app.http()
        answer = await http.post(
            "/v1/messages/count_tokens", json=body(), headers={"authorization": "Bearer of-nobody"}
        )
        assert answer.status_code in {401, 403}
