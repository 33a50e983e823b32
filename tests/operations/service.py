"""The application of `tests.exits.service` with the guard's own signal handlers. In a file of its own, to be run."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
from typing import Any

import uvicorn
from tests.exits.kit import CONTEXT, PRICES, Settlements, Stage
from tests.exits.service import application, policies, storage_at

from asgi_llm_guard import Guard
from asgi_llm_guard.testing import FakeProvider


def main() -> None:
    """Serve, or work without a server, until a signal comes."""
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--lifespan", default="on")
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--job", action="store_true")
    given = parser.parse_args()
    if given.job:
        asyncio.run(job(given.path, given.base_url, given.timeout))
        return
    app = application(given.path, given.base_url, "$10/1d", 1_000)
    options: dict[str, Any] = app.user_middleware[0].kwargs
    options["guard"].install_signal_handlers(given.timeout)
    config = uvicorn.Config(app, lifespan=given.lifespan, access_log=False)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=given.fd)])


async def job(place: str, base_url: str, timeout_s: float) -> None:
    """One stream outside of HTTP, in a process where nobody else handles signals."""
    storage = storage_at(place)
    guard = Guard(policies("$10/1d", 1_000), storage=storage, prices=PRICES, hold_wait_s=0)
    guard.install_signal_handlers(timeout_s)
    stage = Stage(storage, FakeProvider(), base_url, guard, Settlements())
    async with guard.open(CONTEXT):
        async for word in stage.stream():
            logging.getLogger("job").info("word %s", word)


if __name__ == "__main__":
    main()
