"""What is wrong is said when things are built, by name, never at request time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asgi_llm_guard import Concurrency, Guard, GuardMiddleware, Iterations, RateLimit, Route, guarded
from asgi_llm_guard.errors import ConfigurationError

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: Guard(identity="x"), "identity: expected a resolver"),  # type: ignore[arg-type]
    (lambda: Guard(session="x-session-id"), "session: expected an extractor"),  # type: ignore[arg-type]
    (lambda: Guard(Iterations(3)), "policies: expected a list"),  # type: ignore[arg-type]
    (lambda: Guard(["60/minute"]), "policies: expected policies"),  # type: ignore[list-item]
    (lambda: Guard(agents={"a": {"max_iteration": 3}}), "agents.a: 'max_iteration' is no limit"),
    (lambda: Guard(hold_wait_s=-1), "hold_wait_s: expected seconds"),
    (lambda: Guard(storage="redis"), "storage: expected a URL"),
    (lambda: Route("/x", session="x-session-id"), "session must be an extractor"),
    (lambda: Route("/x", methods=["PSOT"]), "expected methods such as POST, got 'PSOT'"),
    (lambda: _middleware(["/x"]), "routes: expected Route"),
    (lambda: _middleware([Route("/x"), Route("/X/")]), "is there twice"),
    (lambda: _middleware([Route("/x", clamp=True)]), "no dialect is known by this path"),
    (lambda: _middleware(None, exempt=["/files/{name}"]), "exempt: paths are taken exactly"),
    (lambda: guarded(model="m", max_output_tokens=-1), "max_output_tokens: expected a whole number from 0"),
    (lambda: Iterations(3, name="loop.shadow"), "what shadows are called"),
]


def _middleware(routes: Any, **options: Any) -> GuardMiddleware:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None: ...

    return GuardMiddleware(app, Guard(), routes=routes, **options)


@pytest.mark.parametrize(("build", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_settings_are_refused_at_construction(build: Callable[[], Any], message: str) -> None:
    """A wrong argument raises `ConfigurationError` while things are built."""
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_what_counts_requests_and_what_counts_calls_are_two_meters() -> None:
    """A limit on requests and an equal one on calls never share a counter, so neither lets the other's calls pass."""
    from asgi_llm_guard import Context

    for kind in (lambda counts: RateLimit("5/minute", counts=counts), lambda counts: Concurrency(5, counts=counts)):
        keys = {kind(counts).plan(Context(), None, 0).claims[0].meter.key for counts in ("requests", "calls")}
        assert len(keys) == 2
