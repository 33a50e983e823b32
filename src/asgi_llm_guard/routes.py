"""Which requests are guarded, and how: `Route`, and the matching of paths.

Guarded paths match widely and exemptions exactly. A path is compared as it was sent, which is how
routers compare it, and after control characters, `//`, `.`, `..`, a trailing slash and letter case have
been taken out of it, so that no other spelling of a guarded path goes by; an exemption holds only for
the very path that it names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.idempotency import ttl_ms
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.stream_rules import StreamRules

__all__ = ["Route", "RouteTable", "normalise", "route_path"]

_PARAMETER: Final = re.compile(r"{([a-zA-Z_][a-zA-Z0-9_]*)(:[a-zA-Z_][a-zA-Z0-9_]*)?}")
_ONE_SEGMENT: Final = frozenset({None, ":str", ":int", ":float", ":uuid"})
_ODD: Final = re.compile(r"//|/\.|[\\\x00-\x20\x7f]|/\Z")
_INVISIBLE: Final = re.compile(r"[\x00-\x20\x7f]")
_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_UNGUARDED_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Route:
    """A guarded route.

    `path` is a template as Starlette writes it: `/agents/{name}`, `/files/{rest:path}`.
    """

    path: str
    methods: Sequence[str] | None = None
    """`None`: every method except OPTIONS. GET stands for HEAD too, as it does in routers."""
    dialect: str | None = "auto"
    """The wire format of the body: `openai`, `auto` (recognised by the path), or `None`: do not read the body."""
    extra: Sequence[Policy] = ()
    """Policies of this route, in addition to the guard's."""
    calls: Literal["auto", "hooked", "opaque"] = "auto"
    """What a request costs in which no call was seen. `hooked`: nothing, because every call is seen; `opaque`:
    what was held; `auto`: `hooked` once a client hook is installed on the guard, `opaque` until then."""
    clamp: bool = False
    """Lower the request's output limit to what is left, or set one, instead of refusing. Changes the body."""
    inject_usage: bool = False
    """Ask the provider for usage on streams, and take the extra chunk out for clients that did not ask.
    Changes the body."""
    assumed_output_tokens: int | None = None
    """Held for a request without an output limit of its own; `None`: the guard's, else the model's maximum."""
    release_on_4xx: bool = False
    """Charge nothing when the response is a 4xx and no call was seen."""
    session: Any = None
    """An extractor for this route's session id, in place of the guard's."""
    idempotency: bool | str = False
    """Give the answer again to a verified caller that repeats its request with the same `Idempotency-Key`: for a day,
    or for a time such as `"1h"`. Requests with a key are read as a whole."""

    streams: StreamRules | None = None
    """What holds for streamed answers; `None`: the guard's."""

    def __post_init__(self) -> None:
        if self.streams is not None and not isinstance(self.streams, StreamRules):
            raise ConfigurationError(
                f"Route {self.path}: streams must be StreamRules such as StreamRules(cut=True), got {self.streams!r}"
            )
        if not isinstance(self.path, str) or not self.path.startswith("/"):
            raise ConfigurationError(f"Route: the path must start with '/', got {self.path!r}")
        if re.search(r"[{}*]", _PARAMETER.sub("", self.path)):
            raise ConfigurationError(
                f"Route {self.path}: not a template; write parameters as {{name}}, and {{rest:path}} for any rest"
            )
        if isinstance(self.methods, str):
            raise ConfigurationError(
                f"Route {self.path}: methods must be a list such as ['POST'], got {self.methods!r}"
            )
        for method in self.methods or ():
            if not isinstance(method, str) or method.upper() not in _METHODS:
                raise ConfigurationError(f"Route {self.path}: expected methods such as POST, got {method!r}")
        if self.session is not None and not callable(getattr(self.session, "extract", None)):
            raise ConfigurationError(
                f"Route {self.path}: session must be an extractor such as header('x-session-id'), got {self.session!r}"
            )
        if self.calls not in {"auto", "hooked", "opaque"}:
            raise ConfigurationError(f"Route {self.path}: calls must be auto, hooked or opaque, got {self.calls!r}")
        tokens = self.assumed_output_tokens
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise ConfigurationError(
                f"Route {self.path}: assumed_output_tokens must be a whole number from 1, got {tokens!r}"
            )
        ttl_ms(self.idempotency, name=f"Route {self.path}")
        if (self.clamp or self.inject_usage) and self.dialect is None:
            raise ConfigurationError(f"Route {self.path}: clamp and inject_usage need a dialect; got dialect=None")


