"""Where the pages stand in an application: under a path, beside guarded routes, in the way of nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.routing import Route as StarletteRoute
from tests.admin.kit import CALLER_KEY, SECRET, TOKENS, Desk, hidden, options

from asgi_llm_guard import Guard, GuardMiddleware, RateLimit, Route
from asgi_llm_guard.doctor.application import examine_application
from asgi_llm_guard.events import Admission, Event, Refused
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.identity.base import Identity
from asgi_llm_guard.stops import Stop
from asgi_llm_guard.testing import asgi_client

pytestmark = pytest.mark.anyio

_AUTH = {"authorization": f"Bearer {TOKENS['admin']}"}


async def _work(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path})


class _Around:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class _Everybody:
    def __call__(self, scope: Any, /) -> Identity | None:
        return Identity(caller="service-a", user="mia") if b"x-api-key" in dict(scope["headers"]) else None


def _guard(**more: Any) -> tuple[Guard, list[Event]]:
    events: list[Event] = []
    guard = Guard([RateLimit("0/minute", per="global")], identity=_Everybody(), observers=[events.append], **more)
    return guard, events


async def test_pages_in_an_included_router() -> None:
    """The guard cannot see what is in a router that FastAPI includes, so it guards the pages there, too: the check of the
    application says so, and how to mount them; mounted so, they are free and the check is silent."""
    for how, path in (("in a router", "/ops/admin"), ("in what is in one", "/ops/in/admin"), ("beside it", "/admin")):
        guard, _ = _guard()
        app = FastAPI()
        router = APIRouter()
        pages = guard.admin_app(options())
        if how == "in what is in one":
            router.mount("/in", Starlette(routes=[Mount("/admin", pages)]))
        else:
            (app if how == "beside it" else router).mount("/admin", pages)
        app.include_router(router, prefix="/ops")
        app.add_middleware(GuardMiddleware, guard=guard)
        findings, paths = examine_application(app)
        told = [finding for finding in findings if finding.code == "pages_in_router"]
        state = next(each.state for each in paths if each.path == path)
        async with asgi_client(app) as client:
            status = (await client.post(f"{path}/api/v1/stops", headers=_AUTH, json={})).status_code
        if how != "beside it":
            assert (state, status, [path in finding.seen for finding in told]) == ("guarded", 429, [True])
            assert f'app.mount("{path}"' in told[0].next_step
        else:
            assert (state, status, told) == ("own", 422, [])
        await guard.aclose()


@pytest.mark.parametrize(
    "routes", [None, [Route("/{rest:path}")], [Route("/ask")]], ids=["everything", "every path", "one path"]
)
async def test_no_limit_blocks_the_pages(routes: Sequence[Route] | None) -> None:
    """M16: with a limit that refuses everything, the pages and the callers' page answer, are not counted, and nothing is
    refused; other paths are."""
    guard, events = _guard()
    app = Starlette(
        routes=[
            Mount("/admin", guard.admin_app(options())),
            Mount("/deep", routes=[Mount("/usage", guard.usage_app())]),
            StarletteRoute("/ask", _work, methods=["POST"]),
        ],
        middleware=[Middleware(GuardMiddleware, guard=guard, routes=routes, unlisted="deny" if routes else "pass")],
    )
    async with asgi_client(app) as client:
        assert (await client.post("/ask")).status_code == 429
        events.clear()
        assert (await client.get("/admin/api/v1/health", headers=_AUTH)).status_code == 200
        token = hidden((await client.get("/admin/login")).text, "login_token")
        login = await client.post("/admin/login", data={"login_token": token, "token": TOKENS["admin"]})
        assert login.status_code == 303
        reset = await client.post("/admin/api/v1/resets", headers=_AUTH, json={"scope": "global", "reason": "r"})
        assert (reset.status_code, "no administration data" in reset.text) == (409, True)
        usage = await client.get("/deep/usage/v1/usage", headers={"x-api-key": "k"})
        assert usage.status_code == 200, usage.text
        assert [event for event in events if isinstance(event, (Admission, Refused))] == []
        assert (await client.post("/admin/../ask")).status_code in {404, 429}
    await guard.aclose()


async def test_routes_before_the_mount_stay_guarded() -> None:
    """M16: what another route takes below the same path is guarded as ever: only the pages themselves are let pass."""
    guard, _ = _guard()
    app = Starlette(
        routes=[
            StarletteRoute("/admin/chat", _work, methods=["POST"]),
            Mount("/admin", guard.admin_app(options())),
            StarletteRoute("/administrator", _work, methods=["POST"]),
        ]
    )
    async with asgi_client(GuardMiddleware(app, guard)) as client:
        assert (await client.post("/admin/chat")).status_code == 429
        assert (await client.post("/administrator")).status_code == 429
        assert (await client.post("/admin/chatter", headers=_AUTH)).status_code == 404
        assert (await client.get("/admin/api/v1/health", headers=_AUTH)).status_code == 200
    await guard.aclose()


@pytest.mark.parametrize("methods", [["POST"], ["GET", "POST"]])
async def test_middleware_and_routes_around_the_pages(methods: list[str]) -> None:
    """M16: pages with middleware of their own around them are the guard's all the same, also behind a route that lacks
    the method of a request; what such a route takes is guarded."""
    guard, _ = _guard()
    app = Starlette(
        routes=[
            StarletteRoute("/{one}/{two}", _work, methods=methods),
            Mount("/admin", guard.admin_app(options()), middleware=[Middleware(_Around)]),
        ]
    )
    async with asgi_client(GuardMiddleware(app, guard, routes=[Route("/{rest:path}")])) as client:
        assert (await client.post("/admin/login")).status_code == 429
        assert (await client.get("/admin/api/v1/health", headers=_AUTH)).status_code == 200
        assert (await client.get("/admin/login")).status_code == (429 if "GET" in methods else 200)
    await guard.aclose()


async def test_a_stop_of_everything_stops_no_administration(page: Desk) -> None:
    """S8: whoever has stopped everything by mistake can take it back."""
    client = page.client("operator")
    made = await client.post("/admin/api/v1/stops", json={"scope": "all", "reason": "panic"})
    assert made.status_code == 201, made.text
    await page.guard.chores.run("control")
    assert (await client.post("/ask")).status_code == 403
    assert (await client.delete(f"/admin/api/v1/stops/{made.json()['id']}")).status_code == 204
    await page.guard.chores.run("control")
    assert (await client.post("/ask")).status_code == 200


@pytest.mark.parametrize("path", ["", "/a", "/a/b"])
async def test_links_stay_inside(path: str) -> None:
    """The pages work wherever they are mounted: every link and form leads back below that path."""
    import re

    guard = Guard(identity=_Everybody())
    admin = guard.admin_app(options())
    app = Starlette(routes=[Mount(path, admin)]) if path else admin
    text = ""
    async with asgi_client(app, base_url="http://testserver") as client:
        for page in ("/", "/departments", "/raises", "/keys"):
            text = (await client.get(f"{path}{page}", headers=_AUTH)).text
            links = re.findall(r'(?:href|action|src)="([^"]+)"', text)
            assert len(links) > 10
            assert [link for link in links if not link.startswith((f"{path}/", "#"))] == []
        sheet = next(link for link in re.findall(r'href="([^"]+)"', text) if ".css" in link)
        answer = await client.get(sheet)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "public, max-age=31536000, immutable")
    await guard.aclose()


async def test_a_head_has_no_body(page: Desk) -> None:
    """HEAD answers as GET, without a body."""
    answer = await page.client("viewer").head("/admin/")
    assert (answer.status_code, answer.content) == (200, b"")


# ------------------------------------------------------------------------------------- callers


async def test_callers_see_their_own(page: Desk) -> None:
    """W7, M16: a caller reads its own limits; of a department's it learns that there is one and when it resets, and no figure."""
    client = page.client(headers={"x-api-key": CALLER_KEY})
    told = (await client.get("/usage/v1/usage")).json()
    assert (told["caller"], told["user"], told["departments"]) == ("service-a", "mia", ["research"])
    by_scope = {each["scope"]: each for each in told["limits"]}
    own, shared = by_scope["user"], by_scope["department"]
    assert (own["limit"], own["used"], own["remaining"], own["unit"]) == ("50.00", "0.00", "50.00", "usd")
    assert shared["resets_at_ms"] is None or shared["resets_at_ms"] > 0
    assert {shared[name] for name in ("limit", "used", "held", "remaining", "subject", "share")} == {None}
    text = (await client.get("/usage/", headers={"accept": "text/html"})).text
    assert "$0.00 held" not in text
    assert "What is left" in text
    assert "1,000,000" not in text
    assert "1000000" not in text


