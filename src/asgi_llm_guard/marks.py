"""Marks: how `@guarded` shows that a function was meant to be guarded, and how it is found out that it is not.

A decorator that stands above a route decorator is applied after the route was registered: the
application calls the plain function, and the guard never hears of it. `@guarded` therefore leaves a
mark on the function that it wraps, and the routes are looked through once, at start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

__all__ = ["mark", "unwrapped"]

_ATTRIBUTE: Final = "__asgi_llm_guard_wrapper__"


def mark(function: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """Leave on `function` that `wrapper` is what should be called."""
    try:
        setattr(function, _ATTRIBUTE, wrapper)
    except (AttributeError, TypeError):
        return  # built-in functions and slotted objects cannot carry a mark
    # `functools.wraps` may have copied the mark of an inner decorator to the wrapper.
    vars(wrapper).pop(_ATTRIBUTE, None)


def unwrapped(app: object) -> list[str]:
    """The endpoints of `app` that carry a mark, and are therefore called past their guard; `METHODS path`."""
    return [
        f"{path} ({getattr(endpoint, '__qualname__', repr(endpoint))})"
        for path, endpoint in _endpoints(app, "", 0)
        if _ATTRIBUTE in getattr(endpoint, "__dict__", {})
    ]


def _endpoints(app: object, prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    routes: Iterable[object] = getattr(app, "routes", None) or ()
    if depth > 8:  # applications may be mounted in themselves
        return
    for route in routes:
        path = prefix + str(getattr(route, "path", ""))
        endpoint = getattr(route, "endpoint", None)
        if endpoint is not None:
            yield path, endpoint
        inner = getattr(route, "app", None)
        if inner is not None and endpoint is None:
            yield from _endpoints(inner, path, depth + 1)
        router = getattr(route, "original_router", None) or getattr(route, "router", None)
        if router is not None:  # FastAPI keeps included routers whole
            yield from _endpoints(router, path, depth + 1)
