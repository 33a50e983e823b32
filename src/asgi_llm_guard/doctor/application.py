"""An ASGI application as it stands: where the guard is among its middleware, and which routes it guards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from asgi_llm_guard.decorator import policies_of
from asgi_llm_guard.doctor.findings import Finding
from asgi_llm_guard.gateway.app import GatewayApp
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.identity.scope_user import ScopeUser
from asgi_llm_guard.marks import unwrapped
from asgi_llm_guard.middleware import GuardMiddleware
from asgi_llm_guard.routes import RouteTable

__all__ = ["GuardedPath", "examine_application", "guards_of"]

_DEPTH: Final = 16
_OURS: Final = "asgi_llm_guard."
_AUTHENTICATION: Final = frozenset({"AuthenticationMiddleware", "SessionMiddleware"})
_REDIRECTING: Final = frozenset({"HTTPSRedirectMiddleware", "TrustedHostMiddleware"})
_COMPRESSING: Final = frozenset({"BrotliMiddleware", "CompressMiddleware", "GZipMiddleware"})
_CORS: Final = "CORSMiddleware"


class GuardedPath(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of requests on one path."""

    path: str
    methods: tuple[str, ...]
    """Empty: WebSocket handshakes, or all."""
    state: str
    """`guarded`, `passes`, `refused` (it is not listed and must be), `own` (the guard's own pages and probes, which no
    limit blocks), or `unguarded`: no middleware is around it."""
    policies: tuple[str, ...] = ()
    """By name, in the order in which they are asked."""


class _Layer(NamedTuple):
    """One middleware: its class, and what it was made with."""

    kind: type
    guard: Guard | None
    table: RouteTable | None
    name: str


def examine_application(app: object) -> tuple[list[Finding], list[GuardedPath]]:
    """What is wrong with the middleware and routes of `app`, and what becomes of each of its routes."""
    layers, inner = _layers(app)
    findings = _order(layers)
    paths = list(_gateway_paths(inner, "") if isinstance(inner, GatewayApp) else _paths(inner, layers, ""))
    guards = [layer for layer in layers if layer.guard is not None]
    if not guards and all(path.state in {"own", "unguarded"} for path in paths):
        findings.append(
            Finding(
                severity="error",
                code="no_middleware",
                seen="no GuardMiddleware is around this application or what is mounted in it: requests are not guarded",
                next_step="app.add_middleware(GuardMiddleware, guard=guard)",
            )
        )
    if len({id(layer.guard) for layer in guards}) < len(guards):
        findings.append(
            Finding(
                severity="warning",
                code="guarded_twice",
                seen="two GuardMiddleware of the same guard are around this application: requests count twice",
                next_step="keep the outer one",
            )
        )
    findings += [
        Finding(
            severity="error",
            code="unwrapped_mark",
            seen=f"@guarded has no effect on {name}: the function was registered without it",
            next_step="put @guarded directly above the function, below @app.get/@app.post",
        )
        for name in unwrapped(app)
    ]
    findings += [
        Finding(
            severity="warning",
            code="pages_in_router",
            seen=f"the guard's own pages at {path} are in a router that is included, which a guard cannot look into: "
            "limits count and refuse their requests as all others",
            next_step=f'mount them in the application itself: app.mount("{path}", ...)',
        )
        for path in (_included_pages(inner, "") if guards else ())
    ]
    findings += _unused_routes(guards, paths)
    return findings, paths


def guards_of(app: object) -> list[Guard]:
    """The guards of the middleware around an application and what is mounted in it, each once."""
    return list({id(layer.guard): layer.guard for layer in _every_layer(app, 0) if layer.guard is not None}.values())