async def test_shared_figures_are_disclosed_where_the_guard_says_so() -> None:
    """W7: with `disclose="all"` a caller is shown its department's figures, too."""
    from asgi_llm_guard import DepartmentQuota, Quota, QuotaBook

    key, kept = ApiKeys.generate(caller="a", departments=["research"], secret=SECRET)
    book = QuotaBook({"research": DepartmentQuota(daily_cost="10", models=["openai/*"])})
    guard = Guard([Quota(book)], identity=ApiKeys([kept], secret=SECRET), disclose="all")
    async with asgi_client(guard.usage_app()) as client:
        told = (await client.get("/", headers={"x-api-key": key})).json()
    assert [(each["subject"], each["limit"], each["used"]) for each in told["limits"]] == [
        ("research", "10.00", "0.00")
    ]
    await guard.aclose()


async def test_nobody_sees_the_limits_of_others(page: Desk) -> None:
    """W7, T13: without a credential the answer is 401; an administrator's token is none of a caller; nothing can be
    written, and no parameter names anybody."""
    client = page.client()
    assert (await client.get("/usage/v1/usage")).status_code == 401
    assert (await page.client("admin").get("/usage/v1/usage")).status_code == 401
    caller = page.client(headers={"x-api-key": CALLER_KEY})
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert (await caller.request(method, "/usage/v1/usage")).status_code == 405
    named = (await caller.get("/usage/v1/usage", params={"caller": "other", "user": "ben"})).json()
    assert (named["caller"], named["user"]) == ("service-a", "mia")
    assert (await caller.get("/usage/other")).status_code == 404


async def test_stopped_callers_still_see_theirs(page: Desk) -> None:
    """M16: who is stopped or has nothing left still reads what is left."""
    page.guard.set_stops([Stop(scope="caller", subject="service-a")])
    client = page.client(headers={"x-api-key": CALLER_KEY})
    assert (await client.post("/ask")).status_code == 403
    assert (await client.get("/usage/v1/usage")).status_code == 200
