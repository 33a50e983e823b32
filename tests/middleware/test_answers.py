"""What the middleware answers: refusals in every shape, the rate-limit fields, and errors that are not its own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount
from starlette.routing import Route as Path
from tests.decorator.values import BOUND, ledger
from tests.middleware.asgi import App, request, start
from tests.middleware.values import CHAT, EVENTS, SSE_HEADERS, Provider, ask, guarded, new_guard, raises

from asgi_llm_guard import (
    Budget,
    Concurrency,
    Context,
    Denied,
    DepartmentQuota,
    Guard,
    GuardMiddleware,
    Iterations,
    LimitExceeded,
    ModelAllow,
    ProviderBudget,
    Quota,
    QuotaBook,
    RateLimit,
    Route,
    current_admission,
)
from asgi_llm_guard import guarded as guarded_function
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import TrustedHeaders
from asgi_llm_guard.middleware import STATE_KEY

pytestmark = pytest.mark.anyio


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "path, accept, expected",
    [
        (CHAT, [], "application/json"),
        (CHAT, [b"application/json"], "application/json"),
        (CHAT, [b"application/problem+json"], "application/problem+json"),
        (CHAT, [b"text/html", b"application/problem+json"], "application/problem+json"),
        (CHAT, [b"application/problem+json;q=0.5", b"application/json"], "application/json"),
        ("/agents", [], "application/problem+json"),
        ("/agents", [b"application/json"], "application/problem+json"),
    ],
)
async def test_shape_of_a_refusal(path: str, accept: list[bytes], expected: str) -> None:
    """The dialect's own shape, or a problem document where none is known or the client ranks it first."""
    app = guarded(Provider(), new_guard(Iterations(1)))
    headers = [(b"accept", line) for line in accept]
    assert (await ask(app, path=path, headers=headers)).status == 200
    exchange = await ask(app, path=path, headers=headers)
    assert (exchange.status, exchange.headers["content-type"]) == (429, expected)
    told = exchange.json if expected != "application/json" else exchange.json["error"]
    assert told["code"] == "session_iterations_exhausted"


async def test_refusal_names_session_count_and_limit() -> None:
    """A1, A9: call number limit+1 is refused, names session, count and limit, and moves no counter."""
    guard = new_guard(Iterations(2))
    app = guarded(Provider(), guard)
    exchanges = [await ask(app, path="/agents") for _ in range(4)]
    assert [exchange.status for exchange in exchanges] == [200, 200, 429, 429]
    for exchange in exchanges[2:]:
        told = exchange.json
        assert {name: told[name] for name in ("scope", "subject", "limit", "used", "held")} == {
            "scope": "session",
            "subject": "s",
            "limit": 2,
            "used": 2,
            "held": 0,
        }
        assert "session 's'" in told["detail"]
        assert exchange.headers["x-should-retry"] == "false"
    assert len(await ledger(guard)) == 2


async def test_head_has_no_body() -> None:
    """A refused HEAD request gets the headers alone."""
    app = guarded(Provider(), new_guard(Iterations(0)), routes=[Route("/read", methods=["GET"])])
    exchange = await ask(app, path="/read", method="HEAD")
    assert (exchange.status, exchange.body) == (429, b"")
    assert int(exchange.headers["content-length"]) > 100


@pytest.mark.parametrize(
    "sent, expected",
    [
        ([b"req-1.2:3"], "req-1.2:3"),
        ([], None),
        ([b"one", b"two"], None),
        ([b"a b"], None),
        ([b"x\r\nset-cookie: a=b"], None),
        ([b"<script>"], None),
        ([b"x" * 129], None),
        (["é".encode()], None),
    ],
)
async def test_request_id(sent: list[bytes], expected: str | None) -> None:
    """T16: a request id that is harmless names the refusal and stands in the record; any other is left out."""
    guard = new_guard(Iterations(1))
    app = guarded(Provider(), guard)
    headers = [(b"x-request-id", line) for line in sent]
    await ask(app, path="/agents", headers=headers)
    exchange = await ask(app, path="/agents", headers=headers)
    assert (exchange.status, exchange.json.get("instance")) == (429, expected)
    (record,) = await guard.storage.records()
    assert record.request_id == expected


