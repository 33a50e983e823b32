"""Marks: how `@guarded` shows that a function was meant to be guarded, and how it is found out that it is not.

A decorator that stands above a route decorator is applied after the route was registered: the
application calls the plain function, and the guard never hears of it. `@guarded` therefore leaves a
mark on the function that it wraps, and the routes are looked through once, at start.

A function may also be registered plain on purpose, beside a guarded copy of it. What its name stands
for tells the two apart: a decorator's result has taken the name over.

Applications of the guard itself (its administration page) carry a mark, too: no limit stands in the way of whoever
wants to look at the limits. The path that they are mounted at is found in the same way.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

__all__ = ["is_own", "mark", "mark_own", "mark_own_where_told", "own_mounts", "unwrapped"]

_ATTRIBUTE: Final = "__asgi_llm_guard_mark__"
_OWN: Final = "__asgi_llm_guard_own__"
_DEPTH: Final = 16


class _Mark(NamedTuple):
    function: Callable[..., Any]
    """Where the mark was left: decorators that come after copy it to functions of their own."""
    wrappers: list[Callable[..., Any]]


def mark(function: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """Leave on `function` that `wrapper` is what should be called."""
    found = _mark_of(function)
    try:
        if found is None:
            setattr(function, _ATTRIBUTE, _Mark(function, [wrapper]))
        else:
            found.wrappers.append(wrapper)
    except (AttributeError, TypeError):
        return  # built-in functions and slotted objects cannot carry a mark
    # `functools.wraps` may have copied the mark of an inner decorator to the wrapper.
    vars(wrapper).pop(_ATTRIBUTE, None)


def unwrapped(app: object) -> list[str]:
    """The endpoints of `app` that are called past their guard, as `path (function)`."""
    endpoints = list(_endpoints(app, "", 0))
    registered = {id(endpoint) for _, endpoint in endpoints}
    return [
        f"{path} ({getattr(endpoint, '__qualname__', repr(endpoint))})"
        for path, endpoint in endpoints
        if (found := _mark_of(endpoint)) is not None and _meant(found, registered)
    ]


def mark_own(app: type[Any]) -> type[Any]:
    """Mark a class of ASGI applications as the guard's own."""
    setattr(app, _OWN, True)
    return app


def mark_own_where_told(app: type[Any]) -> type[Any]:
    """As `mark_own`, of an application of which only the paths are free that its guard was told (`Guard.own_paths`)."""
    setattr(app, _OWN, False)
    return app


def own_mounts(app: object) -> tuple[str, ...]:
    """Where the guard's own applications are mounted in `app`: the part of the path before its first parameter."""
    return tuple(dict.fromkeys(path.partition("{")[0].rstrip("/") for path in _own_paths(app, "", 0)))


def is_own(app: object, scope: Mapping[str, Any]) -> bool | None:
    """Whether the router of `app` would send the request to one of the guard's own applications; `None`: it cannot be
    told, because whoever takes the request shows no routes, or no route takes it.

    A route that stands before the mount, and takes the request, is not the guard's.
    """
    for _ in range(_DEPTH):
        taken = _taken(app, scope)
        if taken is None:
            return None
        route, app, scope = taken
        if _own(app) is not None:
            return True
        if getattr(route, "endpoint", None) is not None:
            return False
    return False


def _taken(app: object, scope: Mapping[str, Any]) -> tuple[object, object, Mapping[str, Any]] | None:
    """The route that takes a request, what it leads to, and the scope there. As routers do: the first one that takes it
    altogether, else the first one that only lacks its method."""
    partly = None
    for route in _routes(app):
        matches = getattr(route, "matches", None)
        if matches is None:
            continue
        found, child = matches(scope)
        taken = route, getattr(route, "app", None), {**scope, **child}
        if found.value > 1:
            return taken
        if found.value and partly is None:
            partly = taken
    return partly


def _own(app: object) -> bool | None:
    """The mark of one of the guard's own applications, perhaps with middleware around it; `None`: it is none."""
    for _ in range(_DEPTH):
        found: bool | None = getattr(app, _OWN, None)
        if found is not None or app is None or getattr(app, "routes", None):
            return found
        app = getattr(app, "app", None)
    return None


def _own_paths(app: object, prefix: str, depth: int) -> Iterator[str]:
    if depth > _DEPTH:
        return
    for route in _routes(app):
        path = prefix + str(getattr(route, "path", ""))
        if _own(getattr(route, "app", None)):
            yield path
        elif getattr(route, "endpoint", None) is None:
            yield from _own_paths(route, path, depth + 1)


def _mark_of(function: object) -> _Mark | None:
    found = getattr(function, "__dict__", {}).get(_ATTRIBUTE)
    return found if isinstance(found, _Mark) and found.function is function else None


def _meant(found: _Mark, registered: set[int]) -> bool:
    """Whether the guarded copy was meant where the plain function is registered."""
    named = _named(found.function)
    if named is found.function:
        return False
    if any(layer is found.function for layer in _layers(named)):
        return True
    return not any(id(wrapper) in registered for wrapper in found.wrappers)


def _named(function: Callable[..., Any]) -> object | None:
    """What the function's name stands for in its module; `None` for functions inside functions."""
    value: object = sys.modules.get(getattr(function, "__module__", ""))
    for name in getattr(function, "__qualname__", "<none>").split("."):
        value = inspect.getattr_static(value, name, None)
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _layers(function: object) -> list[object]:
    layers: list[object] = []
    while function is not None and len(layers) < _DEPTH:
        layers.append(function)
        function = getattr(function, "__wrapped__", None)
    return layers


def _endpoints(app: object, prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    if depth > _DEPTH:  # applications may be mounted in themselves
        return
    for route in _routes(app):
        path = prefix + str(getattr(route, "path", ""))
        endpoint = getattr(route, "endpoint", None)
        if endpoint is not None:
            yield path, endpoint
            continue
        router = getattr(route, "original_router", None)  # FastAPI keeps included routers whole
        if router is not None:
            path += str(getattr(getattr(route, "include_context", None), "prefix", ""))
        yield from _endpoints(route if router is None else router, path, depth + 1)


def _routes(app: object) -> Iterable[object]:
    """The routes of an application, a mount or a router, through the middleware around it."""
    for _ in range(_DEPTH):
        routes: Iterable[object] = getattr(app, "routes", None) or ()
        if routes or app is None:
            return routes
        app = getattr(app, "app", None)
    return ()
