"""The mounted gateway: paths, bodies, probes, headers, clients that leave, and who admits what."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from tests.gateway.app_kit import ASKED, CANARY, KEY, RECORD, SECRET, WAYS, Way, service
from tests.gateway.kit import BILLED, PRICES

from asgi_llm_guard import Budget, CacheScope, Guard, GuardMiddleware, Iterations, RateLimit, Route
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway import Deployment, Gateway
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.testing import Behaviour, Disconnect, FakeProvider, asgi_client

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
SMALL = "openai/model-a"
OTHER = "anthropic/model-d"
PATHS = [CHAT, "/v1/responses", "/v1/embeddings", "/v1/messages"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


def body(**fields: Any) -> dict[str, Any]:
    return {"model": SMALL, "messages": ASKED, "max_tokens": 50, **fields}


def is_error_of(path: str, answer: httpx2.Response) -> bool:
    """Whether the body is an error as the API of that path has it."""
    told = answer.json()
    if path.startswith("/v1/messages"):
        return bool(told["type"] == "error" and told["error"]["type"] and told["error"]["message"])
    return bool(told["error"]["message"] and told["error"]["type"] and "code" in told["error"])


# ------------------------------------------------------------------------------------- paths


async def test_unknown_paths_and_methods(way: Way) -> None:
    """What is not there is told in the dialect that the client speaks, and claims nothing."""
    async with service(Iterations(1), way=way) as app:
        http = await app.http()
        spoken = {"anthropic-version": "2023-06-01"}
        for path in ("/v1/nothing", "/v2/messages", "/v1/models/of-nobody", "/", "/v1/messages/batches"):
            got = [await http.get(path), await http.post(path, json={}), await http.get(path, headers=spoken)]
            assert [answer.status_code for answer in got] == [404, 405 if "models" in path else 404, 404]
            assert is_error_of(path, got[0])
            assert is_error_of("/v1/messages", got[2])
        assert (await http.post(f"{CHAT}/", json=body())).status_code == 404
        for path in PATHS:
            answer = await http.get(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert is_error_of(path, answer)
        for path in ("/v1/models", "/healthz", "/readyz"):
            answer = await http.post(path, json={})
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")

        assert (await http.head("/v1/models")).content == b""
        assert app.provider.calls == 0
        assert await app.records() == []


async def test_probes_are_free(way: Way) -> None:
    """M16: health and readiness answer everybody, though every budget is spent, and claim nothing."""
    async with service(Budget("$0.0000001/daily"), RateLimit("1/day"), Iterations(1), way=way) as app:
        http = await app.http()
        del http.headers["authorization"]
        for _ in range(3):
            assert (await http.get("/healthz")).json() == {"status": "ok"}
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["ready"], ready.json()["deployments"]) == (200, True, 3)
            assert (await http.get("/v1/models")).status_code == 200


async def test_not_ready() -> None:
    """D6: without deployments, or while it goes down, it is alive and not ready; calls say so in their dialect."""
    guard = Guard([Iterations(5)])
    gateway = Gateway(guard)
    async with guard, gateway, asgi_client(gateway.app()) as http:
        assert (await http.get("/healthz")).status_code == 200
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"], ready.json()["deployments"]) == (503, False, 0)
        answer = await http.post("/v1/messages", json=body())
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")

        gateway.initialise([{"provider": "ollama", "model_name": "llama", "api_base": "http://127.0.0.1:1"}])
        assert (await http.get("/readyz")).status_code == 200
        await guard.drain(0)
        assert (await http.get("/readyz")).json()["draining"] is True
        assert (await http.get("/healthz")).status_code == 200


class Words:
    """Counts words for tokens."""

    def count(self, text: bytes) -> int:
        return len(text.split())


async def test_tokens_are_counted_where_they_can_be() -> None:
    """`count_tokens` is free where the guard counts tokens, and a bound; without a counter the path is not there."""
    async with service(Iterations(1)) as app:
        http = await app.http()
        assert (await http.post("/v1/messages/count_tokens", json=body())).status_code == 404

    async with service(Iterations(1), guard={"counter": Words()}) as app:
        http = await app.http()
        for _ in range(3):
            answer = await http.post("/v1/messages/count_tokens", json=body(model=OTHER))
            assert answer.status_code == 200
            assert 5 <= answer.json()["input_tokens"] < 200
        assert (await http.post("/v1/messages/count_tokens", content=b"{")).status_code == 400
        assert app.provider.calls == 0
        assert await app.records() == []


# ------------------------------------------------------------------------------------- bodies


async def test_bodies_that_are_refused(way: Way) -> None:
    """Malformed, encoded, other or too large bodies get 400, 415 and 413 in the dialect, and reach nobody."""
    headers = {"content-type": "application/json"}
    good = msgspec.json.encode(body(input="hello"))
    cases: list[tuple[int, bytes, dict[str, str]]] = [
        (400, b"{", headers),
        (400, b"[]", headers),
        (400, b"", headers),
        (400, b'{"model":"a","model":"b","messages":[]}', headers),
        (400, b'{"model":7,"messages":[]}', headers),
        (400, b'{"messages":[],"input":"x"}', headers),
        (400, b'{"model":"a","messages":[{"role":"user","content":"\xff"}]}', headers),
        (400, b'{"model":"a","metadata":' + b'{"a":' * 3000 + b"1" + b"}" * 3001, headers),
        (415, good, {"content-type": "text/plain"}),
        (415, good, {"content-type": "application/x-www-form-urlencoded"}),
        (415, good, {**headers, "content-encoding": "gzip"}),
        (413, b'{"model":"a","messages":"' + b"x" * 4000 + b'"}', headers),
    ]
    async with service(Iterations(1), way=way, guard={"max_body_bytes": 30_000}) as app:
        http = await app.http()
        for path in PATHS:
            for status, content, sent in cases:
                padded = content if status != 413 else content.replace(b"x", b"x" * 8)
                answer = await http.post(path, content=padded, headers=sent)
                assert (answer.status_code, is_error_of(path, answer)) == (status, True), (path, content[:40])

        assert app.provider.calls == 0
        assert await app.records() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"api_base": "http://169.254.169.254/"},
        {"api_key": "sk-mine"},
        {"extra_body": {"model": "openai/model-c"}},
        {"extra_headers": {"authorization": "Bearer x"}},
        {"metadata": {"deep": [{"base_url": "http://169.254.169.254/"}]}},
        {"provider_options": {"openai": {"api_base": "http://169.254.169.254/"}}},
    ],
)
async def test_clients_do_not_say_where(fields: dict[str, Any]) -> None:
    """T14: a field that names an address or a key, at any depth, is a 400, and no socket is opened."""
    async with service(Budget("$1/daily")) as app:
        http = await app.http()
        for path in PATHS:
            asked = {"model": SMALL, "input": "hello", "messages": ASKED, "max_tokens": 5, **fields}
            answer = await http.post(path, json=asked)
            assert (answer.status_code, is_error_of(path, answer)) == (400, True)
            assert "169.254" not in answer.text

        assert app.provider.calls == 0
        assert await app.records() == []


async def test_headers_of_clients_stay_here() -> None:
    """What a client sends to be known by does not reach a provider, whose own key does."""
    async with service() as app:
        http = await app.http()
        sent = {
            "cookie": "a=b",
            "x-forwarded-for": "10.1.1.1",
            "openai-organization": "org",
            "traceparent": "00-1-2-01",
        }
        assert (await http.post(CHAT, json=body(), headers=sent)).status_code == 200

        (request,) = app.provider.requests
        assert request.headers["authorization"] == f"Bearer {CANARY}-berlin"
        assert request.headers["traceparent"] == "00-1-2-01"
        assert not {"x-forwarded-for", "cookie", "openai-organization"} & request.headers.keys()


# ------------------------------------------------------------------------------------- canary


async def test_keys_are_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """T15: no answer, error, header, log line or record has a provider's key or address in it."""
    caplog.set_level(logging.DEBUG, "asgi_llm_guard")
    async with service(
        Budget("$1/daily"), expose=True, deployments={"geneva": {"api_base": "http://127.0.0.1:1"}}
    ) as app:
        http = await app.http()
        seen: list[str] = []
        told = Behaviour.error(401, message=f"Incorrect API key provided: {CANARY}-berlin")
        behaviours = [
            Behaviour.answer(),
            told,
            Behaviour.error(500),
            Behaviour.cut(after_chunks=1),
            Behaviour.malformed(),
        ]
        for stream in (False, True):
            for behaviour in behaviours:
                for path, model in ((CHAT, SMALL), ("/v1/messages", OTHER)):
                    app.provider.script(behaviour)
                    answer = await http.post(path, json=body(model=model, stream=stream))
                    seen.append(f"{answer.headers}{answer.text}")
            answer = await http.post(CHAT, json=body(model="openai/model-c", stream=stream))
            assert answer.status_code == 502
            seen.append(f"{answer.headers}{answer.text}")
        for path in ("/v1/models", "/readyz"):
            seen.append((await http.get(path)).text)
        seen += [str(record) for record in await app.records()]
        seen += [str(app.gateway.deployments), repr(app.gateway), caplog.text]

        assert [text for text in seen if CANARY in text] == []
        assert [text for text in seen[:-3] if "127.0.0.1" in text] == []


