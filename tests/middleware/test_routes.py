"""The route table: what it takes for a guarded request, and what it refuses to be built from."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from asgi_llm_guard import Iterations, Route
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.routes import RouteTable, normalise, route_path

CHAT = Route("/v1/chat/completions")
AGENT = Route("/agents/{name}")
RUN = Route("/agents/{name}/run", methods=["post"])
READ = Route("/read", methods=["GET"])
FILES = Route("/files/{rest:path}")
CUSTOM = Route("/items/{item:slashed_id}")


@pytest.mark.parametrize(
    "path, method, expected",
    [
        ("/v1/chat/completions", "POST", CHAT),
        ("/V1//chat/./completions/", "POST", CHAT),
        ("/v1/chat/completions\n", "POST", CHAT),
        ("/v1/chat/completions", "GET", CHAT),
        ("/v1/chat/completions", "OPTIONS", "pass"),
        ("/v1/chat/completions", None, CHAT),
        ("/agents/bob", "POST", AGENT),
        ("/agents/..", "POST", AGENT),
        ("/agents/a\\b", "POST", AGENT),
        ("/agents/bob/other", "POST", "pass"),
        ("/agents/bob/run", "POST", RUN),
        ("/agents/bob/run", "pOsT", RUN),
        ("/agents/bob/run", "PUT", "pass"),
        ("/read", "GET", READ),
        ("/read", "HEAD", READ),
        ("/read", "POST", "pass"),
        ("/files/", "POST", FILES),
        ("/files/a/b/c", "POST", FILES),
        ("/items/a/b", "POST", CUSTOM),
        ("/elsewhere", "POST", "pass"),
    ],
)
def test_find(path: str, method: str | None, expected: object) -> None:
    """A route is found by its template, whatever the spelling of path and method; GET stands for HEAD too."""
    table = RouteTable([CHAT, AGENT, RUN, READ, FILES, CUSTOM])
    assert table.find(path, method) == expected


def test_two_routes_of_one_path() -> None:
    """Routes of one path are told apart by their methods."""
    write, erase = Route("/x", methods=["POST"]), Route("/x", methods=["DELETE"])
    table = RouteTable([write, erase])
    assert (table.find("/x", "POST"), table.find("/x", "DELETE"), table.find("/x", "PUT")) == (write, erase, "pass")


@pytest.mark.parametrize("unlisted, expected", [("deny", "deny"), ("pass", "pass")])
def test_unlisted(unlisted: Literal["deny", "pass"], expected: str) -> None:
    """`unlisted` decides on what is not listed, except for GET, HEAD and OPTIONS, and exemptions."""
    table = RouteTable([CHAT], exempt=["/hook"], unlisted=unlisted)
    assert table.find("/other", "POST") == expected
    assert table.find("/other", None) == expected
    assert [table.find("/other", method) for method in ("GET", "HEAD", "OPTIONS")] == ["pass"] * 3
    assert table.find("/hook", "POST") == "pass"
    assert table.find("/hook/", "POST") == expected


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "BREW", "post", None])
def test_no_routes(method: str | None) -> None:
    """Without routes every method but GET, HEAD and OPTIONS is guarded, and every WebSocket."""
    table = RouteTable(None, exempt=["/health"])
    assert isinstance(table.find("/anything\nat all", method), Route)
    assert [table.find("/anything", name) for name in ("GET", "head", "OPTIONS")] == ["pass"] * 3
    assert table.find("/health", method) == "pass"


@pytest.mark.parametrize(
    "path, root, expected",
    [
        ("/api/v1", "/api", "/v1"),
        ("/api", "/api", "/"),
        ("/apiv1", "/api", "/apiv1"),
        ("/v1", "/api", "/v1"),
        ("/v1", "", "/v1"),
    ],
)
def test_route_path(path: str, root: str, expected: str) -> None:
    """The root path is taken off where it is a whole prefix, and only there."""
    assert route_path({"path": path, "root_path": root}) == expected


@pytest.mark.parametrize("path", ["/a/b", "/A/b", "//a/b", "/a/./b", "/a/x/../b/", "\\a\\b", "/a/b\r\n", "/\x00a/ b"])
def test_normalise(path: str) -> None:
    """Every spelling of a path has one normal form."""
    assert normalise(path) == "/a/b"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path": "v1"}, "must start with '/'"),
        ({"path": "/agents/*"}, "{rest:path}"),
        ({"path": "/agents/{name"}, "not a template"),
        ({"path": "/x", "methods": "POST"}, "must be a list"),
        ({"path": "/x", "calls": "some"}, "auto, hooked or opaque"),
        ({"path": "/x", "assumed_output_tokens": 0}, "whole number from 1"),
        ({"path": "/x", "assumed_output_tokens": True}, "whole number from 1"),
        ({"path": "/x", "dialect": None, "clamp": True}, "need a dialect"),
        ({"path": "/x", "dialect": None, "inject_usage": True}, "need a dialect"),
    ],
)
def test_wrong_routes(options: dict[str, Any], message: str) -> None:
    """A route that cannot mean what it says is a configuration error."""
    with pytest.raises(ConfigurationError, match=message):
        Route(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exempt": "/health"}, "a list of paths"),
        ({"exempt": ["health"]}, "must start with '/'"),
        ({"unlisted": "refuse"}, "'deny' or 'pass'"),
    ],
)
def test_wrong_tables(options: dict[str, Any], message: str) -> None:
    """So is a table that cannot."""
    with pytest.raises(ConfigurationError, match=message):
        RouteTable([Route("/x", extra=[Iterations(1)])], **options)