@pytest.mark.parametrize(
    "policy, statuses, expected",
    [
        (Iterations(0), {}, 429),
        (Iterations(0), {"iterations": 403}, 403),
        (Iterations(0, status=418), {"iterations": 403}, 418),
        (Budget("$0/1d", per="caller"), {}, 402),
        (Budget("$0/1d", per="caller"), {"request_exceeds_budget": 429}, 429),
        (ModelAllow(["openai/other"]), {}, 403),
        (RateLimit("0/minute", per="caller"), {"rate": 503}, 503),
    ],
)
async def test_statuses(policy: Any, statuses: dict[str, int], expected: int) -> None:
    """The table's status, another one for the whole guard by kind or code, or the policy's own."""
    assert (await ask(guarded(Provider(), new_guard(policy, statuses=statuses)))).status == expected


def departments() -> Guard:
    book = QuotaBook({"research": DepartmentQuota(daily_tokens=1)})
    identity = TrustedHeaders(trust_headers=True, caller="x-user", departments="x-departments")
    return new_guard(Quota(book), identity=identity)


USER = [(b"x-user", b"alice"), (b"x-departments", b"research")]


@pytest.mark.parametrize("disclose", ["owned", "all"])
async def test_disclose(disclose: str) -> None:
    """C6: a refused quota names department, kind, period, limit and count, the numbers only where they may be shown."""
    guard = departments()
    guard.engine.telling.disclose = disclose  # type: ignore[assignment]
    exchange = await ask(guarded(Provider(), guard), headers=USER)
    told = exchange.json["error"]["guard"]
    assert (exchange.status, told["scope"], told["unit"]) == (429, "department", "tokens")
    assert ("limit" in told, "subject" in told) == ((True, True) if disclose == "all" else (False, False))


async def test_no_departments() -> None:
    """C8: without departments there is no quota check, and usage is recorded once without one."""
    guard = departments()
    assert (await ask(guarded(Provider(), guard), headers=USER[:1])).status == 200
    (record,) = await guard.storage.records()
    assert (record.caller, record.departments, record.outcome) == ("alice", (), "measured")


async def test_identity_that_does_not_hold() -> None:
    """A malformed id is a 400 on guarded routes; elsewhere the request passes as the anonymous caller."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope[STATE_KEY].context)
        await Provider([b"{}"])(scope, receive, send)

    guard = new_guard(identity=TrustedHeaders(trust_headers=True, caller="x-user"))
    middleware = guarded(app, guard)
    twice = [(b"x-user", b"alice"), (b"x-user", b"bob")]
    assert (await ask(middleware, headers=twice)).status == 400
    assert (await ask(middleware, headers=twice, method="GET")).status == 200
    assert seen == [Context()]


async def test_draining() -> None:
    """An instance that shuts down refuses new requests with 503 and a short Retry-After, and takes nothing."""
    guard = new_guard(Iterations(5))
    app = guarded(Provider(), guard)
    assert (await ask(app)).status == 200
    await guard.drain()
    exchange = await ask(app)
    assert (exchange.status, exchange.json["error"]["code"]) == (503, "guard_draining")
    assert exchange.headers["retry-after"] == "1"
    assert (await ask(app, method="GET")).status == 200
    assert len(await ledger(guard)) == 1


async def test_lifespan_shutdown_drains() -> None:
    """The end of the application's lifespan drains the guard."""
    guard = new_guard()
    app = Starlette()
    app.add_middleware(GuardMiddleware, guard=guard)
    assert [message["type"] for message in await start(app)] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert guard.draining


# --------------------------------------------------------------------------------- fields


async def test_rate_limit_fields() -> None:
    """Admitted and refused responses say what is allowed and left; the application's own headers stay."""
    provider = Provider([b"{}"], headers=[(b"x-own", b"1")])
    identity = TrustedHeaders(trust_headers=True, caller="x-user")
    guard = new_guard(RateLimit("2/minute", per="caller", name="rpm"), identity=identity)
    app = guarded(provider, guard)
    exchanges = [await ask(app, path="/agents", headers=USER) for _ in range(3)]
    assert [exchange.status for exchange in exchanges] == [200, 200, 429]
    assert [exchange.headers["ratelimit"].split(";")[1] for exchange in exchanges] == ["r=1", "r=0", "r=0"]
    assert {exchange.headers["ratelimit-policy"] for exchange in exchanges} == {'"rpm";q=2;w=60'}
    assert exchanges[0].headers["x-own"] == "1"
    assert "retry-after" not in exchanges[0].headers
    assert 1 <= int(exchanges[2].headers["retry-after"]) <= 70