def _every_layer(app: object, depth: int) -> Iterator[_Layer]:
    layers, inner = _layers(app)
    yield from layers
    if isinstance(inner, GatewayApp):
        yield _Layer(type(inner), inner.guard, None, "gateway")
    for route in getattr(inner, "routes", None) or ():
        mounted = getattr(route, "app", None)
        if mounted is not None and getattr(route, "endpoint", None) is None and depth < _DEPTH:
            yield from _every_layer(mounted, depth + 1)


# ---------------------------------------------------------------------------------- middleware


def _layers(app: object) -> tuple[list[_Layer], object]:
    """The middleware around an application, outermost first, and the application inside."""
    layers: list[_Layer] = []
    for _ in range(_DEPTH):
        declared = getattr(app, "user_middleware", None)
        if declared is not None:
            layers += [_declared(each) for each in declared]
            return layers, app
        inner = getattr(app, "app", None)
        if inner is None or getattr(app, "routes", None):
            return layers, app
        layers.append(_made(app))
        app = inner
    return layers, app


def _made(app: object) -> _Layer:
    if isinstance(app, GuardMiddleware):
        return _Layer(type(app), app.guard, app.serving.table, type(app).__name__)
    return _Layer(type(app), None, None, type(app).__name__)


def _declared(middleware: Any) -> _Layer:
    kind, arguments = middleware.cls, dict(middleware.kwargs)
    name = getattr(kind, "__name__", repr(kind))
    if not isinstance(kind, type) or not issubclass(kind, GuardMiddleware):
        return _Layer(kind, None, None, name)
    guard = arguments.get("guard", middleware.args[0] if middleware.args else None)
    table = RouteTable(
        arguments.get("routes"), exempt=arguments.get("exempt", ()), unlisted=arguments.get("unlisted", "pass")
    )
    return _Layer(kind, guard, table, name)


def _is(layer: _Layer, names: Iterable[str]) -> bool:
    kinds = getattr(layer.kind, "__mro__", ())
    return not {kind.__name__ for kind in kinds}.isdisjoint(names)


def _order(layers: Sequence[_Layer]) -> list[Finding]:
    """Who stands inside the guard and should not. What is added to an application last stands outside."""
    place = next((index for index, layer in enumerate(layers) if layer.guard is not None), None)
    if place is None:
        return []
    guard, findings = layers[place].guard, []
    for layer in layers[place + 1 :]:
        found: tuple[str, str] | None = None
        severity = "warning"
        if _is(layer, _AUTHENTICATION):
            if guard is not None and isinstance(guard.identity, ScopeUser):
                severity = "error"
                found = (
                    "the guard asks who was verified before anybody was: every request is the anonymous caller",
                    f"add {layer.name} after GuardMiddleware, so that it stands outside",
                )
        elif _is(layer, _COMPRESSING):
            found = (
                "answers are compressed before the guard reads their usage: calls are charged what they hold",
                f"add {layer.name} after GuardMiddleware, so that it stands outside",
            )
        elif _is(layer, {_CORS}):
            found = (
                "refusals carry no CORS headers: browsers show an error without the reason",
                f"add {layer.name} after GuardMiddleware, so that it stands outside",
            )
        elif _is(layer, _REDIRECTING):
            severity = "note"
            found = (
                "requests that it turns away are counted first",
                f"add {layer.name} after GuardMiddleware, so that it stands outside",
            )
        if found is not None:
            findings.append(
                Finding(
                    severity=severity,  # type: ignore[arg-type]  # one of the three, above
                    code="middleware_order",
                    seen=f"{layer.name} stands inside the guard: {found[0]}",
                    next_step=found[1],
                )
            )
    return findings


# -------------------------------------------------------------------------------------- routes


def _included_pages(app: object, prefix: str, depth: int = 0, *, included: bool = False) -> Iterator[str]:
    """Where the guard's own pages are in a router that FastAPI includes, or in what is mounted there."""
    if depth > _DEPTH:
        return
    for route in getattr(app, "routes", None) or ():
        path, router = _path_of(route, prefix), _router_of(route)
        if router is not None:
            yield from _included_pages(router, path, depth + 1, included=True)
        elif getattr(route, "endpoint", None) is None:
            _, inner = _layers(getattr(route, "app", None))
            if not type(inner).__module__.startswith(_OURS):
                yield from _included_pages(inner, path, depth + 1, included=included)
            elif included and not isinstance(inner, GatewayApp):
                yield path