# ------------------------------------------------------------------------------------ expose


async def test_exposure() -> None:
    """D8: asked for, answers tell who has answered, after how many attempts and when; otherwise they do not."""
    async with service(expose=True, fallbacks={SMALL: [OTHER]}) as app:
        http = await app.http()
        app.provider.when(lambda request: request.model == "model-a", Behaviour.error(500))
        whole = await http.post(CHAT, json=body())
        streamed = await http.post(CHAT, json=body(stream=True))
        for answer in (whole, streamed):
            assert answer.headers["x-guard-deployment"] == "lugano"
            assert answer.headers["x-guard-model"] == OTHER
            assert answer.headers["x-guard-attempts"] == "2"
            assert float(answer.headers["x-guard-first-byte-ms"]) >= float(answer.headers["x-guard-connected-ms"]) > 0
        assert "x-guard-total-ms" in whole.headers
        assert "x-guard-total-ms" not in streamed.headers

    async with service() as app:
        http = await app.http()
        answer = await http.post(CHAT, json=body())
        assert [name for name in answer.headers if name.startswith("x-guard")] == []


async def test_exposure_of_failures() -> None:
    """Where nobody answers, deployments are named only if that was asked for."""
    for expose in (False, True):
        async with service(expose=expose) as app:
            app.provider.script(Behaviour.error(500))
            answer = await (await app.http()).post(CHAT, json=body())
            assert (answer.status_code, "berlin" in answer.text) == (502, expose)