async def test_rate_limit_fields_can_be_switched_off() -> None:
    """`rate_limit_headers=False` leaves the fields out everywhere; `Retry-After` stays."""
    guard = new_guard(RateLimit("1/minute", per="caller"), identity=TrustedHeaders(trust_headers=True, caller="x-user"))
    app = guarded(Provider(), guard, rate_limit_headers=False)
    exchanges = [await ask(app, headers=USER) for _ in range(2)]
    assert [exchange.status for exchange in exchanges] == [200, 429]
    for exchange in exchanges:
        assert not {"ratelimit", "ratelimit-policy"} & exchange.headers.keys()
    assert "retry-after" in exchanges[1].headers


async def test_extra_policies_of_a_route() -> None:
    """A route's own policies come on top of the guard's, each route's with its own."""
    guard = new_guard(Iterations(5))
    routes = [
        Route("/narrow", extra=[Iterations(1, name="narrow")]),
        Route("/wide", methods=["POST"]),
        Route("/wide", methods=["PUT"], extra=[Iterations(0, name="closed")]),
    ]
    app = guarded(Provider(), guard, routes=routes)
    assert [(await ask(app, path="/narrow")).status for _ in range(2)] == [200, 429]
    assert [(await ask(app, path="/wide", method=method)).status for method in ("POST", "PUT", "POST")] == [
        200,
        429,
        200,
    ]


async def test_session_of_a_route() -> None:
    """A route may read its session id elsewhere, in the body too, whose text is then read and replayed."""
    from asgi_llm_guard.identity import body

    provider = Provider([b"{}"])
    routes = [Route("/chat", session=body("thread.id"), dialect=None)]
    app = guarded(provider, new_guard(Iterations(1)), routes=routes)
    sent = [{"thread": {"id": name}} for name in ("a", "a", "b")]
    assert [(await ask(app, one, path="/chat", session=False)).status for one in sent] == [200, 429, 200]
    assert [json.loads(one) for one in provider.bodies] == [sent[0], sent[2]]
    assert (await ask(app, b"no json", path="/chat")).status == 400


# -------------------------------------------------------------- refusals inside the handler


REFUSAL = LimitExceeded(
    Denied(policy="test", code="budget_exhausted", message="Refused by the test.", status=418, retry=False)
)


class SdkError(Exception):
    """As SDKs raise from what their transport raised."""


def wrapped(depth: int) -> Exception:
    error: Exception = REFUSAL
    for _ in range(depth):
        outer = SdkError()
        outer.__cause__ = error
        error = outer
    return error


def ring() -> BaseException:
    one, other = SdkError(), SdkError()
    one.__cause__, other.__cause__ = other, one
    return one


@pytest.mark.parametrize(
    "error, answered",
    [
        (lambda: REFUSAL, True),
        (lambda: wrapped(1), True),
        (lambda: wrapped(3), True),
        (lambda: ExceptionGroup("tasks", [REFUSAL]), True),
        (lambda: ExceptionGroup("tasks", [wrapped(1), ExceptionGroup("more", [REFUSAL])]), True),
        (lambda: ExceptionGroup("tasks", [REFUSAL, KeyError("a bug")]), False),
        (lambda: wrapped(30), False),
        (ring, False),
        (lambda: KeyError("a bug"), False),
    ],
    ids=["itself", "cause", "causes", "group", "groups", "group with a bug", "too deep", "ring", "bug"],
)
@pytest.mark.parametrize("method", ["POST", "GET"], ids=["guarded", "unguarded"])
async def test_refusal_that_escapes(error: Callable[[], BaseException], answered: bool, method: str) -> None:
    """A refusal that escapes the handler is answered, also out of causes and groups; anything else stays an error."""
    guard = new_guard()
    app = guarded(raises(error), guard)
    if answered:
        assert (await ask(app, method=method)).status == 418
    else:
        with pytest.raises((SdkError, KeyError, ExceptionGroup)):
            await ask(app, method=method)
    assert await guard.storage.open_holds() == 0


