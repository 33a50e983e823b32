"""T24: no spelling of a path, no method and no mount leads past the guard."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi import Request as FastAPIRequest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from starlette.routing import Route as Path
from starlette.websockets import WebSocket
from tests.middleware.asgi import App, request, websocket

from asgi_llm_guard import Guard, GuardMiddleware, Iterations, Route
from asgi_llm_guard.middleware import STATE_KEY

pytestmark = pytest.mark.anyio

GUARDED = [
    Route("/v1/complete", methods=["POST"], dialect=None),
    Route("/agents/{name}", dialect=None),
    Route("/agents/{name}/run", dialect=None),
    Route("/files/{rest:path}", dialect=None),
    Route("/read", methods=["get"], dialect=None),
    Route("/mounted/v1/complete", dialect=None),
    Route("/open/{rest:path}", dialect=None),
]

PREFIXES = ["", "/", "//", "/./", "/../", "/x/../", "\\", "/%2e/"]
SUFFIXES = [
    "",
    "/",
    "//",
    "/.",
    "/..",
    "\n",
    "\r\n",
    "/\n",
    "\t",
    " ",
    "?",
    ";a=b",
    "%0a",
    "\\",
    "\x00",
    "/../.",
    "..",
    ".",
]
METHODS = ["POST", "post", "PoSt", "GET", "get", "HEAD", "head", "PUT", "PATCH", "DELETE", "BREW"]


def spellings() -> list[str]:
    """Over five hundred ways to write the guarded paths, from the plain ones to those that only attackers send."""
    plain = [
        "/v1/complete",
        "/agents/bob",
        "/agents/bob/run",
        "/agents/..",
        "/agents/.",
        "/agents/a\\b",
        "/agents/../run",
        "/files/",
        "/files/a/b",
        "/files/../x",
        "/read",
        "/mounted/v1/complete",
        "/open/any/thing",
    ]
    written = {
        prefix + path.lstrip("/") if prefix else path + suffix
        for path, prefix, suffix in itertools.product(plain, PREFIXES, SUFFIXES)
    }
    written |= {
        prefix.rstrip("/") + path + suffix for path, prefix, suffix in itertools.product(plain, PREFIXES, SUFFIXES)
    }
    written |= {change(path) for path in plain for change in (str.upper, str.title, str.swapcase)}
    written |= {path.replace("/", separator) for path in plain for separator in ("//", "/./", "\\", "/x/../", "/\t")}
    return sorted(written)


class Reached:
    """Handlers that make an LLM call, and that note whether one was claimed for them."""

    def __init__(self) -> None:
        self.count = 0
        self.unguarded: list[tuple[str, str]] = []

    def note(self, scope: Any) -> None:
        self.count += 1
        admission = scope.get(STATE_KEY)
        if admission is None or admission.root is None:
            self.unguarded.append((scope.get("method", "websocket"), scope["path"]))

    async def http(self, request: Request) -> PlainTextResponse:
        self.note(request.scope)
        return PlainTextResponse("an answer")

    async def socket(self, socket: WebSocket) -> None:
        self.note(socket.scope)
        await socket.accept()
        await socket.close()

    async def raw(self, scope: Any, receive: Any, send: Any) -> None:
        self.note(scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"an answer"})


def starlette_app(reached: Reached) -> Starlette:
    class Complete(HTTPEndpoint):
        async def post(self, request: Request) -> PlainTextResponse:
            return await reached.http(request)

    async def run(request: Request) -> PlainTextResponse:
        return await reached.http(request)

    async def socket(connection: WebSocket) -> None:
        await reached.socket(connection)

    return Starlette(
        routes=[
            Path("/v1/complete", Complete),
            Path("/agents/{name}", run, methods=["POST", "PUT"]),
            Path("/agents/{name}/run", run, methods=["POST"]),
            Path("/files/{rest:path}", run, methods=["POST"]),
            Path("/read", run, methods=["GET"]),
            WebSocketRoute("/v1/complete", socket),
            WebSocketRoute("/agents/{name}", socket),
            WebSocketRoute("/files/{rest:path}", socket),
            Mount("/mounted", routes=[Path("/v1/complete", run, methods=["POST"])]),
            Mount("/open", app=reached.raw),
        ]
    )


def fastapi_app(reached: Reached) -> FastAPI:
    router = APIRouter()

    @router.post("/complete")
    async def complete(request: FastAPIRequest) -> str:
        reached.note(request.scope)
        return "an answer"

    @router.websocket("/complete")
    async def socket(connection: WebSocket) -> None:
        await reached.socket(connection)

    app = FastAPI()
    app.include_router(router, prefix="/v1")

    async def agent(request: FastAPIRequest) -> str:
        reached.note(request.scope)
        return "an answer"

    for path in ("/agents/{name}", "/agents/{name}/run", "/files/{rest:path}"):
        app.post(path)(agent)

    @app.get("/read")
    async def read(request: FastAPIRequest) -> str:
        reached.note(request.scope)
        return "an answer"

    mounted = FastAPI()
    mounted.post("/v1/complete")(agent)
    app.mount("/mounted", mounted)
    app.mount("/open", reached.raw)
    return app


async def attack(app: App, *, methods: list[str], root_path: str = "") -> None:
    """Ask for every spelling by every method, and for a WebSocket at it."""
    for path in spellings():
        for method in methods:
            await request(root_path + path, method=method, root_path=root_path).run(app)
        await websocket(root_path + path, root_path=root_path).run(app)


@pytest.mark.parametrize("make", [starlette_app, fastapi_app])
@pytest.mark.parametrize("root_path", ["", "/behind/proxy"])
async def test_listed_routes_have_one_way_in(make: Any, root_path: str) -> None:
    """T24: over 500 spellings by all methods and mounts, HTTP and WebSocket: what reaches a handler was claimed first."""
    reached = Reached()
    app = make(reached)
    app.add_middleware(GuardMiddleware, guard=Guard([Iterations(5)]), routes=GUARDED)
    assert len(spellings()) >= 500
    await attack(app, methods=METHODS, root_path=root_path)

    assert reached.count > 300
    assert reached.unguarded == []


async def test_everything_is_guarded_unless_exempt() -> None:
    """T24: without a route table every spelling is guarded for all methods that change something."""
    reached = Reached()
    app = starlette_app(reached)
    app.add_middleware(GuardMiddleware, guard=Guard(), exempt=["/health"])
    await attack(app, methods=["POST", "post", "PUT", "BREW"])

    assert reached.count > 300
    assert reached.unguarded == []


async def test_unlisted_paths_can_be_closed() -> None:
    """T24: with `unlisted="deny"` nothing but the listed routes can be reached by a method that changes something."""
    reached = Reached()
    app = GuardMiddleware(reached.raw, guard=Guard(), routes=GUARDED, unlisted="deny")
    await attack(app, methods=["POST", "put", "BREW"])

    assert reached.unguarded == []


async def test_wrapper_around_an_application_with_a_root_path() -> None:
    """T24: an application that strips a root path of its own is guarded under both of its spellings."""
    reached = Reached()
    with warnings.catch_warnings(action="ignore"):  # deprecated, and in use
        inner = FastAPI(root_path="/api")

    @inner.post("/v1/complete")
    async def complete(request: FastAPIRequest) -> str:
        reached.note(request.scope)
        return "an answer"

    app = GuardMiddleware(inner, guard=Guard(), routes=GUARDED)
    for path in ("/v1/complete", "/api/v1/complete", "/api/v1/complete\n", "/api//v1/complete"):
        await request(path).run(app)

    assert reached.count == 3
    assert reached.unguarded == []


@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/Health", "/health\n", "/x/../health", "/health/../v1/complete"]
)
async def test_exemption_holds_for_its_very_path(path: str) -> None:
    """T24: an exempt path frees nothing that is merely written like it."""
    reached = Reached()
    app = GuardMiddleware(reached.raw, guard=Guard(), exempt=["/health"])
    await request(path).run(app)
    assert reached.unguarded == []

    await request("/health").run(app)
    assert reached.unguarded == [("POST", "/health")]


@pytest.mark.parametrize("root_path", ["", "/behind/proxy"])
async def test_paths_of_probes_free_nobody_else(root_path: str) -> None:
    """T24, M16: the two paths of `health_app` free its own answers, and no handler that takes them in its place."""
    reached = Reached()
    guard = Guard([Iterations(5)])
    app = Starlette(
        routes=[
            Path("/{tenant}/{action}", reached.http, methods=["POST"]),
            Mount("/ops", guard.health_app(at="/ops")),
        ]
    )
    app.add_middleware(GuardMiddleware, guard=guard, routes=[Route("/{rest:path}", dialect=None)])
    for method in METHODS:
        await request(f"{root_path}/ops/healthz", method=method, root_path=root_path).run(app)
    assert reached.count == 1
    assert reached.unguarded == []
    for method, status in (("GET", 200), ("HEAD", 200)):
        answer = await request(f"{root_path}/ops/healthz", method=method, root_path=root_path).run(app)
        assert answer.status == status
        assert not any(name.startswith("ratelimit") for name in answer.headers)


async def test_paths_of_probes_in_front_of_an_unknown_application() -> None:
    """T24: where nobody can tell who answers there, the paths of `health_app` are free for probes and for nothing else."""
    reached = Reached()
    guard = Guard()
    guard.health_app(at="/ops")
    app = GuardMiddleware(reached.raw, guard=guard, routes=[Route("/{rest:path}", dialect=None)])
    for method in METHODS:
        await request("/ops/readyz", method=method).run(app)
    await websocket("/ops/readyz").run(app)
    assert reached.count == len(METHODS) + 1
    assert sorted(reached.unguarded) == [("GET", "/ops/readyz"), ("HEAD", "/ops/readyz")]


async def test_own_pages_free_nothing_that_is_written_like_them() -> None:
    """T24: the pages of a guard, in an application with a root path of its own, free no path that begins like theirs."""
    reached = Reached()
    guard = Guard(identity=lambda scope: None)
    with warnings.catch_warnings(action="ignore"):  # deprecated, and in use
        inner = FastAPI(root_path="/usage")

    @inner.post("/usages/complete")
    async def complete(request: FastAPIRequest) -> str:
        reached.note(request.scope)
        return "an answer"

    inner.mount("/usage", guard.usage_app())
    app = GuardMiddleware(inner, guard=guard)
    for path in ("/usage/usages/complete", "/usages/complete", "/usage//usages/complete"):
        await request(path).run(app)
    assert reached.count == 2
    assert reached.unguarded == []
    answer = await request("/usage/usage/v1/usage", method="PUT").run(app)
    assert answer.status == 405
