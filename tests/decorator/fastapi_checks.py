"""What `@guarded` promises under every FastAPI: run by pytest under the current one, and by itself under old ones.

python -m tests.decorator.fastapi_checks
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import fastapi
import starlette
from fastapi import APIRouter, Depends, FastAPI, Header, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from tests.decorator.values import ANSWER, BOUND, USED, event, iterations, ledger, new_guard, post
from tests.middleware.asgi import start

from asgi_llm_guard import Budget, Context, Guard, GuardMiddleware, Iterations, current_admission, guarded

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTypeCheckers

Decorate = Callable[[Any], Any]


class Question(BaseModel):
    text: str
    tokens: int = 5


class Reply(BaseModel):
    text: str


def _plain(function: Any) -> Any:
    return function


def guarded_app(guard: Guard, **options: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(GuardMiddleware, guard=guard, **options)
    return app


def limit(x_limit: Annotated[int, Header()] = 3) -> int:
    return x_limit


def routes(app: FastAPI | APIRouter, decorate: Decorate) -> None:
    """Handlers of every kind that FastAPI tells apart by their signature."""

    @app.post("/agents/{name}/run", status_code=201, response_model=Reply)
    @decorate
    async def run_agent(
        name: str, question: Question, limited: Annotated[int, Depends(limit)], *, loud: bool = False
    ) -> Any:
        """Runs an agent."""
        text = f"{name} {question.text} {limited} {loud}"
        return {"text": text}

    @app.post("/sync/{number}")
    @decorate
    def sync_agent(number: int, question: Question, limited: Annotated[int, Depends(limit)]) -> Reply:
        """Runs in a worker thread."""
        return Reply(text=f"{number + 1} {question.text} {limited}")

    @app.post("/two")
    @decorate
    async def two_bodies(first: Question, second: Question) -> list[Reply]:
        return [Reply(text=first.text), Reply(text=second.text)]

    @app.post("/request")
    @decorate
    async def with_request(request: Request) -> Reply:
        return Reply(text=request.url.path)


async def check_parameters() -> None:
    """Path parameters, body models, Annotated Depends and postponed annotations reach async and sync handlers alike."""
    guard = new_guard(Iterations(10))
    app = guarded_app(guard)
    routes(app, guarded())
    question = {"text": "why"}
    assert (await post(app, "/agents/bob/run", question)).json == {"text": "bob why 3 False"}
    assert (await post(app, "/sync/4", question)).json == {"text": "5 why 3"}
    assert (await post(app, "/two", {"first": question, "second": question})).json == [question, question]
    assert (await post(app, "/request")).json == {"text": "/request"}
    assert await iterations(guard) == 4
    assert (await post(app, "/sync/x", question)).status == 422


async def check_openapi() -> None:
    """The decorator leaves the OpenAPI document as it is."""
    documents = []
    for decorate in (_plain, guarded(), guarded(Iterations(3), **BOUND)):
        app = FastAPI()
        routes(app, decorate)
        router = APIRouter(prefix="/inner")
        routes(router, decorate)
        app.include_router(router, prefix="/v2")
        documents.append(app.openapi())
    assert documents[0] == documents[1] == documents[2]
    assert "/v2/inner/sync/{number}" in documents[0]["paths"]


async def check_names_for_type_checkers_only() -> None:
    """A name that exists for type checkers only is no worse for a decorated function than for a plain one."""

    async def handler(question: Question) -> OnlyForTypeCheckers:
        return ANSWER  # type: ignore[return-value]

    def registers(function: Any) -> bool:
        try:
            FastAPI().post("/", response_model=None)(function)
        except Exception:  # noqa: BLE001 - whatever this FastAPI makes of it
            return False
        return True

    assert registers(guarded()(handler)) == registers(handler)
    guard = new_guard(Iterations(3))
    assert await guarded(guard=guard)(handler)(Question(text="why")) == ANSWER


async def check_closed_over_names() -> None:
    """A model that only an enclosing function knows is no worse for a decorated function than for a plain one."""

    class Local(BaseModel):
        text: str

    async def handler(question: Local) -> None: ...

    handler.__annotations__["question"] = Local
    guard = new_guard(Iterations(3))
    app = guarded_app(guard)
    app.post("/")(guarded()(handler))
    assert (await post(app, "/", {"text": "why"})).status == 200
    assert (await post(app, "/", {})).status == 422


async def check_refusals() -> None:
    """A refusal in a handler, a dependency or a thread is answered by the middleware."""
    guard = new_guard()
    app = guarded_app(guard)

    @app.post("/async")
    @guarded(Iterations(0))
    async def in_async() -> None: ...

    @app.post("/sync")
    @guarded(Iterations(0))
    def in_sync() -> None: ...

    @guarded(Iterations(0))
    async def dependency() -> None: ...

    @guarded(Iterations(0))
    def dependency_in_thread() -> None: ...

    @guarded(Iterations(0))
    async def dependency_that_yields() -> AsyncIterator[None]:
        yield

    for number, function in enumerate((dependency, dependency_in_thread, dependency_that_yields)):
        app.post(f"/dependency/{number}", dependencies=[Depends(function)])(lambda: None)

    for path in ("/async", "/sync", "/dependency/0", "/dependency/1", "/dependency/2"):
        answer = await post(app, path)
        assert (answer.status, answer.json["code"]) == (429, "request_exceeds_budget"), path
    assert await ledger(guard) == []


_ended: list[str] = []


@guarded()
def in_thread() -> str:
    return "plain"


@guarded()
async def in_loop(first: Annotated[str, Depends(in_thread)]) -> str:
    return f"{first} async"


@guarded()
async def yielding() -> AsyncIterator[str]:
    yield "yields"
    _ended.append(str(current_admission().context.session))


@guarded()
def yielding_in_thread() -> Iterator[str]:
    yield "in a thread"
    _ended.append("thread")


async def check_dependencies() -> None:
    """Plain, async and yielding dependencies are calls: each is counted and gives its value."""
    guard = new_guard(Iterations(10))
    app = guarded_app(guard, routes=[])
    _ended.clear()

    @app.post("/")
    async def handler(
        one: Annotated[str, Depends(in_loop)],
        two: Annotated[str, Depends(yielding)],
        three: Annotated[str, Depends(yielding_in_thread)],
    ) -> str:
        return f"{one}, {two}, {three}"

    answer = await post(app, "/")
    assert answer.json == "plain async, yields, in a thread", answer.sent
    assert sorted(_ended) == ["s", "thread"]
    assert await iterations(guard) == 4
    assert [outcome for outcome, _ in await ledger(guard)] == ["unmetered"] * 4


async def check_return_values() -> None:
    """What a handler returns is metered where it has a provider's shape: as a dict, and in a response."""
    guard = new_guard(Budget("$1/1d", per="caller"))
    app = guarded_app(guard)

    @app.post("/dict")
    @guarded(**BOUND)
    async def as_dict() -> dict[str, Any]:
        return ANSWER

    @app.post("/response")
    @guarded(**BOUND)
    def as_response() -> JSONResponse:
        return JSONResponse(ANSWER)

    for path in ("/dict", "/response"):
        assert (await post(app, path)).json == ANSWER
    assert await ledger(guard) == [("measured", USED)] * 2