async def test_refusal_after_the_response_has_started() -> None:
    """Once the response has started a refusal can only be raised, and nothing is sent after what went out."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
        await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
        raise REFUSAL

    for method in ("POST", "GET"):
        exchange = request("/agents", method=method)
        with pytest.raises(LimitExceeded):
            await exchange.run(guarded(app, new_guard()))
        assert len(exchange.sent) == 2


@guarded_function(Iterations(1))
async def once() -> str:
    return "an answer"


async def twice(request: Request) -> PlainTextResponse:
    """The second call is one too many."""
    await once()
    return PlainTextResponse(await once())


async def in_a_group(request: Request) -> PlainTextResponse:
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(once())
    return PlainTextResponse("never")


async def own_page(request: Request) -> PlainTextResponse:
    """Handles the refusal itself, with an error page of its own."""
    try:
        await twice(request)
    except LimitExceeded:
        return PlainTextResponse("our own page", status_code=500)
    raise AssertionError


async def own_stream(request: Request) -> StreamingResponse:
    await own_page(request)
    return StreamingResponse(iter([b"our ", b"own ", b"stream"]), status_code=500)


async def broken(request: Request) -> PlainTextResponse:
    await own_page(request)
    raise KeyError("a bug")


HANDLERS = {
    "/twice": twice,
    "/group": in_a_group,
    "/own": own_page,
    "/stream": own_stream,
    "/broken": broken,
}


def starlette_inside(guard: Guard) -> App:
    app = Starlette(routes=[Path(path, handler, methods=["POST"]) for path, handler in HANDLERS.items()])
    app.add_middleware(GuardMiddleware, guard=guard)
    return app


def starlette_around(guard: Guard) -> App:
    app = Starlette(routes=[Path(path, handler, methods=["POST"]) for path, handler in HANDLERS.items()])
    return GuardMiddleware(app, guard)


def fastapi_inside(guard: Guard) -> App:
    app = FastAPI()
    for path, handler in HANDLERS.items():
        app.add_route(path, handler, methods=["POST"])
    app.add_middleware(GuardMiddleware, guard=guard)
    return app


def fastapi_around(guard: Guard) -> App:
    app = FastAPI()
    for path, handler in HANDLERS.items():
        app.add_route(path, handler, methods=["POST"])
    return GuardMiddleware(app, guard)


def unguarded_around(guard: Guard) -> App:
    app = Starlette(routes=[Path(path, handler, methods=["POST"]) for path, handler in HANDLERS.items()])
    return GuardMiddleware(app, guard, routes=[])


@pytest.mark.parametrize("make", [starlette_inside, starlette_around, fastapi_inside, fastapi_around, unguarded_around])
async def test_every_place_for_the_middleware(make: Callable[[Guard], App]) -> None:
    """Inside or around the layer that answers errors, a refusal is answered as one; other errors are left alone."""
    guard = new_guard()
    app = make(guard)
    for path in ("/twice", "/group"):
        exchange = await ask(app, path=path, headers=[(b"x-session-id", b"")], session=False)
        exchange = await request(path, headers=[(b"x-session-id", path.encode())]).run(app)
        assert (exchange.status, exchange.json["code"]) == (429, "session_iterations_exhausted")
        assert len(exchange.sent) == 2

    exchange = await request("/own", headers=[(b"x-session-id", b"own")]).run(app)
    assert (exchange.status, exchange.body) == (500, b"our own page")
    exchange = await request("/stream", headers=[(b"x-session-id", b"stream")]).run(app)
    assert (exchange.status, exchange.body) == (500, b"our own stream")
    exchange = request("/broken", headers=[(b"x-session-id", b"broken")])
    with pytest.raises(KeyError):
        await exchange.run(app)
    assert [message.get("status") for message in exchange.sent] in ([], [500, None])
    assert await guard.storage.open_holds() == 0


# ------------------------------------------------------------------------------- start-up


async def test_wrong_guard() -> None:
    """Something else for a guard is a configuration error."""
    with pytest.raises(ConfigurationError, match="must be a Guard"):
        GuardMiddleware(Provider(), "guard")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="dialect"):
        GuardMiddleware(Provider(), new_guard(), routes=[Route("/x", dialect="klingon")])


async def test_mounted_applications_are_checked_at_their_first_request(caplog: pytest.LogCaptureFixture) -> None:
    """An application without lifespan events is looked through at its first request, once, and a critical line says so."""

    @guarded_function()
    @(inner := FastAPI()).post("/ask")
    async def ask_it() -> None: ...

    inner.add_middleware(GuardMiddleware, guard=new_guard())
    app = Starlette(routes=[Mount("/inner", app=inner)])
    for _ in range(2):
        await request("/inner/ask").run(app)
    critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(critical) == 1
    assert "/ask" in critical[0].getMessage()


async def test_other_scopes_pass() -> None:
    """Connection types that servers may invent pass untouched."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await guarded(app, new_guard())({"type": "carrier-pigeon"}, None, None)  # type: ignore[arg-type]
    assert seen == ["carrier-pigeon"]