def test_options_are_checked() -> None:
    """A wrong option is told when the application is made."""
    with pytest.raises(ConfigurationError, match="expose"):
        Gateway(Guard()).app(expose="yes")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize(("path", "model"), [(CHAT, SMALL), (CHAT, OTHER), ("/v1/messages", OTHER)])
async def test_first_words_do_not_wait(path: str, model: str) -> None:
    """The client has the first word while the provider has not written the second."""
    async with service(Budget("$1/daily")) as app:
        app.provider.script(Behaviour.slow())
        http = await app.http()
        app.provider.release(1)
        async with http.stream("POST", path, json=body(model=model, stream=True)) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            pieces = answer.aiter_text()
            seen = ""
            while "Echo: " not in seen:
                seen += await anext(pieces)
            assert "Say" not in seen
            app.provider.release()
            seen += "".join([piece async for piece in pieces])

        assert "here" in seen
        await app.check_books()


@pytest.mark.parametrize("model", [SMALL, OTHER])
async def test_client_that_leaves_a_stream(way: Way, model: str) -> None:
    """T18: a client that leaves after the second chunk: the provider's connection is closed, what came is charged."""
    async with service(Budget("$1/daily"), way=way) as app:
        app.provider.script(Behaviour.slow())
        http = await app.http()
        app.provider.release(2)
        async with http.stream("POST", CHAT, json=body(model=model, stream=True)) as answer:
            seen = ""
            async for piece in answer.aiter_text():
                seen += piece
                if '"Say ' in seen:
                    break
        await app.provider.until(lambda: app.provider.disconnects == 1)

        (record,) = await app.records()
        assert record.outcome == "estimated"
        assert 0 < app.provider.total_nanousd <= (record.cost_nanousd or 0) < (record.estimate_nanousd or 0)