async def check_streams() -> None:
    """Streams of both kinds of iterators are metered while they are sent, and settled when they have ended."""
    guard = new_guard(Budget("$1/1d", per="caller"))
    app = guarded_app(guard)
    seen: list[Context] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield event("hel")
        seen.append(current_admission().context)
        yield event("lo", last=True)

    def pieces_sync() -> Iterator[bytes]:
        yield event("hel")
        seen.append(current_admission().context)
        yield event("lo", last=True)

    @app.post("/async")
    @guarded(**BOUND)
    async def streamed() -> StreamingResponse:
        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.post("/sync")
    @guarded(**BOUND)
    def streamed_sync() -> StreamingResponse:
        return StreamingResponse(pieces_sync(), media_type="text/event-stream")

    for path in ("/async", "/sync"):
        assert (await post(app, path)).body == event("hel") + event("lo", last=True)
    assert [context.session for context in seen] == ["s", "s"]
    assert await ledger(guard) == [("measured", USED)] * 2


async def check_wrong_order() -> None:
    """`@guarded` above the route decorator is found at start: in the application, in included routers, in mounts."""
    found_at = {"app": ["/ask ("], "router": ["/v2/inner/ask (", "/a/b/inner/ask ("], "mount": ["/m/ask ("]}
    for place, paths in found_at.items():
        app = guarded_app(new_guard())
        router = APIRouter(prefix="/inner")
        mounted = FastAPI()
        inner = {"app": app, "mount": mounted}.get(place, router)

        @guarded()
        @inner.post("/ask")
        async def ask() -> None: ...

        between = APIRouter()
        between.include_router(router, prefix="/b")
        app.include_router(router, prefix="/v2")
        app.include_router(between, prefix="/a")
        app.mount("/m", mounted)
        message, *_ = await start(app)
        assert message["type"] == "lifespan.startup.failed", place
        assert "@guarded has no effect on" in message["message"]
        assert all(path in message["message"] for path in paths), message
        assert "Put @guarded directly above the function" in message["message"]


async def check_right_order() -> None:
    """`@guarded` below the route decorator starts, also where the plain function has a route of its own."""
    guard = new_guard()
    app = guarded_app(guard)
    routes(app, guarded())

    async def ask() -> None: ...

    app.post("/free")(ask)
    app.post("/guarded")(guarded()(ask))
    app.post("/guarded/twice")(guarded(Iterations(1))(guarded()(ask)))
    app.post("/module")(module_level)
    assert [message["type"] for message in await start(app)] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


async def module_level() -> None:
    """Registered plain, beside a guarded copy that is not registered."""


guarded_copy = guarded()(module_level)


async def check_websockets() -> None:
    """A guarded WebSocket handler starts, and its refusal is found in the application's routes too."""
    guard = new_guard()
    app = guarded_app(guard)

    @guarded()
    @app.websocket("/ws")
    async def socket(connection: WebSocket) -> None: ...

    message, *_ = await start(app)
    assert "/ws" in message["message"]


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check, and say which framework they ran under."""
    warnings.simplefilter("ignore")  # an old framework under a newer Python
    for check in CHECKS:
        asyncio.run(check())
        sys.stdout.write(f"{check.__name__}: passed\n")
    sys.stdout.write(f"FastAPI {fastapi.__version__}, Starlette {starlette.__version__}: {len(CHECKS)} checks passed\n")


if __name__ == "__main__":
    main()