def route_path(scope: Mapping[str, Any], root_path: str = "") -> str:
    """The path of the request inside its (mounted) application: `scope["path"]` without `root_path`.

    `root_path`: one that the application itself puts in place of the scope's (`FastAPI(root_path=...)`).
    """
    path: str = scope["path"]
    root: str = root_path or scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in {"", "/"}:
        return path[len(root) :] or "/"
    return path


def normalise(path: str) -> str:
    """`path` with control characters, spaces, doubled slashes, dot segments, the trailing slash and letter case
    taken out."""
    if _ODD.search(path) is None:
        return path.casefold()  # nearly every request
    parts: list[str] = []
    for part in _INVISIBLE.sub("", path).replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    return "/" + "/".join(parts).casefold()


class RouteTable:
    """Finds the route of a request. Built once; exact templates are found by one look-up."""

    def __init__(
        self, routes: Sequence[Route] | None, *, exempt: Sequence[str] = (), unlisted: Literal["deny", "pass"] = "pass"
    ) -> None:
        if unlisted not in {"deny", "pass"}:
            raise ConfigurationError(f"unlisted: expected 'deny' or 'pass', got {unlisted!r}")
        if isinstance(exempt, str):
            raise ConfigurationError(f"exempt: expected a list of paths, got the text {exempt!r}")
        for path in exempt:
            if not path.startswith("/"):
                raise ConfigurationError(f"exempt: a path must start with '/', got {path!r}")
            if _PARAMETER.search(path):
                raise ConfigurationError(f"exempt: paths are taken exactly, without parameters; got {path!r}")
        self.unlisted = unlisted
        self.routes = tuple(routes) if routes is not None else None
        self._exempt = frozenset(exempt)
        self._exact: dict[str, list[tuple[Route, frozenset[str] | None]]] = {}
        self._templates: list[tuple[re.Pattern[str], Route, frozenset[str] | None]] = []
        seen: set[tuple[str, str | None]] = set()
        for route in self.routes or ():
            if not isinstance(route, Route):
                raise ConfigurationError(f"routes: expected Route('/path'), got {route!r}")
            for method in route.methods or (None,):
                if (place := (normalise(route.path), method and method.upper())) in seen:
                    raise ConfigurationError(f"routes: {route.path} is there twice for {method or 'all methods'}")
                seen.add(place)
            if _PARAMETER.search(route.path):
                self._templates.append((_template(route.path), route, _methods(route)))
            else:
                self._exact.setdefault(normalise(route.path), []).append((route, _methods(route)))
        self._default = Route("/{path:path}")

    def find(self, path: str, method: str | None) -> Route | Literal["deny", "pass"]:
        """The route of a request; `pass` if it is not guarded, `deny` if it is not listed and must be.

        `method` is `None` for WebSocket handshakes.
        """
        if path in self._exempt:
            return "pass"
        if method is not None:
            method = method.upper()  # class-based endpoints take `post` for POST
        if self.routes is None:
            return "pass" if method in _UNGUARDED_METHODS else self._default
        normal = normalise(path)
        for route, methods in self._exact.get(normal, ()):
            if _takes(methods, method):
                return route
        if self._templates:
            # As it was sent, too: to a router, `..` is a parameter's value like any other.
            literal = path.casefold()
            for pattern, route, methods in self._templates:
                if _takes(methods, method) and (pattern.fullmatch(normal) or pattern.fullmatch(literal)):
                    return route
        if self.unlisted == "deny" and method not in _UNGUARDED_METHODS:
            return "deny"
        return "pass"


def _methods(route: Route) -> frozenset[str] | None:
    if route.methods is None:
        return None
    methods = {method.upper() for method in route.methods}
    return frozenset(methods | {"HEAD"} if "GET" in methods else methods)


def _takes(methods: frozenset[str] | None, method: str | None) -> bool:
    if method is None:
        return True
    if methods is None:
        return method != "OPTIONS"
    return method in methods


def _template(path: str) -> re.Pattern[str]:
    pattern, end = "", 0
    normal = path.rstrip("/")
    for match in _PARAMETER.finditer(normal):
        pattern += re.escape(normal[end : match.start()].casefold())
        pattern += "[^/]+" if match[2] in _ONE_SEGMENT else ".*"
        end = match.end()
    # Routers compare with `$`, which lets a last line break pass.
    return re.compile(pattern + re.escape(normal[end:].casefold()) + r"/*\n?", re.DOTALL)