async def test_client_that_leaves_before_the_first_word() -> None:
    """A client that does not wait for a stream ends it, before anything has come of it."""
    async with service(Budget("$1/daily")) as app:
        app.provider.script(Behaviour.hang())
        http = await app.http()
        asked = asyncio.create_task(http.post(CHAT, json=body(stream=True)))
        await app.provider.until(lambda: app.provider.open == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await app.provider.until(lambda: app.provider.disconnects == 1)

        (record,) = await app.records()
        assert (record.cost_nanousd or 0) >= app.provider.total_nanousd > 0


@pytest.mark.parametrize("raises", [True, False])
async def test_client_that_leaves_a_whole_answer(raises: bool) -> None:
    """An answer that is not streamed is read to its end though its client has left, and charged exactly."""
    async with in_process(Budget("$1/daily")) as (gateway, provider):
        await call(Disconnect(gateway.app(), after_messages=0, raises=raises), body())

        (record,) = await gateway.guard.storage.records()
        assert (record.outcome, record.cost_nanousd) == ("measured", provider.total_nanousd)


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
async def test_servers_tell_of_leaving_in_two_ways(after: int, raises: bool) -> None:
    """Whether `send` raises or `receive` tells, the stream is ended, and settled once; too early, it is not begun."""
    async with in_process(Budget("$1/daily")) as (gateway, provider):
        provider.script(Behaviour.slow())
        provider.release(2 if after else 0)
        await call(Disconnect(gateway.app(), after_messages=after, raises=raises), body(stream=True))
        await provider.idle()

        records = await gateway.guard.storage.records()
        assert await gateway.guard.storage.open_holds() == 0
        assert provider.calls == provider.disconnects == len(records) == (1 if after else 0)
        assert [record for record in records if (record.cost_nanousd or 0) < provider.total_nanousd] == []


async def call(app: Any, asked: dict[str, Any]) -> None:
    """A request without a client library, whose errors may leave the application as they do in a server."""
    async with asgi_client(app) as http:
        try:
            await http.post(CHAT, json=asked)
        except (OSError, AssertionError):  # the client has left; the transport in this process misses its answer
            return


@pytest.mark.parametrize("model", [SMALL, OTHER])
async def test_rules_of_the_guard_for_streams(way: Way, model: str) -> None:
    """With deadlines and cuts, which the middleware watches as well, a stream is metered and charged once."""
    rules = StreamRules(cut=True, idle_s=30, total_s=60)
    async with service(Budget("$1/daily"), way=way, guard={"streams": rules}) as app:
        http = await app.http()
        answer = await http.post(CHAT, json=body(model=model, stream=True))
        assert answer.text.endswith("data: [DONE]\n\n")
        await app.check_books()


async def test_streams_that_are_read_on(way: Way) -> None:
    """Where the guard says so, a stream whose client has left is read to its end, and charged exactly."""
    async with service(Budget("$1/daily"), way=way, guard={"streams": StreamRules(drain="read", total_s=60)}) as app:
        app.provider.script(Behaviour.slow())
        http = await app.http()
        app.provider.release(2)
        async with http.stream("POST", CHAT, json=body(stream=True)) as answer:
            async for piece in answer.aiter_text():
                if "Say " in piece:
                    break
        app.provider.release()

        (record,) = await app.records()
        assert (record.outcome, app.provider.disconnects) == ("measured", 0)
        await app.check_books()


async def test_answers_that_are_kept(way: Way) -> None:
    """C14: an answer that the guard has kept is given again, whole or streamed, costs nothing, and says so."""
    policies = (CacheScope(), Budget("$1/daily"))
    async with service(*policies, way=way, expose=True, guard={"cache": Cache(streams=True)}) as app:
        http = await app.http()
        for stream in (False, True):
            first, second = [await http.post(CHAT, json=body(stream=stream)) for _ in range(2)]
            assert first.text == second.text
            assert "x-guard-cached" not in first.headers
            assert (second.headers["x-guard-cached"], second.headers["x-guard-attempts"]) == ("true", "0")

        assert app.provider.calls == 2
        await app.check_books()


# ---------------------------------------------------------------------------- who admits


async def test_a_guard_that_lets_it_pass_is_no_admission() -> None:
    """A middleware that lists other routes has claimed nothing for ours; the gateway then admits them itself."""
    async with in_starlette([RateLimit("1/day")], routes=[Route("/elsewhere")]) as (http, guard, provider):
        got = [(await http.post(f"/llm{CHAT}", json=body())).status_code for _ in range(2)]
        assert got == [200, 429]
        assert provider.calls == len(await guard.storage.records()) == 1


async def test_another_guard_around_it_counts_for_itself() -> None:
    """The middleware of another guard does not stand in for the gateway's own."""
    other = Guard([RateLimit("5/day", per="caller")])
    async with other, in_starlette([RateLimit("1/day")], around=other) as (http, guard, provider):
        got = [(await http.post(f"/llm{CHAT}", json=body())).status_code for _ in range(2)]
        assert got == [200, 429]
        assert provider.calls == len(await guard.storage.records()) == 1
        assert provider.total_nanousd == sum(record.cost_nanousd or 0 for record in await guard.storage.records())


async def test_the_middleware_around_may_not_read_bodies() -> None:
    """Where the middleware has claimed without reading the body, the gateway's call is what is held and charged."""
    route = Route(f"/llm{CHAT}", dialect=None)
    async with in_starlette([Budget("$1/daily"), RateLimit("2/day")], routes=[route]) as (http, guard, provider):
        got = [await http.post(f"/llm{CHAT}", json=body()) for _ in range(3)]
        assert [answer.status_code for answer in got] == [200, 200, 429]
        assert provider.total_nanousd == sum(record.cost_nanousd or 0 for record in await guard.storage.records()) > 0


async def test_bodies_that_nobody_has_read_are_bounded() -> None:
    """The gateway bounds bodies itself, where the middleware around does not read them."""
    async with in_starlette([], routes=[Route(f"/llm{CHAT}", dialect=None)]) as (http, _, provider):
        answer = await http.post(f"/llm{CHAT}", json=body(user="x" * 9_000_000))
        assert (answer.status_code, answer.json()["error"]["code"], provider.calls) == (413, "body_too_large", 0)


async def test_refusals_of_a_deployment_give_back_what_was_held(tmp_path: Path) -> None:
    """Where calls may be made that nobody sees, a call that the gateway refuses is known not to have been made."""
    route = Route(f"/llm{CHAT}", calls="opaque")
    policies = [Budget("$1/daily")]
    storage = f"sqlite:///{tmp_path / 'guard.db'}"  # which the refusal is waited for
    budget = "$0.0000001/1d"
    async with in_starlette(policies, routes=[route], storage=storage, budget=budget) as (http, guard, provider):
        answer = await http.post(f"/llm{CHAT}", json=body())
        assert (answer.status_code, provider.calls) == (402, 0)
        assert await guard.storage.records() == []
        assert await guard.storage.open_holds() == 0


@contextlib.asynccontextmanager
async def in_process(
    *policies: Policy, storage: str = "memory://", **fields: Any
) -> AsyncIterator[tuple[Gateway, FakeProvider]]:
    """A gateway of one deployment."""
    provider = FakeProvider(prices=BILLED)
    async with provider.serve() as url:
        deployment = Deployment(provider="openai", model="model-a", api_base=str(url), api_key="k", **fields)
        identity = ApiKeys([RECORD], secret=SECRET)
        guard = Guard(policies, storage=storage, prices=PRICES, identity=identity)
        async with guard, Gateway(guard, [deployment]) as gateway:
            yield gateway, provider


@contextlib.asynccontextmanager
async def in_starlette(
    policies: Sequence[Policy], *, routes: Sequence[Route] | None = None, around: Guard | None = None, **fields: Any
) -> AsyncIterator[tuple[httpx2.AsyncClient, Guard, FakeProvider]]:
    """The gateway mounted under `/llm`, in an application with a middleware of its guard, or another one, around."""
    async with in_process(*policies, **fields) as (gateway, provider):
        middleware = Middleware(GuardMiddleware, guard=around or gateway.guard, routes=routes)
        app = Starlette(routes=[Mount("/llm", gateway.app())], middleware=[middleware])
        async with asgi_client(app) as http:
            http.headers["authorization"] = f"Bearer {KEY}"
            yield http, gateway.guard, provider


async def test_websockets_are_closed() -> None:
    """It speaks HTTP only, and says so to what does not."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await Gateway(Guard()).app()({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


async def test_what_nobody_foresaw() -> None:
    """An error of ours is a 500 in the dialect, without its words, which are in the log."""

    class Broken:
        def dialect(self, deployment: Deployment, asked: str) -> str:
            raise RuntimeError(f"with a secret: {CANARY}")

        async def send(self, deployment: Deployment, request: object) -> Any: ...

        async def aclose(self) -> None: ...

    broken: Any = Broken()
    guard = Guard()
    deployment = Deployment(provider="mine", model="m", api_base="http://127.0.0.1:1", via="mine")
    gateway = Gateway(guard, [deployment], providers={"mine": broken})
    async with guard, gateway, asgi_client(gateway.app()) as http:
        for path in (CHAT, "/v1/messages"):
            answer = await http.post(path, json=body(model="mine/m"))
            assert (answer.status_code, is_error_of(path, answer), CANARY in answer.text) == (500, True, False)
