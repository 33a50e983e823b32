"""An application that is started more than once, as test suites do."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_llm_guard import Concurrency, Guard, GuardMiddleware, Iterations


async def home(request: Request) -> PlainTextResponse:
    return PlainTextResponse("home")


@pytest.mark.parametrize("storage", ["memory://", "sqlite:///guard.db"])
def test_started_again_it_takes_requests_again(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a shutdown requests are refused; after the next start they are not, and what was counted still counts."""
    monkeypatch.chdir(tmp_path)
    guard = Guard([Iterations(2), Concurrency(1, per="session")], storage=storage)
    app = Starlette(routes=[Route("/", home, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=guard)
    client = TestClient(app, headers={"x-session-id": "s"})

    with client:
        assert client.post("/").text == "home"
    assert client.post("/").status_code == 503
    with client:
        assert [client.post("/").status_code for _ in range(2)] == [200, 429]
        client.portal.call(guard.aclose)  # type: ignore[union-attr]  # set while it is entered
