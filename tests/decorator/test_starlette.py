"""`@guarded` under plain Starlette: class-based endpoints, streams, background tasks, and what is found at start."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Host, Mount, Route, Router
from tests.decorator.values import ANSWER, BOUND, HELD, USED, event, iterations, ledger, new_guard, post
from tests.middleware.asgi import start

from asgi_llm_guard import Budget, Context, Guard, GuardMiddleware, Iterations, current_admission, guarded
from asgi_llm_guard.marks import unwrapped

pytestmark = pytest.mark.anyio


def app_of(guard: Guard, *routes: Route, **options: Any) -> Starlette:
    return Starlette(routes=routes, middleware=[Middleware(GuardMiddleware, guard=guard)], **options)


@guarded(**BOUND)
class WholeEndpoint(HTTPEndpoint):
    """Every method of it is guarded, in the loop or in a thread."""

    async def post(self, request: Request) -> Response:
        return JSONResponse(ANSWER)

    def put(self, request: Request) -> Response:
        return JSONResponse(ANSWER)


class OneMethod(HTTPEndpoint):
    """Only one of its methods is."""

    @guarded(**BOUND)
    async def post(self, request: Request) -> Response:
        return JSONResponse(ANSWER)

    async def put(self, request: Request) -> Response:
        return PlainTextResponse("free")


async def test_class_based_endpoints() -> None:
    """A decorated endpoint class guards each of its methods, a decorated method itself alone."""
    guard = new_guard(Budget("$1/1d", per="caller"))
    app = app_of(guard, Route("/whole", WholeEndpoint), Route("/one", OneMethod))
    for path, method in (("/whole", "POST"), ("/whole", "PUT"), ("/one", "POST")):
        assert (await post(app, path, method=method)).json == ANSWER
    assert await ledger(guard) == [("measured", USED)] * 3
    assert (await post(app, "/one", method="PUT")).body == b"free"
    assert (await ledger(guard))[3][0] == "unseen"
    assert (await post(app, "/whole", method="DELETE")).status == 405


async def test_partial_as_an_endpoint() -> None:
    """A guarded partial is an endpoint like any other."""
    guard = new_guard(Iterations(1))

    async def greet(name: str, request: Request) -> Response:
        return PlainTextResponse(f"hello {name}")

    app = app_of(guard, Route("/", guarded()(functools.partial(greet, "bob")), methods=["POST"]))
    assert (await post(app, "/")).body == b"hello bob"
    assert (await post(app, "/")).status == 429


async def test_behind_base_http_middleware() -> None:
    """The admission is found behind a middleware that runs the application in a task of its own."""
    guard = new_guard(Budget("$1/1d", per="caller"))

    async def passing(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    async def pieces() -> AsyncIterator[bytes]:
        yield event("hel")
        assert current_admission().context.session == "s"
        yield event("lo", last=True)

    @guarded(**BOUND)
    async def handler(request: Request) -> Response:
        return StreamingResponse(pieces(), media_type="text/event-stream")

    app = Starlette(
        routes=[Route("/", handler, methods=["POST"])],
        middleware=[Middleware(GuardMiddleware, guard=guard), Middleware(BaseHTTPMiddleware, dispatch=passing)],
    )
    assert (await post(app, "/")).body == event("hel") + event("lo", last=True)
    assert await ledger(guard) == [("measured", USED)]


async def test_background_task_claims_its_own() -> None:
    """A guarded function in a background task runs after the response, under the same context, as a call of its own."""
    guard = new_guard(Iterations(5))
    seen: list[Context] = []

    @guarded()
    async def later() -> None:
        seen.append(current_admission().context)

    async def handler(request: Request) -> Response:
        return PlainTextResponse("done", background=BackgroundTask(later))

    assert (await post(app_of(guard, Route("/", handler, methods=["POST"])), "/")).status == 200
    assert [context.session for context in seen] == ["s"]
    assert await guard.storage.open_holds() == 0
    assert await iterations(guard) == 2


async def test_stream_that_breaks() -> None:
    """A stream that breaks off costs its input and the text so far, and its error passes."""
    guard = new_guard(Budget("$1/1d", per="caller"))
    closed = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            yield event("four")
            raise KeyError("a bug")
        finally:
            closed.append(current_admission().context.session)

    @guarded(**BOUND)
    async def handler(request: Request) -> Response:
        return StreamingResponse(pieces(), media_type="text/event-stream")

    with pytest.raises(KeyError):
        await post(app_of(guard, Route("/", handler, methods=["POST"])), "/")
    assert closed == ["s"]
    assert await ledger(guard) == [("estimated", 100 * 1_000 + 4 * 2_000)]


async def test_own_responses_say_nothing() -> None:
    """Own answers, and errors that the handler makes up, leave the hold as it is."""
    guard = new_guard(Budget("$1/1d", per="caller"))
    answers = [
        PlainTextResponse("text"),
        JSONResponse({"own": 1}),
        JSONResponse({"error": {"message": "m", "code": 1}}, 502),
    ]

    @guarded(**BOUND)
    async def handler(request: Request) -> Response:
        return answers.pop()

    app = app_of(guard, Route("/", handler, methods=["POST"]))
    for _ in range(3):
        await post(app, "/")
    assert await ledger(guard) == [("unmetered", HELD)] * 3


class SyncBody:
    """A response that some other framework sends from a plain iterator."""

    def __init__(self, body: Iterator[Any]) -> None:
        self.body_iterator = body


async def test_response_with_a_plain_iterator() -> None:
    """A body that is a plain iterator is metered while it is read, and closed with its call."""
    guard = new_guard(Budget("$1/1d", per="caller"))

    @guarded(guard=guard, **BOUND)
    async def whole() -> SyncBody:
        return SyncBody(iter([event("hel"), event("lo", last=True)]))

    @guarded(guard=guard, **BOUND)
    async def broken() -> SyncBody:
        def pieces() -> Iterator[bytes]:
            yield event("four")
            raise KeyError("a bug")

        return SyncBody(pieces())

    assert list((await whole()).body_iterator) == [event("hel"), event("lo", last=True)]
    body = (await broken()).body_iterator
    next(body)
    with pytest.raises(KeyError):
        next(body)
    assert await ledger(guard) == [("measured", USED), ("estimated", 100 * 1_000 + 4 * 2_000)]


class Pieces:
    """An iterator that can do nothing but give the next piece."""

    def __init__(self) -> None:
        self.left = [event("four"), event("lo", last=True)]

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        return self.left.pop(0)


class SyncPieces(Pieces):
    def __iter__(self) -> SyncPieces:
        return self

    def __next__(self) -> bytes:
        return self.left.pop(0)


async def test_response_with_an_iterator_that_takes_nothing() -> None:
    """What is thrown at a body that cannot take it ends the body; one that cannot be closed is left."""
    guard = new_guard(Budget("$1/1d", per="caller"))

    @guarded(guard=guard, **BOUND)
    async def answer(pieces: Any) -> SyncBody:
        return SyncBody(pieces)

    body: Any = (await answer(Pieces())).body_iterator
    await anext(body)
    with pytest.raises(KeyError, match="thrown"):
        await body.athrow(KeyError("thrown"))
    body = (await answer(SyncPieces())).body_iterator
    next(body)
    with pytest.raises(KeyError, match="thrown"):
        body.throw(KeyError("thrown"))
    assert await ledger(guard) == [("estimated", 100 * 1_000 + 4 * 2_000)] * 2


# -------------------------------------------------------------------------------- at start


async def plain(request: Request) -> Response:
    return PlainTextResponse("plain")


@guarded()
async def named(request: Request) -> Response:
    return PlainTextResponse("guarded")


class Static:
    """Its function is guarded elsewhere, and registered plain here."""

    @staticmethod
    async def handler(request: Request) -> Response:
        return PlainTextResponse("plain")


async def test_where_marks_are_looked_for() -> None:
    """Marked functions are found in mounts, hosts and routers, behind middleware around them too."""

    async def handler(request: Request) -> Response:
        return PlainTextResponse("plain")

    guarded()(handler)
    route = Route("/ask", handler)
    inner = Starlette(routes=[route], middleware=[Middleware(BaseHTTPMiddleware, dispatch=None)])
    places = {
        "/a/ask": Mount("/a", routes=[route]),
        "/b/ask": Mount("/b", app=Router([route])),
        "/c/ask": Mount("/c", app=GuardMiddleware(inner, new_guard())),
        "/d/e/ask": Mount("/d", routes=[Mount("/e", routes=[route])]),
        "/ask": Host("example.org", app=Router([route])),
    }
    for path, place in places.items():
        (found,) = unwrapped(Starlette(routes=[place]))
        assert found.startswith(f"{path} (")
        assert "handler" in found
    app = Starlette(routes=list(places.values()))
    app.add_middleware(GuardMiddleware, guard=new_guard())
    message, *_ = await start(app)
    assert message["type"] == "lifespan.startup.failed"


async def test_marks_that_mean_nothing() -> None:
    """Functions that are plain on purpose, or marked through another decorator, are not reported."""
    copies = [guarded()(plain), guarded()(Static.handler)]

    @functools.wraps(plain)
    async def other(request: Request) -> Response:
        return await plain(request)

    loop = Starlette()
    loop.mount("/again", loop)
    app = Starlette(
        routes=[
            Route("/plain", plain),
            Route("/static", Static.handler),
            Route("/named", named),
            Route("/other", other),
            Route("/class", WholeEndpoint),
            Mount("/loop", app=loop),
            Mount("/bare", app=GuardMiddleware(plain, new_guard())),  # type: ignore[arg-type]
        ]
    )
    assert len(copies) == 2
    assert unwrapped(app) == []
    assert unwrapped(None) == []


async def test_mark_of_a_function_whose_name_was_taken_over() -> None:
    """A function is reported even if its guarded copy has a route as well, where the name shows that it was decorated."""
    inner = named.__wrapped__  # type: ignore[attr-defined]
    app = Starlette(routes=[Route("/guarded", named), Route("/past", inner)])
    (found,) = unwrapped(app)
    assert found.startswith("/past (")


def test_functions_that_cannot_be_marked() -> None:
    """Built-in functions carry no mark, and are guarded all the same."""
    guard = new_guard(Iterations(1))
    assert guarded(guard=guard)(len)([1, 2]) == 2
