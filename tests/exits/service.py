"""A guarded application in a process of its own, on a socket that it inherits. In a file of its own, to be run."""

from __future__ import annotations

import argparse
import asyncio
import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.routing import Route as Path_
from tests.exits.kit import PRICES, Settlements, Stage

from asgi_llm_guard import Budget, Concurrency, Guard, GuardMiddleware, Iterations, Route
from asgi_llm_guard.clock import SystemClock
from asgi_llm_guard.storage import open_storage
from asgi_llm_guard.storage.base import Storage
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FakeProvider


def policies(budget: str, slots: int) -> tuple[Iterations, Budget, Concurrency]:
    """What the service and those who look into its file agree on."""
    return Iterations(1_000), Budget(budget, per="global"), Concurrency(slots, per="global")


def storage_at(place: str) -> Storage:
    """The storage that a URL or the path of a file names."""
    return open_storage(place, clock=SystemClock()) if "://" in place else SqliteStorage(Path(place))


def application(place: str, base_url: str, budget: str, slots: int) -> Starlette:
    """`/call` makes one call, `/stream` streams one, `/detached` makes one in a task of its own."""
    storage = storage_at(place)
    guard = Guard(policies(budget, slots), storage=storage, prices=PRICES, hold_wait_s=0)
    stage = Stage(storage, FakeProvider(), base_url, guard, Settlements())

    async def call(request: Request) -> Response:
        return PlainTextResponse(await stage.complete())

    async def stream(request: Request) -> Response:
        return StreamingResponse(stage.stream())

    async def detached(request: Request) -> Response:
        await asyncio.create_task(stage.complete())
        return PlainTextResponse("done")

    return Starlette(
        routes=[
            Path_("/call", call, methods=["POST"]),
            Path_("/stream", stream, methods=["POST"]),
            Path_("/detached", detached, methods=["POST"]),
        ],
        middleware=[
            Middleware(GuardMiddleware, guard=guard, routes=[Route("/{rest:path}", dialect=None, calls="hooked")])
        ],
    )


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--budget", default="$10/1d")
    parser.add_argument("--slots", type=int, default=1_000)
    parser.add_argument("--mounted", action="store_true")
    parser.add_argument("--lifespan", default="on")
    parser.add_argument("--timeout-graceful-shutdown", type=int)
    given = parser.parse_args()
    app = application(given.path, given.base_url, given.budget, given.slots)
    config = uvicorn.Config(
        Starlette(routes=[Mount("/", app)]) if given.mounted else app,
        lifespan=given.lifespan,
        timeout_graceful_shutdown=given.timeout_graceful_shutdown,
        access_log=False,
        timeout_keep_alive=75,  # longer than clients keep connections: none asks on one that is just being closed
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=given.fd)])


if __name__ == "__main__":
    main()
