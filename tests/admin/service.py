"""A guarded service with its administration page, in a process of its own. In a file of its own, to be run."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from tests.admin.kit import CALLER_KEY, SECRET, options

from asgi_llm_guard import Budget, Guard, GuardMiddleware, Iterations, Quota, QuotaBook
from asgi_llm_guard.control import Control
from asgi_llm_guard.gateway import Gateway
from asgi_llm_guard.identity import ApiKeys
from asgi_llm_guard.identity.keys import ApiKey
from asgi_llm_guard.pricing import PriceBook

MODEL = "openai/fake"


def application(folder: Path, base_url: str) -> Starlette:
    """`/llm` is a gateway to a provider, `/admin` the page, `/usage` the callers' one."""
    key = ApiKey(id="k1", digest=ApiKeys.hash(CALLER_KEY, SECRET), caller="service-a", departments=("research",))
    guard = Guard(
        [Quota(QuotaBook(), unknown="allow"), Budget("$5000/1d", per="caller"), Iterations(1_000)],
        storage=f"sqlite:///{folder}/guard.db",
        control=Control(f"sqlite:///{folder}/control.db", secret=SECRET),
        identity=ApiKeys([key], secret=SECRET),
        prices=PriceBook.snapshot(overrides={MODEL: {"input": 1, "output": 2}}),
    )
    deployment = {"model_name": "model", "litellm_params": {"model": MODEL, "api_base": base_url, "api_key": "sk-test"}}
    gateway = Gateway(guard, [deployment])
    return Starlette(
        routes=[
            Mount("/admin", guard.admin_app(options())),
            Mount("/usage", guard.usage_app()),
            Mount("/llm", gateway.app()),
        ],
        middleware=[Middleware(GuardMiddleware, guard=guard)],
    )


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--folder", type=Path, required=True)
    given.add_argument("--base-url", required=True)
    given.add_argument("--fd", type=int, required=True)
    told = given.parse_args()
    listener = socket.socket(fileno=told.fd)
    config = uvicorn.Config(
        application(told.folder, told.base_url), log_level="warning", timeout_graceful_shutdown=2, timeout_keep_alive=75
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