# ------------------------------------------------------------------- decorator and middleware


async def test_decorator_in_a_guarded_request_charges_once() -> None:
    """Middleware and decorator on one request are one call: the decorator adopts what the request claimed."""
    guard = new_guard(Iterations(5), Budget("$1/1d", per="caller"))

    @guarded_function(**BOUND)
    async def handler(request: Request) -> JSONResponse:
        assert current_admission().context.session == "s"
        return JSONResponse({"an": "answer"})

    app = Starlette(routes=[Path(CHAT, handler, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard)
    assert (await ask(app)).status == 200
    assert len(await ledger(guard)) == 1


async def test_decorator_without_a_model_means_the_described_call() -> None:
    """`@guarded` without a model on a route whose body describes the call adopts that description."""
    guard = new_guard(Budget("$1/1d", per="caller"))
    seen: list[Any] = []
    guard.engine.telling.observers = (seen.append,)

    @guarded_function(Iterations(3))
    async def handler(request: Request) -> JSONResponse:
        return JSONResponse({"an": "answer"})

    app = Starlette(routes=[Path(CHAT, handler, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard)
    await ask(app)
    ((outcome, cost),) = await ledger(guard)
    assert (outcome, cost) == ("unmetered", seen[0].call.cost_nanousd)
    (record,) = await guard.storage.records()
    assert (record.provider, record.model) == ("openai", "test-model")


async def test_provider_budget_behind_the_middleware() -> None:
    """B1, B3, B4: a provider's budget is spent by real costs, starts at the first spend, and its refusal names both."""
    guard = new_guard(ProviderBudget({"openai": {"budget_limit": 0.0005, "time_period": "1d"}}), disclose="all")
    app = guarded(Provider(), guard)
    statuses = [(await ask(app)).status for _ in range(20)]
    assert statuses[0] == 200
    assert statuses[-1] in (402, 429)
    spent = sum(cost or 0 for _, cost in await ledger(guard))
    assert spent == statuses.count(200) * 20_000
    assert "openai" in (await ask(app)).body.decode()


async def test_slots_are_free_after_the_response() -> None:
    """Conformance 54-57: a slot lasts as long as the response, whatever its end."""
    guard = new_guard(Concurrency(1, per="caller"))
    for app in (Provider(), Provider(status=500)):
        assert (await ask(guarded(app, guard))).status == app.status
    with pytest.raises(KeyError):
        await ask(guarded(raises(KeyError), guard))
    assert (await ask(guarded(Provider(), guard))).status == 200


async def test_calls_of_one_request_at_the_same_time() -> None:
    """Ten guarded calls at once inside one request are ten: one adopts what the request claimed, nine claim their own."""
    guard = new_guard(Iterations(10), Budget("$1/1d", per="caller"))
    call = guarded_function(**BOUND)(once_more)

    async def handler(request: Request) -> PlainTextResponse:
        together = asyncio.Barrier(10)
        await asyncio.gather(*(call(together) for _ in range(10)))
        return PlainTextResponse("an answer")

    app = Starlette(routes=[Path("/agents", handler, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard)
    assert (await ask(app, path="/agents")).status == 200
    assert (await ask(app, path="/agents")).status == 429
    assert len(await ledger(guard)) == 10


async def once_more(together: asyncio.Barrier) -> None:
    """Every call is open while all others are."""
    await together.wait()
