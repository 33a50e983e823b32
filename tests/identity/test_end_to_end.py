"""Identity behind the middleware: who pays for requests that name somebody else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as Path
from starlette.testclient import TestClient

from asgi_llm_guard import Context, Guard, GuardMiddleware, Iterations, RateLimit, current_admission
from asgi_llm_guard.identity import ApiKeys, Identity, IdentityError, PeerAddress, Resolver, TrustedHeaders
from asgi_llm_guard.identity.base import Scope

SECRET = "a pepper that is long enough"


def client(guard: Guard) -> TestClient:
    async def whoami(request: Request) -> JSONResponse:
        admission = current_admission()
        context: Any = admission.context if admission is not None else Context()
        return JSONResponse([context.caller, context.user, context.session])

    app = Starlette(routes=[Path("/", whoami, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard)
    return TestClient(app)


def test_one_key_has_one_cap() -> None:
    """T1: 1,000 requests with one key and invented users get what that key may have, in its own name."""
    key, record = ApiKeys.generate("team-a", secret=SECRET)
    guard = Guard([RateLimit("7/hour", per="user")], identity=ApiKeys([record], secret=SECRET))
    with client(guard) as http:
        answers = [
            http.post("/", headers={"x-api-key": key, "x-user-id": f"user-{number}", "x-agent": "root"})
            for number in range(1000)
        ]
    assert Counter(answer.status_code for answer in answers) == {200: 7, 429: 993}
    assert [answer.json() for answer in answers if answer.status_code == 200] == [["team-a", None, None]] * 7


@pytest.mark.parametrize(
    "identity",
    [TrustedHeaders(proxies=["10.0.0.0/8"]), PeerAddress(proxies=["10.0.0.0/8"])],
    ids=["headers", "address"],
)
def test_strangers_share_a_cap(identity: Resolver) -> None:
    """T1, T2: a stranger that invents users and forwarded addresses stays one caller."""
    with client(Guard([RateLimit("3/hour", per="caller")], identity=identity)) as http:
        answers = [
            http.post("/", headers={"x-user-id": f"user-{number}", "x-forwarded-for": f"198.51.100.{number}"})
            for number in range(50)
        ]
    assert Counter(answer.status_code for answer in answers) == {200: 3, 429: 47}


def test_sessions_live_under_their_caller() -> None:
    """A2: the same session id sent by two callers is two counters."""
    (one, first), (two, second) = (ApiKeys.generate(name, secret=SECRET) for name in ("team-a", "team-b"))
    guard = Guard([Iterations(2)], identity=ApiKeys([first, second], secret=SECRET))
    with client(guard) as http:
        statuses = [
            http.post("/", headers={"x-api-key": key, "x-session-id": "s1"}).status_code
            for key in (one, one, one, two, two, two)
        ]
    assert statuses == [200, 200, 429, 200, 200, 429]


def test_missing_session() -> None:
    """Conformance 84: where a session is required, a request without one gets a 400 that names where to put it."""
    key, record = ApiKeys.generate("team-a", secret=SECRET)
    guard = Guard([Iterations(2, missing="reject")], identity=ApiKeys([record], secret=SECRET))
    with client(guard) as http:
        answer = http.post("/", headers={"x-api-key": key})
    assert answer.status_code == 400
    assert "header x-session-id" in answer.text


@pytest.mark.parametrize(
    "headers, status, code",
    [
        ([("x-api-key", "lg-canary-unknown")], 403, "credentials_invalid"),
        ([("x-session-id", "canary"), ("x-session-id", "canary")], 400, "invalid_request"),
        ([("x-session-id", "s" * 257)], 400, "invalid_request"),
        ([("x-session-id", "canary\x1b[31m")], 400, "invalid_request"),
    ],
)
def test_refusals(headers: list[tuple[str, str]], status: int, code: str) -> None:
    """T16: a request whose identity does not hold is answered by the guard, without repeating what was sent."""
    guard = Guard(identity=ApiKeys([], secret=SECRET))
    with client(guard) as http:
        answer = http.post("/", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "canary" not in answer.text
    assert answer.headers["x-should-retry"] == "false"


def test_status_of_refused_credentials() -> None:
    """The guard may say which status credentials that do not hold are answered with; a resolver's own wins over it."""

    def closed(scope: Scope) -> Identity | None:
        raise IdentityError("No identities are taken today.", status=451)

    statuses = {"credentials_invalid": 404}
    with client(Guard(identity=ApiKeys([], secret=SECRET), statuses=statuses)) as http:
        assert http.post("/", headers={"x-api-key": "lg-unknown"}).status_code == 404
    with client(Guard(identity=closed, statuses={**statuses, "invalid_request": 422})) as http:
        assert http.post("/").status_code == 451