def _router_of(route: object) -> object | None:
    """The router that a route stands for: FastAPI keeps included ones whole."""
    return getattr(route, "original_router", None)


def _path_of(route: object, prefix: str) -> str:
    return (
        prefix + str(getattr(route, "path", "")) + str(getattr(getattr(route, "include_context", None), "prefix", ""))
    )


def _paths(
    app: object, around: Sequence[_Layer], prefix: str, depth: int = 0, *, included: bool = False
) -> Iterator[GuardedPath]:
    if depth > _DEPTH:
        return
    for route in getattr(app, "routes", None) or ():
        path, router = _path_of(route, prefix), _router_of(route)
        if getattr(route, "endpoint", None) is not None:
            yield _path(path, route, around)
            continue
        if router is not None:
            yield from _paths(router, around, path, depth + 1, included=True)
            continue
        layers, inner = _layers(getattr(route, "app", None))
        known = [*around, *layers]
        if isinstance(inner, GatewayApp):
            yield from _gateway_paths(inner, path)
            continue
        if type(inner).__module__.startswith(_OURS) and not included:
            yield GuardedPath(path=path or "/", methods=(), state="own")
            continue
        if getattr(inner, "routes", None):
            yield from _paths(inner, known, path, depth + 1, included=included)
        else:
            yield _path(path, route, known)


def _gateway_paths(app: GatewayApp, prefix: str) -> Iterator[GuardedPath]:
    """A mounted gateway admits by itself what nobody around it has."""
    policies = tuple(policy.name for policy in app.guard.policies)
    for route in app.routes:
        yield GuardedPath(
            path=prefix + route.path, methods=tuple(route.methods or ()), state="guarded", policies=policies
        )


def _path(path: str, route: object, around: Sequence[_Layer]) -> GuardedPath:
    methods = tuple(sorted(set(getattr(route, "methods", None) or ()) - {"HEAD"}))
    guards = [layer for layer in around if layer.table is not None and layer.guard is not None]
    states: list[str] = []
    policies: list[str] = []
    for layer in guards:
        assert layer.table is not None  # noqa: S101 - chosen so
        assert layer.guard is not None  # noqa: S101 - as above
        for method in methods or (None,):
            found = layer.table.find(path, method)
            if isinstance(found, str):
                states.append("refused" if found == "deny" else "passes")
                continue
            states.append("guarded")
            own = policies_of(getattr(route, "endpoint", None))
            policies += [policy.name for policy in (*layer.guard.policies, *found.extra, *own)]
    state = next((each for each in ("refused", "guarded") if each in states), "passes" if guards else "unguarded")
    return GuardedPath(path=path, methods=methods, state=state, policies=tuple(dict.fromkeys(policies)))


def _unused_routes(guards: Sequence[_Layer], paths: Sequence[GuardedPath]) -> list[Finding]:
    """Guarded routes that no route of the application answers to: a mistyped path guards nothing."""
    findings = []
    for layer in guards:
        for route in (layer.table.routes or ()) if layer.table is not None else ():
            alone = RouteTable([route])
            methods = [*(route.methods or ()), "POST", "GET"]
            if not any(
                alone.find(each.path, method) is route
                for each in paths
                for method in {*each.methods, *([] if each.methods else methods)}
            ):
                findings.append(
                    Finding(
                        severity="warning",
                        code="route_matches_nothing",
                        seen=f"the guarded route {route.path} is no route of this application",
                        next_step="correct its path or methods; a request to another path passes unguarded",
                    )
                )
    return findings
